//! Makes a pair's wire carry frames as a real one does: no segment leaves the sender larger than the MTU.
//!
//! veth hands over super-packets whole, which no wire does.

use anyhow::ensure;
use backends::testing::Node;
use bench::process::{DeviceCounters, counters};

use super::bed::Pair;

/// The underlay's frames: its MTU and the Ethernet header.
const FRAME: f64 = 1514.0;

/// A wire with ordinary frames; the features of the devices come back on drop.
pub(crate) struct Segmented<'a> {
    far: &'a Node,
    before: DeviceCounters,
    _restore: [Restore<'a>; 2],
}

/// A device's features to be set again.
struct Restore<'a> {
    node: &'a Node,
    features: Vec<(String, bool)>,
}

impl<'a> Segmented<'a> {
    /// The sender's kernel segments before the wire, the receiver's merges after it.
    pub(crate) fn start(pair: &'a Pair) -> anyhow::Result<Self> {
        let (near, far) = (&pair.near.node, &pair.far.node);
        let shown = near.namespace().command("ethtool").args(["-k", "eth0"]).ok()?;
        let sender = set(near, segmentation(&shown), false)?;
        let receiver = set(far, vec!["generic-receive-offload".to_owned()], true)?;
        Ok(Self { far, before: counters(far.namespace(), "eth0")?, _restore: [sender, receiver] })
    }

    /// An error unless frames had an ordinary size.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let now = counters(self.far.namespace(), "eth0")?;
        let bytes = now.received_bytes - self.before.received_bytes;
        let packets = now.received_packets - self.before.received_packets;
        let size = bytes as f64 / packets.max(1) as f64;
        ensure!(
            packets > 0 && size <= FRAME,
            "{packets} frames of {size:.0} bytes on average: not like a wire"
        );
        Ok(())
    }
}

/// All that makes a device take more than a frame at once.
fn segmentation(shown: &str) -> Vec<String> {
    let lines = shown.lines().filter_map(|line| line.trim().split_once(": "));
    let on = lines.filter(|(name, state)| name.contains("segmentation") && *state == "on");
    let mut names: Vec<String> = on.map(|(name, _)| name.to_owned()).collect();
    // Sums of others, which come back with them.
    names.retain(|name| name != "tcp-segmentation-offload");
    names
}

/// Sets features, and gives back what puts them into their former state.
fn set<'a>(node: &'a Node, names: Vec<String>, on: bool) -> anyhow::Result<Restore<'a>> {
    let restore = Restore { node, features: names.into_iter().map(|name| (name, !on)).collect() };
    let wanted: Vec<_> = restore.features.iter().map(|(name, before)| (name.clone(), !before)).collect();
    ethtool(node, &wanted)?;
    Ok(restore)
}

fn ethtool(node: &Node, features: &[(String, bool)]) -> anyhow::Result<()> {
    let mut command = node.namespace().command("ethtool").args(["-K", "eth0"]);
    for (name, on) in features {
        command = command.arg(name).arg(if *on { "on" } else { "off" });
    }
    command.ok().map(drop)
}

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        if let Err(error) = ethtool(self.node, &self.features) {
            eprintln!("net: features of eth0 could not be restored: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_segmentation_that_can_be_switched_off_is() {
        let shown = "Features for eth0:\ntx-checksumming: on\ntcp-segmentation-offload: on\n\
            \ttx-tcp-segmentation: on\ngeneric-segmentation-offload: on\ngeneric-receive-offload: off\n\
            tx-fcoe-segmentation: off [fixed]\ntx-udp-segmentation: on\ntx-udp_tnl-segmentation: on [fixed]\n";
        let expected = ["tx-tcp-segmentation", "generic-segmentation-offload", "tx-udp-segmentation"];
        assert_eq!(segmentation(shown), expected);
    }
}
