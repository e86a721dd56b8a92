//! The checked options that the agent and `cleanup` run with. Flags become options only by being checked.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use subnet::kube::KubeOptions;

use super::UsageError;
pub(crate) use super::check::TrafficManager;
use super::check::{self, Source};
use super::flags::{CleanupFlags, RunFlags};
use super::grammar::Setting;
use crate::agent::TrafficSettings;
use crate::interface::Selectors;
use crate::log::Verbosity;
use crate::policy::{Mode, PolicyOptions};

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
    /// Which traffic rules there shall be.
    pub(crate) traffic: TrafficSettings,
    /// What makes them.
    pub(crate) traffic_manager: TrafficManager,
    /// Switch IP forwarding on at start where it is off.
    pub(crate) ip_forward: bool,
    /// Whether and how network policies are enforced.
    pub(crate) network_policy: PolicyOptions,
    /// How much is logged.
    pub(crate) verbosity: Verbosity,
    /// What the operator should know before anything else happens: to be logged once.
    pub(crate) warnings: Vec<String>,
    /// The settings as `Display` shows them, without secrets.
    shown: Vec<(&'static str, String)>,
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

/// How this process is told about its place in Kubernetes.
#[derive(Debug, Default)]
pub(crate) struct Place {
    /// `NODE_NAME`.
    pub(crate) node: Option<String>,
    /// `POD_NAMESPACE` and `POD_NAME`.
    pub(crate) pod: Option<(String, String)>,
}

/// How etcd is reached.
#[derive(Debug)]
pub(crate) struct EtcdOptions {
    /// `http(s)://host:port` of each member, at least one, without user names.
    pub(crate) endpoints: Vec<String>,
    /// Prefix of all keys.
    pub(crate) prefix: String,
    /// Client certificate and its key.
    pub(crate) client: Option<ClientCertificate>,
    /// Certificates of the authorities that sign etcd's certificate.
    pub(crate) ca_file: Option<PathBuf>,
    /// User name and password.
    pub(crate) user: Option<(String, Secret)>,
}

/// The files of a TLS client certificate.
#[derive(Debug)]
pub(crate) struct ClientCertificate {
    /// The certificate, with its chain.
    pub(crate) cert_file: PathBuf,
    /// Its private key.
    pub(crate) key_file: PathBuf,
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(String);

impl Secret {
    /// The text itself, for the one who needs it.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
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
    pub(super) fn check(flags: RunFlags, settings: &[Setting], place: Place) -> Result<Self, UsageError> {
        let source = Source::new(settings);
        let mut warnings = Vec::new();
        let ignored =
            [("vmodule", !flags.vmodule.is_empty()), ("log_backtrace_at", flags.log_backtrace_at != ":0")];
        let ignored: Vec<_> = ignored.into_iter().filter_map(|(flag, set)| set.then_some(flag)).collect();
        if !ignored.is_empty() {
            let verb = if ignored.len() == 1 { "has" } else { "have" };
            let flags = ignored.join(" and --");
            warnings.push(format!("--{flags} {verb} no effect: --v sets the detail of the log"));
        }
        let store = store(&flags, &source, &place, &mut warnings)?;
        let selectors = check::selectors(&flags, &source)?;
        let health = check::health(&flags, &source)?;
        check::resync(&flags, &source)?;
        let renew_margin = check::renew_margin(&flags, &source)?;
        let cni_conf = check::cni_conf(&flags, &source)?;
        let traffic_manager = check::traffic_manager(&flags, &source)?;
        let network_policy = check::network_policy(&flags, &source)?;
        let traffic = TrafficSettings {
            masquerade: flags.ip_masq,
            fully_random: !flags.ip_masq_fully_random_disable,
            forward: flags.iptables_forward_rules,
        };
        let shown = shown(&flags, &store, health, network_policy.mode);
        Ok(Self {
            store,
            selectors,
            cni_conf,
            subnet_file: check::file("subnet-file", flags.subnet_file, &source)?,
            renew_margin,
            health,
            traffic,
            traffic_manager,
            ip_forward: flags.ip_forward,
            network_policy,
            verbosity: Verbosity::new(flags.v),
            warnings,
            shown,
        })
    }
}

/// The settings that have a value, without secrets.
fn shown(
    flags: &RunFlags,
    store: &StoreOptions,
    health: Option<SocketAddr>,
    policies: Mode,
) -> Vec<(&'static str, String)> {
    let mut shown = shown_store(flags, store);
    shown.extend(flags.iface.iter().map(|value| ("iface", value.clone())));
    shown.extend(flags.iface_regex.iter().map(|value| ("iface-regex", value.clone())));
    shown.extend([
        ("iface-can-reach", flags.iface_can_reach.clone()),
        ("public-ip", flags.public_ip.clone()),
        ("public-ipv6", flags.public_ipv6.clone()),
        ("subnet-file", flags.subnet_file.clone()),
        ("cni-conf", flags.cni_conf.clone()),
        ("subnet-lease-renew-margin", flags.subnet_lease_renew_margin.to_string()),
        ("traffic-manager", flags.traffic_manager.clone()),
        ("ip-masq", flags.ip_masq.to_string()),
        ("iptables-forward-rules", flags.iptables_forward_rules.to_string()),
        ("ip-forward", flags.ip_forward.to_string()),
        ("healthz-ip", health.map_or(String::new(), |at| at.ip().to_string())),
        ("healthz-port", flags.healthz_port.to_string()),
        ("v", flags.v.to_string()),
    ]);
    if policies != Mode::Off {
        shown.extend([
            ("network-policy", flags.network_policy.clone()),
            ("network-policy-steer", flags.network_policy_steer.clone()),
            ("network-policy-mark-mask", flags.network_policy_mark_mask.clone()),
            ("network-policy-log", flags.network_policy_log.to_string()),
        ]);
    }
    shown.retain(|(_, value)| !value.is_empty());
    for (_, value) in &mut shown {
        *value = subnet::gojson::shortened(value);
    }
    shown
}

fn shown_store(flags: &RunFlags, store: &StoreOptions) -> Vec<(&'static str, String)> {
    let mut shown: Vec<(&'static str, String)> = Vec::new();
    match store {
        StoreOptions::File(directory) => {
            shown.push(("lease-store", format!("file:{}", directory.display())));
        }
        StoreOptions::Kube(_) => {
            shown.push(("kube-subnet-mgr", "true".into()));
            for (flag, value) in [
                ("kube-api-url", &flags.kube_api_url),
                ("kube-annotation-prefix", &flags.kube_annotation_prefix),
                ("kubeconfig-file", &flags.kubeconfig_file),
                ("net-config-path", &flags.net_config_path),
            ] {
                shown.push((flag, value.clone()));
            }
        }
        StoreOptions::Etcd(etcd) => {
            shown.push(("etcd-endpoints", etcd.endpoints.join(",")));
            shown.push(("etcd-prefix", etcd.prefix.clone()));
            for (flag, value) in [
                ("etcd-keyfile", &flags.etcd_keyfile),
                ("etcd-certfile", &flags.etcd_certfile),
                ("etcd-cafile", &flags.etcd_cafile),
                ("etcd-username", &flags.etcd_username),
            ] {
                shown.push((flag, value.clone()));
            }
            if etcd.user.is_some() {
                shown.push(("etcd-password", "***".into()));
            }
        }
    }
    shown
}

fn store(
    flags: &RunFlags,
    source: &Source<'_>,
    place: &Place,
    warnings: &mut Vec<String>,
) -> Result<StoreOptions, UsageError> {
    let optional = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
    if flags.kube_subnet_mgr {
        let options = KubeOptions {
            node_name: place.node.clone(),
            pod: place.pod.clone(),
            kubeconfig: optional(&flags.kubeconfig_file),
            api_url: Some(flags.kube_api_url.clone()).filter(|url| !url.is_empty()),
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
    if flags.etcd_username.is_empty() && !flags.etcd_password.is_empty() {
        warnings.push("--etcd-password is not used: give --etcd-username as well".to_owned());
    }
    let client = match (optional(&flags.etcd_certfile), optional(&flags.etcd_keyfile)) {
        (Some(cert_file), Some(key_file)) => Some(ClientCertificate { cert_file, key_file }),
        (None, None) => None,
        // As in Go: one without the other is of no use and no error.
        (Some(_), None) => {
            warnings.push("--etcd-certfile is not used: give its key as well, --etcd-keyfile".to_owned());
            None
        }
        (None, Some(_)) => {
            warnings
                .push("--etcd-keyfile is not used: give its certificate as well, --etcd-certfile".to_owned());
            None
        }
    };
    Ok(StoreOptions::Etcd(EtcdOptions {
        endpoints,
        prefix: flags.etcd_prefix.clone(),
        client,
        ca_file: optional(&flags.etcd_cafile),
        user: (!flags.etcd_username.is_empty())
            .then(|| (flags.etcd_username.clone(), Secret(flags.etcd_password.clone()))),
    }))
}

/// What `cleanup` runs with.
#[derive(Debug)]
pub(crate) struct CleanupOptions {
    /// Print what would be removed, and remove nothing.
    pub(crate) dry_run: bool,
    /// Remove what every agent left on this host.
    pub(crate) all: bool,
    /// The file that told the CNI plugin about this node.
    pub(crate) subnet_file: PathBuf,
    /// Whether that file was named, by flag or variable.
    pub(crate) named: bool,
    /// How much is logged.
    pub(crate) verbosity: Verbosity,
}

impl CleanupOptions {
    pub(super) fn check(flags: CleanupFlags, settings: &[Setting]) -> Result<Self, UsageError> {
        Ok(Self {
            dry_run: flags.dry_run,
            all: flags.all,
            named: settings.iter().any(|setting| setting.flag == "subnet-file"),
            subnet_file: check::file("subnet-file", flags.subnet_file, &Source::new(settings))?,
            verbosity: Verbosity::new(flags.v),
        })
    }
}
