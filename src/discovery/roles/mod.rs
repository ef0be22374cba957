//! Who is primary, by one source a file. Each only reports.

pub(crate) mod consul;
pub(super) mod file;
pub(super) mod http;
pub(super) mod litefs;
