//! Ranges of addresses, as the configuration gives them and as they are walked through.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;
use subnet::gojson::{Object, shortened};

/// Part of a subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) subnet: IpNet,
    pub(crate) start: IpAddr,
    pub(crate) end: IpAddr,
    pub(crate) gateway: IpAddr,
}

/// Ranges of one family, of which an attachment gets one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RangeSet(Vec<Range>);

/// The address as a number that is good for neighbours and comparisons within a family.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// The address after this one; after the last of all, itself.
pub(crate) fn next(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => IpAddr::V4(u32::from(address).saturating_add(1).into()),
        IpAddr::V6(address) => IpAddr::V6(u128::from(address).saturating_add(1).into()),
    }
}

impl Range {
    /// Reads one and fills in what is not given.
    ///
    /// # Errors
    /// A sentence with the value, in the words of the original where it has some.
    fn parse(object: &Object<'_>) -> Result<Self, String> {
        let subnet = match object.get::<String>("subnet")? {
            None => return Err("IP <nil> not v4 nor v6: a range needs a \"subnet\"".into()),
            Some(text) => {
                text.parse::<IpNet>().map_err(|_| format!("invalid CIDR address: {}", shortened(&text)))?
            }
        };
        let (len, max) = (subnet.prefix_len(), subnet.max_prefix_len());
        if len + 2 > max {
            return Err(format!("Network {subnet} too small to allocate from"));
        }
        if subnet.addr() != subnet.network() {
            return Err(format!(
                "Network has host bits set. For a subnet mask of length {len} the network address is {}",
                subnet.network()
            ));
        }
        let address = |key: &str| match object.get::<String>(key)?.filter(|text| !text.is_empty()) {
            None => Ok(None),
            Some(text) => text
                .parse::<IpAddr>()
                .map(|address| Some(address.to_canonical()))
                .map_err(|_| format!("invalid IP address: {}", shortened(&text))),
        };
        let within = |name: &str, address: IpAddr| match subnet.contains(&address) {
            true => Ok(address),
            false => Err(format!("{name} {address} not in network {subnet}")),
        };
        let first = next(subnet.network());
        let last = match subnet {
            IpNet::V4(subnet) => IpAddr::V4((u32::from(subnet.broadcast()) - 1).into()),
            IpNet::V6(_) => subnet.broadcast(),
        };
        // It may be elsewhere, as with a link-local gateway of all subnets.
        let gateway = address("gateway")?.unwrap_or(first);
        let start = address("rangeStart")?.map_or(Ok(first), |given| within("RangeStart", given))?;
        let end = address("rangeEnd")?.map_or(Ok(last), |given| within("RangeEnd", given))?;
        if number(start) > number(end) {
            return Err(format!("RangeStart {start} is behind RangeEnd {end}"));
        }
        Ok(Self { subnet, start, end, gateway })
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.subnet.contains(&address) && (number(self.start)..=number(self.end)).contains(&number(address))
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.subnet.addr().is_ipv4() == other.subnet.addr().is_ipv4()
            && number(self.start) <= number(other.end)
            && number(other.start) <= number(self.end)
    }

    fn text(&self) -> String {
        format!("{}-{}", self.start, self.end)
    }
}

impl RangeSet {
    /// Reads a set; its number is for the errors.
    ///
    /// # Errors
    /// A sentence with the number and the cause, in the words of the original.
    pub(crate) fn parse(set: &Value, index: usize) -> Result<Self, String> {
        let invalid = |error: String| match error.starts_with("invalid ") {
            true => error,
            false => format!("invalid range set {index}: {error}"),
        };
        let Value::Array(given) = set else {
            return Err(invalid(format!("{} is not a list of ranges", shortened(&set.to_string()))));
        };
        let range = |value: &Value| {
            let text = value.to_string();
            Range::parse(&Object::parse(&text)?)
        };
        let ranges = given.iter().map(range).collect::<Result<Vec<_>, _>>().map_err(invalid)?;
        let set = Self(ranges);
        set.check().map_err(invalid)?;
        Ok(set)
    }

    /// The set of one range that is given by the members of an object.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub(crate) fn of_one(object: &Object<'_>) -> Result<Self, String> {
        Range::parse(object)
            .map(|range| Self(vec![range]))
            .map_err(|error| format!("invalid range set 0: {error}"))
    }

    fn check(&self) -> Result<(), String> {
        let Some(first) = self.0.first() else { return Err("empty range set".into()) };
        for (index, range) in self.0.iter().enumerate() {
            if range.subnet.addr().is_ipv4() != first.subnet.addr().is_ipv4() {
                return Err("mixed address families".into());
            }
            if let Some(other) = self.0[..index].iter().find(|other| other.overlaps(range)) {
                return Err(format!("subnets {} and {} overlap", other.text(), range.text()));
            }
        }
        Ok(())
    }

    /// Whether two sets have an address in common.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.0.iter().any(|one| other.0.iter().any(|two| one.overlaps(two)))
    }

    /// Whether its addresses are of IPv6.
    pub(crate) fn is_ipv6(&self) -> bool {
        self.0.first().is_some_and(|range| range.subnet.addr().is_ipv6())
    }

    /// The range that an address is in.
    pub(crate) fn range_of(&self, address: IpAddr) -> Option<&Range> {
        self.0.iter().find(|range| range.contains(address))
    }

    /// As the original writes it in errors.
    pub(crate) fn text(&self) -> String {
        self.0.iter().map(Range::text).collect::<Vec<_>>().join(",")
    }

    /// The first free address after `last` with its range, round the whole set once; gateways are left out.
    /// `taken` has to be sorted.
    pub(crate) fn free(&self, last: Option<IpAddr>, taken: &[IpAddr]) -> Option<(IpAddr, &Range)> {
        let last = last.and_then(|last| Some((self.0.iter().position(|range| range.contains(last))?, last)));
        let first_of = |range: &Range, from: IpAddr| range.free_from(from, taken);
        if let Some((place, last)) = last {
            let range = &self.0[place];
            if last != range.end
                && let Some(address) = first_of(range, next(last))
            {
                return Some((address, range));
            }
            let (before, after) = self.0.split_at(place + 1);
            // The last range comes once more, from its start: what is behind `last` is known to be taken.
            let others = after.iter().chain(before);
            return others.filter_map(|range| Some((first_of(range, range.start)?, range))).next();
        }
        self.0.iter().filter_map(|range| Some((first_of(range, range.start)?, range))).next()
    }
}

impl Range {
    fn free_from(&self, from: IpAddr, taken: &[IpAddr]) -> Option<IpAddr> {
        let mut address = from;
        loop {
            if address != self.gateway && taken.binary_search(&address).is_err() {
                return Some(address);
            }
            if number(address) >= number(self.end) {
                return None;
            }
            address = next(address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn set(ranges: Value) -> RangeSet {
        RangeSet::parse(&ranges, 0).unwrap()
    }

    #[test]
    fn what_is_no_range_is_named_in_the_words_of_the_original() {
        for (ranges, expected) in [
            (
                json!([{"subnet": "10.9.0.5/24"}]),
                "invalid range set 3: Network has host bits set. For a subnet mask of length 24 the network address is 10.9.0.0",
            ),
            (
                json!([{"subnet": "10.9.0.0/31"}]),
                "invalid range set 3: Network 10.9.0.0/31 too small to allocate from",
            ),
            (
                json!([{"subnet": "10.9.0.0/32"}]),
                "invalid range set 3: Network 10.9.0.0/32 too small to allocate from",
            ),
            (
                json!([{"subnet": "fd00::/127"}]),
                "invalid range set 3: Network fd00::/127 too small to allocate from",
            ),
            (
                json!([{"subnet": "10.9.0.0/24", "rangeStart": "10.8.0.1"}]),
                "invalid range set 3: RangeStart 10.8.0.1 not in network 10.9.0.0/24",
            ),
            (
                json!([{"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.20", "rangeEnd": "10.9.0.10"}]),
                "invalid range set 3: RangeStart 10.9.0.20 is behind RangeEnd 10.9.0.10",
            ),
            (
                json!([{"subnet": "10.9.0.0/24"}, {"subnet": "10.9.0.0/25"}]),
                "invalid range set 3: subnets 10.9.0.1-10.9.0.254 and 10.9.0.1-10.9.0.126 overlap",
            ),
            (
                json!([{"subnet": "10.9.0.0/24"}, {"subnet": "fd00::/64"}]),
                "invalid range set 3: mixed address families",
            ),
            (json!([]), "invalid range set 3: empty range set"),
            (json!([{"subnet": "10.9.0.0"}]), "invalid CIDR address: 10.9.0.0"),
            (json!([{"subnet": "10.9.0.0/24", "rangeStart": "zz"}]), "invalid IP address: zz"),
        ] {
            assert_eq!(RangeSet::parse(&ranges, 3).unwrap_err(), expected);
        }
        for odd in [json!([{}]), json!(7), json!([7]), json!([{"subnet": 7}])] {
            assert!(RangeSet::parse(&odd, 0).unwrap_err().contains("range"), "{odd}");
        }
    }

    #[test]
    fn a_gateway_may_be_outside_of_its_subnet() {
        for (subnet, gateway) in
            [("10.9.0.0/24", "169.254.1.1"), ("fd00::/64", "fe80::1"), ("10.9.0.0/24", "fd00::1")]
        {
            let set = set(json!([{"subnet": subnet, "gateway": gateway}]));
            let (address, range) = set.free(None, &[]).unwrap();
            assert_eq!((address, range.gateway), (range.start, gateway.parse::<IpAddr>().unwrap()));
        }
    }

    #[test]
    fn addresses_are_handed_out_in_turn_over_all_ranges() {
        let set = set(json!([
            {"subnet": "10.9.0.0/30"},
            {"subnet": "10.9.1.0/24", "rangeStart": "10.9.1.9", "rangeEnd": "10.9.1.10", "gateway": "10.9.1.9"}
        ]));
        let [a, b] = ["10.9.0.2", "10.9.1.10"].map(|address| address.parse::<IpAddr>().unwrap());
        let free = |last: Option<IpAddr>, taken: &[IpAddr]| set.free(last, taken).map(|(address, _)| address);
        assert_eq!(free(None, &[]), Some(a));
        assert_eq!(free(Some(a), &[a]), Some(b));
        assert_eq!(free(Some(b), &[b]), Some(a));
        assert_eq!(free(Some(b), &[a, b]), None);
        // The last one was given back, and there is no other.
        assert_eq!(free(Some(a), &[b]), Some(a));
        assert_eq!(free(Some("10.7.0.1".parse().unwrap()), &[]), Some(a));
    }

    proptest! {
        #[test]
        fn every_address_is_handed_out_once_and_never_the_gateway(len in 24u8..=30, last in 0u8..=255) {
            let set = set(json!([{"subnet": format!("10.9.0.0/{len}")}]));
            let mut last: Option<IpAddr> = Some([10, 9, 0, last].into());
            let mut taken = Vec::new();
            while let Some((address, range)) = set.free(last, &taken) {
                prop_assert!(address != range.gateway && range.contains(address));
                let place = taken.binary_search(&address).unwrap_err();
                taken.insert(place, address);
                last = Some(address);
            }
            prop_assert_eq!(taken.len(), (1usize << (32 - len)) - 3);
        }
    }
}
