//! The agent's whole loop over a fake kernel and a store in memory, with time under the test's control.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use backends::host::{DefaultRoute, HostAddr, HostLink, HostView};
use backends::kernel::fake::{FakeKernel, SharedKernel};
use backends::{FirewallError, FirewallReport, Look, Traffic, TunnelFilter};
use subnet::memory::Cluster;
use subnet::{Attachment, Family, Mac, PublicAddrs, Vtep};
use tokio::task::JoinHandle;

use super::*;

mod begin;
mod change;
mod files;
mod underlay;

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// Notifications that the test makes.
struct Bell(Arc<Notify>);

impl Notifications for Bell {
    async fn run(&self, _notified: &Mutex<Notified>, moved: &Notify) -> KernelError {
        loop {
            self.0.notified().await;
            moved.notify_one();
        }
    }
}

/// What filters of tunnels were asked for.
type Filters = Vec<(Look, Vec<TunnelFilter>)>;

/// A firewall that is a value: rules, why they can't be made, what filters of tunnels were asked for, and why that
/// can't be done.
#[derive(Clone, Default)]
struct FakeFirewall(
    Arc<Mutex<Vec<Traffic>>>,
    Arc<Mutex<Option<String>>>,
    Arc<Mutex<Filters>>,
    Arc<Mutex<Option<String>>>,
);

impl Firewall for FakeFirewall {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn converge(
        &mut self,
        wanted: &[Traffic],
        _former: &[ipnet::IpNet],
    ) -> Result<FirewallReport, FirewallError> {
        if let Some(why) = self.1.lock().unwrap().clone() {
            return Err(FirewallError { what: "replacing them".into(), why });
        }
        let mut rules = self.0.lock().unwrap();
        let changed = if *rules == wanted { Vec::new() } else { vec!["rules put right".to_owned()] };
        *rules = wanted.to_vec();
        Ok(FirewallReport { changed, ..FirewallReport::default() })
    }

    fn filter_tunnels(
        &mut self,
        wanted: &[TunnelFilter],
        _former: &[ipnet::IpNet],
        look: Look,
    ) -> Result<FirewallReport, FirewallError> {
        if let Some(why) = self.3.lock().unwrap().clone() {
            return Err(FirewallError { what: "filtering the tunnel's port".into(), why });
        }
        self.2.lock().unwrap().push((look, wanted.to_vec()));
        Ok(FirewallReport::default())
    }
}

struct Bed {
    firewall: FakeFirewall,
    rules_moved: Arc<Notify>,
    cluster: Cluster,
    kernel: SharedKernel,
    bell: Arc<Notify>,
    health: Health,
    directory: tempfile::TempDir,
    hooks: Hooks,
    agent: JoinHandle<KernelError>,
}

pub(super) fn host(mtu: u32, address: &str) -> HostView {
    let net = address.parse().unwrap();
    let address = HostAddr { net, deprecated: false, permanent: true, temporary: false };
    let link = HostLink {
        index: 2,
        name: "eth0".parse().unwrap(),
        altnames: Vec::new(),
        mtu,
        up: true,
        carrier: true,
        bridge: false,
        controller: None,
        mac: Mac([2, 0, 0, 0, 1, 1]),
        addresses: vec![address],
    };
    HostView {
        links: [(2, link)].into(),
        defaults: vec![DefaultRoute { family: Family::V4, link: Some(2), metric: 0, gateway: None }],
        ..HostView::default()
    }
}

impl Bed {
    fn new(config: &str) -> Self {
        let kernel = FakeKernel { host: host(1500, "192.0.2.1/24"), ..FakeKernel::default() };
        Self::with(Cluster::new(config), kernel)
    }

    fn with(cluster: Cluster, kernel: FakeKernel) -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("cni-conf.json"), "{}").unwrap();
        Self::on(cluster, SharedKernel::new(kernel), directory)
    }

    /// Another agent on the same host, after the first has ended.
    fn restarted(self) -> Self {
        Self::on(self.cluster, self.kernel, self.directory)
    }

    fn on(cluster: Cluster, kernel: SharedKernel, directory: tempfile::TempDir) -> Self {
        let bell = Arc::new(Notify::new());
        let health = Health::new(LIVENESS, condition::ALL);
        let (hooks, commands) = Hooks::new(true, directory.path().join("x.extension.json"), health.clone());
        let settings = Settings {
            selectors: Selectors::default(),
            subnet_file: directory.path().join("subnet.env"),
            state_file: directory.path().join("state.json"),
            cni_conf: Some((
                directory.path().join("cni-conf.json"),
                directory.path().join("net.d/10-flannel.conflist"),
            )),
            traffic: TrafficSettings { masquerade: true, fully_random: true, forward: true },
            ip_forward: true,
            new_key: false,
            reload: Arc::default(),
            services: false,
            hooks: Some(hooks.clone()),
            policy_socket: None,
            policies: None,
            probes: None,
            fast_path: None,
        };
        let (firewall, rules_moved) = (FakeFirewall::default(), Arc::new(Notify::new()));
        let hands = Hands { kernel: kernel.clone(), firewall: Box::new(firewall.clone()) };
        let (moved, node, told) = (Arc::clone(&rules_moved), cluster.node(), health.clone());
        let notices = Bell(Arc::clone(&bell));
        let life = async move { run(hands, notices, &moved, node, settings, told).await };
        let agent = tokio::spawn(async move {
            tokio::select! {
                error = life => error,
                never = commands.run() => match never {},
            }
        });
        Self { firewall, rules_moved, cluster, kernel, bell, health, directory, hooks, agent }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("subnet.env")
    }

    /// Lets time pass until `condition` holds; at most ten minutes of it.
    async fn until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        for _ in 0..60_000 {
            if condition(self) {
                return;
            }
            assert!(!self.agent.is_finished(), "the agent ended while waiting for {what}");
            sleep(Duration::from_millis(10)).await;
        }
        panic!("{what}: not within ten minutes; readiness {:?}", self.health.ready());
    }

    async fn ready(&self) {
        self.until("readiness", |bed| bed.health.ready().is_ok()).await;
    }

    fn peer(&self, number: u8) {
        let subnets: Subnets = [format!("10.244.{number}.0/24").parse().unwrap()].into_iter().collect();
        let public = PublicAddrs { v4: Some([192, 0, 2, number].into()), v6: None };
        let vtep = Vtep { vni: 1, mac: Mac([2, 0, 0, 0, 0, number]), port: None };
        let attachment = Attachment::Vxlan { v4: Some(vtep), v6: None };
        let lease =
            Lease { subnets, public, attachment, created: u64::from(number), written: u64::from(number) };
        self.cluster.edit(|all| drop(all.leases.insert(subnets, lease)));
    }

    fn routes(&self) -> usize {
        self.kernel.lock().state.routes.len()
    }

    fn reasons(&self) -> String {
        format!("{:?}", self.health.ready())
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_reaches_the_kernel_and_the_subnet_file_is_written_once_it_has() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.ready().await;
    assert_eq!(bed.routes(), 1);
    let text = std::fs::read_to_string(bed.file()).unwrap();
    assert!(
        text.starts_with("FLANNEL_NETWORK=10.244.0.0/16\n") && text.contains("FLANNEL_MTU=1450"),
        "{text}"
    );
    bed.peer(78);
    bed.until("the second peer", |bed| bed.routes() == 2).await;
    bed.cluster.edit(|all| all.leases.retain(|subnets, _| !subnets.to_string().contains(".77.")));
    bed.until("the first peer's end", |bed| bed.routes() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_comes_together_with_a_notification_is_not_lost() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    // Which of the two is seen first is up to chance.
    for number in 1..=20 {
        bed.peer(100 + number);
        bed.bell.notify_one();
        bed.until("the new peer", |bed| bed.routes() == usize::from(number)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn silence_of_the_store_deletes_nothing_and_hurts_no_readiness() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.ready().await;
    bed.cluster.trouble(Some("down for maintenance"));
    bed.peer(78);
    sleep(Duration::from_secs(3600)).await;
    assert_eq!(bed.routes(), 1);
    assert!(bed.health.ready().is_ok(), "{}", bed.reasons());
    assert!(bed.health.alive().is_ok());
    bed.cluster.trouble(None);
    bed.until("what changed meanwhile", |bed| bed.routes() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_at_start_is_waited_for_with_the_reason_in_readiness() {
    let cluster = Cluster::new(CONFIG);
    cluster.trouble(Some("no route to host"));
    let kernel = FakeKernel { host: host(1500, "192.0.2.1/24"), ..FakeKernel::default() };
    let bed = Bed::with(cluster, kernel);
    bed.until("the reason", |bed| bed.reasons().contains("no route to host")).await;
    sleep(Duration::from_secs(900)).await;
    assert!(bed.health.alive().is_ok() && !bed.file().exists());
    bed.cluster.trouble(None);
    bed.ready().await;
}

#[tokio::test(start_paused = true)]
async fn refused_changes_are_tried_again_ever_more_slowly_and_a_notification_is_never_delayed() {
    let bed = Bed::new(CONFIG);
    bed.kernel.lock().failing.insert("link", 95);
    bed.peer(77);
    bed.until("the refusal in readiness", |bed| bed.reasons().contains("link add flannel.1")).await;
    assert!(!bed.file().exists(), "no pod may start before its network can work");
    assert!(!bed.directory.path().join("net.d").exists(), "nor may the runtime believe that one could");
    let looks = || bed.kernel.lock().observed;
    sleep(Duration::from_secs(120)).await;
    let before = looks();
    sleep(Duration::from_secs(300)).await;
    let often = looks() - before;
    assert!((10..=24).contains(&often), "{often} looks in 300 s with a pause of 30 s and two rounds at most");

    bed.kernel.lock().failing.clear();
    let start = Instant::now();
    bed.bell.notify_one();
    bed.ready().await;
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn one_peer_that_the_kernel_refuses_does_not_make_the_node_unready() {
    let bed = Bed::new(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#);
    bed.kernel.lock().failing.insert("route", 101);
    let subnets: Subnets = ["10.244.77.0/24".parse().unwrap()].into_iter().collect();
    let public = PublicAddrs { v4: Some([192, 0, 2, 77].into()), v6: None };
    let lease = Lease { subnets, public, attachment: Attachment::HostGw, created: 1, written: 1 };
    bed.cluster.edit(|all| drop(all.leases.insert(subnets, lease)));
    bed.until("the first converge", |bed| bed.health.ready().is_ok() && bed.file().exists()).await;
    bed.kernel.lock().failing.clear();
    bed.until("the route", |bed| bed.routes() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_notifications_is_one_look() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    sleep(Duration::from_secs(1)).await;
    let before = bed.kernel.lock().observed;
    for _ in 0..500 {
        bed.bell.notify_one();
        tokio::task::yield_now().await;
    }
    sleep(Duration::from_secs(2)).await;
    assert_eq!(bed.kernel.lock().observed - before, 1);
}

#[tokio::test(start_paused = true)]
async fn the_kernel_is_looked_at_now_and_then_although_nothing_was_heard() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.ready().await;
    bed.kernel.lock().state.routes.clear();
    let start = Instant::now();
    bed.until("the repair", |bed| bed.routes() == 1).await;
    assert!(start.elapsed() <= RESYNC, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_moved_underlay_changes_device_file_and_lease() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    let before = bed.cluster.leases();
    bed.kernel.lock().host = host(1400, "192.0.2.9/24");
    bed.bell.notify_one();
    bed.until("the new address in the store", |bed| bed.cluster.leases() != before).await;
    bed.until("the new MTU in the file", |bed| {
        std::fs::read_to_string(bed.file()).unwrap().contains("FLANNEL_MTU=1350")
    })
    .await;
    let lease = bed.cluster.leases().leases.into_values().next().unwrap();
    assert_eq!(lease.public.v4, Some([192, 0, 2, 9].into()));
    assert_eq!(lease.subnets, before.leases.into_values().next().unwrap().subnets, "the subnet stays");
    let settings = bed.kernel.lock().state.links.values().next().unwrap().settings;
    assert_eq!((settings.mtu, settings.local), (1350, IpAddr::from([192, 0, 2, 9])));
}

#[tokio::test(start_paused = true)]
async fn a_lease_given_away_is_replaced_and_one_that_another_wrote_is_taken_up_again_after_silence() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    let mine = bed.cluster.leases().leases.into_values().next().unwrap();
    bed.cluster.edit(|all| {
        let lease = all.leases.get_mut(&mine.subnets).unwrap();
        lease.public.v4 = Some([192, 0, 2, 200].into());
    });
    bed.until("another subnet", |bed| bed.cluster.leases().leases.len() == 2).await;
    bed.ready().await;
    assert_eq!(bed.cluster.leases().leases[&mine.subnets].public.v4, Some([192, 0, 2, 200].into()));

    let mine = bed.cluster.leases().leases.into_values().find(|lease| lease.public == mine.public).unwrap();
    let foreign =
        Attachment::Vxlan { v4: Some(Vtep { vni: 1, mac: Mac([2, 9, 9, 9, 9, 9]), port: None }), v6: None };
    bed.cluster.edit(|all| all.leases.get_mut(&mine.subnets).unwrap().attachment = foreign.clone());
    bed.until("the reason", |bed| bed.reasons().contains("same public address")).await;
    sleep(Duration::from_secs(10)).await;
    assert_eq!(bed.cluster.leases().leases[&mine.subnets].attachment, foreign);
    assert!(bed.reasons().contains("claims it again after 15 s"), "{}", bed.reasons());
    bed.ready().await;
    assert_eq!(bed.cluster.leases().leases[&mine.subnets].attachment, mine.attachment);
}

#[tokio::test(start_paused = true)]
async fn rules_are_made_before_pods_may_start_and_put_right_when_somebody_changes_them() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    let lease = bed.cluster.leases().leases.into_values().next().unwrap();
    let wanted = bed.firewall.0.lock().unwrap().clone();
    assert_eq!(wanted.len(), 1);
    assert_eq!(Some(wanted[0].subnet), lease.subnets.get(Family::V4));
    assert!(wanted[0].forward && wanted[0].masquerade.is_some());
    assert!(std::fs::read_to_string(bed.file()).unwrap().contains("FLANNEL_IPMASQ=true"));

    bed.firewall.0.lock().unwrap().clear();
    bed.rules_moved.notify_one();
    let start = Instant::now();
    bed.until("the repair", |bed| !bed.firewall.0.lock().unwrap().is_empty()).await;
    assert!(start.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn rules_that_cannot_be_made_keep_the_node_unready_and_are_tried_again() {
    let cluster = Cluster::new(CONFIG);
    let kernel = FakeKernel { host: host(1500, "192.0.2.1/24"), ..FakeKernel::default() };
    let bed = Bed::with(cluster, kernel);
    *bed.firewall.1.lock().unwrap() = Some("no such module".into());
    bed.until("the reason", |bed| bed.reasons().contains("no such module")).await;
    *bed.firewall.1.lock().unwrap() = None;
    bed.ready().await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_may_send_before_its_route_is_made_and_costs_no_look_at_the_filter() {
    let bed = Bed::new(CONFIG);
    bed.ready().await;
    // A lease that is written again has the rules looked at, too; on a busy machine more than a second of this clock later.
    let (looks, mut before) = (|bed: &Bed| bed.firewall.2.lock().unwrap().len(), 0);
    while std::mem::replace(&mut before, looks(&bed)) != looks(&bed) {
        sleep(Duration::from_secs(5)).await;
    }
    let last = |bed: &Bed| bed.firewall.2.lock().unwrap().last().cloned().unwrap();
    let (look, filters) = last(&bed);
    let [filter] = &filters[..] else { panic!("{filters:?}") };
    assert!(look == Look::Kernel && filter.peers.is_empty(), "{filters:?}");
    assert_eq!((filter.ports[0].number, filter.networks[0].to_string()), (8472, "10.244.0.0/16".to_owned()));
    for number in [77, 78] {
        bed.peer(number);
        bed.until("the peer's route", |bed| bed.routes() == usize::from(number - 76)).await;
        let (look, filters) = last(&bed);
        assert_eq!(look, Look::Remembered);
        assert!(filters[0].peers.contains_key(&IpAddr::from([192, 0, 2, number])), "{filters:?}");
    }
    assert_eq!(looks(&bed), before + 2, "nothing else wakes the filter");
    // Somebody meddles.
    bed.rules_moved.notify_one();
    bed.until("a look", |bed| last(bed).0 == Look::Kernel).await;
    assert_eq!(last(&bed).1[0].peers.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_filter_that_cannot_be_made_is_told_and_tried_again_and_the_tunnel_works() {
    let bed = Bed::new(CONFIG);
    *bed.firewall.3.lock().unwrap() = Some("no such module".into());
    bed.peer(77);
    bed.ready().await;
    assert_eq!(bed.routes(), 1);
    let notes = bed.health.all().1;
    assert!(
        notes
            .iter()
            .any(|note| note.contains("takes datagrams from anybody") && note.contains("no such module")),
        "{notes:?}"
    );
    *bed.firewall.3.lock().unwrap() = None;
    bed.until("the filter", |bed| !bed.firewall.2.lock().unwrap().is_empty()).await;
    bed.until("no note", |bed| bed.health.all().1.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn somebody_who_undoes_a_change_at_once_is_answered_ever_later_while_all_else_goes_on() {
    let bed = Bed::new(CONFIG);
    bed.peer(77);
    bed.ready().await;
    let fought = "10.244.77.0/24".parse().unwrap();
    let repairs = |bed: &Bed| {
        bed.kernel.lock().log.iter().filter(|line| line.starts_with("route replace 10.244.77.0/24")).count()
    };
    // One deletion, and the next after a while, are put right at once.
    for _ in 0..5 {
        bed.kernel.lock().state.routes.remove(&fought);
        let start = Instant::now();
        bed.bell.notify_one();
        bed.until("the repair", |bed| bed.routes() == 1).await;
        assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
        sleep(Duration::from_secs(1)).await;
    }
    let before = repairs(&bed);
    for tick in 0..20 * 120 {
        bed.kernel.lock().state.routes.remove(&fought);
        bed.bell.notify_one();
        if tick == 20 * 60 {
            bed.peer(78);
        }
        sleep(Duration::from_millis(50)).await;
    }
    let often = repairs(&bed) - before;
    assert!((10..40).contains(&often), "{often} repairs in two minutes");
    assert_eq!(
        bed.kernel.lock().state.routes.keys().filter(|dst| dst.to_string().contains(".78.")).count(),
        1
    );
    assert!(
        bed.health.all().1.iter().any(|note| note.contains("10.244.77.0/24") && note.contains("undoes it"))
    );
    bed.until("the last repair", |bed| bed.routes() == 2).await;
    bed.until("no note", |bed| bed.health.all().1.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn rules_that_somebody_undoes_at_once_are_put_right_ever_later() {
    let (bed, mut repairs) = (Bed::new(CONFIG), 0);
    bed.ready().await;
    for _ in 0..20 * 120 {
        let there = std::mem::take(&mut *bed.firewall.0.lock().unwrap());
        repairs += usize::from(!there.is_empty());
        bed.rules_moved.notify_one();
        sleep(Duration::from_millis(50)).await;
    }
    assert!((10..40).contains(&repairs), "{repairs} repairs in two minutes");
    assert!(bed.health.all().1.iter().any(|note| note.contains("rules") && note.contains("undoes it")));
    bed.until("the last repair", |bed| !bed.firewall.0.lock().unwrap().is_empty()).await;
}
