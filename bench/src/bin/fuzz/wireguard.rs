//! Random datagrams to a WireGuard device, and random counters to its window, compared with a set.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use backends::testing::Numbers;
use backends::wg::answers::HandshakeOutcome;
use backends::wg::identity::Identity;
use backends::wg::message::{COOKIE, HEADER, INITIATION, RESPONSE, TAG, WireguardMessage, sealed_len};
use backends::wg::window::{MAX_COUNTER, SIZE, Window};
use backends::wg::{Now, Outgoing};

use crate::sessions::{at, devices};

/// Inputs of a case.
const MESSAGES: usize = 2_000;
const HANDSHAKES: usize = 20;
const COUNTERS: usize = 2_000;

/// Gives how many inputs there were, and how many of them were taken.
pub(crate) fn case(seed: u64) -> (u64, u64) {
    let mut numbers = Numbers(!seed);
    let mut taken = messages(&mut numbers);
    taken += handshakes(&mut numbers);
    taken += counters(&mut numbers);
    ((MESSAGES + HANDSHAKES + COUNTERS) as u64, taken)
}

/// What is a message is decided by its length and its first four bytes alone.
fn messages(numbers: &mut Numbers) -> u64 {
    let mut taken = 0;
    let bytes = numbers.bytes(2048);
    for _ in 0..MESSAGES {
        let len = numbers.of(&[0, 1, 3, 4, 31, 32, 33, 63, 64, 65, 91, 92, 93, 147, 148, 149, 200, 1452]);
        let start = numbers.below(bytes.len() - 1500);
        let mut datagram = bytes[start..start + len].to_vec();
        let head =
            numbers.of(&[[1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0], [4, 0, 0, 0], [4, 1, 0, 0], [0; 4]]);
        datagram.iter_mut().zip(head).for_each(|(byte, head)| *byte = head);
        let right = match head {
            [1, 0, 0, 0] => len == INITIATION,
            [2, 0, 0, 0] => len == RESPONSE,
            [3, 0, 0, 0] => len == COOKIE,
            [4, 0, 0, 0] => len >= HEADER + TAG,
            _ => false,
        };
        let message = WireguardMessage::parse(&datagram);
        assert_eq!(message.is_some(), right && len >= 4, "{head:?} {len}");
        taken += u64::from(message.is_some());
        let mtu = numbers.below(9000);
        let sealed = sealed_len(len, mtu);
        assert!(sealed >= len + 32 && sealed < len + 48 && (sealed == len + 32 || sealed <= mtu + 32));
    }
    taken
}

/// Nothing but the messages of a peer gets an answer.
fn handshakes(numbers: &mut Numbers) -> u64 {
    let keys = [(); 2].map(|()| Arc::new(Identity::generate().expect("32 bytes are a key")));
    let now = Now { ms: 1_000, unix: Duration::from_secs(1_700_000_000) };
    let mut said: Vec<Outgoing> = Vec::new();
    let devices = devices(&keys, now, &mut said);
    let later = Now { ms: 3_000, ..now };
    devices[0].tick(later, &mut said);
    let initiation = said.pop().expect("a keepalive is due, and there is no session").bytes;
    let mut out = Vec::new();
    for _ in 0..HANDSHAKES {
        let mut changed = initiation.clone();
        let byte = numbers.below(INITIATION - 16);
        changed[byte] ^= 1 << numbers.below(8);
        devices[1].handshake(&changed, at(0), later, &mut out);
        assert_eq!(out, [], "byte {byte}");
    }
    assert_eq!(devices[1].handshake(&initiation, at(0), later, &mut out), HandshakeOutcome::Answered);
    assert_eq!(out.len(), 1);
    1
}

/// The window takes what a set of all counters would.
fn counters(numbers: &mut Numbers) -> u64 {
    let (mut window, mut seen) = (Window::default(), BTreeSet::new());
    let mut at = numbers.of(&[0, 1 << 32, MAX_COUNTER - 50_000]);
    let mut taken = 0;
    for _ in 0..COUNTERS {
        let step = numbers.of(&[1, 64, 500, SIZE, 3 * SIZE]);
        let step = numbers.next() % (step + 1);
        at = if numbers.one_in(3) { at.saturating_sub(step) } else { at.saturating_add(step) };
        let old = seen.last().is_some_and(|greatest| at.saturating_add(SIZE) <= *greatest);
        let new = at < MAX_COUNTER && !old && seen.insert(at);
        assert_eq!(window.take(at), new, "{at}");
        taken += u64::from(new);
        while seen.len() > 2 * SIZE as usize {
            seen.pop_first();
        }
    }
    taken
}
