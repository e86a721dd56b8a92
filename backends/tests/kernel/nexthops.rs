//! Routes through nexthop objects: made, adopted, repaired, left behind, and next to those of other programs.

use backends::state::nexthop::NexthopSupport;
use backends::testing::Pinger;

use super::notifications::watched;
use super::*;

const ROUTE: &str = "10.244.2.0/24 nhid 1175122946 via 10.244.2.0 dev flannel.1 proto 70 onlink";
const OBJECT: &str = "id 1175122946 via 10.244.2.0 dev flannel.1 scope 253 proto 70 onlink";

/// Objects of others, one with the id that the peer with 10.244.7.0/24 would have, one with a multipath route over it, one of
/// an agent with another network, and one outside of all ranges.
const OTHERS: &str = "\
    nexthop add id 1175122951 via 172.31.0.254 dev eth0 proto zebra\n\
    nexthop add id 1000000001 via 172.31.0.253 dev eth0 proto bgp\n\
    nexthop add id 1000000002 via 172.31.0.254 dev eth0 proto bgp\n\
    nexthop add id 1000000003 group 1000000001/1000000002 proto bgp\n\
    route add 192.168.9.0/24 nhid 1000000003 proto bgp\n\
    nexthop add id 1175085569 via 172.31.0.252 dev eth0 proto 70\n\
    route add 10.98.1.0/24 nhid 1175085569 proto 70";

impl Agent<'_> {
    /// The state of many peers, for a few.
    fn desired_by_objects(&self, all: &Leases) -> KernelState {
        let (scope, host) = (self.scope(), KernelState::default());
        let mut kernel = self.machine.namespace().run(|| Netlink::open().unwrap());
        let support = kernel.observe(&host, &scope).unwrap().host.nexthops;
        let mut desired = self.desired(all);
        desired.use_nexthops_always(&support);
        desired
    }

    fn objects(&self) -> Vec<String> {
        self.show("ip", "-N nexthop show").lines().map(|line| line.trim().to_owned()).collect()
    }
}

fn ours(agent: &Agent<'_>) -> usize {
    agent.objects().iter().filter(|line| line.contains("proto 70") && !line.contains("172.31.0.252")).count()
}

#[test]
fn routes_go_over_to_objects_and_back_without_losing_a_packet() {
    for config in [VXLAN, HOST_GW] {
        let fabric = Fabric::new().unwrap();
        let (a, b) = (fabric.node().unwrap(), fabric.node().unwrap());
        let mut agent = Agent::new(&a, config);
        let mut other = Agent::new(&b, config);
        let all = leases(&agent.network, 60);
        let plain = agent.desired(&all);
        agent.converge(&plain);
        other.converge(&other.desired(&all));
        let (pod_a, pod_b) = (pod(&a), pod(&b));
        assert!(pod_a.namespace().reaches(pod_b.address()).unwrap(), "{config}");
        let pinger = Pinger::start(pod_a.namespace(), pod_b.address()).unwrap();
        pinger.wait_for_reply(TIMEOUT).unwrap();
        let by_objects = agent.desired_by_objects(&all);
        for _ in 0..5 {
            let report = agent.converge(&by_objects);
            assert_eq!(report.applied.len(), 59, "{:?}", report.applied);
            assert_eq!(ours(&agent), 59);
            pinger.wait_for_reply(TIMEOUT).unwrap();
            agent.converge(&plain);
            assert_eq!(ours(&agent), 0, "what nothing leads through goes");
            pinger.wait_for_reply(TIMEOUT).unwrap();
        }
        agent.converge(&by_objects);
        let again = agent.converge(&by_objects);
        assert_eq!(words(&again.applied), Vec::<String>::new());
        let pings = pinger.finish().unwrap();
        assert_eq!(pings.lost, 0, "{config}: {pings:?}");
    }
}

#[test]
fn the_kernel_shows_gateway_device_and_flag_and_a_go_flannels_replacement_takes_the_place() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let all = leases(&agent.network, 3);
    let desired = agent.desired_by_objects(&all);
    agent.converge(&desired);
    assert_eq!(agent.show("ip", "-N route show 10.244.2.0/24").trim(), ROUTE);
    assert!(agent.objects().contains(&OBJECT.to_owned()), "{:?}", agent.objects());
    // What its library lists, and then sends (RouteReplace, RouteDel).
    let listed = agent.show("ip", "-j -N route show 10.244.2.0/24");
    for part in [r#""gateway":"10.244.2.0""#, r#""dev":"flannel.1""#, r#""flags":["onlink"]"#] {
        assert!(listed.contains(part), "{listed}");
    }
    let go = "route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink";
    machine.namespace().ip(go).unwrap();
    assert_eq!(
        agent.show("ip", "route show 10.244.2.0/24").trim(),
        "10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink"
    );
    machine.namespace().ip("route del 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink").unwrap();
    machine.namespace().ip(go).unwrap();
    // The commands of docs/migrate.md for the way back.
    agent.converge(&desired);
    let plain =
        "ip -4 route show proto 70 | sed -n 's/ nhid [0-9]*//; / via /s/^/route replace /p' | ip -batch -";
    machine
        .namespace()
        .command("sh")
        .args(["-c", &format!("{plain}; ip nexthop flush protocol 70")])
        .ok()
        .unwrap();
    assert_eq!(agent.objects(), Vec::<String>::new());
    assert_eq!(
        agent.show("ip", "route show 10.244.2.0/24").trim(),
        // What is asked for by its protocol is listed without it, and comes back as boot scripts' and Go flannel's routes.
        "10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink"
    );
    agent.converge(&desired);
    machine.namespace().ip(go).unwrap();
    // And back: its route and the object that it left.
    let report = agent.converge(&desired);
    assert_eq!(report.applied.len(), 1, "{:?}", report.applied);
    assert_eq!(agent.show("ip", "-N route show 10.244.2.0/24").trim(), ROUTE);
    assert_eq!(ours(&agent), 2);
}

#[test]
fn damage_to_objects_is_repaired_also_where_routes_do_not_show_what_they_lead_to() {
    for compat in ["1", "0"] {
        let fabric = Fabric::new().unwrap();
        let machine = fabric.node().unwrap();
        machine.namespace().run(|| std::fs::write("/proc/sys/net/ipv4/nexthop_compat_mode", compat)).unwrap();
        let mut agent = Agent::new(&machine, VXLAN);
        let desired = agent.desired_by_objects(&leases(&agent.network, 40));
        agent.converge(&desired);
        let state = |agent: &Agent<'_>| format!("{}{:?}", agent.show("ip", "route show"), agent.objects());
        let healthy = state(&agent);
        assert_eq!(words(&agent.converge(&desired).applied), Vec::<String>::new(), "compat mode {compat}");
        for damage in [
            "nexthop del id 1175122946",
            "nexthop replace id 1175122946 via 172.31.0.99 dev eth0 proto 70",
            "nexthop replace id 1175122946 via 10.244.3.0 dev flannel.1 onlink proto 70",
            "nexthop replace id 1175122946 blackhole proto 70",
            "nexthop add id 1175123044 via 10.244.100.0 dev flannel.1 onlink proto 70",
            "nexthop add id 1191900162 via 10.244.2.0 dev flannel.1 onlink proto 70\n\
             route replace 10.244.2.0/24 nhid 1191900162 proto 70",
            "route del 10.244.7.0/24",
            "route replace 10.244.7.0/24 via 10.244.7.0 dev flannel.1 onlink proto 70",
            "route replace 10.244.7.0/24 nhid 1175122952 proto 70",
            "route replace 10.244.7.0/24 via 172.31.0.254",
            "route append 10.244.7.0/24 nhid 1175122952 proto 70",
            "route add 10.244.7.0/24 nhid 1175122951 metric 50 proto 70",
            "route add 10.244.99.0/24 nhid 1175122951 proto 70",
            "link set flannel.1 down",
            "link set flannel.1 address 02:00:00:00:00:77",
            "link del flannel.1",
            "link del flannel.1\nlink add flannel.1 type vxlan id 1 dev eth0 dstport 4789 local 172.31.0.1",
            "nexthop flush proto 70",
        ] {
            machine.namespace().ip(damage).unwrap();
            assert_ne!(agent.converge(&desired).applied.len(), 0, "not noticed: {damage}");
            assert_eq!(state(&agent), healthy, "compat mode {compat}, after: {damage}");
        }
    }
}

#[test]
fn objects_of_other_programs_stay_and_an_id_that_one_has_is_passed_over() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    machine.namespace().ip(OTHERS).unwrap();
    let others = |agent: &Agent<'_>| {
        let objects = agent.objects();
        let theirs = |line: &&String| !line.contains("proto 70") || line.contains("172.31.0.252");
        let objects: Vec<_> = objects.iter().filter(theirs).cloned().collect();
        format!("{objects:?}{}", agent.show("ip", "route show 192.168.9.0/24"))
            + &agent.show("ip", "route show 10.98.1.0/24")
    };
    let before = others(&agent);
    let desired = agent.desired_by_objects(&leases(&agent.network, 9));
    agent.converge(&desired);
    assert_eq!(others(&agent), before);
    let route = agent.show("ip", "-N route show 10.244.7.0/24");
    assert!(route.contains("nhid 1191900167 "), "the id of the next range: {route}");
    // An id that is taken while it is in use: the next plan passes it over.
    machine.namespace().ip("nexthop replace id 1175122952 via 172.31.0.251 dev eth0 proto zebra").unwrap();
    let before = others(&agent);
    let desired = agent.desired_by_objects(&leases(&agent.network, 9));
    agent.converge(&desired);
    assert!(agent.show("ip", "-N route show 10.244.8.0/24").contains("nhid 1191900168 via 10.244.8.0"));
    assert_eq!(others(&agent), before);

    agent.converge(&KernelState::default());
    assert_eq!(others(&agent), before);
    assert_eq!(ours(&agent), 0);
}

#[test]
fn the_kernel_wakes_us_for_damage_to_objects_and_not_for_those_of_others() {
    const HARMLESS: &[&str] = &[
        "nexthop replace id 1175122951 via 10.244.7.0 dev flannel.1 onlink proto 70",
        "route replace 10.244.7.0/24 nhid 1175122951 proto 70",
        "nexthop add id 7 via 172.31.0.254 dev eth0 proto zebra\nroute add 192.168.9.0/24 nhid 7\n\
         nexthop del id 7",
        "nexthop add id 1175085569 via 172.31.0.252 dev eth0 proto 70\nnexthop del id 1175085569",
    ];
    const DAMAGE: &[&str] = &[
        "nexthop replace id 1175122951 via 10.244.3.0 dev flannel.1 onlink proto 70",
        "nexthop replace id 1175122952 via 10.244.8.0 dev flannel.1 onlink proto zebra",
        "nexthop del id 1175122953",
        "nexthop add id 1175123044 via 10.244.100.0 dev flannel.1 onlink proto 70",
        "route replace 10.244.10.0/24 nhid 1175122955 proto 70",
        "route replace 10.244.11.0/24 via 10.244.11.0 dev flannel.1 onlink proto 70",
    ];
    for compat in ["1", "0"] {
        let fabric = Fabric::new().unwrap();
        let machine = fabric.node().unwrap();
        machine.namespace().run(|| std::fs::write("/proc/sys/net/ipv4/nexthop_compat_mode", compat)).unwrap();
        let mut agent = Agent::new(&machine, VXLAN);
        let desired = agent.desired_by_objects(&leases(&agent.network, 20));
        agent.converge(&desired);
        watched(&agent, Arc::new(desired), HARMLESS, DAMAGE);
    }
}

#[test]
fn a_kernel_without_objects_gets_plain_routes() {
    let fabric = Fabric::new().unwrap();
    let machine = fabric.node().unwrap();
    let mut agent = Agent::new(&machine, VXLAN);
    let mut desired = agent.desired(&leases(&agent.network, 3));
    let plain = desired.clone();
    desired.use_nexthops_always(&NexthopSupport::Refused);
    assert_eq!(desired, plain);
    agent.converge(&desired);
    assert_eq!(agent.objects(), Vec::<String>::new());
}
