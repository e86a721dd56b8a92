//! `flanneld trace`: follows real packets of one flow through this host's tables, and names what drops them.

mod journey;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::IpAddr;
use std::time::Duration;

use backends::kernel::netlink::Netlink;
use backends::trace::{Flow, Steps, Table, TableId, TraceStep, Tracer, sweep};
use backends::{Kernel, KernelState, Scope};
use tokio::time::{Instant, sleep_until};

use journey::{Devices, Fate, Hook, Journey, is_of};

/// So many packets are followed to their end.
const MAX_PACKETS: usize = 10;
/// A packet of which nothing was heard for so long is gone.
const SILENCE: Duration = Duration::from_millis(500);

/// What to follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TraceOptions {
    /// Which packets.
    pub(crate) flow: Flow,
    /// For how long at most.
    pub(crate) live: Duration,
    /// One JSON object a line instead of text.
    pub(crate) json: bool,
}

/// Follows packets and prints what becomes of them.
///
/// # Errors
/// When packets can't be traced, a packet was dropped, or none came.
pub(crate) fn run(options: &TraceOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(follow(options))
}

async fn follow(options: &TraceOptions) -> anyhow::Result<()> {
    sweep()?;
    let devices = devices()?;
    let tracer = Tracer::start(&options.flow)?;
    let mut out = crate::output::stdout();
    let Flow { source, destination, transport, port } = options.flow;
    if !options.json {
        let what = transport.map_or_else(|| "any protocol".to_owned(), |transport| transport.to_string());
        let port = port.map_or_else(String::new, |port| format!(" port {port}"));
        writeln!(
            out,
            "waiting for packets {source} → {destination} and answers, {what}{port}: {:?} or {MAX_PACKETS} packets",
            options.live
        )?;
        out.flush()?;
    }
    let mut watch =
        Watch { flow: options.flow, tracer, devices, tables: BTreeMap::new(), under_way: Vec::new() };
    let end = Instant::now() + options.live;
    let (mut done, mut dropped) = (0, 0);
    while done < MAX_PACKETS {
        let over = watch.next(end).await?;
        if over.is_empty() && Instant::now() >= end {
            break;
        }
        for journey in over {
            done += 1;
            dropped +=
                usize::from(journey.fate != Fate::Delivered && !matches!(journey.fate, Fate::Sent { .. }));
            let text = match options.json {
                true => format!("{}\n", serde_json::to_string(&journey)?),
                false => describe(&journey, destination),
            };
            out.write_all(text.as_bytes())?;
            out.flush()?;
        }
    }
    match (done, dropped) {
        (0, _) => anyhow::bail!(
            "no packet {source} → {destination} came by: it is not sent, it is lost before this node, or it is between two \
             pods of one bridge, which no table sees; flanneld explain {source} {destination} says the way it should take"
        ),
        (_, 0) => Ok(()),
        (done, dropped) => anyhow::bail!("{dropped} of {done} packets ended on this node"),
    }
}

/// Packets that are being followed.
struct Watch {
    flow: Flow,
    tracer: Tracer,
    devices: Devices,
    /// Tables as they were when a packet met them first.
    tables: BTreeMap<TableId, Option<Table>>,
    under_way: Vec<(Instant, Journey)>,
}

impl Watch {
    /// Waits for packets whose fate is known, until `end` at the latest.
    async fn next(&mut self, end: Instant) -> anyhow::Result<Vec<Journey>> {
        let silent = self.under_way.iter().map(|(heard, _)| *heard + SILENCE).min();
        let wake = silent.into_iter().chain([end]).min().unwrap_or(end);
        tokio::select! {
            steps = self.tracer.next() => match steps? {
                Steps::Heard(steps) => steps.iter().for_each(|step| self.take(step)),
                Steps::Lost => tracing::warn!("more was traced than could be read: some steps are missing"),
            },
            () = sleep_until(wake) => {}
        }
        let now = Instant::now();
        let mut over = Vec::new();
        for (heard, mut journey) in std::mem::take(&mut self.under_way) {
            // The end of one is followed by a few steps about it.
            let silent = now >= heard + SILENCE;
            if silent || now >= end {
                journey.end();
            }
            if journey.is_over() { over.push(journey) } else { self.under_way.push((heard, journey)) }
        }
        Ok(over)
    }

    fn take(&mut self, step: &TraceStep) {
        let now = Instant::now();
        let known = self.under_way.iter().position(|(_, journey)| journey.packet == step.packet);
        let moved = || self.under_way.iter().position(|(_, journey)| journey.is_the_same(step));
        let index = match known {
            Some(index) => index,
            // Another tracer's packets, and what follows on the end of one of ours.
            None if !is_of(&self.flow, step) => return,
            None => moved().unwrap_or_else(|| {
                self.under_way.push((now, Journey::begin(step, &self.flow, &self.devices)));
                self.under_way.len() - 1
            }),
        };
        let (heard, journey) = &mut self.under_way[index];
        (*heard, journey.packet) = (now, step.packet);
        if journey.is_over() {
            return;
        }
        journey.note_device(step, &self.devices);
        if self.tracer.is_own(step) {
            return journey.pass(step);
        }
        let tracer = &mut self.tracer;
        // A table that can't be read leaves the rule with its number.
        let table =
            self.tables.entry(step.table.clone()).or_insert_with(|| tracer.table(&step.table).ok().flatten());
        journey.meet(step, table.as_ref());
    }
}

/// Names of this host's devices.
fn devices() -> anyhow::Result<Devices> {
    let observed = Netlink::open()?.observe(&KernelState::default(), &Scope::default())?;
    Ok(observed.host.links.values().map(|link| (link.index, link.name.to_string())).collect())
}

/// A packet's way as lines of text.
fn describe(journey: &Journey, destination: IpAddr) -> String {
    let Journey { what, incoming, answer, decisions, passed, fate, .. } = journey;
    let direction = if *answer { "answer" } else { "packet" };
    let from =
        incoming.as_ref().map_or_else(|| "from this host".to_owned(), |device| format!("in by {device}"));
    let mut text = format!("{direction} {what}, {from}\n");
    for decision in decisions.iter().filter(|decision| decision.rule.is_some() || decision.verdict == "drop")
    {
        text += &format!("    {:<8} {decision}\n", decision.verdict);
    }
    text += &match (fate, journey.dropped_by()) {
        (Fate::Dropped, Some(by)) => {
            let whose = if by.owner == "flannel" { "flannel's own" } else { "not flannel's" };
            let by_whom = if matches!(by.owner, "flannel" | "another program") {
                String::new()
            } else {
                format!(", {}'s by its name", by.owner)
            };
            format!(
                "  ✘ dropped here by {by} ({whose}{by_whom}): nft -a list chain {} {} shows it\n",
                by.table, by.chain
            )
        }
        (Fate::Sent { device }, _) => format!("  ✔ left by {device}\n"),
        (Fate::Delivered, _) => "  ✔ delivered on this host\n".to_owned(),
        _ => format!("  ✘ {}\n", vanished(*passed, destination)),
    };
    text
}

/// Where a packet that no rule dropped may have ended.
fn vanished(passed: Option<Hook>, destination: IpAddr) -> String {
    match passed {
        None => "gone before routing, and no rule dropped it: it is invalid, or a program took it".to_owned(),
        Some(Hook::Prerouting) => format!(
            "routing dropped it: there is no route to {destination} (ip route get {destination}), forwarding is off \
             (sysctl net.ipv4.ip_forward), or rp_filter refuses its source (sysctl net.ipv4.conf.all.rp_filter; nstat -az \
             TcpExtIPReversePathFilter)"
        ),
        Some(hook @ (Hook::Forward | Hook::Output)) => format!(
            "gone after {hook}: no neighbour answers for the next hop, or the packet is longer than the device's MTU and \
             must not be fragmented"
        ),
        Some(hook) => format!("gone after {hook}"),
    }
}
