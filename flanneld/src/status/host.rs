//! What the kernel says in `/proc` about this network namespace and this process.

use std::fs;

use super::model::{Device, Process};

/// Ticks a second in `/proc/self/stat`, on every architecture of today.
const USER_HZ: f64 = 100.0;

/// UDP datagrams with wrong checksums, of both families, since the namespace exists.
pub(crate) fn checksum_errors() -> u64 {
    let text = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    checksum_errors_in(&text("snmp")) + snmp6(&text("snmp6"), "Udp6InCsumErrors")
}

/// ICMP echo requests that arrived, of both families, since the namespace exists.
pub(super) fn echo_requests() -> u64 {
    let text = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default();
    snmp(&text("snmp"), "Icmp:", "InEchos") + snmp6(&text("snmp6"), "Icmp6InEchos")
}

fn checksum_errors_in(text: &str) -> u64 {
    snmp(text, "Udp:", "InCsumErrors")
}

/// A column of the two lines that begin so: names, then values.
fn snmp(text: &str, group: &str, column: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { return 0 };
    let pairs = names.split_whitespace().zip(values.split_whitespace());
    let mut found = pairs.filter(|(name, _)| *name == column);
    found.next().and_then(|(_, value)| value.parse().ok()).unwrap_or_default()
}

fn snmp6(text: &str, name: &str) -> u64 {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(name));
    lines.next().and_then(|value| value.trim().parse().ok()).unwrap_or_default()
}

/// The counters of the devices with these names, in the kernel's order.
pub(super) fn devices(names: &[&str]) -> Vec<Device> {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    devices_in(&text, names)
}

/// Two lines of headings, then `name: ` with eight columns of receiving and eight of sending: bytes, packets, errs,
/// drop, and four that are of no interest here.
fn devices_in(text: &str, names: &[&str]) -> Vec<Device> {
    let device = |line: &str| {
        let (name, columns) = line.split_once(':')?;
        let name = names.iter().find(|known| **known == name.trim())?;
        let columns: Vec<u64> = columns.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        let receive = *columns.first_chunk::<4>()?;
        let transmit = *columns.get(8..)?.first_chunk::<4>()?;
        Some(Device { name: (*name).to_owned(), receive, transmit })
    };
    text.lines().skip(2).filter_map(device).collect()
}

/// This process.
pub(super) fn process() -> Process {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = resident.and_then(|text| text.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Process {
        cpu_seconds: cpu_ticks(&stat) as f64 / USER_HZ,
        resident_bytes: kilobytes.unwrap_or_default() * 1024,
        open_fds: fs::read_dir("/proc/self/fd").map(|all| all.count() as u64).unwrap_or_default(),
    }
}

/// User and system time: fields 14 and 15, counted behind the name, which may contain anything.
fn cpu_ticks(stat: &str) -> u64 {
    let Some((_, rest)) = stat.rsplit_once(')') else { return 0 };
    rest.split_whitespace().skip(11).take(2).filter_map(|text| text.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_their_names_and_columns() {
        let text = "Ip: Forwarding\nIp: 1\nIcmp: InMsgs InEchos\nIcmp: 9 4\nUdp: InDatagrams NoPorts InCsumErrors MemErrors\nUdp: 5 6 7 8\n\
                    UdpLite: InDatagrams InCsumErrors\nUdpLite: 1 99\n";
        assert_eq!((checksum_errors_in(text), snmp(text, "Icmp:", "InEchos")), (7, 4));
        assert_eq!(checksum_errors_in("Udp: InDatagrams\n"), 0);
        assert_eq!(snmp6("Ip6InReceives 1\nUdp6InCsumErrors                \t3\n", "Udp6InCsumErrors"), 3);
        let dev = "Inter-|   Receive  |  Transmit\n face |bytes packets\n\
                   flannel.1: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0\n    lo:9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9\n eth0: 1 2\n";
        let found = devices_in(dev, &["flannel.1", "eth0"]);
        assert_eq!(found.len(), 1, "a line that is cut off says nothing");
        assert_eq!((found[0].receive, found[0].transmit), ([1, 2, 3, 4], [5, 6, 7, 8]));
        assert_eq!(cpu_ticks("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14"), 11 + 12);
    }
}
