//! What follows from handshake messages.

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};

use subnet::wireguard::PublicKey;

use super::cookie;
use super::device::{Device, REMEMBERED, lock};
use super::gate::Admission;
use super::indices::IndexEntry;
use super::ledger::HandshakeFault;
use super::message::{COOKIE, INITIATION, RESPONSE, WireguardMessage};
use super::session::Session;
use super::{Now, Outgoing, handshake};

/// Initiations of a peer that follow each other in less than so many milliseconds are not answered.
const MIN_BETWEEN_INITIATIONS: u64 = 20;
/// So many keys that are not known yet are remembered.
const MAX_REMEMBERED: usize = 64;

/// What a handshake message came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandshakeOutcome {
    /// A peer asks for a session, and is answered.
    Answered,
    /// A peer has answered: there is a session.
    Established,
    /// A peer or a stranger has to prove its address.
    Asked,
    /// This node has to prove its address, and will.
    Proving,
    /// It is not valid, or not from a known peer.
    Refused,
    /// There are too many.
    Dropped,
}

impl Device {
    /// A handshake message came.
    pub fn handshake(
        &self,
        datagram: &[u8],
        from: SocketAddr,
        now: Now,
        out: &mut Vec<Outgoing>,
    ) -> HandshakeOutcome {
        let message = match WireguardMessage::parse(datagram) {
            Some(WireguardMessage::Cookie(message)) => {
                return self.cookie(message, now).unwrap_or(HandshakeOutcome::Refused);
            }
            Some(message @ (WireguardMessage::Initiation(_) | WireguardMessage::Response(_))) => message,
            Some(WireguardMessage::Data { .. }) | None => return HandshakeOutcome::Refused,
        };
        let sender = self.sender(from);
        let verdict = lock(&self.gate).judge(datagram, from, sender, now.ms);
        match (verdict, message) {
            (Admission::Wrong, message) => {
                if matches!(message, WireguardMessage::Initiation(_)) {
                    self.blame(from.ip(), HandshakeFault::ForeignKey);
                }
                HandshakeOutcome::Refused
            }
            (Admission::Dropped, _) => HandshakeOutcome::Dropped,
            (Admission::Asked(reply), _) => {
                out.push(Outgoing { to: from, bytes: reply.to_vec() });
                HandshakeOutcome::Asked
            }
            (Admission::Admitted, WireguardMessage::Initiation(message)) => {
                self.initiation(message, from, now, out).unwrap_or(HandshakeOutcome::Refused)
            }
            (Admission::Admitted, WireguardMessage::Response(message)) => {
                self.response(message, from, now, out).unwrap_or(HandshakeOutcome::Refused)
            }
            (Admission::Admitted, _) => HandshakeOutcome::Refused,
        }
    }

    fn initiation(
        &self,
        message: &[u8; INITIATION],
        from: SocketAddr,
        now: Now,
        out: &mut Vec<Outgoing>,
    ) -> Option<HandshakeOutcome> {
        let secret = self.secret.read().unwrap_or_else(PoisonError::into_inner).clone();
        let heard = handshake::hear(&self.identity, secret.as_ref(), message)?;
        let Some(peer) = self.table.load().by_key.get(&heard.peer).cloned() else {
            self.remember(heard.peer, now);
            self.blame(from.ip(), HandshakeFault::UnknownKey);
            return None;
        };
        let mut negotiation = peer.negotiation();
        let hasty = negotiation.heard != 0 && now.ms < negotiation.heard + MIN_BETWEEN_INITIATIONS;
        if heard.timestamp <= negotiation.timestamp || hasty {
            return None;
        }
        (negotiation.timestamp, negotiation.heard) = (heard.timestamp, now.ms);
        let index = self.indices.file(IndexEntry { peer: Arc::clone(&peer), session: None });
        let session = heard.respond(index).and_then(|(message, keys, remote)| {
            let keys = (&keys.sending, &keys.receiving);
            Some((message, Arc::new(Session::new((index, remote), keys, false, now.ms)?)))
        });
        let Some((mut message, session)) = session else {
            self.indices.remove(index);
            return None;
        };
        self.indices
            .replace(index, IndexEntry { peer: Arc::clone(&peer), session: Some(Arc::clone(&session)) });
        self.indices.retire(negotiation.next.replace(session));
        self.indices.retire(negotiation.previous.take());
        self.is_at(&peer, from);
        peer.marks.heard(now.ms, false);
        peer.ledger.received(INITIATION);
        peer.ledger.sent(message.len());
        negotiation.prove(&mut message, now.ms);
        out.push(Outgoing { to: from, bytes: message.to_vec() });
        Some(HandshakeOutcome::Answered)
    }

    fn remember(&self, key: PublicKey, now: Now) {
        let mut unknown = lock(&self.unknown);
        unknown.retain(|(known, at)| *known != key && now.ms < at + REMEMBERED);
        if unknown.len() >= MAX_REMEMBERED {
            unknown.pop_front();
        }
        unknown.push_back((key, now.ms));
    }

    fn response(
        &self,
        message: &[u8; RESPONSE],
        from: SocketAddr,
        now: Now,
        out: &mut Vec<Outgoing>,
    ) -> Option<HandshakeOutcome> {
        let index = super::message::number(message, 8)?;
        let IndexEntry { peer, session: None } = self.find(index)? else { return None };
        let mut negotiation = peer.negotiation();
        let (begun, _) = negotiation.pending.as_mut().filter(|(_, pending)| *pending == index)?;
        let Some((keys, remote)) = begun.finish(message) else {
            peer.ledger.failed(HandshakeFault::PresharedKey);
            return None;
        };
        negotiation.pending = None;
        // It ends here no later than there.
        let (keys, born) = ((&keys.sending, &keys.receiving), negotiation.asked);
        let session = Arc::new(Session::new((index, remote), keys, true, born)?);
        self.indices
            .replace(index, IndexEntry { peer: Arc::clone(&peer), session: Some(Arc::clone(&session)) });
        let before = negotiation.current.replace(Arc::clone(&session));
        // Of two that were made at the same time, the peer may go on with the other one.
        let previous = match negotiation.next.take() {
            Some(next) => {
                self.indices.retire(before);
                Some(next)
            }
            None => before,
        };
        self.indices.retire(std::mem::replace(&mut negotiation.previous, previous));
        peer.sending.store(Some(Arc::clone(&session)));
        self.is_at(&peer, from);
        peer.marks.heard(now.ms, false);
        peer.ledger.received(RESPONSE);
        peer.ledger.succeeded(now.unix.as_secs());
        if negotiation.staged.is_empty() {
            // The peer may not send before it has heard something.
            self.send(&peer, &session, &[], now, out);
        }
        self.flush(&peer, &mut negotiation, &session, now, out);
        Some(HandshakeOutcome::Established)
    }

    fn cookie(&self, message: &[u8; COOKIE], now: Now) -> Option<HandshakeOutcome> {
        let IndexEntry { peer, .. } = self.find(super::message::number(message, 4)?)?;
        let mut negotiation = peer.negotiation();
        let cookie = cookie::read(&peer.key, &negotiation.mac1?, message)?;
        negotiation.cookie = Some((cookie, now.ms));
        Some(HandshakeOutcome::Proving)
    }
}
