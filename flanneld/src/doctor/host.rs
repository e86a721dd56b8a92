//! What the host has to do for packets: settings, and rules of other programs.

use backends::firewall::blocking::Blocking;

use super::finding::Finding;
use super::seen::Observation;

pub(super) fn findings(seen: &Observation) -> Vec<Finding> {
    let mut findings = Vec::new();
    match &seen.obstacles {
        Err(why) => findings.push(Finding::not_run("settings", why.clone())),
        Ok(all) if all.is_empty() => {
            findings.push(Finding::ok("settings", "nothing of /proc/sys/net is in the way"))
        }
        Ok(all) => findings.extend(all.iter().map(|obstacle| {
            Finding::trouble(
                "setting",
                obstacle.object.clone(),
                obstacle.cause.clone(),
                obstacle.remedy.clone(),
            )
        })),
    }
    match &seen.blocking {
        Err(why) => findings.push(Finding::not_run("rules", why.clone())),
        Ok(all) if all.is_empty() => {
            findings.push(Finding::ok("rules", "none is known to drop the tunnel or pods' packets"))
        }
        Ok(all) => findings.extend(all.iter().map(|(what, blocking)| dropped(what, blocking))),
    }
    findings
}

fn dropped(what: &str, blocking: &Blocking) -> Finding {
    let Blocking { table, chain, rule, handle } = blocking;
    let object = match rule {
        Some(rule) => format!("rule {rule} of chain {chain} in table {table}"),
        None => format!("policy of chain {chain} in table {table}"),
    };
    let remedy = match (rule, handle) {
        (Some(_), Some(handle)) => {
            format!(
                "remove it (nft delete rule {table} {chain} handle {handle}), or have the program that made it accept {what}"
            )
        }
        _ => format!("have the program that made it accept {what} (firewalld, ufw: add a rule for it)"),
    };
    Finding::trouble("rules", object, format!("it drops {what}"), remedy)
}
