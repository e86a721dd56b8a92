//! The result of an ADD: made here, printed in the form of each version, and read back for CHECK.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use crate::netlink::route::Route;

/// What an ADD made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attached {
    pub(crate) interfaces: Vec<Interface>,
    pub(crate) ips: Vec<Ip>,
    pub(crate) routes: Vec<Route>,
    /// The `dns` member as it is printed.
    pub(crate) dns: Map<String, Value>,
}

/// A link that the ADD made or used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) name: String,
    pub(crate) mac: String,
    /// The pod's namespace; empty on the host.
    pub(crate) sandbox: String,
}

/// An address of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) address: IpNet,
    pub(crate) gateway: Option<IpAddr>,
    /// Which of the interfaces has it.
    pub(crate) interface: Option<usize>,
}

impl Attached {
    /// The JSON that a plugin prints for a configuration of this version, in the order of Go plugins.
    pub(crate) fn text(&self, version: &str) -> String {
        let mut members = vec![format!("\"cniVersion\": {}", json!(version))];
        if matches!(version, "" | "0.1.0" | "0.2.0") {
            members.extend(self.by_family());
        } else {
            let interfaces: Vec<_> = self.interfaces.iter().map(Interface::text).collect();
            let ips: Vec<_> = self.ips.iter().map(|ip| ip.text(version)).collect();
            let routes: Vec<_> = self.routes.iter().map(|route| route_text(route, version)).collect();
            for (key, items) in [("interfaces", interfaces), ("ips", ips), ("routes", routes)] {
                members.extend(list(key, &items));
            }
        }
        members.push(format!("\"dns\": {}", dns_text(&self.dns)));
        object(&members)
    }

    /// The members of versions up to 0.2.0, which know one address of a family.
    fn by_family(&self) -> Vec<String> {
        let family = |ipv6: bool| {
            let ip = self.ips.iter().find(|ip| ip.address.addr().is_ipv6() == ipv6)?;
            let mut members = vec![format!("\"ip\": \"{}\"", ip.address)];
            members.extend(ip.gateway.map(|gateway| format!("\"gateway\": \"{gateway}\"")));
            let routes = self.routes.iter().filter(|route| route.destination.addr().is_ipv6() == ipv6);
            members.extend(list("routes", &routes.map(|route| route_text(route, "")).collect::<Vec<_>>()));
            Some(format!("\"ip{}\": {}", if ipv6 { 6 } else { 4 }, object(&members)))
        };
        [false, true].into_iter().filter_map(family).collect()
    }

    /// Reads a result of version 0.3.0 or later; what is no address or route is passed over.
    pub(crate) fn read(result: &Value) -> Self {
        let items = |key: &str| result[key].as_array().into_iter().flatten();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let interface = |value: &Value| Interface {
            name: text(&value["name"]),
            mac: text(&value["mac"]),
            sandbox: text(&value["sandbox"]),
        };
        let ip = |value: &Value| {
            Some(Ip {
                address: value["address"].as_str()?.parse().ok()?,
                gateway: value["gateway"].as_str().and_then(|gateway| gateway.parse().ok()),
                interface: value["interface"].as_u64().map(|index| index as usize),
            })
        };
        Self {
            interfaces: items("interfaces").map(interface).collect(),
            ips: items("ips").filter_map(ip).collect(),
            routes: items("routes").filter_map(read_route).collect(),
            dns: result["dns"].as_object().cloned().unwrap_or_default(),
        }
    }
}

impl Interface {
    fn text(&self) -> String {
        let mut members = vec![format!("\"name\": {}", json!(self.name))];
        for (key, value) in [("mac", &self.mac), ("sandbox", &self.sandbox)] {
            if !value.is_empty() {
                members.push(format!("\"{key}\": {}", json!(value)));
            }
        }
        object(&members)
    }
}

impl Ip {
    fn text(&self, version: &str) -> String {
        let mut members = Vec::new();
        if !matches!(version, "1.0.0" | "1.1.0") {
            members.push(format!("\"version\": \"{}\"", if self.address.addr().is_ipv4() { 4 } else { 6 }));
        }
        members.extend(self.interface.map(|index| format!("\"interface\": {index}")));
        members.push(format!("\"address\": \"{}\"", self.address));
        members.extend(self.gateway.map(|gateway| format!("\"gateway\": \"{gateway}\"")));
        object(&members)
    }
}

/// A route of a configuration or a result. `None` for what is none.
pub(crate) fn read_route(value: &Value) -> Option<Route> {
    let number = |key: &str| value[key].as_u64().and_then(|number| u32::try_from(number).ok());
    Some(Route {
        destination: value["dst"].as_str()?.parse().ok()?,
        gateway: value["gw"].as_str().and_then(|gateway| gateway.parse().ok()),
        mtu: number("mtu").unwrap_or_default(),
        advmss: number("advmss").unwrap_or_default(),
        priority: number("priority").unwrap_or_default(),
        table: number("table"),
        scope: number("scope").and_then(|scope| u8::try_from(scope).ok()),
    })
}

fn route_text(route: &Route, version: &str) -> String {
    let mut members = vec![format!("\"dst\": \"{}\"", route.destination)];
    members.extend(route.gateway.map(|gateway| format!("\"gw\": \"{gateway}\"")));
    // Earlier versions of the specification do not know the others.
    if version == "1.1.0" {
        for (key, value) in [("mtu", route.mtu), ("advmss", route.advmss), ("priority", route.priority)] {
            if value != 0 {
                members.push(format!("\"{key}\": {value}"));
            }
        }
        members.extend(route.table.map(|table| format!("\"table\": {table}")));
        members.extend(route.scope.map(|scope| format!("\"scope\": {scope}")));
    }
    object(&members)
}

fn dns_text(dns: &Map<String, Value>) -> String {
    let given = ["nameservers", "domain", "search", "options"].into_iter().filter_map(|key| {
        let value = dns.get(key)?;
        let empty = value.is_null() || *value == json!("") || *value == json!([]);
        match value.as_array() {
            _ if empty => None,
            Some(items) => list(key, &items.iter().map(Value::to_string).collect::<Vec<_>>()),
            None => Some(format!("\"{key}\": {value}")),
        }
    });
    object(&given.collect::<Vec<_>>())
}

fn object(members: &[String]) -> String {
    block('{', members, '}')
}

fn list(key: &str, items: &[String]) -> Option<String> {
    (!items.is_empty()).then(|| format!("\"{key}\": {}", block('[', items, ']')))
}

/// Any result, indented by four.
pub(crate) fn pretty(result: &Value) -> String {
    match result {
        Value::Object(members) => {
            let members = members.iter().map(|(key, value)| format!("{}: {}", json!(key), pretty(value)));
            block('{', &members.collect::<Vec<_>>(), '}')
        }
        Value::Array(items) => block('[', &items.iter().map(pretty).collect::<Vec<_>>(), ']'),
        other => other.to_string(),
    }
}

/// Items between brackets, indented by four.
fn block(open: char, items: &[String], close: char) -> String {
    if items.is_empty() {
        return format!("{open}{close}");
    }
    let inner = items.join(",\n").replace('\n', "\n    ");
    format!("{open}\n    {inner}\n{close}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached() -> Attached {
        let route = |destination: &str, gateway: Option<&str>| Route {
            destination: destination.parse().unwrap(),
            gateway: gateway.map(|gateway| gateway.parse().unwrap()),
            mtu: 1400,
            advmss: 0,
            priority: 0,
            table: None,
            scope: None,
        };
        Attached {
            interfaces: vec![
                Interface { name: "cni0".into(), mac: "9e:03:9e:d6:92:df".into(), sandbox: String::new() },
                Interface { name: "eth0".into(), mac: String::new(), sandbox: "/run/netns/a".into() },
            ],
            ips: vec![Ip {
                address: "10.9.0.2/29".parse().unwrap(),
                gateway: Some("10.9.0.1".parse().unwrap()),
                interface: Some(1),
            }],
            routes: vec![route("10.0.0.0/8", None), route("0.0.0.0/0", Some("10.9.0.1"))],
            dns: Map::new(),
        }
    }

    #[test]
    fn a_result_is_indented_by_four_in_the_order_of_go() {
        let expected = r#"{
    "cniVersion": "0.4.0",
    "interfaces": [
        {
            "name": "cni0",
            "mac": "9e:03:9e:d6:92:df"
        },
        {
            "name": "eth0",
            "sandbox": "/run/netns/a"
        }
    ],
    "ips": [
        {
            "version": "4",
            "interface": 1,
            "address": "10.9.0.2/29",
            "gateway": "10.9.0.1"
        }
    ],
    "routes": [
        {
            "dst": "10.0.0.0/8"
        },
        {
            "dst": "0.0.0.0/0",
            "gw": "10.9.0.1"
        }
    ],
    "dns": {}
}"#;
        assert_eq!(attached().text("0.4.0"), expected);
    }

    #[test]
    fn each_version_has_its_own_form() {
        let result = |version: &str| serde_json::from_str::<Value>(&attached().text(version)).unwrap();
        let old = result("0.2.0");
        assert_eq!(old["ip4"]["ip"], "10.9.0.2/29");
        assert_eq!(old["ip4"]["routes"][1], json!({"dst": "0.0.0.0/0", "gw": "10.9.0.1"}));
        assert!(old.get("ips").is_none() && old.get("interfaces").is_none());
        assert!(result("1.0.0")["ips"][0].get("version").is_none());
        assert!(result("1.0.0")["routes"][0].get("mtu").is_none());
        assert_eq!(result("1.1.0")["routes"][0]["mtu"], 1400);
    }

    #[test]
    fn a_result_is_read_as_it_was_written() {
        let text = attached().text("1.1.0");
        assert_eq!(Attached::read(&serde_json::from_str(&text).unwrap()), attached());
        for odd in [json!(null), json!([]), json!({"ips": 1, "routes": [7], "interfaces": [[]]})] {
            let _ = Attached::read(&odd);
        }
    }
}
