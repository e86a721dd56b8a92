//! The checked options that the agent runs with. Flags become options only by being checked.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgMatches};
use subnet::PublicAddrs;
pub(crate) use subnet::etcd::EtcdOptions;
use subnet::kube::KubeOptions;

use super::UsageError;
pub(crate) use super::check::TrafficManager;
use super::check::{self, Source};
use super::flags::{COMPATIBLE, KUBERNETES, POLICIES, RunFlags, STORE};
use super::grammar::Setting;
use crate::agent::TrafficSettings;
use crate::fast_path;
use crate::interface::Selectors;
use crate::log::Verbosity;
use crate::policy::{PolicyMode, PolicyOptions};

/// What the agent runs with.
#[derive(Debug)]
pub(crate) struct Options {
    /// Where leases are kept.
    pub(crate) store: StoreOptions,
    /// Which interface carries the traffic between nodes, and which addresses are announced.
    pub(crate) selectors: Selectors,
    /// The file that tells the CNI plugin about this node.
    pub(crate) subnet_file: PathBuf,
    /// A CNI configuration to copy, and where to, once pods can be added.
    pub(crate) cni_conf: Option<(PathBuf, PathBuf)>,
    /// How long before its end a lease is renewed.
    pub(crate) renew_margin: Duration,
    /// Where health is served, if anywhere.
    pub(crate) health: Option<SocketAddr>,
    /// Time between two rounds of probes to a peer; zero for none.
    pub(crate) probe_interval: Duration,
    /// More usable peers than this have no series of their own in metrics.
    pub(crate) metrics_peers: usize,
    /// Whether bytes to and from each peer are counted.
    pub(crate) peer_counters: bool,
    /// Which traffic rules there shall be.
    pub(crate) traffic: TrafficSettings,
    /// What makes them.
    pub(crate) traffic_manager: TrafficManager,
    /// Switch IP forwarding on at start where it is off.
    pub(crate) ip_forward: bool,
    /// Run the commands of the `extension` backend.
    pub(crate) allow_extension_commands: bool,
    /// Take the place of an agent that runs with this subnet file.
    pub(crate) take_over: bool,
    /// Replace a WireGuard key that the node with an older lease has, too.
    pub(crate) wireguard_new_key: bool,
    /// Whether established flows of pods skip bridge, rules and routing.
    pub(crate) fast_path: fast_path::FastPathMode,
    /// Whether and how network policies are enforced.
    pub(crate) network_policy: PolicyOptions,
    /// How much is logged.
    pub(crate) verbosity: Verbosity,
    /// What the operator should know before anything else happens: to be logged once.
    pub(crate) warnings: Vec<String>,
    /// The settings as `Display` shows them, without secrets.
    shown: Vec<(String, String)>,
}

/// Where leases are kept.
#[derive(Debug)]
pub(crate) enum StoreOptions {
    /// In etcd.
    Etcd(EtcdOptions),
    /// In a directory that all nodes share.
    File(PathBuf),
    /// In annotations of Kubernetes nodes.
    Kube(KubeOptions),
}

/// What the environment says about this process in Kubernetes.
#[derive(Debug, Default)]
pub(crate) struct KubeEnvironment {
    /// `NODE_NAME`.
    pub(crate) node: Option<String>,
    /// `POD_NAMESPACE` and `POD_NAME`.
    pub(crate) pod: Option<(String, String)>,
}

impl fmt::Display for Options {
    /// All settings that have a value, for the log: `--iface=eth0 --etcd-password=*** …`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gap = "";
        for (flag, value) in &self.shown {
            write!(f, "{gap}--{flag}={value}")?;
            gap = " ";
        }
        Ok(())
    }
}

impl Options {
    /// Checks what no single flag shows. `shown` makes the text for the log.
    pub(super) fn check(
        flags: RunFlags,
        settings: &[Setting],
        place: KubeEnvironment,
        shown: impl FnOnce(&StoreOptions, PolicyMode) -> Vec<(String, String)>,
    ) -> Result<Self, UsageError> {
        let source = Source::new(settings);
        let mut warnings = Vec::new();
        let ignored =
            [("vmodule", flags.vmodule.is_some()), ("log_backtrace_at", flags.log_backtrace_at != ":0")];
        let ignored: Vec<_> = ignored.into_iter().filter_map(|(flag, set)| set.then_some(flag)).collect();
        if !ignored.is_empty() {
            let verb = if ignored.len() == 1 { "has" } else { "have" };
            let flags = ignored.join(" and --");
            warnings.push(format!("--{flags} {verb} no effect: --v sets the detail of the log"));
        }
        let store = store(&flags, &source, place, &mut warnings)?;
        if flags.network_policy != PolicyMode::Off && !flags.kube_subnet_mgr {
            let why =
                "needs Kubernetes, where network policies are kept: give --kube-subnet-mgr as well, or off";
            return Err(source.refuse("network-policy", why));
        }
        let port = |port| u16::try_from(port).ok().filter(|port| *port > 0);
        let shown = shown(&store, flags.network_policy);
        let network_policy = policy_options(&flags);
        Ok(Self {
            store,
            selectors: Selectors {
                iface: flags.iface,
                regex: flags.iface_regex,
                can_reach: flags.iface_can_reach,
                public: flags.public_ip.into_iter().chain(flags.public_ipv6).collect(),
                prefer: PublicAddrs::default(),
            },
            cni_conf: flags.cni_conf,
            subnet_file: flags.subnet_file,
            renew_margin: renew_margin(flags.subnet_lease_renew_margin),
            probe_interval: flags.probe_interval,
            health: port(flags.healthz_port).map(|port| SocketAddr::new(flags.healthz_ip, port)),
            metrics_peers: usize::try_from(flags.metrics_peers).unwrap_or_default(),
            peer_counters: flags.peer_counters,
            traffic: TrafficSettings {
                masquerade: flags.ip_masq,
                fully_random: !flags.ip_masq_fully_random_disable,
                forward: flags.iptables_forward_rules,
            },
            traffic_manager: flags.traffic_manager,
            ip_forward: flags.ip_forward,
            allow_extension_commands: flags.allow_extension_commands,
            take_over: flags.take_over,
            wireguard_new_key: flags.wireguard_new_key,
            fast_path: flags.fast_path,
            network_policy,
            verbosity: Verbosity::new(flags.v),
            warnings,
            shown,
        })
    }
}

fn policy_options(flags: &RunFlags) -> PolicyOptions {
    PolicyOptions {
        mode: flags.network_policy,
        steer: flags.network_policy_steer,
        mark_shift: flags.network_policy_mark_mask,
        log_group: u16::try_from(flags.network_policy_log).ok().filter(|group| *group > 0),
        fast_path: flags.fast_path,
    }
}

fn renew_margin(minutes: i64) -> Duration {
    Duration::from_secs(60 * minutes.unsigned_abs())
}

/// All settings that have a value and an effect, without secrets, those of the lease store first.
pub(super) fn shown(
    shape: &clap::Command,
    matches: &ArgMatches,
    store: &StoreOptions,
    policies: PolicyMode,
) -> Vec<(String, String)> {
    let of_store = |argument: &&Arg| matches!(argument.get_help_heading(), Some(STORE | KUBERNETES));
    let (first, rest): (Vec<_>, Vec<_>) = shape.get_arguments().partition(of_store);
    let mut shown = Vec::new();
    for argument in first.into_iter().chain(rest) {
        let Some(flag) = argument.get_long() else { continue };
        let has_effect = match (argument.get_help_heading(), store) {
            (Some(COMPATIBLE), _) => false,
            (Some(KUBERNETES), store) => matches!(store, StoreOptions::Kube(_)),
            (Some(STORE), StoreOptions::Kube(_)) => false,
            (Some(STORE), StoreOptions::File(_)) => !flag.starts_with("etcd-"),
            (Some(STORE), StoreOptions::Etcd(_)) => flag != "lease-store",
            (Some(POLICIES), _) => policies != PolicyMode::Off,
            _ => !matches!(flag, "version" | "iptables-resync" | "ip-blackhole-route"),
        };
        let values = matches.get_raw(argument.get_id().as_str()).filter(|_| has_effect);
        for value in values.into_iter().flatten() {
            let value = match (flag, store) {
                ("etcd-password", _) => "***".to_owned(),
                // As they are used, without user names.
                ("etcd-endpoints", StoreOptions::Etcd(etcd)) => etcd.endpoints.join(","),
                _ => subnet::gojson::shortened(&value.to_string_lossy()),
            };
            if !value.is_empty() {
                shown.push((flag.to_owned(), value));
            }
        }
    }
    shown
}

fn store(
    flags: &RunFlags,
    source: &Source<'_>,
    place: KubeEnvironment,
    warnings: &mut Vec<String>,
) -> Result<StoreOptions, UsageError> {
    if flags.kube_subnet_mgr {
        let options = KubeOptions {
            node_name: place.node,
            pod: place.pod,
            kubeconfig: flags.kubeconfig_file.clone(),
            api_url: flags.kube_api_url.clone(),
            annotation_prefix: flags.kube_annotation_prefix.clone(),
            net_config_path: PathBuf::from(&flags.net_config_path),
            set_network_unavailable: flags.set_node_network_unavailable,
        };
        options.check().map_err(|error| source.name(error.option, &error.why))?;
        return Ok(StoreOptions::Kube(options));
    }
    if let Some(directory) = check::lease_directory(&flags.lease_store, source)? {
        return Ok(StoreOptions::File(directory));
    }
    let (endpoints, credentials) = check::endpoints(&flags.etcd_endpoints, source)?;
    if credentials {
        warnings.push(
            "the user name in --etcd-endpoints is not used: give --etcd-username and --etcd-password"
                .to_owned(),
        );
    }
    if flags.etcd_username.is_none() && flags.etcd_password.is_some() {
        warnings.push("--etcd-password is not used: give --etcd-username as well".to_owned());
    }
    // As in Go: one without the other is of no use and no error.
    match (&flags.etcd_certfile, &flags.etcd_keyfile) {
        (Some(_), None) => {
            warnings.push("--etcd-certfile is not used: give its key as well, --etcd-keyfile".to_owned());
        }
        (None, Some(_)) => {
            warnings
                .push("--etcd-keyfile is not used: give its certificate as well, --etcd-certfile".to_owned());
        }
        _ => {}
    }
    let password = || flags.etcd_password.clone().unwrap_or_default();
    Ok(StoreOptions::Etcd(EtcdOptions {
        endpoints,
        prefix: flags.etcd_prefix.clone(),
        cert: flags.etcd_certfile.clone(),
        key: flags.etcd_keyfile.clone(),
        ca: flags.etcd_cafile.clone(),
        username: flags.etcd_username.clone(),
        password: flags.etcd_username.is_some().then(password),
        renew_margin: renew_margin(flags.subnet_lease_renew_margin),
    }))
}
