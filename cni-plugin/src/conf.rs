//! The network configuration in, the delegate's configuration out; pure (contract §7.1 and §7.3).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Map, Value};
use subnet::env_file::{DEFAULT_PATH, Reading};
use subnet::gojson::{self, Object};

use crate::env::{Attachment, check_interface, is_identifier};
use crate::error::{self, CniError};
use crate::route;

/// The network configuration on standard input.
#[derive(Debug)]
pub(crate) struct Network {
    /// The network's name.
    pub(crate) name: String,
    /// `subnetFile`.
    pub(crate) subnet_file: String,
    /// `dataDir`: where the delegates' configurations are kept for DEL.
    pub(crate) data_dir: String,
    /// `waitSeconds`: how long ADD waits for a `subnet.env` that is missing.
    pub(crate) wait: Duration,
    /// `policyWaitSeconds`: how long ADD waits for the agent to have a pod's network policies in force.
    pub(crate) policy_wait: Duration,
    /// `inProcess`: whether a delegate may run in this process.
    pub(crate) in_process: bool,
    cni_version: String,
    delegate: Map<String, Value>,
    ipam: Map<String, Value>,
    runtime_config: Option<Map<String, Value>>,
    /// `prevResult`: of the plugin before, or of the whole list.
    pub(crate) prev_result: Option<Value>,
    valid_attachments: Option<Vec<Value>>,
}

/// Where GC finds the attachments that are still valid: the key of the specification, and the one that
/// libcni 1.2.0 wrote instead.
const VALID_ATTACHMENTS: [&str; 2] = ["cni.dev/valid-attachments", "cni.dev/attachments"];

/// The delegate's configuration: its standard input, and what is kept for DEL, byte for byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Delegate {
    /// The plugin's name.
    pub(crate) plugin: String,
    /// The network's name.
    pub(crate) network: String,
    /// The JSON.
    pub(crate) text: String,
}

impl Network {
    /// Reads standard input. Like in Go, bytes that are not UTF-8 become replacement characters.
    ///
    /// # Errors
    /// Code 6 for what is no JSON object, 7 for one without a proper name, 999 for members of flannel's own
    /// that have the wrong type.
    pub(crate) fn parse(stdin: &[u8]) -> Result<Self, CniError> {
        let undecodable =
            |error| CniError::new(error::UNDECODABLE, format!("error unmarshall network config: {error}"));
        let text = String::from_utf8_lossy(stdin);
        let object = Object::parse(&text).map_err(undecodable)?;
        let name: String = object.get("name").map_err(undecodable)?.unwrap_or_default();
        let cni_version = object.get("cniVersion").map_err(undecodable)?.unwrap_or_default();
        let valid_attachments = match VALID_ATTACHMENTS.into_iter().find(|key| object.has(key)) {
            // Go writes an empty list as null.
            Some(key) => Some(object.get(key).map_err(undecodable)?.unwrap_or_default()),
            None => None,
        };
        if name.is_empty() {
            return Err(CniError::new(error::BAD_NETWORK, "missing network name"));
        }
        if !is_identifier(&name) {
            let msg = "invalid characters found in network name";
            return Err(CniError { details: name, ..CniError::new(error::BAD_NETWORK, msg) });
        }
        let mut network = Self {
            name,
            subnet_file: DEFAULT_PATH.into(),
            data_dir: "/var/lib/cni/flannel".into(),
            wait: Duration::from_secs(10),
            policy_wait: Duration::from_secs(10),
            in_process: true,
            cni_version,
            delegate: Map::new(),
            ipam: Map::new(),
            runtime_config: None,
            prev_result: None,
            valid_attachments,
        };
        network
            .read_members(&object)
            .map_err(|error| CniError::new(error::OTHER, format!("failed to load netconf: {error}")))?;
        Ok(network)
    }

    fn read_members(&mut self, object: &Object<'_>) -> Result<(), String> {
        if let Some(file) = object.get("subnetFile")? {
            self.subnet_file = file;
        }
        if let Some(directory) = object.get("dataDir")? {
            self.data_dir = directory;
        }
        if let Some(seconds) = object.get::<u8>("waitSeconds")? {
            self.wait = Duration::from_secs(seconds.into());
        }
        if let Some(seconds) = object.get::<u8>("policyWaitSeconds")? {
            self.policy_wait = Duration::from_secs(seconds.into());
        }
        self.in_process = object.get("inProcess")?.unwrap_or(true);
        self.delegate = object.get("delegate")?.unwrap_or_default();
        self.ipam = object.get("ipam")?.unwrap_or_default();
        self.runtime_config = object.get("runtimeConfig")?;
        self.prev_result = object.get("prevResult")?;
        Ok(())
    }

    /// The attachments that GC must leave alone.
    ///
    /// # Errors
    /// Code 7, when they are not given or make no sense: nothing must be dropped then.
    pub(crate) fn valid_attachments(&self) -> Result<BTreeSet<Attachment>, CniError> {
        let key = VALID_ATTACHMENTS[0];
        let bad = |what: String| CniError::new(error::BAD_NETWORK, format!("{what}: nothing was dropped"));
        let given = self.valid_attachments.as_ref().ok_or_else(|| {
            bad(format!("{key:?} is missing: the runtime has to list the attachments that are still valid"))
        })?;
        let numbered = given.iter().enumerate();
        let each = numbered.map(|(i, value)| {
            attachment(value).ok_or_else(|| {
                let value = gojson::shortened(&value.to_string());
                bad(format!("{key}[{i}]: {value} has no proper \"containerID\" and \"ifname\""))
            })
        });
        each.collect()
    }

    /// The version of the specification that the configuration is written in.
    pub(crate) fn version(&self) -> &str {
        if self.cni_version.is_empty() { "0.1.0" } else { &self.cni_version }
    }

    /// The delegate's configuration on this node.
    ///
    /// # Errors
    /// Code 999, when the configuration says what only flannel may say.
    pub(crate) fn delegate(&self, node: &Reading) -> Result<Delegate, CniError> {
        self.merged(node).map_err(|error| CniError::new(error::OTHER, error))
    }

    /// The delegate's configuration for taking down an attachment of which nothing was kept. It may lack
    /// what `node` lacks, but has a range in any case: `host-local` refuses to run without one, though it
    /// finds reservations by container and not by range.
    ///
    /// # Errors
    /// As [`delegate`](Self::delegate).
    pub(crate) fn delegate_for_del(&self, node: Option<Reading>) -> Result<Delegate, CniError> {
        let node = node.filter(|node| !node.subnets.is_empty());
        let node = node.or_else(|| Reading::parse("FLANNEL_SUBNET=192.0.2.0/24").ok());
        self.delegate(&node.unwrap_or_default())
    }

    fn merged(&self, node: &Reading) -> Result<Delegate, String> {
        let plugin = match self.delegate.get("type") {
            None => "bridge",
            Some(Value::String(plugin)) => plugin,
            Some(_) => {
                return Err("'delegate' dictionary, if present, must have (string) 'type' field".into());
            }
        };
        for key in ["name", "ipam"] {
            if self.delegate.contains_key(key) {
                return Err(format!(
                    "'delegate' dictionary must not have '{key}' field, it'll be set by flannel"
                ));
            }
        }
        let mut members = encoded(&self.delegate);
        let mut default = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                members.entry(key.to_owned()).or_insert(value);
            }
        };
        default("type", Some(gojson::to_string(&plugin)));
        default("ipMasq", node.ip_masq.map(|done| (!done).to_string()));
        default("mtu", node.mtu.map(|mtu| mtu.to_string()));
        default("isGateway", (plugin == "bridge").then(|| "true".into()));
        members.insert("name".into(), gojson::to_string(&self.name));
        members.insert("ipam".into(), self.delegates_ipam(node)?);
        if !self.cni_version.is_empty() {
            members.insert("cniVersion".into(), gojson::to_string(&self.cni_version));
        }
        if let Some(runtime_config) = &self.runtime_config {
            members.insert("runtimeConfig".into(), gojson::to_string(runtime_config));
        }
        Ok(Delegate { plugin: plugin.to_owned(), network: self.name.clone(), text: object_text(&members) })
    }

    fn delegates_ipam(&self, node: &Reading) -> Result<String, String> {
        let mut members = encoded(&self.ipam);
        members.entry("type".into()).or_insert_with(|| gojson::to_string(&"host-local"));
        let ranges: Vec<_> =
            node.subnets.iter().map(|subnet| format!(r#"[{{"subnet":"{subnet}"}}]"#)).collect();
        members.insert("ranges".into(), array_text(&ranges));
        let mut routes = match self.ipam.get("routes") {
            None => Vec::new(),
            Some(routes) => route::reencoded(routes).map_err(|error| {
                format!("failed to read IPAM routes: failed to parse ipam.routes: {error}")
            })?,
        };
        let networks = node.networks_v4.iter().chain(&node.networks_v6);
        routes.extend(networks.map(|network| format!(r#"{{"dst":"{network}"}}"#)));
        members.insert("routes".into(), array_text(&routes));
        Ok(object_text(&members))
    }

    /// `kept` for CHECK: with the result to check, in the version that the runtime gives it.
    pub(crate) fn for_check(&self, kept: Delegate) -> Delegate {
        let mut members = members_of(&kept.text);
        if !self.cni_version.is_empty() {
            members.insert("cniVersion".into(), gojson::to_string(&self.cni_version));
        }
        if let Some(result) = &self.prev_result {
            members.insert("prevResult".into(), gojson::to_string(&route::with_gateways(result.clone())));
        }
        Delegate { text: object_text(&members), ..kept }
    }

    /// `delegate` for GC: with the valid attachments, in the version that the runtime speaks.
    pub(crate) fn for_gc(&self, delegate: Delegate) -> Delegate {
        let delegate = delegate.in_version(&self.cni_version);
        let mut members = members_of(&delegate.text);
        for key in VALID_ATTACHMENTS {
            members.insert(key.into(), gojson::to_string(&self.valid_attachments));
        }
        Delegate { text: object_text(&members), ..delegate }
    }
}

fn attachment(value: &Value) -> Option<Attachment> {
    let text = value.to_string();
    let object = Object::parse(&text).ok()?;
    let container = object.get("containerID").ok()?.filter(|id: &String| is_identifier(id))?;
    let ifname = object.get("ifname").ok()?.filter(|name: &String| check_interface(name).is_ok())?;
    Some(Attachment { container, ifname })
}

impl Delegate {
    /// Reads back what ADD kept, be it ours or a Go plugin's. `None` for everything that can't be one, such
    /// as any proper part of one: the closing brace comes last.
    pub(crate) fn from_kept(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let Ok(Value::Object(object)) = serde_json::from_str(text) else { return None };
        let word = |key| object.get(key).and_then(Value::as_str).filter(|word| !word.is_empty());
        Some(Self { plugin: word("type")?.into(), network: word("name")?.into(), text: text.into() })
    }

    /// The same in another version of the specification.
    pub(crate) fn in_version(self, version: &str) -> Self {
        let mut members = members_of(&self.text);
        members.insert("cniVersion".into(), gojson::to_string(&version));
        Self { text: object_text(&members), ..self }
    }
}

fn members_of(text: &str) -> BTreeMap<String, String> {
    serde_json::from_str(text).map(|map| encoded(&map)).unwrap_or_default()
}

/// Values as JSON, so that members can be set to text that keeps Go's order of keys: sorted in maps, but
/// not in routes.
fn encoded(map: &Map<String, Value>) -> BTreeMap<String, String> {
    map.iter().map(|(key, value)| (key.clone(), gojson::to_string(value))).collect()
}

fn object_text(members: &BTreeMap<String, String>) -> String {
    let members: Vec<_> =
        members.iter().map(|(key, value)| format!("{}:{value}", gojson::to_string(key))).collect();
    format!("{{{}}}", members.join(","))
}

fn array_text(items: &[String]) -> String {
    format!("[{}]", items.join(","))
}

#[cfg(test)]
mod tests;
