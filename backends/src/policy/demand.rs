//! Which pods of other nodes have to be known: only those that a policy of a pod of this node may speak of.

use std::collections::BTreeSet;

/// With more namespaces than this, one watch of all pods takes less of the API server than a watch of each.
pub const DEMAND_MAX: usize = 64;

/// The pods of other nodes that have to be watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Demand {
    /// Those of these namespaces; none at all without any.
    Namespaces(BTreeSet<String>),
    /// All.
    Everything,
}

impl Demand {
    /// Of these namespaces, or of all if they are too many.
    pub(super) fn of(namespaces: BTreeSet<String>) -> Self {
        if namespaces.len() > DEMAND_MAX { Self::Everything } else { Self::Namespaces(namespaces) }
    }
}
