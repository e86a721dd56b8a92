//! Plain tables for terminals.

use std::fmt;

/// A table with one line per row; columns of figures are aligned to the right.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column titles.
    pub(crate) fn new<T: Into<String>>(titles: impl IntoIterator<Item = T>) -> Self {
        Self { rows: vec![titles.into_iter().map(Into::into).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let cell = |row: &'_ Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
        let widths: Vec<usize> = (0..columns)
            .map(|column| self.rows.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0))
            .collect();
        let figures: Vec<bool> = (0..columns)
            .map(|column| self.rows[1..].iter().all(|row| is_figure(&cell(row, column))))
            .collect();
        for (number, row) in self.rows.iter().enumerate() {
            let mut line = String::new();
            for column in 0..columns {
                let (text, width) = (cell(row, column), widths[column]);
                line +=
                    &if figures[column] { format!("  {text:>width$}") } else { format!("  {text:width$}") };
            }
            writeln!(f, "{}", line.trim_end())?;
            if number == 0 {
                let rules: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
                writeln!(f, "  {}", rules.join("  "))?;
            }
        }
        Ok(())
    }
}

fn is_figure(cell: &str) -> bool {
    cell.parse::<f64>().is_ok() || matches!(cell, "" | "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_aligned_to_the_left_and_figures_to_the_right() {
        let mut table = Table::new(["node", "ms"]);
        table.row(["a", "1.50"]);
        table.row(["longer", "12.25"]);
        table.row(["none", "-"]);
        assert_eq!(
            table.to_string(),
            "  node       ms\n  ------  -----\n  a        1.50\n  longer  12.25\n  none        -\n"
        );
    }
}
