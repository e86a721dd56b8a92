//! Figures with their limits and the conditions they were taken under, as JSON lines and as a table.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Map, Value, json};

/// A measured quantity, one value per round.
pub struct Figure {
    /// What was measured, the same in every run.
    pub name: String,
    /// Of the values; empty for numbers of things.
    pub unit: &'static str,
    /// What to keep to.
    pub limit: Limit,
    /// The values.
    pub rounds: Vec<f64>,
    /// A value of all rounds together that counts instead of their median, such as a ratio of medians.
    pub overall: Option<f64>,
}

/// What a figure has to keep to.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// The median must not be above.
    Median(f64),
    /// The median must not be below.
    AtLeast(f64),
    /// No round must be above.
    Each(f64),
    /// It is there for comparison.
    None,
}

/// A figure that is still to be measured: its name, its unit and its limit.
pub type Row<'a> = (&'a str, &'static str, Limit);

impl Figure {
    /// A figure whose rounds are still to be measured.
    pub fn new(name: impl Into<String>, unit: &'static str, limit: Limit) -> Self {
        Self { name: name.into(), unit, limit, rounds: Vec::new(), overall: None }
    }

    /// The median of its rounds; 0 without one.
    pub fn median(&self) -> f64 {
        median(self.rounds.clone())
    }
}

/// A time in milliseconds.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Where results go, and what they have in common.
pub struct Record {
    file: File,
    common: Map<String, Value>,
    load: String,
    date: String,
    lines: Vec<Value>,
}

impl Record {
    /// Appends to `path`; `programs` is the directory of what is measured.
    pub fn open(path: &Path, programs: &Path) -> anyhow::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).with_context(|| format!("can't make {}", directory.display()))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("can't write {}: give another --out", path.display()))?;
        let common = conditions(programs)?;
        Ok(Self { file, common, load: String::new(), date: String::new(), lines: Vec::new() })
    }

    /// Adds a condition to all results; that named `setup` is shown under the table.
    pub fn note(&mut self, key: &str, value: Value) {
        self.common.insert(key.to_owned(), value);
    }

    /// Notes load and time at the start of a measurement.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        let load = contents("/proc/loadavg")?;
        self.load = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
        self.date = said("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"])?;
        Ok(())
    }

    /// Writes a figure, to the file and to the standard output.
    pub fn put(&mut self, figure: &Figure) -> anyhow::Result<()> {
        let mut line = describe(figure)?;
        line.extend(self.common.clone());
        line.insert("load".to_owned(), json!(self.load));
        line.insert("date".to_owned(), json!(self.date));
        let line = Value::Object(line);
        writeln!(self.file, "{line}").context("can't write a result to the file")?;
        writeln!(io::stdout(), "{line}").context("can't write a result to the standard output")?;
        self.lines.push(line);
        Ok(())
    }

    /// All that was written, as a table.
    pub fn table(&self, table: fn(&[Value]) -> String) -> String {
        table(&self.lines)
    }
}

/// The latest line of each figure, in the order of the text.
fn parse(text: &str) -> anyhow::Result<Vec<Value>> {
    let mut latest: BTreeMap<String, (usize, Value)> = BTreeMap::new();
    for (number, line) in text.lines().enumerate() {
        let value: Value = serde_json::from_str(line)
            .with_context(|| format!("line {} is not a result; delete it", number + 1))?;
        let name = value["name"].as_str().unwrap_or_default().to_owned();
        latest.insert(name, (number, value));
    }
    let mut lines: Vec<(usize, Value)> = latest.into_values().collect();
    lines.sort_by_key(|(number, _)| *number);
    Ok(lines.into_iter().map(|(_, line)| line).collect())
}

/// The latest line of each figure in the file `path`.
pub fn read(path: &Path) -> anyhow::Result<Vec<Value>> {
    let at = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("can't read {at}: measure first"))?;
    parse(&text).with_context(|| format!("{at} can't be used"))
}

/// Prints a table of these lines to the standard output.
pub fn print(lines: &[Value], table: fn(&[Value]) -> String) -> anyhow::Result<()> {
    write!(io::stdout(), "{}", table(lines)).context("can't write to the standard output")
}

/// A table of all figures; under it the conditions.
pub fn table(lines: &[Value]) -> String {
    let titles = ["figure", "unit", "median", "range", "rounds", "limit", "met"].map(str::to_owned);
    let rows = [titles].into_iter().chain(lines.iter().map(row)).map(Vec::from).collect::<Vec<_>>();
    format!("{}\n{}", markdown(&rows), conditions_of(lines))
}

/// A Markdown table that is a table for the eye, too; the first row has the titles.
pub fn markdown(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:width$}")).collect();
        text += &format!("| {} |\n", cells.join(" | "));
        if number == 0 {
            let rules: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
            text += &format!("| {} |\n", rules.join(" | "));
        }
    }
    text
}

/// What the figures were taken under, in lines of text.
pub fn conditions_of(lines: &[Value]) -> String {
    let mut text = String::new();
    let conditions: BTreeSet<String> = lines.iter().map(condition).collect();
    conditions.into_iter().for_each(|line| text += &format!("{line}\n"));
    let loads = lines.iter().filter_map(|line| line["load"].as_str()?.split(' ').next()?.parse::<f64>().ok());
    let (least, most) =
        loads.fold((f64::MAX, 0.0f64), |(least, most), load| (load.min(least), load.max(most)));
    if least <= most {
        text += &format!("Load average (1 min) at the start of the measurements: {least} to {most}.\n");
    }
    text
}

fn row(line: &Value) -> [String; 7] {
    let text = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
    let number = |key: &str| line[key].as_f64().map(short);
    let [limit, met] = judgement(line);
    [
        text("name"),
        text("unit"),
        number("overall").or_else(|| number("median")).unwrap_or_default(),
        format!("{} … {}", number("min").unwrap_or_default(), number("max").unwrap_or_default()),
        line["rounds"].as_array().map(Vec::len).unwrap_or_default().to_string(),
        limit,
        met,
    ]
}

/// The limit of a figure and whether it is met, both empty without one.
pub fn judgement(line: &Value) -> [String; 2] {
    let limit = line["limit"].as_f64().map(short).map(|limit| match line["judged"].as_str() {
        Some("each") if limit == "0" => "0 in each round".to_owned(),
        Some("each") => format!("≤ {limit} in each round"),
        Some("median-at-least") => format!("≥ {limit}"),
        _ => format!("≤ {limit}"),
    });
    let met = line["met"].as_bool().map(|met| if met { "yes" } else { "**no**" });
    [limit.unwrap_or_default(), met.unwrap_or_default().to_owned()]
}

fn condition(line: &Value) -> String {
    let text = |key: &str| line[key].as_str().unwrap_or("?").to_owned();
    let setup = line["setup"].as_str().map(|setup| format!(", {setup}")).unwrap_or_default();
    format!(
        "Linux {}, {} ({} CPUs), {}, temporary files on {}, {} programs, sources at {}{setup}, {}.  ",
        text("kernel"),
        text("cpu"),
        line["cores"],
        text("etcd"),
        text("files"),
        text("profile"),
        text("commit"),
        text("date").split('T').next().unwrap_or_default()
    )
}

/// Few digits, and none that say nothing.
pub fn short(number: f64) -> String {
    let digits = match number.abs() {
        size if size >= 100.0 || number.fract() == 0.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{number:.digits$}")
}

fn describe(figure: &Figure) -> anyhow::Result<Map<String, Value>> {
    let Figure { name, unit, rounds, overall, .. } = figure;
    ensure!(!rounds.is_empty(), "{name} has no rounds");
    let (min, max) =
        (rounds.iter().copied().fold(f64::MAX, f64::min), rounds.iter().copied().fold(f64::MIN, f64::max));
    let median = figure.median();
    let counts = overall.unwrap_or(median);
    let (judged, limit, value) = match figure.limit {
        Limit::Median(limit) => ("median", Some(limit), counts),
        Limit::AtLeast(limit) => ("median-at-least", Some(limit), counts),
        Limit::Each(limit) => ("each", Some(limit), max),
        Limit::None => ("", None, counts),
    };
    let met = limit.map(|limit| if judged == "median-at-least" { value >= limit } else { value <= limit });
    let judged = limit.map(|_| judged);
    Ok(object(json!({
        "name": name, "value": value, "unit": unit, "limit": limit, "judged": judged, "met": met,
        "rounds": rounds, "median": median, "overall": overall, "min": min, "max": max,
    })))
}

fn object(value: Value) -> Map<String, Value> {
    let Value::Object(members) = value else { unreachable!("it was written as an object") };
    members
}

/// The value in the middle; 0 if there is none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match (values.len() / 2, values.len() % 2) {
        (0, 0) => 0.0,
        (half, 0) => f64::midpoint(values[half - 1], values[half]),
        (half, _) => values[half],
    }
}

/// The least value that 99 of 100 don't exceed (nearest rank); 0 if there is none.
pub fn percentile_99(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get((sorted.len() * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default()
}

/// What all results of one run have in common.
fn conditions(programs: &Path) -> anyhow::Result<Map<String, Value>> {
    let cpus = contents("/proc/cpuinfo")?;
    let cpu = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let profile = programs.file_name().map(|name| name.to_string_lossy().into_owned());
    let temporary = std::env::temp_dir();
    let temporary = temporary.to_str().context("the directory for temporary files is not UTF-8")?;
    Ok(object(json!({
        "kernel": contents("/proc/sys/kernel/osrelease")?,
        "cpu": cpu.map_or("unknown", |(_, cpu)| cpu.trim()),
        "cores": std::thread::available_parallelism().map(usize::from).unwrap_or_default(),
        "commit": commit(),
        "profile": profile,
        "etcd": said("etcd", &["--version"])?.lines().next().unwrap_or_default().replace(" Version:", ""),
        "files": said("stat", &["-f", "-c", "%T", temporary])?,
    })))
}

/// The commit of the sources, with `-dirty` if they differ from it.
fn commit() -> String {
    let git = |args: &[&str]| {
        // The sources may belong to somebody else than who measures (sudo).
        let first = ["-c", "safe.directory=*", "-C", env!("CARGO_MANIFEST_DIR")];
        said("git", &[&first, args].concat())
    };
    match (git(&["rev-parse", "--short=12", "HEAD"]), git(&["status", "--porcelain", "-uno"])) {
        (Ok(commit), Ok(changes)) if changes.is_empty() => commit,
        (Ok(commit), _) => commit + "-dirty",
        (Err(_), _) => "unknown".to_owned(),
    }
}

fn contents(path: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("can't read {path}"))?;
    Ok(text.trim().to_owned())
}

/// What a program prints.
fn said(program: &str, args: &[&str]) -> anyhow::Result<String> {
    let output = Command::new(program).args(args).output().with_context(|| format!("can't run {program}"))?;
    ensure!(output.status.success(), "{program} failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(limit: Limit, rounds: &[f64]) -> Value {
        let figure = Figure { rounds: rounds.to_vec(), ..Figure::new("start", "ms", limit) };
        Value::Object(describe(&figure).unwrap())
    }

    #[test]
    fn a_limit_of_the_median_forgives_one_bad_round_and_one_of_each_round_none() {
        let rounds = [1.0, 9.0, 2.0];
        assert_eq!(line(Limit::Median(2.0), &rounds)["met"], true);
        assert_eq!(line(Limit::Each(2.0), &rounds)["met"], false);
        assert_eq!(line(Limit::Each(9.0), &rounds)["value"], 9.0);
        assert_eq!(line(Limit::AtLeast(2.0), &rounds)["met"], true);
        assert_eq!(line(Limit::AtLeast(2.1), &rounds)["met"], false);
        assert_eq!(line(Limit::None, &rounds)["met"], Value::Null);
        assert_eq!(line(Limit::None, &[1.0, 2.0, 4.0, 100.0])["median"], 3.0);
    }

    #[test]
    fn a_value_of_all_rounds_together_counts_instead_of_their_median() {
        let figure = |overall| Figure {
            rounds: vec![1.0, 1.2, 1.3],
            overall,
            ..Figure::new("ratio", "", Limit::Median(1.1))
        };
        let describe = |overall| Value::Object(describe(&figure(overall)).unwrap());
        assert_eq!(describe(Some(1.05))["met"], true);
        assert_eq!(describe(None)["met"], false);
        assert_eq!(row(&describe(Some(1.05)))[2], "1.05");
    }

    #[test]
    fn only_the_latest_line_of_a_figure_counts() {
        let (old, new) = (line(Limit::None, &[5.0]), line(Limit::Median(2.0), &[3.0]));
        let lines = parse(&format!("{old}\n{new}\n")).unwrap();
        assert_eq!(lines, [new]);
        let text = table(&lines);
        assert!(text.contains("| start  | ms   | 3      | 3 … 3 | 1      | ≤ 2   | **no** |"), "{text}");
        assert!(parse("nonsense").unwrap_err().to_string().contains("line 1"));
    }
}
