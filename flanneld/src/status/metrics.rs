//! A [`NodeStatus`] as OpenMetrics text: what Prometheus scrapes. Encoded when it is asked for, from the values.

mod cni;
mod peer;
mod wireguard;

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::Times;
use super::model::{Counters, Device, Host, Node, NodeStatus, PeerCounts, Policy, Pool, ProbeStatus, Store};
use crate::text::clean;

/// The media type of what [`text`] makes.
pub(crate) const MEDIA_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Longer labels are cut: a name of a node has at most 253 characters.
const MAX_LABEL: usize = 253;

/// The whole exposition.
pub(crate) fn text(status: NodeStatus) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Exposition(status)));
    let mut text = String::with_capacity(32 * 1024);
    // Writing to a string does not fail.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    text
}

struct Exposition(NodeStatus);

impl fmt::Debug for Exposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Exposition")
    }
}

impl Collector for Exposition {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (status, mut out) = (&self.0, Out(encoder));
        out.process(&status.host, status.started)?;
        out.node(status)?;
        out.store(&status.store, &status.counters)?;
        out.peers(&status.peers)?;
        out.converges(&status.counters, status.kernel.fights.len())?;
        out.info("rules", "How traffic rules are made.", &[("mode", &status.rules.mode)])?;
        out.gauge(
            "foreign_chains_dropping",
            "Chains of other programs that end forwarded packets; a way through them is made.",
            status.rules.dropping_chains as f64,
        )?;
        out.devices(&status.host)?;
        out.tunnel(&status.tunnel)?;
        out.pools(&status.pools)?;
        if let Some(probes) = &status.probes {
            out.probes(probes)?;
        }
        out.peer_bytes(&status.traffic)?;
        out.wireguard(status)?;
        out.cni(&status.cni)?;
        if let Some(devices) = status.fast_path {
            out.gauge("fast_path_devices", "Devices of the fast path.", devices as f64)?;
        }
        match &status.policy {
            Some(policy) => out.policy(policy),
            None => Ok(()),
        }
    }
}

/// One series: its labels and its value.
type Series<'a, V> = (Vec<(&'a str, String)>, V);

struct Out<'a>(DescriptorEncoder<'a>);

impl Out<'_> {
    fn begin<'s>(
        &'s mut self,
        name: &'s str,
        help: &str,
        kind: MetricType,
    ) -> Result<MetricEncoder<'s>, fmt::Error> {
        self.0.encode_descriptor(name, help, None, kind)
    }

    fn gauges(&mut self, name: &str, help: &str, all: &[Series<'_, f64>]) -> fmt::Result {
        if all.is_empty() {
            return Ok(());
        }
        let name = prefixed(name);
        let mut metric = self.begin(&name, help, MetricType::Gauge)?;
        all.iter().try_for_each(|(labels, value)| match labels.is_empty() {
            true => put_gauge(&mut metric, *value),
            false => put_gauge(&mut metric.encode_family(labels)?, *value),
        })
    }

    fn counters(&mut self, name: &str, help: &str, all: &[Series<'_, f64>]) -> fmt::Result {
        if all.is_empty() {
            return Ok(());
        }
        let name = prefixed(name);
        let mut metric = self.begin(&name, help, MetricType::Counter)?;
        all.iter().try_for_each(|(labels, value)| match labels.is_empty() {
            true => put_counter(&mut metric, *value),
            false => put_counter(&mut metric.encode_family(labels)?, *value),
        })
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.gauges(name, help, &[(Vec::new(), value)])
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.counters(name, help, &[(Vec::new(), value as f64)])
    }

    /// A counter for each key of a map, with the key as the label.
    fn by_key(&mut self, name: &str, help: &str, label: &str, all: &BTreeMap<String, u64>) -> fmt::Result {
        let series: Vec<_> =
            all.iter().map(|(key, count)| (vec![(label, key.clone())], *count as f64)).collect();
        self.counters(name, help, &series)
    }

    fn histogram(&mut self, name: &str, help: &str, times: &Times) -> fmt::Result {
        let name = prefixed(name);
        let mut metric = self.begin(&name, help, MetricType::Histogram)?;
        let mut buckets: Vec<(f64, u64)> = times.bounds.into_iter().zip(times.classes).collect();
        let beyond = times.count.saturating_sub(times.classes.iter().sum());
        buckets.push((f64::INFINITY, beyond));
        metric.encode_histogram::<NoLabelSet>(times.sum, times.count, &buckets, None)
    }

    fn info(&mut self, name: &str, help: &str, labels: &[(&str, &str)]) -> fmt::Result {
        let labels: Vec<(&str, String)> =
            labels.iter().map(|(key, value)| (*key, clean(value, MAX_LABEL))).collect();
        let name = prefixed(name);
        self.begin(&name, help, MetricType::Info)?.encode_info(&labels)
    }

    fn process(&mut self, host: &Host, started: u64) -> fmt::Result {
        let process = &host.process;
        self.counters(
            "process_cpu_seconds",
            "Processor time of the agent.",
            &[(Vec::new(), process.cpu_seconds)],
        )?;
        for (name, help, value) in [
            ("process_resident_memory_bytes", "Resident memory of the agent.", process.resident_bytes),
            ("process_open_fds", "Open file descriptors of the agent.", process.open_fds),
            ("process_start_time_seconds", "When the agent started, since 1970.", started),
        ] {
            self.gauge(name, help, value as f64)?;
        }
        Ok(())
    }

    fn node(&mut self, status: &NodeStatus) -> fmt::Result {
        self.info(
            "build",
            "The program.",
            &[("version", status.version.as_str()), ("commit", status.commit.as_str())],
        )?;
        self.gauge("ready", "Whether the node is ready.", number(status.ready))?;
        let mut conditions = vec![(vec![("condition", "alive".to_owned())], number(status.alive))];
        conditions.extend(
            status
                .conditions
                .iter()
                .map(|(name, why)| (vec![("condition", name.clone())], number(why.is_none()))),
        );
        self.gauges("condition", "Whether a condition of readiness is met.", &conditions)?;
        let Some(node) = &status.node else { return Ok(()) };
        self.node_info(node)
    }

    fn node_info(&mut self, node: &Node) -> fmt::Result {
        let name = prefixed("node");
        let mut metric = self.begin(&name, "This node, one series for each family.", MetricType::Info)?;
        for subnet in &node.subnets {
            let v6 = subnet.contains(':');
            let public = node.public.iter().find(|addr| addr.is_ipv6() == v6);
            let labels = [
                ("backend", clean(&node.backend, MAX_LABEL)),
                ("subnet", subnet.clone()),
                ("public_ip", public.map(ToString::to_string).unwrap_or_default()),
                ("family", if v6 { "ipv6" } else { "ipv4" }.to_owned()),
                ("mtu", node.mtu.to_string()),
            ];
            metric.encode_info(&labels)?;
        }
        let _ = metric;
        self.gauge(
            "fallback",
            "Whether the announced backend stands in for one that the kernel lacks.",
            number(node.fallback),
        )
    }

    fn store(&mut self, store: &Store, counters: &Counters) -> fmt::Result {
        self.gauge(
            "store_connected",
            "Whether the store answers and lets this node in.",
            number(store.connected),
        )?;
        if let Some(at) = store.last_answer {
            self.gauge("store_last_answer_timestamp_seconds", "When the store last answered.", at as f64)?;
        }
        self.by_key(
            "store_errors",
            "How often following the leases failed, by kind.",
            "kind",
            &counters.store_errors,
        )?;
        self.by_key(
            "snapshots",
            "Snapshots of all leases that differed from the one before, by source.",
            "source",
            &counters.snapshots,
        )?;
        if let Some(at) = store.lease_ends {
            self.gauge(
                "lease_expiry_timestamp_seconds",
                "When the own lease ends unless it is renewed.",
                at as f64,
            )?;
        }
        self.by_key("lease_renewals", "Renewals of the own lease, by result.", "result", &counters.renewals)
    }

    fn peers(&mut self, peers: &PeerCounts) -> fmt::Result {
        let states = [
            ("known", Some(peers.known)),
            ("usable", Some(peers.usable)),
            ("programmed", Some(peers.programmed)),
            ("reachable", peers.reachable),
            ("degraded", peers.degraded),
            ("unreachable", peers.unreachable),
        ];
        let states = states.into_iter().filter_map(|(name, count)| Some((name, count?)));
        let states: Vec<_> =
            states.map(|(name, count)| (vec![("state", name.to_owned())], count as f64)).collect();
        self.gauges("peers", "Other nodes, by how far they are; each state contains the next.", &states)?;
        let skipped: Vec<_> = peers
            .skipped
            .iter()
            .map(|(reason, count)| (vec![("reason", reason.clone())], *count as f64))
            .collect();
        self.gauges("leases_skipped", "Leases that can't be used, by reason.", &skipped)
    }

    fn converges(&mut self, counters: &Counters, fights: usize) -> fmt::Result {
        self.histogram("converge_seconds", "Time of a turn of the loop.", &counters.converge)?;
        self.by_key("converges", "Turns of the loop, by what woke it.", "cause", &counters.converges)?;
        if let Some(at) = counters.last_converge {
            self.gauge("last_converge_timestamp_seconds", "When the loop last turned.", at as f64)?;
        }
        let changes: Vec<_> = counters
            .changes
            .iter()
            .map(|change| {
                let labels = vec![
                    ("object", change.object.clone()),
                    ("action", change.action.clone()),
                    ("result", change.result.clone()),
                ];
                (labels, change.count as f64)
            })
            .collect();
        self.counters("changes", "Changes to the kernel and to traffic rules.", &changes)?;
        self.by_key(
            "repairs",
            "Changes that nothing asked for: another program had undone them.",
            "object",
            &counters.repairs,
        )?;
        self.gauge("fights", "Things that another program undoes again and again.", fights as f64)?;
        self.counter(
            "netlink_overruns",
            "How often notifications were lost because the socket's buffer was full.",
            counters.overruns,
        )
    }

    fn devices(&mut self, host: &Host) -> fmt::Result {
        const WHAT: [&str; 4] = ["bytes", "packets", "errors", "dropped"];
        type Direction = fn(&Device) -> &[u64; 4];
        let directions: [(&str, Direction); 2] =
            [("receive", |device| &device.receive), ("transmit", |device| &device.transmit)];
        for (direction, of) in directions {
            for (index, what) in WHAT.into_iter().enumerate() {
                let series: Vec<_> = host
                    .devices
                    .iter()
                    .map(|device| (vec![("device", device.name.clone())], of(device)[index] as f64))
                    .collect();
                let help = format!("Counter of the device, in direction {direction}: {what}.");
                self.counters(&format!("device_{direction}_{what}"), &help, &series)?;
            }
        }
        self.counter(
            "udp_checksum_errors",
            "UDP datagrams with a wrong checksum that this host received.",
            host.checksum_errors,
        )
    }

    /// The datapath of `udp`.
    fn tunnel(&mut self, all: &BTreeMap<String, u64>) -> fmt::Result {
        if all.is_empty() {
            return Ok(());
        }
        let of = |name: &str| all.get(name).copied().unwrap_or_default() as f64;
        for what in ["packets", "bytes"] {
            let series = [("transmit", "sent"), ("receive", "received")].map(|(direction, verb)| {
                (vec![("direction", direction.to_owned())], of(&format!("{verb}_{what}")))
            });
            let help = format!("Counter of the udp backend: {what}, without outer headers.");
            self.counters(&format!("tunnel_{what}"), &help, &series)?;
        }
        let dropped = |(prefix, direction): (&str, &str)| {
            let series = all.iter().filter_map(|(name, value)| {
                // Messages of handshakes are no packets, and have a metric of their own.
                let reason = name.strip_prefix(prefix).filter(|reason| *reason != "handshakes")?.to_owned();
                Some((vec![("direction", direction.to_owned()), ("reason", reason)], *value as f64))
            });
            series.collect::<Vec<_>>()
        };
        let series: Vec<_> =
            [("dropped_", "transmit"), ("refused_", "receive")].into_iter().flat_map(dropped).collect();
        self.counters("tunnel_dropped", "Packets that the udp backend did not carry, by reason.", &series)?;
        self.counters(
            "tunnel_fallbacks",
            "Groups of packets that the kernel refused to segment.",
            &[(Vec::new(), of("sent_fallbacks"))],
        )?;
        self.counters(
            "icmp_errors",
            "ICMP errors that the udp backend sent.",
            &[(Vec::new(), of("icmp_errors"))],
        )
    }

    fn pools(&mut self, pools: &[Pool]) -> fmt::Result {
        let mut series = Vec::new();
        for pool in pools {
            let family = if pool.subnet.contains(':') { "ipv6" } else { "ipv4" };
            let free = pool.size.saturating_sub(pool.used);
            let states = [("used", Some(pool.used)), ("free", Some(free)), ("leaked", pool.leaked)];
            for (state, count) in states {
                let labels = vec![("state", state.to_owned()), ("family", family.to_owned())];
                series.extend(count.map(|count| (labels, count as f64)));
            }
        }
        self.gauges(
            "ipam_addresses",
            "Addresses for pods of this node; leaked ones are among the used ones.",
            &series,
        )
    }

    fn probes(&mut self, probes: &ProbeStatus) -> fmt::Result {
        let path = |name: &str| vec![("path", name.to_owned())];
        let mut series = Vec::new();
        for (name, of) in &probes.paths {
            let results = [
                ("answered", of.answered),
                ("lost", of.lost),
                ("late", of.late),
                ("duplicate", of.duplicate),
            ];
            for (result, count) in results {
                let mut labels = path(name);
                labels.push(("result", result.to_owned()));
                series.push((labels, count as f64));
            }
        }
        self.counters("probes", "Probes of peers, by path and result.", &series)?;
        let name = prefixed("probe_rtt_seconds");
        let mut metric = self.begin(&name, "Round trips of probes, by path.", MetricType::Histogram)?;
        for (name, of) in &probes.paths {
            let mut buckets = of.classes.clone();
            let within: u64 = buckets.iter().map(|(_, count)| count).sum();
            buckets.push((f64::INFINITY, of.answered.saturating_sub(within)));
            let labels = path(name);
            let mut metric = metric.encode_family(&labels)?;
            metric.encode_histogram::<NoLabelSet>(of.sum, of.answered, &buckets, None)?;
        }
        self.peers_probed(probes)
    }

    fn policy(&mut self, policy: &Policy) -> fmt::Result {
        self.histogram(
            "policy_apply_seconds",
            "Time of a change from what is known to the kernel.",
            &policy.apply,
        )?;
        self.histogram(
            "policy_add_seconds",
            "Time that the ADD of a pod waited for its policies.",
            &policy.add,
        )?;
        for (name, help, value) in [
            ("policy_changes", "Objects of nftables that were changed.", policy.changes),
            ("policy_repairs", "Damage by other programs that was repaired.", policy.repairs),
            ("policy_add_failures", "Pods whose ADD was refused.", policy.add_failures),
        ] {
            self.counter(name, help, value)?;
        }
        for (name, help, value) in [
            (
                "policy_generation",
                "The generation of connections in force; 0 without tables.",
                policy.generation,
            ),
            ("policy_policies", "Policies that are known.", policy.policies),
            ("policy_elements", "Addresses in the sets of selectors.", policy.elements),
            ("policy_pods_known", "Pods that are known.", policy.pods_known),
            ("policy_pods_local", "Pods of this node.", policy.pods_local),
            (
                "policy_isolated_addresses",
                "Addresses of this node's pods that a policy isolates.",
                policy.isolated_addresses,
            ),
            (
                "policy_ignored",
                "Members of policies that are not understood and allow nothing.",
                policy.ignored,
            ),
            ("policy_steering", "Whether frames between this node's pods are routed.", policy.steering),
            ("policy_watches", "Watches of the API server.", policy.watches),
        ] {
            self.gauge(name, help, value as f64)?;
        }
        Ok(())
    }
}

/// Writes whole numbers as such: they are shorter, and exact.
fn put_gauge(metric: &mut MetricEncoder<'_>, value: f64) -> fmt::Result {
    if value.fract() == 0.0 { metric.encode_gauge(&(value as i64)) } else { metric.encode_gauge(&value) }
}

fn put_counter(metric: &mut MetricEncoder<'_>, value: f64) -> fmt::Result {
    if value.fract() == 0.0 {
        metric.encode_counter::<NoLabelSet, u64, f64>(&(value as u64), None)
    } else {
        metric.encode_counter::<NoLabelSet, f64, f64>(&value, None)
    }
}

/// Metrics about any process have their usual names.
fn prefixed(name: &str) -> String {
    if name.starts_with("process_") { name.to_owned() } else { format!("flannel_{name}") }
}

fn number(is_so: bool) -> f64 {
    f64::from(u8::from(is_so))
}

#[cfg(test)]
mod tests;
