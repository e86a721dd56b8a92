//! `Backend` of type `wireguard`: Go flannel's keys, and two of our own.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::values::{mtu, workers};
use super::{ConfigError, one};
use crate::gojson::Object;
use crate::net::Family;
use crate::text::shortened;
use crate::wireguard::PresharedKey;

/// Ports unless others are configured (contract §13).
const DEFAULT_PORT: u16 = 51_820;
const DEFAULT_PORT_V6: u16 = 51_821;

/// The `wireguard` backend (contract §5.4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardConfig {
    /// `ListenPort`: that of the device for IPv4, or of the only one.
    pub port: u16,
    /// `ListenPortV6`: that of the device for IPv6 in the mode `separate`.
    pub port_v6: u16,
    /// MTU of the underlay in bytes, before encapsulation; `None` follows the external interface.
    pub mtu: Option<u32>,
    /// `PSK`: a secret of all nodes besides their keys.
    pub psk: Option<PresharedKey>,
    /// `PersistentKeepaliveInterval` in seconds; 0: none.
    pub keepalive: u16,
    /// Which tunnels there are.
    pub mode: Mode,
    /// `Userspace`, a key of ours: what encrypts.
    #[serde(default)]
    pub engine: Engine,
    /// `Workers`, a key of ours: threads for each direction where this process encrypts.
    #[serde(default = "one")]
    pub workers: u8,
}

/// Which tunnels there are, and which public addresses of peers they lead to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// One for each family, which carries packets of that family between addresses of that family.
    #[default]
    Separate,
    /// One for both families; between IPv4 or IPv6 addresses as each peer has them.
    Auto,
    /// One for both families between IPv4 addresses.
    V4,
    /// One for both families between IPv6 addresses.
    V6,
}

/// What encrypts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Engine {
    /// The kernel, and this process where the kernel has no WireGuard.
    #[default]
    Auto,
    /// This process.
    Always,
    /// The kernel.
    Never,
}

impl WireguardConfig {
    /// The port of the tunnel that carries packets of this family.
    pub fn port_of(&self, family: Family) -> u16 {
        match (self.mode, family) {
            (Mode::Separate, Family::V6) => self.port_v6,
            _ => self.port,
        }
    }

    pub(super) fn parse(backend: &Object<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            port: port(backend, "ListenPort")?.unwrap_or(DEFAULT_PORT),
            port_v6: port(backend, "ListenPortV6")?.unwrap_or(DEFAULT_PORT_V6),
            mtu: mtu(backend)?,
            psk: psk(backend)?,
            keepalive: keepalive(backend)?,
            mode: choice(backend, "Mode", &MODES)?,
            engine: choice(backend, "Userspace", &ENGINES)?,
            workers: workers(backend)?,
        })
    }

    /// What is in force, but for the secret.
    pub(super) fn values(&self) -> Vec<(&'static str, String)> {
        vec![
            ("Backend.ListenPort", self.port.to_string()),
            ("Backend.ListenPortV6", self.port_v6.to_string()),
            ("Backend.MTU", self.mtu.map_or("(that of the interface)".to_owned(), |mtu| mtu.to_string())),
            ("Backend.PSK", self.fingerprint()),
            ("Backend.PersistentKeepaliveInterval", self.keepalive.to_string()),
            ("Backend.Mode", self.mode.to_string()),
            ("Backend.Userspace", self.engine.to_string()),
            ("Backend.Workers", self.workers.to_string()),
        ]
    }

    /// Tells one secret from the next and says nothing about either: eight bits of a checksum.
    fn fingerprint(&self) -> String {
        let Some(psk) = &self.psk else { return "(none)".to_owned() };
        let sum = psk.bytes().iter().fold(0_u8, |sum, byte| sum.rotate_left(3) ^ byte);
        format!("(a secret, checksum {sum:02x})")
    }
}

const MODES: [(&str, Mode); 4] =
    [("separate", Mode::Separate), ("auto", Mode::Auto), ("ipv4", Mode::V4), ("ipv6", Mode::V6)];
const ENGINES: [(&str, Engine); 3] =
    [("auto", Engine::Auto), ("always", Engine::Always), ("never", Engine::Never)];

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name(&MODES, *self))
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name(&ENGINES, *self))
    }
}

fn name<T: Copy + PartialEq>(all: &[(&'static str, T)], value: T) -> &'static str {
    all.iter().find(|(_, one)| *one == value).map_or("", |(name, _)| name)
}

/// One of several words, as they are spelled; none, or an empty one, is the first.
fn choice<T: Copy>(backend: &Object<'_>, key: &str, all: &[(&'static str, T)]) -> Result<T, ConfigError> {
    let text: String = backend.get(key)?.unwrap_or_default();
    let found = all.iter().find(|(name, _)| *name == text);
    match found.or_else(|| all.first().filter(|_| text.is_empty())) {
        Some((_, value)) => Ok(*value),
        None => {
            let names: Vec<String> = all.iter().map(|(name, _)| format!("{name:?}")).collect();
            let text = shortened(&text);
            Err(ConfigError(format!("Backend.{key}: {text:?} is none of {}", names.join(", "))))
        }
    }
}

fn port(backend: &Object<'_>, key: &str) -> Result<Option<u16>, ConfigError> {
    let port = backend.get::<i64>(key)?.unwrap_or(0);
    let number = u16::try_from(port).map_err(|_| {
        ConfigError(format!("Backend.{key}: {port} is not a UDP port: give 1 to 65535, or leave it out"))
    })?;
    Ok((number != 0).then_some(number))
}

fn keepalive(backend: &Object<'_>) -> Result<u16, ConfigError> {
    let seconds = backend.get::<i64>("PersistentKeepaliveInterval")?.unwrap_or(0);
    u16::try_from(seconds).map_err(|_| {
        ConfigError(format!(
            "Backend.PersistentKeepaliveInterval: {seconds} can't be used: give 0 (none) to 65535 seconds"
        ))
    })
}

fn psk(backend: &Object<'_>) -> Result<Option<PresharedKey>, ConfigError> {
    let text: String = backend.get("PSK")?.unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    // The value is a secret, even a wrong one.
    let secret = text.parse().map_err(|why| {
        ConfigError(format!(
            "Backend.PSK: its {} characters can't be used: {why}; make one with `wg genpsk`",
            text.chars().count()
        ))
    })?;
    Ok(Some(secret))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BackendConfig, NetworkConfig};

    fn parse(keys: &str) -> Result<WireguardConfig, ConfigError> {
        let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"wireguard"{keys}}}}}"#);
        match NetworkConfig::parse(&json)?.backend {
            BackendConfig::Wireguard(config) => Ok(config),
            other => panic!("{other:?}"),
        }
    }

    const PSK: &str = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";

    #[test]
    fn the_defaults_are_those_of_go_flannel() {
        let config = parse("").unwrap();
        let WireguardConfig { port, port_v6, mtu, psk, keepalive, mode, engine, workers } = config;
        assert_eq!((port, port_v6, mtu, keepalive, workers), (51_820, 51_821, None, 0, 1));
        assert_eq!((psk, mode, engine), (None, Mode::Separate, Engine::Auto));
        let config = parse(&format!(
            r#","ListenPort":1,"ListenPortV6":2,"MTU":1400,"PSK":"{PSK}","PersistentKeepaliveInterval":25,"Mode":"auto","Userspace":"always","Workers":2"#
        ))
        .unwrap();
        assert_eq!((config.port_of(Family::V4), config.port_of(Family::V6)), (1, 1));
        assert_eq!((config.mtu, config.keepalive, config.mode), (Some(1400), 25, Mode::Auto));
        assert_eq!(config.psk, PSK.parse().ok());
        assert_eq!((config.engine, config.workers), (Engine::Always, 2));
    }

    #[test]
    fn values_that_make_no_sense_are_refused_by_name_and_a_secret_is_never_repeated() {
        for (keys, part) in [
            (r#""ListenPort":70000"#, "Backend.ListenPort: 70000"),
            (r#""ListenPortV6":-1"#, "Backend.ListenPortV6: -1"),
            (r#""Mode":"Separate""#, "Backend.Mode: \"Separate\" is none of"),
            (r#""Mode":"both""#, "\"ipv4\""),
            (r#""Userspace":"yes""#, "Backend.Userspace: \"yes\""),
            (r#""Userspace":true"#, "Userspace"),
            (r#""MTU":100"#, "Backend.MTU: 100"),
            (r#""Workers":9"#, "Backend.Workers: 9"),
            (r#""PersistentKeepaliveInterval":-1"#, "PersistentKeepaliveInterval: -1"),
            (r#""PSK":"swordfish""#, "Backend.PSK: its 9 characters"),
        ] {
            let error = parse(&format!(",{keys}")).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains("swordfish"), "{keys}: {error}");
        }
    }

    #[test]
    fn a_changed_secret_is_told_without_it() {
        let read = |psk: &str| {
            let json =
                format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"wireguard","PSK":"{psk}"}}}}"#);
            NetworkConfig::parse(&json).unwrap()
        };
        let (before, after) = (read(""), read(PSK));
        let changes = before.changes(&after).join(", ");
        assert!(changes.starts_with("Backend.PSK: (none) → (a secret"), "{changes}");
        assert!(!format!("{changes} {after:?}").contains(&PSK[..8]));
    }
}
