//! Which handshake messages are answered: those with a code that needs this node's public key, and while there are
//! many, those with a proof that their sender receives what is sent to its address (WireGuard's paper, section 5.4.7).
//!
//! An initiation costs its receiver about 150 µs of curve arithmetic, and a sender nothing.

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

/// What becomes of a handshake message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is looked at.
    Admitted,
    /// Its sender is asked to prove its address, by this reply.
    Asked([u8; COOKIE]),
    /// It has the wrong code: it is not for this node.
    Wrong,
    /// There are too many.
    Dropped,
}

/// So many in a second, and so many at once.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    /// In thousandths.
    tokens: u64,
    filled: u64,
}

impl Bucket {
    fn new(rate: u64) -> Self {
        Self { rate, tokens: rate * 1000, filled: 0 }
    }

    fn fill(&mut self, now: u64) {
        let gained = (now - self.filled.min(now)).saturating_mul(self.rate);
        self.tokens = self.tokens.saturating_add(gained).min(self.rate * 1000);
        self.filled = now;
    }

    fn has(&self) -> bool {
        self.tokens >= 1000
    }

    fn take(&mut self) -> bool {
        let has = self.has();
        self.tokens -= if has { 1000 } else { 0 };
        has
    }
}

/// How many messages are answered.
#[derive(Debug)]
struct Limits {
    /// Without a cookie.
    free: Bucket,
    /// By a cookie.
    asked: Bucket,
}

/// Decides on handshake messages. What comes from the address of a peer and what doesn't are counted apart, so that a
/// flood of a stranger keeps no peer out.
pub struct Gate {
    mac1: [u8; 32],
    cookie: [u8; 32],
    secret: [u8; 32],
    /// When the secret was made.
    made: u64,
    peers: Limits,
    strangers: Limits,
}

impl Gate {
    /// The gate of the node with this public key.
    pub fn new(own: &PublicKey) -> Self {
        let limits = |free, asked| Limits { free: Bucket::new(free), asked: Bucket::new(asked) };
        Self {
            mac1: labelled(b"mac1----", own),
            cookie: labelled(b"cookie--", own),
            secret: crate::random::bytes(),
            made: 0,
            peers: limits(500, 5000),
            strangers: limits(10, 500),
        }
    }

    /// Decides on a message with two codes.
    pub fn judge(&mut self, message: &[u8], from: SocketAddr, of_peer: bool, now: u64) -> Verdict {
        let limits = if of_peer { &mut self.peers } else { &mut self.strangers };
        limits.free.fill(now);
        limits.asked.fill(now);
        let (content, rest) = message.split_at(codes(message));
        let proves = rest[MAC..] != [0; MAC];
        if !proves && !limits.free.has() && !limits.asked.has() {
            // Looking at it would be all that the sender wants.
            return Verdict::Dropped;
        }
        if code(&self.mac1, &[content]).verify_slice(&rest[..MAC]).is_err() {
            return Verdict::Wrong;
        }
        if now >= self.made + COOKIE_AGE {
            (self.secret, self.made) = (crate::random::bytes(), now);
        }
        let cookie = cookie_of(&self.secret, from);
        if proves && code(&cookie, &[content, &rest[..MAC]]).verify_slice(&rest[MAC..]).is_ok() {
            return Verdict::Admitted;
        }
        if limits.free.take() {
            return Verdict::Admitted;
        }
        match limits.asked.take() {
            true => Verdict::Asked(reply(&self.cookie, message, &rest[..MAC], cookie)),
            false => Verdict::Dropped,
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

    fn own() -> PublicKey {
        *Identity::generate().unwrap().public()
    }

    fn message(to: &PublicKey) -> [u8; INITIATION] {
        let mut message = [7; INITIATION];
        message[INITIATION - MAC..].fill(0);
        mac1(to, &mut message);
        message
    }

    const FROM: &str = "192.0.2.1:5";

    #[test]
    fn under_load_whoever_proves_its_address_is_heard_and_nobody_else() {
        let own = own();
        let (mut gate, message) = (Gate::new(&own), message(&own));
        let (from, other) = (FROM.parse().unwrap(), "192.0.2.1:6".parse().unwrap());
        let mut asked = None;
        let mut counts = [0; 3];
        for _ in 0..100_000 {
            match gate.judge(&message, from, false, 1) {
                Verdict::Admitted => counts[0] += 1,
                Verdict::Asked(reply) => {
                    counts[1] += 1;
                    asked = Some(reply);
                }
                Verdict::Dropped => counts[2] += 1,
                Verdict::Wrong => panic!(),
            }
        }
        assert_eq!(counts, [10, 500, 99_490]);
        assert_eq!(gate.judge(&message, from, true, 1), Verdict::Admitted, "peers are counted apart");
        let mac1: Code = message[INITIATION - 32..INITIATION - 16].try_into().unwrap();
        let cookie = read(&own, &mac1, &asked.unwrap()).unwrap();
        let mut proven = message;
        mac2(&cookie, &mut proven);
        assert_eq!(gate.judge(&proven, from, false, 2), Verdict::Admitted);
        assert_ne!(gate.judge(&proven, other, false, 2), Verdict::Admitted, "it is another sender's");
        gate.strangers.free.tokens = 0;
        assert_ne!(gate.judge(&proven, from, false, 3 + COOKIE_AGE), Verdict::Dropped);
        gate.strangers.free = Bucket::new(0);
        assert_ne!(gate.judge(&proven, from, false, 4 + COOKIE_AGE), Verdict::Admitted, "it is too old");
    }

    #[test]
    fn a_message_for_another_node_is_not_looked_at() {
        let own = own();
        let (mut gate, mut message) = (Gate::new(&own), message(&own));
        message[9] ^= 1;
        assert_eq!(gate.judge(&message, FROM.parse().unwrap(), true, 1), Verdict::Wrong);
    }

    #[test]
    fn a_cookie_that_was_changed_or_answers_something_else_is_none() {
        let own = own();
        let (mut gate, message) = (Gate::new(&own), message(&own));
        gate.peers.free = Bucket::new(0);
        let Verdict::Asked(reply) = gate.judge(&message, FROM.parse().unwrap(), true, 1) else { panic!() };
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
