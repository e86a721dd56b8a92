//! `portmap`: ports of the host lead to a pod, by rules of nf_tables in the form of the original since 1.9, which leave alone what goes
//! to other machines and to other pods (CVE-2025-67499).

mod config;
mod legacy;

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::chained::{attached, passed_on, previous};
use crate::conf::Network;
use crate::env::{Attachment, Call, Verb};
use crate::netlink::message::Message;
use crate::netlink::nft::{self, Expr, MAX_COMMENT, Owner};
use crate::netlink::socket::Socket;
use crate::netlink::{Errno, conntrack, route};
use crate::{note, sysctl};
use config::{PortmapConfig, addresses};

const TABLE: &str = "cni_hostport";
/// Chains of rules with the container as their comment. The original had those of mappings with an address in the second one
/// until 1.8, and goes on to look there.
const MAPPINGS: &str = "hostports";
const FORMER_MAPPINGS: &str = "hostip_hostports";
const MASQUERADING: &str = "masquerading";
/// Leads to both chains of mappings.
const ALL_MAPPINGS: &str = "hostports_all";
/// Hooks of base chains with their priorities: prerouting, output and postrouting.
const PREROUTING: nft::Hook = (0, -100);
const OUTPUT: nft::Hook = (3, -100);
const POSTROUTING: nft::Hook = (4, 100);

/// What is printed when a call succeeds.
///
/// # Errors
/// A sentence.
pub(crate) fn answer(call: &Call, network: &Network, stdin: &str) -> Result<String, String> {
    let container = &call.attachment.container;
    match call.verb {
        Verb::Add => {
            let config = PortmapConfig::parse(stdin)?;
            let result = passed_on(previous(network)?);
            let addresses = addresses(&attached(network)?, &call.attachment.ifname);
            if !config.mappings.is_empty() {
                add(&config, Owner { container, network: &network.name }, &addresses)?;
            }
            Ok(result)
        }
        Verb::Del => del(network, container, stdin).map(|()| String::new()),
        Verb::Check => {
            let config = PortmapConfig::parse(stdin)?;
            if network.prev_result.is_none() {
                return Err("Required prevResult missing".into());
            }
            let addresses = addresses(&attached(network)?, &call.attachment.ifname);
            addresses.iter().try_for_each(|address| check(&config, container, *address))?;
            Ok(String::new())
        }
        Verb::Status => {
            let probed = Socket::netfilter().and_then(|mut socket| nft::probe(&mut socket));
            probed.map_err(|errno| {
                format!("no port can be mapped: nf_tables: {errno}: load the module nf_tables, and run with NET_ADMIN")
            })?;
            Ok(String::new())
        }
        Verb::Gc => collect(&network.name, &network.valid_attachments().map_err(|error| error.msg)?)
            .map(|()| String::new()),
        Verb::Version => Ok(String::new()),
    }
}

fn add(config: &PortmapConfig, owner: Owner<'_>, addresses: &[IpAddr]) -> Result<(), String> {
    if owner.container.len() > MAX_COMMENT {
        return Err(format!(
            "a container id of {} characters does not fit into a rule's comment",
            owner.container.len()
        ));
    }
    let failed = |errno: Errno| format!("unable to set up nftables rules for port mappings: {errno}");
    let mut socket = Socket::netfilter().map_err(failed)?;
    for address in addresses {
        let ipv6 = address.is_ipv6();
        if config.of_family(ipv6).next().is_none() {
            continue;
        }
        if !ipv6 && config.snat {
            allow_loopback(*address);
        }
        nft::commit(&mut socket, changes(config, owner, *address))
            .map_err(|refusal| failed(refusal.errno))?;
        let udp = i32::from;
        let ports: Vec<u16> = config
            .of_family(ipv6)
            .filter(|one| udp(one.protocol) == libc::IPPROTO_UDP)
            .map(|one| one.host_port)
            .collect();
        if !ports.is_empty()
            && let Err(errno) = conntrack::forget_udp(&mut socket, ipv6, &ports)
        {
            note(&format!("failed to delete stale UDP conntrack entries for {address}: {errno}"));
        }
    }
    Ok(())
}

/// Everything that a pod's address needs, with what all pods share.
fn changes(config: &PortmapConfig, owner: Owner<'_>, address: IpAddr) -> Vec<Message> {
    let ipv6 = address.is_ipv6();
    let family = nft::family(ipv6);
    let rule =
        |chain: &str, exprs: &[Expr], owner: Option<Owner<'_>>| nft::rule(family, TABLE, chain, exprs, owner);
    let mut changes = vec![
        nft::table(family, TABLE, "CNI portmap plugin"),
        nft::chain(family, TABLE, MAPPINGS, None),
        nft::chain(family, TABLE, FORMER_MAPPINGS, None),
        nft::chain(family, TABLE, ALL_MAPPINGS, None),
        nft::flush(family, TABLE, ALL_MAPPINGS),
        rule(ALL_MAPPINGS, &[Expr::Jump(FORMER_MAPPINGS)], None),
        rule(ALL_MAPPINGS, &[Expr::Jump(MAPPINGS)], None),
    ];
    for (chain, hook) in [("prerouting", PREROUTING), ("output", OUTPUT)] {
        changes.extend([
            nft::chain(family, TABLE, chain, Some(hook)),
            nft::flush(family, TABLE, chain),
            // Also for mappings with an address: a pod can ask for one of another machine.
            rule(chain, &[Expr::DestinationIsLocal, Expr::Jump(ALL_MAPPINGS)], None),
        ]);
    }
    if config.snat {
        changes.push(nft::chain(family, TABLE, MASQUERADING, Some(POSTROUTING)));
    }
    for one in config.of_family(ipv6) {
        let port = Expr::Port(one.protocol, one.host_port);
        let to = Expr::Dnat(address, one.container_port);
        changes.push(match one.host_ip.filter(|ip| !ip.is_unspecified()) {
            Some(ip) => rule(MAPPINGS, &[Expr::Destination(ip), port, to], Some(owner)),
            None => rule(MAPPINGS, &[port, to], Some(owner)),
        });
    }
    if config.snat {
        let mut masquerade = |source: IpAddr| {
            let exprs = [Expr::Source(source), Expr::Destination(address), Expr::Masquerade];
            changes.push(rule(MASQUERADING, &exprs, Some(owner)));
        };
        masquerade(address);
        if !ipv6 {
            masquerade([127, 0, 0, 1].into());
        }
    }
    changes
}

/// Lets packets of the host's loopback address out by the link that leads to the pod.
fn allow_loopback(address: IpAddr) {
    let link = Socket::route().and_then(|mut socket| route::link_to(&mut socket, address));
    match link {
        Ok(Some(link)) => sysctl::try_set(&format!("ipv4/conf/{link}/route_localnet"), "1"),
        Ok(None) => {}
        Err(errno) => {
            note(&format!("no route to {address}: {errno}: 127.0.0.1 of the host does not lead to it"))
        }
    }
}

/// Removes the container's rules, of both families, and those of the original before 1.6.
fn del(network: &Network, container: &str, stdin: &str) -> Result<(), String> {
    // A configuration that could not be used has mapped nothing.
    if PortmapConfig::parse(stdin).is_ok_and(|config| config.mappings.is_empty()) {
        return Ok(());
    }
    let failed = |errno: Errno| format!("error deleting nftables rules: {errno}");
    let mut socket = Socket::netfilter().map_err(failed)?;
    for ipv6 in [false, true] {
        let family = nft::family(ipv6);
        remove(&mut socket, family, container).map_err(failed)?;
        legacy::remove(&mut socket, family, &network.name, container).map_err(failed)?;
    }
    Ok(())
}

/// Removes the rules of this network whose containers have no valid attachment to it. Those of Go's plugin do not tell
/// their network: their DEL removes them.
fn collect(network: &str, valid: &BTreeSet<Attachment>) -> Result<(), String> {
    let failed = |errno: Errno| format!("error deleting nftables rules: {errno}");
    let mut socket = Socket::netfilter().map_err(failed)?;
    let stale = |rule: &nft::Rule| {
        rule.network.as_deref() == Some(network) && valid.iter().all(|one| one.container != rule.comment)
    };
    [false, true]
        .into_iter()
        .try_for_each(|ipv6| remove_if(&mut socket, nft::family(ipv6), stale).map_err(failed))
}

fn remove(socket: &mut Socket, family: u8, container: &str) -> Result<(), Errno> {
    remove_if(socket, family, |rule| rule.comment == container)
}

/// Removes rules that were made for containers.
fn remove_if(socket: &mut Socket, family: u8, wanted: impl Fn(&nft::Rule) -> bool) -> Result<(), Errno> {
    for _ in 0..10 {
        let mut rules = of_containers(socket, family)?;
        rules.retain(&wanted);
        let deletions: Vec<_> = rules.iter().map(|rule| nft::delete_rule(family, TABLE, rule)).collect();
        if deletions.is_empty() {
            return Ok(());
        }
        match nft::commit(socket, deletions).map_err(Errno::from) {
            // Somebody else removed one of them: look again.
            Err(Errno::NO_ENTRY) => {}
            outcome => return outcome,
        }
    }
    Err(Errno(libc::EAGAIN))
}

fn own(socket: &mut Socket, family: u8, container: &str) -> Result<Vec<nft::Rule>, Errno> {
    let mut rules = of_containers(socket, family)?;
    rules.retain(|rule| rule.comment == container);
    Ok(rules)
}

fn of_containers(socket: &mut Socket, family: u8) -> Result<Vec<nft::Rule>, Errno> {
    let mut rules = nft::rules(socket, family, TABLE)?;
    rules.retain(|rule| [FORMER_MAPPINGS, MAPPINGS, MASQUERADING].contains(&&*rule.chain));
    Ok(rules)
}

fn check(config: &PortmapConfig, container: &str, address: IpAddr) -> Result<(), String> {
    let ipv6 = address.is_ipv6();
    let mappings = config.of_family(ipv6).count();
    if mappings == 0 {
        return Ok(());
    }
    let failed = |errno: Errno| format!("could not list rules in table {TABLE}: {errno}");
    let mut socket = Socket::netfilter().map_err(failed)?;
    let rules = own(&mut socket, nft::family(ipv6), container).map_err(failed)?;
    let masquerading = if config.snat { if ipv6 { 1 } else { 2 } } else { 0 };
    let (maskings, mapped): (Vec<_>, Vec<_>) = rules.iter().partition(|rule| rule.chain == MASQUERADING);
    for (chain, found, wanted) in
        [(MAPPINGS, mapped.len(), mappings), (MASQUERADING, maskings.len(), masquerading)]
    {
        if found < wanted {
            return Err(format!("missing hostport rules in {chain:?} chain"));
        }
    }
    Ok(())
}
