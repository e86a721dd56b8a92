//! Shows the figures of this program, the ways side by side.

use bench::figure::{conditions_of, judgement, markdown, short};
use clap::ValueEnum;
use serde_json::Value;

use super::bed::PacketPath;

/// A row for each thing that was measured: each way's median and range, then the ratios.
pub(crate) fn table(lines: &[Value]) -> String {
    let split = |line| -> Option<(&str, &str, &Value)> {
        let line: &Value = line;
        let (what, whose) = line["name"].as_str()?.rsplit_once(": ")?;
        Some((what, whose, line))
    };
    let named: Vec<(&str, &str, &Value)> = lines.iter().filter_map(split).collect();
    let mut whats: Vec<&str> = Vec::new();
    for (what, ..) in &named {
        if !whats.contains(what) {
            whats.push(what);
        }
    }
    let ratios = [JUDGED, "udp / go-udp", "wireguard / vxlan", "wireguard / udp", "wireguard / wireguard-go"];
    let columns = PacketPath::value_variants().iter().map(PacketPath::to_string);
    let columns = columns.chain(ratios.map(str::to_owned));
    let columns: Vec<String> =
        columns.filter(|column| named.iter().any(|(_, whose, _)| whose == column)).collect();

    let words = |words: [&str; 2]| words.map(str::to_owned).to_vec();
    let mut rows = vec![[words(["figure", "unit"]), columns.clone(), words(["limit", "met"])].concat()];
    for what in whats {
        let find = |whose: &str| {
            named.iter().find(|(one, other, _)| (*one, *other) == (what, whose)).map(|(.., line)| *line)
        };
        let unit = columns.iter().find_map(|column| find(column)?["unit"].as_str()).unwrap_or_default();
        let cells = columns.iter().map(|column| find(column).map(cell).unwrap_or_default()).collect();
        // A limit is udp's, either of its own or as ratio.
        let judged = [JUDGED, "udp"].into_iter().filter_map(find).find(|line| !line["limit"].is_null());
        let judged = judged.map(judgement).unwrap_or_default();
        rows.push([words([what, unit]), cells, judged.to_vec()].concat());
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
