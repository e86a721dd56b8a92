//! Cuts an answer of the API server into its objects while it arrives, so that no more than one object
//! is in memory at a time: a listing of 5,000 nodes has 50 to 100 MB.

use std::collections::VecDeque;

/// Nothing that Kubernetes stores comes near to this; an answer that does is not Kubernetes'.
const LARGEST: usize = 16 << 20;

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

/// A reader of JSON that knows nothing but brackets and strings.
#[derive(Debug)]
pub(super) struct Splitter {
    form: Form,
    depth: usize,
    in_string: bool,
    escaped: bool,
    in_items: bool,
    /// The object that is being read.
    item: Vec<u8>,
    /// A list without its items.
    envelope: Vec<u8>,
    done: VecDeque<Vec<u8>>,
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

    fn new(form: Form) -> Self {
        Self {
            form,
            depth: 0,
            in_string: false,
            escaped: false,
            in_items: false,
            item: Vec::new(),
            envelope: Vec::new(),
            done: VecDeque::new(),
        }
    }

    /// Takes what has arrived.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), Unintelligible> {
        let base = self.base();
        // Where the part of `bytes` begins that belongs to the object being read.
        let mut from = 0;
        for (at, byte) in bytes.iter().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                self.keep(*byte, base);
                continue;
            }
            match byte {
                b'"' => {
                    self.in_string = true;
                    self.keep(*byte, base);
                }
                b'{' | b'[' => {
                    if self.depth == base && self.at_items() {
                        from = at;
                    }
                    self.keep(*byte, base);
                    self.depth += 1;
                    self.in_items |= self.form == Form::List && self.depth == 2 && *byte == b'[';
                }
                b'}' | b']' => {
                    self.depth = self.depth.checked_sub(1).ok_or(Unintelligible)?;
                    if self.depth == base && self.at_items() {
                        self.item.extend_from_slice(&bytes[from..=at]);
                        self.done.push_back(std::mem::take(&mut self.item));
                        from = at + 1;
                        continue;
                    }
                    self.in_items &= self.depth >= 2;
                    self.keep(*byte, base);
                }
                _ => self.keep(*byte, base),
            }
        }
        if self.depth > base && self.at_items() {
            self.item.extend_from_slice(&bytes[from..]);
        }
        match self.item.len().max(self.envelope.len()) {
            0..=LARGEST => Ok(()),
            _ => Err(Unintelligible),
        }
    }

    /// The next object that is complete.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
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

    fn keep(&mut self, byte: u8, base: usize) {
        let between = self.depth == base && self.at_items() && (byte == b',' || byte.is_ascii_whitespace());
        let inside =
            self.at_items() && (self.depth > base || self.depth == base && matches!(byte, b'{' | b'['));
        if !between && !inside {
            self.envelope.push(byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(mut splitter: Splitter, text: &str, piece: usize) -> (Vec<String>, String) {
        let mut items = Vec::new();
        for piece in text.as_bytes().chunks(piece) {
            splitter.push(piece).unwrap();
            while let Some(item) = splitter.next() {
                items.push(String::from_utf8(item).unwrap());
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
    fn an_endless_object_is_refused() {
        let mut splitter = Splitter::sequence();
        splitter.push(b"{\"a\":\"").unwrap();
        let refused = (0..40).any(|_| splitter.push(&vec![b'x'; 1 << 20]).is_err());
        assert!(refused);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in "[\\[\\]{}\",:\\\\ a1\n]{0,60}", piece in 1usize..9) {
            for mut splitter in [Splitter::list(), Splitter::sequence()] {
                for piece in bytes.as_bytes().chunks(piece) {
                    let _ = splitter.push(piece);
                    while splitter.next().is_some() {}
                }
            }
        }
    }
}
