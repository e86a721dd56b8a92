//! WireGuard keys as leases, configurations and key files spell them: base64 of 32 bytes.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::text::shortened;

/// The text is not a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    /// No base64 of 32 bytes.
    #[error("it is not base64 of 32 bytes (44 characters, as `wg genkey` prints)")]
    Length,
    /// Everybody can compute the secret that is shared with this key.
    #[error("it is a point of low order, which gives no secret")]
    LowOrder,
}

/// The 32 bytes that a base64 text stands for.
///
/// # Errors
/// [`BadKey::Length`].
pub fn decode(text: &str) -> Result<[u8; 32], BadKey> {
    let bytes = STANDARD.decode(text.trim_ascii()).map_err(|_| BadKey::Length)?;
    bytes.try_into().map_err(|_| BadKey::Length)
}

/// 32 bytes as base64.
pub fn encode(bytes: &[u8; 32]) -> String {
    STANDARD.encode(bytes)
}

/// A Curve25519 public key that gives a shared secret.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

impl PublicKey {
    /// The key with these bytes.
    ///
    /// # Errors
    /// [`BadKey::LowOrder`].
    pub fn new(bytes: [u8; 32]) -> Result<Self, BadKey> {
        if is_low_order(&bytes) { Err(BadKey::LowOrder) } else { Ok(Self(bytes)) }
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for PublicKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        Self::new(decode(text)?)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether every private key gives the same secret with this public key: zero (the points of order 1, 2, 4 and 8 of
/// Curve25519 and of its twist, also in the forms that are not reduced).
pub fn is_low_order(bytes: &[u8; 32]) -> bool {
    const fn filled(first: u8, middle: u8, last: u8) -> [u8; 32] {
        let mut point = [middle; 32];
        point[0] = first;
        point[31] = last;
        point
    }
    const POINTS: [[u8; 32]; 7] = [
        filled(0, 0, 0),
        filled(1, 0, 0),
        [
            0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a,
            0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
        ],
        [
            0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b,
            0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
        ],
        filled(0xec, 0xff, 0x7f),
        filled(0xed, 0xff, 0x7f),
        filled(0xee, 0xff, 0x7f),
    ];
    let mut reduced = *bytes;
    // The curve's arithmetic takes no notice of the highest bit.
    reduced[31] &= 0x7f;
    POINTS.contains(&reduced)
}

/// A secret that all nodes have besides their keys (`Backend.PSK`). It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct PresharedKey([u8; 32]);

impl PresharedKey {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<[u8; 32]> for PresharedKey {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl FromStr for PresharedKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        decode(text).map(Self)
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(not shown)")
    }
}

// The state file, which only its owner can read, has the configuration.
impl Serialize for PresharedKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for PresharedKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// How a node is reached by WireGuard: what it announces of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireguardData {
    /// The node's public key.
    pub key: PublicKey,
    /// Where it listens; `None`: at the port at which the reader listens itself.
    pub port: Option<u16>,
}

impl WireguardData {
    /// `BackendData` as Go flannel writes it.
    pub fn to_json(self) -> String {
        format!(r#"{{"PublicKey":"{}","Port":{}}}"#, self.key, self.port.unwrap_or(0))
    }

    /// From `BackendData`; `path` is what stands before the names of its members in messages.
    ///
    /// # Errors
    /// A sentence that names the member and its value.
    pub fn read(data: &crate::gojson::Object<'_>, path: &str) -> Result<Self, String> {
        let text =
            data.get::<String>("PublicKey")?.ok_or_else(|| format!("{path}PublicKey: there is none"))?;
        let key = text.parse().map_err(|why| format!("{path}PublicKey: {:?}: {why}", shortened(&text)))?;
        let port = data.get::<i64>("Port")?.unwrap_or(0);
        let port = u16::try_from(port).map_err(|_| format!("{path}Port: {port} is not a UDP port"))?;
        Ok(Self { key, port: (port != 0).then_some(port) })
    }

    /// The name of the member by which `BackendData` of another backend tells the key in advance. Its value is a list: a Go flannel
    /// finds its MAC in `BackendData` by cutting the text, and expects one text only (contract §3.2.3).
    pub(crate) const PREPARED: &str = "Wireguard";

    /// The member [`PREPARED`](Self::PREPARED) in JSON.
    #[cfg(feature = "kube")]
    pub(crate) fn prepared_to_json(self) -> String {
        format!(r#""{}":["{}",{}]"#, Self::PREPARED, self.key, self.port.unwrap_or(0))
    }

    /// What `BackendData` of another backend tells in advance. What can't be read is as if it were not there: the backend that the
    /// node announces does not depend on it.
    pub(crate) fn read_prepared(data: &crate::gojson::Object<'_>) -> Option<Self> {
        let list = data.get::<Vec<serde_json::Value>>(Self::PREPARED).ok().flatten()?;
        let [key, port] = list.as_slice() else { return None };
        let port = u16::try_from(port.as_u64()?).ok()?;
        Some(Self { key: key.as_str()?.parse().ok()?, port: (port != 0).then_some(port) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_of_the_wrong_length_or_order_are_refused() {
        let good = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
        assert_eq!(good.parse::<PublicKey>().unwrap().to_string(), good);
        assert_eq!(format!("{good}\n").parse::<PublicKey>().unwrap().to_string(), good);
        for bad in ["", "x", &good[..43], "AAAA", "é", &format!("{good}AAAA")] {
            assert_eq!(bad.parse::<PublicKey>(), Err(BadKey::Length), "{bad:?}");
            assert_eq!(bad.parse::<PresharedKey>(), Err(BadKey::Length), "{bad:?}");
        }
        let mut top = [0; 32];
        top[31] = 0x80;
        for low in [[0; 32], top] {
            assert_eq!(encode(&low).parse::<PublicKey>(), Err(BadKey::LowOrder));
        }
    }

    #[test]
    fn a_preshared_key_is_written_to_the_state_file_and_never_shown() {
        let secret: PresharedKey = encode(&[7; 32]).parse().unwrap();
        assert!(!format!("{secret:?}").contains('7') && !format!("{secret:?}").contains("Bw"));
        let text = serde_json::to_string(&secret).unwrap();
        assert_eq!(serde_json::from_str::<PresharedKey>(&text).unwrap(), secret);
        assert!(serde_json::from_str::<PresharedKey>("\"short\"").is_err());
    }

    proptest! {
        #[test]
        fn text_round_trips(bytes: [u8; 32]) {
            prop_assert_eq!(decode(&encode(&bytes)), Ok(bytes));
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,50}") {
            let _ = text.parse::<PublicKey>();
        }
    }
}
