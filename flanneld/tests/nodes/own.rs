//! What an operator says about one node in Kubernetes, while it runs.

use subnet::Family;

use crate::bed::Member;
use crate::site::{Kind, Site, config, logs, lost, pings};

const VXLAN: &str = r#"{"Type":"vxlan"}"#;

fn annotate(site: &Site, member: &Member, key: &str, value: Option<&str>) {
    site.api().annotate(&member.node.name(), &format!("flannel.alpha.coreos.com/{key}"), value);
}

fn annotation(site: &Site, member: &Member, key: &str) -> Option<String> {
    let node = site.api().node(&member.node.name())?;
    let key = format!("flannel.alpha.coreos.com/{key}");
    node["metadata"]["annotations"][&key].as_str().map(str::to_owned)
}

#[test]
fn an_address_that_overwrites_the_published_one_is_published_and_taken_back() {
    let site = Site::new(Kind::Kube, &config(&Family::BOTH, VXLAN));
    let (a, b) = (site.join(), site.join());
    for (key, published, other, own) in [
        ("public-ip-overwrite", "public-ip", "172.31.0.77", a.node.address().to_string()),
        ("public-ipv6-overwrite", "public-ipv6", "fd31::77", a.node.address_v6().to_string()),
    ] {
        assert_eq!(annotation(&site, &a, published).as_ref(), Some(&own));
        for _ in 0..2 {
            annotate(&site, &a, key, Some(other));
            a.wait("the other address", || annotation(&site, &a, published).as_deref() == Some(other));
            b.wait("it on the peer", || b.show("bridge fdb show").contains(&format!("dst {other} ")));
            // What the node itself sends from stays.
            assert!(a.show("ip -d link show").contains(&format!("local {own} ")));
            annotate(&site, &a, key, None);
            a.wait("its own address", || annotation(&site, &a, published).as_ref() == Some(&own));
            b.wait("it on the peer", || b.show("bridge fdb show").contains(&format!("dst {own} ")));
        }
    }
    assert!(a.is_ready() && b.is_ready());
    assert_eq!(a.agent.log().matches("flanneld v").count(), 1);
}

#[test]
fn another_address_of_the_host_that_an_operator_chooses_is_used_and_given_up() {
    for backend in [VXLAN, r#"{"Type":"host-gw"}"#] {
        let site = Site::new(Kind::Kube, &config(&Family::BOTH, backend));
        let (a, b) = (site.join(), site.join());
        // Additional addresses move no node.
        a.ip("addr add 172.31.0.88/24 dev eth0\naddr add fd31::88/64 dev eth0 nodad");
        let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
        b.wait("echoes in both families", || {
            pod_a.addresses().iter().all(|to| pod_b.namespace().reaches(to.addr()).unwrap())
        });
        assert!(!site.announced().iter().any(|text| text.contains("fd31::88")), "{}", a.agent.log());
        let pings = pings(&[&pod_a, &pod_b]);
        for (key, published, other, own) in [
            ("node-public-ip", "public-ip", "172.31.0.88", a.node.address().to_string()),
            ("node-public-ipv6", "public-ipv6", "fd31::88", a.node.address_v6().to_string()),
        ] {
            for (set, wanted) in [(Some(other), other), (None, own.as_str())] {
                annotate(&site, &a, key, set);
                a.wait("the address", || annotation(&site, &a, published).as_deref() == Some(wanted));
                b.wait("it on the peer", || {
                    b.show("bridge fdb show").contains(&format!("dst {wanted} "))
                        || b.show("ip -4 route show").contains(&format!("via {wanted} "))
                        || b.show("ip -6 route show").contains(&format!("via {wanted} "))
                });
                if backend == VXLAN {
                    a.wait("it on the device", || {
                        a.show("ip -d link show type vxlan").contains(&format!("local {wanted} "))
                    });
                }
                crate::site::answered(&pings);
            }
        }
        let lost = lost(pings);
        assert_eq!(lost, [0; 4], "{backend}\n{}", logs(&[&a, &b]));
        assert_eq!(a.agent.log().matches("flanneld v").count(), 1);
    }
}

#[test]
fn an_address_that_the_host_does_not_have_is_refused_and_the_old_one_stays() {
    let site = Site::new(Kind::Kube, &config(&[Family::V4], VXLAN));
    let (a, b) = (site.join(), site.join());
    let (pod_a, pod_b) = (a.pod_of_all_families(), b.pod_of_all_families());
    let pings = pings(&[&pod_a, &pod_b]);
    let own = a.node.address().to_string();
    annotate(&site, &a, "node-public-ip", Some("172.31.0.123"));
    a.wait("a word about it", || a.agent.log().contains("172.31.0.123"));
    crate::site::answered(&pings);
    assert_eq!(annotation(&site, &a, "public-ip").as_ref(), Some(&own));
    annotate(&site, &a, "node-public-ip", None);
    a.wait("ready", || a.is_ready());
    crate::site::answered(&pings);
    assert_eq!(lost(pings), [0, 0], "{}", logs(&[&a, &b]));
}
