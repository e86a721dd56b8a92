//! The fast path with each backend and both families, and with many bytes.

use std::env;
use std::net::SocketAddr;

use backends::testing::Pod;
use ipnet::IpNet;

use super::{Setup, VXLAN, at, is_offloaded, service};
use crate::bed::Member;
use crate::exchange::Exchange;

/// How many MiB a connection by a service carries each way, unless `TEST_FAST_PATH_MIB` is set (`make test-fast-path`).
const SERVICE_MIB: u64 = 16;
/// The same for the other connections. What the first one proves of size and order holds for these; they differ in what is translated.
const OTHER_MIB: u64 = 2;

fn config(backend: &str) -> String {
    format!(
        r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","FastPath":true,"Backend":{{{backend}}}}}"#
    )
}

/// A pod with an address of IPv6 alone.
fn pod_v6(member: &Member) -> Pod {
    let subnet: IpNet = member.agent.subnet_env().unwrap().subnets.v6.unwrap().into();
    let address = IpNet::new(subnet.hosts().nth(2).unwrap(), subnet.prefix_len()).unwrap();
    Pod::wired_with(&member.node, &[address]).unwrap()
}

/// Connections of both families, each of which takes the fast path on both nodes and arrives unchanged, with packets as long as pods
/// make them.
fn carries(backend: &str) {
    let setup = Setup::new(&config(backend), &[]);
    let [a, b] = &setup.members;
    let v4 = setup.exchange(7081);
    v4.goes_on(a, "its first bytes by the fast path");
    v4.finish();

    let pods = [pod_v6(a), pod_v6(b)];
    a.wait("an echo over IPv6", || pods[0].namespace().reaches(pods[1].address()).unwrap());
    let v6 = Exchange::start(pods[0].namespace(), pods[1].namespace(), at(&pods[1], 7082), 7082);
    for member in [a, b] {
        member.wait("the connection over IPv6 in the flowtable", || is_offloaded(member, 7082));
    }
    v6.goes_on(a, "its first bytes by the fast path");
    v6.finish();
}

#[test]
fn with_vxlan_both_families_arrive_unchanged() {
    carries(r#""Type":"vxlan""#);
}

#[test]
fn with_host_gw_both_families_arrive_unchanged() {
    carries(r#""Type":"host-gw""#);
}

#[test]
fn with_udp_both_families_arrive_unchanged() {
    carries(r#""Type":"udp""#);
}

#[test]
fn with_wireguard_by_the_kernel_both_families_arrive_unchanged() {
    carries(r#""Type":"wireguard","Userspace":"never""#);
}

#[test]
fn with_wireguard_in_process_both_families_arrive_unchanged() {
    carries(r#""Type":"wireguard","Userspace":"always""#);
}

#[test]
fn with_ipip_a_connection_arrives_unchanged() {
    let config = r#"{"Network":"10.244.0.0/16","FastPath":true,"Backend":{"Type":"ipip"}}"#;
    let setup = Setup::new(config, &[]);
    let exchange = setup.exchange(7083);
    exchange.goes_on(&setup.members[0], "its first bytes by the fast path");
    exchange.finish();
}

/// Chunks of 64 KiB.
fn chunks(mib: u64) -> u64 {
    let given = env::var("TEST_FAST_PATH_MIB").ok().map(|text| text.parse().unwrap());
    given.unwrap_or(mib) * 16
}

#[test]
fn many_bytes_each_way_arrive_unchanged_by_a_service_directly_and_with_a_translated_source() {
    let setup = Setup::new(VXLAN, &["--ip-masq"]);
    let [a, _] = &setup.members;
    let [client, server] = &setup.pods;
    let whole = |exchange: Exchange, port: u16, mib: u64| {
        a.wait("the connection in the flowtable", || is_offloaded(a, port));
        exchange.until_each_way(chunks(mib));
        exchange.finish();
    };
    let service = service(a, at(server, 7084));
    whole(Exchange::at_full_speed(client.namespace(), server.namespace(), service, 7084), 7084, SERVICE_MIB);
    let direct = at(server, 7085);
    whole(Exchange::at_full_speed(client.namespace(), server.namespace(), direct, 7085), 7085, OTHER_MIB);
    let outside = setup.cluster.fabric.node().unwrap();
    let address = SocketAddr::new(outside.address().into(), 7086);
    whole(Exchange::at_full_speed(client.namespace(), outside.namespace(), address, 7086), 7086, OTHER_MIB);
}
