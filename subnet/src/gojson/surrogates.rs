//! Escapes in texts of JSON that are half of a surrogate pair. Go reads each as a replacement character, serde_json refuses them.

use std::ops::RangeInclusive;

const FIRST_HALVES: RangeInclusive<u16> = 0xD800..=0xDBFF;
const SECOND_HALVES: RangeInclusive<u16> = 0xDC00..=0xDFFF;
/// `\uXXXX`.
const LENGTH: usize = 6;

/// A value of JSON whose escapes are characters or whole pairs.
pub(super) fn replaced(raw: &str) -> String {
    let mut text = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        let second = || unit(escape.get(LENGTH..)?);
        text += before;
        let length = match unit(escape) {
            None => escape.char_indices().nth(2).map_or(escape.len(), |(at, _)| at),
            Some(first) if FIRST_HALVES.contains(&first) => {
                if second().is_some_and(|second| SECOND_HALVES.contains(&second)) { 2 * LENGTH } else { 0 }
            }
            Some(first) if SECOND_HALVES.contains(&first) => 0,
            Some(_) => LENGTH,
        };
        if length == 0 {
            text += "\\ufffd";
        }
        text += &escape[..length];
        rest = &escape[if length == 0 { LENGTH } else { length }..];
    }
    text + rest
}

/// The UTF-16 unit of an escape that the text begins with.
fn unit(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..LENGTH - 2)?;
    u16::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn escapes_are_read_as_utf_16_is_read_that_may_be_damaged(
            units in prop::collection::vec(prop_oneof![any::<u16>(), 0xD7F0u16..0xE010], 0..20),
        ) {
            let escapes: String = units.iter().map(|unit| format!("\\u{unit:04x}")).collect();
            let read: String = serde_json::from_str(&replaced(&format!("\"{escapes}\""))).unwrap();
            prop_assert_eq!(read, String::from_utf16_lossy(&units));
        }

        #[test]
        fn what_serde_json_writes_stays_as_it_is_and_nothing_panics(text in any::<String>()) {
            let written = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(replaced(&written), written);
            let _ = replaced(&text);
        }
    }

    #[test]
    fn a_backslash_that_is_escaped_begins_no_escape() {
        assert_eq!(
            replaced(r#"["\\ud800", "\\\ud800", "\n\ud800"]"#),
            r#"["\\ud800", "\\\ufffd", "\n\ufffd"]"#
        );
    }
}
