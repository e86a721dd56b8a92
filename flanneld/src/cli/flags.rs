//! The agent's flags: each with its default, its help text and the function that reads its value.
//!
//! The type can't be printed: it holds the etcd password.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use backends::policy::SteerMode;
use clap::{ArgAction, Parser};
use regex_lite::Regex;

use super::check::{self, TrafficManager};
use crate::fast_path;
use crate::policy::PolicyMode;

pub(super) const FILES: &str = "Files and logging";
pub(super) const INTERFACE: &str = "Interface and addresses";
pub(super) const STORE: &str = "Lease store";
pub(super) const HEALTH: &str = "Health";
pub(super) const RULES: &str = "Traffic rules";
pub(super) const KUBERNETES: &str = "Kubernetes";
pub(super) const POLICIES: &str = "Network policies";
pub(super) const COMMANDS: &str = "Commands";
pub(super) const COMPATIBLE: &str = "Accepted for compatibility with Go flannel";

const GRAMMAR: &str = "\
Flags are written --flag=value, --flag value, -flag=value or -flag value; a boolean takes its value only
with '=' and means true without one. Every flag but --version can be set by the environment variable that
its help names; the command line wins, and an empty variable is no variable. NODE_NAME is this node's name,
WIREGUARD_KEY_FILE the file with its WireGuard key.

Exit codes: 0 after a clean stop, --help and --version; 1 when flanneld can't run; 2 when a flag or a variable can't be used.";

const EXAMPLES: &str = "\
Examples:
  flanneld --etcd-endpoints=http://192.0.2.10:2379 --iface=eth0 --ip-masq
      leases in etcd; the configuration is the value of /coreos.com/network/config:
      etcdctl put /coreos.com/network/config '{\"Network\":\"10.244.0.0/16\",\"Backend\":{\"Type\":\"vxlan\"}}'
  NODE_NAME=node1 flanneld --kube-subnet-mgr --kubeconfig-file=/etc/kubernetes/flannel.conf --ip-masq
      leases as annotations of Kubernetes nodes, outside of a pod
  flanneld --lease-store=file:/srv/flannel --healthz-ip=127.0.0.1 --healthz-port=8081
      leases in a directory that all nodes share; curl http://127.0.0.1:8081/readyz tells what is missing
  flanneld cleanup --dry-run
      what an agent left on this host";

/// Leases a subnet for this node and keeps the kernel in the state that all leases ask for.
#[derive(Parser)]
#[command(
    name = "flanneld",
    bin_name = "flanneld",
    disable_version_flag = true,
    after_help = format!("{EXAMPLES}\n\n{GRAMMAR}")
)]
pub(super) struct RunFlags {
    /// Name or address of the interface that carries the traffic between nodes; repeatable, tried in order
    #[arg(long, value_name = "NAME|IP", help_heading = INTERFACE)]
    pub(super) iface: Vec<String>,
    /// Regular expression for that interface's addresses, then its name; repeatable, tried after --iface
    #[arg(long, value_name = "REGEX", value_parser = check::regex, help_heading = INTERFACE)]
    pub(super) iface_regex: Vec<Regex>,
    /// Take the interface by which this address is reached; tried last
    #[arg(long, value_name = "IP", value_parser = check::address, help_heading = INTERFACE)]
    pub(super) iface_can_reach: Option<IpAddr>,
    /// IPv4 address by which other nodes reach this one; the interface's if not given
    #[arg(long, value_name = "IP", value_parser = check::public_ipv4, help_heading = INTERFACE)]
    pub(super) public_ip: Option<IpAddr>,
    /// IPv6 address by which other nodes reach this one; the interface's if not given
    #[arg(long, value_name = "IP", value_parser = check::public_ipv6, help_heading = INTERFACE)]
    pub(super) public_ipv6: Option<IpAddr>,

    /// Where leases are kept: 'etcd', or 'file:DIR' for a directory that all nodes share
    #[arg(long, value_name = "STORE", default_value = "etcd", help_heading = STORE)]
    pub(super) lease_store: String,
    /// Renew the lease this long before it ends, in minutes, 1 to 1439
    #[arg(long, value_name = "MINUTES", default_value_t = 60, value_parser = check::renew_margin, help_heading = STORE)]
    pub(super) subnet_lease_renew_margin: i64,
    /// URLs of the etcd members, separated by commas
    #[arg(long, value_name = "URLS", default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379", help_heading = STORE)]
    pub(super) etcd_endpoints: String,
    /// Prefix of all keys in etcd
    #[arg(long, value_name = "KEY", default_value = "/coreos.com/network", help_heading = STORE)]
    pub(super) etcd_prefix: String,
    /// Key of the TLS client certificate for etcd
    #[arg(long, value_name = "FILE", help_heading = STORE)]
    pub(super) etcd_keyfile: Option<PathBuf>,
    /// TLS client certificate for etcd
    #[arg(long, value_name = "FILE", help_heading = STORE)]
    pub(super) etcd_certfile: Option<PathBuf>,
    /// Certificates of the authorities that sign etcd's certificate; the system's if not given
    #[arg(long, value_name = "FILE", help_heading = STORE)]
    pub(super) etcd_cafile: Option<PathBuf>,
    /// User name for etcd
    #[arg(long, value_name = "NAME", help_heading = STORE)]
    pub(super) etcd_username: Option<String>,
    /// Password for etcd; prefer the variable, which other users can't see
    #[arg(long, value_name = "PASSWORD", help_heading = STORE)]
    pub(super) etcd_password: Option<String>,

    /// Address for /healthz and /readyz; 0.0.0.0 and :: both mean all addresses of both families
    #[arg(long, value_name = "IP", default_value = "0.0.0.0", value_parser = check::address, help_heading = HEALTH)]
    pub(super) healthz_ip: IpAddr,
    /// TCP port for /healthz and /readyz; 0 for none
    #[arg(long, value_name = "PORT", default_value_t = 0, value_parser = check::health_port, help_heading = HEALTH)]
    pub(super) healthz_port: i64,
    /// Time of a round of probes (ICMP echo requests) to each peer: seconds, or with a unit as in 500ms or 1m; 0 for none
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = check::interval, help_heading = HEALTH)]
    pub(super) probe_interval: Duration,
    /// Peers with series of their own in /metrics; with more usable peers than this, none has any
    #[arg(long, value_name = "NUMBER", default_value_t = 100, value_parser = check::metrics_peers, help_heading = HEALTH)]
    pub(super) metrics_peers: i64,
    /// Count the bytes to and from each of these peers by nftables, for /metrics and /peers (Linux 5.12)
    #[arg(long, action = ArgAction::Set, default_value_t = false, help_heading = HEALTH)]
    pub(super) peer_counters: bool,

    /// What makes the rules: 'nft' (nftables, needs no program) or 'iptables' (the iptables programs)
    #[arg(long, value_name = "MECHANISM", default_value = "nft", value_parser = check::traffic_manager, help_heading = RULES)]
    pub(super) traffic_manager: TrafficManager,
    /// Seconds between two checks, at least 1; without effect, because changes are noticed when they happen
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = check::resync, help_heading = RULES)]
    pub(super) iptables_resync: i64,
    /// Masquerade pods' traffic that leaves the network
    #[arg(long, action = ArgAction::Set, default_value_t = false, help_heading = RULES)]
    pub(super) ip_masq: bool,
    /// Do not choose source ports at random when masquerading
    #[arg(long, action = ArgAction::Set, default_value_t = false, help_heading = RULES)]
    pub(super) ip_masq_fully_random_disable: bool,
    /// Accept what is forwarded from and to the network
    #[arg(long, action = ArgAction::Set, default_value_t = true, help_heading = RULES)]
    pub(super) iptables_forward_rules: bool,
    /// Switch IP forwarding on at start where it is off, for the enabled families
    #[arg(long, action = ArgAction::Set, default_value_t = true, help_heading = RULES)]
    pub(super) ip_forward: bool,
    /// Established flows of pods skip bridge, rules and routing: 'auto' as FastPath of the network configuration says, 'on', 'off'
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = check::fast_path, help_heading = RULES)]
    pub(super) fast_path: fast_path::FastPathMode,
    /// Run the commands of the backend 'extension': who may write the network configuration can then run programs as root here
    #[arg(long, action = ArgAction::Set, default_value_t = false, help_heading = COMMANDS)]
    pub(super) allow_extension_commands: bool,
    /// Without effect: the node's subnet always ends in a blackhole route of the worst metric
    #[arg(long, action = ArgAction::Set, default_value_t = false, help_heading = RULES)]
    pub(super) ip_blackhole_route: bool,

    /// File that tells the CNI plugin about this node
    #[arg(long, value_name = "FILE", default_value = subnet::env_file::DEFAULT_PATH, value_parser = check::file, help_heading = FILES)]
    pub(super) subnet_file: PathBuf,
    /// Take the place of a flanneld that runs with this subnet file: it hands over its tunnels without losing a packet
    #[arg(long, action = ArgAction::Set, default_value_t = false, help_heading = FILES)]
    pub(super) take_over: bool,
    /// Take another WireGuard key where another node has the same and its lease is older (a copied disk)
    #[arg(long, action = ArgAction::Set, default_value_t = false, help_heading = FILES)]
    pub(super) wireguard_new_key: bool,
    /// CNI configuration to copy for the container runtime once pods can be added, SOURCE:DESTINATION
    #[arg(long, value_name = "FILES", value_parser = check::cni_conf, help_heading = FILES)]
    pub(super) cni_conf: Option<(PathBuf, PathBuf)>,
    /// Detail of the log: 0 is normal, 1 adds decisions, 4 adds every step, 10 adds all libraries
    #[arg(long = "v", value_name = "LEVEL", default_value_t = 0, help_heading = FILES)]
    pub(super) v: i64,
    /// Print the version to stderr and exit
    #[arg(long, action = ArgAction::Set, default_value_t = false, help_heading = FILES)]
    pub(super) version: bool,

    /// Keep leases as annotations of Kubernetes nodes, instead of --lease-store
    #[arg(long, action = ArgAction::Set, default_value_t = false, help_heading = KUBERNETES)]
    pub(super) kube_subnet_mgr: bool,
    /// URL of the Kubernetes API; not needed in a pod
    #[arg(long, value_name = "URL", help_heading = KUBERNETES)]
    pub(super) kube_api_url: Option<String>,
    /// Prefix of the node annotations
    #[arg(long, value_name = "PREFIX", default_value = ANNOTATION_PREFIX, help_heading = KUBERNETES)]
    pub(super) kube_annotation_prefix: String,
    /// Credentials for the Kubernetes API; not needed in a pod
    #[arg(long, value_name = "FILE", help_heading = KUBERNETES)]
    pub(super) kubeconfig_file: Option<PathBuf>,
    /// Network configuration when leases are kept in Kubernetes
    #[arg(long, value_name = "FILE", default_value = "/etc/kube-flannel/net-conf.json", help_heading = KUBERNETES)]
    pub(super) net_config_path: String,
    /// Set the node's condition NetworkUnavailable to False once its network works
    #[arg(long, action = ArgAction::Set, default_value_t = true, help_heading = KUBERNETES)]
    pub(super) set_node_network_unavailable: bool,

    /// Enforce NetworkPolicies: 'off', 'on', or 'strict', which also cuts off addresses of this node that no known pod has
    #[arg(long, value_name = "MODE", default_value = "off", value_parser = check::policy_mode, help_heading = POLICIES)]
    pub(super) network_policy: PolicyMode,
    /// Route frames between pods of this node, so that policies see them: 'auto' where br_netfilter doesn't, 'always', 'never'
    #[arg(long, value_name = "MODE", default_value = "auto", value_parser = check::steer_mode, help_heading = POLICIES)]
    pub(super) network_policy_steer: SteerMode,
    /// Eight bits in a row of connection marks that no other program uses
    #[arg(long, value_name = "MASK", default_value = "0xff000000", value_parser = check::mark_shift, help_heading = POLICIES)]
    pub(super) network_policy_mark_mask: u32,
    /// NFLOG group that is told of refused packets, 1 to 65535; 0 for none
    #[arg(long, value_name = "GROUP", default_value_t = 0, value_parser = check::log_group, help_heading = POLICIES)]
    pub(super) network_policy_log: i64,

    /// Log detail by source file; no effect
    #[arg(long, value_name = "PATTERN=LEVEL", help_heading = COMPATIBLE)]
    pub(super) vmodule: Option<String>,
    /// Stack trace at a line of the log; no effect
    #[arg(long = "log_backtrace_at", value_name = "FILE:LINE", default_value = ":0", help_heading = COMPATIBLE)]
    pub(super) log_backtrace_at: String,
}

/// The default of `--kube-annotation-prefix`.
pub(super) const ANNOTATION_PREFIX: &str = "flannel.alpha.coreos.com";
