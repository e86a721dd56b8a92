//! Answers to `flanneld policy`: from what the policy task knows, completed by the API.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use subnet::Family;
use subnet::kube::PolicyApi;
use subnet::policy::explain::{self, End, Party, PolicyContext, Question};
use subnet::policy::{ObjectName, Pod, Protocol};
use tokio::time::timeout;

/// The API is asked about each end, and has to answer within this time.
const API_TIMEOUT: Duration = Duration::from_secs(3);

/// A question that is answered with a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Inquiry {
    /// What becomes of a connection.
    Explain {
        /// Who asks.
        source: Endpoint,
        /// Who is asked.
        destination: Endpoint,
        /// By which protocol.
        protocol: Protocol,
        /// On which port.
        port: u16,
    },
    /// Which policies isolate the pods of this node, or one of them.
    List(Option<ObjectName>),
    /// Who has these addresses: a name for each, or nothing, one a line.
    Names(Vec<IpAddr>),
}

/// An end as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// A pod by its name.
    Pod(ObjectName),
    /// An address, of a pod or not.
    Address(IpAddr),
}

/// What the policy task knows at a moment.
pub(super) struct PolicySnapshot {
    pub(super) context: PolicyContext,
    /// The pods of this node, with the addresses that the CNI plugin announced.
    pub(super) own: Vec<Pod>,
    /// Why the kernel is not as policies say, if it isn't.
    pub(super) trouble: Option<String>,
}

/// Answers.
///
/// # Errors
/// A sentence, when something that is asked about isn't there or can't be looked up.
pub(super) async fn answer(
    inquiry: Inquiry,
    snapshot: PolicySnapshot,
    api: &PolicyApi,
) -> Result<String, String> {
    match inquiry {
        Inquiry::Explain { source, destination, protocol, port } => {
            let node = api.node_name().await.map_err(|error| error.to_string())?;
            let mut ends =
                [snapshot.end(&source, &node, api).await?, snapshot.end(&destination, &node, api).await?];
            one_family(
                &mut ends,
                [&source, &destination].map(|place| matches!(place, Endpoint::Address(_))),
            )?;
            let [source, destination] = ends;
            let question = Question { source, destination, protocol, port };
            let explained = explain::explain(&snapshot.context, &question);
            let kernel = match &snapshot.trouble {
                None => "as computed".to_owned(),
                Some(why) => format!("NOT as computed: {why}"),
            };
            Ok(format!("{}  kernel   node {node}: {kernel}\n", explained.text))
        }
        Inquiry::List(None) => Ok(explain::list(&snapshot.context.policies, &snapshot.own)),
        Inquiry::List(Some(name)) => {
            let pods: Vec<Pod> = snapshot.own.into_iter().filter(|pod| pod.name == name).collect();
            if pods.is_empty() {
                return Err(format!(
                    "this node has no pod {name}, or it is on its host's network or has ended"
                ));
            }
            Ok(explain::list(&snapshot.context.policies, &pods))
        }
        Inquiry::Names(addresses) => {
            let mut text = String::new();
            for address in addresses {
                let name = snapshot.name(address, api).await.unwrap_or_default();
                text += &format!("{name}\n");
            }
            Ok(text)
        }
    }
}

impl PolicySnapshot {
    async fn end(&self, place: &Endpoint, node: &str, api: &PolicyApi) -> Result<End, String> {
        match place {
            Endpoint::Pod(name) => {
                if let Some(pod) =
                    self.own.iter().filter(|pod| pod.name == *name).max_by_key(|pod| pod.created)
                {
                    return Ok(own_end(pod, pod.addresses.first().copied(), node));
                }
                let found = timeout(API_TIMEOUT, api.end_named(name)).await;
                let found = found.map_err(|_| "the Kubernetes API does not answer".to_owned())?;
                found.map_err(|error| error.to_string())?.ok_or_else(|| format!("there is no pod {name}"))
            }
            Endpoint::Address(address) => Ok(self.end_at(*address, node, api).await),
        }
    }

    async fn end_at(&self, address: IpAddr, node: &str, api: &PolicyApi) -> End {
        if let Some(pod) = self.own.iter().find(|pod| pod.addresses.contains(&address)) {
            return own_end(pod, Some(address), node);
        }
        if is_of_host(address) {
            return End { party: Party::Node, address: Some(address), node: Some(node.to_owned()) };
        }
        if self.context.nodes.contains(&address) {
            return End { party: Party::Node, address: Some(address), node: None };
        }
        match timeout(API_TIMEOUT, api.end_at(address)).await {
            Ok(Ok(Some(end))) => end,
            _ => End { party: Party::Address, address: Some(address), node: None },
        }
    }

    async fn name(&self, address: IpAddr, api: &PolicyApi) -> Option<String> {
        match self.end_at(address, "", api).await.party {
            Party::Pod(pod) => Some(pod.name.to_string()),
            Party::Finished(name) | Party::HostNetwork(name) | Party::Service(name) => Some(name.to_string()),
            Party::Node | Party::Address => None,
        }
    }
}

fn own_end(pod: &Pod, address: Option<IpAddr>, node: &str) -> End {
    End { party: Party::Pod(Box::new(pod.clone())), address, node: Some(node.to_owned()) }
}

/// Gives both ends addresses of one family: that of an address that was asked about, else IPv4 if both have it.
fn one_family(ends: &mut [End; 2], asked_by_address: [bool; 2]) -> Result<(), String> {
    let addresses = |which: usize| match &ends[which].party {
        Party::Pod(pod) if !asked_by_address[which] => pod.addresses.clone(),
        _ => ends[which].address.into_iter().collect(),
    };
    let both: [Vec<IpAddr>; 2] = [addresses(0), addresses(1)];
    if both.iter().any(Vec::is_empty) {
        return Ok(());
    }
    let of =
        |family: Family, which: usize| both[which].iter().copied().find(|one| Family::of(*one) == family);
    for family in Family::BOTH {
        if let (Some(first), Some(second)) = (of(family, 0), of(family, 1)) {
            (ends[0].address, ends[1].address) = (Some(first), Some(second));
            return Ok(());
        }
    }
    Err(format!("{} and {} have no addresses of one family", ends[0], ends[1]))
}

/// Whether an address is one of this host's: only such can be bound to.
fn is_of_host(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

impl Endpoint {
    /// Reads `NAMESPACE/NAME` or an address.
    ///
    /// # Errors
    /// A sentence with the text.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let shown = subnet::gojson::shortened(text);
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        if let Some(address) = bare.and_then(|text| text.parse().ok()) {
            return Ok(Self::Address(address));
        }
        pod_name(text)
            .map(Self::Pod)
            .ok_or_else(|| format!("{shown:?} is neither a pod (NAMESPACE/NAME) nor an address"))
    }

    /// Reads the same with `:PORT` behind it.
    ///
    /// # Errors
    /// A sentence with the text.
    pub(super) fn with_port(text: &str) -> Result<(Self, u16), String> {
        let shown = subnet::gojson::shortened(text);
        let missing = || format!("{shown:?} has no port: write shop/db-0:5432, 192.0.2.1:80 or [fd00::1]:80");
        if text.parse::<IpAddr>().is_ok() {
            return Err(missing());
        }
        let (place, port) = text.rsplit_once(':').ok_or_else(missing)?;
        let port = port.parse().ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| format!("{shown:?} has no port from 1 to 65535 behind the colon"))?;
        Ok((Self::parse(place)?, port))
    }
}

/// Reads `NAMESPACE/NAME`.
pub(super) fn pod_name(text: &str) -> Option<ObjectName> {
    let (namespace, name) = text.split_once('/')?;
    let usable = |part: &str| {
        let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
        (1..=253).contains(&part.len()) && part.bytes().all(known)
    };
    (usable(namespace) && usable(name)).then(|| ObjectName::new(namespace, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_a_pod_or_an_address_and_the_second_has_a_port() {
        let pod = Endpoint::Pod(ObjectName::new("shop", "db-0"));
        let address = |text: &str| Endpoint::Address(text.parse().unwrap());
        assert_eq!(Endpoint::parse("shop/db-0"), Ok(pod.clone()));
        assert_eq!(Endpoint::parse("fd00::1"), Ok(address("fd00::1")));
        assert_eq!(Endpoint::with_port("shop/db-0:5432"), Ok((pod, 5432)));
        assert_eq!(Endpoint::with_port("192.0.2.1:80"), Ok((address("192.0.2.1"), 80)));
        assert_eq!(Endpoint::with_port("[fd00::1]:80"), Ok((address("fd00::1"), 80)));
        for (text, part) in [
            ("shop/db-0", "has no port: write"),
            ("fd00::1", "has no port: write"),
            ("192.0.2.1", "has no port: write"),
            ("shop/db-0:0", "no port from 1 to 65535"),
            ("shop/db-0:pg", "no port from 1 to 65535"),
            ("db-0:80", "\"db-0\" is neither a pod"),
            ("a/../b:80", "neither a pod"),
            (":80", "\"\" is neither a pod"),
        ] {
            let error = Endpoint::with_port(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn both_ends_have_addresses_of_one_family() {
        let pod = |addresses: &[&str]| {
            let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
            let pod = Pod {
                uid: subnet::policy::Uid(1),
                name: ObjectName::new("shop", "web"),
                labels: subnet::policy::Labels::new(),
                ports: Vec::new(),
                created: 1,
                local: true,
                addresses,
            };
            own_end(&pod, pod.addresses.first().copied(), "a1")
        };
        let address = |text: &str| End { party: Party::Address, address: text.parse().ok(), node: None };
        let aligned = |mut ends: [End; 2]| {
            one_family(&mut ends, [false; 2]).map(|()| ends.map(|end| end.address.unwrap().to_string()))
        };
        let dual = || pod(&["10.244.1.7", "fd00::7"]);
        assert_eq!(aligned([dual(), dual()]).unwrap(), ["10.244.1.7", "10.244.1.7"]);
        assert_eq!(aligned([address("fd00::9"), dual()]).unwrap(), ["fd00::9", "fd00::7"]);
        assert_eq!(aligned([dual(), pod(&["fd00::8"])]).unwrap(), ["fd00::7", "fd00::8"]);
        let mut asked = [dual(), pod(&["10.244.1.8"])];
        asked[0].address = "fd00::7".parse().ok();
        assert!(one_family(&mut asked, [true, false]).is_err());
        let error = aligned([address("fd00::9"), pod(&["10.244.1.8"])]).unwrap_err();
        assert!(error.contains("no addresses of one family"), "{error}");
    }

    #[test]
    fn an_address_of_this_host_is_told_from_others() {
        assert!(is_of_host([127, 0, 0, 1].into()));
        assert!(!is_of_host([192, 0, 2, 77].into()));
    }
}
