//! Which rule a request falls under.
