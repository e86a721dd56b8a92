//! Text from elsewhere, made fit for one line of a message: the one place that shortens and escapes it.
//!
//! Keys, values, names and error texts of others come from all that may write to the store, and every node
//! shows them in its log. So they can be of any length, end the line, or steer a terminal. And how far a misspelled word is
//! from a known one.

/// How many characters of foreign text a message shows.
const MAX_SHOWN: usize = 80;

/// At most 80 characters of foreign text, with everything escaped that is not visible on one line.
pub fn shortened(text: &str) -> String {
    shortened_to(text, MAX_SHOWN)
}

/// [`shortened`] for text that may be longer, such as a whole sentence of a server.
pub fn shortened_to(text: &str, most: usize) -> String {
    let mut short = String::with_capacity(text.len().min(most));
    let mut chars = text.chars();
    for c in chars.by_ref().take(most) {
        if is_invisible(c) { short.extend(c.escape_default()) } else { short.push(c) }
    }
    if chars.next().is_some() {
        short.push('…');
    }
    short
}

/// Control characters, and the format characters that hide text or change its direction.
fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// How many characters have to be inserted, removed, replaced, or swapped with their neighbour. Of a
/// long first text, only the beginning counts.
pub fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(40).collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<usize>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let above: &Vec<usize> = &rows[i - 1];
            let replaced = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_stays_on_one_line_and_is_cut_where_it_is_long() {
        assert_eq!(shortened("10.5.1.0-24"), "10.5.1.0-24");
        assert_eq!(shortened("a\nb\u{1b}[31m\u{202e}ü"), "a\\nb\\u{1b}[31m\\u{202e}ü");
        assert_eq!(shortened(&"ü".repeat(80)), "ü".repeat(80));
        assert_eq!(shortened(&"ü".repeat(81)), "ü".repeat(80) + "…");
        assert_eq!(shortened_to("abcd", 3), "abc…");
    }
}
