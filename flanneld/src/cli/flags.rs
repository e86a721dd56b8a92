//! Every flag with its default and help text: the shape of the command line, before anything is checked.
//!
//! Neither type can be printed: they hold the etcd password.

use clap::{ArgAction, Parser};

use super::grammar::variable;

const FILES: &str = "Files and logging";
const INTERFACE: &str = "Interface and addresses";
const STORE: &str = "Lease store";
const HEALTH: &str = "Health";
const RULES: &str = "Traffic rules";
const KUBERNETES: &str = "Kubernetes";
const POLICIES: &str = "Network policies";
const COMPATIBLE: &str = "Accepted for compatibility with Go flannel";

const GRAMMAR: &str = "\
Flags are written --flag=value, --flag value, -flag=value or -flag value; a boolean takes its value only
with '=' and means true without one. Every flag but --version can be set by the environment variable that
its help names; the command line wins, and an empty variable is no variable. NODE_NAME is this node's name.

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

const CLEANUP_EXAMPLES: &str = "\
Stop flanneld first: cleanup refuses to run beside it.

Examples:
  flanneld cleanup --dry-run
      lists what the agent of /run/flannel/subnet.env left; as root, others can't see traffic rules
  flanneld cleanup --subnet-file=/run/second/subnet.env
      removes what another agent of this host left, and its files at the end
  flanneld cleanup --all
      removes what every agent left, if the subnet file is lost

Exit codes: 0 when nothing is left; 1 when something could not be seen or removed, or an agent is running; 2 when a
flag or a variable can't be used.";

/// Leases a subnet for this node and keeps the kernel in the state that all leases ask for.
#[derive(Parser)]
#[command(
    name = "flanneld",
    bin_name = "flanneld",
    disable_version_flag = true,
    args_override_self = true,
    override_usage = "flanneld [FLAGS]\n       flanneld cleanup [--dry-run] [FLAGS]   remove what flanneld left on this host\n       flanneld policy explain|list|denied    what network policies do on this node\n       flanneld version | help [cleanup|policy]",
    after_help = format!("{EXAMPLES}\n\n{GRAMMAR}")
)]
pub(super) struct RunFlags {
    /// Name or address of the interface that carries the traffic between nodes; repeatable, tried in order
    #[arg(long, value_name = "NAME|IP", help_heading = INTERFACE)]
    pub(super) iface: Vec<String>,
    /// Regular expression for that interface's addresses, then its name; repeatable, tried after --iface
    #[arg(long, value_name = "REGEX", help_heading = INTERFACE)]
    pub(super) iface_regex: Vec<String>,
    /// Take the interface by which this address is reached; tried last
    #[arg(long, value_name = "IP", default_value = "", help_heading = INTERFACE)]
    pub(super) iface_can_reach: String,
    /// IPv4 address by which other nodes reach this one; the interface's if not given
    #[arg(long, value_name = "IP", default_value = "", help_heading = INTERFACE)]
    pub(super) public_ip: String,
    /// IPv6 address by which other nodes reach this one; the interface's if not given
    #[arg(long, value_name = "IP", default_value = "", help_heading = INTERFACE)]
    pub(super) public_ipv6: String,

    /// Where leases are kept: 'etcd', or 'file:DIR' for a directory that all nodes share
    #[arg(long, value_name = "STORE", default_value = "etcd", help_heading = STORE)]
    pub(super) lease_store: String,
    /// URLs of the etcd members, separated by commas
    #[arg(long, value_name = "URLS", default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379", help_heading = STORE)]
    pub(super) etcd_endpoints: String,
    /// Prefix of all keys in etcd
    #[arg(long, value_name = "KEY", default_value = "/coreos.com/network", help_heading = STORE)]
    pub(super) etcd_prefix: String,
    /// Key of the TLS client certificate for etcd
    #[arg(long, value_name = "FILE", default_value = "", help_heading = STORE)]
    pub(super) etcd_keyfile: String,
    /// TLS client certificate for etcd
    #[arg(long, value_name = "FILE", default_value = "", help_heading = STORE)]
    pub(super) etcd_certfile: String,
    /// Certificates of the authorities that sign etcd's certificate; the system's if not given
    #[arg(long, value_name = "FILE", default_value = "", help_heading = STORE)]
    pub(super) etcd_cafile: String,
    /// User name for etcd
    #[arg(long, value_name = "NAME", default_value = "", help_heading = STORE)]
    pub(super) etcd_username: String,
    /// Password for etcd; prefer the variable, which other users can't see
    #[arg(long, value_name = "PASSWORD", default_value = "", help_heading = STORE)]
    pub(super) etcd_password: String,
    /// Renew the lease this long before it ends, in minutes, 1 to 1439
    #[arg(long, value_name = "MINUTES", default_value_t = 60, help_heading = STORE)]
    pub(super) subnet_lease_renew_margin: i64,

    /// Address for /healthz and /readyz; 0.0.0.0 and :: both mean all addresses of both families
    #[arg(long, value_name = "IP", default_value = "0.0.0.0", help_heading = HEALTH)]
    pub(super) healthz_ip: String,
    /// TCP port for /healthz and /readyz; 0 for none
    #[arg(long, value_name = "PORT", default_value_t = 0, help_heading = HEALTH)]
    pub(super) healthz_port: i64,

    /// What makes the rules: 'nft' (nftables, needs no program) or 'iptables' (the iptables programs)
    #[arg(long, value_name = "MECHANISM", default_value = "nft", help_heading = RULES)]
    pub(super) traffic_manager: String,
    /// Seconds between two checks, at least 1; without effect, because changes are noticed when they happen
    #[arg(long, value_name = "SECONDS", default_value_t = 5, help_heading = RULES)]
    pub(super) iptables_resync: i64,
    /// Masquerade pods' traffic that leaves the network
    #[arg(long, value_name = "BOOL", default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, help_heading = RULES)]
    pub(super) ip_masq: bool,
    /// Do not choose source ports at random when masquerading
    #[arg(long, value_name = "BOOL", default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, help_heading = RULES)]
    pub(super) ip_masq_fully_random_disable: bool,
    /// Accept what is forwarded from and to the network
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, help_heading = RULES)]
    pub(super) iptables_forward_rules: bool,
    /// Switch IP forwarding on at start where it is off, for the enabled families
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, help_heading = RULES)]
    pub(super) ip_forward: bool,
    /// Without effect: the node's subnet always ends in a blackhole route of the worst metric
    #[arg(long, value_name = "BOOL", default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, help_heading = RULES)]
    pub(super) ip_blackhole_route: bool,

    /// File that tells the CNI plugin about this node
    #[arg(long, value_name = "FILE", default_value = subnet::env_file::DEFAULT_PATH, help_heading = FILES)]
    pub(super) subnet_file: String,
    /// CNI configuration to copy for the container runtime once pods can be added, SOURCE:DESTINATION
    #[arg(long, value_name = "FILES", default_value = "", help_heading = FILES)]
    pub(super) cni_conf: String,
    /// Detail of the log: 0 is normal, 1 adds decisions, 4 adds every step, 10 adds all libraries
    #[arg(long = "v", value_name = "LEVEL", default_value_t = 0, help_heading = FILES)]
    pub(super) v: i64,
    /// Print the version to stderr and exit
    #[arg(long, value_name = "BOOL", default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, help_heading = FILES)]
    pub(super) version: bool,

    /// Keep leases as annotations of Kubernetes nodes, instead of --lease-store
    #[arg(long, value_name = "BOOL", default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, help_heading = KUBERNETES)]
    pub(super) kube_subnet_mgr: bool,
    /// URL of the Kubernetes API; not needed in a pod
    #[arg(long, value_name = "URL", default_value = "", help_heading = KUBERNETES)]
    pub(super) kube_api_url: String,
    /// Prefix of the node annotations
    #[arg(long, value_name = "PREFIX", default_value = ANNOTATION_PREFIX, help_heading = KUBERNETES)]
    pub(super) kube_annotation_prefix: String,
    /// Credentials for the Kubernetes API; not needed in a pod
    #[arg(long, value_name = "FILE", default_value = "", help_heading = KUBERNETES)]
    pub(super) kubeconfig_file: String,
    /// Network configuration when leases are kept in Kubernetes
    #[arg(long, value_name = "FILE", default_value = "/etc/kube-flannel/net-conf.json", help_heading = KUBERNETES)]
    pub(super) net_config_path: String,
    /// Set the node's condition NetworkUnavailable to False once its network works
    #[arg(long, value_name = "BOOL", default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, help_heading = KUBERNETES)]
    pub(super) set_node_network_unavailable: bool,

    /// Enforce NetworkPolicies: 'off', 'on', or 'strict', which also cuts off addresses of this node that no known pod has
    #[arg(long, value_name = "MODE", default_value = "off", help_heading = POLICIES)]
    pub(super) network_policy: String,
    /// Route frames between pods of this node, so that policies see them: 'auto' where br_netfilter doesn't, 'always', 'never'
    #[arg(long, value_name = "MODE", default_value = "auto", help_heading = POLICIES)]
    pub(super) network_policy_steer: String,
    /// Eight bits in a row of connection marks that no other program uses
    #[arg(long, value_name = "MASK", default_value = "0xff000000", help_heading = POLICIES)]
    pub(super) network_policy_mark_mask: String,
    /// NFLOG group that is told of refused packets, 1 to 65535; 0 for none
    #[arg(long, value_name = "GROUP", default_value_t = 0, help_heading = POLICIES)]
    pub(super) network_policy_log: i64,

    /// Log detail by source file; no effect
    #[arg(long, value_name = "PATTERN=LEVEL", default_value = "", help_heading = COMPATIBLE)]
    pub(super) vmodule: String,
    /// Stack trace at a line of the log; no effect
    #[arg(long = "log_backtrace_at", value_name = "FILE:LINE", default_value = ":0", help_heading = COMPATIBLE)]
    pub(super) log_backtrace_at: String,
}

/// What `--kube-annotation-prefix` is where nothing says otherwise.
pub(super) const ANNOTATION_PREFIX: &str = "flannel.alpha.coreos.com";

/// Removes the devices, routes, rules and files that flanneld left on this host.
#[derive(Parser)]
#[command(
    name = "flanneld cleanup",
    bin_name = "flanneld cleanup",
    args_override_self = true,
    override_usage = "flanneld cleanup [FLAGS]",
    after_help = CLEANUP_EXAMPLES
)]
pub(super) struct CleanupFlags {
    /// Print what would be removed, and remove nothing
    #[arg(long, value_name = "BOOL", default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    pub(super) dry_run: bool,
    /// Remove what every agent left on this host, not only the one of --subnet-file
    #[arg(long, value_name = "BOOL", default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true)]
    pub(super) all: bool,
    /// The file that told the CNI plugin about this node: its network is what is removed, then the file itself
    #[arg(long, value_name = "FILE", default_value = subnet::env_file::DEFAULT_PATH)]
    pub(super) subnet_file: String,
    /// Detail of the log, as for flanneld
    #[arg(long = "v", value_name = "LEVEL", default_value_t = 0)]
    pub(super) v: i64,
}

/// The command with each flag's environment variable in its help text, and without what says nothing.
pub(super) fn documented(command: clap::Command) -> clap::Command {
    command.next_line_help(true).mut_args(|argument| {
        let no_default = argument.get_default_values().iter().all(|value| value.is_empty());
        let argument = argument.hide_possible_values(true).hide_default_value(no_default);
        match (argument.get_long(), argument.get_help()) {
            (Some(flag), Some(help)) if flag != "version" => {
                let help = format!("{help} [env: {}]", variable(flag));
                argument.help(help)
            }
            _ => argument,
        }
    })
}
