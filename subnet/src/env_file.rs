//! `subnet.env`: what the agent tells the CNI plugin about this node (contract §4 and §7.2).

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;

use crate::net::{Family, Subnets, addr_of, bits_of};
use crate::regular;

mod atomic;

pub use atomic::{sweep, write_atomically};

/// The content that the agent writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The whole overlay of each enabled family.
    pub networks: Subnets,
    /// This node's subnets.
    pub subnets: Subnets,
    /// MTU of pods in bytes: the underlay's less the backend's overhead.
    pub mtu: u32,
    /// Whether the agent masquerades, so that the delegate plugin must not.
    pub ip_masq: bool,
    /// Where the plugin asks for a pod's network policies before the pod starts, if there are any. Go's plugin
    /// ignores it.
    pub policy_socket: Option<PathBuf>,
}

impl fmt::Display for SubnetEnv {
    /// The file, byte for byte.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (family, prefix) in [(Family::V4, "FLANNEL"), (Family::V6, "FLANNEL_IPV6")] {
            if let (Some(network), Some(subnet)) = (self.networks.get(family), self.subnets.get(family)) {
                let (gateway, len) = (gateway(subnet), subnet.prefix_len());
                writeln!(f, "{prefix}_NETWORK={network}\n{prefix}_SUBNET={gateway}/{len}")?;
            }
        }
        writeln!(f, "FLANNEL_MTU={}\nFLANNEL_IPMASQ={}", self.mtu, self.ip_masq)?;
        match &self.policy_socket {
            Some(socket) => writeln!(f, "FLANNEL_POLICY_SOCKET={}", socket.display()),
            None => Ok(()),
        }
    }
}

impl SubnetEnv {
    /// Makes `path` hold this content: by rename, so that a reader sees the old file or the new one, and
    /// not at all when it is there already. Says whether anything was written.
    ///
    /// # Errors
    /// The I/O error, with the path in its text.
    pub fn write(&self, path: &Path) -> io::Result<bool> {
        let text = self.to_string();
        if regular::read(path).is_ok_and(|current| current == text.as_bytes()) {
            return Ok(false);
        }
        write_atomically(path, text.as_bytes(), 0o644)?;
        Ok(true)
    }
}

/// What has become of a file that had this content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileStanding {
    /// It is there, byte for byte.
    Ours,
    /// Another program wrote it: it says the same of this node, with more or in its own variables (as
    /// `mk-docker-opts.sh -d` does). To be left alone.
    Rewritten,
    /// It is missing, can't be read, or says something else of this node. To be written again.
    Broken,
}

impl SubnetEnv {
    /// What has become of `path` since this content was written to it.
    pub fn standing(&self, path: &Path) -> FileStanding {
        match regular::read_to_string(path) {
            Ok(text) => self.standing_of(&text),
            Err(_) => FileStanding::Broken,
        }
    }

    fn standing_of(&self, text: &str) -> FileStanding {
        let own = self.to_string();
        if text == own {
            return FileStanding::Ours;
        }
        // A line cut off in the middle may still look like one.
        let whole = text.ends_with('\n');
        let has = |line: &str| text.lines().any(|other| other.trim_end() == line);
        let flannels = || text.lines().filter(|line| line.trim_start().starts_with("FLANNEL_"));
        let same =
            own.lines().all(has) && flannels().all(|line| own.lines().any(|ours| ours == line.trim_end()));
        let assignment = |line: &str| line.is_empty() || line.starts_with('#') || line.contains('=');
        let mut subnets = self.subnets.iter().map(|net| format!("{}/{}", gateway(net), net.prefix_len()));
        let translated = flannels().next().is_none()
            && text.lines().all(|line| assignment(line.trim()))
            && subnets.any(|subnet| text.contains(&subnet));
        if whole && (same || translated) { FileStanding::Rewritten } else { FileStanding::Broken }
    }
}

/// `subnet.env` as the CNI plugin reads it: more lenient than what the agent writes, since an older or
/// foreign flanneld may have written it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// `FLANNEL_NETWORK`, a list for historical reasons.
    pub networks_v4: Vec<IpNet>,
    /// `FLANNEL_IPV6_NETWORK`.
    pub networks_v6: Vec<IpNet>,
    /// `FLANNEL_SUBNET` and `FLANNEL_IPV6_SUBNET`, without host bits.
    pub subnets: Subnets,
    /// `FLANNEL_MTU` in bytes.
    pub mtu: Option<u32>,
    /// `FLANNEL_IPMASQ`; `true` only for exactly that word.
    pub ip_masq: Option<bool>,
    /// `FLANNEL_POLICY_SOCKET`: an absolute path, if network policies are in force on this node.
    pub policy_socket: Option<PathBuf>,
}

/// A path of a socket is at most this long: the kernel's `sun_path`, with a zero byte at its end.
pub const MAX_SOCKET_PATH: usize = 107;

/// A line of `subnet.env` can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}={value:?} is not {wanted}")]
pub struct BadLine {
    key: String,
    value: String,
    wanted: &'static str,
}

impl Reading {
    /// Reads the text of the file. Unknown lines and lines without `=` are passed over.
    ///
    /// # Errors
    /// [`BadLine`] for the first known key whose value makes no sense.
    pub fn parse(text: &str) -> Result<Self, BadLine> {
        let mut reading = Self::default();
        for line in text.lines() {
            let Some((key, value)) = line.split_once('=') else { continue };
            let bad =
                |wanted| BadLine { key: key.to_owned(), value: crate::gojson::shortened(value), wanted };
            match key {
                "FLANNEL_NETWORK" => {
                    reading.networks_v4 = networks(value, Family::V4).ok_or_else(|| bad("an IPv4 prefix"))?
                }
                "FLANNEL_IPV6_NETWORK" => {
                    reading.networks_v6 = networks(value, Family::V6).ok_or_else(|| bad("an IPv6 prefix"))?
                }
                "FLANNEL_SUBNET" => {
                    reading.subnets.set(prefix(value, Family::V4).ok_or_else(|| bad("an IPv4 prefix"))?)
                }
                "FLANNEL_IPV6_SUBNET" => {
                    reading.subnets.set(prefix(value, Family::V6).ok_or_else(|| bad("an IPv6 prefix"))?)
                }
                "FLANNEL_MTU" => reading.mtu = Some(value.parse().map_err(|_| bad("a number of bytes"))?),
                "FLANNEL_IPMASQ" => reading.ip_masq = Some(value == "true"),
                "FLANNEL_POLICY_SOCKET" => {
                    let wanted = "an absolute path of at most 107 bytes";
                    reading.policy_socket = Some(socket(value).ok_or_else(|| bad(wanted))?);
                }
                _ => {}
            }
        }
        Ok(reading)
    }

    /// The names of the variables without which no pod can be connected, in Flannel's order.
    pub fn missing(&self) -> Vec<&'static str> {
        let mut missing = Vec::new();
        if self.networks_v4.is_empty() && self.networks_v6.is_empty() {
            missing.extend(["FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"]);
        }
        if self.subnets.is_empty() {
            missing.extend(["FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"]);
        }
        if self.mtu.is_none() {
            missing.push("FLANNEL_MTU");
        }
        if self.ip_masq.is_none() {
            missing.push("FLANNEL_IPMASQ");
        }
        missing
    }
}

fn socket(text: &str) -> Option<PathBuf> {
    let usable = text.starts_with('/') && text.len() <= MAX_SOCKET_PATH && !text.contains('\0');
    usable.then(|| text.into())
}

fn prefix(text: &str, family: Family) -> Option<IpNet> {
    text.parse::<IpNet>().ok().filter(|net| Family::of(net.addr()) == family).map(|net| net.trunc())
}

fn networks(text: &str, family: Family) -> Option<Vec<IpNet>> {
    let mut found = Vec::new();
    for item in text.split(',') {
        let net = prefix(item, family)?;
        if !found.contains(&net) {
            found.push(net);
        }
    }
    Some(found)
}

/// What an earlier run left in `subnet.env`: the networks and subnets, for taking the same lease again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Previous {
    /// `FLANNEL_NETWORK` and `FLANNEL_IPV6_NETWORK`.
    pub networks: Subnets,
    /// `FLANNEL_SUBNET` and `FLANNEL_IPV6_SUBNET`, without host bits.
    pub subnets: Subnets,
}

impl Previous {
    /// Reads the file at start. A missing or unreadable one is the same as none; of a list, invalid items
    /// are skipped, and more than one valid item counts as none (contract §4).
    pub fn read(path: &Path) -> Self {
        regular::read_to_string(path).map(|text| Self::parse(&text)).unwrap_or_default()
    }

    /// The text of [`read`](Self::read).
    pub fn parse(text: &str) -> Self {
        let only = |key: &str, family| {
            let value = text
                .lines()
                .filter_map(|line| line.trim().split_once('='))
                .rfind(|(k, _)| k.trim() == key)?
                .1;
            let mut valid =
                value.trim().trim_matches('"').split(',').filter_map(|item| prefix(item.trim(), family));
            valid.next().filter(|_| valid.next().is_none())
        };
        let both = |v4, v6| [only(v4, Family::V4), only(v6, Family::V6)].into_iter().flatten().collect();
        Self {
            networks: both("FLANNEL_NETWORK", "FLANNEL_IPV6_NETWORK"),
            subnets: both("FLANNEL_SUBNET", "FLANNEL_IPV6_SUBNET"),
        }
    }
}

/// The path of `subnet.env` where nothing says otherwise.
pub const DEFAULT_PATH: &str = "/run/flannel/subnet.env";

/// The gateway address of a subnet: its first address, which the bridge of the node carries.
pub fn gateway(subnet: IpNet) -> IpAddr {
    addr_of(Family::of(subnet.addr()), bits_of(subnet.network()) + 1)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use proptest::prelude::*;

    fn nets(texts: &[&str]) -> Subnets {
        texts.iter().map(|text| text.parse::<IpNet>().unwrap()).collect()
    }

    fn dual() -> SubnetEnv {
        SubnetEnv {
            networks: nets(&["10.42.0.0/16", "2001:cafe:42::/56"]),
            subnets: nets(&["10.42.0.0/24", "2001:cafe:42::/64"]),
            mtu: 1450,
            ip_masq: true,
            policy_socket: None,
        }
    }

    #[test]
    fn the_file_is_byte_for_byte_that_of_go_flannel() {
        assert_eq!(
            dual().to_string(),
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\nFLANNEL_IPV6_NETWORK=2001:cafe:42::/56\n\
             FLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
    }

    #[test]
    fn the_policy_socket_is_named_only_where_there_is_one_and_read_back() {
        let with = SubnetEnv { policy_socket: Some("/run/flannel/policy.sock".into()), ..dual() };
        let text = with.to_string();
        assert_eq!(text, format!("{}FLANNEL_POLICY_SOCKET=/run/flannel/policy.sock\n", dual()));
        assert_eq!(Reading::parse(&text).unwrap().policy_socket, with.policy_socket);
        assert_eq!(Reading::parse(&dual().to_string()).unwrap().policy_socket, None);
        // Switched on or off, the file is written again.
        assert_eq!(with.standing_of(&dual().to_string()), FileStanding::Broken);
        assert_eq!(dual().standing_of(&text), FileStanding::Broken);
        for bad in ["", "policy.sock", &format!("/{}", "x".repeat(107))] {
            let error = Reading::parse(&format!("FLANNEL_POLICY_SOCKET={bad}\n")).unwrap_err().to_string();
            assert!(error.contains("FLANNEL_POLICY_SOCKET=") && error.contains("absolute path"), "{error}");
        }
    }

    #[test]
    fn writing_happens_once_keeps_the_mode_and_leaves_nothing_else_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/subnet.env");
        assert!(dual().write(&path).unwrap());
        assert!(!dual().write(&path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(SubnetEnv { mtu: 1400, ..dual() }.write(&path).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let reading = Reading::parse(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!((reading.mtu, reading.subnets), (Some(1400), dual().subnets));
    }

    #[test]
    fn a_file_of_another_program_that_says_the_same_is_left_alone_and_a_broken_one_is_not() {
        let own = dual().to_string();
        let standing = |text: &str| dual().standing_of(text);
        assert_eq!(standing(&own), FileStanding::Ours);
        let docker = "DOCKER_OPT_BIP=\"--bip=10.42.0.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=false\"\n\
                      DOCKER_OPT_MTU=\"--mtu=1450\"\nDOCKER_OPTS=\" --bip=10.42.0.1/24 --ip-masq=false --mtu=1450\"\n";
        for text in [docker.to_owned(), format!("{own}{docker}"), format!("# by hand\n\n{own}export A=b\n")] {
            assert_eq!(standing(&text), FileStanding::Rewritten, "{text}");
        }
        let mut broken: Vec<String> = (0..own.len()).map(|cut| own[..cut].to_owned()).collect();
        broken.extend((0..own.lines().count()).map(|skip| {
            let kept = own.lines().enumerate().filter(|(index, _)| *index != skip);
            kept.map(|(_, line)| format!("{line}\n")).collect()
        }));
        broken.push(own.replace("1450", "1500"));
        broken.push(own.replace("10.42.0.1/24", "10.42.9.1/24"));
        broken.push(format!("{own}FLANNEL_MTU=9000\n"));
        broken.push(docker.replace("10.42.0.1", "10.42.9.1"));
        broken.push(format!("{docker}FLANNEL_MTU=1450\n"));
        broken.extend(["garbage\n", "FOO=bar\n", "\n", "10.42.0.1/24\n"].map(str::to_owned));
        for text in broken {
            assert_eq!(standing(&text), FileStanding::Broken, "{text:?}");
        }
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(dual().standing(&directory.path().join("subnet.env")), FileStanding::Broken);
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let error = dual().write(Path::new("/proc/nowhere/subnet.env")).unwrap_err();
        assert!(error.to_string().contains("/proc/nowhere/subnet.env"), "{error}");
    }

    #[test]
    fn lists_count_only_with_exactly_one_valid_item() {
        let previous = |value| Previous::parse(&format!("FLANNEL_SUBNET={value}\n")).subnets;
        assert_eq!(previous("10.42.1.1/24"), nets(&["10.42.1.0/24"]));
        assert_eq!(previous("nonsense,10.42.1.1/24"), nets(&["10.42.1.0/24"]));
        assert_eq!(previous("10.42.1.1/24,10.43.1.1/24"), Subnets::default());
        assert_eq!(previous("nonsense"), Subnets::default());
    }

    #[test]
    fn what_is_missing_is_listed_in_flannels_order() {
        assert_eq!(
            Reading::parse("").unwrap().missing().join(", "),
            "FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ"
        );
        assert!(Reading::parse(&dual().to_string()).unwrap().missing().is_empty());
    }

    #[test]
    fn a_list_of_networks_is_read_without_duplicates() {
        let reading =
            Reading::parse("FLANNEL_NETWORK=10.1.0.0/16,10.2.0.0/16,10.1.0.0/16\nFLANNEL_IPMASQ=TRUE")
                .unwrap();
        assert_eq!(reading.networks_v4.len(), 2);
        assert_eq!(reading.ip_masq, Some(false));
        let error = Reading::parse("FLANNEL_MTU=big").unwrap_err().to_string();
        assert_eq!(error, r#"FLANNEL_MTU="big" is not a number of bytes"#);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "(FLANNEL_(NETWORK|SUBNET|MTU|IPMASQ|IPV6_SUBNET)?=?[0-9./:,a-f]{0,20}\n?){0,6}") {
            let _ = (Reading::parse(&text), Previous::parse(&text));
        }

        #[test]
        fn what_is_written_is_read_back(v4: u32, len in 8u8..31, mtu in 576u32..65536, ip_masq: bool) {
            let net = IpNet::new(std::net::Ipv4Addr::from(v4).into(), len).unwrap();
            let env = SubnetEnv { networks: [net.supernet().unwrap()].into_iter().collect(), subnets: [net].into_iter().collect(), mtu, ip_masq, policy_socket: None };
            let previous = Previous::parse(&env.to_string());
            prop_assert_eq!((previous.networks, previous.subnets), (env.networks, env.subnets));
            let reading = Reading::parse(&env.to_string()).unwrap();
            prop_assert_eq!((reading.subnets, reading.mtu, reading.ip_masq), (env.subnets, Some(mtu), Some(ip_masq)));
            prop_assert_eq!(reading.networks_v4, env.networks.iter().collect::<Vec<_>>());
        }
    }
}
