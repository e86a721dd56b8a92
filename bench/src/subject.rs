//! What can be measured, one module for each subcommand.

pub(crate) mod cni;
pub(crate) mod control;
pub(crate) mod kube;
pub(crate) mod live;
pub(crate) mod net;
pub(crate) mod policy;
pub(crate) mod rules;
