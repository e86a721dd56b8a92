//! The handshake: Noise IKpsk2, which `snow` does, in the frames of WireGuard.

use snow::{Builder, HandshakeState};
use subnet::wireguard::{PresharedKey, PublicKey, is_low_order};

use super::cookie::mac1;
use super::identity::Identity;
use super::message::{INITIATION, MAC, RESPONSE};

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// Without a preshared key all nodes have this one.
const NO_SECRET: [u8; 32] = [0; 32];

/// When an initiation was made; later ones are greater (TAI64N).
pub(super) type Timestamp = [u8; 12];

/// The keys for what this node sends and for what it receives.
pub(super) struct TransportKeys {
    pub(super) sending: [u8; 32],
    pub(super) receiving: [u8; 32],
}

impl Drop for TransportKeys {
    fn drop(&mut self) {
        use zeroize::Zeroize;
        self.sending.zeroize();
        self.receiving.zeroize();
    }
}

/// A handshake that this node began.
pub(super) struct Begun(HandshakeState);

/// A handshake that a peer began.
pub(super) struct ReceivedInitiation {
    state: HandshakeState,
    /// Who says so; that it is true shows the first packet.
    pub(super) peer: PublicKey,
    pub(super) timestamp: Timestamp,
    sender: u32,
}

fn builder<'a>(identity: &'a Identity, psk: Option<&'a PresharedKey>) -> Option<Builder<'a>> {
    let builder = Builder::new(PATTERN.parse().ok()?).prologue(PROLOGUE).ok()?;
    let psk = psk.map_or(&NO_SECRET, PresharedKey::bytes);
    builder.local_private_key(identity.private()).ok()?.psk(2, psk).ok()
}

/// An initiation to a peer, without its second code.
pub(super) fn begin(
    identity: &Identity,
    psk: Option<&PresharedKey>,
    peer: &PublicKey,
    local: u32,
    timestamp: &Timestamp,
) -> Option<(Begun, [u8; INITIATION])> {
    let builder = builder(identity, psk)?.remote_public_key(peer.bytes()).ok()?;
    let mut state = builder.build_initiator().ok()?;
    let mut message = [0; INITIATION];
    message[0] = 1;
    message[4..8].copy_from_slice(&local.to_le_bytes());
    let end = INITIATION - 2 * MAC;
    state.write_message(timestamp, &mut message[8..end]).ok().filter(|len| *len == end - 8)?;
    mac1(peer, &mut message);
    Some((Begun(state), message))
}

/// What an initiation to this node says.
pub(super) fn hear(
    identity: &Identity,
    psk: Option<&PresharedKey>,
    message: &[u8; INITIATION],
) -> Option<ReceivedInitiation> {
    let noise = &message[8..INITIATION - 2 * MAC];
    refuse_low_order(noise)?;
    let mut state = builder(identity, psk)?.build_responder().ok()?;
    let mut timestamp = [0; 12];
    state.read_message(noise, &mut timestamp).ok().filter(|len| *len == timestamp.len())?;
    let peer = PublicKey::new(state.get_remote_static()?.try_into().ok()?).ok()?;
    Some(ReceivedInitiation { state, peer, timestamp, sender: super::message::number(message, 4)? })
}

impl ReceivedInitiation {
    /// The response, without its second code, with the keys and the peer's number for the session.
    pub(super) fn respond(mut self, local: u32) -> Option<([u8; RESPONSE], TransportKeys, u32)> {
        let mut message = [0; RESPONSE];
        message[0] = 2;
        message[4..8].copy_from_slice(&local.to_le_bytes());
        message[8..12].copy_from_slice(&self.sender.to_le_bytes());
        let end = RESPONSE - 2 * MAC;
        self.state.write_message(&[], &mut message[12..end]).ok().filter(|len| *len == end - 12)?;
        mac1(&self.peer, &mut message);
        let (receiving, sending) = self.state.dangerously_get_raw_split();
        Some((message, TransportKeys { sending, receiving }, self.sender))
    }
}

impl Begun {
    /// The keys, and the peer's number for the session, if this is the response. Anything else changes nothing.
    pub(super) fn finish(&mut self, message: &[u8; RESPONSE]) -> Option<(TransportKeys, u32)> {
        let noise = &message[12..RESPONSE - 2 * MAC];
        refuse_low_order(noise)?;
        self.0.read_message(noise, &mut [0; 16]).ok().filter(|len| *len == 0)?;
        let (sending, receiving) = self.0.dangerously_get_raw_split();
        Some((TransportKeys { sending, receiving }, super::message::number(message, 4)?))
    }
}

/// A message begins with a key that its sender made for it.
fn refuse_low_order(noise: &[u8]) -> Option<()> {
    (!is_low_order(noise.first_chunk()?)).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identities() -> (Identity, Identity) {
        (Identity::generate().unwrap(), Identity::generate().unwrap())
    }

    #[test]
    fn both_sides_get_the_same_keys_if_they_have_the_same_secret() {
        let (a, b) = identities();
        let secrets = [None, Some(PresharedKey::from([1; 32])), Some(PresharedKey::from([2; 32]))];
        for (x, mine) in secrets.iter().enumerate() {
            for (y, theirs) in secrets.iter().enumerate() {
                let (mut begun, message) = begin(&a, mine.as_ref(), b.public(), 7, &[3; 12]).unwrap();
                let heard = hear(&b, theirs.as_ref(), &message).unwrap();
                assert_eq!((heard.peer, heard.timestamp), (*a.public(), [3; 12]));
                let (response, theirs, number) = heard.respond(8).unwrap();
                assert_eq!(number, 7);
                match begun.finish(&response) {
                    None => assert_ne!(x, y),
                    Some((mine, number)) => {
                        assert_eq!((x, number), (y, 8));
                        assert_eq!(mine.sending, theirs.receiving);
                        assert_eq!(mine.receiving, theirs.sending);
                        assert_ne!(mine.sending, mine.receiving);
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_changed_on_its_way_is_no_message_and_disturbs_no_handshake() {
        let (a, b) = identities();
        let (mut begun, message) = begin(&a, None, b.public(), 7, &[3; 12]).unwrap();
        for at in 8..INITIATION - 32 {
            let mut changed = message;
            changed[at] ^= 0x10;
            assert!(hear(&b, None, &changed).is_none(), "byte {at}");
        }
        assert!(hear(&a, None, &message).is_none(), "it is for somebody else");
        let (response, ..) = hear(&b, None, &message).unwrap().respond(8).unwrap();
        for at in 12..RESPONSE - 32 {
            let mut changed = response;
            changed[at] ^= 0x10;
            assert!(begun.finish(&changed).is_none(), "byte {at}");
        }
        let mut low = response;
        low[12..44].fill(0);
        assert!(begun.finish(&low).is_none());
        assert!(begun.finish(&response).is_some());
        let mut low = message;
        low[8..40].fill(0);
        assert!(hear(&b, None, &low).is_none());
    }
}
