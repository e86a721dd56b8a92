//! The handshake with the agent about network policies: a pod starts when its policies are in the kernel, and not
//! before.
//!
//! One line of JSON each way over the socket that `subnet.env` names. Nothing of it is needed where that file names
//! none: policies are off, or another flanneld wrote it.

mod exchange;

use std::net::IpAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::bridge::Witness;
use crate::env::{Attachment, Call};
use crate::error::{self, CniError};
use crate::netlink::socket::Socket as Netlink;
use crate::netlink::{Errno, conntrack};
use crate::note;
use crate::result::{Attached, Ip};
use exchange::{Answer, Asked, Trouble, ask};

/// The version of the protocol.
const VERSION: u64 = 1;
/// How long a question waits that nothing depends on, and the least that any waits.
const SHORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two attempts: an agent that restarts is back within a second.
const PAUSE: Duration = Duration::from_millis(50);

/// The announcement of one pod, from its address to the agent's word that its policies are in force.
///
/// The built-in bridge knows the address before it makes the pod's link. The agent is asked then, and answered to when there is
/// the link, so that both work at the same time. Of a delegate that is a program the address is known when it is done.
pub(crate) struct Handshake<'a> {
    socket: &'a Path,
    call: &'a Call,
    wait: Duration,
    early: Option<Early>,
}

/// A question that was asked before the pod has its link.
struct Early {
    request: Value,
    asked: Result<Asked, Trouble>,
}

impl Witness for Handshake<'_> {
    fn reserved(&mut self, port: &str, ips: &[Ip]) {
        let request = announcement(self.call, Some(port), None, ips.iter().map(|ip| ip.address.addr()));
        let asked = Asked::send(self.socket, &request, SHORT_TIMEOUT);
        self.early = Some(Early { request, asked });
    }

    fn failed(&mut self) {
        // An agent that could not be asked has taken nothing.
        let Some(Early { asked: Ok(asked), .. }) = self.early.take() else { return };
        // The answer first: the end of an announcement that the agent has not read yet would mean nothing to it.
        if !matches!(asked.answer(SHORT_TIMEOUT), Ok(Answer::Refused(_))) {
            release(self.socket, &self.call.attachment, &self.call.args);
        }
    }
}

impl<'a> Handshake<'a> {
    pub(crate) fn new(socket: &'a Path, call: &'a Call, wait: Duration) -> Self {
        Self { socket, call, wait, early: None }
    }

    /// Returns when the policies of the pod with this result are in force.
    ///
    /// # Errors
    /// Code 11 when the agent is not there, or can't do it, for as long as it may take; 999 for what it will never accept.
    pub(crate) fn conclude(mut self, result: &Value) -> Result<(), CniError> {
        let request = announcement_of(self.call, result);
        let early = self.early.take().filter(|early| early.is_part_of(&request));
        let mut pending = early.map(|early| early.asked);
        let deadline = Instant::now() + self.wait.max(SHORT_TIMEOUT);
        let mut reason = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let answer = match pending.take() {
                Some(asked) => asked.and_then(|asked| asked.answer(left)),
                None => ask(self.socket, &request, left),
            };
            let why = match answer {
                Ok(Answer::Forgotten) => return Ok(()),
                Ok(Answer::Done) => {
                    forget_connections(&request);
                    return Ok(());
                }
                Ok(Answer::Refused(why)) => {
                    let msg = format!("flanneld refuses to enforce the pod's network policies: {why}");
                    return Err(CniError::new(error::OTHER, msg));
                }
                Ok(Answer::NotYet(why)) => {
                    format!("flanneld can't enforce the pod's network policies yet: {why}")
                }
                // The time is over; what it said before tells more.
                Err(Trouble::Silent) if reason.is_some() => reason.take().unwrap_or_default(),
                Err(trouble) => format!(
                    "the pod's network policies can't be enforced: {trouble}: no pod starts without them; see the log \
                     of flanneld on this node"
                ),
            };
            if self.wait.is_zero() || Instant::now() + PAUSE >= deadline {
                return Err(CniError::new(error::TRY_AGAIN_LATER, why));
            }
            reason = Some(why);
            thread::sleep(PAUSE);
        }
    }
}

impl Early {
    /// Whether it says of the pod what is so: all but its MAC, which was not known.
    fn is_part_of(&self, whole: &Value) -> bool {
        let mut known = whole.clone();
        if let Some(members) = known.as_object_mut() {
            members.remove("mac");
        }
        known == self.request
    }
}

/// What others sent to the pod's addresses before its policies were in force, or to the pod that had them before, made
/// connections that were never judged: answers to them would pass for a while. The pod's containers don't run yet, so that
/// it has none that it would miss.
fn forget_connections(announced: &Value) {
    let addresses = announced["ips"].as_array().into_iter().flatten();
    for address in addresses.filter_map(|address| address.as_str()?.parse::<IpAddr>().ok()) {
        let forgotten =
            Netlink::netfilter().and_then(|mut socket| conntrack::forget_address(&mut socket, address));
        if let Err(errno) = forgotten {
            let remedy = match errno {
                Errno::INVALID | Errno::NOT_SUPPORTED => ": load nf_conntrack_netlink",
                _ => "",
            };
            note(&format!(
                "connections with {address} from before its pod can't be forgotten: {errno}{remedy}"
            ));
        }
    }
}

/// Tells the agent that an attachment is gone. It learns that from Kubernetes too, a little later: `false` if it could
/// not be told.
pub(crate) fn release(socket: &Path, attachment: &Attachment, args: &str) -> bool {
    let mut request = request("del", attachment);
    request.extend(identity(args));
    match ask(socket, &request.into(), SHORT_TIMEOUT) {
        Ok(Answer::Done | Answer::Forgotten) => true,
        Ok(Answer::NotYet(why) | Answer::Refused(why)) => {
            note(&format!("flanneld was told that {} is gone: {why}", attachment.container));
            true
        }
        Err(trouble) => {
            note(&format!("flanneld could not be told that {} is gone: {trouble}", attachment.container));
            false
        }
    }
}

/// Says whether the agent would answer.
///
/// # Errors
/// A sentence.
pub(crate) fn status(socket: &Path) -> Result<(), String> {
    match ask(socket, &json!({"v": VERSION, "verb": "status"}), SHORT_TIMEOUT) {
        Ok(Answer::Done | Answer::Forgotten) => Ok(()),
        Ok(Answer::NotYet(why) | Answer::Refused(why)) => {
            Err(format!("flanneld can't enforce network policies yet: {why}"))
        }
        Err(trouble) => Err(format!("network policies can't be enforced: {trouble}: no pod would start")),
    }
}

fn request(verb: &str, attachment: &Attachment) -> Map<String, Value> {
    let Attachment { container, ifname } = attachment;
    let members = [
        ("v", json!(VERSION)),
        ("verb", json!(verb)),
        ("container", json!(container)),
        ("ifname", json!(ifname)),
    ];
    members.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// What Kubernetes' runtimes say about the pod in `CNI_ARGS`; other runtimes say nothing.
fn identity(args: &str) -> impl Iterator<Item = (String, Value)> + use<> {
    let value = |key: &str| {
        let mut pairs = args.split(';').filter_map(|pair| pair.split_once('='));
        let found = pairs.rfind(|(name, value)| *name == key && !value.is_empty());
        found.map(|(_, value)| Value::from(value))
    };
    let members = [
        ("namespace", value("K8S_POD_NAMESPACE")),
        ("pod", value("K8S_POD_NAME")),
        ("uid", value("K8S_POD_UID")),
    ];
    members.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)))
}

/// What is announced of a pod after its ADD: the delegate's result says the rest.
fn announcement_of(call: &Call, result: &Value) -> Value {
    let attached = Attached::read(result);
    let own =
        |sandboxed: bool| attached.interfaces.iter().rev().find(|one| one.sandbox.is_empty() != sandboxed);
    // The host's ends come before the pod's; of a bridge and a port of it, the port is the later one.
    let port = own(false).map(|host| &*host.name);
    let mac = own(true).map(|pod| &*pod.mac).filter(|mac| !mac.is_empty());
    let ips = attached.ips.iter().map(|ip| ip.address.addr());
    // Results of versions before 0.3.0.
    let by_family = ["ip4", "ip6"].into_iter().filter_map(|key| result[key]["ip"].as_str());
    let by_family = by_family.filter_map(|ip| ip.split('/').next()?.parse::<IpAddr>().ok());
    announcement(call, port, mac, ips.chain(by_family))
}

fn announcement(
    call: &Call,
    port: Option<&str>,
    mac: Option<&str>,
    ips: impl Iterator<Item = IpAddr>,
) -> Value {
    let mut request = request("add", &call.attachment);
    request.extend(identity(&call.args));
    if let Some(port) = port {
        request.insert("hostIf".into(), json!(port));
    }
    if let Some(mac) = mac {
        request.insert("mac".into(), json!(mac));
    }
    request.insert("ips".into(), json!(ips.collect::<Vec<_>>()));
    request.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn call(args: &str) -> Call {
        let variable = |name: &str| match name {
            "CNI_COMMAND" => Some("ADD"),
            "CNI_CONTAINERID" => Some("c1"),
            "CNI_IFNAME" => Some("eth0"),
            "CNI_NETNS" => Some("/nowhere"),
            "CNI_PATH" => Some("/opt/cni/bin"),
            "CNI_ARGS" => Some(args),
            _ => None,
        };
        Call::read(|name| variable(name).map(Into::into)).unwrap()
    }

    fn announced(args: &str, result: Value) -> Value {
        announcement_of(&call(args), &result)
    }

    const KUBELET: &str = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=12;K8S_POD_INFRA_CONTAINER_ID=c1";

    #[test]
    fn a_pod_is_announced_with_the_addresses_and_links_of_the_result() {
        let bridge = json!({"interfaces": [{"name": "cni0", "mac": "aa"}, {"name": "veth1", "mac": "bb"},
            {"name": "eth0", "mac": "cc", "sandbox": "/run/netns/x"}],
            "ips": [{"address": "10.1.17.2/24", "interface": 2}, {"address": "fc00::2/64"}]});
        let expected = json!({"v": 1, "verb": "add", "container": "c1", "ifname": "eth0", "namespace": "shop", "pod": "web-0",
            "uid": "12", "hostIf": "veth1", "mac": "cc", "ips": ["10.1.17.2", "fc00::2"]});
        assert_eq!(announced(KUBELET, bridge), expected);
    }

    #[test]
    fn what_a_delegate_or_a_runtime_does_not_tell_is_left_out() {
        let macvlan =
            json!({"interfaces": [{"name": "eth0", "sandbox": "/x"}], "ips": [{"address": "10.1.17.2/24"}]});
        let expected =
            json!({"v": 1, "verb": "add", "container": "c1", "ifname": "eth0", "ips": ["10.1.17.2"]});
        for args in ["", "K8S_POD_NAMESPACE=", "nonsense;=;"] {
            assert_eq!(announced(args, macvlan.clone()), expected, "{args}");
        }
        let old = json!({"ip4": {"ip": "10.1.17.2/24"}, "ip6": {"ip": "fc00::2/64"}});
        assert_eq!(announced("", old)["ips"], json!(["10.1.17.2", "fc00::2"]));
    }

    #[test]
    fn an_early_announcement_counts_if_it_says_of_the_pod_what_is_so() {
        let result = json!({"interfaces": [{"name": "cni0"}, {"name": "veth1"}, {"name": "eth0", "mac": "cc", "sandbox": "/x"}],
            "ips": [{"address": "10.1.17.2/24"}]});
        let call = call(KUBELET);
        let early = |port: &str, ip: &str| {
            let ip = ip.parse().unwrap();
            let request = announcement(&call, Some(port), None, std::iter::once(ip));
            Early { request, asked: Err(Trouble::Closed) }
        };
        let whole = announcement_of(&call, &result);
        assert!(early("veth1", "10.1.17.2").is_part_of(&whole));
        // The name was taken, so the link has another one.
        assert!(!early("veth2", "10.1.17.2").is_part_of(&whole));
        assert!(!early("veth1", "10.1.17.3").is_part_of(&whole));
    }

    #[test]
    fn an_answer_is_one_of_three() {
        let parse = |line: &str| Answer::parse(line.as_bytes());
        assert_eq!(parse(r#"{"ok":true,"more":1}"#), Some(Answer::Done));
        assert_eq!(parse(r#"{"ok":true,"forgotten":true}"#), Some(Answer::Forgotten));
        assert_eq!(parse(r#"{"ok":true,"forgotten":1}"#), Some(Answer::Done));
        assert_eq!(parse(r#"{"retry":true,"why":"starting"}"#), Some(Answer::NotYet("starting".into())));
        assert_eq!(parse(r#"{"error":"no such verb"}"#), Some(Answer::Refused("no such verb".into())));
        for line in ["", "ok", "true", "[]", "{}", r#"{"ok":false}"#, r#"{"ok":"true"}"#, r#"{"retry":1}"#] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_answers_and_arguments_never_panic(line: Vec<u8>, args in ".{0,40}") {
            let _ = Answer::parse(&line);
            let _ = identity(&args).count();
        }
    }
}
