//! Says which node of a cluster holds which subnet, and keeps this node's own claim alive.
//!
//! The vocabulary is Flannel's: a *lease* is one node's slice of the *network*, together with what its
//! peers need in order to reach it. Stores hand out complete sets of leases ([`Leases`]), never events,
//! so that a reader can't miss one.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | `net-conf.json`: the network and the backend, checked |
//! | [`lease`] | a lease, the set of leases, and their Flannel key and JSON forms |
//! | [`allocate`] | which subnet a new node takes; pure |
//! | [`wireguard`] | keys of WireGuard |
//! | [`shared_map`] | a sorted map whose versions share what they have in common |
//! | [`env_file`] | `subnet.env`, what the CNI plugin reads |
//! | [`store`] | the contract of every lease store |
//! | [`memory`], [`file`](mod@file), [`etcd`], `kube` | the stores |
//!
//! Without its default features the crate has no runtime and no network code: the CNI plugin uses it so.

pub mod allocate;
pub mod config;
pub mod env_file;
pub mod gojson;
pub mod lease;
pub mod mac;
pub mod net;
pub mod policy;
pub mod regular;
pub mod shared_map;
pub mod text;
pub mod wireguard;

#[cfg(feature = "store")]
mod claim;
#[cfg(feature = "etcd")]
pub mod etcd;
#[cfg(feature = "file")]
pub mod file;
#[cfg(feature = "kube")]
pub mod kube;
#[cfg(feature = "store")]
pub mod memory;
#[cfg(any(feature = "etcd", feature = "file", feature = "kube"))]
mod pace;
#[cfg(feature = "store")]
pub mod saved;
#[cfg(any(feature = "etcd", feature = "file"))]
mod standing;
#[cfg(feature = "store")]
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(any(feature = "etcd", feature = "kube"))]
mod tls;
#[cfg(any(feature = "file", feature = "kube"))]
mod watched;

pub use config::wireguard::{Engine, Mode, WireguardConfig};
pub use config::{
    BackendConfig, ChecksumOffload, ConfigError, ExtensionConfig, IpipConfig, NetworkConfig, Range,
    VxlanConfig,
};
pub use lease::{Attachment, Lease, Leases, Malformed, Preparing, Vtep, WireguardEnds};
pub use mac::Mac;
pub use net::{Family, PublicAddrs, Subnets};
pub use shared_map::{Recount, SharedMap, SharedSet};
#[cfg(feature = "store")]
pub use store::{Claim, Feed, Known, LeaseStore, Loss, StoreError, Tenure};
