//! Draws the TCP throughput of all ways as bars, for readers with light and dark backgrounds.

use std::fmt::Write;

use anyhow::ensure;
use clap::ValueEnum;
use serde_json::Value;

use super::bed::PacketPath;
use super::plan::{Place, Step, Subject};

/// Pixels: the whole width, the column of names, and the room for figures on the right.
const WIDTH: f64 = 720.0;
const NAMES: f64 = 90.0;
const FIGURES: f64 = 60.0;

/// Height of a bar, and the distance from one way to the next beyond its bars.
const BAR: f64 = 14.0;
const GAP: f64 = 14.0;

/// Heights of a panel's title and of the legend.
const TITLE: f64 = 30.0;
const LEGEND: f64 = 26.0;

/// What the bars of one way are.
const SERIES: [(Subject, &str, &str); 2] =
    [(Subject::Tcp1, "one", "1 stream"), (Subject::Tcp4, "four", "4 streams")];

/// A median and its range, in Gbit/s.
struct Bar {
    series: usize,
    median: f64,
    min: f64,
    max: f64,
}

/// The drawing of these results.
pub(crate) fn draw(lines: &[Value]) -> anyhow::Result<String> {
    let panels = [(Place::Pod, "pod to pod"), (Place::Host, "node to node")];
    let panels = panels.map(|(place, title)| (title, bars(lines, place)));
    let most = panels.iter().flat_map(|(_, paths)| paths).flat_map(|(_, bars)| bars);
    let most = most.map(|bar| bar.max).fold(0.0, f64::max);
    ensure!(most > 0.0, "there are no TCP results: measure first");
    let scale = (WIDTH - NAMES - FIGURES) / most;

    let mut body = String::new();
    let mut y = LEGEND;
    legend(&mut body);
    for (title, paths) in &panels {
        if paths.is_empty() {
            continue;
        }
        text(&mut body, 0.0, y + 20.0, "head", &format!("TCP, {title}, Gbit/s"));
        y += TITLE;
        for (way, bars) in paths {
            let middle = y + BAR * bars.len() as f64 / 2.0 + 4.0;
            text(&mut body, NAMES - 8.0, middle, "name", &way.to_string());
            for bar in bars {
                draw_bar(&mut body, y, scale, bar);
                y += BAR;
            }
            y += GAP;
        }
    }
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" width=\"{WIDTH}\" height=\"{y}\" \
         role=\"img\" aria-label=\"TCP throughput of the ways from node to node\">\n{STYLE}{body}</svg>\n"
    ))
}

/// No background of its own, and colours that change with the reader's.
const STYLE: &str = "<style>\n\
    text { font: 12px system-ui, sans-serif; fill: #24292f; }\n\
    .head { font-weight: 600; }\n\
    .name { text-anchor: end; }\n\
    .one { fill: #0969da; }\n\
    .four { fill: #8cb8f0; }\n\
    .range { stroke: #24292f; stroke-width: 1.5; }\n\
    @media (prefers-color-scheme: dark) {\n\
    text { fill: #d1d7e0; }\n\
    .one { fill: #4493f8; }\n\
    .four { fill: #2c5a93; }\n\
    .range { stroke: #f0f6fc; }\n\
    }\n\
    </style>\n";

fn legend(body: &mut String) {
    let mut x = NAMES;
    for (_, class, label) in SERIES {
        rectangle(body, class, x, 6.0, 12.0, 12.0);
        text(body, x + 18.0, 16.0, "label", label);
        x += 100.0;
    }
    line(body, x, x + 18.0, 12.0);
    text(body, x + 26.0, 16.0, "label", "range of the rounds");
}

fn draw_bar(body: &mut String, y: f64, scale: f64, bar: &Bar) {
    rectangle(body, SERIES[bar.series].1, NAMES, y, bar.median * scale, BAR - 2.0);
    line(body, NAMES + bar.min * scale, NAMES + bar.max * scale, y + BAR / 2.0 - 1.0);
    text(body, NAMES + bar.max * scale + 8.0, y + BAR - 4.0, "label", &format!("{:.2}", bar.median));
}

// Writing to a string doesn't fail.
fn rectangle(body: &mut String, class: &str, x: f64, y: f64, width: f64, height: f64) {
    let _ = writeln!(
        body,
        "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"/>"
    );
}

fn line(body: &mut String, from: f64, to: f64, y: f64) {
    let _ =
        writeln!(body, "<line class=\"range\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>");
}

fn text(body: &mut String, x: f64, y: f64, class: &str, text: &str) {
    let _ = writeln!(body, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>");
}

/// The bars of each way that was measured there.
fn bars(lines: &[Value], place: Place) -> Vec<(PacketPath, Vec<Bar>)> {
    let of = |way: PacketPath| {
        let found = SERIES.iter().enumerate().filter_map(|(series, (subject, ..))| {
            let name = format!("{}: {way}", Step { place, subject: *subject });
            let line = lines.iter().find(|line| line["name"] == name.as_str())?;
            let [median, min, max] = ["median", "min", "max"].map(|key| line[key].as_f64());
            Some(Bar { series, median: median?, min: min?, max: max? })
        });
        (way, found.collect::<Vec<_>>())
    };
    PacketPath::value_variants().iter().map(|&way| of(way)).filter(|(_, bars)| !bars.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_bar_is_as_long_as_its_median_and_ways_without_results_have_none() {
        let line =
            |name: &str, median: f64| json!({"name": name, "median": median, "min": median, "max": median});
        let lines = [line("pods, TCP 1 stream: vxlan", 10.0), line("pods, TCP 1 stream: udp", 5.0)];
        let drawing = draw(&lines).unwrap();
        let whole = WIDTH - NAMES - FIGURES;
        assert!(drawing.contains(&format!("width=\"{whole:.1}\"")), "{drawing}");
        assert!(drawing.contains(&format!("width=\"{:.1}\"", whole / 2.0)), "{drawing}");
        assert!(!drawing.contains("host-gw") && !drawing.contains(", node to node"), "{drawing}");
        assert!(draw(&[]).is_err());
    }
}
