//! The configuration of `host-local`: the `ipam` member of a network, and the addresses that are asked for.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde_json::{Map, Value, json};
use subnet::gojson::{Object, shortened};

use super::range::RangeSet;
use super::store::DEFAULT_DATA_DIR;
use crate::args::Args;
use crate::netlink::route::Route;
use crate::result::read_route;

/// What to hand out, and where it is noted.
#[derive(Debug)]
pub(crate) struct HostLocalConfig {
    pub(crate) network: String,
    pub(crate) data_dir: PathBuf,
    pub(crate) sets: Vec<RangeSet>,
    pub(crate) routes: Vec<Route>,
    /// The addresses that are asked for, each at most once.
    pub(crate) requested: Vec<IpAddr>,
    /// A file in the form of resolv.conf for the result's `dns`.
    resolv_conf: Option<PathBuf>,
}

impl HostLocalConfig {
    /// Reads the configuration of a network.
    ///
    /// # Errors
    /// A sentence with the value, in the words of the original where it has some.
    pub(crate) fn parse(config: &Object<'_>, args: &Args) -> Result<Self, String> {
        let ipam = config.object("ipam")?.ok_or("IPAM config missing 'ipam' key")?;
        let runtime = config.object("runtimeConfig")?;
        let version: String = config.get("cniVersion")?.unwrap_or_default();
        let non_empty = |key: &str| Ok::<_, String>(ipam.get::<String>(key)?.filter(|text| !text.is_empty()));
        let routes: Vec<Value> = ipam.get("routes")?.unwrap_or_default();
        let routes = routes.iter().map(|route| {
            read_route(route).ok_or_else(|| format!("invalid route: {}", shortened(&route.to_string())))
        });
        let config = Self {
            network: config.get("name")?.unwrap_or_default(),
            data_dir: non_empty("dataDir")?.unwrap_or_else(|| DEFAULT_DATA_DIR.into()).into(),
            sets: sets(&ipam, runtime.as_ref())?,
            routes: routes.collect::<Result<_, _>>()?,
            requested: requested(config, runtime.as_ref(), args)?,
            resolv_conf: non_empty("resolvConf")?.map(PathBuf::from),
        };
        config.check(&version)?;
        Ok(config)
    }

    fn check(&self, version: &str) -> Result<(), String> {
        if self.sets.is_empty() {
            return Err("no IP ranges specified".into());
        }
        let ipv6 = self.sets.iter().filter(|set| set.is_ipv6()).count();
        if matches!(version, "" | "0.1.0" | "0.2.0") && (ipv6 > 1 || self.sets.len() - ipv6 > 1) {
            return Err(format!("CNI version {version} does not support more than 1 address per family"));
        }
        for (second, set) in self.sets.iter().enumerate() {
            if let Some(first) = self.sets[..second].iter().position(|other| other.overlaps(set)) {
                return Err(format!("range set {first} overlaps with {second}"));
            }
        }
        Ok(())
    }

    /// The `dns` member of the result.
    ///
    /// # Errors
    /// A sentence, when the file can't be read.
    pub(crate) fn dns(&self) -> Result<Map<String, Value>, String> {
        let Some(file) = &self.resolv_conf else { return Ok(Map::new()) };
        let text = fs::read_to_string(file).map_err(|error| format!("open {}: {error}", file.display()))?;
        Ok(dns(&text))
    }

    /// The directory of the directories of reservations.
    pub(crate) fn data_dir(&self) -> &Path {
        &self.data_dir
    }
}

/// The sets of the runtime come first, then one in the old form, then the others.
fn sets(ipam: &Object<'_>, runtime: Option<&Object<'_>>) -> Result<Vec<RangeSet>, String> {
    let mut given: Vec<Value> = match runtime {
        Some(runtime) => runtime.get("ipRanges")?.unwrap_or_default(),
        None => Vec::new(),
    };
    let before = given.len();
    given.extend(ipam.get::<Vec<Value>>("ranges")?.unwrap_or_default());
    let mut sets = Vec::new();
    for (index, set) in given.iter().enumerate() {
        sets.push(RangeSet::parse(set, index)?);
    }
    if ipam.get::<String>("subnet")?.is_some() {
        sets.insert(before, RangeSet::of_one(ipam)?);
    }
    Ok(sets)
}

/// From `CNI_ARGS`, from `args` and from the runtime; the last two may be lists.
fn requested(config: &Object<'_>, runtime: Option<&Object<'_>>, args: &Args) -> Result<Vec<IpAddr>, String> {
    let mut requested = Vec::new();
    let mut request = |address: IpAddr| {
        let address = address.to_canonical();
        if !requested.contains(&address) {
            requested.push(address);
        }
    };
    if let Some(text) = args.only("IP")? {
        let bad = |_| format!("ARGS: error parsing value of pair \"IP={text}\": invalid IP address {text}");
        request(text.parse().map_err(bad)?);
    }
    let bad = |text: &String| format!("invalid IP address: {}", shortened(text));
    let of_args = match config.object("args")? {
        Some(args) => match args.object("cni")? {
            Some(cni) => cni.get::<Vec<String>>("ips")?.unwrap_or_default(),
            None => Vec::new(),
        },
        None => Vec::new(),
    };
    for text in &of_args {
        request(text.parse().map_err(|_| bad(text))?);
    }
    let of_runtime = match runtime {
        Some(runtime) => runtime.get::<Vec<String>>("ips")?.unwrap_or_default(),
        None => Vec::new(),
    };
    for text in &of_runtime {
        let address = text.parse().or_else(|_| text.parse::<IpNet>().map(|prefix| prefix.addr()));
        request(address.map_err(|_| bad(text))?);
    }
    Ok(requested)
}

fn dns(resolv_conf: &str) -> Map<String, Value> {
    let mut dns = Map::new();
    for line in resolv_conf.lines().map(str::trim) {
        if line.starts_with(['#', ';']) {
            continue;
        }
        let mut words = line.split_whitespace();
        let (Some(key), values) = (words.next(), words.collect::<Vec<_>>()) else { continue };
        let (key, values) = match (key, &values[..]) {
            (_, []) => continue,
            ("nameserver", [first, ..]) => ("nameservers", vec![*first]),
            ("domain", [first, ..]) => {
                dns.insert("domain".into(), json!(first));
                continue;
            }
            ("search" | "options", all) => (key, all.to_vec()),
            _ => continue,
        };
        if let Value::Array(list) = dns.entry(key).or_insert_with(|| json!([])) {
            list.extend(values.into_iter().map(Value::from));
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(members: Value, args: &str) -> Result<HostLocalConfig, String> {
        let text = members.to_string();
        HostLocalConfig::parse(&Object::parse(&text).unwrap(), &Args::parse(args).unwrap())
    }

    #[test]
    fn ranges_come_from_the_runtime_then_in_the_old_form_then_from_the_list() {
        let config = config(
            json!({"name": "n", "cniVersion": "1.0.0",
                "ipam": {"subnet": "10.2.0.0/24", "ranges": [[{"subnet": "10.3.0.0/24"}]]},
                "runtimeConfig": {"ipRanges": [[{"subnet": "10.1.0.0/24"}]]}}),
            "",
        );
        let texts: Vec<_> = config.unwrap().sets.iter().map(RangeSet::text).collect();
        assert_eq!(texts, ["10.1.0.1-10.1.0.254", "10.2.0.1-10.2.0.254", "10.3.0.1-10.3.0.254"]);
    }

    #[test]
    fn addresses_are_asked_for_in_three_places() {
        let asking = json!({"name": "n", "cniVersion": "1.0.0", "ipam": {"subnet": "10.2.0.0/24"},
            "args": {"cni": {"ips": ["10.2.0.8", "10.2.0.7"]}},
            "runtimeConfig": {"ips": ["10.2.0.9/24", "fd00::9"]}});
        let requested = config(asking, "IP=10.2.0.7").unwrap().requested;
        let texts: Vec<_> = requested.iter().map(IpAddr::to_string).collect();
        assert_eq!(texts, ["10.2.0.7", "10.2.0.8", "10.2.0.9", "fd00::9"]);
    }

    #[test]
    fn a_configuration_that_makes_no_sense_is_named() {
        for (members, args, expected) in [
            (json!({}), "", "IPAM config missing 'ipam' key"),
            (json!({"ipam": {}}), "", "no IP ranges specified"),
            (
                json!({"ipam": {"ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "10.9.0.0/16"}]]}}),
                "",
                "CNI version  does not",
            ),
            (
                json!({"cniVersion": "1.0.0", "ipam": {"ranges": [[{"subnet": "10.9.0.0/24"}], [{"subnet": "10.9.0.0/16"}]]}}),
                "",
                "range set 0 overlaps with 1",
            ),
            (
                json!({"ipam": {"subnet": "10.9.0.0/24"}}),
                "IP=zz",
                "ARGS: error parsing value of pair \"IP=zz\": invalid IP address zz",
            ),
            (
                json!({"ipam": {"subnet": "10.9.0.0/24"}, "runtimeConfig": {"ips": ["zz"]}}),
                "",
                "invalid IP address: zz",
            ),
            (
                json!({"ipam": {"subnet": "10.9.0.0/24", "routes": [{"dst": "x"}]}}),
                "",
                "invalid route: {\"dst\":\"x\"}",
            ),
        ] {
            let error = config(members, args).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn resolv_conf_becomes_the_dns_of_the_result() {
        let text = "# c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\ndomain a.b\nsearch a.b c.d\noptions ndots:5\nnameserver\n";
        let expected = json!({"nameservers": ["10.0.0.1", "10.0.0.2"], "domain": "a.b", "search": ["a.b", "c.d"], "options": ["ndots:5"]});
        assert_eq!(Value::from(dns(text)), expected);
    }
}
