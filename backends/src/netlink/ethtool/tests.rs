//! Ethtool on the real kernel, with the program `ethtool` as the witness, and on answers that no kernel gives.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::generic::{answer, number};
use super::super::wire::{Head, messages};
use super::*;
use crate::testing::Namespace;

const NO_SUCH_DEVICE: i32 = 19;

/// What Debian's ethtool says about every feature of a device: whether it is on, and whether it was requested.
fn witness(namespace: &Namespace, device: &str) -> BTreeMap<String, (bool, bool)> {
    let told = namespace.command("ethtool").args(["-k", device]).ok().unwrap();
    let lines = told.lines().filter_map(|line| line.trim().split_once(": "));
    lines
        .map(|(name, state)| {
            let on = state.starts_with("on");
            (name.to_owned(), (on, if state.contains("[requested ") { !on } else { on }))
        })
        .collect()
}

fn index(namespace: &Namespace, device: &str) -> u32 {
    let told = namespace.command("ip").args(["-o", "link", "show", device]).ok().unwrap();
    told.split_once(':').unwrap().0.parse().unwrap()
}

#[test]
fn checksum_offload_goes_off_and_on_as_ethtool_sees_it_and_nobody_loses_other_wishes() {
    let namespace = Namespace::new().unwrap();
    namespace.ip("link add vx type vxlan id 1 dstport 8472\nlink set vx up").unwrap();
    let index = index(&namespace, "vx");
    let before = witness(&namespace, "vx");
    // Segmentation by the device needs its checksums, so it goes off with them, but stays wanted.
    let wishes = || {
        let mut features = witness(&namespace, "vx");
        features.retain(|name, _| name != TX_CHECKSUM && name != "tx-checksumming");
        features.into_iter().map(|(name, (_, wanted))| (name, wanted)).collect::<Vec<_>>()
    };
    let others = wishes();
    assert!(others.len() > 20 && before[TX_CHECKSUM].0, "{before:?}");
    let mut ethtool = Ethtool::new();
    for on in [true, false, false, true] {
        namespace.run(|| ethtool.set_tx_checksum(index, on)).unwrap();
        assert_eq!(ethtool.tx_checksum(index).unwrap(), on);
        assert_eq!(witness(&namespace, "vx")[TX_CHECKSUM], (on, on));
        assert_eq!(wishes(), others);
    }
    assert_eq!(witness(&namespace, "vx"), before);
}

#[test]
fn what_somebody_else_sets_is_seen() {
    let namespace = Namespace::new().unwrap();
    namespace.ip("link add vx type vxlan id 1 dstport 8472").unwrap();
    let index = index(&namespace, "vx");
    let mut ethtool = Ethtool::new();
    assert!(namespace.run(|| ethtool.tx_checksum(index)).unwrap());
    namespace.command("ethtool").args(["-K", "vx", TX_CHECKSUM, "off"]).ok().unwrap();
    assert!(!ethtool.tx_checksum(index).unwrap());
}

#[test]
fn a_device_that_is_not_there_is_refused_with_the_kernels_errno() {
    let namespace = Namespace::new().unwrap();
    let mut ethtool = Ethtool::new();
    let error = namespace.run(|| ethtool.tx_checksum(4_000_000)).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(NO_SUCH_DEVICE));
    let error = ethtool.set_tx_checksum(4_000_000, false).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(NO_SUCH_DEVICE));
    assert!(ethtool.tx_checksum(index(&namespace, "lo")).unwrap(), "the conversation goes on");
}

#[test]
fn a_device_that_does_not_let_its_feature_be_changed_is_an_error() {
    let namespace = Namespace::new().unwrap();
    let index = index(&namespace, "lo");
    let mut ethtool = Ethtool::new();
    namespace.run(|| ethtool.set_tx_checksum(index, true)).unwrap();
    let error = ethtool.set_tx_checksum(index, false).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    assert!(error.to_string().contains("index 1 stays on"), "{error}");
    assert!(ethtool.tx_checksum(index).unwrap());
}

/// A bitset with named bits, with or without a mask.
fn bitset(mask: bool, bits: &[(&str, bool)]) -> Vec<u8> {
    let mut w = Writer::default();
    if !mask {
        w.bytes_attribute(ETHTOOL_A_BITSET_NOMASK, &[]);
    }
    w.nest(ETHTOOL_A_BITSET_BITS, |w| {
        for (name, value) in bits {
            w.nest(ETHTOOL_A_BITSET_BITS_BIT, |w| {
                w.string(ETHTOOL_A_BITSET_BIT_NAME, name);
                if *value {
                    w.bytes_attribute(ETHTOOL_A_BITSET_BIT_VALUE, &[]);
                }
            });
        }
    });
    w.into_bytes()
}

#[test]
fn a_bit_is_on_by_being_listed_or_by_its_value_where_there_is_a_mask() {
    let (other, longer) = (("highdma", true), ("tx-checksum-ip-generic-too", true));
    assert_eq!(feature(&bitset(false, &[other, longer])), Some(Bit::Unlisted));
    assert_eq!(feature(&bitset(false, &[other, (TX_CHECKSUM, false)])), Some(Bit::On));
    assert_eq!(feature(&bitset(true, &[other, (TX_CHECKSUM, true)])), Some(Bit::On));
    assert_eq!(feature(&bitset(true, &[other, (TX_CHECKSUM, false)])), Some(Bit::Off));
    let mut compact = Writer::default();
    compact.bytes_attribute(4, &[0xff; 8]);
    assert_eq!(feature(compact.bytes()), None);
}

proptest! {
    #[test]
    fn arbitrary_answers_never_panic(bytes: Vec<u8>, kind in 0u16..5, body: Vec<u8>, at: usize, value: u8) {
        let read = |bytes: &[u8]| {
            for message in messages(bytes) {
                let _ = answer(&message, kind, |body| find(body, ETHTOOL_A_FEATURES_ACTIVE).and_then(feature));
                let _ = answer(&message, kind, number);
            }
        };
        read(&bytes);
        let _ = (feature(&bytes), number(&bytes));
        let framed = |body: &[u8]| {
            let mut w = Writer::default();
            let head = Head { kind, flags: 0, sequence: 1, own: [11, 1, 0, 0] };
            w.message(head, |w| w.bytes_attribute(ETHTOOL_A_FEATURES_ACTIVE, body));
            w.into_bytes()
        };
        read(&framed(&body));
        // One wrong byte anywhere in a right answer, and its end cut off there.
        let mut answer = framed(&bitset(true, &[("highdma", true), (TX_CHECKSUM, true)]));
        let at = at % answer.len();
        answer[at] = value;
        read(&answer);
        read(&answer[..at]);
    }
}
