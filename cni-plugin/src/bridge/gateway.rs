//! The gateway's addresses on the bridge, and forwarding.

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::netlink::link::{self, Link};
use crate::netlink::message::Message;
use crate::netlink::socket::Socket;
use crate::netlink::{Errno, address, netconf};
use crate::result::Ip;
use crate::sysctl;

/// The gateways of a pod's addresses, each with the prefix length of its address.
///
/// # Errors
/// A sentence, when one is of the other family than its address.
pub(super) fn of(ips: &[Ip]) -> Result<Vec<IpNet>, String> {
    let with_length = |ip: &Ip| {
        let gateway = ip.gateway.filter(|gateway| gateway.is_ipv6() == ip.address.addr().is_ipv6());
        let gateway = gateway.ok_or_else(|| {
            let given = ip.gateway.map(|gateway| gateway.to_string()).unwrap_or_default();
            format!("gateway {given:?} can't be that of {}: give one of the same family", ip.address)
        })?;
        IpNet::new(gateway, ip.address.prefix_len()).map_err(|error| error.to_string())
    };
    ips.iter().map(with_length).collect()
}

/// Sees that the bridge has these addresses, and that the node forwards.
///
/// # Errors
/// A sentence in the words of Go's plugin.
pub(super) fn ensure(
    host: &mut Socket,
    bridge: &Link,
    gateways: &[IpNet],
    force: bool,
) -> Result<(), String> {
    if gateways.is_empty() {
        return Ok(());
    }
    let mut assigned = Vec::new();
    let mut forwarded = Vec::new();
    host.ask_strictly();
    for ipv6 in families(gateways) {
        let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
        let failed =
            |errno: Errno| format!("failed to set bridge addr: could not get list of IP addresses: {errno}");
        let questions = vec![netconf::look(ipv6), address::dump(family, bridge.index)];
        let [settings, addresses] = &host.exchange(questions).map_err(|refusal| failed(refusal.errno))?[..]
        else {
            continue;
        };
        let addresses = addresses.as_ref().map_err(|errno| failed(*errno))?;
        assigned.extend(address::found(addresses, bridge.index).into_iter().map(|one| one.address));
        forwarded.push((ipv6, settings.as_ref().is_ok_and(|replies| netconf::forwards(replies))));
    }
    for gateway in gateways {
        if assigned.contains(gateway) {
            continue;
        }
        let in_the_way = stale(&assigned, *gateway);
        if !in_the_way.is_empty() && !force {
            return Err(format!(
                "failed to set bridge addr: {:?} already has an IP address different from {gateway}",
                bridge.name
            ));
        }
        set(host, bridge, *gateway, &in_the_way)?;
    }
    for (ipv6, _) in forwarded.into_iter().filter(|(_, forwards)| !forwards) {
        let key = if ipv6 { "ipv6/conf/all/forwarding" } else { "ipv4/ip_forward" };
        sysctl::set(key, "1").map_err(|error| format!("failed to enable forwarding: {error}"))?;
    }
    Ok(())
}

/// The addresses that can't stay beside a new one: any other of IPv4, and of IPv6 those whose networks overlap.
fn stale(assigned: &[IpNet], gateway: IpNet) -> Vec<IpNet> {
    let same_family = |one: &&IpNet| one.addr().is_ipv6() == gateway.addr().is_ipv6();
    let in_the_way = |one: &&IpNet| {
        gateway.addr().is_ipv4() || one.contains(&gateway.addr()) || gateway.contains(&one.addr())
    };
    assigned.iter().filter(same_family).filter(in_the_way).copied().collect()
}

fn set(host: &mut Socket, bridge: &Link, gateway: IpNet, in_the_way: &[IpNet]) -> Result<(), String> {
    let name = &bridge.name;
    let mut requests: Vec<(Message, String)> = Vec::new();
    for stale in in_the_way {
        let what = format!("could not remove IP address from {name:?}");
        requests.push((address::delete(bridge.index, *stale), what));
    }
    let what = format!("could not add IP address to {name:?}");
    requests.push((address::add(bridge.index, gateway, false), what));
    // A bridge whose MAC was never set takes the lowest one of its ports, which come and go, and without ports it
    // has none.
    let mac = match bridge.mac.iter().all(|byte| *byte == 0) {
        false => bridge.mac.clone(),
        true => link::by_name(host, name).ok().flatten().map(|link| link.mac).unwrap_or_default(),
    };
    requests.push((link::set_mac(bridge.index, &mac), "could not set bridge's mac".into()));
    let (messages, what): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
    let outcomes = host.outcomes(messages).map_err(|refusal| refusal.errno.to_string())?;
    for (outcome, what) in outcomes.into_iter().zip(what) {
        match outcome {
            // Another pod's ADD was faster.
            Ok(()) | Err(Errno::EXISTS) => {}
            Err(errno) => return Err(format!("failed to set bridge addr: {what}: {errno}")),
        }
    }
    Ok(())
}

/// The families of addresses.
fn families(addresses: &[IpNet]) -> BTreeSet<bool> {
    addresses.iter().map(|one| one.addr().is_ipv6()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beside_a_new_address_of_ipv4_no_other_stays_and_of_ipv6_those_of_other_networks() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let assigned = ["10.1.99.1/24", "fd00::1/64", "fd00:1::1/64", "fe80::1/64"].map(net);
        assert_eq!(stale(&assigned, net("10.1.17.1/24")), [net("10.1.99.1/24")]);
        assert_eq!(stale(&assigned, net("fd00::5/60")), [net("fd00::1/64")]);
        assert_eq!(stale(&assigned, net("fd00:2::1/64")), []);
    }
}
