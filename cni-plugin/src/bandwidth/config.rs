//! The configuration of `bandwidth`: of the runtime, or of the network.

use subnet::gojson::Object;

use crate::netlink::tc::Limit;

/// How long a packet waits at most, beyond the burst.
const LATENCY_MILLISECONDS: u128 = 25;

/// The limits of both directions, as the pod sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BandwidthConfig {
    /// What comes to the pod.
    pub(crate) ingress: Option<Limit>,
    /// What the pod sends.
    pub(crate) egress: Option<Limit>,
}

impl BandwidthConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    /// A sentence with the member and its value.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let read = || {
            let object = Object::parse(text)?;
            let members = ["ingressRate", "ingressBurst", "egressRate", "egressBurst"];
            if members.into_iter().any(|key| object.has(key)) {
                return Self::read(&object);
            }
            match object.object("runtimeConfig")? {
                Some(runtime) => match runtime.object("bandwidth")? {
                    Some(bandwidth) => Self::read(&bandwidth),
                    None => Ok(Self::default()),
                },
                None => Ok(Self::default()),
            }
        };
        read().map_err(|error| format!("failed to parse network configuration: {error}"))
    }

    fn read(object: &Object<'_>) -> Result<Self, String> {
        for key in ["shapedSubnets", "unshapedSubnets"] {
            if !object.get::<Vec<String>>(key)?.unwrap_or_default().is_empty() {
                return Err(format!(
                    "this bandwidth does not have {key:?}: install the bandwidth of the containernetworking plugins in \
                     its place, or leave the member out"
                ));
            }
        }
        Ok(Self { ingress: limit(object, "ingress")?, egress: limit(object, "egress")? })
    }
}

/// The limit of one direction, given in bits.
fn limit(object: &Object<'_>, direction: &str) -> Result<Option<Limit>, String> {
    let number = |what: &str| object.get::<u64>(&format!("{direction}{what}")).map(Option::unwrap_or_default);
    let (rate, burst) = (number("Rate")?, number("Burst")?);
    match (rate, burst) {
        (0, 0) => return Ok(None),
        (0, _) => return Err(format!("if burst is set, rate must also be set: {direction}Rate is 0")),
        (_, 0) => return Err(format!("if rate is set, burst must also be set: {direction}Burst is 0")),
        (1..8, _) => return Err(format!("{direction}Rate {rate} is less than a byte a second")),
        _ => {}
    }
    let rate = rate / 8;
    let burst_too_large = || format!("burst cannot be more than 4GB: {direction}Burst is {burst}");
    let bytes =
        u32::try_from(burst / 8).ok().filter(|burst| *burst < u32::MAX).ok_or_else(burst_too_large)?;
    let queue = u128::from(rate) * LATENCY_MILLISECONDS / 1000 + u128::from(bytes);
    Ok(Some(Limit { rate, burst: bytes, queue: u32::try_from(queue).unwrap_or(u32::MAX) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parse(members: Value) -> Result<BandwidthConfig, String> {
        BandwidthConfig::parse(&members.to_string())
    }

    #[test]
    fn limits_are_given_in_bits_and_kept_in_bytes() {
        let limits = json!({"ingressRate": 8_000_000, "ingressBurst": 80_000});
        let expected = Some(Limit { rate: 1_000_000, burst: 10_000, queue: 35_000 });
        for members in [json!({"runtimeConfig": {"bandwidth": limits}}), limits] {
            assert_eq!(parse(members).unwrap(), BandwidthConfig { ingress: expected, egress: None });
        }
        assert_eq!(parse(json!({"runtimeConfig": {}})).unwrap(), BandwidthConfig::default());
        assert_eq!(expected.map(Limit::buffer), Some(156_250));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (rate, burst, expected) in [
            (json!(0), json!(8), "if burst is set, rate must also be set: egressRate is 0"),
            (json!(8000), json!(0), "if rate is set, burst must also be set: egressBurst is 0"),
            (json!(1), json!(8000), "egressRate 1 is less than a byte a second"),
            (json!(8000), json!(1u64 << 40), "burst cannot be more than 4GB: egressBurst is 1099511627776"),
            (json!(-1), json!(8000), "egressRate: -1"),
            (json!("1M"), json!(8000), "egressRate: \"1M\""),
        ] {
            let error = parse(json!({"egressRate": rate, "egressBurst": burst})).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert!(parse(json!({"egressRate": 1u64 << 40, "egressBurst": 8000})).unwrap().egress.is_some());
        assert!(parse(json!({"shapedSubnets": ["10.0.0.0/8"], "egressRate": 1, "egressBurst": 1})).is_err());
    }
}
