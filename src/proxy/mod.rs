//! A request becomes a response.
mod body;
mod headers;
mod hold;
mod upgrade;
