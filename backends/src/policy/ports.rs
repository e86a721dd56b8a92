//! Lists of named ports, each kept once.

use subnet::policy::NamedPort;

use super::slots::{SlotIndex, Slots};

/// The number of the empty list, which is never kept.
const EMPTY: u32 = 0;

/// Lists by number.
#[derive(Debug, Default)]
pub(super) struct Ports {
    lists: Slots<PortList>,
    index: SlotIndex,
}

#[derive(Debug)]
struct PortList {
    ports: Box<[NamedPort]>,
    uses: u32,
}

impl Ports {
    /// The number of a list, used once more.
    pub(super) fn acquire(&mut self, list: &[NamedPort]) -> u32 {
        if list.is_empty() {
            return EMPTY;
        }
        if let Some(slot) = self.index.find(list, |slot| *self.lists[slot].ports == *list) {
            self.lists[slot].uses += 1;
            return slot + 1;
        }
        let slot = self.lists.add(PortList { ports: list.into(), uses: 1 });
        let lists = &self.lists;
        self.index.insert(slot, |slot| &*lists[slot].ports);
        slot + 1
    }

    /// Uses a list once less.
    pub(super) fn release(&mut self, number: u32) {
        let Some(slot) = number.checked_sub(1) else { return };
        let list = &mut self.lists[slot];
        list.uses -= 1;
        if list.uses == 0 {
            self.index.remove(slot, &*list.ports);
            list.ports = Box::default();
            self.lists.free(slot);
        }
    }

    pub(super) fn get(&self, number: u32) -> &[NamedPort] {
        number.checked_sub(1).map_or(&[], |slot| &self.lists[slot].ports)
    }
}

#[cfg(test)]
mod tests {
    use subnet::policy::Protocol;

    use super::*;

    #[test]
    fn equal_lists_have_one_number_until_the_last_use_ends() {
        let list = |port| [NamedPort { name: "web".into(), protocol: Protocol::Tcp, port }];
        let mut ports = Ports::default();
        let (a, b) = (ports.acquire(&list(1)), ports.acquire(&list(2)));
        assert_eq!((ports.acquire(&[]), ports.get(EMPTY).len(), ports.acquire(&list(1))), (EMPTY, 0, a));
        ports.release(EMPTY);
        ports.release(a);
        assert_eq!((ports.get(a), ports.get(b)), (&list(1)[..], &list(2)[..]));
        ports.release(a);
        assert_eq!(ports.acquire(&list(3)), a, "the number is used again");
        assert_eq!((ports.acquire(&list(2)), ports.get(a)), (b, &list(3)[..]));
    }
}
