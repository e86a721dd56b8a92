//! A finding: what was checked, and what came of it.

use serde::Serialize;

use crate::show::{Style, Tone};
use crate::text::clean;

/// Texts of others are cut to this many characters.
const MAX_TEXT: usize = 1000;

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum FindingState {
    Ok,
    Trouble,
    NotRun,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) state: FindingState,
    /// What was checked: the same word for the same check.
    pub(super) check: &'static str,
    /// What it is about.
    pub(super) object: String,
    /// What is so; why a check was not made.
    pub(super) cause: String,
    /// What to do; empty where nothing is.
    pub(super) remedy: String,
}

impl Finding {
    pub(super) fn ok(check: &'static str, cause: impl Into<String>) -> Self {
        Self::new(FindingState::Ok, check, String::new(), cause.into(), String::new())
    }

    pub(super) fn not_run(check: &'static str, why: impl Into<String>) -> Self {
        Self::new(FindingState::NotRun, check, String::new(), why.into(), String::new())
    }

    pub(super) fn trouble(
        check: &'static str,
        object: impl Into<String>,
        cause: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::new(FindingState::Trouble, check, object.into(), cause.into(), remedy.into())
    }

    /// A trouble in the agent's words, whose sentences end with the remedy.
    pub(super) fn said(check: &'static str, object: impl Into<String>, sentence: &str) -> Self {
        let (cause, remedy) = split(sentence);
        Self::trouble(check, object, cause, remedy)
    }

    fn new(state: FindingState, check: &'static str, object: String, cause: String, remedy: String) -> Self {
        let [object, cause, remedy] = [object, cause, remedy].map(|text| clean(&text, MAX_TEXT));
        Self { state, check, object, cause, remedy }
    }

    pub(super) fn is_trouble(&self) -> bool {
        self.state == FindingState::Trouble
    }
}

/// A sentence and the remedy behind its last colon, if there is one.
fn split(sentence: &str) -> (String, String) {
    match sentence.rsplit_once(": ") {
        Some((cause, remedy)) if remedy.split(' ').count() > 1 => (cause.to_owned(), remedy.to_owned()),
        _ => (sentence.to_owned(), "look at the log of flanneld on this node".to_owned()),
    }
}

/// A line for each, and one more with what to do.
pub(super) fn text(findings: &[Finding], style: Style) -> String {
    let mut text = String::new();
    for finding in findings {
        let Finding { check, object, cause, remedy, .. } = finding;
        let object = if object.is_empty() { String::new() } else { format!(" {object}") };
        let (mark, tone) = match finding.state {
            FindingState::Ok => ("✔", Tone::Good),
            FindingState::Trouble => ("✘", Tone::Bad),
            FindingState::NotRun => ("–", Tone::Unsure),
        };
        let not_run = if finding.state == FindingState::NotRun { "not checked: " } else { "" };
        text += &style.paint(tone, &format!("{mark} {check}{object}: {not_run}{cause}"));
        text.push('\n');
        if !remedy.is_empty() {
            text += &format!("  do: {remedy}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_with_its_remedy_below() {
        let findings = [
            Finding::ok("store", "it answers"),
            Finding::trouble("device", "flannel.1", "it is down\nreally", "ip link set flannel.1 up"),
            Finding::not_run("rules", "flanneld doctor is not root"),
        ];
        assert_eq!(
            text(&findings, Style::PLAIN),
            "✔ store: it answers\n✘ device flannel.1: it is down·really\n  do: ip link set flannel.1 up\n\
             – rules: not checked: flanneld doctor is not root\n"
        );
        assert!(text(&findings, Style::COLOURED).contains("\u{1b}[31m✘"));
    }

    #[test]
    fn sentences_of_the_agent_are_cut_before_their_remedy() {
        let finding =
            Finding::said("x", "o", "eth0 is set down, so no other node can be reached: ip link set eth0 up");
        assert_eq!(
            (finding.cause.as_str(), finding.remedy.as_str()),
            ("eth0 is set down, so no other node can be reached", "ip link set eth0 up")
        );
        assert!(Finding::said("x", "o", "it failed: EPERM").remedy.contains("log"));
    }
}
