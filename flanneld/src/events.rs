//! Events of Kubernetes about this node's network: few, and each once.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use subnet::kube::{EventApi, EventError};
use tokio::sync::mpsc;

use crate::probe::{Verdict, VerdictChange};

/// No event about the same object is left again within this time.
const QUIET: Duration = Duration::from_secs(600);
/// No more events are left in an hour: a cluster of which half is away shall not have one for each pair of nodes.
const MAX_EVENTS: usize = 20;
const HOUR: Duration = Duration::from_secs(3600);
/// Events that wait; further ones are lost, as the log and the figures have all.
const WAITING: usize = 16;

/// Something worth an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KubeEvent {
    reason: &'static str,
    warning: bool,
    /// What it is about, for leaving it once.
    object: String,
    message: String,
}

impl KubeEvent {
    /// The event about a changed verdict.
    fn of(news: &VerdictChange) -> Self {
        let VerdictChange { subnet, underlay, verdict, cause, remedy } = news;
        let reason = match verdict {
            Verdict::Unknown | Verdict::Fine => "PeerReachable",
            Verdict::Down | Verdict::Silent | Verdict::PortBlocked => "PeerUnreachable",
            Verdict::LossyNetwork | Verdict::LossyTunnel => "PeerLossy",
            Verdict::PathMtu => "PathMtuTooSmall",
        };
        let message = match (cause, remedy) {
            (Some(cause), Some(remedy)) => format!("{cause}: {remedy}"),
            _ => format!("{underlay} ({subnet}) is reachable again"),
        };
        Self { reason, warning: verdict.is_trouble(), object: subnet.to_string(), message }
    }
}

/// What is worth an event about this node itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NodeSigns {
    /// Why another node has its lease.
    pub(crate) contest: Option<String>,
    /// The backend that stands in for the configured one.
    pub(crate) fallback: Option<String>,
    /// How often rules were restored that another program had changed.
    pub(crate) restored: u64,
    /// What was restored last.
    pub(crate) last: Option<String>,
}

/// The events that lead from what was so to what is so.
fn of_node(before: &NodeSigns, now: &NodeSigns) -> Vec<KubeEvent> {
    let event = |reason, message| KubeEvent { reason, warning: true, object: "node".to_owned(), message };
    let mut events = Vec::new();
    if let (None, Some(why)) = (&before.contest, &now.contest) {
        events.push(event("LeaseConflict", why.clone()));
    }
    if let (None, Some(backend)) = (&before.fallback, &now.fallback) {
        let message = format!(
            "the kernel lacks the configured backend, so {backend} stands in for it (Backend.Fallback): to use the other one, load \
             its module and restart flanneld"
        );
        events.push(event("FallbackUsed", message));
    }
    if now.restored > before.restored {
        let what = now.last.as_deref().unwrap_or("traffic rules");
        let message = format!(
            "another program had changed traffic rules, which were restored: {what}; if that repeats, find the program (nft monitor)"
        );
        events.push(event("RulesRestored", message));
    }
    events
}

/// Which events were left of late.
#[derive(Default)]
struct Left {
    by_object: BTreeMap<(&'static str, String), Instant>,
    of_late: Vec<Instant>,
}

impl Left {
    /// Whether an event is to be left now; it counts as left then.
    fn admit(&mut self, event: &KubeEvent, now: Instant) -> bool {
        self.by_object.retain(|_, at| now.saturating_duration_since(*at) < QUIET);
        self.of_late.retain(|at| now.saturating_duration_since(*at) < HOUR);
        let key = (event.reason, event.object.clone());
        if self.by_object.contains_key(&key) || self.of_late.len() >= MAX_EVENTS {
            return false;
        }
        self.by_object.insert(key, now);
        self.of_late.push(now);
        true
    }
}

/// Where events are handed in; a node without Kubernetes leaves none.
#[derive(Clone, Default)]
pub(crate) struct Events(Option<mpsc::Sender<KubeEvent>>);

impl Events {
    /// The handing in, and the task that leaves them.
    pub(crate) fn channel() -> (Self, mpsc::Receiver<KubeEvent>) {
        let (sender, receiver) = mpsc::channel(WAITING);
        (Self(Some(sender)), receiver)
    }

    /// A verdict on a peer has changed.
    pub(crate) fn peer(&self, news: &VerdictChange) {
        self.leave(KubeEvent::of(news));
    }

    /// Something about this node has changed.
    pub(crate) fn node(&self, before: &NodeSigns, now: &NodeSigns) {
        of_node(before, now).into_iter().for_each(|event| self.leave(event));
    }

    fn leave(&self, event: KubeEvent) {
        if let Some(sender) = &self.0 {
            let _ = sender.try_send(event);
        }
    }
}

/// Leaves events until the role forbids it, which is said once.
pub(crate) async fn run(api: EventApi, mut events: mpsc::Receiver<KubeEvent>) {
    let mut left = Left::default();
    while let Some(event) = events.recv().await {
        if !left.admit(&event, Instant::now()) {
            continue;
        }
        match api.add(event.warning, event.reason, &event.message).await {
            Ok(()) => {}
            Err(error @ EventError::Forbidden(_)) => {
                tracing::info!(
                    "no events are left in Kubernetes: {error}; kube-flannel.yml has the rule for it"
                );
                return;
            }
            Err(error) => tracing::debug!(%error, "an event could not be left"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(verdict: Verdict) -> VerdictChange {
        let said = |text: &str| verdict.is_trouble().then(|| text.to_owned());
        VerdictChange {
            subnet: "10.244.7.0/24".parse().unwrap(),
            underlay: "192.0.2.7".parse().unwrap(),
            verdict,
            cause: said("it is down"),
            remedy: said("repair it"),
        }
    }

    #[test]
    fn an_event_about_an_object_is_left_once_in_ten_minutes() {
        let (mut left, now) = (Left::default(), Instant::now());
        let (down, up) = (KubeEvent::of(&news(Verdict::Down)), KubeEvent::of(&news(Verdict::Fine)));
        assert_eq!(
            (down.reason, down.warning, down.message.as_str()),
            ("PeerUnreachable", true, "it is down: repair it")
        );
        assert_eq!((up.reason, up.warning), ("PeerReachable", false));
        assert!(left.admit(&down, now) && left.admit(&up, now));
        assert!(!left.admit(&down, now + Duration::from_secs(599)));
        assert!(!left.admit(&KubeEvent::of(&news(Verdict::PortBlocked)), now), "the same to an operator");
        assert!(left.admit(&down, now + Duration::from_secs(601)));
    }

    #[test]
    fn a_cluster_that_falls_apart_leaves_few() {
        let (mut left, now) = (Left::default(), Instant::now());
        let about =
            |number: usize| KubeEvent { object: number.to_string(), ..KubeEvent::of(&news(Verdict::Down)) };
        assert_eq!((0..500).filter(|number| left.admit(&about(*number), now)).count(), MAX_EVENTS);
        assert!(left.admit(&about(501), now + HOUR));
    }

    #[test]
    fn what_changes_about_this_node_is_one_event() {
        let quiet = NodeSigns { restored: 3, last: Some("route".into()), ..NodeSigns::default() };
        let reasons = |before: &NodeSigns, now: &NodeSigns| -> Vec<&str> {
            of_node(before, now).into_iter().map(|event| event.reason).collect()
        };
        let contested = NodeSigns { contest: Some("node b has it".into()), ..quiet.clone() };
        let fallen = NodeSigns { fallback: Some("udp port 8285".into()), ..quiet.clone() };
        let restored = NodeSigns { restored: 4, last: Some("chain forward".into()), ..quiet.clone() };
        for (now, reason, part) in [
            (&contested, "LeaseConflict", "node b has it"),
            (&fallen, "FallbackUsed", "so udp port 8285 stands in"),
            (&restored, "RulesRestored", "restored: chain forward"),
        ] {
            let [event] = &of_node(&quiet, now)[..] else { panic!("{reason}") };
            assert!(event.reason == reason && event.warning && event.message.contains(part), "{event:?}");
            assert_eq!(reasons(now, now), [""; 0], "it lasts");
        }
        assert_eq!(reasons(&contested, &quiet), [""; 0], "it is over");
    }
}
