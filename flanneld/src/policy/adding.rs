//! The ADD of a pod, step by step: who it is, which policies there are now, which pods they name, then the kernel.

use subnet::kube::FoundPod;
use subnet::policy::objects::{ReadPod, uid};
use subnet::policy::{ObjectName, Pod};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::announce::{Announcement, OldConnections, Retry};
use super::known::Known;

/// A pod is announced, and the plugin waits.
pub(super) struct Adding {
    pub(super) pod: Announcement,
    answer: oneshot::Sender<Result<OldConnections, Retry>>,
    /// When it was asked for.
    pub(super) since: Instant,
    /// Whether its namespace's policies are read, as far as that can be done.
    pub(super) policies_read: bool,
    pub(super) step: AddStage,
}

/// What an ADD waits for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AddStage {
    /// The watch to tell about the pod; then it is asked for.
    Watched(Instant),
    /// The answer about the pod.
    Asked,
    /// Its namespace's policies.
    Found(Box<Pod>),
    /// The lists of the pods that its policies name, at most so long.
    Listed(Instant),
    /// The kernel.
    Programmed,
}

impl Adding {
    pub(super) fn new(
        pod: Announcement,
        answer: oneshot::Sender<Result<OldConnections, Retry>>,
        step: AddStage,
        now: Instant,
    ) -> Self {
        Self { pod, answer, since: now, policies_read: false, step }
    }

    pub(super) fn name(&self) -> ObjectName {
        ObjectName::new(&*self.pod.namespace, &*self.pod.pod)
    }

    /// Whether an earlier one can't be any more what it was announced as: one sandbox is announced once at a time, and an address
    /// is given to one sandbox at a time.
    pub(super) fn replaces(&self, earlier: &Self) -> bool {
        let Announcement { container, addresses, .. } = &earlier.pod;
        *container == self.pod.container || addresses.iter().any(|one| self.pod.addresses.contains(one))
    }

    /// Tells the plugin how it ended.
    pub(super) fn end(self, outcome: Result<OldConnections, String>) {
        let Announcement { namespace, pod, .. } = &self.pod;
        match &outcome {
            Ok(_) => {
                tracing::debug!(%namespace, %pod, took = ?self.since.elapsed(), "network policies hold for a new pod")
            }
            Err(why) => tracing::warn!(%namespace, %pod, "no network for a new pod yet: {why}"),
        }
        // A plugin that was killed needs no answer.
        let _ = self.answer.send(outcome.map_err(|why| Retry { why }));
    }
}

/// The pod of this node that an announcement is about, if it is known.
pub(super) fn find(known: &Known, announced: &Announcement) -> Option<Pod> {
    if !announced.uid.is_empty() {
        return known.own(uid(&announced.uid)).cloned();
    }
    known.own_named(&announced.namespace, &announced.pod).max_by_key(|pod| pod.created).cloned()
}

/// The same in what the API says of the pod of this name.
///
/// # Errors
/// Why it isn't it.
pub(super) fn identify(announced: &Announcement, found: Option<FoundPod>) -> Result<Box<Pod>, String> {
    let Announcement { namespace, pod: name, .. } = announced;
    let Some(FoundPod { pod, static_uid }) = found else {
        return Err(format!("the API has no pod {namespace}/{name}: it was deleted, or is not there yet"));
    };
    let pod = match pod {
        ReadPod::Own(pod) => pod,
        ReadPod::Without(_) => return Err(format!("pod {namespace}/{name} has ended, as the API says")),
    };
    if !pod.local {
        return Err(format!("pod {namespace}/{name} is on another node, as the API says"));
    }
    let asked = uid(&announced.uid);
    if announced.uid.is_empty() || pod.uid == asked || static_uid == Some(asked) {
        return Ok(Box::new(pod));
    }
    Err(format!(
        "the API has another pod {namespace}/{name} than that with the uid {}: the one before it was not removed yet, or \
         this one was",
        announced.uid
    ))
}

/// Whether an announcement can be about any pod.
///
/// # Errors
/// What is wrong with it.
pub(super) fn examine(announced: &Announcement, strict: bool) -> Result<(), String> {
    if !super::kept::is_container(&announced.container) {
        return Err(format!("{:?} is not the id of a container (CNI_CONTAINERID)", announced.container));
    }
    for (what, value) in [("K8S_POD_NAMESPACE", &announced.namespace), ("K8S_POD_NAME", &announced.pod)] {
        let name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte);
        if value.is_empty() || value.len() > 253 || !value.bytes().all(name) {
            return Err(format!("{what}: {value:?} is not a name in Kubernetes"));
        }
    }
    if announced.addresses.is_empty() {
        return Err("the delegate gave the pod no address: network policies can't be enforced".to_owned());
    }
    if announced.host_interface.is_empty() {
        let why = "the host doesn't see the pod's traffic (macvlan, ipvlan or a device of the host): its network policies \
                   can't be enforced";
        if strict {
            return Err(format!("{why}, and --network-policy=strict asks for that"));
        }
        tracing::warn!(namespace = %announced.namespace, pod = %announced.pod, "{why}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use subnet::policy::{Labels, Uid};

    use super::*;

    fn announced(uid: &str) -> Announcement {
        Announcement {
            namespace: "shop".into(),
            pod: "web".into(),
            uid: uid.into(),
            container: "c1".into(),
            host_interface: "veth0".into(),
            mac: None,
            addresses: vec!["10.0.0.1".parse().unwrap()],
        }
    }

    fn object(uid: u128, local: bool) -> Pod {
        Pod {
            uid: Uid(uid),
            name: ObjectName::new("shop", "web"),
            labels: Labels::new(),
            addresses: Vec::new(),
            ports: Vec::new(),
            created: 1,
            local,
        }
    }

    #[test]
    fn a_pod_is_known_by_its_uid_and_a_static_one_by_that_of_kubelet() {
        let uid = |number: u128| format!("{number:032x}");
        let found = |pod, static_uid| Some(FoundPod { pod, static_uid });
        let own = ReadPod::Own(object(7, true));
        assert!(identify(&announced(&uid(7)), found(own.clone(), None)).is_ok());
        assert!(identify(&announced(""), found(own.clone(), None)).is_ok());
        assert!(identify(&announced(&uid(8)), found(own.clone(), Some(Uid(8)))).is_ok());
        for (asked, found, part) in [
            (uid(8), found(own, None), "another pod"),
            (uid(7), found(ReadPod::Own(object(7, false)), None), "another node"),
            (uid(7), found(ReadPod::Without(Uid(7)), None), "has ended"),
            (uid(7), None, "no pod shop/web"),
        ] {
            let why = identify(&announced(&asked), found).unwrap_err();
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn an_announcement_that_can_be_about_no_pod_is_refused_with_what_is_wrong() {
        assert_eq!(examine(&announced(""), true), Ok(()));
        let wrong: [(Announcement, &str); 5] = [
            (Announcement { container: "../x".into(), ..announced("") }, "CNI_CONTAINERID"),
            (Announcement { namespace: String::new(), ..announced("") }, "K8S_POD_NAMESPACE"),
            (Announcement { pod: "a/../b".into(), ..announced("") }, "K8S_POD_NAME"),
            (Announcement { addresses: Vec::new(), ..announced("") }, "no address"),
            (Announcement { host_interface: String::new(), ..announced("") }, "strict"),
        ];
        for (announced, part) in wrong {
            let why = examine(&announced, true).unwrap_err();
            assert!(why.contains(part), "{why}");
        }
        assert_eq!(examine(&Announcement { host_interface: String::new(), ..announced("") }, false), Ok(()));
    }
}
