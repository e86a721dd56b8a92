//! Several agents on several nodes: real processes, a real etcd, the real kernel, and pods that ping.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

mod announced;
mod bed;
mod bgp;
mod changes;
mod cleanup;
mod direct;
mod doctor;
mod doctor_policy;
mod doctor_ways;
mod events;
mod extension;
mod families;
mod fast_path;
mod fights;
mod handshake;
mod hasty;
mod heal;
mod health;
mod hostile;
mod identity;
mod independent;
mod intruders;
mod intrusions;
mod kube;
mod kubernetes;
mod left_tunnel;
mod live;
mod look;
mod look_ipv6;
mod many;
mod masquerade;
mod metrics;
mod offload;
mod own;
mod ownership;
mod peer_counters;
mod policy;
mod prerequisites;
mod probes;
mod restart;
mod shortage;
mod site;
mod standing;
mod status;
mod stay;
mod strangers;
mod swap;
mod takeover;
mod udp;
mod underlay;
mod wireguard;

/// A machine that does something else takes this long for something that takes a moment.
const LIMIT_SECONDS: u64 = 30;
