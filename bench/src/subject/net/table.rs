//! Shows the figures of this program, the ways side by side.

use bench::figure::{conditions_of, judgement, markdown, short};
use clap::ValueEnum;
use serde_json::Value;

use super::bed::PacketPath;

/// A row for each thing that was measured: each way's median and range, then udp's ratios.
pub(crate) fn table(lines: &[Value]) -> String {
    let split = |line: &Value| -> Option<(String, String)> {
        let (what, whose) = line["name"].as_str()?.rsplit_once(": ")?;
        Some((what.to_owned(), whose.to_owned()))
    };
    let mut named: Vec<((String, String), &Value)> = Vec::new();
    named.extend(lines.iter().filter_map(|line| Some((split(line)?, line))));
    let mut whats: Vec<&str> = Vec::new();
    for ((what, _), _) in &named {
        if !whats.contains(&what.as_str()) {
            whats.push(what);
        }
    }
    let measured = |whose: &str| named.iter().any(|((_, one), _)| one == whose);
    let paths = PacketPath::value_variants().iter().map(PacketPath::to_string).filter(|way| measured(way));
    let ratios = [JUDGED, "udp / go-udp", "wireguard / vxlan", "wireguard / udp", "wireguard / wireguard-go"];
    let ratios = ratios.map(str::to_owned).into_iter().filter(|ratio| measured(ratio));
    let columns: Vec<String> = paths.chain(ratios).collect();

    let fixed = |before: [&str; 2], after: [&str; 2]| {
        let before = before.map(str::to_owned).into_iter();
        before.chain(columns.iter().cloned()).chain(after.map(str::to_owned)).collect::<Vec<_>>()
    };
    let mut rows = vec![fixed(["figure", "unit"], ["limit", "met"])];
    for what in whats {
        let find = |whose: &str| {
            let is = |(one, other): &(String, String)| one == what && other == whose;
            named.iter().find(|(name, _)| is(name)).map(|(_, line)| *line)
        };
        let unit = columns.iter().find_map(|column| find(column)?["unit"].as_str()).unwrap_or_default();
        let cells = columns.iter().map(|column| find(column).map(cell).unwrap_or_default());
        // A limit is udp's, either of its own or as ratio.
        let judged = [JUDGED.to_owned(), PacketPath::Udp.to_string()];
        let judged = judged.iter().filter_map(|whose| find(whose)).find(|line| !line["limit"].is_null());
        let judged = judged.map(judgement).unwrap_or_default();
        let begin = [what.to_owned(), unit.to_owned()];
        rows.push(begin.into_iter().chain(cells).chain(judged).collect());
    }
    format!("{}\n{}", markdown(&rows), conditions_of(lines))
}

/// The ratio that has limits, as it is named in figures.
const JUDGED: &str = "udp / vxlan";

/// Median and range.
fn cell(line: &Value) -> String {
    let [median, min, max] =
        ["median", "min", "max"].map(|key| line[key].as_f64().map(short).unwrap_or_default());
    if min == max { median } else { format!("{median} ({min}–{max})") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ways_that_were_measured_are_columns_and_limits_those_of_udp() {
        let line = |name: &str, median: f64, limit: Value| {
            json!({"name": name, "unit": "Gbit/s", "median": median, "min": 1.0, "max": median,
                "limit": limit, "judged": "median-at-least", "met": limit.as_f64().map(|limit| median >= limit)})
        };
        let text = table(&[
            line("pods, TCP 1 stream: vxlan", 8.0, Value::Null),
            line("pods, TCP 1 stream: udp", 6.0, Value::Null),
            line("pods, TCP 1 stream: udp / vxlan", 0.75, json!(0.85)),
            line("nodes, TCP 1 stream: udp", 1.0, Value::Null),
        ]);
        let lines: Vec<&str> = text.lines().collect();
        let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(lines[0]), "| figure | unit | vxlan | udp | udp / vxlan | limit | met |");
        assert_eq!(
            words(lines[2]),
            "| pods, TCP 1 stream | Gbit/s | 8 (1–8) | 6 (1–6) | 0.750 (1–0.750) | ≥ 0.850 | **no** |"
        );
        assert_eq!(words(lines[3]), "| nodes, TCP 1 stream | Gbit/s | | 1 | | | |");
    }
}
