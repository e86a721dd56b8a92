//! Calls of the CNI plugin that failed a moment ago, in its own words.

use std::collections::BTreeMap;

use super::finding::Finding;
use super::seen::Observation;
use crate::cni_calls::FailedCall;
use crate::show::span;

/// Older failures say nothing about now: a runtime repeats what fails within this time, in seconds.
const RECENTLY: u64 = 180;

/// Parts of messages of the plugins, and what to do about them.
const REMEDIES: [(&str, &str); 6] = [
    (
        "no IP addresses available",
        "flanneld doctor --fix=leaked-addresses --dry-run lists reservations of pods that are gone; else fewer pods, or larger subnets",
    ),
    (
        "failed to find plugin",
        "install the CNI plugins of your distribution in the runtime's directory of plugins",
    ),
    (
        "already has an IP address different",
        "drain the node: flanneld removes the bridge's old address once it has no ports, or do ip address del",
    ),
    (
        "netns",
        "the pod's namespace went away while it was set up: the runtime tries again; if that repeats, look at its log for why it removes sandboxes",
    ),
    ("subnet.env", "flanneld writes it once it is ready: flanneld status says for what it waits"),
    (
        "already exists",
        "something of an earlier attempt is left, or two runtimes use one network: restart the pod, and look for its interface with ip link",
    ),
];

pub(super) fn findings(seen: &Observation) -> Vec<Finding> {
    let Some(status) = seen.agent.status() else { return Vec::new() };
    let recent =
        |failure: &&FailedCall| failure.verb == "ADD" && status.at.saturating_sub(failure.at) < RECENTLY;
    let mut by_message: BTreeMap<&str, Vec<&FailedCall>> = BTreeMap::new();
    for failure in status.cni.failures.iter().filter(recent) {
        by_message.entry(&failure.message).or_default().push(failure);
    }
    let finding = |(message, failures): (&str, Vec<&FailedCall>)| {
        let last = failures.iter().map(|failure| failure.at).max().unwrap_or_default();
        let code = failures.last().map(|failure| failure.code).unwrap_or_default();
        Finding::trouble(
            "cni-calls",
            format!("ADD (code {code})"),
            format!(
                "{} of the last calls failed, the last one {} ago: {message}",
                failures.len(),
                span(status.at.saturating_sub(last))
            ),
            remedy(message),
        )
    };
    by_message.into_iter().map(finding).collect()
}

fn remedy(message: &str) -> &'static str {
    let known = REMEDIES.iter().find(|(part, _)| message.contains(part));
    known.map_or(
        "kubectl describe pod shows which pod; the runtime tries again until it works",
        |(_, remedy)| remedy,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_plugins_have_their_remedies() {
        for (message, part) in [
            (
                "failed to allocate for range 0: no IP addresses available in range set: 10.244.1.1-10.244.1.254",
                "leaked-addresses",
            ),
            ("failed to find plugin \"portmap\" in path [/opt/cni/bin]", "install"),
            ("\"cni0\" already has an IP address different from 10.244.1.1/24", "drain"),
            ("failed to open netns \"/var/run/netns/x\": no such file or directory", "went away"),
            ("open /run/flannel/subnet.env: no such file or directory", "flanneld status"),
            ("container veth name provided (eth0) already exists", "earlier attempt"),
            ("something else", "describe pod"),
        ] {
            assert!(remedy(message).contains(part), "{message}: {}", remedy(message));
        }
    }
}
