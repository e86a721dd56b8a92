//! The keys of a handshake's outcome: what encrypts and decrypts packets.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

use super::message::{HEADER, TAG};
use super::window::{MAX_COUNTER, Window};

/// After so many packets another session is asked for.
pub(crate) const REKEY_AFTER_PACKETS: u64 = 1 << 60;
/// After so many milliseconds the initiator asks for another session …
pub(crate) const REKEY_AFTER: u64 = 120_000;
/// … and nothing is sent or taken any more.
pub(crate) const REJECT_AFTER: u64 = 180_000;
/// Who receives packets by a session of this age that it has begun asks for another one.
pub(crate) const RECEIVED_OLD: u64 = 165_000;

/// Both directions of a peer, for three minutes.
pub struct Session {
    /// The number by which its packets name it to this node, and to the peer.
    pub(crate) local: u32,
    remote: u32,
    /// This node began the handshake.
    pub(crate) initiator: bool,
    /// When, in milliseconds.
    pub(crate) born: u64,
    sending: LessSafeKey,
    receiving: LessSafeKey,
    counter: AtomicU64,
    window: Mutex<Window>,
    /// The peer has this session too.
    confirmed: AtomicBool,
}

/// A session that has no counter left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted;

/// Why a packet isn't taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketRefusal {
    /// It is not from the peer, or was changed on its way.
    Forged,
    /// It was taken before, or may have been.
    Replayed,
}

impl Session {
    /// A session with these two keys; `None` never happens with keys of the right length.
    pub(crate) fn new(
        (local, remote): (u32, u32),
        (sending, receiving): (&[u8; 32], &[u8; 32]),
        initiator: bool,
        born: u64,
    ) -> Option<Self> {
        let key = |bytes: &[u8; 32]| UnboundKey::new(&CHACHA20_POLY1305, bytes).ok().map(LessSafeKey::new);
        Some(Self {
            local,
            remote,
            initiator,
            born,
            sending: key(sending)?,
            receiving: key(receiving)?,
            counter: AtomicU64::new(0),
            window: Mutex::default(),
            confirmed: AtomicBool::new(initiator),
        })
    }

    /// Encrypts a packet in place: in front of it there is room for a header, behind it for a tag.
    ///
    /// # Errors
    /// [`Exhausted`]; nothing was changed.
    #[inline]
    pub fn seal(&self, datagram: &mut [u8]) -> Result<(), Exhausted> {
        let counter = self.counter.fetch_add(1, Ordering::Relaxed);
        if counter >= MAX_COUNTER {
            self.counter.fetch_sub(1, Ordering::Relaxed);
            return Err(Exhausted);
        }
        let (header, rest) = datagram.split_at_mut_checked(HEADER).ok_or(Exhausted)?;
        let (packet, tag) = rest.split_at_mut_checked(rest.len().saturating_sub(TAG)).ok_or(Exhausted)?;
        header[..4].copy_from_slice(&[4, 0, 0, 0]);
        header[4..8].copy_from_slice(&self.remote.to_le_bytes());
        header[8..].copy_from_slice(&counter.to_le_bytes());
        let sealed = self.sending.seal_in_place_separate_tag(nonce(counter), Aad::empty(), packet);
        tag.copy_from_slice(sealed.map_err(|_| Exhausted)?.as_ref());
        Ok(())
    }

    /// Decrypts a packet in place; gives its length, which is 0 for a keepalive. It begins behind the header.
    ///
    /// # Errors
    /// [`PacketRefusal`]; the packet must not be used then.
    #[inline]
    pub fn open(&self, datagram: &mut [u8], counter: u64) -> Result<usize, PacketRefusal> {
        if counter >= MAX_COUNTER {
            return Err(PacketRefusal::Replayed);
        }
        let sealed = datagram.get_mut(HEADER..).ok_or(PacketRefusal::Forged)?;
        let packet = self.receiving.open_in_place(nonce(counter), Aad::empty(), sealed);
        let len = packet.map_err(|_| PacketRefusal::Forged)?.len();
        // Only what is the peer's may move the window.
        if !self.window.lock().unwrap_or_else(PoisonError::into_inner).take(counter) {
            return Err(PacketRefusal::Replayed);
        }
        Ok(len)
    }

    /// Whether packets may be sent with it.
    #[inline]
    pub(crate) fn can_send(&self, now: u64) -> bool {
        now < self.born + REJECT_AFTER && self.counter.load(Ordering::Relaxed) < MAX_COUNTER
    }

    /// Whether packets may be taken with it.
    #[inline]
    pub(crate) fn can_receive(&self, now: u64) -> bool {
        now < self.born + REJECT_AFTER
    }

    /// Whether it is time for another one, as far as this side has to see to it.
    #[inline]
    pub(crate) fn is_old(&self, now: u64) -> bool {
        self.initiator && now >= self.born + REKEY_AFTER
            || self.counter.load(Ordering::Relaxed) >= REKEY_AFTER_PACKETS
    }

    /// A packet came: whether it is the first one, and with that the proof that the peer has the session.
    #[inline]
    pub(crate) fn confirm(&self) -> bool {
        !self.confirmed.load(Ordering::Relaxed) && !self.confirmed.swap(true, Ordering::Relaxed)
    }

    /// As if so many packets had been sent.
    #[cfg(test)]
    pub(crate) fn skip_to(&self, counter: u64) {
        self.counter.store(counter, Ordering::Relaxed);
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({:08x} to {:08x})", self.local, self.remote)
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wg::message::WireguardMessage;

    fn pair() -> (Session, Session) {
        let keys = ([1; 32], [2; 32]);
        (
            Session::new((1, 2), (&keys.0, &keys.1), true, 1).unwrap(),
            Session::new((2, 1), (&keys.1, &keys.0), false, 1).unwrap(),
        )
    }

    fn sealed(session: &Session, packet: &[u8]) -> Vec<u8> {
        let mut datagram = [&[0; HEADER], packet, &[0; TAG]].concat();
        session.seal(&mut datagram).unwrap();
        datagram
    }

    fn counter(datagram: &[u8]) -> u64 {
        let Some(WireguardMessage::Data { receiver: 2, counter }) = WireguardMessage::parse(datagram) else {
            panic!()
        };
        counter
    }

    #[test]
    fn a_packet_is_taken_once_and_unchanged_or_not_at_all() {
        let (a, b) = pair();
        let first = sealed(&a, b"a packet");
        let mut opened = first.clone();
        assert_eq!(b.open(&mut opened, counter(&first)), Ok(8));
        assert_eq!(&opened[HEADER..HEADER + 8], b"a packet");
        assert_eq!(b.open(&mut first.clone(), counter(&first)), Err(PacketRefusal::Replayed));
        let second = sealed(&a, b"a packet");
        assert_ne!(first[HEADER..], second[HEADER..], "no two are sealed alike");
        for at in 0..second.len() {
            let mut changed = second.clone();
            changed[at] ^= 1;
            match WireguardMessage::parse(&changed) {
                None => assert!(at < 4, "byte {at}"),
                // By the receiver the session is found.
                Some(_) if (4..8).contains(&at) => {}
                Some(WireguardMessage::Data { counter, .. }) => {
                    assert_eq!(b.open(&mut changed, counter), Err(PacketRefusal::Forged), "byte {at}");
                }
                Some(other) => panic!("byte {at}: {other:?}"),
            }
        }
        assert_eq!(b.open(&mut second.clone(), counter(&second)), Ok(8));
    }

    #[test]
    fn forged_packets_do_not_move_the_window() {
        let (a, b) = pair();
        let good = sealed(&a, b"x");
        for counter in [1 << 40, MAX_COUNTER - 1] {
            let mut forged = good.clone();
            forged[8..16].copy_from_slice(&counter.to_le_bytes());
            assert_eq!(b.open(&mut forged, counter), Err(PacketRefusal::Forged));
        }
        assert_eq!(b.open(&mut good.clone(), 0), Ok(1));
        assert_eq!(b.open(&mut good.clone(), MAX_COUNTER), Err(PacketRefusal::Replayed));
    }

    #[test]
    fn a_session_ends_before_its_counter_does() {
        let (a, _) = pair();
        a.skip_to(MAX_COUNTER - 1);
        assert!(a.can_send(1) && a.is_old(1));
        let last = sealed(&a, b"x");
        assert_eq!(counter(&last), MAX_COUNTER - 1);
        let mut room = vec![7; 40];
        for _ in 0..10 {
            assert_eq!(a.seal(&mut room), Err(Exhausted));
        }
        assert!(!a.can_send(1) && room == [7; 40]);
    }

    #[test]
    fn the_initiator_asks_for_another_session_after_two_minutes_and_nobody_uses_one_after_three() {
        let (a, b) = pair();
        assert!(!a.is_old(REKEY_AFTER) && a.is_old(REKEY_AFTER + 1) && !b.is_old(REJECT_AFTER));
        for session in [a, b] {
            assert!(session.can_send(REJECT_AFTER) && session.can_receive(REJECT_AFTER));
            assert!(!session.can_send(REJECT_AFTER + 1) && !session.can_receive(REJECT_AFTER + 1));
        }
    }
}
