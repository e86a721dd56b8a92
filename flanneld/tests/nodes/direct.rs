//! DirectRouting: peers on this node's own links without a tunnel, all others through it.

use std::net::{IpAddr, Ipv4Addr};

use backends::testing::Pod;
use subnet::Family;

use crate::bed::Member;
use crate::site::{Kind, Site, config, logs, lost, pings};

const TUNNEL: &str = r#"{"Type":"vxlan"}"#;
const DIRECT: &str = r#"{"Type":"vxlan","DirectRouting":true}"#;

/// The one route that leads to a subnet of `peer`, in this family.
fn route(member: &Member, peer: &Member, family: Family) -> String {
    let subnet = peer.subnets().into_iter().find(|net| Family::of(net.addr()) == family).unwrap();
    let of = if family == Family::V4 { "-4" } else { "-6" };
    let routes = member.show(&format!("ip {of} route show {subnet}"));
    assert!(routes.trim().lines().count() <= 1, "{routes}");
    routes
}

fn is_direct(member: &Member, peer: &Member, family: Family) -> bool {
    let public: IpAddr = match family {
        Family::V4 => peer.node.address().into(),
        Family::V6 => peer.node.address_v6().into(),
    };
    route(member, peer, family).contains(&format!("via {public} dev eth0 proto 70"))
}

fn is_tunnelled(member: &Member, peer: &Member, family: Family) -> bool {
    let device = if family == Family::V4 { "dev flannel.1 " } else { "dev flannel-v6.1 " };
    route(member, peer, family).contains(device)
}

/// Two nodes on one link, a third behind a router, and a pod on each.
struct Setup {
    site: Site,
    members: [Member; 3],
    pods: [Pod; 3],
}

impl Setup {
    fn new(kind: Kind, families: &[Family], backend: &str) -> Self {
        let site = Site::new(kind, &config(families, backend));
        let near = || site.join();
        let members = [near(), near(), site.ready(site.fabric.remote_node().unwrap(), &[])];
        let pods = members.each_ref().map(Member::pod_of_all_families);
        let setup = Self { site, members, pods };
        setup.members[0].wait("echoes between all pods", || setup.all_reach_each_other());
        setup
    }

    fn all_reach_each_other(&self) -> bool {
        let to = |pod: &Pod| pod.addresses().to_vec();
        self.pods.iter().all(|from| {
            self.pods.iter().flat_map(to).all(|address| from.namespace().reaches(address.addr()).unwrap())
        })
    }

    /// Waits until the first two reach each other so, and the third and they each other by the tunnel.
    fn wait_for_ways(&self, families: &[Family], direct: bool) {
        let [a, b, c] = &self.members;
        for family in families.iter().copied() {
            for (from, to) in [(a, b), (b, a)] {
                from.wait(&format!("{family}: a route to a neighbour, direct: {direct}"), || {
                    if direct { is_direct(from, to, family) } else { is_tunnelled(from, to, family) }
                });
            }
            for (from, to) in [(a, c), (b, c), (c, a), (c, b)] {
                from.wait(&format!("{family}: a route across the router"), || is_tunnelled(from, to, family));
            }
        }
    }

    fn pings(&self) -> Vec<backends::testing::Pinger> {
        pings(&self.pods.each_ref())
    }

    fn logs(&self) -> String {
        logs(&self.members.each_ref())
    }
}

#[test]
fn neighbours_are_reached_without_a_tunnel_and_turning_that_on_and_off_loses_nothing() {
    for families in [&[Family::V4][..], &[Family::V6], &Family::BOTH] {
        let setup = Setup::new(Kind::Etcd, families, DIRECT);
        setup.wait_for_ways(families, true);
        // Nothing of the tunnel is kept for a neighbour.
        let [a, b, _] = &setup.members;
        let fdb = a.show("bridge fdb show");
        assert!(!fdb.contains(&format!("dst {} ", b.node.address())), "{fdb}");
        assert!(!fdb.contains(&format!("dst {} ", b.node.address_v6())), "{fdb}");
        let pings = setup.pings();
        for _ in 0..2 {
            for (backend, direct) in [(TUNNEL, false), (DIRECT, true)] {
                setup.site.configure(&config(families, backend));
                setup.wait_for_ways(families, direct);
                crate::site::answered(&pings);
            }
        }
        let lost = lost(pings);
        assert!(lost.iter().all(|lost| *lost == 0), "{families:?} {lost:?}\n{}", setup.logs());
    }
}

#[test]
fn a_neighbour_that_is_put_behind_the_router_is_reached_by_the_tunnel_until_it_is_back() {
    let setup = Setup::new(Kind::Etcd, &Family::BOTH, DIRECT);
    setup.wait_for_ways(&Family::BOTH, true);
    let pings = setup.pings();
    let [a, b, _] = &setup.members;
    for (family, other, way) in [
        (Family::V4, Family::V6, format!("{}/32 via 172.31.0.254", b.node.address())),
        (Family::V6, Family::V4, format!("{}/128 via fd31::fe", b.node.address_v6())),
    ] {
        for _ in 0..2 {
            a.ip(&format!("route add {way}"));
            a.wait("the tunnel", || is_tunnelled(a, b, family));
            assert!(is_direct(a, b, other));
            crate::site::answered(&pings);
            a.ip(&format!("route del {way}"));
            a.wait("the direct way", || is_direct(a, b, family));
            crate::site::answered(&pings);
        }
    }
    let lost = lost(pings);
    assert!(lost.iter().all(|lost| *lost == 0), "{lost:?}\n{}", setup.logs());
}

#[test]
fn an_address_on_the_link_that_nobody_has_is_not_direct_until_somebody_has_it() {
    let site = Site::new(Kind::Etcd, &config(&Family::BOTH, DIRECT));
    let (a, b) = (site.join(), site.join());
    let (v4, v6): (Ipv4Addr, _) = ("172.31.0.99".parse().unwrap(), "fd31::99");
    let mac = "02:00:00:00:00:99";
    let data = format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#);
    let value = format!(
        r#"{{"PublicIP":"{v4}","PublicIPv6":"{v6}","BackendType":"vxlan","BackendData":{data},"BackendV6Data":{data}}}"#
    );
    site.etcdctl(&["put", "/coreos.com/network/subnets/10.244.99.0-24&fd00:244:0:99::-64", &value]);
    let routes = || {
        ["ip -4 route show 10.244.99.0/24", "ip -6 route show fd00:244:0:99::/64"].map(|show| a.show(show))
    };
    let tunnelled = || {
        let [v4, v6] = routes();
        v4.contains("dev flannel.1 ") && v6.contains("dev flannel-v6.1 ")
    };
    a.wait("the routes", tunnelled);
    // The kernel has asked for the address in vain by then.
    a.wait("the kernel's word that nobody answers", || {
        let entries = a.show("ip neigh show dev eth0");
        entries.lines().filter(|line| line.contains("99 ") && line.contains("FAILED")).count() == 2
            || !entries.contains("99 ")
    });
    assert!(tunnelled(), "{:?}", routes());
    b.ip(&format!("addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad"));
    // The next packet to it asks again.
    a.wait("the direct ways", || {
        let _ = a.node.namespace().reaches(v4.into());
        let _ = a.node.namespace().reaches(v6.parse().unwrap());
        let [way_v4, way_v6] = routes();
        way_v4.contains(&format!("via {v4} dev eth0")) && way_v6.contains(&format!("via {v6} dev eth0"))
    });
}
