//! Which pods a policy means.

use std::fmt;

use subnet::policy::Selector;

/// The pods that a [`subnet::policy::Peer`] describes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PodSelector {
    /// Where they are.
    pub scope: SelectorScope,
    /// Their labels.
    pub pods: Selector,
}

/// The namespaces of a [`PodSelector`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum SelectorScope {
    /// This one.
    Namespace(Box<str>),
    /// Those with such labels.
    Matching(Selector),
}

impl fmt::Display for PodSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.scope {
            SelectorScope::Namespace(name) => write!(f, "{name}: {}", self.pods),
            SelectorScope::Matching(labels) => write!(f, "namespaces {labels}: {}", self.pods),
        }
    }
}
