//! Wrong checksums that the kernel found.

use std::fs;

use anyhow::Context;

use super::namespace::Namespace;

/// Packets with wrong checksums, by protocol; TCP and UDP of both families.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChecksumErrors {
    /// Headers of IPv4.
    pub ip: u64,
    /// ICMP and ICMPv6.
    pub icmp: u64,
    /// TCP.
    pub tcp: u64,
    /// UDP.
    pub udp: u64,
}

impl ChecksumErrors {
    /// All together.
    pub fn sum(self) -> u64 {
        self.ip + self.icmp + self.tcp + self.udp
    }
}

impl Namespace {
    /// What its kernel found so far.
    pub fn checksum_errors(&self) -> anyhow::Result<ChecksumErrors> {
        let read = |file: &str| {
            let path = format!("/proc/thread-self/net/{file}");
            self.run(|| fs::read_to_string(&path)).with_context(|| format!("can't read {path}"))
        };
        let (snmp, netstat, snmp6) = (read("snmp")?, read("netstat")?, read("snmp6")?);
        let of = |text, protocol| value(text, protocol).with_context(|| format!("no counter of {protocol}"));
        let of_v6 = |name| value_v6(&snmp6, name).with_context(|| format!("no counter {name}"));
        Ok(ChecksumErrors {
            ip: of(&netstat, "IpExt")?,
            icmp: of(&snmp, "Icmp")? + of_v6("Icmp6InCsumErrors")?,
            // Both families together.
            tcp: of(&snmp, "Tcp")?,
            udp: of(&snmp, "Udp")? + of_v6("Udp6InCsumErrors")?,
        })
    }
}

/// The counter of a protocol in the form of `/proc/net/snmp`: a line with names, then a line with numbers.
fn value(text: &str, protocol: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(": "));
    let (names, numbers) = (lines.next()?.split_whitespace(), lines.next()?.split_whitespace());
    names.zip(numbers).find(|(name, _)| *name == "InCsumErrors")?.1.parse().ok()
}

/// A counter in the form of `/proc/net/snmp6`: names and numbers in a line each.
fn value_v6(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_protocol_and_name() {
        let text = "Ip: A InCsumErrors\nIp: 1 2\nTcp: InErrs InCsumErrors\nTcp: 3 4\n";
        assert_eq!((value(text, "Tcp"), value(text, "Udp")), (Some(4), None));
        assert_eq!(value_v6("Ip6InReceives 1\nUdp6InCsumErrors  \t3\n", "Udp6InCsumErrors"), Some(3));
    }
}
