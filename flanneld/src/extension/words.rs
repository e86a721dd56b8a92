//! From a command to a program's arguments, as Go flannel does it: words are separated by white space and nothing else,
//! then variables are put in their place in each word. There is no shell, so what a variable contains is never a
//! command (contract §5.8).

use std::collections::BTreeMap;

/// The variables of a command, by name.
pub(super) type Variables = BTreeMap<String, String>;

/// The program and its arguments.
pub(super) fn words(command: &str, variables: &Variables) -> Vec<String> {
    command.split_whitespace().map(|word| expand(word, variables)).collect()
}

/// A word with `$NAME` and `${NAME}` replaced; a variable that is not set is empty (Go's `os.Expand`).
fn expand(word: &str, variables: &Variables) -> String {
    let mut expanded = String::with_capacity(word.len());
    let mut rest = word;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let (name, length) = name_at(after);
        match name {
            Some(name) => expanded.push_str(variables.get(name).map(String::as_str).unwrap_or_default()),
            // Not followed by a name.
            None if length == 0 => expanded.push('$'),
            // `${` without a name in it.
            None => {}
        }
        rest = &after[length..];
    }
    expanded.push_str(rest);
    expanded
}

/// The variable's name that follows a `$`, and how many bytes it takes with its braces.
fn name_at(text: &str) -> (Option<&str>, usize) {
    // What shells have as `$*`, `$#`, `$1`: one character is the whole name.
    let is_special = |c: char| "*#$@!?-".contains(c) || c.is_ascii_digit();
    let Some(first) = text.chars().next() else { return (None, 0) };
    if let Some(braced) = text.strip_prefix('{') {
        return match braced.find('}') {
            Some(0) => (None, 2),
            Some(end) => (Some(&braced[..end]), end + 2),
            None => (None, 1),
        };
    }
    if is_special(first) {
        return (Some(&text[..1]), 1);
    }
    let end = text.find(|c: char| !(c == '_' || c.is_ascii_alphanumeric())).unwrap_or(text.len());
    if end == 0 { (None, 0) } else { (Some(&text[..end]), end) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(command: &str) -> Vec<String> {
        let variables = [
            ("SUBNET", "10.244.2.0/24"),
            ("PUBLIC_IP", "192.0.2.2"),
            ("EVIL", "a b; $(x) `y` $SUBNET \"q\""),
            ("A", "x"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        words(command, &variables.into())
    }

    #[test]
    fn words_are_those_of_gos_fields_and_variables_those_of_its_expand() {
        for (command, words) in [
            (
                "ip route replace $SUBNET via $PUBLIC_IP",
                &["ip", "route", "replace", "10.244.2.0/24", "via", "192.0.2.2"][..],
            ),
            ("  a\t b\n\u{a0}c\u{3000}d ", &["a", "b", "c", "d"]),
            ("${SUBNET}x$A-$A_ $A.$A", &["10.244.2.0/24xx-", "x.x"]),
            ("$ a$ $$ $. ${} ${ ${A ${a-b}", &["$", "a$", "", "$.", "", "", "A", ""]),
            ("$1x $*A $NONE", &["x", "A", ""]),
            ("$é ${é}", &["$é", ""]),
            (
                "'a b' \"c\" >f | ; && $(date) `x`",
                &["'a", "b'", "\"c\"", ">f", "|", ";", "&&", "$(date)", "`x`"],
            ),
            ("", &[]),
        ] {
            assert_eq!(of(command), words, "{command:?}");
        }
    }

    #[test]
    fn what_a_variable_contains_is_one_argument_whatever_it_is() {
        assert_eq!(of("run $EVIL"), ["run", "a b; $(x) `y` $SUBNET \"q\""]);
    }
}
