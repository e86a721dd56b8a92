//! What is asked at the policy socket: read from a line of JSON, with an error that names what is wrong.

use std::net::IpAddr;

use serde_json::{Map, Value};
use subnet::Mac;
use subnet::gojson::shortened;
use subnet::policy::Protocol;

use super::announce::{Announcement, EndedSandbox};
use super::explain::{Endpoint, Inquiry, pod_name};

/// The version of the protocol.
const VERSION: u64 = 1;
/// A pod has at most one address of each family that counts; delegates may give it more.
const MAX_ADDRESSES: usize = 16;
/// The link that network policies are about; a pod's further ones are not covered by them.
const COVERED_INTERFACE: &str = "eth0";
/// The longest names of Kubernetes and of runtimes.
const NAME_MAX: usize = 253;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// A pod has got its addresses.
    Add(Announcement),
    /// A sandbox has ended.
    Del(EndedSandbox),
    /// Whether there are answers.
    Status,
    /// A question of `flanneld policy`.
    Ask(Inquiry),
    /// Which NFLOG group is told of refused packets.
    LogGroup,
    /// About what no policy covers: a container that is no pod, and a pod's further interface.
    NotOurs,
}

impl Question {
    /// Reads a line without its end.
    ///
    /// # Errors
    /// A sentence with the member and its value.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, String> {
        let object: Map<String, Value> = serde_json::from_slice(line).map_err(|error| {
            format!("{:?} is no JSON object: {error}", shortened(&String::from_utf8_lossy(line)))
        })?;
        let request = Members(object);
        match request.0.get("v") {
            Some(version) if *version == VERSION => {}
            Some(version) => {
                return Err(format!("version {version} is not spoken by this flanneld: it speaks {VERSION}"));
            }
            None => return Err("\"v\" is missing".into()),
        }
        match request.required("verb")? {
            "add" => request.add(),
            "del" => request.del(),
            "status" => Ok(Self::Status),
            "explain" => request.explain(),
            "list" => request.list(),
            "names" => Ok(Self::Ask(Inquiry::Names(request.addresses()?))),
            "log-group" => Ok(Self::LogGroup),
            verb => Err(format!("verb: {:?} is not known to this flanneld", shortened(verb))),
        }
    }
}

struct Members(Map<String, Value>);

impl Members {
    fn add(&self) -> Result<Question, String> {
        let container = self.name("container")?.ok_or("\"container\" is missing")?;
        let addresses = self.addresses()?;
        let mac =
            self.text("mac")?.map(str::parse::<Mac>).transpose().map_err(|error| format!("mac: {error}"))?;
        let host_interface = self.text("hostIf")?.unwrap_or_default();
        if host_interface.len() > 15 {
            return Err(format!("hostIf: {:?} is too long for an interface", shortened(host_interface)));
        }
        let Some((namespace, pod)) = self.pod()? else { return Ok(Question::NotOurs) };
        if !self.is_covered()? {
            return Ok(Question::NotOurs);
        }
        Ok(Question::Add(Announcement {
            namespace,
            pod,
            uid: self.name("uid")?.unwrap_or_default(),
            container,
            host_interface: host_interface.to_owned(),
            mac,
            addresses,
        }))
    }

    fn del(&self) -> Result<Question, String> {
        let container = self.name("container")?.ok_or("\"container\" is missing")?;
        if !self.is_covered()? {
            return Ok(Question::NotOurs);
        }
        // GC knows containers only.
        let (namespace, pod) = self.pod()?.unwrap_or_default();
        let uid = self.name("uid")?.unwrap_or_default();
        Ok(Question::Del(EndedSandbox { namespace, pod, uid, container }))
    }

    fn explain(&self) -> Result<Question, String> {
        let source = Endpoint::parse(self.required("source")?).map_err(|why| format!("source: {why}"))?;
        let destination = self.required("destination")?;
        let (destination, port) =
            Endpoint::with_port(destination).map_err(|why| format!("destination: {why}"))?;
        let protocol = self.text("protocol")?.unwrap_or("TCP").to_ascii_uppercase();
        let protocol = Protocol::from_name(&protocol)
            .ok_or_else(|| format!("protocol: {:?} is not TCP, UDP or SCTP", shortened(&protocol)))?;
        Ok(Question::Ask(Inquiry::Explain { source, destination, protocol, port }))
    }

    fn list(&self) -> Result<Question, String> {
        let bad = |text: &str| format!("pod: {:?} is not NAMESPACE/NAME", shortened(text));
        let name = self.text("pod")?.map(|text| pod_name(text).ok_or_else(|| bad(text))).transpose()?;
        Ok(Question::Ask(Inquiry::List(name)))
    }

    fn is_covered(&self) -> Result<bool, String> {
        Ok(self.text("ifname")?.is_none_or(|ifname| ifname == COVERED_INTERFACE))
    }

    /// Namespace and name. `None` for a container that is no pod.
    fn pod(&self) -> Result<Option<(String, String)>, String> {
        match (self.name("namespace")?, self.name("pod")?) {
            (Some(namespace), Some(pod)) => Ok(Some((namespace, pod))),
            (None, None) => Ok(None),
            (None, Some(_)) => Err("\"namespace\" is missing beside \"pod\"".into()),
            (Some(_), None) => Err("\"pod\" is missing beside \"namespace\"".into()),
        }
    }

    fn addresses(&self) -> Result<Vec<IpAddr>, String> {
        let bad = |value: &Value| {
            let shown = shortened(&value.to_string());
            format!("ips: {shown} is no list of at most {MAX_ADDRESSES} addresses")
        };
        match self.0.get("ips") {
            None => Err("\"ips\" is missing".into()),
            Some(value @ Value::Array(items)) if items.len() <= MAX_ADDRESSES => {
                let address = |item: &Value| item.as_str()?.parse().ok();
                items.iter().map(address).collect::<Option<_>>().ok_or_else(|| bad(value))
            }
            Some(value) => Err(bad(value)),
        }
    }

    fn required(&self, key: &str) -> Result<&str, String> {
        self.text(key)?.ok_or_else(|| format!("{key:?} is missing"))
    }

    /// A text; an empty one counts as missing.
    fn text(&self, key: &str) -> Result<Option<&str>, String> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
            Some(other) => Err(format!("{key}: {} is no text", shortened(&other.to_string()))),
        }
    }

    /// A name of an object of Kubernetes or of a runtime.
    fn name(&self, key: &str) -> Result<Option<String>, String> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        if text.len() > NAME_MAX && key != "container" || !text.bytes().all(known) {
            return Err(format!(
                "{key}: {:?} is no name of Kubernetes or of a container runtime",
                shortened(text)
            ));
        }
        Ok(Some(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn add() -> Value {
        json!({"v": 1, "verb": "add", "namespace": "shop", "pod": "web-0", "uid": "0c9d", "container": "c1",
            "ifname": "eth0", "hostIf": "veth1", "mac": "02:00:00:00:00:01", "ips": ["10.244.1.7", "fd00::7"]})
    }

    fn with(key: &str, value: Value) -> Value {
        let mut request = add();
        if value.is_null() {
            request.as_object_mut().unwrap().remove(key);
        } else {
            request[key] = value;
        }
        request
    }

    fn parse(request: &Value) -> Result<Question, String> {
        Question::parse(request.to_string().as_bytes())
    }

    fn announcement() -> Announcement {
        Announcement {
            namespace: "shop".into(),
            pod: "web-0".into(),
            uid: "0c9d".into(),
            container: "c1".into(),
            host_interface: "veth1".into(),
            mac: Some("02:00:00:00:00:01".parse().unwrap()),
            addresses: vec!["10.244.1.7".parse().unwrap(), "fd00::7".parse().unwrap()],
        }
    }

    #[test]
    fn an_announcement_is_read_with_what_is_optional_and_without_it() {
        assert_eq!(parse(&add()), Ok(Question::Add(announcement())));
        assert_eq!(parse(&with("newer", json!([1]))), Ok(Question::Add(announcement())));
        let mut short = add();
        for key in ["uid", "hostIf", "mac", "ifname"] {
            short.as_object_mut().unwrap().remove(key);
        }
        let expected =
            Announcement { uid: "".into(), host_interface: "".into(), mac: None, ..announcement() };
        assert_eq!(parse(&short), Ok(Question::Add(expected)));
        let ended = EndedSandbox {
            namespace: "shop".into(),
            pod: "web-0".into(),
            uid: "0c9d".into(),
            container: "c1".into(),
        };
        assert_eq!(parse(&with("verb", json!("del"))), Ok(Question::Del(ended)));
        let of_gc =
            EndedSandbox { namespace: "".into(), pod: "".into(), uid: "".into(), container: "c1".into() };
        assert_eq!(
            parse(&json!({"v": 1, "verb": "del", "container": "c1", "ifname": "eth0"})),
            Ok(Question::Del(of_gc))
        );
        assert_eq!(parse(&json!({"v": 1, "verb": "status"})), Ok(Question::Status));
    }

    #[test]
    fn questions_of_people_are_read() {
        let ask = |request: Value| parse(&request);
        let explain = json!({"v": 1, "verb": "explain", "source": "shop/web", "destination": "192.0.2.1:53", "protocol": "udp"});
        let expected = Inquiry::Explain {
            source: Endpoint::parse("shop/web").unwrap(),
            destination: Endpoint::parse("192.0.2.1").unwrap(),
            protocol: Protocol::Udp,
            port: 53,
        };
        assert_eq!(ask(explain), Ok(Question::Ask(expected)));
        assert_eq!(ask(json!({"v": 1, "verb": "list"})), Ok(Question::Ask(Inquiry::List(None))));
        let names = ask(json!({"v": 1, "verb": "names", "ips": ["10.244.1.7"]}));
        assert_eq!(names, Ok(Question::Ask(Inquiry::Names(vec!["10.244.1.7".parse().unwrap()]))));
        assert_eq!(ask(json!({"v": 1, "verb": "log-group"})), Ok(Question::LogGroup));
        for (request, part) in [
            (json!({"v": 1, "verb": "explain", "destination": "a/b:1"}), "\"source\" is missing"),
            (
                json!({"v": 1, "verb": "explain", "source": "web", "destination": "a/b:1"}),
                "source: \"web\" is neither",
            ),
            (
                json!({"v": 1, "verb": "explain", "source": "a/b", "destination": "a/b"}),
                "destination: \"a/b\" has no port",
            ),
            (
                json!({"v": 1, "verb": "explain", "source": "a/b", "destination": "a/b:1", "protocol": "icmp"}),
                "\"ICMP\" is not",
            ),
            (json!({"v": 1, "verb": "list", "pod": "web"}), "pod: \"web\" is not NAMESPACE/NAME"),
        ] {
            let error = parse(&request).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn what_no_policy_covers_is_no_announcement() {
        assert_eq!(parse(&with("ifname", json!("net1"))), Ok(Question::NotOurs));
        let mut container = with("pod", Value::Null);
        container.as_object_mut().unwrap().remove("namespace");
        assert_eq!(parse(&container), Ok(Question::NotOurs));
        let mut second = with("ifname", json!("net1"));
        second["verb"] = json!("del");
        assert_eq!(parse(&second), Ok(Question::NotOurs));
    }

    #[test]
    fn bad_requests_are_refused_with_the_member_and_its_value() {
        for (request, expected) in [
            (with("v", json!(2)), "version 2 is not spoken by this flanneld: it speaks 1"),
            (with("v", json!("1")), "version \"1\" is not spoken"),
            (with("v", Value::Null), "\"v\" is missing"),
            (with("verb", Value::Null), "\"verb\" is missing"),
            (with("verb", json!("open")), "verb: \"open\" is not known"),
            (with("verb", json!(7)), "verb: 7 is no text"),
            (with("container", Value::Null), "\"container\" is missing"),
            (with("container", json!("../c")), "container: \"../c\" is no name"),
            (with("pod", Value::Null), "\"pod\" is missing beside"),
            (with("namespace", json!("")), "\"namespace\" is missing beside"),
            (with("pod", json!("a".repeat(254))), "pod: \"aaa"),
            (with("namespace", json!("a b")), "namespace: \"a b\" is no name"),
            (with("uid", json!("a b")), "uid: \"a b\" is no name"),
            (with("mac", json!("02:00")), "mac: \"02:00\" is not a MAC address"),
            (with("hostIf", json!("sixteencharacter")), "hostIf: \"sixteencharacter\" is too long"),
            (with("ips", Value::Null), "\"ips\" is missing"),
            (with("ips", json!("10.244.1.7")), "ips: \"10.244.1.7\" is no list"),
            (with("ips", json!(["10.244.1.7/24"])), "ips: [\"10.244.1.7/24\"] is no list"),
            (with("ips", json!([7])), "ips: [7] is no list"),
            (with("ips", json!(vec!["10.244.1.7"; 17])), "is no list of at most 16 addresses"),
        ] {
            let error = parse(&request).unwrap_err();
            assert!(error.contains(expected) && error.len() < 1000, "{error}");
        }
        for line in ["", "null", "[]", "GET / HTTP/1.1", "{\"v\":1", "\u{0}"] {
            assert!(Question::parse(line.as_bytes()).unwrap_err().contains("is no JSON object"), "{line}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_lines_never_panic(line: Vec<u8>, key in "(v|verb|ips|mac|pod|container|hostIf)", value in ".{0,20}") {
            let _ = Question::parse(&line);
            let _ = parse(&with(&key, json!(value)));
        }
    }
}
