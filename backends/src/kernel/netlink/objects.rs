//! Nexthop objects as they are found: ours, and those that have ids of our range.

use std::collections::BTreeSet;
use std::io;

use super::nexthop::{self, NexthopEvent, Target};
use super::{Netlink, decode::RouteFacts};
use crate::kernel::Scope;
use crate::state::host::HostView;
use crate::state::name::Name;
use crate::state::nexthop::{NexthopId, NexthopSupport};

/// Objects of ours, sorted by their ids.
#[derive(Debug, Default)]
pub(super) struct Objects(Vec<(NexthopId, Target)>);

/// Which of them routes of ours lead through, by place.
#[derive(Debug)]
pub(super) struct Used {
    marks: Vec<bool>,
    /// The place that was marked last: of routes in the order of their destinations the next one's object is behind it.
    recent: usize,
}

impl Objects {
    /// Objects in the order in which the kernel told of them, which is mostly that of their ids. Of two with one id the later one
    /// counts.
    fn new(mut told: Vec<(NexthopId, Target)>) -> Self {
        if !told.is_sorted_by(|(one, _), (next, _)| one < next) {
            told.reverse();
            told.sort_by_key(|(id, _)| *id);
            told.dedup_by_key(|(id, _)| *id);
        }
        Self(told)
    }

    pub(super) fn unused(&self) -> Used {
        Used { marks: vec![false; self.0.len()], recent: 0 }
    }

    /// The place of an object, which is looked for behind the last one that was used first.
    fn find(&self, id: NexthopId, used: &Used) -> Option<usize> {
        let is_at = |place: &usize| self.0.get(*place).is_some_and(|(known, _)| *known == id);
        let next = Some(used.recent + 1).filter(is_at);
        next.or_else(|| self.0.binary_search_by_key(&id, |(known, _)| *known).ok())
    }

    /// The objects that no route leads through, with their devices.
    pub(super) fn orphans<'a>(
        &'a self,
        used: &'a Used,
        host: &'a HostView,
    ) -> impl Iterator<Item = (NexthopId, Option<Name>)> + 'a {
        let dev = |hop: &Target| Some(host.links.get(&hop.link?)?.name);
        let unused = self.0.iter().zip(&used.marks).filter(|(_, used)| !**used);
        unused.map(move |((id, hop), _)| (*id, dev(hop)))
    }
}

impl Used {
    /// A route of ours leads through the object at this place.
    pub(super) fn mark(&mut self, place: Option<usize>) {
        if let Some(place) = place {
            self.marks[place] = true;
            self.recent = place;
        }
    }

    pub(super) fn absorb(&mut self, other: &Self) {
        self.marks.iter_mut().zip(&other.marks).for_each(|(own, other)| *own |= other);
    }
}

impl Netlink {
    /// The objects of ours, and which ids of our range others have. A kernel that refuses the question has no objects.
    pub(super) fn nexthops(&mut self, scope: &Scope) -> io::Result<(Objects, NexthopSupport)> {
        let found = self.socket.dump_raw(&nexthop::all().into(), Default::default, |found, message| {
            let (ours, taken): &mut (Vec<(NexthopId, Target)>, BTreeSet<NexthopId>) = found;
            match nexthop::told(message) {
                Some(NexthopEvent::There(facts)) if !facts.marked => drop(taken.insert(facts.id)),
                Some(NexthopEvent::There(facts)) if scope.owns_nexthop(facts.id) => {
                    ours.push((facts.id, facts.hop))
                }
                _ => {}
            }
        });
        match found {
            Ok((ours, _)) if self.nexthops_refused => Ok((Objects::new(ours), NexthopSupport::Refused)),
            Ok((ours, taken)) => Ok((Objects::new(ours), NexthopSupport::Usable { taken })),
            Err(error) if nexthop::are_refused(&error) => Ok((Objects::default(), NexthopSupport::Refused)),
            Err(error) => Err(error),
        }
    }
}

impl RouteFacts {
    /// Takes next hop and device from the route's object, and gives its place. One that is not ours makes the route another
    /// program's.
    pub(super) fn lead_through(
        &mut self,
        objects: &Objects,
        used: &Used,
        name_of: impl Fn(u32) -> Option<Name>,
    ) -> Option<usize> {
        let place = objects.find(self.route.nexthop?, used);
        match place {
            Some(place) => {
                let (_, hop) = &objects.0[place];
                (self.route.via, self.route.onlink) = (hop.via, hop.onlink);
                if self.link != hop.link {
                    self.route.dev = hop.link.and_then(name_of);
                    self.link = hop.link;
                }
                self.route.foreign |= hop.foreign;
            }
            None => self.route.foreign = true,
        }
        place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(id: u32, link: u32) -> (NexthopId, Target) {
        let hop = Target { via: None, link: Some(link), onlink: false, foreign: false };
        (NexthopId::new(id).unwrap(), hop)
    }

    #[test]
    fn objects_are_found_in_any_order_and_of_two_with_one_id_the_later_one_counts() {
        let objects = Objects::new(vec![object(3, 1), object(1, 1), object(3, 2), object(2, 1)]);
        let mut used = objects.unused();
        for (id, link) in [(3, 2), (1, 1), (2, 1), (3, 2)] {
            let place = objects.find(NexthopId::new(id).unwrap(), &used).unwrap();
            assert_eq!(objects.0[place], object(id, link));
            used.mark(Some(place));
        }
        assert_eq!(objects.find(NexthopId::new(4).unwrap(), &used), None);
        assert_eq!(objects.orphans(&used, &HostView::default()).count(), 0);
        assert_eq!(objects.orphans(&objects.unused(), &HostView::default()).count(), 3);
    }
}
