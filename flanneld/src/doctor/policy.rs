//! A NetworkPolicy has no effect: from whether somebody enforces it to what it says.

use super::finding::Finding;
use super::seen::Observation;

const CONDITION: &str = "network-policy";

pub(super) fn findings(seen: &Observation) -> Vec<Finding> {
    let Some(status) = seen.agent.status() else {
        return vec![Finding::not_run("network policies", "it needs the agent's answer")];
    };
    let Some(policy) = &status.policy else {
        return vec![Finding::ok(
            "network policies",
            "flanneld does not enforce any (--network-policy=off): they have an effect only if another program does",
        )];
    };
    let mut findings = Vec::new();
    if let Some(Some(why)) = status.conditions.get(CONDITION) {
        findings.push(Finding::said("network policies", "--network-policy", why));
    }
    for note in status.notes.get(CONDITION).into_iter().flatten() {
        findings.push(Finding::said("network policies", "API server", note));
    }
    if policy.ignored > 0 {
        findings.push(Finding::trouble(
            "network policies",
            "rules of policies",
            format!(
                "{} of their members can't be understood and allow nothing, so connections may be refused that the \
                 policy's author meant to allow",
                policy.ignored
            ),
            "flanneld policy explain SOURCE DESTINATION:PORT names the rule; the log of flanneld names the policy",
        ));
    }
    // Without any policy there are none.
    if policy.policies > 0 && policy.generation == 0 {
        findings.push(Finding::trouble(
            "network policies",
            "nftables",
            "there are no tables of network policies in the kernel",
            "look at the log of flanneld; the kernel needs nf_tables",
        ));
    }
    if !findings.is_empty() {
        return findings;
    }
    let selected = match (policy.policies, policy.isolated_addresses) {
        (0, _) => "there is none in the cluster".to_owned(),
        (all, 0) => {
            format!("known: {all}; none selects a pod of this node: look at podSelector and namespace")
        }
        (all, isolated) => format!(
            "known: {all}; isolated addresses of this node's pods: {isolated}; flanneld policy list names them, flanneld \
             policy explain says why a connection is allowed"
        ),
    };
    vec![Finding::ok("network policies", selected)]
}
