//! Routes: of the configuration's `ipam`, as Go plugins write them, and of a result, as Go plugins check them.

use std::net::IpAddr;

use serde_json::Value;
use subnet::gojson::{self, Object};

/// Each route with the members that Go knows, in Go's order; the others are dropped.
///
/// # Errors
/// The place, the value and what it should be.
pub(crate) fn reencoded(routes: &Value) -> Result<Vec<String>, String> {
    let routes = match routes {
        Value::Null => return Ok(Vec::new()),
        Value::Array(routes) => routes,
        other => return Err(format!("{} is not a list of routes", gojson::shortened(&other.to_string()))),
    };
    let numbered = routes.iter().enumerate();
    numbered.map(|(i, route)| one(route).map_err(|error| format!("routes[{i}]: {error}"))).collect()
}

fn one(route: &Value) -> Result<String, String> {
    let text = route.to_string();
    let route = Object::parse(&text)?;
    let dst: String = route.get("dst")?.ok_or(r#"no "dst": give the route's destination as a CIDR"#)?;
    let dst = cidr(&dst).ok_or_else(|| {
        format!("dst: {:?} is not a CIDR such as 10.0.0.0/8 or fd00::/8", gojson::shortened(&dst))
    })?;
    let mut members = format!(r#"{{"dst":"{dst}""#);
    if let Some(gw) = route.get::<String>("gw")?.filter(|gw| !gw.is_empty()) {
        let gw: IpAddr =
            gw.parse().map_err(|_| format!("gw: {:?} is not an IP address", gojson::shortened(&gw)))?;
        members.push_str(&format!(r#","gw":"{gw}""#));
    }
    for (key, zero_counts) in
        [("mtu", false), ("advmss", false), ("priority", false), ("table", true), ("scope", true)]
    {
        if let Some(number) = route.get::<i64>(key)?.filter(|number| zero_counts || *number != 0) {
            members.push_str(&format!(r#","{key}":{number}"#));
        }
    }
    Ok(members + "}")
}

/// `result` with a gateway in each route that has none: that of the family's first address, which is what
/// delegates put into the kernel. Those before 1.3 look for such a route without a gateway, and would find
/// every pod broken (containernetworking/plugins#886).
pub(crate) fn with_gateways(mut result: Value) -> Value {
    let given = |object: &Value, key: &str| object.get(key)?.as_str()?.parse::<IpAddr>().ok();
    let gateways: Vec<IpAddr> =
        result["ips"].as_array().into_iter().flatten().filter_map(|ip| given(ip, "gateway")).collect();
    for route in result.get_mut("routes").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(dst) = route.get("dst").and_then(Value::as_str) else { continue };
        let ipv6 = dst.contains(':');
        // A scope may mean that there is none on purpose.
        let lacks = given(route, "gw").is_none() && route.get("scope").is_none_or(Value::is_null);
        if let Some(gateway) = gateways.iter().find(|gateway| lacks && gateway.is_ipv6() == ipv6) {
            route["gw"] = gateway.to_string().into();
        }
    }
    result
}

/// A prefix with the host bits that were given: the delegate sees them under a Go plugin too.
fn cidr(text: &str) -> Option<String> {
    let (addr, len) = text.split_once('/')?;
    let addr: IpAddr = addr.parse().ok()?;
    let len = Some(len).filter(|len| len.bytes().all(|byte| byte.is_ascii_digit()))?.parse::<u8>().ok()?;
    (len <= if addr.is_ipv4() { 32 } else { 128 }).then(|| format!("{addr}/{len}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn only_known_members_remain_in_gos_order() {
        let routes = json!([
            {"dst": "0.0.0.0/0", "comment": "x", "table": 0, "scope": 253, "GW": "10.1.17.1", "mtu": 1400,
             "advmss": 1360, "priority": 7},
            {"dst": "FD00:0::1/64", "gw": "", "mtu": 0, "priority": null}
        ]);
        assert_eq!(
            reencoded(&routes).unwrap(),
            [
                r#"{"dst":"0.0.0.0/0","gw":"10.1.17.1","mtu":1400,"advmss":1360,"priority":7,"table":0,"scope":253}"#,
                r#"{"dst":"fd00::1/64"}"#
            ]
        );
        assert_eq!(reencoded(&Value::Null), Ok(Vec::new()));
    }

    #[test]
    fn a_route_that_makes_no_sense_is_named() {
        for (routes, expected) in [
            (json!({}), "{} is not a list"),
            (
                json!([{"dst": "10.0.0.0/8"}, {"dst": "10.0.0.0"}]),
                r#"routes[1]: dst: "10.0.0.0" is not a CIDR"#,
            ),
            (json!([{"dst": "10.0.0.0/33"}]), "is not a CIDR"),
            (json!([{"dst": "10.0.0.0/+8"}]), "is not a CIDR"),
            (json!([{"gw": "10.0.0.1"}]), r#"no "dst""#),
            (json!([{"dst": "10.0.0.0/8", "gw": "home"}]), r#"gw: "home""#),
            (json!([{"dst": "10.0.0.0/8", "mtu": "big"}]), "mtu"),
            (json!(["10.0.0.0/8"]), "routes[0]: not a JSON object"),
        ] {
            let error = reencoded(&routes).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn routes_of_a_result_get_the_gateway_of_their_family_unless_they_have_one() {
        let given = json!({
            "ips": [{"address": "10.1.17.2/24", "gateway": "10.1.17.1"}, {"gateway": "fc00::1"}, {"gateway": "fc00::9"}],
            "routes": [{"dst": "10.1.0.0/16"}, {"dst": "fc00::/48", "gw": null}, {"dst": "0.0.0.0/0", "gw": "10.1.17.9"},
                       {"dst": "10.9.0.0/16", "scope": 253}, 7],
            "dns": {}
        });
        let mut expected = given.clone();
        expected["routes"][0]["gw"] = "10.1.17.1".into();
        expected["routes"][1]["gw"] = "fc00::1".into();
        assert_eq!(with_gateways(given), expected);
        for odd in [json!({}), json!([]), json!(null), json!({"ips": 1, "routes": [[], {"dst": "::/0"}]})] {
            assert_eq!(with_gateways(odd.clone()), odd);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_as_itself(addr: IpAddr, len in 0u8..=32, mtu in 0u32..9001) {
            let once = reencoded(&json!([{"dst": format!("{addr}/{len}"), "mtu": mtu}])).unwrap();
            let again = reencoded(&json!([serde_json::from_str::<Value>(&once[0]).unwrap()])).unwrap();
            prop_assert_eq!(once, again);
        }

        #[test]
        fn arbitrary_destinations_never_panic(dst in "[0-9a-f.:/+ ]{0,20}") {
            let _ = reencoded(&json!([{"dst": dst}]));
        }
    }
}
