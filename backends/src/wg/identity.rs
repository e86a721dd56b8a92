//! This node's private key, which is nowhere else in memory and is never printed.

use std::fmt;

use snow::params::DHChoice;
use snow::resolvers::{CryptoResolver, DefaultResolver};
use subnet::wireguard::{BadKey, PublicKey};
use zeroize::Zeroizing;

/// A private key with its public one. Two are equal if their public keys are.
#[derive(Clone)]
pub struct Identity {
    public: PublicKey,
    private: Zeroizing<[u8; 32]>,
}

impl Identity {
    /// The identity with this private key.
    ///
    /// # Errors
    /// [`BadKey`]; no key of 32 bytes gives one.
    pub fn new(private: Zeroizing<[u8; 32]>) -> Result<Self, BadKey> {
        let mut curve = DefaultResolver.resolve_dh(&DHChoice::Curve25519).ok_or(BadKey::Length)?;
        curve.set(&*private);
        let public = PublicKey::new(curve.pubkey().try_into().map_err(|_| BadKey::Length)?)?;
        Ok(Self { public, private })
    }

    /// A new one.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn generate() -> Result<Self, BadKey> {
        let mut private: Zeroizing<[u8; 32]> = Zeroizing::new(crate::random::bytes());
        // As `wg genkey` has them (RFC 7748, section 5).
        private[0] &= 248;
        private[31] = private[31] & 127 | 64;
        Self::new(private)
    }

    /// The identity whose private key this text is.
    ///
    /// # Errors
    /// [`BadKey`].
    pub fn from_text(text: &str) -> Result<Self, BadKey> {
        Self::new(Zeroizing::new(subnet::wireguard::decode(text)?))
    }

    /// The private key as text, for the file that keeps it.
    pub(crate) fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(subnet::wireguard::encode(&self.private))
    }

    /// The public key.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// The private key.
    pub(crate) fn private(&self) -> &[u8; 32] {
        &self.private
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.public == other.public
    }
}

impl Eq for Identity {}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.public)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_public_key_is_that_of_wg_pubkey_and_the_private_one_is_not_shown() {
        // RFC 7748, section 6.1.
        let private = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
        let identity = Identity::from_text(private).unwrap();
        assert_eq!(identity.public().to_string(), "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo=");
        assert_eq!(*identity.to_text(), private);
        assert!(!format!("{identity:?}").contains("dwdt"));
        assert_ne!(Identity::generate().unwrap(), Identity::generate().unwrap());
    }

    #[test]
    fn points_of_low_order_give_no_secret_and_are_known_as_such() {
        let curve = |private: &[u8; 32]| {
            let mut curve = DefaultResolver.resolve_dh(&DHChoice::Curve25519).unwrap();
            curve.set(private);
            curve
        };
        let (mut found, mut secret) = (0, [1; 32]);
        let private: [u8; 32] = crate::random::bytes();
        let mut candidates: Vec<[u8; 32]> = [0, 1, 2, 3, 0x80, 0xeb, 0xec, 0xed, 0xee, 0xef, 0xff]
            .into_iter()
            .flat_map(|first| [[0, 0], [0xff, 0x7f], [0xff, 0xff]].map(|rest| (first, rest)))
            .map(|(first, [middle, last])| {
                let mut point = [middle; 32];
                (point[0], point[31]) = (first, last);
                point
            })
            .collect();
        for hex in [
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
            "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        ] {
            let byte = |at: usize| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap();
            candidates.push(std::array::from_fn(byte));
        }
        for point in candidates {
            curve(&private).dh(&point, &mut secret).unwrap();
            let low = secret == [0; 32];
            assert_eq!(subnet::wireguard::is_low_order(&point), low, "{point:02x?}");
            found += u32::from(low);
        }
        assert!(found >= 10, "{found}");
    }
}
