//! The two codes of a handshake message (WireGuard's paper, section 5.4.7): one that needs the receiver's public key, and
//! one that needs a cookie, which only a host gets that receives what is sent to its address.

use std::net::{IpAddr, SocketAddr};

use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::AeadInPlace;
use subnet::wireguard::PublicKey;

use super::message::{COOKIE, MAC};

/// A cookie is good for so many milliseconds.
pub(crate) const COOKIE_AGE: u64 = 120_000;

type Code = [u8; MAC];

fn labelled(label: &[u8; 8], key: &PublicKey) -> [u8; 32] {
    Blake2s256::new().chain_update(label).chain_update(key.bytes()).finalize().into()
}

fn code(key: &[u8], parts: &[&[u8]]) -> Blake2sMac<U16> {
    // Keys of up to 32 bytes are right, and these have 16 or 32.
    let mut code = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).unwrap_or_else(|_| unreachable!());
    parts.iter().for_each(|part| Mac::update(&mut code, part));
    code
}

/// Where the codes of a message begin.
fn codes(message: &[u8]) -> usize {
    message.len() - 2 * MAC
}

/// Writes the first code, which shows that the sender knows the receiver's public key.
pub(crate) fn mac1(receiver: &PublicKey, message: &mut [u8]) {
    let (content, rest) = message.split_at_mut(codes(message));
    let code = code(&labelled(b"mac1----", receiver), &[content]);
    rest[..MAC].copy_from_slice(&code.finalize().into_bytes());
}

/// An initiation that only the first code is right of, as anybody can send who knows the receiver's public key.
#[cfg(feature = "testing")]
pub fn initiation_of_a_stranger(receiver: &PublicKey) -> [u8; super::message::INITIATION] {
    let mut message = [0x5a; super::message::INITIATION];
    message[..4].copy_from_slice(&[1, 0, 0, 0]);
    mac1(receiver, &mut message);
    message
}

/// Addresses a message of any kind to the node with this public key.
#[cfg(feature = "testing")]
pub fn address(receiver: &PublicKey, message: &mut [u8]) {
    mac1(receiver, message);
}

/// Writes the second code, which shows that the sender has this cookie.
pub(crate) fn mac2(cookie: &Code, message: &mut [u8]) {
    let (content, rest) = message.split_at_mut(codes(message) + MAC);
    rest.copy_from_slice(&code(cookie, &[content]).finalize().into_bytes());
}

/// The cookie in a reply to a message with this first code, of the peer with this key.
pub(crate) fn read(peer: &PublicKey, sent: &Code, reply: &[u8; COOKIE]) -> Option<Code> {
    let (mut cookie, tag) = (Code::try_from(&reply[32..48]).ok()?, &reply[48..]);
    let cipher = XChaCha20Poly1305::new(&labelled(b"cookie--", peer).into());
    let nonce: [u8; 24] = reply[8..32].try_into().ok()?;
    cipher.decrypt_in_place_detached(&nonce.into(), sent, &mut cookie, tag.into()).ok()?;
    Some(cookie)
}

/// Whether a message has a second code at all.
pub(super) fn claims_proof(message: &[u8]) -> bool {
    message[codes(message) + MAC..] != [0; MAC]
}

/// Checks the codes of messages to this node, and makes cookies.
pub(super) struct Codes {
    mac1: [u8; 32],
    cookie: [u8; 32],
    secret: [u8; 32],
    /// When the secret was made.
    made: u64,
    /// The cookie that was made last, and for whom: messages of a flood mostly have one sender.
    last: Option<(SocketAddr, Code)>,
}

impl Codes {
    /// Those of the node with this public key.
    pub(super) fn new(own: &PublicKey) -> Self {
        Self {
            mac1: labelled(b"mac1----", own),
            cookie: labelled(b"cookie--", own),
            secret: crate::random::bytes(),
            made: 0,
            last: None,
        }
    }

    /// Whether the first code is right.
    pub(super) fn are_for_this_node(&self, message: &[u8]) -> bool {
        let (content, rest) = message.split_at(codes(message));
        code(&self.mac1, &[content]).verify_slice(&rest[..MAC]).is_ok()
    }

    /// Whether the second code is right: the sender has the cookie for its address.
    pub(super) fn proves(&mut self, message: &[u8], from: SocketAddr, now: u64) -> bool {
        let (content, rest) = message.split_at(codes(message) + MAC);
        code(&self.cookie_of(from, now), &[content]).verify_slice(rest).is_ok()
    }

    /// What asks the sender of a message to prove its address.
    pub(super) fn reply(&mut self, message: &[u8], from: SocketAddr, now: u64) -> [u8; COOKIE] {
        let cookie = self.cookie_of(from, now);
        reply(&self.cookie, message, &message[codes(message)..][..MAC], cookie)
    }

    fn cookie_of(&mut self, from: SocketAddr, now: u64) -> Code {
        if now >= self.made + COOKIE_AGE {
            (self.secret, self.made, self.last) = (crate::random::bytes(), now, None);
        }
        match self.last {
            Some((known, cookie)) if known == from => cookie,
            _ => {
                let cookie = cookie_of(&self.secret, from);
                self.last = Some((from, cookie));
                cookie
            }
        }
    }
}

/// What only a host that receives at this address can know.
fn cookie_of(secret: &[u8; 32], from: SocketAddr) -> Code {
    let port = from.port().to_be_bytes();
    let code = match from.ip() {
        IpAddr::V4(v4) => code(secret, &[&v4.octets(), &port]),
        IpAddr::V6(v6) => code(secret, &[&v6.octets(), &port]),
    };
    code.finalize().into_bytes().into()
}

fn reply(key: &[u8; 32], message: &[u8], mac1: &[u8], mut cookie: Code) -> [u8; COOKIE] {
    let nonce: [u8; 24] = crate::random::bytes();
    let cipher = XChaCha20Poly1305::new(key.into());
    let mut reply = [0; COOKIE];
    reply[0] = 3;
    reply[4..8].copy_from_slice(&message[4..8]);
    reply[8..32].copy_from_slice(&nonce);
    // Fails only for messages of 256 GB.
    if let Ok(tag) = cipher.encrypt_in_place_detached(&nonce.into(), mac1, &mut cookie) {
        reply[32..48].copy_from_slice(&cookie);
        reply[48..].copy_from_slice(&tag);
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wg::identity::Identity;
    use crate::wg::message::INITIATION;

    fn bed() -> (PublicKey, Codes, [u8; INITIATION]) {
        let own = *Identity::generate().unwrap().public();
        let mut message = [7; INITIATION];
        message[INITIATION - MAC..].fill(0);
        mac1(&own, &mut message);
        (own, Codes::new(&own), message)
    }

    #[test]
    fn a_cookie_proves_one_address_for_two_minutes() {
        let (own, mut codes, message) = bed();
        let (from, other) = ("192.0.2.1:5".parse().unwrap(), "192.0.2.1:6".parse().unwrap());
        let mac1: Code = message[INITIATION - 32..INITIATION - 16].try_into().unwrap();
        let cookie = read(&own, &mac1, &codes.reply(&message, from, 1)).unwrap();
        let mut proven = message;
        mac2(&cookie, &mut proven);
        assert!(!claims_proof(&message) && claims_proof(&proven));
        for _ in 0..2 {
            assert!(codes.proves(&proven, from, 2));
            assert!(!codes.proves(&proven, other, 2), "it is another sender's");
        }
        for at in 0..INITIATION {
            let mut changed = proven;
            changed[at] ^= 1;
            assert!(!codes.proves(&changed, from, 2), "byte {at}");
            assert_eq!(codes.are_for_this_node(&changed), at >= INITIATION - MAC, "byte {at}");
        }
        assert!(!codes.proves(&proven, from, 2 + COOKIE_AGE), "it is too old");
    }

    #[test]
    fn a_cookie_that_was_changed_or_answers_something_else_is_none() {
        let (own, mut codes, message) = bed();
        let reply = codes.reply(&message, "192.0.2.1:5".parse().unwrap(), 1);
        let mac1: Code = message[INITIATION - 32..INITIATION - 16].try_into().unwrap();
        assert!(read(&own, &mac1, &reply).is_some());
        assert!(read(&own, &[0; 16], &reply).is_none());
        for at in 8..COOKIE {
            let mut changed = reply;
            changed[at] ^= 1;
            assert!(read(&own, &mac1, &changed).is_none(), "byte {at}");
        }
    }
}
