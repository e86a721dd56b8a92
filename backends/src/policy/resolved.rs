//! A selector in the numbers of interned strings, so that matching many label sets compares numbers instead of text.

use subnet::policy::{Operator, Selector};

use super::intern::{Id, Interner};

/// A selector for the label sets of one [`Interner`], good until strings come or go.
#[derive(Debug)]
pub(super) struct Resolved(Vec<Step>);

#[derive(Debug)]
enum Step {
    In(Id, Vec<Id>),
    NotIn(Id, Vec<Id>),
    Exists(Id),
    DoesNotExist(Id),
    /// No label set has the key that one must have.
    Never,
}

impl Resolved {
    /// Strings that the interner doesn't know are in no label set.
    pub(super) fn new(selector: &Selector, strings: &Interner) -> Self {
        let known = |values: &[Box<str>]| values.iter().filter_map(|value| strings.find(value)).collect();
        let steps = selector.requirements().iter().filter_map(|requirement| {
            let key = strings.find(&requirement.key);
            match (&requirement.operator, key) {
                (Operator::In(values), Some(key)) => Some(Step::In(key, known(values))),
                (Operator::NotIn(values), Some(key)) => Some(Step::NotIn(key, known(values))),
                (Operator::Exists, Some(key)) => Some(Step::Exists(key)),
                (Operator::DoesNotExist, Some(key)) => Some(Step::DoesNotExist(key)),
                (Operator::In(_) | Operator::Exists, None) => Some(Step::Never),
                (Operator::NotIn(_) | Operator::DoesNotExist, None) => None,
            }
        });
        Self(steps.collect())
    }

    /// A key and values, one of which a label set has that matches; `None` if it need not have any.
    pub(super) fn asked(&self) -> Option<(Id, &[Id])> {
        self.0.iter().find_map(|step| match step {
            Step::In(key, values) => Some((*key, values.as_slice())),
            Step::NotIn(..) | Step::Exists(_) | Step::DoesNotExist(_) | Step::Never => None,
        })
    }

    /// Whether a label set matches.
    pub(super) fn matches(&self, pairs: &[(Id, Id)]) -> bool {
        let value = |key: &Id| pairs.iter().find(|(found, _)| found == key).map(|(_, value)| value);
        self.0.iter().all(|step| match step {
            Step::In(key, values) => value(key).is_some_and(|value| values.contains(value)),
            Step::NotIn(key, values) => value(key).is_none_or(|value| !values.contains(value)),
            Step::Exists(key) => value(key).is_some(),
            Step::DoesNotExist(key) => value(key).is_none(),
            Step::Never => false,
        })
    }
}
