//! The real binary with the real delegate plugins. Needs root and the package containernetworking-plugins.

#![expect(clippy::unwrap_used, reason = "all of this is tests")]

mod addresses;
mod framework;
mod garbage;
mod pods;
mod refusals;
mod status;
mod support;
