//! Round trips by ping.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use backends::testing::Namespace;

/// What ping tells in the end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Trips {
    /// Mean of the round trips, in microseconds.
    pub(crate) mean: f64,
    /// Percent of the requests that were not answered within a second.
    pub(crate) lost: f64,
}

/// Sends echo requests for `time`, `rate` a second.
pub(crate) fn run(from: &Namespace, to: IpAddr, rate: u32, time: Duration) -> anyhow::Result<Trips> {
    let count = (time.as_secs_f64() * f64::from(rate)).ceil().to_string();
    let interval = (1.0 / f64::from(rate)).to_string();
    let command = from.command("ping").args(["-n", "-q", "-W1", "-c", &count, "-i", &interval]);
    // With answers missing it ends with 1.
    let output = command.arg(to.to_string()).output()?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn parse(text: &str) -> anyhow::Result<Trips> {
    let trips = || {
        let line = text.lines().find(|line| line.contains(" packets transmitted, "))?;
        let mut words = line.split(' ');
        let (sent, received): (f64, f64) = (words.next()?.parse().ok()?, words.nth(2)?.parse().ok()?);
        // rtt min/avg/max/mdev = 0.045/0.061/0.110/0.014 ms
        let mean = match text.split_once("mdev = ") {
            Some((_, figures)) => figures.split('/').nth(1)?.parse::<f64>().ok()? * 1e3,
            None => f64::NAN,
        };
        Some((sent, received, mean))
    };
    let (sent, received, mean) = trips().with_context(|| format!("no statistics from ping: {text}"))?;
    ensure!(received > 0.0, "none of {sent} echo requests was answered");
    Ok(Trips { mean, lost: 100.0 * (sent - received) / sent })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ping_tells_the_mean_and_what_was_lost() {
        let text = "--- 10.0.0.1 ping statistics ---\n\
            400 packets transmitted, 390 received, 2.5% packet loss, time 399ms\n\
            rtt min/avg/max/mdev = 0.021/0.041/0.093/0.009 ms\n";
        assert_eq!(parse(text).unwrap(), Trips { mean: 41.0, lost: 2.5 });
        let none = "4 packets transmitted, 0 received, 100% packet loss, time 39ms\n";
        assert!(parse(none).unwrap_err().to_string().contains("none of 4"));
        assert!(parse("ping: unknown host").is_err());
    }
}
