//! What goes from pod to pod: round trips by ping, throughput by iperf3.

use std::time::Duration;

use anyhow::Context;
use bench::figure::markdown;
use bench::iperf::{self, End};
use bench::ping::{self, PingPace};
use bench::progress::Progress;

use crate::cluster::Cluster;

/// A matrix of mean round trips in milliseconds, of all pairs of pods on different nodes.
pub(crate) fn round_trips(cluster: &Cluster, progress: &Progress) -> anyhow::Result<String> {
    /// Enough for twenty requests.
    const TIME: Duration = Duration::from_millis(330);
    let pods: Vec<_> = cluster.sites.iter().flat_map(|site| site.named_pods()).collect();
    let names = pods.iter().map(|(name, _)| name.clone());
    let mut rows = vec![[String::new()].into_iter().chain(names).collect::<Vec<_>>()];
    for (from, source) in &pods {
        let mut row = vec![from.clone()];
        for (to, target) in &pods {
            progress.check()?;
            if node(from) == node(to) {
                row.push("-".to_owned());
                continue;
            }
            let trips = ping::run(source.namespace(), target.address(), PingPace::Asleep, TIME)?;
            let mean = trips.mean.with_context(|| format!("{from} gets no answer from {to}"))?;
            row.push(format!("{:.3}", mean / 1e3));
        }
        rows.push(row);
    }
    Ok(markdown(&rows))
}

/// That of a pod's name, `node1/a`.
fn node(pod: &str) -> Option<&str> {
    pod.split('/').next()
}

/// TCP throughput from the first pod of each node to the first pod of every other.
pub(crate) fn throughput(cluster: &Cluster, progress: &Progress) -> anyhow::Result<String> {
    const TIME: Duration = Duration::from_secs(2);
    let mut rows = vec![["from", "to", "Gbit/s", "retransmits"].map(str::to_owned).to_vec()];
    let first = || cluster.sites.iter().filter_map(|site| site.named_pods().next());
    for (from, source) in first() {
        for (to, target) in first().filter(|(to, _)| *to != from) {
            progress.check()?;
            let ends = [End::of(source), End::of(target)];
            let stream = once_more_if_reset(|| iperf::run(ends, TIME, &[])?.forward())?;
            rows.push(vec![from.clone(), to, format!("{:.2}", stream.rate), stream.again.to_string()]);
        }
    }
    Ok(markdown(&rows))
}

/// iperf3 sometimes loses its control connection when a test begins; what it says then tells nothing of the network.
fn once_more_if_reset<T>(mut test: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    match test() {
        Err(error) if format!("{error:#}").contains("Connection reset by peer") => test(),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_reset_connection_is_tried_once_more_and_other_errors_are_not() {
        let attempts = |errors: &[&str]| {
            let mut made = 0;
            let outcome = once_more_if_reset(|| {
                made += 1;
                match errors.get(made - 1) {
                    Some(&error) => bail!("{error}"),
                    None => Ok(()),
                }
            });
            (made, outcome.is_ok())
        };
        let reset = r#"iperf3: exit status: 1 {"error": "unable to read: Connection reset by peer"}"#;
        assert_eq!(attempts(&[]), (1, true));
        assert_eq!(attempts(&[reset]), (2, true));
        assert_eq!(attempts(&[reset, reset]), (2, false));
        assert_eq!(attempts(&["no route to host"]), (1, false));
    }
}
