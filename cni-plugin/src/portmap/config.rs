//! The configuration of `portmap`, and the pod's addresses.

use std::net::IpAddr;

use serde_json::Value;
use subnet::gojson::{Object, shortened};

use crate::result::Attached;

/// One port of the host that leads to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) host_port: u16,
    pub(crate) container_port: u16,
    /// The number of the transport protocol.
    pub(crate) protocol: u8,
    /// Which of the host's addresses leads there; `None` for all of both families.
    pub(crate) host_ip: Option<IpAddr>,
}

/// What is to be mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortmapConfig {
    pub(crate) mappings: Vec<Mapping>,
    /// Whether a pod that reaches itself by the host's port, and the host by its loopback address, are masqueraded.
    pub(crate) snat: bool,
}

impl PortmapConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// A sentence with the member and its value.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        Self::read(text).map_err(|error| format!("failed to parse config: {error}"))
    }

    fn read(text: &str) -> Result<Self, String> {
        let object = Object::parse(text)?;
        for key in ["conditionsV4", "conditionsV6"] {
            if !object.get::<Vec<String>>(key)?.unwrap_or_default().is_empty() {
                return Err(not_implemented(key));
            }
        }
        if object.get::<bool>("masqAll")?.unwrap_or_default() {
            return Err(not_implemented("masqAll"));
        }
        if object.get::<String>("externalSetMarkChain")?.is_some_and(|chain| !chain.is_empty()) {
            return Err(not_implemented("externalSetMarkChain"));
        }
        if object.get::<String>("backend")?.is_some_and(|backend| backend != "nftables") {
            return Err(not_implemented("backend"));
        }
        let given: Vec<Value> = match object.object("runtimeConfig")? {
            Some(runtime) => runtime.get("portMappings")?.unwrap_or_default(),
            None => Vec::new(),
        };
        let numbered = given.iter().enumerate();
        let mappings = numbered
            .map(|(index, value)| mapping(value).map_err(|error| format!("portMappings[{index}]: {error}")))
            .collect::<Result<Vec<_>, _>>()?;
        for (index, one) in mappings.iter().enumerate() {
            let same = |other: &&Mapping| {
                (other.host_port, other.protocol, other.host_ip) == (one.host_port, one.protocol, one.host_ip)
            };
            if mappings[..index].iter().any(|other| same(&other)) {
                return Err(format!("portMappings[{index}]: host port {} is mapped twice", one.host_port));
            }
        }
        Ok(Self { mappings, snat: object.get("snat")?.unwrap_or(true) })
    }

    /// The mappings of a family.
    pub(crate) fn of_family(&self, ipv6: bool) -> impl Iterator<Item = &Mapping> {
        self.mappings.iter().filter(move |one| one.host_ip.is_none_or(|ip| ip.is_ipv6() == ipv6))
    }
}

fn not_implemented(key: &str) -> String {
    format!(
        "this portmap does not have {key:?}: install the portmap of the containernetworking plugins in its place, or \
         leave the member out"
    )
}

fn mapping(value: &Value) -> Result<Mapping, String> {
    let text = value.to_string();
    let object = Object::parse(&text)?;
    let port = |key: &str, what: &str| {
        let number: i64 = object.get(key)?.unwrap_or_default();
        let valid = u16::try_from(number).ok().filter(|port| *port != 0);
        valid.ok_or_else(|| format!("Invalid {what} port number: {number}: give one from 1 to 65535"))
    };
    let protocol: String = object.get("protocol")?.unwrap_or_default();
    let number = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => libc::IPPROTO_TCP,
        "udp" => libc::IPPROTO_UDP,
        "sctp" => libc::IPPROTO_SCTP,
        _ => return Err(format!("protocol {:?} is not tcp, udp or sctp", shortened(&protocol))),
    };
    let host_ip = match object.get::<String>("hostIP")?.filter(|ip| !ip.is_empty()) {
        None => None,
        Some(text) => Some(
            text.parse::<IpAddr>()
                .map_err(|_| format!("hostIP {:?} is not an IP address", shortened(&text)))?
                .to_canonical(),
        ),
    };
    Ok(Mapping {
        host_port: port("hostPort", "host")?,
        container_port: port("containerPort", "container")?,
        protocol: number as u8,
        host_ip,
    })
}

/// The pod's first address of each family.
pub(crate) fn addresses(attached: &Attached, ifname: &str) -> Vec<IpAddr> {
    let of_pod = |index: Option<usize>| match index.and_then(|index| attached.interfaces.get(index)) {
        Some(interface) => interface.name == ifname && !interface.sandbox.is_empty(),
        None => true,
    };
    let own: Vec<_> =
        attached.ips.iter().filter(|ip| of_pod(ip.interface)).map(|ip| ip.address.addr()).collect();
    let first = |ipv6: bool| own.iter().copied().find(|address| address.is_ipv6() == ipv6);
    [false, true].into_iter().filter_map(first).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(members: Value) -> Result<PortmapConfig, String> {
        PortmapConfig::parse(&members.to_string())
    }

    fn ports(mappings: Value) -> Result<PortmapConfig, String> {
        parse(json!({"runtimeConfig": {"portMappings": mappings}}))
    }

    #[test]
    fn mappings_of_no_family_are_of_both() {
        let config = ports(json!([
            {"hostPort": 80, "containerPort": 8080, "protocol": "TCP"},
            {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "192.0.2.1"},
            {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "::"}
        ]))
        .unwrap();
        let of = |ipv6: bool| config.of_family(ipv6).map(|one| one.host_port).collect::<Vec<_>>();
        assert_eq!((of(false), of(true), config.snat), (vec![80, 53], vec![80, 53], true));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        let one = |port: Value, protocol: &str, ip: &str| {
            ports(json!([{"hostPort": port, "containerPort": 1, "protocol": protocol, "hostIP": ip}]))
                .unwrap_err()
        };
        assert!(one(json!(0), "tcp", "").contains("portMappings[0]: Invalid host port number: 0"));
        assert!(one(json!(70000), "tcp", "").contains("Invalid host port number: 70000"));
        assert!(one(json!(-1), "tcp", "").contains("Invalid host port number: -1"));
        assert!(one(json!("80"), "tcp", "").contains("hostPort"));
        assert!(one(json!(80), "icmp", "").contains("protocol \"icmp\" is not tcp, udp or sctp"));
        assert!(one(json!(80), "tcp", "home").contains("hostIP \"home\" is not an IP address"));
        let twice = json!({"hostPort": 80, "containerPort": 1, "protocol": "tcp"});
        assert!(
            ports(json!([twice, twice]))
                .unwrap_err()
                .contains("portMappings[1]: host port 80 is mapped twice")
        );
        assert!(parse(json!({"masqAll": true})).unwrap_err().contains("masqAll"));
        assert!(parse(json!({"conditionsV4": ["-d", "1.2.3.4"]})).unwrap_err().contains("conditionsV4"));
        assert!(parse(json!({"backend": "iptables"})).unwrap_err().contains("backend"));
        assert!(parse(json!({"backend": "nftables", "conditionsV4": null})).is_ok());
    }
}
