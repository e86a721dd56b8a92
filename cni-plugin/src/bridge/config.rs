//! The configuration of `bridge`, if it is one that is implemented here.

use serde_json::{Map, Value};
use subnet::gojson::{Object, shortened};
use subnet::mac::Mac;

use crate::args::Args;
use crate::env::check_interface;
use crate::host_local;

/// How pods are connected.
#[derive(Debug)]
pub(crate) struct BridgeConfig {
    pub(crate) bridge: String,
    /// Whether the bridge has the gateway's address.
    pub(crate) is_gateway: bool,
    pub(crate) is_default_gateway: bool,
    pub(crate) force_address: bool,
    /// 0 for the kernel's default.
    pub(crate) mtu: u32,
    pub(crate) hairpin: bool,
    pub(crate) promiscuous: bool,
    /// Whether duplicates of IPv6 addresses are looked for.
    pub(crate) detect_duplicates: bool,
    /// Whether isolated ports can't reach each other.
    pub(crate) isolated: bool,
    pub(crate) mac: Option<[u8; 6]>,
    /// Instead of what IPAM says.
    pub(crate) dns: Map<String, Value>,
    pub(crate) prev_result: Option<Value>,
    pub(crate) ipam: host_local::config::HostLocalConfig,
}

/// What a configuration is.
#[derive(Debug)]
pub(crate) enum Reading {
    /// One for this process.
    Implemented(Box<BridgeConfig>),
    /// One for Go's plugin; the member that is not implemented here, for messages.
    Foreign(String),
}

/// The members that are read here, or that mean nothing to a bridge; Go does not tell upper from lower case.
const KNOWN: [&str; 22] = [
    "args",
    "bridge",
    "capabilities",
    "cniversion",
    "disablecontainerinterface",
    "dns",
    "enabledad",
    "forceaddress",
    "hairpinmode",
    "inprocess",
    "ipam",
    "ipmasq",
    "isdefaultgateway",
    "isgateway",
    "macspoofchk",
    "mtu",
    "name",
    "portisolation",
    "prevresult",
    "promiscmode",
    "runtimeconfig",
    "type",
];
/// Of VLANs only that there are none.
const KNOWN_WITHOUT_VLAN: [&str; 3] = ["preservedefaultvlan", "vlan", "vlantrunk"];
/// GC's lists.
const KNOWN_OF_GC: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];
const KNOWN_OF_IPAM: [&str; 10] = [
    "datadir",
    "gateway",
    "name",
    "rangeend",
    "ranges",
    "rangestart",
    "resolvconf",
    "routes",
    "subnet",
    "type",
];

impl BridgeConfig {
    /// Reads a configuration and `CNI_ARGS`.
    ///
    /// # Errors
    /// A sentence with the member and its value.
    pub(crate) fn read(text: &str, args: &str) -> Result<Reading, String> {
        let in_config = |error: String| format!("failed to load netconf: {error}");
        let object = Object::parse(text).map_err(in_config)?;
        check_vlans(&object)?;
        if let Some(foreign) = foreign(text, &object).map_err(in_config)? {
            return Ok(Reading::Foreign(foreign));
        }
        let flag = |key: &str| object.get::<bool>(key).map(Option::unwrap_or_default).map_err(in_config);
        let args = Args::parse(args)?;
        let is_default_gateway = flag("isDefaultGateway")?;
        let (hairpin, promiscuous) = (flag("hairpinMode")?, flag("promiscMode")?);
        if hairpin && promiscuous {
            return Err("cannot set hairpin mode and promiscuous mode at the same time.".into());
        }
        let mtu: i64 = object.get("mtu").map_err(in_config)?.unwrap_or_default();
        let bridge: String = object.get("bridge").map_err(in_config)?.unwrap_or_default();
        if !bridge.is_empty() && check_interface(&bridge).is_err() {
            let shown = shortened(&bridge);
            return Err(in_config(format!(
                "bridge: {shown:?} can't be the name of a device: give at most 15 bytes, without / and : and spaces"
            )));
        }
        Ok(Reading::Implemented(Box::new(Self {
            bridge: if bridge.is_empty() { "cni0".into() } else { bridge },
            is_gateway: is_default_gateway || flag("isGateway")?,
            is_default_gateway,
            force_address: flag("forceAddress")?,
            mtu: u32::try_from(mtu).map_err(|_| {
                in_config(format!(
                    "mtu: {mtu} is no MTU: give a number of bytes, or 0 for the kernel's default"
                ))
            })?,
            hairpin,
            promiscuous,
            detect_duplicates: flag("enabledad")?,
            isolated: flag("portIsolation")?,
            mac: mac(&object, &args)?,
            dns: object.get("dns").map_err(in_config)?.unwrap_or_default(),
            prev_result: object.get("prevResult").map_err(in_config)?,
            ipam: host_local::config::HostLocalConfig::parse(&object, &args.without("MAC"))?,
        })))
    }
}

const MAX_VLAN: i64 = 4094;

fn vlan_trunk(object: &Object<'_>) -> Result<Vec<Value>, String> {
    Ok(object.get("vlanTrunk")?.unwrap_or_default())
}

/// Refuses VLANs that Go's plugin refuses, before anything is kept for DEL: it refuses them at DEL as well, so that the pod could
/// never be removed.
fn check_vlans(object: &Object<'_>) -> Result<(), String> {
    let vlan = object.get::<i64>("vlan").unwrap_or_default().unwrap_or_default();
    if !(0..=MAX_VLAN).contains(&vlan) {
        return Err(format!("invalid VLAN ID {vlan} (must be between 0 and {MAX_VLAN})"));
    }
    for item in vlan_trunk(object).unwrap_or_default() {
        let id = |key: &str| item.get(key).and_then(Value::as_i64);
        let wrong = ["id", "minID", "maxID"]
            .into_iter()
            .find(|key| id(key).is_some_and(|id| !(0..=MAX_VLAN).contains(&id)));
        if wrong.is_some() || id("minID").zip(id("maxID")).is_some_and(|(min, max)| min > max) {
            return Err(format!(
                "vlanTrunk: {item} is no range of VLANs: give id, or minID and maxID, from 0 to {MAX_VLAN}"
            ));
        }
    }
    Ok(())
}

/// The first member that Go's plugin has to handle.
fn foreign(text: &str, object: &Object<'_>) -> Result<Option<String>, String> {
    let members: Map<String, Value> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let unknown = |members: &Map<String, Value>, known: &[&str]| {
        members.keys().find(|key| !known.contains(&&*key.to_ascii_lowercase())).cloned()
    };
    let known = [&KNOWN[..], &KNOWN_WITHOUT_VLAN, &KNOWN_OF_GC].concat();
    if let Some(key) = unknown(&members, &known) {
        return Ok(Some(key));
    }
    if object.get::<bool>("inProcess")? == Some(false) {
        return Ok(Some("inProcess".into()));
    }
    for key in ["ipMasq", "macspoofchk", "disableContainerInterface"] {
        if object.get::<bool>(key)?.unwrap_or_default() {
            return Ok(Some(key.into()));
        }
    }
    if object.get::<i64>("vlan")?.unwrap_or_default() != 0 {
        return Ok(Some("vlan".into()));
    }
    if !vlan_trunk(object)?.is_empty() {
        return Ok(Some("vlanTrunk".into()));
    }
    let ipam: Map<String, Value> = object.get("ipam")?.unwrap_or_default();
    if ipam.get("type").and_then(Value::as_str) != Some("host-local") {
        return Ok(Some("ipam.type".into()));
    }
    Ok(unknown(&ipam, &KNOWN_OF_IPAM).map(|key| format!("ipam.{key}")))
}

/// The pod's MAC: of the runtime, else of `args`, else of `CNI_ARGS`.
fn mac(object: &Object<'_>, args: &Args) -> Result<Option<[u8; 6]>, String> {
    let member = |object: Option<Object<'_>>| match object {
        Some(object) => Ok::<_, String>(object.get::<String>("mac")?.filter(|mac| !mac.is_empty())),
        None => Ok(None),
    };
    let of_args = match object.object("args")? {
        Some(args) => member(args.object("cni")?)?,
        None => None,
    };
    let of_variable = args.without("IP").only("MAC")?.map(str::to_owned);
    let given = member(object.object("runtimeConfig")?)?.or(of_args).or(of_variable);
    let Some(text) = given else { return Ok(None) };
    let invalid = || format!("failed to make veth pair: address {}: invalid MAC address", shortened(&text));
    text.parse().map(|Mac(bytes)| Some(bytes)).map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(members: Value) -> Value {
        let mut config = json!({"name": "n", "cniVersion": "1.0.0", "type": "bridge", "ipMasq": false, "mtu": 1450,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.1.17.0/24"}]], "routes": [{"dst": "10.1.0.0/16"}]}});
        config.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
        config
    }

    fn read(members: Value, args: &str) -> Result<Reading, String> {
        BridgeConfig::read(&config(members).to_string(), args)
    }

    #[test]
    fn what_flannel_makes_of_the_shipped_list_is_implemented() {
        let Ok(Reading::Implemented(config)) =
            read(json!({"hairpinMode": true, "isDefaultGateway": true, "isGateway": true}), "")
        else {
            panic!("it is")
        };
        assert_eq!(
            (&*config.bridge, config.mtu, config.hairpin, config.is_gateway),
            ("cni0", 1450, true, true)
        );
    }

    #[test]
    fn a_member_that_is_not_implemented_is_for_gos_plugin() {
        for (members, expected) in [
            (json!({"vlan": 7}), "vlan"),
            (json!({"vlanTrunk": [{"id": 7}]}), "vlanTrunk"),
            (json!({"ipMasq": true}), "ipMasq"),
            (json!({"macspoofchk": true}), "macspoofchk"),
            (json!({"disableContainerInterface": true}), "disableContainerInterface"),
            (json!({"newerMember": 1}), "newerMember"),
            (json!({"ipam": {"type": "dhcp"}}), "ipam.type"),
            (json!({"ipam": {}}), "ipam.type"),
            (json!({"ipam": {"type": "host-local", "subnet": "10.1.0.0/24", "newer": 1}}), "ipam.newer"),
        ] {
            match read(members, "") {
                Ok(Reading::Foreign(member)) => assert_eq!(member, expected),
                other => panic!("{expected}: {other:?}"),
            }
        }
        for members in [
            json!({"vlan": 0, "vlanTrunk": null, "preserveDefaultVlan": true}),
            json!({"macspoofchk": false}),
        ] {
            assert!(matches!(read(members, ""), Ok(Reading::Implemented(_))));
        }
    }

    #[test]
    fn the_runtimes_mac_beats_that_of_args_and_that_beats_the_variables() {
        let mac = |members: Value, args: &str| match read(members, args) {
            Ok(Reading::Implemented(config)) => config.mac.map(|mac| mac[5]),
            other => panic!("{other:?}"),
        };
        let variable = "IgnoreUnknown=1;MAC=02-00-00-00-00-01";
        let args = json!({"args": {"cni": {"mac": "02:00:00:00:00:02"}}});
        let mut runtime = args.clone();
        runtime["runtimeConfig"] = json!({"mac": "02:00:00:00:00:03"});
        assert_eq!(mac(json!({}), ""), None);
        assert_eq!(mac(json!({}), variable), Some(1));
        assert_eq!(mac(args, variable), Some(2));
        assert_eq!(mac(runtime, variable), Some(3));
    }

    #[test]
    fn a_mac_is_read_in_the_forms_that_go_reads_and_in_no_others() {
        let mac = |text: &str| match read(json!({"runtimeConfig": {"mac": text}}), "") {
            Ok(Reading::Implemented(config)) => Ok(config.mac),
            other => Err(format!("{other:?}")),
        };
        for text in ["02:11:22:33:44:ab", "02-11-22-33-44-AB", "0211.2233.44aB"] {
            assert_eq!(mac(text), Ok(Some([0x02, 0x11, 0x22, 0x33, 0x44, 0xAB])));
        }
        for text in ["02:11-22:33:44:ab", "+2:11:22:33:44:ab", "0211.2233", "0211223344ab"] {
            assert!(
                mac(text).unwrap_err().contains(&format!("address {text}: invalid MAC address")),
                "{text}"
            );
        }
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (members, args, expected) in [
            (json!({"mtu": "x"}), "", "failed to load netconf: mtu: \"x\""),
            (json!({"mtu": -1}), "", "failed to load netconf: mtu: -1 is no MTU"),
            (
                json!({"hairpinMode": true, "promiscMode": true}),
                "",
                "cannot set hairpin mode and promiscuous mode",
            ),
            (
                json!({"runtimeConfig": {"mac": "zz"}}),
                "",
                "failed to make veth pair: address zz: invalid MAC address",
            ),
            (
                json!({"bridge": "a/b"}),
                "",
                "failed to load netconf: bridge: \"a/b\" can't be the name of a device",
            ),
            (
                json!({"bridge": "sixteencharacter"}),
                "",
                "failed to load netconf: bridge: \"sixteencharacter\" can't",
            ),
            (json!({"vlan": 9999}), "", "invalid VLAN ID 9999 (must be between 0 and 4094)"),
            (json!({"vlan": -1}), "", "invalid VLAN ID -1 (must be between 0 and 4094)"),
            (json!({"vlanTrunk": [{"id": 7}, {"id": 4095}]}), "", "vlanTrunk: {\"id\":4095} is no range"),
            (
                json!({"vlanTrunk": [{"minID": 9, "maxID": 7}]}),
                "",
                "vlanTrunk: {\"maxID\":7,\"minID\":9} is no range",
            ),
            (json!({}), "MAC", "ARGS: invalid pair \"MAC\""),
            (json!({}), "FOO=1", "ARGS: unknown args [\"FOO=1\"]"),
            (json!({"ipam": {"type": "host-local"}}), "", "no IP ranges specified"),
        ] {
            let error = read(members, args).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
