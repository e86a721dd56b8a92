//! The handshake with the agent about network policies: a pod starts when its policies are in the kernel, and not
//! before.
//!
//! One line of JSON each way over the socket that `subnet.env` names. Nothing of it is needed where that file names
//! none: policies are off, or another flanneld wrote it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use socket2::{Domain, SockAddr, Socket, Type};
use subnet::gojson;

use crate::env::{Attachment, Call};
use crate::error::{self, CniError};
use crate::netlink::conntrack;
use crate::netlink::socket::Socket as Netlink;
use crate::note;
use crate::result::Attached;

/// The version of the protocol.
const VERSION: u64 = 1;
/// More than any answer has.
const MAX_ANSWER: usize = 64 << 10;
/// How long a question waits that nothing depends on, and the least that any waits.
const SHORT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two attempts: an agent that restarts is back within a second.
const PAUSE: Duration = Duration::from_millis(50);

/// Tells the agent which addresses a pod has got, and returns when its policies are in force.
///
/// # Errors
/// Code 11 when the agent is not there, or can't do it, for as long as `wait`; 999 for what it will never accept.
pub(crate) fn announce(socket: &Path, call: &Call, result: &Value, wait: Duration) -> Result<(), CniError> {
    let request = announcement(call, result);
    let deadline = Instant::now() + wait.max(SHORT_TIMEOUT);
    let mut reason = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let why = match ask(socket, &request, left) {
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
                "the pod's network policies can't be enforced: {trouble}: no pod starts without them; see the log of \
                 flanneld on this node"
            ),
        };
        if wait.is_zero() || Instant::now() + PAUSE >= deadline {
            return Err(CniError::new(error::TRY_AGAIN_LATER, why));
        }
        reason = Some(why);
        thread::sleep(PAUSE);
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
            note(&format!(
                "connections with {address} from before its pod can't be forgotten: {errno}: load nf_conntrack_netlink"
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
fn announcement(call: &Call, result: &Value) -> Value {
    let mut request = request("add", &call.attachment);
    request.extend(identity(&call.args));
    let attached = Attached::read(result);
    let own =
        |sandboxed: bool| attached.interfaces.iter().rev().find(|one| one.sandbox.is_empty() != sandboxed);
    // The host's ends come before the pod's; of a bridge and a port of it, the port is the later one.
    if let Some(host) = own(false) {
        request.insert("hostIf".into(), json!(host.name));
    }
    if let Some(pod) = own(true).filter(|pod| !pod.mac.is_empty()) {
        request.insert("mac".into(), json!(pod.mac));
    }
    let mut ips: Vec<IpAddr> = attached.ips.iter().map(|ip| ip.address.addr()).collect();
    // Results of versions before 0.3.0.
    let by_family = ["ip4", "ip6"].into_iter().filter_map(|key| result[key]["ip"].as_str());
    ips.extend(by_family.filter_map(|ip| ip.split('/').next()?.parse::<IpAddr>().ok()));
    request.insert("ips".into(), json!(ips));
    request.into()
}

/// What the agent says to a question.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// It is done.
    Done,
    /// And connections from before the pod are forgotten.
    Forgotten,
    /// It can't be done now.
    NotYet(String),
    /// The question makes no sense to the agent.
    Refused(String),
}

impl Answer {
    /// Reads a line. `None` for what is no answer of this protocol.
    fn parse(line: &[u8]) -> Option<Self> {
        let Ok(Value::Object(object)) = serde_json::from_slice(line) else { return None };
        let is = |key: &str| object.get(key) == Some(&Value::Bool(true));
        let text = |key: &str| object.get(key).and_then(Value::as_str).map(gojson::shortened);
        if is("ok") {
            Some(if is("forgotten") { Self::Forgotten } else { Self::Done })
        } else if is("retry") {
            Some(Self::NotYet(text("why").unwrap_or_else(|| "it gives no reason".into())))
        } else {
            text("error").map(Self::Refused)
        }
    }
}

/// Why there is no answer.
#[derive(Debug)]
enum Trouble {
    /// No process listens.
    Away(String, io::Error),
    /// The answer did not come in time.
    Silent,
    /// The connection ended without an answer.
    Closed,
    /// It failed.
    Broken(io::Error),
    /// What came is no answer.
    Garbage(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away(path, error) => write!(f, "flanneld does not listen on {path}: {error}"),
            Self::Silent => f.write_str("flanneld does not answer"),
            Self::Closed => f.write_str("flanneld closed the connection without an answer"),
            Self::Broken(error) => write!(f, "the connection to flanneld failed: {error}"),
            Self::Garbage(said) => write!(f, "flanneld's answer makes no sense: {said:?}"),
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::Closed,
            _ => Self::Broken(error),
        }
    }
}

/// Asks one question over a connection of its own, and waits `limit` at most.
fn ask(path: &Path, request: &Value, limit: Duration) -> Result<Answer, Trouble> {
    let deadline = Instant::now() + limit;
    let left = || deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let away = |error| Trouble::Away(path.display().to_string(), error);
    let mut socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.connect_timeout(&SockAddr::unix(path)?, left()).map_err(away)?;
    socket.set_write_timeout(Some(left()))?;
    socket.write_all(format!("{request}\n").as_bytes())?;
    let mut line = Vec::new();
    let mut part = [0; 4096];
    loop {
        socket.set_read_timeout(Some(left()))?;
        let length = match socket.read(&mut part) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        line.extend(&part[..length]);
        match line.iter().position(|byte| *byte == b'\n') {
            Some(end) => line.truncate(end),
            None if length == 0 && line.is_empty() => return Err(Trouble::Closed),
            None if length == 0 || line.len() > MAX_ANSWER => {}
            None if Instant::now() >= deadline => return Err(Trouble::Silent),
            None => continue,
        }
        let garbage = || Trouble::Garbage(gojson::shortened(&String::from_utf8_lossy(&line)));
        return Answer::parse(&line).ok_or_else(garbage);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn announced(args: &str, result: Value) -> Value {
        let variable = |name: &str| match name {
            "CNI_COMMAND" => Some("ADD"),
            "CNI_CONTAINERID" => Some("c1"),
            "CNI_IFNAME" => Some("eth0"),
            "CNI_NETNS" => Some("/nowhere"),
            "CNI_PATH" => Some("/opt/cni/bin"),
            "CNI_ARGS" => Some(args),
            _ => None,
        };
        announcement(&Call::read(|name| variable(name).map(Into::into)).unwrap(), &result)
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
