//! YAML as a kubeconfig has it: a table of nodes in which each text is what is written, also if it looks like a number.
//!
//! A token may look like a number and a cluster's name like a date, so no text is ever taken for a value of another type.
//! An alias is a second way to the same node: it is not copied, so what a file takes in memory grows with its length alone.

use std::borrow::Cow;
use std::collections::HashMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use granit_parser::{Event, Options, Parser, ScalarStyle, ScanError, Tag};

use crate::text::shortened;

/// One member is looked for in so many mappings at most: merge keys (`<<`) can lead from each to many, and back.
const MAPPINGS: usize = 32;
const MAPPING: &str = "a mapping: write its members as \"name: value\", each on a line";

/// The documents of a text.
#[derive(Default)]
pub(super) struct Documents {
    nodes: Vec<YamlNode>,
    roots: Vec<usize>,
}

enum YamlNode {
    Null,
    Text(String),
    Sequence(Vec<usize>),
    /// Keys and values in turn.
    Mapping(Vec<usize>),
}

impl Documents {
    /// Reads all documents of `text`.
    ///
    /// # Errors
    /// What is wrong and where. Nothing of the text is in it, because that may be a secret.
    pub(super) fn read(text: &str) -> Result<Self, String> {
        let mut options = Options::default();
        options.set_emit_comments(false);
        let mut reading = YamlReader::default();
        for event in Parser::new_from_str_with_options(text, options) {
            let (event, _) = event.map_err(|error| described(&error))?;
            reading.take(event);
        }
        Ok(reading.done)
    }

    /// The documents that are not empty.
    pub(super) fn roots(&self) -> impl Iterator<Item = YamlValue<'_>> {
        let roots = self.roots.iter().map(|&node| YamlValue { all: self, node, at: String::new() });
        roots.filter(|root| !root.is_null())
    }
}

fn described(error: &ScanError) -> String {
    let mark = error.marker();
    format!("it is not YAML: line {}, column {}: {}", mark.line(), mark.col() + 1, error.info())
}

/// What has been read so far.
#[derive(Default)]
struct YamlReader {
    done: Documents,
    /// The sequences and mappings around the next node.
    open: Vec<usize>,
    anchors: HashMap<usize, usize>,
}

impl YamlReader {
    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let node = scalar(text, style, tag.as_deref());
                self.add(node, anchor);
            }
            Event::SequenceStart(_, anchor, _) => self.open(YamlNode::Sequence(Vec::new()), anchor),
            Event::MappingStart(_, anchor, _) => self.open(YamlNode::Mapping(Vec::new()), anchor),
            Event::SequenceEnd | Event::MappingEnd => drop(self.open.pop()),
            // The parser refuses an alias of what is unknown.
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(&node) => self.place(node),
                None => drop(self.add(YamlNode::Null, 0)),
            },
            _ => {}
        }
    }

    fn open(&mut self, node: YamlNode, anchor: usize) {
        let node = self.add(node, anchor);
        self.open.push(node);
    }

    fn add(&mut self, node: YamlNode, anchor: usize) -> usize {
        let at = self.done.nodes.len();
        self.done.nodes.push(node);
        if anchor != 0 {
            self.anchors.insert(anchor, at);
        }
        self.place(at);
        at
    }

    /// Puts a node where the text has it.
    fn place(&mut self, node: usize) {
        let around = self.open.last().and_then(|&around| self.done.nodes.get_mut(around));
        match around {
            Some(YamlNode::Sequence(items) | YamlNode::Mapping(items)) => items.push(node),
            _ => self.done.roots.push(node),
        }
    }
}

fn scalar(text: Cow<'_, str>, style: ScalarStyle, tag: Option<&Tag>) -> YamlNode {
    let suffix = tag.and_then(|tag| tag.suffix_in_namespace("tag:yaml.org,2002:"));
    if suffix.as_deref() == Some("binary") {
        let packed: String = text.split_ascii_whitespace().collect();
        let binary = STANDARD.decode(packed).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        return YamlNode::Text(binary.unwrap_or_else(|| text.into_owned()));
    }
    let nothing = matches!(text.as_ref(), "" | "~" | "null" | "Null" | "NULL");
    let is_null = nothing && style == ScalarStyle::Plain && tag.is_none();
    if is_null { YamlNode::Null } else { YamlNode::Text(text.into_owned()) }
}

/// A node of a document, and the way to it in words.
pub(super) struct YamlValue<'a> {
    all: &'a Documents,
    node: usize,
    at: String,
}

impl<'a> YamlValue<'a> {
    fn node(&self) -> &'a YamlNode {
        self.all.nodes.get(self.node).unwrap_or(&YamlNode::Null)
    }

    /// The way to it, such as `users[0].name`.
    pub(super) fn at(&self) -> &str {
        &self.at
    }

    fn is_null(&self) -> bool {
        matches!(self.node(), YamlNode::Null)
    }

    /// A member of a mapping; one that is null is as good as missing.
    ///
    /// # Errors
    /// This is no mapping, or the member is there twice.
    pub(super) fn member(&self, name: &str) -> Result<Option<Self>, String> {
        let value = self.merged(self.node, name, &mut MAPPINGS.clone())?;
        let at = if self.at.is_empty() { name.to_owned() } else { format!("{}.{name}", self.at) };
        Ok(value.map(|node| Self { all: self.all, node, at }).filter(|value| !value.is_null()))
    }

    /// The value of a member of this mapping, or else of one whose members it has by merge keys.
    fn merged(&self, mapping: usize, name: &str, left: &mut usize) -> Result<Option<usize>, String> {
        if *left == 0 {
            return Ok(None);
        }
        *left -= 1;
        let own = self.own(mapping, name)?;
        if own.is_some() {
            return Ok(own);
        }
        let Some(shared) = self.own(mapping, "<<")? else { return Ok(None) };
        let shared = match self.all.nodes.get(shared) {
            Some(YamlNode::Sequence(several)) => several.as_slice(),
            _ => &[shared],
        };
        for &mapping in shared {
            let found = self.merged(mapping, name, left)?;
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn own(&self, mapping: usize, name: &str) -> Result<Option<usize>, String> {
        let Some(YamlNode::Mapping(members)) = self.all.nodes.get(mapping) else {
            return Err(self.wrong(MAPPING));
        };
        let is_it =
            |key: &usize| matches!(self.all.nodes.get(*key), Some(YamlNode::Text(text)) if text == name);
        let mut found = members.chunks_exact(2).filter(|pair| pair.first().is_some_and(is_it));
        let value = found.next().and_then(|pair| pair.last().copied());
        if found.next().is_some() {
            let within = if self.at.is_empty() { String::new() } else { format!("{} ", self.at) };
            return Err(format!("{within}has {name} twice: remove one"));
        }
        Ok(value)
    }

    /// The members of a mapping that are not null, in the order of the file.
    ///
    /// # Errors
    /// This is no mapping.
    pub(super) fn members(&self) -> Result<Vec<(&'a str, Self)>, String> {
        let YamlNode::Mapping(members) = self.node() else { return Err(self.wrong(MAPPING)) };
        let pair = |pair: &[usize]| {
            let (key, value) = (pair.first()?, *pair.last()?);
            let Some(YamlNode::Text(name)) = self.all.nodes.get(*key) else { return None };
            let at = format!("{}.{}", self.at, shortened(name));
            Some((name.as_str(), Self { all: self.all, node: value, at }))
        };
        Ok(members.chunks_exact(2).filter_map(pair).filter(|(_, value)| !value.is_null()).collect())
    }

    /// The items of a list.
    ///
    /// # Errors
    /// This is no list.
    pub(super) fn items(&self) -> Result<Vec<Self>, String> {
        let YamlNode::Sequence(items) = self.node() else {
            return Err(self.wrong("a list: write each of its items behind \"- \""));
        };
        let item = |(index, &node)| Self { all: self.all, node, at: format!("{}[{index}]", self.at) };
        Ok(items.iter().enumerate().map(item).collect())
    }

    /// What is written, also if it looks like a number; nothing where it is null.
    ///
    /// # Errors
    /// This is no text.
    pub(super) fn text(&self) -> Result<&'a str, String> {
        match self.node() {
            YamlNode::Text(text) => Ok(text),
            YamlNode::Null => Ok(""),
            _ => Err(self.wrong("a text: put it into quotes if it begins with one of [ { - * & !")),
        }
    }

    /// The sentence for a value of another kind.
    fn wrong(&self, needed: &str) -> String {
        let at = if self.at.is_empty() { "the file" } else { &self.at };
        format!("{at} is not {needed}")
    }
}
