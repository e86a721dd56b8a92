//! Text of others, made fit for a line of a terminal or a label.

/// The text without control characters, cut to `most` characters. Names come from the API and from stores, whose
/// authors need not be those who read the terminal.
pub(crate) fn clean(text: &str, most: usize) -> String {
    let mut clean = String::new();
    let mut left = most;
    for char in text.trim_end_matches(['\n', '\r']).chars() {
        if left == 0 {
            clean.pop();
            clean.push('…');
            break;
        }
        // Also what changes the direction of writing, or is invisible.
        let hidden = matches!(char, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
        clean.push(if char.is_control() || hidden { '·' } else { char });
        left -= 1;
    }
    clean
}

/// An error with its causes, each said once: some errors have their cause in their own words already.
pub(crate) fn with_causes(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.contains(&cause) {
            continue;
        }
        text += if text.is_empty() { "" } else { ": " };
        text += &cause;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{clean, with_causes};

    #[test]
    fn what_controls_a_terminal_is_replaced_and_what_is_long_is_cut() {
        assert_eq!(clean("node \"a\"", 20), "node \"a\"");
        assert_eq!(clean("a\u{1b}[31mb\nc\u{202e}d", 20), "a·[31mb·c·d");
        assert_eq!(clean(&"ä".repeat(300), 5), "ääää…");
        assert_eq!(clean("12345", 5), "12345");
    }

    #[test]
    fn a_cause_that_was_said_is_not_said_again() {
        let cause = || std::io::Error::other("the port is taken");
        let twice = anyhow::Error::new(cause()).context("health can't be served: the port is taken: stop it");
        assert_eq!(with_causes(&twice), "health can't be served: the port is taken: stop it");
        let once = anyhow::Error::new(cause()).context("health can't be served");
        assert_eq!(with_causes(&once), "health can't be served: the port is taken");
    }
}
