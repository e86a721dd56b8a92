//! `bandwidth`: the rate of a pod's traffic is limited, by a queue of the host's end of its pair for what comes to the
//! pod, and by the queue of an own link, an ifb, for what the pod sends.

mod config;

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::chained::{attached, passed_on, previous};
use crate::conf::Network;
use crate::env::{Attachment, Call, Verb};
use crate::hash;
use crate::netlink::link::{self, Link};
use crate::netlink::socket::Socket;
use crate::netlink::tc::{self, Limit};
use crate::netlink::{Errno, message::Message};
use crate::netns::{Missing, Namespace};
use crate::result::Interface;
use config::BandwidthConfig;

/// How the names of our ifbs and of those of Go's plugin begin, and how ours begin to tell whose they are.
const PREFIX: &str = "bwp";
const ALIAS: &str = "flannel bandwidth ";
/// `IFALIASZ`, without the zero byte.
const MAX_ALIAS: usize = 255;

/// What is printed when a call succeeds.
///
/// # Errors
/// A sentence.
pub(crate) fn answer(call: &Call, network: &Network, stdin: &str) -> Result<String, String> {
    let ifb = || hash::name(PREFIX, 15, &format!("{}{}", network.name, call.attachment.container));
    match call.verb {
        Verb::Add => {
            let config = BandwidthConfig::parse(stdin)?;
            let result = previous(network)?;
            if config == BandwidthConfig::default() {
                return Ok(passed_on(result));
            }
            add(call, network, &config, &ifb(), result)
        }
        // An ifb of a configuration that makes no sense can't be there, but it costs nothing to look.
        Verb::Del => del(call, &ifb()).map(|()| String::new()),
        Verb::Check => {
            let config = BandwidthConfig::parse(stdin)?;
            check(call, network, &config, &ifb())?;
            Ok(String::new())
        }
        Verb::Gc => {
            let valid = network.valid_attachments().map_err(|error| error.msg)?;
            collect(&network.name, &valid).map(|()| String::new())
        }
        Verb::Status | Verb::Version => Ok(String::new()),
    }
}

fn open() -> Result<Socket, String> {
    Socket::route().map_err(|errno| format!("failed to open a netlink socket: {errno}"))
}

fn add(
    call: &Call,
    network: &Network,
    config: &BandwidthConfig,
    ifb: &str,
    result: &Value,
) -> Result<String, String> {
    let mut host = open()?;
    let ends = ends(call)?;
    let port = port(&mut host, call, network, &ends)?;
    let user = other_user(&mut host, call, &ends, ifb)?;
    if let Some(user) = user.filter(|_| config.egress.is_some()) {
        return Err(is_in_use(call, network, ifb, &user.name));
    }
    if let Some(limit) = config.ingress {
        apply(&mut host, vec![tc::limit(port.index, limit)], "create qdisc")?;
    } else {
        let _ = host.execute(vec![tc::unlimit(port.index)]);
    }
    // What an earlier ADD made for the same interface.
    let _ = host.execute(vec![tc::delete_ingress(port.index)]);
    if user.is_none() {
        delete_ifb(&mut host, ifb)?;
    }
    let mut result = result.clone();
    if let Some(limit) = config.egress {
        let alias = alias(&network.name, &call.attachment.container);
        let made = limit_egress(&mut host, &port, ifb, &alias, limit);
        let made = made.inspect_err(|_| drop(delete_ifb(&mut host, ifb)))?;
        if let Some(interfaces) = result.get_mut("interfaces").and_then(Value::as_array_mut) {
            interfaces.retain(|one| one["name"] != *ifb);
            interfaces.push(json!({"name": ifb, "mac": made.mac_text()}));
        }
    }
    Ok(passed_on(&result))
}

fn limit_egress(
    host: &mut Socket,
    port: &Link,
    ifb: &str,
    alias: &str,
    limit: Limit,
) -> Result<Link, String> {
    let mut new = vec![link::new_plain(ifb, port.mtu, "ifb")];
    // A longer one is refused, and nothing but GC would miss it.
    if alias.len() <= MAX_ALIAS {
        new.push(link::set_alias(ifb, alias));
    }
    apply(host, new, "adding link")?;
    let made = link::by_name(host, ifb).map_err(|errno| format!("get ifb device: {errno}"))?;
    let made = made.ok_or("get ifb device: Link not found")?;
    // The queue comes before the traffic.
    let changes =
        vec![tc::limit(made.index, limit), tc::ingress(port.index), tc::redirect(port.index, made.index)];
    apply(host, changes, "limiting what the pod sends")?;
    Ok(made)
}

fn apply(host: &mut Socket, changes: Vec<Message>, what: &str) -> Result<(), String> {
    host.execute(changes).map_err(|refusal| format!("{what}: {}", refusal.errno))
}

/// What an ifb says about itself, for GC: its name is a hash, and tells neither network nor container.
fn alias(network: &str, container: &str) -> String {
    format!("{ALIAS}{network} {container}")
}

/// Removes the ifbs of this network whose containers have no valid attachment to it. Those of Go's plugin do not tell
/// their network: their DEL removes them.
fn collect(network: &str, valid: &BTreeSet<Attachment>) -> Result<(), String> {
    let mut host = open()?;
    let all = link::of_kind(&mut host, "ifb").map_err(|errno| format!("failed to list links: {errno}"))?;
    let of_network = alias(network, "");
    let stale = all.iter().filter(|one| {
        let container = one.alias.strip_prefix(&of_network).filter(|_| one.name.starts_with(PREFIX));
        container.is_some_and(|container| valid.iter().all(|one| one.container != container))
    });
    stale.map(|one| delete_ifb(&mut host, &one.name)).fold(Ok(()), Result::and)
}

fn delete_ifb(host: &mut Socket, name: &str) -> Result<(), String> {
    match host.execute(vec![link::delete(name)]).map_err(Errno::from) {
        Ok(()) | Err(Errno::NO_DEVICE) => Ok(()),
        Err(errno) => Err(format!("failed to delete {name:?}: {errno}")),
    }
}

fn del(call: &Call, ifb: &str) -> Result<(), String> {
    let mut host = open()?;
    // A pod that is gone, or can't be looked into, has no other interface that needs it.
    let ends = ends(call).unwrap_or_default();
    match other_user(&mut host, call, &ends, ifb) {
        Ok(Some(_)) => Ok(()),
        Ok(None) | Err(_) => delete_ifb(&mut host, ifb),
    }
}

/// The other interface of the pod whose packets go through the ifb, if there is one: the name of an ifb tells the container and
/// not the interface, and has to stay as it is, because Go's plugin looks for it as well.
fn other_user<'a>(
    host: &mut Socket,
    call: &Call,
    ends: &'a [Link],
    ifb: &str,
) -> Result<Option<&'a Link>, String> {
    let (own, others): (Vec<_>, Vec<_>) = ends.iter().partition(|end| end.name == call.attachment.ifname);
    if others.is_empty() {
        return Ok(None);
    }
    let failed = |errno: Errno| format!("failed to look what goes through {ifb:?}: {errno}");
    let Some(ifb) = link::by_name(host, ifb).map_err(failed)? else { return Ok(None) };
    // The other ends are not all in this namespace, and two namespaces can have links of one number.
    for other in others.into_iter().filter(|other| own.iter().all(|own| own.peer != other.peer)) {
        if tc::leads_to(host, other.peer, ifb.index).map_err(failed)? {
            return Ok(Some(other));
        }
    }
    Ok(None)
}

fn is_in_use(call: &Call, network: &Network, ifb: &str, user: &str) -> String {
    let Attachment { container, ifname } = &call.attachment;
    format!(
        "failed to limit what {ifname:?} of container {container:?} sends: the device {ifb:?} already limits what {user:?} of \
         this container sends, and there is one such device for each container and network: leave egressRate and egressBurst \
         out for {ifname:?}, or attach it to a network of another name than {:?}",
        network.name
    )
}

/// The ends of pairs in the pod.
fn ends(call: &Call) -> Result<Vec<Link>, String> {
    let namespace = Namespace::open(&call.netns)
        .map_err(|missing: Missing| format!("failed to open netns {:?}: {}", call.netns, missing.text()))?;
    namespace
        .within(|| Socket::route().and_then(|mut socket| link::of_kind(&mut socket, "veth")))
        .map_err(|error| format!("error switching to the namespace of the pod: {error}"))?
        .map_err(|errno| format!("failed to list the links of the pod: {errno}"))
}

/// The host's end of the pod's pair: it is the one of the result's interfaces that the pod's link leads to.
fn port(host: &mut Socket, call: &Call, network: &Network, ends: &[Link]) -> Result<Link, String> {
    let ifname = &call.attachment.ifname;
    let end = ends.iter().find(|end| end.name == *ifname);
    let end = end.ok_or_else(|| format!("container interface {ifname} has no veth peer"))?;
    let interfaces = attached(network)?.interfaces;
    if interfaces.is_empty() {
        return Err("no interfaces provided".into());
    }
    let on_host = |one: &&Interface| one.sandbox.is_empty();
    for one in interfaces.iter().filter(on_host) {
        let found = link::by_name(host, &one.name).map_err(|errno| format!("{}: {errno}", one.name))?;
        if let Some(link) = found.filter(|link| link.index == end.peer && link.kind == "veth") {
            return Ok(link);
        }
    }
    Err("no veth peer of container interface found in host ns".into())
}

fn check(call: &Call, network: &Network, config: &BandwidthConfig, ifb: &str) -> Result<(), String> {
    let mut host = open()?;
    let port = port(&mut host, call, network, &ends(call)?)?;
    let mut limited = |link: &Link, wanted: Limit| {
        let found = tc::limit_of(&mut host, link.index).map_err(|errno| format!("{}: {errno}", link.name))?;
        let found = found.ok_or("Failed to find qdisc")?;
        wanted.difference(found).map_or(Ok(()), |difference| Err(format!("{}: {difference}", link.name)))
    };
    if let Some(wanted) = config.ingress {
        limited(&port, wanted)?;
    }
    if let Some(wanted) = config.egress {
        let found =
            open().and_then(|mut host| link::by_name(&mut host, ifb).map_err(|errno| errno.to_string()));
        let link = found?.ok_or("get ifb device: Link not found")?;
        limited(&link, wanted)?;
    }
    Ok(())
}
