//! Cuts an answer of the API server into its objects while it arrives, so that no more than one object
//! is in memory at a time: a listing of 5,000 nodes has 50 to 100 MB.

use std::collections::VecDeque;

/// Nothing that Kubernetes stores comes near to this; an answer that does is not Kubernetes'.
pub(super) const LARGEST: usize = 16 << 20;
/// What is left of a node without its bulk has less than this.
const DEFAULT_CAPACITY: usize = 4 << 10;

/// The text is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer is not one of a Kubernetes API")]
pub(super) struct Unintelligible;

/// Where the objects are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// One after the other: a watch.
    Sequence,
    /// In the array that is a member of the outermost object: a list.
    List,
}

/// Members of objects that are left out, so that they need neither be kept nor decoded. Only objects and lists are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bulk {
    /// Members of the object.
    pub(super) members: &'static [&'static str],
    /// Members of its members.
    pub(super) parts: &'static [&'static str],
    /// Members of its members whose text is set aside: few objects need it.
    pub(super) aside: &'static [&'static str],
}

impl Bulk {
    /// Nothing is left out.
    pub(super) const NONE: Self = Self { members: &[], parts: &[], aside: &[] };
}

/// A reader of JSON that knows nothing but brackets and strings.
#[derive(Debug)]
pub(super) struct Splitter {
    form: Form,
    /// What of each object is replaced by `null`.
    bulk: Bulk,
    leaving_out: Option<LeavingOut>,
    depth: usize,
    in_string: bool,
    escaped: bool,
    in_items: bool,
    /// The object that is being read.
    item: Vec<u8>,
    /// What was set aside of it.
    aside: Vec<u8>,
    /// A list without its items.
    envelope: Vec<u8>,
    done: VecDeque<Cut>,
}

/// A member that is being left out.
#[derive(Clone, Copy, Debug)]
struct LeavingOut {
    /// The depth at which it began.
    depth: usize,
    /// Whether its text is set aside.
    aside: bool,
}

/// An object.
#[derive(Debug)]
pub(super) struct Cut {
    /// With `null` in place of what is left out.
    pub(super) json: Vec<u8>,
    /// The text of the member that was set aside; empty if it has none.
    pub(super) aside: Vec<u8>,
}

impl Splitter {
    /// For the events of a watch.
    pub(super) fn sequence() -> Self {
        Self::new(Form::Sequence)
    }

    /// For a list.
    pub(super) fn list() -> Self {
        Self::new(Form::List)
    }

    /// Leaves this out of each object.
    pub(super) fn without(self, bulk: Bulk) -> Self {
        Self { bulk, ..self }
    }

    fn new(form: Form) -> Self {
        Self {
            form,
            bulk: Bulk::NONE,
            leaving_out: None,
            depth: 0,
            in_string: false,
            escaped: false,
            in_items: false,
            item: Vec::new(),
            aside: Vec::new(),
            envelope: Vec::new(),
            done: VecDeque::new(),
        }
    }

    /// Takes what has arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), Unintelligible> {
        let base = self.base();
        let mut at = 0;
        while at < bytes.len() {
            if self.depth > base && self.at_items() {
                at += self.inside(&bytes[at..], base);
            } else {
                self.around(bytes[at], base)?;
                at += 1;
            }
        }
        match self.item.len().max(self.aside.len()).max(self.envelope.len()) {
            0..=LARGEST => Ok(()),
            _ => Err(Unintelligible),
        }
    }

    /// Takes what belongs to the object that is being read: how much that was. Nearly all that arrives comes
    /// here, so it looks only for what ends a string or begins something.
    fn inside(&mut self, bytes: &[u8], base: usize) -> usize {
        // In a watch the object is a member of the event.
        let members = base + 1 + usize::from(self.form == Form::Sequence);
        let (mut at, mut kept) = (0, 0);
        while at < bytes.len() {
            if self.in_string {
                at += self.string(&bytes[at..]);
                continue;
            }
            let Some(next) = bytes[at..].iter().position(|byte| STRUCTURE[usize::from(*byte)]) else { break };
            at += next + 1;
            match bytes[at - 1] {
                b'"' => self.in_string = true,
                b'{' | b'[' => {
                    let (dropped, aside): (&[_], &[_]) = match self.depth.checked_sub(members) {
                        Some(0) => (self.bulk.members, &[]),
                        Some(1) => (self.bulk.parts, self.bulk.aside),
                        _ => (&[], &[]),
                    };
                    if !(dropped.is_empty() && aside.is_empty()) && self.leaving_out.is_none() {
                        self.item.extend_from_slice(&bytes[kept..at - 1]);
                        kept = at - 1;
                        let is_aside = is_next(&self.item, aside);
                        if is_aside || is_next(&self.item, dropped) {
                            self.item.extend_from_slice(b"null");
                            if is_aside {
                                self.aside.reserve(DEFAULT_CAPACITY);
                            }
                            self.leaving_out = Some(LeavingOut { depth: self.depth, aside: is_aside });
                        }
                    }
                    self.depth += 1;
                }
                _ => {
                    self.depth -= 1;
                    if self.leaving_out.is_some_and(|left| left.depth == self.depth) {
                        self.take_part(&bytes[kept..at]);
                        self.leaving_out = None;
                        kept = at;
                    } else if self.depth == base {
                        self.item.extend_from_slice(&bytes[kept..at]);
                        let (json, aside) = (std::mem::take(&mut self.item), std::mem::take(&mut self.aside));
                        self.done.push_back(Cut { json, aside });
                        return at;
                    }
                }
            }
        }
        self.take_part(&bytes[kept..]);
        bytes.len()
    }

    /// Takes a part of the object, or of what is being left out of it.
    fn take_part(&mut self, bytes: &[u8]) {
        match self.leaving_out {
            None => self.item.extend_from_slice(bytes),
            Some(left) if left.aside => self.aside.extend_from_slice(bytes),
            Some(_) => {}
        }
    }

    /// How much of this belongs to the string that is being read.
    fn string(&mut self, bytes: &[u8]) -> usize {
        let mut at = usize::from(std::mem::take(&mut self.escaped));
        while let Some(next) = bytes[at..].iter().position(|byte| matches!(byte, b'"' | b'\\')) {
            at += next + 1;
            if bytes[at - 1] == b'"' {
                self.in_string = false;
                return at;
            }
            if at == bytes.len() {
                self.escaped = true;
                return at;
            }
            at += 1;
        }
        bytes.len()
    }

    /// Takes a byte that stands around the objects, or with which one begins.
    fn around(&mut self, byte: u8, base: usize) -> Result<(), Unintelligible> {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            self.envelope.push(byte);
            return Ok(());
        }
        let between = self.depth == base && self.at_items();
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => {
                self.depth += 1;
                if between {
                    self.item.reserve(DEFAULT_CAPACITY);
                    self.item.push(byte);
                    return Ok(());
                }
                self.in_items |= self.form == Form::List && self.depth == 2 && byte == b'[';
            }
            b'}' | b']' => {
                self.depth = self.depth.checked_sub(1).ok_or(Unintelligible)?;
                self.in_items &= self.depth >= 2;
            }
            b',' if between => return Ok(()),
            _ if between && byte.is_ascii_whitespace() => return Ok(()),
            _ => {}
        }
        self.envelope.push(byte);
        Ok(())
    }

    /// The next object that is complete.
    pub(super) fn next(&mut self) -> Option<Cut> {
        self.done.pop_front()
    }

    /// What stood around the objects, once everything has arrived: of a list everything but the items,
    /// of a watch nothing.
    pub(super) fn rest(&self) -> &[u8] {
        &self.envelope
    }

    /// The depth at which the objects begin.
    fn base(&self) -> usize {
        match self.form {
            Form::Sequence => 0,
            Form::List => 2,
        }
    }

    /// Whether what begins at the base is an object of interest.
    fn at_items(&self) -> bool {
        self.form == Form::Sequence || self.in_items
    }
}

/// What begins or ends something outside of strings.
const STRUCTURE: [bool; 256] = {
    let mut structure = [false; 256];
    let (all, mut index) = (*b"\"{}[]", 0);
    while index < all.len() {
        structure[all[index] as usize] = true;
        index += 1;
    }
    structure
};

/// Whether the value of a member with one of these names comes next.
fn is_next(text: &[u8], names: &[&str]) -> bool {
    let Some(text) = text.trim_ascii_end().strip_suffix(b":") else { return false };
    let Some(text) = text.trim_ascii_end().strip_suffix(b"\"") else { return false };
    names.iter().any(|name| {
        let before = text.strip_suffix(name.as_bytes()).and_then(|text| text.strip_suffix(b"\""));
        // What ends like this inside of a name has a backslash before the quotation mark.
        before.is_some_and(|text| matches!(text.trim_ascii_end().last(), Some(b'{' | b',')))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BULK: Bulk = Bulk { members: &["status"], parts: &["managedFields"], aside: &[] };

    fn split(mut splitter: Splitter, text: &str, piece: usize) -> (Vec<String>, String) {
        let mut items = Vec::new();
        for piece in text.as_bytes().chunks(piece) {
            splitter.push(piece).unwrap();
            while let Some(item) = splitter.next() {
                assert!(item.aside.is_empty());
                items.push(String::from_utf8(item.json).unwrap());
            }
        }
        (items, String::from_utf8(splitter.rest().to_vec()).unwrap())
    }

    const LIST: &str = r#"{"kind":"NodeList","metadata":{"resourceVersion":"7","x":{"y":[{"z":1}]}},"items":[ {"a":"}]\"{\\"},
        {"b":[{"c":{}}],"d":[]} ],"more":{"n":1}}"#;

    #[test]
    fn a_list_is_its_items_and_an_envelope_wherever_it_is_cut() {
        for piece in 1..LIST.len() {
            let (items, envelope) = split(Splitter::list(), LIST, piece);
            assert_eq!(items, [r#"{"a":"}]\"{\\"}"#, r#"{"b":[{"c":{}}],"d":[]}"#], "{piece}");
            let whole = r#"{"kind":"NodeList","metadata":{"resourceVersion":"7","x":{"y":[{"z":1}]}},"items":[],"more":{"n":1}}"#;
            assert_eq!(envelope, whole, "{piece}");
        }
        assert_eq!(split(Splitter::list(), r#"{"items":null}"#, 3), (vec![], r#"{"items":null}"#.into()));
        assert_eq!(split(Splitter::list(), r#"{"items":[]}"#, 3), (vec![], r#"{"items":[]}"#.into()));
    }

    #[test]
    fn a_watch_is_a_sequence_of_events_and_anything_else_stands_out() {
        let text = "{\"type\":\"ADDED\"}\n{\"type\":{\"x\":[]}}{}\n";
        for piece in 1..text.len() {
            let (items, rest) = split(Splitter::sequence(), text, piece);
            assert_eq!(items, [r#"{"type":"ADDED"}"#, r#"{"type":{"x":[]}}"#, "{}"]);
            assert_eq!(rest, "");
        }
        assert_eq!(split(Splitter::sequence(), "<html>", 2).1, "<html>");
        assert_eq!(Splitter::sequence().push(b"}"), Err(Unintelligible));
    }

    #[test]
    fn the_bulk_of_each_object_is_left_out_and_nothing_else() {
        let node = |fields: &str, status: &str| {
            format!(
                r#"{{"metadata":{{"managedFields":{fields},"status":{{"a":1}},"x\"status":{{"managedFields":[2]}}}},"status" : {status} ,"managedFields":[3],"x\"status":{{"b":[]}},"spec":{{"status":[1]}}}}"#
            )
        };
        let bulk = r#"{"images":[{"names":["}\"]{"]}],"status":{}}"#;
        let (whole, left) = (node(&format!("[{bulk},{{}}]"), bulk), node("null", "null"));
        let list =
            format!(r#"{{"metadata":{{"status":{{}}}},"status":{{"c":1}},"items":[{whole},{whole}]}}"#);
        let events = format!(
            "{{\"type\":\"ADDED\",\"object\":{whole}}}\n{{\"status\":{{}},\"object\":{{\"status\":\"Failure\"}}}}"
        );
        for piece in 1..list.len() {
            let (items, envelope) = split(Splitter::list().without(BULK), &list, piece);
            assert_eq!(items, [left.as_str(), &left], "{piece}");
            assert_eq!(envelope, r#"{"metadata":{"status":{}},"status":{"c":1},"items":[]}"#, "{piece}");
            let (items, rest) = split(Splitter::sequence().without(BULK), &events, piece);
            let first = format!(r#"{{"type":"ADDED","object":{left}}}"#);
            assert_eq!(items, [first.as_str(), r#"{"status":{},"object":{"status":"Failure"}}"#], "{piece}");
            assert_eq!(rest, "");
            assert_eq!(split(Splitter::list(), &list, piece).0, [whole.clone(), whole.clone()]);
        }
    }

    #[test]
    fn what_is_set_aside_of_an_object_is_not_lost_and_is_no_other_objects() {
        let aside = Bulk { members: &["status"], parts: &["x"], aside: &["managedFields"] };
        let text = r#"{"object":{"metadata":{"x":[1],"managedFields":[{"f:a\"}":{"managedFields":[]}}],"y":2},"status":{"z":{}}}}
            {"object":{"metadata":{"managedFields":7},"managedFields":[1]}}{"object":{"metadata":{"managedFields" : {}}}}"#;
        for piece in 1..text.len() {
            let mut splitter = Splitter::sequence().without(aside);
            text.as_bytes().chunks(piece).for_each(|piece| splitter.push(piece).unwrap());
            let cuts = std::iter::from_fn(|| splitter.next());
            let cuts =
                cuts.map(|cut| (String::from_utf8(cut.json).unwrap(), String::from_utf8(cut.aside).unwrap()));
            let of = |json: &str, aside: &str| (json.to_owned(), aside.to_owned());
            let expected = [
                of(
                    r#"{"object":{"metadata":{"x":null,"managedFields":null,"y":2},"status":null}}"#,
                    r#"[{"f:a\"}":{"managedFields":[]}}]"#,
                ),
                of(r#"{"object":{"metadata":{"managedFields":7},"managedFields":[1]}}"#, ""),
                of(r#"{"object":{"metadata":{"managedFields" : null}}}"#, "{}"),
            ];
            assert_eq!(cuts.collect::<Vec<_>>(), expected, "{piece}");
        }
    }

    #[test]
    fn an_endless_object_is_refused() {
        let mut splitter = Splitter::sequence();
        splitter.push(b"{\"a\":\"").unwrap();
        let refused = (0..40).any(|_| splitter.push(&vec![b'x'; 1 << 20]).is_err());
        assert!(refused);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in "[\\[\\]{}\",:\\\\ a1\n]{0,60}", piece in 1usize..9) {
            for mut splitter in [Splitter::list().without(BULK), Splitter::sequence().without(BULK), Splitter::list(), Splitter::sequence()] {
                for piece in bytes.as_bytes().chunks(piece) {
                    let _ = splitter.push(piece);
                    while splitter.next().is_some() {}
                }
            }
        }
    }
}
