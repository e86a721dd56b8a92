//! Round trips by ping.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context;
use backends::testing::Namespace;

/// What ping tells in the end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trips {
    /// Mean of the round trips, in microseconds, if there were any.
    pub mean: Option<f64>,
    /// Percent of the requests that were not answered within a second.
    pub lost: f64,
}

/// How often ping asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PingPace {
    /// ping sleeps in between, and so do the CPUs if nothing else goes on. Its 10 ms are 12 to 18 on kernels
    /// whose clock ticks every 4 ms.
    Asleep,
    /// Every 2 ms or a bit more. Below 10 ms ping doesn't sleep until the next request but asks the kernel again
    /// and again (iputils, `ping_common.c`, `main_loop`), so that its CPU stays awake.
    Awake,
}

impl PingPace {
    /// Seconds, as ping takes them, and about how many requests that makes in a second.
    fn parts(self) -> (&'static str, f64) {
        match self {
            Self::Asleep => ("0.01", 60.0),
            Self::Awake => ("0.002", 400.0),
        }
    }
}

/// Sends echo requests for about `time`.
pub fn run(from: &Namespace, to: IpAddr, pace: PingPace, time: Duration) -> anyhow::Result<Trips> {
    let (interval, rate) = pace.parts();
    let count = (time.as_secs_f64() * rate).ceil().to_string();
    let command = from.command("ping").args(["-n", "-q", "-W1", "-c", &count, "-i", interval]);
    // With answers missing it ends with 1.
    let output = command.arg(to.to_string()).output()?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn parse(text: &str) -> anyhow::Result<Trips> {
    parts(text).with_context(|| format!("no statistics from ping: {text}"))
}

fn parts(text: &str) -> Option<Trips> {
    let line = text.lines().find(|line| line.contains(" packets transmitted, "))?;
    let mut words = line.split(' ');
    let (sent, received): (f64, f64) = (words.next()?.parse().ok()?, words.nth(2)?.parse().ok()?);
    // rtt min/avg/max/mdev = 0.045/0.061/0.110/0.014 ms
    let mean = match text.split_once("mdev = ") {
        Some((_, figures)) => Some(figures.split('/').nth(1)?.parse::<f64>().ok()? * 1e3),
        None => None,
    };
    Some(Trips { mean, lost: 100.0 * (sent - received) / sent })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ping_tells_the_mean_and_what_was_lost() {
        let text = "--- 10.0.0.1 ping statistics ---\n\
            400 packets transmitted, 390 received, 2.5% packet loss, time 399ms\n\
            rtt min/avg/max/mdev = 0.021/0.041/0.093/0.009 ms\n";
        assert_eq!(parse(text).unwrap(), Trips { mean: Some(41.0), lost: 2.5 });
        let none = "4 packets transmitted, 0 received, 100% packet loss, time 39ms\n";
        assert_eq!(parse(none).unwrap(), Trips { mean: None, lost: 100.0 });
        assert!(parse("ping: unknown host").is_err());
    }
}
