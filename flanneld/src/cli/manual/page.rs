//! Manual pages in the macros man(7).

use std::fmt::Write as _;

use super::reference::{Flag, Topic, Values};

/// The page of a topic; that of the agent lists the commands.
pub(super) fn page(topic: &Topic, topics: &[Topic]) -> String {
    let mut shape = topic.shape.clone();
    let name = topic.page_name();
    let about = shape.get_about().map(ToString::to_string).unwrap_or_default();
    let tail = Tail::of(&shape.get_after_help().map(ToString::to_string).unwrap_or_default());
    let usage = shape.render_usage().to_string();
    let mut page = format!(
        ".TH {} 1 \"\" \"flannel\\-rs v{}\" \"flannel\\-rs\"\n.SH NAME\n{} \\- {}\n.SH SYNOPSIS\n",
        escaped(&name.to_uppercase()),
        crate::version::VERSION,
        escaped(&name),
        escaped(about.trim_end_matches('.'))
    );
    if topic.name.is_empty() {
        page.push_str(".B flanneld\n.RI [ FLAGS ]\n.br\n.B flanneld\n.I COMMAND\n.RI [ FLAGS ]\n");
    } else {
        verbatim(
            &mut page,
            usage
                .trim_start_matches("Usage: ")
                .lines()
                .map(|line| line.strip_prefix("       ").unwrap_or(line)),
        );
    }
    page.push_str(".SH DESCRIPTION\n");
    paragraph(&mut page, &about);
    tail.prose.iter().for_each(|text| {
        page.push_str(".PP\n");
        paragraph(&mut page, text);
    });
    if topic.name.is_empty() {
        commands(&mut page, topics);
    }
    options(&mut page, topic);
    if let Some(examples) = &tail.examples {
        page.push_str(".SH EXAMPLES\n");
        verbatim(&mut page, examples.lines().map(|line| line.strip_prefix("  ").unwrap_or(line)));
    }
    if let Some(codes) = &tail.codes {
        page.push_str(".SH EXIT STATUS\n");
        paragraph(&mut page, codes);
    }
    page.push_str(".SH SEE ALSO\n");
    let others: Vec<String> =
        topics.iter().filter(|other| other.name != topic.name).map(Topic::page_name).collect();
    for (index, other) in others.iter().enumerate() {
        let comma = if index + 1 < others.len() { "," } else { "" };
        let _ = writeln!(page, ".BR {} (1){comma}", escaped(other));
    }
    page
}

fn commands(page: &mut String, topics: &[Topic]) {
    page.push_str(".SH COMMANDS\n");
    for topic in topics.iter().skip(1) {
        let _ = write!(page, ".TP\n\\fBflanneld {}\\fR {}\n", escaped(topic.name), escaped(topic.synopsis));
        paragraph(page, &format!("{}: see {}(1)", topic.summary, topic.page_name()));
    }
}

fn options(page: &mut String, topic: &Topic) {
    page.push_str(".SH OPTIONS\n");
    for heading in topic.headings() {
        if let Some(heading) = heading {
            let _ = writeln!(page, ".SS {}", escaped(heading));
        }
        topic
            .flags()
            .filter(|flag| flag.argument.get_help_heading() == heading)
            .for_each(|flag| option(page, &flag));
    }
    page.push_str(".TP\n\\fB\\-h\\fR, \\fB\\-\\-help\\fR\nPrint help\n");
}

fn option(page: &mut String, flag: &Flag<'_>) {
    let (name, value) = (escaped(flag.name), escaped(flag.value_name()));
    let value = match flag.values() {
        Values::Boolean { .. } => "[=\\fIBOOL\\fR]".to_owned(),
        _ => format!("=\\fI{value}\\fR"),
    };
    let defaults = flag.argument.get_default_values().iter().map(|value| value.to_string_lossy());
    let default = defaults.filter(|value| !value.is_empty()).collect::<Vec<_>>().join(" ");
    let default = if default.is_empty() { String::new() } else { format!(" [default: {default}]") };
    let _ = write!(page, ".TP\n\\fB\\-\\-{name}\\fR{value}\n");
    paragraph(page, &format!("{}{default}", flag.help()));
}

/// What follows the flags in a help text: paragraphs, of which two are known by their first word.
#[derive(Default)]
struct Tail {
    prose: Vec<String>,
    examples: Option<String>,
    codes: Option<String>,
}

impl Tail {
    fn of(text: &str) -> Self {
        let mut tail = Self::default();
        for part in text.split("\n\n").filter(|part| !part.trim().is_empty()) {
            if let Some(examples) = part.strip_prefix("Examples:\n") {
                tail.examples = Some(examples.to_owned());
            } else if let Some(codes) = part.strip_prefix("Exit codes: ") {
                tail.codes = Some(codes.to_owned());
            } else {
                tail.prose.push(part.to_owned());
            }
        }
        tail
    }
}

/// Text that is filled.
fn paragraph(page: &mut String, text: &str) {
    let _ = writeln!(page, "{}", line(&text.split_whitespace().collect::<Vec<_>>().join(" ")));
}

/// Text whose lines stay as they are.
fn verbatim<'a>(page: &mut String, lines: impl Iterator<Item = &'a str>) {
    page.push_str(".nf\n");
    lines.for_each(|text| {
        let _ = writeln!(page, "{}", line(text));
    });
    page.push_str(".fi\n");
}

/// One line of text, which is no request, even with a dot in front.
fn line(text: &str) -> String {
    let guard = if text.starts_with(['.', '\'']) { "\\&" } else { "" };
    format!("{guard}{}", escaped(text))
}

/// Characters that mean something to roff, or that it would replace by typographic ones.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '\\' => escaped.push_str("\\e"),
            '-' => escaped.push_str("\\-"),
            '\'' => escaped.push_str("\\(aq"),
            '`' => escaped.push_str("\\(ga"),
            '^' => escaped.push_str("\\(ha"),
            '~' => escaped.push_str("\\(ti"),
            '"' => escaped.push_str("\\(dq"),
            other => escaped.push(other),
        }
    }
    escaped
}
