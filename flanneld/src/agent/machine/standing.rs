//! How this node stands with its store: what an operator has to know of it, and when it is no longer ready.
//!
//! Nothing is wrong with packets while the store is away, so the node stays ready and says in readiness what is
//! to come. When the own lease ends, peers drop the node, so it is not ready from a while before that.

use std::time::{Duration, SystemTime};

use subnet::Tenure;

use crate::log::moment;

/// A node whose lease can't be renewed is not ready from this long before its end, so that pods can be moved in time.
const ENDS_SOON: Duration = Duration::from_secs(300);

/// What is wrong with the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StoreTrouble {
    /// Since when.
    pub(super) since: SystemTime,
    /// The store's reason.
    pub(super) why: String,
    /// It answers, and refuses this node.
    pub(super) refused: bool,
}

/// What follows for readiness.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Standing {
    /// For an operator who asks.
    pub(super) notes: Vec<String>,
    /// Why this node is not ready.
    pub(super) unready: Option<String>,
}

impl Standing {
    /// How things stand at a moment.
    pub(super) fn at(now: SystemTime, trouble: Option<&StoreTrouble>, tenure: &Tenure) -> Self {
        let ends = match tenure.ends {
            Some(ends) if ends <= now => format!("own lease ended at {}", moment(ends)),
            Some(ends) => format!("own lease ends at {}", moment(ends)),
            None => "own lease has no end".to_owned(),
        };
        let note = match (trouble, &tenure.trouble) {
            (Some(StoreTrouble { since, why, refused }), _) => {
                let state = if *refused { "refuses this node" } else { "unreachable" };
                Some(format!("store {state} since {} ({why}); {ends}", moment(*since)))
            }
            (None, Some(why)) if tenure.ends.is_some() => {
                Some(format!("the own lease can't be renewed ({why}); {ends}"))
            }
            (None, Some(why)) => Some(why.clone()),
            (None, None) => None,
        };
        let effect = match tenure.ends {
            Some(ends) if ends <= now => Some("peers have dropped this node"),
            Some(ends) if ends <= now + ENDS_SOON => Some("peers drop this node then"),
            _ => None,
        };
        let unready = note.as_ref().zip(effect).map(|(note, effect)| format!("{note}: {effect}"));
        Self { notes: note.into_iter().collect(), unready }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const T: SystemTime = SystemTime::UNIX_EPOCH;

    fn at(seconds: u64) -> SystemTime {
        T + Duration::from_secs(seconds)
    }

    #[test]
    fn a_store_that_is_away_is_noted_with_the_end_of_the_own_lease() {
        let trouble = StoreTrouble { since: at(60), why: "no answer".into(), refused: false };
        let tenure = Tenure { ends: Some(at(86_400)), trouble: None };
        let standing = Standing::at(at(61), Some(&trouble), &tenure);
        let note =
            "store unreachable since 01-01 00:01:00 UTC (no answer); own lease ends at 01-02 00:00:00 UTC";
        assert_eq!(standing, Standing { notes: vec![note.into()], unready: None });
        let refusal = StoreTrouble { refused: true, ..trouble.clone() };
        let standing = Standing::at(at(61), Some(&refusal), &tenure);
        assert!(standing.notes[0].starts_with("store refuses this node since 01-01"), "{standing:?}");
        assert_eq!(standing.unready, None);
        let endless = Standing::at(at(61), Some(&trouble), &Tenure::default());
        assert!(endless.notes[0].ends_with("own lease has no end"), "{endless:?}");
    }

    #[test]
    fn what_is_wrong_with_a_lease_that_has_no_end_is_noted_as_it_is() {
        let tenure = Tenure { ends: None, trouble: Some("no node \"a\" any more: restart kubelet".into()) };
        let notes = vec!["no node \"a\" any more: restart kubelet".to_owned()];
        assert_eq!(Standing::at(at(61), None, &tenure), Standing { notes, unready: None });
    }

    #[test]
    fn a_node_is_not_ready_before_a_lease_ends_that_cannot_be_renewed() {
        let trouble = StoreTrouble { since: at(60), why: "no answer".into(), refused: false };
        let tenure = Tenure { ends: Some(at(1000)), trouble: None };
        assert_eq!(Standing::at(at(699), Some(&trouble), &tenure).unready, None);
        let why = Standing::at(at(700), Some(&trouble), &tenure).unready.unwrap();
        assert!(why.ends_with("own lease ends at 01-01 00:16:40 UTC: peers drop this node then"), "{why}");
        // It is renewed in time as long as nothing is wrong.
        assert_eq!(Standing::at(at(999), None, &tenure), Standing::default());
    }

    #[test]
    fn a_node_whose_lease_has_ended_without_renewal_is_not_ready() {
        let trouble = StoreTrouble { since: at(60), why: "no answer".into(), refused: false };
        let tenure = Tenure { ends: Some(at(100)), trouble: None };
        let standing = Standing::at(at(100), Some(&trouble), &tenure);
        assert!(
            standing.unready.as_ref().unwrap().contains("own lease ended at 01-01 00:01:40 UTC"),
            "{standing:?}"
        );
        assert_eq!(standing.notes.len(), 1);
        let unrenewed = Tenure { trouble: Some("permission denied".into()), ..tenure.clone() };
        assert!(Standing::at(at(100), None, &unrenewed).unready.unwrap().contains("permission denied"));
        // Renewed a moment ago by a store that says nothing of trouble.
        assert_eq!(Standing::at(at(100), None, &tenure), Standing::default());
    }
}
