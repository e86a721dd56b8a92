//! What every other check leans on: the agent, its store, its lease, its conditions.

use std::net::IpAddr;

use super::finding::Finding;
use super::seen::{AgentAnswer, Observation, Read};
use crate::status::NodeStatus;

/// A lease that ends sooner than this, and can't be renewed, is a trouble.
const LEASE_ENDS_SOON: u64 = 2 * 3600;

/// Conditions that have checks of their own.
const CHECKED_ELSEWHERE: [&str; 2] = ["store", "network-policy"];

/// Notes that say that something is wrong, by subject. Others tell what is so, or are in other checks.
const NOTES: [&str; 9] = [
    "backend",
    "network",
    "configuration",
    "configuration-keys",
    "carrier",
    "public-address",
    "surroundings",
    "tunnel",
    "saved",
];

pub(super) fn findings(seen: &Observation) -> Vec<Finding> {
    let status = match &seen.agent {
        AgentAnswer::Silent { why, running, lacking } => {
            let mut findings = vec![silent(why, running.as_deref())];
            findings.extend(lacks(lacking));
            return findings;
        }
        AgentAnswer::Answers(status) => status,
    };
    let mut findings = Vec::new();
    if !status.alive {
        findings.push(Finding::trouble(
            "agent",
            "flanneld",
            "its loop does not turn any more",
            "restart it; its log and /proc/PID/stack say where it stands",
        ));
    }
    conditions(status, &mut findings);
    if findings.is_empty() {
        let version =
            format!("{} answers, {}", status.version, if status.ready { "ready" } else { "not ready" });
        findings.push(Finding::ok("agent", version));
    }
    store(status, &mut findings);
    let before = findings.len();
    for note in NOTES.iter().filter_map(|subject| Some((*subject, status.notes.get(*subject)?))) {
        findings.extend(note.1.iter().map(|text| Finding::said("node", note.0, text)));
    }
    fights(status, &mut findings);
    if findings.len() == before {
        findings.push(Finding::ok("kernel", "as desired, and nobody undoes it"));
    }
    findings
}

fn silent(why: &str, running: Option<&str>) -> Finding {
    match running {
        None => Finding::trouble(
            "agent",
            "flanneld",
            format!("it is not running ({why}): the data path stays as it is, and follows no change"),
            "start it (kubectl -n kube-flannel get pods -o wide, or systemctl status flanneld), and look at its log",
        ),
        Some(running) => Finding::trouble(
            "agent",
            "flanneld",
            format!("{running}, and does not answer ({why})"),
            "give doctor the agent's --healthz-port and --healthz-ip; if they are right, restart it",
        ),
    }
}

/// What is damaged while there is no agent to put it right.
fn lacks(lacking: &Read<Vec<String>>) -> Vec<Finding> {
    match lacking {
        Err(why) => vec![Finding::not_run("kernel", why.clone())],
        Ok(all) if all.is_empty() => vec![Finding::ok("kernel", "as the agent saved it")],
        Ok(all) => {
            let finding = |change: &String| {
                let cause = format!("it is not as the agent saved it: \"{change}\" would be needed");
                Finding::trouble(
                    "kernel",
                    object_of(change),
                    cause,
                    "start flanneld, which puts it right at once",
                )
            };
            all.iter().map(finding).collect()
        }
    }
}

fn conditions(status: &NodeStatus, findings: &mut Vec<Finding>) {
    let unmet = status.conditions.iter().filter_map(|(name, why)| Some((name, why.as_ref()?)));
    for (name, why) in unmet.filter(|(name, _)| !CHECKED_ELSEWHERE.contains(&name.as_str())) {
        findings.push(Finding::said("condition", name.clone(), why));
    }
}

fn store(status: &NodeStatus, findings: &mut Vec<Finding>) {
    let store = &status.store;
    let ends_in = store.lease_ends.map(|ends| ends.saturating_sub(status.at));
    let soon = ends_in.filter(|left| *left < LEASE_ENDS_SOON);
    let trouble = store.trouble.as_ref().or(store.lease_trouble.as_ref());
    if let (Some(left), Some(why)) = (soon, trouble) {
        let cause = format!("it ends in {} and can't be renewed: {why}", crate::show::span(left));
        let remedy =
            "let the store answer and accept this node before then: peers drop the node with its lease";
        findings.push(Finding::trouble("lease", store.name.clone(), cause, remedy));
        return;
    }
    if store.refused {
        let why = store.trouble.clone().unwrap_or_default();
        findings.push(Finding::said("store", store.name.clone(), &format!("it refuses this node: {why}")));
    } else if let Some(why) = &store.trouble {
        findings.push(Finding::said("store", store.name.clone(), &format!("it is away: {why}")));
    } else if let Some(why) = &store.lease_trouble {
        findings.push(Finding::said("lease", store.name.clone(), why));
    } else if let Some(Some(why)) = status.conditions.get("store") {
        findings.push(Finding::said("store", store.name.clone(), why));
    } else {
        findings.push(Finding::ok("store", "connected, the lease is renewed"));
    }
}

fn fights(status: &NodeStatus, findings: &mut Vec<Finding>) {
    let kernel = &status.kernel;
    let remedy = "find the program that undoes it (another network agent, NetworkManager, a script; ip monitor names \
                  the moments), and stop it or take these devices out of its hands";
    // What flanneld tells itself comes first.
    let rules = status.notes.get("rules").into_iter().flatten();
    let rules = rules.filter(|note| note.contains("something else on this host undoes it"));
    for text in kernel.fights.iter().chain(rules) {
        findings.push(Finding::trouble("kernel", object_of(text), text.clone(), remedy));
    }
    for text in &kernel.refused {
        let remedy = "look at the kernel's reason; an object of another program may stand in the way";
        findings.push(Finding::trouble("kernel", object_of(text), text.clone(), remedy));
    }
    for change in &kernel.changes {
        let object = object_of(change);
        if findings.iter().any(|finding| finding.object == object) {
            continue;
        }
        let cause =
            format!("it is not as desired, and flanneld has not put it right: \"{change}\" is needed");
        let remedy = "look at the log of flanneld for this object; if another program undoes it, stop that; else restart flanneld";
        findings.push(Finding::trouble("kernel", object, cause, remedy));
    }
}

/// The device or the destination that a change names: `"link set flannel.1 up" was needed …`.
fn object_of(text: &str) -> String {
    let quoted = text.strip_prefix('"').and_then(|rest| rest.split('"').next()).unwrap_or(text);
    let words: Vec<&str> = quoted.split(' ').map(without_colon).collect();
    let device = words.windows(2).find(|pair| pair[0] == "dev").map(|pair| pair[1]);
    let at = if words.get(2) == Some(&"blackhole") { 3 } else { 2 };
    let second = words.get(at).copied().unwrap_or_default();
    match (words.first().copied(), device) {
        (Some("link" | "route"), _) => second.to_owned(),
        (_, Some(device)) => device.to_owned(),
        _ => second.to_owned(),
    }
}

/// A word of a change without the colon after which the kernel's reason follows.
fn without_colon(word: &str) -> &str {
    let ends_with_reason = |_: &&str| word.parse::<IpAddr>().is_err();
    word.strip_suffix(':').filter(ends_with_reason).unwrap_or(word)
}

#[cfg(test)]
mod tests {
    use super::object_of;

    #[test]
    fn a_change_names_its_device_or_its_destination() {
        for (text, object) in [
            ("\"link set flannel.1 up\" was needed more than 5 times", "flannel.1"),
            ("\"route replace 10.1.2.0/24 via 192.0.2.2 dev eth0 proto 70\" was needed", "10.1.2.0/24"),
            ("\"fdb replace 0a:00:00:00:00:01 dev flannel.1 dst 192.0.2.9\" was", "flannel.1"),
            ("route replace 10.1.2.0/24 via 192.0.2.2: Network is unreachable", "10.1.2.0/24"),
            ("route add blackhole 10.1.2.0/24 metric 4294967295", "10.1.2.0/24"),
            ("route add blackhole fd00:10:244:26::/64 metric 4294967295", "fd00:10:244:26::/64"),
            (
                "route replace fd00:10:244:26::/64 via fd00:10:244:26:: dev flannel-v6.1",
                "fd00:10:244:26::/64",
            ),
            ("\"route replace fd00:10:244:26::/64\" was needed", "fd00:10:244:26::/64"),
            ("address add fd00:10:244:26::", "fd00:10:244:26::"),
            ("address add fd00:10:244:26::/128 dev flannel-v6.1: Permission denied", "flannel-v6.1"),
            ("link add flannel.1: File exists", "flannel.1"),
            ("fdb replace 0a:00 dst 192.0.2.9 dev flannel.1", "flannel.1"),
        ] {
            assert_eq!(object_of(text), object, "{text}");
        }
    }
}
