//! The log on stderr: one line per event, in the form that Flannel's users and their parsers know (klog's).
//!
//! `I1121 18:22:07.123456       7 agent.rs:12] subnet leased subnet=10.244.3.0/24`

use std::fmt::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;

/// How much is logged: `-v`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verbosity(u8);

impl Verbosity {
    /// The verbosity of a value of `-v`; a negative one is 0.
    pub(crate) fn new(v: i64) -> Self {
        Self(v.clamp(0, 10) as u8)
    }

    fn ours(self) -> LevelFilter {
        match self.0 {
            0 => LevelFilter::INFO,
            1..=3 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        }
    }

    fn targets(self) -> Targets {
        let others = if self.0 >= 10 { LevelFilter::TRACE } else { LevelFilter::WARN };
        Targets::new()
            .with_default(others)
            .with_targets(["flanneld", "backends", "subnet"].map(|ours| (ours, self.ours())))
            // It reports each failed request as an error, although the store says the same once.
            .with_target("kube_client", if self.0 >= 10 { LevelFilter::TRACE } else { LevelFilter::OFF })
    }
}

/// Sends all events of this process to stderr from now on.
///
/// # Panics
/// When it is called twice.
pub(crate) fn start(verbosity: Verbosity) {
    tracing::subscriber::set_global_default(subscriber(verbosity, std::io::stderr))
        .expect("the log is started once");
}

fn subscriber<W>(verbosity: Verbosity, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer().event_format(Klog { pid: std::process::id() });
    tracing_subscriber::registry().with(verbosity.targets()).with(lines.with_ansi(false).with_writer(writer))
}

/// klog's line format, with the process id where klog has it and times in UTC.
struct Klog {
    pid: u32,
}

impl<S, N> FormatEvent<S, N> for Klog
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let metadata = event.metadata();
        let file = metadata.file().map_or("?", |path| path.rsplit('/').next().unwrap_or(path));
        let line = metadata.line().unwrap_or(0);
        let (letter, now) = (letter(*metadata.level()), Utc::from(SystemTime::now()));
        write!(out, "{letter}{now} {:>7} {file}:{line}]", self.pid)?;
        let mut line = Line { out: OneLine { out: &mut out, room: MAX_LINE }, result: Ok(()) };
        event.record(&mut Only { message: true, line: &mut line });
        event.record(&mut Only { message: false, line: &mut line });
        line.result?;
        writeln!(out)
    }
}

/// klog knows no level below INFO.
fn letter(level: Level) -> char {
    match level {
        Level::ERROR => 'E',
        Level::WARN => 'W',
        _ => 'I',
    }
}

/// Writes fields: the message bare, the others as `key=value`.
struct Line<'w, W: Write> {
    out: OneLine<'w, W>,
    result: fmt::Result,
}

impl<W: Write> Line<'_, W> {
    fn put(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if self.result.is_ok() {
            self.result = match field.name() {
                "message" => write!(self.out, " {value}"),
                name => write!(self.out, " {name}={value}"),
            };
        }
    }
}

/// Lets through either the message or all other fields, so that the message stands first.
struct Only<'l, 'w, W: Write> {
    message: bool,
    line: &'l mut Line<'w, W>,
}

impl<W: Write> Visit for Only<'_, '_, W> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if (field.name() == "message") == self.message {
            self.line.put(field, format_args!("{value:?}"));
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        if (field.name() == "message") == self.message {
            self.line.put(field, format_args!("{value}"));
        }
    }
}

/// Keeps an event on its line: text from elsewhere can't forge another line or steer a terminal.
struct OneLine<'w, W: Write> {
    out: &'w mut W,
    /// How many bytes the line may still have.
    room: usize,
}

/// No line is longer than this, because a node's log is not for others to fill.
const MAX_LINE: usize = 4096;

impl<W: Write> Write for OneLine<'_, W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.room == 0 {
            return Ok(());
        }
        let mut rest = text;
        if text.len() > self.room {
            let end = (0..=self.room).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            rest = &text[..end];
            self.room = 0;
        } else {
            self.room -= text.len();
        }
        while let Some(at) = rest.find(char::is_control) {
            let (plain, from) = rest.split_at(at);
            let mut chars = from.chars();
            self.out.write_str(plain)?;
            chars.next().map_or(Ok(()), |control| write!(self.out, "{}", control.escape_default()))?;
            rest = chars.as_str();
        }
        self.out.write_str(rest)?;
        if self.room == 0 { self.out.write_char('…') } else { Ok(()) }
    }
}

/// A time of day with its month and day, as klog writes it: `1121 18:22:07.123456`.
struct Utc {
    month: u8,
    day: u8,
    /// Seconds since midnight.
    seconds: u32,
    micros: u32,
}

impl From<SystemTime> for Utc {
    fn from(time: SystemTime) -> Self {
        // A clock before 1970 has never been set; its time of day means nothing.
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (month, day) = month_and_day(since.as_secs() / 86_400);
        Self { month, day, seconds: (since.as_secs() % 86_400) as u32, micros: since.subsec_micros() }
    }
}

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { month, day, seconds, micros } = self;
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(f, "{month:02}{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}")
    }
}

/// A moment as notes show it: `11-21 18:22:07 UTC`.
pub(crate) fn moment(time: SystemTime) -> String {
    let Utc { month, day, seconds, .. } = Utc::from(time);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Month and day in the Gregorian calendar, `days` after 1 January 1970.
fn month_and_day(days: u64) -> (u8, u8) {
    // Counted from 1 March 2000, the start of a cycle of 400 years, so that the leap day is the last of
    // its year, of its century and of the cycle. 11 017 days lie between the two dates; 1 March 1600 is one
    // cycle of 146 097 days earlier and before all times that can be given.
    let day_of_cycle = (days + 146_097 - 11_017) % 146_097;
    let day_of_century = day_of_cycle - (day_of_cycle / 36_524).min(3) * 36_524;
    let day_of_four_years = day_of_century % 1_461;
    let mut day = day_of_four_years - (day_of_four_years / 365).min(3) * 365;
    const FROM_MARCH: [u64; 12] = [31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31, 29];
    let mut month = 3;
    for length in FROM_MARCH {
        if day < length {
            break;
        }
        day -= length;
        month = month % 12 + 1;
    }
    (month, day as u8 + 1)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(v: i64, events: impl FnOnce()) -> String {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = subscriber(Verbosity::new(v), move || writer.clone());
        tracing::subscriber::with_default(subscriber, events);
        let bytes = buffer.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_line_looks_like_klogs() {
        let text = logged(0, || {
            let cause = io::Error::other("gone");
            tracing::warn!(count = 3, name = "a b", error = &cause as &dyn std::error::Error, shown = %"x", "lease {}", "lost");
        });
        let pid = std::process::id();
        let pattern = format!(
            r#"^W(0[1-9]|1[0-2])[0-3][0-9] [0-2][0-9]:[0-5][0-9]:[0-5][0-9]\.[0-9]{{6}} {pid:>7} log\.rs:[0-9]+\] lease lost count=3 name="a b" error=gone shown=x\n$"#
        );
        assert!(regex_lite::Regex::new(&pattern).unwrap().is_match(&text), "{text}");
    }

    #[test]
    fn verbosity_opens_our_own_log_long_before_that_of_libraries() {
        let lines = |v| {
            logged(v, || {
                for target in ["ours", "theirs"] {
                    tracing::warn!("{target}");
                }
                tracing::info!("info");
                tracing::debug!("debug");
                tracing::trace!("trace");
                tracing::trace!(target: "backends::kernel", "backends");
                tracing::info!(target: "h2", "h2 info");
                tracing::warn!(target: "h2", "h2 warn");
            })
            .lines()
            .map(|line| line.split("] ").nth(1).unwrap().to_owned())
            .collect::<Vec<_>>()
        };
        let base = ["ours", "theirs", "info"];
        assert_eq!(lines(-1), [&base[..], &["h2 warn"]].concat());
        assert_eq!(lines(0), [&base[..], &["h2 warn"]].concat());
        assert_eq!(lines(1), [&base[..], &["debug", "h2 warn"]].concat());
        assert_eq!(lines(4), [&base[..], &["debug", "trace", "backends", "h2 warn"]].concat());
        assert_eq!(lines(99), [&base[..], &["debug", "trace", "backends", "h2 info", "h2 warn"]].concat());
    }

    #[test]
    fn foreign_text_can_not_forge_a_line() {
        let text = logged(0, || tracing::info!(key = %"a\r\nE1121 forged\u{1b}[2Jé", "one\ntwo\n"));
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.ends_with("] one\\ntwo\\n key=a\\r\\nE1121 forged\\u{1b}[2Jé\n"), "{text}");
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "0101 00:00:00.000000"),
            (951_782_399, "0228 23:59:59.000000"),
            (951_782_400, "0229 00:00:00.000000"),
            (951_868_800, "0301 00:00:00.000000"),
            (1_763_749_327, "1121 18:22:07.000000"),
            (1_735_689_599, "1231 23:59:59.000000"),
            (4_107_542_399, "0228 23:59:59.000000"),
            (4_107_542_400, "0301 00:00:00.000000"),
        ] {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(Utc::from(time).to_string(), text, "{seconds}");
        }
        let before = UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(Utc::from(before).to_string(), "0101 00:00:00.000000");
    }

    #[test]
    fn every_day_of_five_centuries_agrees_with_counting_days_one_by_one() {
        let (mut year, mut month, mut day) = (1970, 1u8, 1u8);
        for days in 0..200_000 {
            assert_eq!(month_and_day(days), (month, day), "{days} days after 1 January 1970");
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let last = match month {
                2 if leap => 29,
                2 => 28,
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            (month, day) = match (month, day) {
                (12, 31) => {
                    year += 1;
                    (1, 1)
                }
                (_, day) if day == last => (month + 1, 1),
                _ => (month, day + 1),
            };
        }
    }

    #[test]
    fn no_line_is_longer_than_is_good_for_a_log() {
        let mut out = String::new();
        let mut line = OneLine { out: &mut out, room: MAX_LINE };
        line.write_str("begin ").unwrap();
        line.write_str(&"ü".repeat(100_000)).unwrap();
        line.write_str(" end").unwrap();
        assert!(out.starts_with("begin ü") && out.ends_with("ü…"));
        assert!(out.len() <= MAX_LINE + '…'.len_utf8(), "{}", out.len());
    }

    proptest! {
        #[test]
        fn escaping_leaves_no_control_character_and_all_else_as_it_was(text in "\\PC{0,8}\\p{Cc}?\\PC{0,8}\\p{Cc}?") {
            let mut out = String::new();
            OneLine { out: &mut out, room: MAX_LINE }.write_str(&text).unwrap();
            prop_assert!(!out.contains(char::is_control));
            let expected: String = text
                .chars()
                .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
                .collect();
            prop_assert_eq!(out, expected);
        }
    }
}
