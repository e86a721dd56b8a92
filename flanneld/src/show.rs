//! Text for people: columns, colours on a terminal, times.

mod all;
mod answers;
pub(crate) mod report;
pub(crate) mod status;
mod ways;
mod wrong;

use std::io::IsTerminal;

use crate::text::clean;

/// Cells are cut to this many characters …
const MAX_CELL: usize = 60;
/// … but the last of a row, where reasons stand, and nothing has to be aligned behind it.
const MAX_LAST: usize = 300;

/// Whether colours are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Style {
    colour: bool,
}

/// What a text is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Bad,
    Unsure,
    Plain,
}

impl Style {
    /// For standard output: colours only on a terminal, and not if `NO_COLOR` says so (no-color.org).
    pub(crate) fn of_stdout() -> Self {
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self { colour: std::io::stdout().is_terminal() && !no_colour && !dumb }
    }

    #[cfg(test)]
    pub(crate) const PLAIN: Self = Self { colour: false };
    #[cfg(test)]
    pub(crate) const COLOURED: Self = Self { colour: true };

    /// The text in the colour of its tone.
    pub(crate) fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => 32,
            Tone::Bad => 31,
            Tone::Unsure => 33,
            Tone::Plain => return text.to_owned(),
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// A table with a line of headings; columns are as wide as their longest cell.
#[derive(Default)]
pub(crate) struct TextTable {
    rows: Vec<(Tone, Vec<String>)>,
}

impl TextTable {
    pub(crate) fn new(headings: &[&str]) -> Self {
        let mut table = Self::default();
        table.row(Tone::Plain, headings.iter().copied());
        table
    }

    /// One row. Cells come from others, so control characters in them are replaced.
    pub(crate) fn row<T: AsRef<str>>(&mut self, tone: Tone, cells: impl IntoIterator<Item = T>) {
        let mut cells = cells.into_iter().peekable();
        let mut row = Vec::new();
        while let Some(cell) = cells.next() {
            row.push(clean(cell.as_ref(), if cells.peek().is_some() { MAX_CELL } else { MAX_LAST }));
        }
        self.rows.push((tone, row));
    }

    pub(crate) fn text(&self, style: Style) -> String {
        let columns = self.rows.iter().map(|(_, cells)| cells.len()).max().unwrap_or_default();
        let width = |column: usize| {
            // Nothing stands behind the last one.
            let cells = self.rows.iter().filter(|_| column + 1 < columns);
            let cells = cells.filter_map(|(_, cells)| cells.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (tone, cells) in &self.rows {
            let mut line = String::new();
            for (cell, width) in cells.iter().zip(&widths) {
                line += &format!("{cell:width$}  ");
            }
            text += &style.paint(*tone, line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// A span of time in two units at most: `3d04h`, `12m`, `4s`.
pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// A time in milliseconds, in as few digits as say something.
pub(crate) fn milliseconds(seconds: f64) -> String {
    match seconds * 1000.0 {
        // Nothing takes no time.
        value @ ..0.095 => format!("{:.2}", value.max(0.01)),
        value @ 0.095..9.95 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_cells_of_others_can_do_no_harm() {
        let mut table = TextTable::new(&["PEER", "STATE"]);
        table.row(Tone::Bad, ["a\u{1b}[2Jb\nc", "ok"]);
        table.row(Tone::Good, [&"n".repeat(253), "ok"]);
        let text = table.text(Style::PLAIN);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        let at =
            |line: &str, word: &str| line.chars().count() - line.split(word).nth(1).unwrap().chars().count();
        assert_eq!(at(lines[0], "STATE") - 5, at(lines[1], "ok") - 2);
        assert_eq!(at(lines[1], "ok"), at(lines[2], "ok"));
        assert!(!text.contains('\u{1b}') && lines[2].chars().count() < 80);
        table.row(Tone::Bad, ["b", &"w".repeat(400)]);
        let text = table.text(Style::PLAIN);
        assert!(text.lines().any(|line| line.contains(&"w".repeat(299)) && line.ends_with('…')), "{text}");
        assert!(text.lines().all(|line| line.contains("ww") || line.chars().count() < 80), "{text}");
        assert!(table.text(Style::COLOURED).contains("\u{1b}[31m"));
    }

    #[test]
    fn short_times_keep_a_digit_that_says_something() {
        for (seconds, text) in [
            (0.000_003, "0.01"),
            (0.000_034, "0.03"),
            (0.000_31, "0.3"),
            (0.009_94, "9.9"),
            (0.0123, "12"),
            (1.5, "1500"),
        ] {
            assert_eq!(milliseconds(seconds), text);
        }
    }

    #[test]
    fn spans_have_two_units_at_most() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (61, "1m"),
            (3600, "1h00m"),
            (7 * 3600 + 240, "7h04m"),
            (273_600, "3d04h"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }
}
