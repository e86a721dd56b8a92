//! What `ip`, `bridge` and `nft` show of a node, line by line.

use std::collections::BTreeMap;

use bench::bed::Member;

use super::bed::Cluster;

/// Whose output is everything that flanneld makes or may have made on a node. Of neighbours only those that
/// somebody made: the others are the kernel's memory of the underlay. A bridge in detail has its timers.
const COMMANDS: [&str; 10] = [
    "nft list ruleset",
    "ip -4 route show table all",
    "ip -6 route show table all",
    "ip -4 rule show",
    "ip -o link show",
    "ip -o -d link show type vxlan",
    "ip -o -d link show type tun",
    "ip -o addr show",
    "ip neigh show nud permanent",
    "bridge fdb show",
];

/// Everything, without the numbers of devices: a recreated one has another.
pub(crate) fn everything(member: &Member) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for command in COMMANDS {
        let shown = member.show(command)?;
        lines
            .extend(shown.lines().map(|line| format!("{command}: {}", without_timers(without_number(line)))));
    }
    Ok(lines)
}

/// Without the time that elements of sets have left.
fn without_timers(line: &str) -> String {
    let mut parts = line.split(" expires ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, rest| text + rest.find([' ', ',']).map_or("", |end| &rest[end..]))
}

fn without_number(line: &str) -> &str {
    match line.split_once(": ") {
        Some((number, rest)) if number.bytes().all(|byte| byte.is_ascii_digit()) => rest.trim(),
        _ => line.trim(),
    }
}

/// The lines that are in one of both alone, or more often in one; their order doesn't matter.
pub(crate) fn differences(before: &[String], after: &[String]) -> Vec<String> {
    let mut count: BTreeMap<&str, i32> = BTreeMap::new();
    before.iter().for_each(|line| *count.entry(line).or_default() -= 1);
    after.iter().for_each(|line| *count.entry(line).or_default() += 1);
    let more = |(line, count): (&str, i32)| {
        let sign = if count < 0 { "-" } else { "+" };
        vec![format!("{sign} {line}"); count.unsigned_abs() as usize]
    };
    count.into_iter().flat_map(more).collect()
}

/// The lines of a node that have an address.
pub(crate) fn naming(member: &Member, address: &str) -> anyhow::Result<Vec<String>> {
    Ok(everything(member)?.into_iter().filter(|line| names(line, address)).collect())
}

/// The lines of all nodes and of all leases that have an address.
pub(crate) fn naming_anywhere(cluster: &Cluster, address: &str) -> anyhow::Result<Vec<String>> {
    let leases = cluster.leases()?;
    let mut lines: Vec<String> =
        leases.lines().filter(|line| names(line, address)).map(|line| format!("lease: {line}")).collect();
    for member in &cluster.members {
        let of_one = naming(member, address)?;
        lines.extend(of_one.into_iter().map(|line| format!("{}: {line}", member.node.name())));
    }
    Ok(lines)
}

/// Whether the address, IP or MAC, is a word of its own in the line.
fn names(line: &str, address: &str) -> bool {
    line.split(|char: char| !(char.is_ascii_hexdigit() || matches!(char, '.' | ':')))
        .any(|word| word == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_not_part_of_a_longer_one() {
        for line in [
            "default via 172.31.0.1 dev eth0",
            "inet 172.31.0.1/24 scope global",
            r#"{"PublicIP":"172.31.0.1","PublicIPv6":null}"#,
        ] {
            assert!(names(line, "172.31.0.1"), "{line}");
        }
        assert!(!names("default via 172.31.0.17 dev eth0", "172.31.0.1"));
        assert!(!names("inet6 fd31::1:2/64 scope global", "fd31::1"));
        assert!(names("2e:55:00:00:00:01 dev flannel.1 dst fd31::1 self", "2e:55:00:00:00:01"));
    }

    #[test]
    fn a_line_too_often_is_a_difference_and_another_order_is_none() {
        let lines = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert!(differences(&lines("a b"), &lines("b a")).is_empty());
        assert_eq!(differences(&lines("a b"), &lines("b b c")), ["- a", "+ b", "+ c"]);
        assert_eq!(without_number("7: flannel.1: <BROADCAST>"), "flannel.1: <BROADCAST>");
        assert_eq!(without_number("fd31::1: x"), "fd31::1: x");
        assert_eq!(
            without_timers("elements = { 8472 expires 4m26s800ms, 4789 expires 1s }"),
            "elements = { 8472, 4789 }"
        );
    }
}
