//! The real binary with the real delegate plugins. Needs root and the package containernetworking-plugins.

#![expect(clippy::unwrap_used, reason = "all of this is tests")]

mod addresses;
mod applets;
mod bad;
mod bandwidth;
mod chain;
mod crowd;
mod delegates;
mod duplicates;
mod early;
mod examples;
mod features;
mod framework;
mod garbage;
mod install;
mod killed;
mod loopback;
mod matrix;
mod networks;
mod pods;
mod policy;
mod portmap;
mod refusals;
mod reserved;
mod runtime;
mod status;
mod storm;
mod support;
mod waiting;
