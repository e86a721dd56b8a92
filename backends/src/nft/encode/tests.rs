use proptest::prelude::*;

use super::*;
use crate::nft::{KeyType, TableFamily};

fn bytes(changes: &[Change<'_>]) -> Vec<u8> {
    Transaction::new(changes, 7).unwrap().bytes().to_vec()
}

fn spans(len: usize, keys: &[u8]) -> impl Iterator<Item = Span> {
    keys.chunks_exact(len).map(|key| Span { from: key.into(), to: key.into() })
}

fn same_as_elements(set: &Set, keys: &[u8]) {
    let table = TableId::new(TableFamily::Inet, "t");
    let with_elements = set.clone().with(spans(set.key.len() as usize, keys));
    let as_elements = bytes(&[Change::AddElements { table: table.clone(), set: with_elements }]);
    assert_eq!(bytes(&[Change::AddKeys { table, set, keys }]), as_elements);
}

proptest! {
    #[test]
    fn keys_are_the_messages_of_elements(mut keys: Vec<[u8; 4]>, mut marks: Vec<u8>) {
        keys.sort_unstable();
        keys.dedup();
        same_as_elements(&Set::new("a", &[KeyType::Ipv4]).with_size(64), &keys.concat());
        // Of one byte, so that each is padded.
        marks.sort_unstable();
        marks.dedup();
        same_as_elements(&Set::new("a", &[KeyType::Protocol]), &marks);
    }
}

#[test]
fn many_keys_are_cut_into_messages_where_elements_are() {
    let fields = [KeyType::Ipv6, KeyType::Protocol, KeyType::Port];
    for count in [0u32, 1, 1000, 1100, 5000] {
        let keys = |repeat: usize| -> Vec<u8> {
            (0..count).flat_map(|key| key.to_be_bytes().repeat(repeat)).collect()
        };
        same_as_elements(&Set::new("a", &fields[..1]), &keys(4));
        same_as_elements(&Set::new("a", &fields), &keys(6));
        same_as_elements(&Set::new("a", &[KeyType::Ipv4]), &keys(1));
    }
}

#[test]
fn what_are_no_single_keys_of_the_set_is_refused() {
    let table = TableId::new(TableFamily::Inet, "t");
    let refused = |set: &Set, keys: &[u8]| {
        let changes = [Change::AddKeys { table: table.clone(), set, keys }];
        Transaction::new(&changes, 7).unwrap_err().to_string()
    };
    let set = Set::new("a", &[KeyType::Ipv4]);
    assert!(refused(&set, &[1; 5]).contains("5 bytes"), "{}", refused(&set, &[1; 5]));
    refused(&set.clone().with_ranges(), &[1; 4]);
    refused(&Set::verdict_map("a", &[KeyType::Ipv4]), &[1; 4]);
}
