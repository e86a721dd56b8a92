//! The node agent: leases a subnet, and keeps the kernel in the state that all leases ask for.

mod agent;
mod ask;
mod check_config;
mod cleanup;
mod cli;
mod cni;
mod cni_calls;
mod connectivity;
mod diags;
mod docker_opts;
mod doctor;
mod events;
mod explain;
mod extension;
mod fast_path;
mod interface;
mod ipvs;
mod lent;
mod lock;
mod log;
mod output;
mod policy;
mod probe;
mod serve;
mod show;
mod status;
mod takeover;
mod text;
mod trace;
mod version;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;
use backends::firewall::nftables::NftFirewall;
use backends::iptables::Iptables;
use backends::kernel::netlink::{Listener, Netlink};
use backends::{Counters, Firewall, NftListener, Tunnels, Watched};
use subnet::LeaseStore;
use subnet::env_file::Previous;
use subnet::etcd::Etcd;
use subnet::file::Files;
use subnet::kube::Kube;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use agent::Hands;
use cli::options::{Options, StoreOptions, TrafficManager};
use events::{Events, KubeEvent};
use fast_path::{FastPathLink, FastPaths};
use policy::announce::{Announcer, socket_path};
use policy::socket::PolicySocket;
use policy::sole::Sole;
use policy::{Policies, PolicyMode, PolicyOptions};
use probe::{Probes, Targets};
use serve::{Health, Server};
use takeover::former::Successor;
use takeover::successor::FormerAgent;

/// A start is over after this time, also where it is slow, and what only it needs is given back.
const STARTED: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    backends::backtrace::prepare();
    backends::memory::prepare();
    let command = cli::parse(std::env::args_os().skip(1), |name| std::env::var_os(name));
    match command.map_err(Into::into).and_then(obey) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flanneld: {}", text::with_causes(&error));
            if error.is::<cli::UsageError>() { cli::UsageError::EXIT_CODE.into() } else { ExitCode::FAILURE }
        }
    }
}

fn obey(command: cli::Command) -> anyhow::Result<()> {
    match command {
        cli::Command::Print(print) => Ok(print.print()?),
        cli::Command::Pages(pages) => pages.write(),
        cli::Command::Cleanup(options) => {
            log::start(options.verbosity);
            cleanup::run(&options)
        }
        cli::Command::Policy(question) => policy::client::run(&question),
        cli::Command::Status(options) => show::status::run(&options),
        cli::Command::Doctor(options) => doctor::run(&options),
        cli::Command::Explain(options) => explain::run(&options),
        cli::Command::Trace(options) => trace::run(&options),
        cli::Command::Connectivity(options) => connectivity::run(&options),
        cli::Command::CheckConfig(options) => check_config::run(&options),
        cli::Command::Report(options) => show::report::run(&options),
        cli::Command::Diags(options) => diags::run(&options),
        cli::Command::DockerOpts(options) => docker_opts::run(&options),
        cli::Command::Run(options) => {
            log::start(options.verbosity);
            start(*options)
        }
    }
}

fn start(options: Options) -> anyhow::Result<()> {
    // One thread is enough: the kernel and the store do the work, and it keeps the process small.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(run(options));
    runtime.shutdown_timeout(Duration::from_secs(3));
    let (ended, tunnels) = outcome?;
    match ended {
        AgentEnd::Stopped => {
            // They move packets until the end of the process, which closes their devices.
            std::mem::forget(tunnels);
            Ok(())
        }
        AgentEnd::Asked(successor) => successor.hand_over(&tunnels),
    }
}

/// Why an agent ends.
enum AgentEnd {
    /// By a signal.
    Stopped,
    /// Another agent takes over, with the tunnels of this process.
    Asked(Successor),
}

/// The result is why the agent ends, and the tunnels of its process, which work on.
async fn run(options: Options) -> anyhow::Result<(AgentEnd, Tunnels)> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let [rules_moved, reload, asked] = std::array::from_fn(|_| Arc::new(Notify::new()));
    tokio::spawn(look_again(
        signal(SignalKind::hangup())?,
        signal(SignalKind::user_defined2())?,
        [Arc::clone(&reload), Arc::clone(&asked)],
    ));
    tracing::info!("flanneld {} {options}", cli::version());
    let (_lock, former) = alone(&options.subnet_file, options.take_over)?;
    let successors = takeover::former::Listener::bind(&options.subnet_file);
    let misspelled = cli::misspelled(std::env::vars_os().map(|(name, _)| name));
    options.warnings.iter().chain(&misspelled).for_each(|warning| tracing::warn!("{warning}"));

    tokio::spawn(give_memory_back());
    let health = Health::new(agent::LIVENESS, agent::condition::ALL);
    let (probes, events) = probe(&options, &health);
    let served = Served::start(options.health, &health).await?;

    let (kernel, notices) = kernel(former, &health)?;
    let tunnels = kernel.tunnels();
    tokio::spawn(tell_counters(signal(SignalKind::user_defined1())?, kernel.counters()));
    let (firewall, watched) = firewall(options.traffic_manager)?;
    tracing::debug!(mechanism = firewall.name(), "traffic rules");
    let rules = NftListener::open()?;
    if options.network_policy.mode == PolicyMode::Off {
        switch_policies_off(&options.subnet_file);
    }
    let (hooks, commands) = extension::Hooks::new(
        options.allow_extension_commands,
        extension::file(&state_file(&options.subnet_file)),
        health.clone(),
    );
    let (fast_paths, fast_path) = fast_paths(&options, asked, &health);
    let settings =
        agent::Settings { probes, fast_path: Some(fast_path), reload, ..settings(&options, hooks) };
    let hands = Hands { kernel, firewall };
    let setup = Setup { hands, notices, rules_moved: &rules_moved, settings, health, events: Some(events) };
    let life = setup.live_by(options.store, options.renew_margin, options.network_policy);
    let outcome = tokio::select! {
        outcome = life => outcome.map(|()| AgentEnd::Stopped),
        error = rules.run(&watched, &rules_moved) => Err(error.into()),
        never = commands.run() => match never {},
        error = fast_paths.run() => Err(error),
        successor = successors.asked() => Ok(AgentEnd::Asked(successor)),
        _ = terminate.recv() => Ok(AgentEnd::Stopped),
        _ = interrupt.recv() => Ok(AgentEnd::Stopped),
    };
    tell_end(&outcome);
    served.stop().await;
    outcome.map(|ended| (ended, tunnels))
}

/// What a start needed is free some time after it.
async fn give_memory_back() {
    tokio::time::sleep(STARTED).await;
    backends::memory::give_back();
    backends::memory::give_back_code();
}

/// The kernel of this network namespace and its notifications, with the tunnels of the agent before this one.
fn kernel(former: Option<FormerAgent>, health: &Health) -> anyhow::Result<(Netlink, Listener)> {
    let privilege =
        "flanneld needs CAP_NET_ADMIN in this network namespace: run it as root or add the capability";
    // Netlink refuses the first change without it, and each with other words.
    anyhow::ensure!(
        may_administrate(&std::fs::read_to_string("/proc/self/status").unwrap_or_default()),
        privilege
    );
    let kernel = Netlink::open().context(privilege)?;
    if let Some(former) = former {
        former.hand_to(&kernel.tunnels());
    }
    health.board().count_tunnel(kernel.counters(), kernel.tunnels());
    let notices = Listener::open().and_then(|notices| notices.without_echo_of(&kernel)).context(privilege)?;
    Ok((kernel, notices))
}

/// Says that the agent ends. The kernel stays as it is, so that pods keep their network until the next agent starts.
fn tell_end(outcome: &anyhow::Result<AgentEnd>) {
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    match outcome {
        Ok(AgentEnd::Asked(_)) => tracing::info!("handing over to another agent with this subnet file"),
        _ => tracing::info!("stopping; devices (but that of udp), routes and the subnet file stay in place"),
    }
}

/// Who is told of peers, and who of events about them.
type Probing = (Option<watch::Sender<Targets>>, mpsc::Receiver<KubeEvent>);

/// Starts the tasks that probe the peers, unless that is switched off, and hear of the CNI plugin's calls.
fn probe(options: &Options, health: &Health) -> Probing {
    let (events, left) = Events::channel();
    let (probes, board) = (Probes::new(options.probe_interval), health.board());
    board.probe(probes.clone());
    board.limit_series(options.metrics_peers);
    board.tell(events.clone());
    if options.peer_counters {
        board.traffic().switch_on();
    }
    tokio::spawn(board.cni().clone().run(options.subnet_file.clone()));
    let (targets, told) = watch::channel(Targets::default());
    let targets = probes.is_on().then(|| {
        tokio::spawn(probes.run(told, move |news| events.peer(news)));
        targets
    });
    (targets, left)
}

/// The task that keeps the fast path, and the loop's link to it.
fn fast_paths(options: &Options, asked: Arc<Notify>, health: &Health) -> (FastPaths, FastPathLink) {
    let choice = fast_path::FastPathChoice::new(options.fast_path);
    let policies = options.network_policy.mode != PolicyMode::Off;
    let former = Previous::read(&options.subnet_file).networks.iter().collect();
    FastPaths::new(choice, policies, former, asked, health.clone())
}

/// What the options say to the agent.
fn settings(options: &Options, hooks: extension::Hooks) -> agent::Settings {
    agent::Settings {
        selectors: options.selectors.clone(),
        subnet_file: options.subnet_file.clone(),
        state_file: state_file(&options.subnet_file),
        cni_conf: options.cni_conf.clone(),
        traffic: options.traffic,
        ip_forward: options.ip_forward,
        new_key: options.wireguard_new_key,
        reload: Arc::default(),
        services: matches!(options.store, StoreOptions::Kube(_)),
        hooks: Some(hooks),
        policy_socket: None,
        policies: None,
        probes: None,
        fast_path: None,
    }
}

/// The server of health, if there is one.
struct Served(Option<(oneshot::Sender<()>, JoinHandle<()>)>);

impl Served {
    async fn start(at: Option<SocketAddr>, health: &Health) -> anyhow::Result<Self> {
        let Some(at) = at else { return Ok(Self(None)) };
        let server = Server::bind(at).await?;
        tracing::info!("health is served on http://{}/readyz", server.address().unwrap_or(at));
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async move { drop(stopped.await) };
        Ok(Self(Some((stop, tokio::spawn(server.run(health.clone(), stopped))))))
    }

    async fn stop(self) {
        if let Some((stop, served)) = self.0 {
            drop(stop);
            let _ = served.await;
        }
    }
}

/// Without network policies nothing of them is left: what an earlier run enforced would judge pods by what was.
fn switch_policies_off(subnet_file: &Path) {
    let networks: Vec<_> = Previous::read(subnet_file).networks.iter().collect();
    let (removed, failures) = policy::clean(subnet_file, &networks, true);
    removed.iter().for_each(|what| tracing::info!("network policies are off, removed: {what}"));
    failures
        .iter()
        .for_each(|what| tracing::error!("network policies are off, but could not be removed: {what}"));
}

/// The lock of the subnet file: two agents with one file would undo each other's work. One that can't be made for
/// another reason keeps no node from its network. With `take_over`, the agent that holds it hands over.
fn alone(subnet_file: &Path, take_over: bool) -> anyhow::Result<(Option<lock::Lock>, Option<FormerAgent>)> {
    if std::fs::metadata(subnet_file).is_ok_and(|there| !there.is_file()) {
        return Err(cli::UsageError::of(format!(
            "--subnet-file={}: it is a directory, a device, a pipe or a socket: give the path of a file, such as {}",
            subnet_file.display(),
            subnet::env_file::DEFAULT_PATH
        ))
        .into());
    }
    if let Some(directory) = subnet_file.parent() {
        // What stands in the way is said when the subnet file is written.
        let _ = std::fs::create_dir_all(directory);
    }
    let mut former = None;
    loop {
        let file = subnet_file.display();
        match lock::take(subnet_file) {
            Ok(lock) => return Ok((Some(lock), former)),
            Err(lock::LockError::Held(holder)) if take_over && former.is_none() => {
                tracing::info!("{holder} and is asked to hand over");
                let asked = takeover::successor::ask(subnet_file);
                former =
                    Some(asked.map_err(|error| {
                        anyhow::anyhow!("{holder} and --subnet-file={file}, and {error}")
                    })?);
            }
            Err(lock::LockError::Held(holder)) => anyhow::bail!(
                "{holder} and --subnet-file={file}: stop it first, have this agent --take-over, or give this agent a \
                 subnet file, a network and a health port of its own"
            ),
            Err(error) => {
                tracing::warn!("a second agent with this subnet file would not be noticed: {error}");
                return Ok((None, former));
            }
        }
    }
}

/// Has everything on the host and WireGuard's key looked at again whenever somebody asks (SIGHUP, as a reload), by all whom `looks`
/// tells. What is read from other files and from the store is followed without that. SIGUSR2 means nothing, and neither ends the process.
async fn look_again(mut hangup: Signal, mut other: Signal, looks: [Arc<Notify>; 2]) {
    loop {
        tokio::select! {
            Some(()) = hangup.recv() => {
                tracing::info!(
                    "SIGHUP: looking at the host again, the fast path and the WireGuard key; a changed configuration needs no signal, \
                     flags a restart"
                );
                looks.iter().for_each(|look| look.notify_one());
            }
            Some(()) = other.recv() => tracing::info!("SIGUSR2 has no meaning here"),
            else => return,
        }
    }
}

/// Whether a process with this `/proc/PID/status` has CAP_NET_ADMIN. What says nothing forbids nothing.
fn may_administrate(status: &str) -> bool {
    const CAP_NET_ADMIN: u64 = 1 << 12;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    effective.is_none_or(|capabilities| capabilities & CAP_NET_ADMIN != 0)
}

/// Logs what the datapaths of this process count whenever somebody asks (SIGUSR1).
async fn tell_counters(mut asked: Signal, counters: Arc<Counters>) {
    while asked.recv().await.is_some() {
        tracing::info!("udp: {counters}");
    }
}

/// What the agent runs with, whichever store it has.
struct Setup<'a> {
    hands: Hands<Netlink>,
    notices: Listener,
    rules_moved: &'a Arc<Notify>,
    settings: agent::Settings,
    health: Health,
    /// Events to be left where the store has a place for them.
    events: Option<mpsc::Receiver<KubeEvent>>,
}

impl Setup<'_> {
    /// Runs the agent with the store of these options.
    async fn live_by(
        mut self,
        store: StoreOptions,
        margin: Duration,
        policies: PolicyOptions,
    ) -> anyhow::Result<()> {
        match store {
            StoreOptions::Etcd(options) => self.live(Etcd::new(options)?).await,
            StoreOptions::File(directory) => self.live(Files::new(directory, margin)).await,
            StoreOptions::Kube(options) => {
                let store = Kube::new(options).await.map_err(cli::UsageError::of)?;
                if let Some(events) = self.events.take() {
                    tokio::spawn(events::run(store.event_api(), events));
                }
                if policies.mode == PolicyMode::Off {
                    return self.live(store).await;
                }
                self.live_with_policies(store, policies).await
            }
        }
    }

    async fn live_with_policies(mut self, store: Kube, options: PolicyOptions) -> anyhow::Result<()> {
        let (facts, told) = watch::channel(None);
        self.settings.policies = Some(facts);
        let _sole = Sole::claim(&self.settings.subnet_file).await?;
        let socket = socket_path(&self.settings.subnet_file);
        self.settings.policy_socket = Some(std::path::absolute(&socket)?);
        let socket =
            PolicySocket::bind(&socket).context("--network-policy: the socket for the CNI plugin")?;
        let (announcer, requests) = Announcer::channel();
        let policies = Policies::open(
            options,
            store.policy_api(),
            &self.settings.subnet_file,
            told,
            requests,
            self.health.clone(),
            Arc::clone(self.rules_moved),
        )?;
        tokio::select! {
            outcome = self.live(store) => outcome,
            error = policies.run() => Err(error),
            () = socket.run(announcer, options.log_group) => Ok(()),
        }
    }

    async fn live<S: LeaseStore>(self, store: S) -> anyhow::Result<()> {
        tracing::info!(store = store.describe(), "leases are kept in");
        let Self { hands, notices, rules_moved, settings, health, .. } = self;
        Err(agent::run(hands, notices, rules_moved, store, settings, health).await.into())
    }
}

/// What makes traffic rules, and what has to be watched for somebody changing them.
type Rules = (Box<dyn Firewall>, Arc<Mutex<Watched>>);

fn firewall(manager: TrafficManager) -> anyhow::Result<Rules> {
    // What a killed `flanneld trace` left affects nothing, so that it stays is no reason to fail.
    if let Err(error) = backends::trace::sweep() {
        tracing::debug!(%error, "tables of traces were not looked for");
    }
    Ok(match manager {
        TrafficManager::Nft => {
            let firewall = NftFirewall::open()?;
            let watched = firewall.watched();
            (Box::new(firewall), watched)
        }
        TrafficManager::Iptables => {
            let firewall = Iptables::open()?;
            let watched = firewall.watched();
            (Box::new(firewall), watched)
        }
    })
}

/// Where what is known of the cluster is kept: in a place that survives a reboot where there is one. Each
/// agent of a host has its own subnet file, and so its own state.
pub(crate) fn state_file(subnet_file: &Path) -> PathBuf {
    let lasting = Path::new("/var/lib/flannel");
    let directory = if lasting.is_dir() { lasting } else { subnet_file.parent().unwrap_or(lasting) };
    let absolute = std::path::absolute(subnet_file).unwrap_or_else(|_| subnet_file.to_owned());
    let name: String = absolute.to_string_lossy().trim_start_matches('/').replace('/', "-");
    directory.join(format!("{name}.state.json"))
}

#[cfg(test)]
mod tests {
    use super::may_administrate;

    #[test]
    fn the_capability_is_read_from_what_the_kernel_says() {
        assert!(may_administrate("Name:\tflanneld\nCapEff:\t000001ffffffffff\n"));
        assert!(may_administrate("CapEff:\t0000000000001000\n"));
        assert!(!may_administrate("CapPrm:\t0000000000001000\nCapEff:\t00000000a80425fb\n"));
        assert!(may_administrate(""));
    }
}
