//! Which handshake messages are computed, which are answered by a cookie, and which are dropped unseen.
//!
//! A handshake costs its receiver some hundred microseconds of curve arithmetic, and a sender nothing. Messages are told
//! apart by the address that they come from, because that is known before anything is computed: from where a peer is
//! expected, from another port of a peer's address, or from elsewhere. Each of these, and each source among them, has a
//! budget of its own, so a flood from one exhausts none of the others. Where the budget of a source is spent, a message
//! costs a look into a table.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use subnet::wireguard::PublicKey;

use super::cookie::{Codes, claims_proof};
use super::message::COOKIE;

/// What becomes of a handshake message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It is computed.
    Admitted,
    /// Its sender is asked to prove its address, by this reply.
    Asked([u8; COOKIE]),
    /// It has the wrong code: it is not for this node.
    Wrong,
    /// There are too many.
    Dropped,
}

/// Who can have sent a message, by the address that it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sender {
    /// A peer, from where it is expected.
    Peer,
    /// A peer behind address translation, or another process of its host: the address is a peer's, the port is not.
    PeerAddress,
    /// Anybody.
    Stranger,
}

/// What a message can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    /// Its handshake is computed although its sender has proved nothing.
    Unproven,
    /// It is answered by a cookie.
    Cookie,
    /// Its handshake is computed because its sender receives what is sent to its address.
    Proven,
    /// What it says to prove that is checked, which takes a microsecond.
    Check,
}

impl Service {
    const ALL: [Self; 4] = [Self::Unproven, Self::Cookie, Self::Proven, Self::Check];
}

/// How much of each service there is in a second; as much may be had at once.
#[derive(Clone, Copy, Debug)]
struct Rates([u32; 4]);

impl Sender {
    /// Of one source.
    fn rates(self) -> Rates {
        match self {
            Self::Peer => Rates([20, 5_000, 20, 100_000]),
            Self::PeerAddress => Rates([5, 50, 20, 1_000]),
            // Of one network, once somebody in it has proved its address.
            Self::Stranger => Rates([10, 500, 100, 1_000]),
        }
    }

    /// Of all sources of this kind.
    fn rates_of_all(self) -> Rates {
        match self {
            Self::Peer => Rates([500, 5_000, 1_000, 100_000]),
            Self::PeerAddress => Rates([50, 500, 1_000, 10_000]),
            Self::Stranger => Rates([10, 500, 500, 10_000]),
        }
    }
}

/// What is left of the services, in thousandths.
#[derive(Clone, Copy, Debug)]
struct Budget {
    left: [u32; 4],
    /// When it was refilled last; a second later it is full.
    refilled: u64,
}

impl Budget {
    fn full(rates: Rates, now: u64) -> Self {
        Self { left: rates.0.map(|rate| rate * 1000), refilled: now }
    }

    fn refill(&mut self, rates: Rates, now: u64) {
        let ms = now.saturating_sub(self.refilled).min(1000) as u32;
        for (left, rate) in self.left.iter_mut().zip(rates.0) {
            *left = (*left + ms * rate).min(rate * 1000);
        }
        self.refilled = now;
    }

    fn has(&self, service: Service) -> bool {
        self.left[service as usize] >= 1000
    }

    fn take(&mut self, service: Service) {
        let left = &mut self.left[service as usize];
        *left = left.saturating_sub(1000);
    }

    fn is_full(&self, now: u64) -> bool {
        now >= self.refilled + 1000
    }
}

/// What has a budget of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source {
    sender: Sender,
    address: IpAddr,
    /// 0: any.
    port: u16,
}

impl Source {
    fn new(sender: Sender, from: SocketAddr) -> Self {
        let (address, port) = match (sender, from.ip()) {
            (Sender::Peer, address) => (address, from.port()),
            (Sender::PeerAddress, address) => (address, 0),
            // A host can have any address of its link's network.
            (Sender::Stranger, IpAddr::V6(v6)) => {
                (Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(), 0)
            }
            (Sender::Stranger, address) => (address, 0),
        };
        Self { sender, address, port }
    }
}

/// So many sources are remembered at least before those that have been quiet are forgotten, and of strangers no more.
const MAX_SOURCES: usize = 1024;

/// Decides on handshake messages.
pub struct Gate {
    codes: Codes,
    totals: [Budget; 3],
    /// Of sources that have used something lately: peers, and strangers that have proved their address. Nobody can fill
    /// it with addresses that are not its own.
    sources: HashMap<Source, Budget>,
    swept: u64,
}

impl Gate {
    /// The gate of the node with this public key.
    pub fn new(own: &PublicKey) -> Self {
        let total = |sender: Sender| Budget::full(sender.rates_of_all(), 0);
        Self {
            codes: Codes::new(own),
            totals: [Sender::Peer, Sender::PeerAddress, Sender::Stranger].map(total),
            sources: HashMap::new(),
            swept: 0,
        }
    }

    /// Decides on a message with two codes.
    pub fn judge(&mut self, message: &[u8], from: SocketAddr, sender: Sender, now: u64) -> Admission {
        let source = Source::new(sender, from);
        let [unproven, cookie, proven, check] = self.affordable(source, now);
        let claims = proven && check && claims_proof(message);
        if !(unproven || cookie || claims) {
            return Admission::Dropped;
        }
        let proves =
            claims && self.spend(source, Service::Check, now) && self.codes.proves(message, from, now);
        let service = match (proves, unproven, cookie) {
            (true, ..) => Service::Proven,
            (false, true, _) => Service::Unproven,
            (false, false, true) => Service::Cookie,
            // What it claims to prove it does not.
            (false, false, false) => return Admission::Dropped,
        };
        if !self.codes.are_for_this_node(message) {
            return Admission::Wrong;
        }
        if !self.spend(source, service, now) {
            return Admission::Dropped;
        }
        match service {
            Service::Cookie => Admission::Asked(self.codes.reply(message, from, now)),
            Service::Unproven | Service::Proven | Service::Check => Admission::Admitted,
        }
    }

    /// Which services this source can still have.
    fn affordable(&mut self, source: Source, now: u64) -> [bool; 4] {
        let total = &mut self.totals[source.sender as usize];
        total.refill(source.sender.rates_of_all(), now);
        let own = self.sources.get_mut(&source);
        let own = own.map(|own| {
            own.refill(source.sender.rates(), now);
            *own
        });
        Service::ALL.map(|service| total.has(service) && own.is_none_or(|own| own.has(service)))
    }

    /// Takes a service from the budgets. Fails where too many strangers have proved their addresses.
    fn spend(&mut self, source: Source, service: Service, now: u64) -> bool {
        let stranger = source.sender == Sender::Stranger;
        // An address that is not proved may be any.
        if !stranger || service == Service::Proven {
            self.sweep(now);
            if stranger && self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&source) {
                return false;
            }
            let new = || Budget::full(source.sender.rates(), now);
            self.sources.entry(source).or_insert_with(new).take(service);
        }
        self.totals[source.sender as usize].take(service);
        true
    }

    /// Forgets the sources whose budgets are full, which is as if they had none, when there are many.
    fn sweep(&mut self, now: u64) {
        if self.sources.len() >= MAX_SOURCES && now >= self.swept + 1000 {
            self.swept = now;
            self.sources.retain(|_, budget| !budget.is_full(now));
            self.sources.shrink_to(MAX_SOURCES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::cookie::{COOKIE_AGE, mac1, mac2, read};
    use super::super::identity::Identity;
    use super::super::message::{INITIATION, MAC};
    use super::*;

    const FROM: &str = "192.0.2.1:51820";

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn message(to: &PublicKey) -> [u8; INITIATION] {
        let mut message = [7; INITIATION];
        message[INITIATION - MAC..].fill(0);
        mac1(to, &mut message);
        message
    }

    struct Bed {
        own: PublicKey,
        gate: Gate,
    }

    impl Bed {
        fn new() -> Self {
            let own = *Identity::generate().unwrap().public();
            Self { own, gate: Gate::new(&own) }
        }

        /// Admitted, asked and dropped of so many.
        fn flood(
            &mut self,
            message: &[u8],
            count: usize,
            sender: Sender,
            now: u64,
            from: impl Fn(usize) -> SocketAddr,
        ) -> [usize; 3] {
            let mut counts = [0; 3];
            for number in 0..count {
                match self.gate.judge(message, from(number), sender, now) {
                    Admission::Admitted => counts[0] += 1,
                    Admission::Asked(_) => counts[1] += 1,
                    Admission::Dropped => counts[2] += 1,
                    Admission::Wrong => panic!("the code is right"),
                }
            }
            counts
        }

        /// The message with the code for the cookie that this sender gets.
        fn proven(&mut self, from: SocketAddr, now: u64) -> [u8; INITIATION] {
            let mut proven = message(&self.own);
            let code = proven[INITIATION - 2 * MAC..INITIATION - MAC].try_into().unwrap();
            let reply = self.gate.codes.reply(&proven, from, now);
            mac2(&read(&self.own, &code, &reply).unwrap(), &mut proven);
            proven
        }
    }

    #[test]
    fn under_load_whoever_proves_its_address_is_heard_and_nobody_else() {
        let mut bed = Bed::new();
        let (from, other) = (at(FROM), at("192.0.2.1:6"));
        let unproven = message(&bed.own);
        let flood = bed.flood(&unproven, 100_000, Sender::Stranger, 1, |_| from);
        assert_eq!(flood, [10, 500, 99_490]);
        let proven = bed.proven(from, 1);
        assert_eq!(bed.gate.judge(&proven, from, Sender::Stranger, 1), Admission::Admitted);
        assert_eq!(
            bed.gate.judge(&proven, other, Sender::Stranger, 1),
            Admission::Dropped,
            "another's cookie"
        );
        let late = 1 + COOKIE_AGE;
        bed.flood(&unproven, 100_000, Sender::Stranger, late, |_| other);
        assert_eq!(
            bed.gate.judge(&proven, from, Sender::Stranger, late),
            Admission::Dropped,
            "it is too old"
        );
    }

    #[test]
    fn a_flood_from_one_source_leaves_the_budgets_of_all_others() {
        let mut bed = Bed::new();
        let unproven = message(&bed.own);
        // A proof that is none costs its sender the same as no proof.
        let mut lying = unproven;
        lying[INITIATION - MAC..].fill(0x5a);
        for message in [unproven, lying] {
            let elsewhere = |number: usize| SocketAddr::new(at(FROM).ip(), 1024 + (number % 60_000) as u16);
            let flood = bed.flood(&message, 100_000, Sender::PeerAddress, 1, elsewhere);
            assert!(flood[0] <= 5 && flood[1] <= 50, "{flood:?}");
            bed.flood(&message, 100_000, Sender::Stranger, 1, |_| at("198.51.100.1:1"));
        }
        // The same peer from where it is expected, another one behind address translation, another one.
        for (from, sender) in
            [(FROM, Sender::Peer), ("192.0.2.2:7", Sender::PeerAddress), ("192.0.2.2:51820", Sender::Peer)]
        {
            assert_eq!(bed.gate.judge(&unproven, at(from), sender, 1), Admission::Admitted, "{from}");
        }
        // Even where a peer's address and port are forged, others are not affected, and who proves it is heard.
        let flood = bed.flood(&unproven, 100_000, Sender::Peer, 2_000, |_| at(FROM));
        assert_eq!(flood, [20, 5_000, 94_980]);
        assert_eq!(
            bed.gate.judge(&unproven, at("192.0.2.3:51820"), Sender::Peer, 2_000),
            Admission::Admitted
        );
        let proven = bed.proven(at(FROM), 2_000);
        assert_eq!(bed.gate.judge(&proven, at(FROM), Sender::Peer, 2_000), Admission::Admitted);
    }

    #[test]
    fn proofs_that_are_none_are_checked_up_to_a_limit_and_those_of_peers_all_the_same() {
        let mut bed = Bed::new();
        let mut lying = message(&bed.own);
        lying[INITIATION - MAC..].fill(0x5a);
        for sender in [Sender::PeerAddress, Sender::Stranger] {
            let (from, other) = (at("198.51.100.1:1"), at("198.51.100.2:1"));
            let proven = bed.proven(from, 1);
            bed.flood(&lying, 100_000, sender, 1, |_| from);
            assert_eq!(bed.gate.judge(&proven, from, sender, 1), Admission::Dropped, "{sender:?}");
            // Of peers, each address has its own limit.
            let proven = bed.proven(other, 1);
            let admitted = bed.gate.judge(&proven, other, sender, 1) == Admission::Admitted;
            assert_eq!(admitted, sender == Sender::PeerAddress);
        }
        let proven = bed.proven(at(FROM), 1);
        bed.flood(&lying, 90_000, Sender::Peer, 1, |_| at(FROM));
        assert_eq!(bed.gate.judge(&proven, at(FROM), Sender::Peer, 1), Admission::Admitted);
    }

    #[test]
    fn a_proof_does_not_let_its_sender_have_as_much_as_it_likes() {
        let mut bed = Bed::new();
        for (sender, limit) in [(Sender::Peer, 20), (Sender::PeerAddress, 20), (Sender::Stranger, 100)] {
            let proven = bed.proven(at(FROM), 1);
            let admitted = |bed: &mut Bed, now| {
                let verdicts = (0..100_000).map(|_| bed.gate.judge(&proven, at(FROM), sender, now));
                verdicts.filter(|verdict| *verdict == Admission::Admitted).count()
            };
            // What it gets without the proof it got before.
            let unproven = message(&bed.own);
            bed.flood(&unproven, 100_000, sender, 1, |_| at(FROM));
            assert_eq!(admitted(&mut bed, 1), limit, "{sender:?}");
            assert!(admitted(&mut bed, 501) <= limit, "half a second later, {sender:?}");
        }
    }

    #[test]
    fn strangers_of_many_addresses_are_limited_together_and_forgotten() {
        let mut bed = Bed::new();
        let unproven = message(&bed.own);
        let mut admitted = 0;
        for number in 0..5_000_u32 {
            // Those of one /64 count as one.
            let address = Ipv6Addr::from_bits(0x2001_0db8 << 96 | u128::from(number) << 64 | 7);
            let from = SocketAddr::new(address.into(), 7);
            let proven = bed.proven(from, 1);
            admitted +=
                usize::from(bed.gate.judge(&proven, from, Sender::Stranger, 1) == Admission::Admitted);
        }
        assert!((500..=510).contains(&admitted), "{admitted}");
        assert!(bed.gate.sources.len() <= MAX_SOURCES);
        let same = |number: usize| {
            SocketAddr::new(Ipv6Addr::from_bits(0x2001_0db8 << 96 | number as u128).into(), 7)
        };
        let sources = bed.gate.sources.len();
        for number in 0..100 {
            let proven = bed.proven(same(number), 1_000);
            bed.gate.judge(&proven, same(number), Sender::Stranger, 1_000);
        }
        assert_eq!(bed.gate.sources.len(), sources, "one network");
        // Each peer has its own, however many there are; quiet ones are forgotten.
        let peer = |number: u32| SocketAddr::new(IpAddr::V4((0x0a00_0000 + number).into()), 51_820);
        for number in 0..5_000 {
            bed.gate.judge(&unproven, peer(number), Sender::Peer, 3_000);
        }
        assert!(bed.gate.sources.len() >= 5_000);
        bed.gate.judge(&unproven, peer(0), Sender::Peer, 5_000);
        assert!(bed.gate.sources.len() <= 2, "{}", bed.gate.sources.len());
    }

    #[test]
    fn a_message_for_another_node_is_not_computed() {
        let mut bed = Bed::new();
        let mut message = message(&bed.own);
        message[9] ^= 1;
        for sender in [Sender::Peer, Sender::PeerAddress, Sender::Stranger] {
            assert_eq!(bed.gate.judge(&message, at(FROM), sender, 1), Admission::Wrong);
        }
    }
}
