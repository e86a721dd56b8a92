//! Takes secrets out of text that is given to others; pure.

/// What stands before a secret, in lower case.
const NAMES: [&str; 9] = [
    "password",
    "passwd",
    "secret",
    "token",
    "privatekey",
    "private_key",
    "private-key",
    "presharedkey",
    "authorization",
];
/// What takes the place of a secret.
const MASK: &str = "***";

/// The text with the values of what is named like a secret replaced, and with user names and passwords of URLs.
pub(super) fn removed(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let mut in_key = false;
    for line in text.split_inclusive('\n') {
        // A key or certificate in PEM goes as a whole.
        in_key |= line.contains("-----BEGIN");
        if in_key {
            if line.contains("-----END") {
                in_key = false;
                result += "*** (a key or certificate)\n";
            }
            continue;
        }
        result += &without_credentials(&without_values(line));
    }
    result
}

/// The line without the word that follows the name of a secret; of `Authorization`, without all that follows.
fn without_values(line: &str) -> String {
    let lower = line.to_ascii_lowercase();
    let named = NAMES.iter().filter_map(|name| Some((lower.find(name)?, *name))).min();
    let Some((at, name)) = named else { return line.to_owned() };
    // The rest of the key, and what stands between it and its value.
    let (key, rest) = line.split_at(at + name.len());
    let (more, rest) = split(rest, |c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    let (between, rest) = split(rest, |c| matches!(c, '=' | ':' | ' ' | '\t' | '"' | '\'' | '\\'));
    let quote = between.chars().last().filter(|c| matches!(c, '"' | '\''));
    let (value, rest) = split(rest, |c| match quote {
        _ if name == "authorization" => c != '\n',
        Some(quote) => c != quote && c != '\n',
        None => !c.is_whitespace() && !matches!(c, ',' | '"' | '\'' | '}'),
    });
    let mask = if value.is_empty() { "" } else { MASK };
    format!("{key}{more}{between}{mask}{}", without_values(rest))
}

/// The begin of which all characters are so, and the rest.
fn split(text: &str, is_so: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !is_so(c)).unwrap_or(text.len()))
}

/// The line with `user:password@` of URLs replaced.
fn without_credentials(line: &str) -> String {
    let mut result = String::new();
    let mut rest = line;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        result += before;
        let end = after
            .find(|c: char| c.is_whitespace() || matches!(c, '/' | '"' | '\'' | ','))
            .unwrap_or(after.len());
        rest = match after[..end].rfind('@') {
            Some(sign) => {
                result += MASK;
                &after[sign..]
            }
            None => after,
        };
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_of_secrets_are_replaced_and_nothing_else() {
        for (text, expected) in [
            ("--etcd-password=hunter2 --iface=eth0\n", "--etcd-password=*** --iface=eth0\n"),
            ("FLANNELD_ETCD_PASSWORD=hunter2\n", "FLANNELD_ETCD_PASSWORD=***\n"),
            (r#"{"PrivateKey": "hunter2", "a": 1}"#, r#"{"PrivateKey": "***", "a": 1}"#),
            (r#"{"token":"hunter2","password":"hunter2"}"#, r#"{"token":"***","password":"***"}"#),
            ("Authorization: Bearer hunter2\n", "Authorization: ***\n"),
            ("flanneld --etcd-password hunter2 -v 1\n", "flanneld --etcd-password *** -v 1\n"),
            ("\"a\\\"token\\\":\\\"hunter2\\\"\"\n", "\"a\\\"token\\\":\\\"***\"\"\n"),
            (
                "https://me:hunter2@etcd:2379/x http://etcd:2379\n",
                "https://***@etcd:2379/x http://etcd:2379\n",
            ),
            ("the password is not used\n", "the password *** not used\n"),
            (
                "-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\nb\n",
                "*** (a key or certificate)\nb\n",
            ),
            (
                "route 10.244.7.0/24 via 10.244.7.0 dev flannel.1\n",
                "route 10.244.7.0/24 via 10.244.7.0 dev flannel.1\n",
            ),
        ] {
            assert_eq!(removed(text), expected);
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "(.|\n|password|=|:|\"|://|@|token| )*") {
            removed(&text);
        }

        #[test]
        fn no_secret_survives_behind_its_name(
            name in "[-A-Z_]{0,5}(password|Secret|TOKEN|privateKey)", sign in "(=|: ?|\": ?\")", rest in "( .*)?",
        ) {
            let text = format!("{name}{sign}hunter2{rest}");
            prop_assert!(!removed(&text).contains("hunter2"), "{}", removed(&text));
        }
    }
}
