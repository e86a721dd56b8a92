//! What goes from pod to pod: round trips by ping, throughput by iperf3.

use anyhow::Context;
use backends::testing::Pod;
use bench::progress::Progress;
use serde_json::Value;

use crate::cluster::{Cluster, TIMEOUT};
use crate::table::Table;

/// A matrix of mean round trips in milliseconds, of all pairs of pods on different nodes.
pub(crate) fn round_trips(cluster: &Cluster, progress: &Progress) -> anyhow::Result<Table> {
    let names: Vec<String> =
        cluster.sites.iter().flat_map(|site| site.named_pods().map(|(name, _)| name)).collect();
    let mut cells = vec![vec!["-".to_owned(); names.len()]; names.len()];
    let place = |name: &str| names.iter().position(|known| known == name).context("a pod without a name");
    for (from, source, to, target) in cluster.pairs() {
        progress.check()?;
        cells[place(&from)?][place(&to)?] = format!("{:.3}", mean_round_trip(source, target)?);
    }
    let mut table = Table::new(["".to_owned()].into_iter().chain(names.clone()));
    for (name, row) in names.into_iter().zip(cells) {
        table.row([name].into_iter().chain(row));
    }
    Ok(table)
}

/// TCP throughput from the first pod of each node to the first pod of every other.
pub(crate) fn throughput(cluster: &Cluster, progress: &Progress) -> anyhow::Result<Table> {
    let mut rows = Vec::new();
    for server in &cluster.sites {
        let (to, target) = server.named_pods().next().context("a node without pods")?;
        let _server = target.command("iperf3").arg("-s").spawn()?;
        progress.wait_for("iperf3 to listen", TIMEOUT, || {
            let sockets = target.command("ss").args(["-Hltn", "sport", "=", ":5201"]).ok()?;
            Ok(!sockets.trim().is_empty())
        })?;
        for client in cluster.sites.iter().filter(|site| site.node.name() != server.node.name()) {
            progress.check()?;
            let (from, source) = client.named_pods().next().context("a node without pods")?;
            let (rate, again) = once_more_if_reset(|| tcp(source, target))?;
            rows.push([from, to.clone(), format!("{rate:.2}"), again.to_string()]);
        }
    }
    rows.sort();
    let mut table = Table::new(["from", "to", "Gbit/s", "retransmits"]);
    rows.into_iter().for_each(|row| table.row(row));
    Ok(table)
}

fn mean_round_trip(from: &Pod, to: &Pod) -> anyhow::Result<f64> {
    let target = to.address().to_string();
    let output = from.command("ping").args(["-n", "-q", "-c20", "-i0.01", "-W2", &target]).ok()?;
    // rtt min/avg/max/mdev = 0.045/0.061/0.110/0.014 ms
    let figures =
        output.split_once("mdev = ").with_context(|| format!("no statistics from ping: {output}"))?;
    let mean = figures.1.split('/').nth(1).context("no mean from ping")?;
    mean.parse().with_context(|| format!("ping's mean {mean:?} is not a number"))
}

/// iperf3 sometimes loses its control connection when a test begins; what it says then tells nothing of the network.
fn once_more_if_reset<T>(mut test: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<T> {
    match test() {
        Err(error) if format!("{error:#}").contains("Connection reset by peer") => test(),
        outcome => outcome,
    }
}

/// Gbit/s that arrived in two seconds, and the segments sent again.
fn tcp(from: &Pod, to: &Pod) -> anyhow::Result<(f64, u64)> {
    let target = to.address().to_string();
    let output = from.command("iperf3").args(["-J", "-t2", "-c", &target]).ok()?;
    let report: Value = serde_json::from_str(&output).context("iperf3's report is not JSON")?;
    let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
    let rate = rate.with_context(|| format!("iperf3 reports no throughput: {output}"))?;
    Ok((rate / 1e9, report["end"]["sum_sent"]["retransmits"].as_u64().unwrap_or_default()))
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
