//! The machine without a runtime: decisions as tables.

mod leases;
mod orders;
mod recalled;
mod refused;

use std::time::{Duration, SystemTime};

use backends::converge_since;
use backends::host::HostView;
use backends::kernel::fake::FakeKernel;
use backends::{FirewallError, FirewallReport, Kernel, KernelState};
use subnet::{Attachment, Family, Lease, Leases, Loss, Mac, Vtep};

use super::*;
use crate::agent::claim::ClaimFacts;
use crate::agent::news::NewsItem;
use crate::agent::{PEERS_PER_MINUTE, RESYNC, TrafficSettings};
use crate::interface::Selectors;

const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
const VNI_2: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":2}}"#;
const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;
const MOVED: &str = r#"{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan"}}"#;
const CONFIGS: [&str; 4] = [VXLAN, VNI_2, HOST_GW, MOVED];

fn network(config: &str) -> NetworkConfig {
    NetworkConfig::parse(config).unwrap()
}

fn subnets(text: &str) -> Subnets {
    [text.parse().unwrap()].into_iter().collect()
}

/// A node's lease in the network of the first configuration.
fn peer(number: u8) -> Lease {
    let vtep = Vtep { vni: 1, mac: Mac([2, 0, 0, 0, 0, number]), port: None };
    Lease {
        subnets: subnets(&format!("10.244.{number}.0/24")),
        public: PublicAddrs { v4: Some([192, 0, 2, number].into()), v6: None },
        attachment: Attachment::Vxlan { v4: Some(vtep), v6: None },
        created: number.into(),
        written: number.into(),
    }
}

fn host() -> HostView {
    crate::agent::tests::host(1500, "192.0.2.1/24")
}

/// The machine, and a host and a store that are values.
struct World {
    machine: Machine,
    kernel: FakeKernel,
    /// The kernel as the last turn left it.
    left: (KernelState, HostView),
    /// The rules can't be applied.
    no_rules: bool,
    /// How many times the state was saved.
    saves: u32,
    /// What the store was asked for last, until it answers.
    asked: Option<Box<ClaimFacts>>,
    granted: u64,
    now: Now,
    start: Now,
    known: Option<Known>,
    all: Leases,
    /// The cluster was told that this node is ready; the shell does that once.
    announced: bool,
    /// Turns in a row after which another one had to follow at once.
    hurries: u32,
    _directory: tempfile::TempDir,
}

impl World {
    fn new(config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let health = Health::new(RESYNC, condition::ALL);
        let settings = Settings {
            selectors: Selectors::default(),
            subnet_file: directory.path().join("subnet.env"),
            state_file: directory.path().join("state.json"),
            cni_conf: None,
            traffic: TrafficSettings { masquerade: true, fully_random: true, forward: true },
            ip_forward: false,
            new_key: false,
            reload: Arc::default(),
            services: false,
            hooks: None,
            policy_socket: None,
            policies: None,
            probes: None,
            fast_path: None,
        };
        let network = network(config);
        let active = ActiveBackends::new(&network.backend, &network).unwrap();
        let start = Start {
            settings,
            health,
            network,
            active,
            saved: None,
            recalled: false,
            previous: Previous::default(),
            stores: Vec::new(),
            given: PublicAddrs::default(),
            wireguard: true,
            admits: Arc::new(|_: &NetworkConfig, _: &Subnets| Ok(())),
        };
        let machine = Machine::new(start, Instant::now());
        let start = Now { at: Instant::now(), wall: SystemTime::UNIX_EPOCH };
        let mut world = Self {
            machine,
            kernel: FakeKernel { host: host(), ..FakeKernel::default() },
            left: Default::default(),
            no_rules: false,
            saves: 0,
            asked: None,
            granted: 0,
            now: start,
            start,
            known: None,
            all: Leases::default(),
            announced: false,
            hurries: 0,
            _directory: directory,
        };
        world.machine.status.health.set(condition::CONFIGURATION, Ok(()));
        world.drive(Event::Started);
        world
    }

    /// A world in which the node has a lease, three peers and is ready.
    fn settled() -> Self {
        let mut world = Self::new(VXLAN);
        world.turn();
        world.grant();
        world.peers([7, 8, 9]);
        world.turn();
        assert_eq!(world.machine.status.health.ready(), Ok(()));
        world
    }

    /// What the shell does with an event; the names of the actions without an answer.
    fn drive(&mut self, event: Event) -> Vec<&'static str> {
        let (mut next, mut seen) = (Some(event), Vec::new());
        let mut steps = 0;
        while let Some(event) = next.take() {
            steps += 1;
            assert!(steps < 64, "a turn ends");
            for action in self.machine.handle(event, self.now) {
                assert!(next.is_none(), "only the last action of an event is answered");
                next = self.carry_out(action, &mut seen);
            }
        }
        seen
    }

    fn carry_out(&mut self, action: Action, seen: &mut Vec<&'static str>) -> Option<Event> {
        let rules = || match self.no_rules {
            true => Err(FirewallError { what: "replacing them".into(), why: "no".into() }),
            false => Ok(FirewallReport::default()),
        };
        Some(match action {
            Action::Look(scope) => {
                Event::Looked(self.kernel.observe(&KernelState::default(), &scope).unwrap(), Seen::default())
            }
            Action::ReadSessions(desired) => {
                Event::Sessions(self.kernel.wireguard_sessions(&desired), Duration::ZERO)
            }
            Action::FindDirect(addrs, before) => Event::Direct(self.kernel.direct(&addrs, &before).unwrap()),
            Action::Converge { plan, scope, held, since } => {
                let report = converge_since(&mut self.kernel, since.as_deref(), &plan, &scope, &held);
                Event::Converged(report.unwrap(), Seen::default())
            }
            Action::FreeBridges(changes) => Event::Freed(self.kernel.apply(&changes)),
            Action::ReadSysctls(keys) => Event::Sysctls(self.kernel.sysctls(&keys)),
            Action::FilterTunnels { .. } => Event::Filtered(Ok(FirewallReport::default())),
            Action::ApplyRules { .. } => Event::Ruled(rules()),
            Action::WriteFiles { env, current } => {
                Event::Written(crate::agent::files::write(&self.machine.settings, env, current))
            }
            Action::Save(_) => {
                self.saves += 1;
                Event::Saved(Ok(true))
            }
            Action::Claim(facts) => {
                seen.push("claim");
                self.asked = Some(facts);
                return None;
            }
            Action::StopClaiming => {
                seen.push("stop claiming");
                self.asked = None;
                return None;
            }
            Action::SwitchForwardingOn { .. } => return note(seen, "switch forwarding on"),
            Action::Hold => return note(seen, "hold"),
            Action::Follow => return note(seen, "follow"),
            Action::Listen => return note(seen, "listen"),
            Action::AnnounceReady if std::mem::replace(&mut self.announced, true) => return None,
            Action::AnnounceReady => return note(seen, "announce ready"),
            Action::Readdressed => return note(seen, "readdressed"),
            Action::RenewKey(_) => return note(seen, "renew key"),
            Action::Wake => return note(seen, "wake"),
            Action::GiveMemoryBack => return note(seen, "give memory back"),
        })
    }

    fn turn(&mut self) -> Vec<&'static str> {
        let known = self.known.take();
        // The kernel tells of what was changed since the last turn.
        let same = (&self.kernel.state, &self.kernel.host) == (&self.left.0, &self.left.1);
        let cause = if same && known.is_some() { Cause::Leases } else { Cause::Kernel };
        let seen = self.drive(Event::Turn { known, tenure: Tenure::default(), cause });
        self.left = (self.kernel.state.clone(), self.kernel.host.clone());
        let hurry = self.machine.rest(self.now, RESYNC).is_zero();
        self.hurries = if hurry { self.hurries + 1 } else { 0 };
        seen
    }

    fn pass(&mut self, time: Duration) {
        self.now = Now { at: self.now.at + time, wall: self.now.wall + time };
    }

    /// The store answers the claim that it was asked for, if any.
    fn grant(&mut self) {
        let Some(facts) = self.asked.take() else { return };
        self.granted += 1;
        let family = |subnet: IpNet| facts.network.range(Family::of(subnet.addr())).copied();
        let kept: Option<IpNet> =
            facts.previous.iter().find(|subnet| family(*subnet).is_some_and(|range| range.allows(*subnet)));
        let third = if facts.network.networks().iter().any(|net| net.to_string().starts_with("10.99")) {
            format!("10.99.{}.0/24", 100 + self.granted % 100)
        } else {
            format!("10.244.{}.0/24", 100 + self.granted % 100)
        };
        let subnets = kept.map_or_else(|| subnets(&third), |kept| [kept].into_iter().collect());
        let macs = facts.identity.macs(&facts.active, &[], |_, _| false);
        let lease = Lease {
            subnets,
            public: facts.public,
            attachment: facts.active.attachment(&macs),
            created: 1000 + self.granted,
            written: 1000 + self.granted,
        };
        let before = self.machine.own.lease().map(|before| before.subnets);
        if let Some(before) = before.filter(|before| before.overlaps(&subnets)) {
            self.all.leases.remove(&before);
        }
        self.all.leases.insert(subnets, lease.clone());
        self.snapshot();
        self.drive(Event::Leased(lease));
    }

    /// The store's peers are these.
    fn peers(&mut self, numbers: impl IntoIterator<Item = u8>) {
        self.all.leases.retain(|_, lease| lease.created >= 1000);
        self.all.leases.extend(numbers.into_iter().map(|number| (peer(number).subnets, peer(number))));
        self.snapshot();
    }

    fn snapshot(&mut self) {
        let leases = Some(Arc::new(self.all.clone()));
        self.known = Some(Known { leases, ..Known::default() });
    }

    fn configure(&mut self, config: &str) -> Vec<&'static str> {
        self.drive(Event::Told(NewsItem::Configuration(Box::new(Ok(network(config))))))
    }

    fn planned(&self) -> BTreeSet<IpNet> {
        self.machine.view.interest.desired.routes.keys().copied().collect()
    }

    fn reasons(&self) -> String {
        format!("{:?}", self.machine.status.health.ready())
    }

    fn notes(&self) -> String {
        self.machine.status.health.all().1.join("\n")
    }
}

fn note(seen: &mut Vec<&'static str>, what: &'static str) -> Option<Event> {
    seen.push(what);
    None
}

#[test]
fn what_a_node_does_about_its_lease() {
    let mut world = World::new(VXLAN);
    assert_eq!(world.turn(), ["claim"], "there is an interface and no lease");
    assert!(world.turn().is_empty(), "the store is asked once");
    assert!(world.reasons().contains("lease"), "{}", world.reasons());
    world.grant();
    world.peers([7]);
    assert_eq!(world.turn(), ["announce ready"]);
    let own = world.machine.own.lease().unwrap().clone();

    // Somebody writes it: it is not claimed before the pause is over.
    let contested = Loss::Contested { subnets: own.subnets, public: own.public };
    world.drive(Event::Lost(contested));
    assert!(world.turn().is_empty() && world.reasons().contains("claims it again after 15 s"));
    let wait = world.machine.rest(world.now, RESYNC);
    assert!(wait <= Duration::from_secs(15), "{wait:?}");
    world.pass(Duration::from_secs(15));
    assert_eq!(world.turn(), ["claim"]);
    world.grant();
    world.turn();
    assert_eq!(world.machine.status.health.ready(), Ok(()));

    // Another node has it: another one is claimed, and nothing of the kernel's state is given up meanwhile.
    let planned = world.planned();
    world.drive(Event::Lost(Loss::Taken { subnets: own.subnets, holder: peer(9).public }));
    assert_eq!(world.turn(), ["claim"]);
    assert!(world.reasons().contains("now belongs to the node at"), "{}", world.reasons());
    assert_eq!(world.asked.as_ref().unwrap().previous, Subnets::default());
    assert_eq!(world.planned(), planned);

    // A lease that is granted is kept and followed from then on.
    let event = Event::Leased(Lease { subnets: subnets("10.244.55.0/24"), ..own });
    assert_eq!(world.drive(event), ["follow", "hold"]);
    world.turn();
    assert_eq!(world.machine.status.health.ready(), Ok(()));
}

#[test]
fn another_address_of_the_host_is_claimed_in_place_of_the_one_that_is_being_claimed() {
    let mut world = World::settled();
    let address = |world: &mut World, text: &str| {
        world.kernel.host.links.get_mut(&2).unwrap().addresses[0].net = text.parse().unwrap();
    };
    address(&mut world, "192.0.2.51/24");
    assert_eq!(world.turn(), ["readdressed", "claim"]);
    assert_eq!(world.asked.as_ref().unwrap().public.v4, Some([192, 0, 2, 51].into()));
    address(&mut world, "192.0.2.52/24");
    assert_eq!(world.turn(), ["stop claiming", "readdressed", "claim"]);
    assert_eq!(world.asked.as_ref().unwrap().public.v4, Some([192, 0, 2, 52].into()));
    let before = world.machine.own.lease().unwrap().subnets;
    world.grant();
    world.turn();
    let lease = world.machine.own.lease().unwrap();
    assert_eq!((lease.subnets, lease.public.v4), (before, Some([192, 0, 2, 52].into())));
    assert!(world.turn().is_empty());
}

#[test]
fn what_becomes_of_another_configuration() {
    // The configuration, whether the kernel takes its device, whether it is in force, and what is said of it.
    for (config, fails, in_force, said) in [
        (VXLAN, false, true, ""),
        (VNI_2, false, true, ""),
        (VNI_2, true, false, "the kernel does not take it"),
        (HOST_GW, false, true, ""),
        (HOST_GW, true, true, ""),
        (MOVED, false, true, ""),
        (r#"{"Network":"10.244.0.0/16","SubnetLen":26,"Backend":{"Type":"vxlan"}}"#, false, false, "drain"),
        (r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#, false, false, "IPv6"),
    ] {
        let mut world = World::settled();
        let planned = world.planned();
        if fails {
            world.kernel.failing.insert("vxlan", 22);
        }
        world.configure(config);
        world.turn();
        let network = network(config);
        assert_eq!(world.machine.force.network == network, in_force, "{config}");
        assert!(!world.machine.change.is_trial(), "{config}: a trial ends with the turn");
        assert_eq!(world.machine.status.health.ready(), Ok(()), "{config}: nothing that worked is lost");
        assert_eq!(world.notes().contains("not in force"), !in_force, "{config}: {}", world.notes());
        assert!(world.notes().contains(said), "{config}: {}", world.notes());
        assert!(world.planned().is_superset(&planned), "{config}");
        // The one before counts again, and takes the note away.
        world.kernel.failing.clear();
        world.configure(VXLAN);
        world.turn();
        assert!(
            world.machine.force.network == self::network(VXLAN) && !world.notes().contains("not in force")
        );
    }
}

#[test]
fn a_configuration_that_came_while_another_is_tried_is_the_next_one() {
    let mut change = Change::default();
    let force = |config: &str| {
        let network = network(config);
        InForce { active: ActiveBackends::new(&network.backend, &network).unwrap(), network, revision: 0 }
    };
    change.try_instead_of(force(VXLAN));
    change.consider(Some(network(HOST_GW)));
    assert!(change.is_trial());
    assert_eq!(change.end_trial().unwrap().network, network(VXLAN));
    assert!(!change.is_trial() && change.candidate() == Some(&network(HOST_GW)));
    assert!(change.end_trial().is_none() && change.candidate().is_some());
    change.try_instead_of(force(VXLAN));
    change.consider(Some(network(HOST_GW)));
    change.consider(None);
    assert!(change.end_trial().is_some() && change.candidate().is_none());
}

#[test]
fn a_plan_is_computed_again_only_if_something_that_it_depends_on_has_changed() {
    let mut world = World::settled();
    let plan = |world: &World| world.machine.planner.current().unwrap();
    let before = plan(&world);
    world.turn();
    world.pass(Duration::from_secs(60));
    world.turn();
    world.known = Some(Known { trouble: Some("away".into()), ..world.machine.view.known.clone() });
    world.turn();
    assert!(Arc::ptr_eq(&before, &plan(&world)), "trouble is no other plan");
    type Edit = fn(&mut World);
    let edits: [(&str, Edit); 4] = [
        ("leases", |world| world.peers([7])),
        ("an MTU", |world| world.kernel.host.links.get_mut(&2).unwrap().mtu = 1400),
        ("a configuration", |world| drop(world.configure(VNI_2))),
        ("an address in a peer's subnet", |world| {
            let mut link = world.kernel.host.links[&2].clone();
            (link.index, link.name) = (3, "eth1".parse().unwrap());
            link.addresses[0].net = "10.244.7.5/32".parse().unwrap();
            world.kernel.host.links.insert(3, link);
        }),
    ];
    for (what, edit) in edits {
        let before = plan(&world);
        edit(&mut world);
        world.turn();
        assert_ne!(before, plan(&world), "{what}");
    }
    assert!(world.planned().is_empty(), "the only peer's subnet has an address of this host");
    assert!(world.notes().contains("eth1 has the address 10.244.7.5/32"), "{}", world.notes());
}

#[test]
fn what_was_due_keeps_no_loop_turning_although_it_stays_so() {
    // Peers that have just gone are admitted for a moment; then the lease is lost, and the store does not answer.
    let mut world = World::settled();
    world.peers([]);
    world.turn();
    let own = world.machine.own.lease().unwrap().clone();
    world.drive(Event::Lost(Loss::Changed { subnets: own.subnets }));
    world.pass(Duration::from_secs(30));
    world.turn();
    assert!(world.machine.rest(world.now, RESYNC) >= Duration::from_secs(1));
    // It is time to claim a contested lease, and the store does not answer.
    let mut world = World::settled();
    world.drive(Event::Lost(Loss::Contested { subnets: own.subnets, public: own.public }));
    world.turn();
    world.pass(Duration::from_secs(15));
    assert_eq!(world.turn(), ["claim"]);
    assert!(world.machine.rest(world.now, RESYNC) >= Duration::from_secs(1));
}

#[test]
fn turns_that_fail_come_again_after_growing_pauses_and_one_that_succeeds_ends_that() {
    let mut world = World::settled();
    world.no_rules = true;
    world.drive(Event::RulesMoved);
    let mut pauses = Vec::new();
    for _ in 0..7 {
        world.turn();
        pauses.push(world.machine.rest(world.now, RESYNC).as_secs());
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
    assert!(world.reasons().contains("replacing them"), "{}", world.reasons());
    world.no_rules = false;
    world.turn();
    assert_eq!(world.machine.status.health.ready(), Ok(()));
    world.pass(Duration::from_secs(10));
    world.turn();
    assert_eq!(world.machine.rest(world.now, RESYNC), RESYNC);
}

#[test]
fn what_is_held_back_at_the_end_of_its_wait_is_made_right_after_it() {
    let mut world = World::settled();
    let mut fought = || {
        world.kernel.state.routes.clear();
        world.turn();
        world.machine.rest(world.now, RESYNC)
    };
    let wait = (0..20).map(|_| fought()).find(|wait| *wait < Duration::from_secs(5)).unwrap();
    let moment = Duration::from_millis(1);
    world.pass(wait - moment);
    world.kernel.state.routes.clear();
    world.turn();
    assert!(world.kernel.state.routes.is_empty(), "it is held back still");
    world.pass(2 * moment);
    assert_eq!(
        world.machine.rest(world.now, RESYNC),
        Duration::ZERO,
        "the turn took longer than the rest of the wait"
    );
    world.turn();
    assert!(!world.kernel.state.routes.is_empty());
}
