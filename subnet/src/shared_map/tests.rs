//! A shared map is a `BTreeMap` in all but its costs.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Insert(u16, u8),
    Remove(u16),
    Change(u16, u8),
    /// Keys that leave this rest.
    Retain(u16),
    Extend(Vec<(u16, u8)>),
    Pack,
    /// What was there some steps ago counts again.
    Restore(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let keys = || 0u16..600;
    let step = prop_oneof![
        8 => (keys(), any::<u8>()).prop_map(|(key, value)| Step::Insert(key, value)),
        6 => keys().prop_map(Step::Remove),
        2 => (keys(), any::<u8>()).prop_map(|(key, value)| Step::Change(key, value)),
        1 => (2u16..9).prop_map(Step::Retain),
        2 => prop::collection::vec((keys(), any::<u8>()), 0..300).prop_map(Step::Extend),
        1 => Just(Step::Pack),
        1 => any::<usize>().prop_map(Step::Restore),
    ];
    prop::collection::vec(step, 1..40)
}

type Both = (SharedMap<u16, u8>, BTreeMap<u16, u8>);

fn take(step: Step, (shared, plain): &mut Both, earlier: &[Both]) {
    match step {
        Step::Insert(key, value) => assert_eq!(shared.insert(key, value), plain.insert(key, value)),
        Step::Remove(key) => assert_eq!(shared.remove(&key), plain.remove(&key)),
        Step::Change(key, value) => {
            if let Some(found) = shared.get_mut(&key) {
                *found = value;
            }
            plain.entry(key).and_modify(|found| *found = value);
        }
        Step::Retain(rest) => {
            shared.retain(|key, _| key % rest != 0);
            plain.retain(|key, _| key % rest != 0);
        }
        Step::Extend(entries) => {
            shared.extend(entries.clone());
            plain.extend(entries);
        }
        Step::Pack => shared.pack(),
        Step::Restore(index) => {
            if let Some((one, other)) = earlier.get(index % earlier.len().max(1)) {
                (*shared, *plain) = (one.clone(), other.clone());
            }
        }
    }
}

fn is_sound(shared: &SharedMap<u16, u8>) -> bool {
    let full = shared.parts.iter().all(|part| (1..=MAX_PART).contains(&part.len()));
    full && shared.keys().zip(shared.keys().skip(1)).all(|(one, next)| one < next)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn it_has_what_an_ordinary_map_has_and_versions_differ_in_what_was_changed(steps in steps()) {
        let (mut both, mut earlier): (Both, Vec<Both>) = Default::default();
        for step in steps {
            take(step, &mut both, &earlier);
            let (shared, plain) = &both;
            prop_assert!(is_sound(shared), "{shared:?}");
            prop_assert_eq!(shared.len(), plain.len());
            prop_assert!(shared.iter().eq(plain.iter()) && shared.iter().rev().eq(plain.iter().rev()));
            prop_assert_eq!(shared, &plain.clone().into_iter().collect::<SharedMap<_, _>>());
            for key in (0..600).step_by(37) {
                prop_assert_eq!(shared.get(&key), plain.get(&key));
                prop_assert_eq!(shared.last_before(&key), plain.range(..key).next_back());
                prop_assert_eq!(shared.first_after(&key), plain.range(key + 1..).next());
            }
            for (other, before) in &earlier {
                let keys: BTreeMap<u16, ()> = before.keys().chain(plain.keys()).map(|key| (*key, ())).collect();
                let all = keys.keys().map(|key| (key, before.get(key), plain.get(key)));
                prop_assert!(shared.side_by_side(other).eq(all.clone()));
                prop_assert!(shared.changes(other).eq(all.filter(|(_, was, now)| was != now)));
                prop_assert_eq!(shared == other, plain == before);
                let same = shared.clone().into_iter().collect::<SharedMap<_, _>>().sharing_with(other, u8::eq);
                prop_assert_eq!(&same, shared);
            }
            earlier.push(both.clone());
        }
    }
}

#[test]
fn a_change_leaves_all_but_one_part_shared() {
    let before: SharedMap<u32, u32> = (0..20_000).map(|key| (key * 2, key)).collect();
    let own = |now: &SharedMap<u32, u32>| {
        let shared = |part: &&Part<u32, u32>| before.parts.iter().any(|known| Arc::ptr_eq(known, part));
        now.parts.iter().filter(|part| !shared(part)).count()
    };
    let (mut more, mut less, mut other) = (before.clone(), before.clone(), before.clone());
    more.insert(20_001, 1);
    less.remove(&20_000);
    *other.get_mut(&20_000).unwrap() += 1;
    assert!(own(&more) <= 2 && own(&less) == 1 && own(&other) == 1);
    let remade = before.clone().into_iter().chain([(7, 7)]).collect::<SharedMap<_, _>>();
    assert!(own(&remade) > 100 && own(&remade.sharing_with(&before, u32::eq)) <= 2);
    assert_eq!((more.changes(&before).count(), less.changes(&before).count()), (1, 1));
}

#[test]
fn keys_that_come_in_order_and_those_that_are_collected_fill_the_parts() {
    let collected: SharedMap<u32, ()> = (0..1000).map(|key| (key, ())).collect();
    let mut inserted = SharedMap::default();
    inserted.extend((0..1000).map(|key| (key, ())));
    for map in [&collected, &inserted] {
        assert_eq!(map.parts.len(), 1000usize.div_ceil(MAX_PART));
        assert!(map.parts.iter().all(|part| part.capacity() <= MAX_PART));
    }
}
