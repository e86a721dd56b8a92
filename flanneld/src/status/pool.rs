//! The address pool of this node's pods, as `host-local` keeps it: a file for each address.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use backends::kernel::netlink::Netlink;
use ipnet::IpNet;
use subnet::Subnets;

use super::model::Pool;
use crate::cni;

/// The directory is read again after this time at the earliest.
const AGE: Duration = Duration::from_secs(10);

/// An ADD reserves the address first: younger reservations are not taken for leaked.
const SETTLED: Duration = Duration::from_secs(60);

/// More files than this in one directory are not looked at.
const MAX_FILES: usize = 100_000;

/// What was read last.
#[derive(Default)]
pub(crate) struct Pools(Option<(Instant, Subnets, Vec<Pool>)>);

impl Pools {
    /// The pools of these subnets; read from disk if that is due.
    pub(super) fn of(&mut self, subnets: Subnets, cni_directory: &Path) -> Vec<Pool> {
        if let Some((at, known, pools)) = &self.0
            && *known == subnets
            && at.elapsed() < AGE
        {
            return pools.clone();
        }
        let pools = read(subnets, &directory(cni_directory), SystemTime::now());
        self.0 = Some((Instant::now(), subnets, pools.clone()));
        pools
    }
}

/// Where reservations are, by the first CNI configuration of flannel in this directory.
pub(crate) fn directory(cni_directory: &Path) -> PathBuf {
    let all = cni::read(cni_directory);
    let mut ours = all.iter().filter_map(|file| file.conf.as_ref().ok()).filter_map(cni::Conf::flannel);
    ours.next().map_or_else(|| Path::new(cni::DEFAULT_DATA_DIR).join("cbr0"), cni::Flannel::reservations)
}

/// One reserved address.
pub(crate) struct Reservation {
    pub(crate) address: IpAddr,
    pub(crate) path: PathBuf,
    pub(crate) since: Option<SystemTime>,
}

/// The reservations in these subnets, in the order of addresses.
pub(crate) fn reservations(directory: &Path, subnets: Subnets) -> Vec<Reservation> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().take(MAX_FILES);
    let reservation = |entry: fs::DirEntry| {
        let address: IpAddr = entry.file_name().to_str()?.parse().ok()?;
        let ours = subnets.iter().any(|subnet| subnet.contains(&address));
        let since = || entry.metadata().and_then(|meta| meta.modified()).ok();
        ours.then(|| Reservation { address, path: entry.path(), since: since() })
    };
    let mut all: Vec<Reservation> = entries.filter_map(reservation).collect();
    all.sort_by_key(|reservation| reservation.address);
    all
}

/// The reservations that no pod of this node has and that are not new.
pub(crate) fn leaked(all: Vec<Reservation>, pods: &BTreeSet<IpAddr>, now: SystemTime) -> Vec<Reservation> {
    let old = |since: Option<SystemTime>| {
        since.is_none_or(|since| now.duration_since(since).is_ok_and(|age| age >= SETTLED))
    };
    all.into_iter().filter(|one| !pods.contains(&one.address) && old(one.since)).collect()
}

/// How many addresses of a subnet `host-local` gives out: all but the first, the last and the gateway's.
pub(crate) fn size(subnet: IpNet) -> u64 {
    let bits = u32::from(subnet.max_prefix_len() - subnet.prefix_len());
    2u64.checked_pow(bits).map_or(u64::MAX, |all| all.saturating_sub(3))
}

/// The pool of each family.
pub(crate) fn read(subnets: Subnets, directory: &Path, now: SystemTime) -> Vec<Pool> {
    if !directory.is_dir() {
        return Vec::new();
    }
    let pods = Netlink::open().and_then(|mut kernel| kernel.pod_addresses()).ok();
    let mut pools = Vec::new();
    for subnet in subnets.iter() {
        let of_family: Subnets = [subnet].into_iter().collect();
        let all = reservations(directory, of_family);
        let used = all.len() as u64;
        let leaked = pods.as_ref().map(|pods| leaked(all, pods, now).len() as u64);
        pools.push(Pool {
            subnet: subnet.to_string(),
            directory: directory.display().to_string(),
            size: size(subnet),
            used,
            leaked,
        });
    }
    pools
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_has_as_many_addresses_as_are_given_out() {
        for (subnet, addresses) in
            [("10.244.1.0/24", 253), ("10.244.1.0/30", 1), ("10.244.1.0/31", 0), ("fd00::/64", u64::MAX)]
        {
            assert_eq!(size(subnet.parse().unwrap()), addresses, "{subnet}");
        }
    }

    #[test]
    fn a_reservation_is_leaked_if_no_pod_has_the_address_and_it_is_not_new() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["10.244.1.2", "10.244.1.3", "10.244.9.3", "last_reserved_ip.0", "lock"] {
            fs::write(directory.path().join(name), "c1\r\neth0").unwrap();
        }
        let subnets: Subnets = ["10.244.1.0/24".parse::<IpNet>().unwrap()].into_iter().collect();
        let pods = ["10.244.1.2".parse().unwrap()].into();
        let found = |now| {
            let all = reservations(directory.path(), subnets);
            leaked(all, &pods, now).into_iter().map(|one| one.address.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(reservations(directory.path(), subnets).len(), 2);
        assert_eq!(found(SystemTime::now()), Vec::<String>::new());
        assert_eq!(found(SystemTime::now() + SETTLED), ["10.244.1.3"]);
    }
}
