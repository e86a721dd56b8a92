//! How the CNI plugin's side (the socket) reaches the policy task: a pod's addresses before its containers run, and
//! back when they have ended.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use subnet::Mac;
use tokio::sync::{mpsc, oneshot};

use super::explain::Inquiry;

/// Requests that wait for the policy task; a further one waits with its sender.
const MAX_WAITING: usize = 64;
/// The policy task answers within this time; [`Announcer::announce`] gives up a little later.
const TIMEOUT: Duration = Duration::from_secs(9);

/// Where the socket is that the plugin asks at, beside the subnet file that names it.
pub(crate) fn socket_path(subnet_file: &Path) -> PathBuf {
    subnet_file.with_file_name("policy.sock")
}

/// A pod of this node has got its addresses, and its containers don't run yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Announcement {
    /// Its namespace (`K8S_POD_NAMESPACE`).
    pub(crate) namespace: String,
    /// Its name (`K8S_POD_NAME`).
    pub(crate) pod: String,
    /// Its uid (`K8S_POD_UID`); empty when the runtime doesn't give it.
    pub(crate) uid: String,
    /// The id of its sandbox (`CNI_CONTAINERID`).
    pub(crate) container: String,
    /// The host's end of its link.
    pub(crate) host_interface: String,
    /// The MAC address of its own end.
    pub(crate) mac: Option<Mac>,
    /// Its addresses.
    pub(crate) addresses: Vec<IpAddr>,
}

/// A sandbox has ended, so its addresses belong to no pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EndedSandbox {
    /// The pod's namespace.
    pub(crate) namespace: String,
    /// The pod's name.
    pub(crate) pod: String,
    /// The pod's uid; empty when the runtime doesn't give it.
    pub(crate) uid: String,
    /// The id of the sandbox. The DEL of one that was replaced changes nothing.
    pub(crate) container: String,
}

/// The pod can't be protected now: its ADD has to fail with code 11, so that the runtime tries again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub(crate) struct Retry {
    /// What stands in the way, and the remedy.
    pub(crate) why: String,
}

/// What became of connections with a pod's addresses from before its policies were in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OldConnections {
    /// The kernel has forgotten them.
    Forgotten,
    /// The kernel can't be asked for that, so the plugin has to look for them one by one.
    Kept,
}

/// What the policy task is asked for, and where it answers.
#[derive(Debug)]
pub(crate) enum PolicyRequest {
    Announce(Announcement, oneshot::Sender<Result<OldConnections, Retry>>),
    Release(EndedSandbox, oneshot::Sender<Result<(), Retry>>),
    /// A question of `flanneld policy`, answered with a text.
    Ask(Inquiry, oneshot::Sender<Result<String, Retry>>),
}

/// A way to the policy task.
#[derive(Clone, Debug)]
pub(crate) struct Announcer(mpsc::Sender<PolicyRequest>);

impl Announcer {
    /// The way to the receiver of the requests.
    pub(crate) fn channel() -> (Self, mpsc::Receiver<PolicyRequest>) {
        let (sender, receiver) = mpsc::channel(MAX_WAITING);
        (Self(sender), receiver)
    }

    /// Returns when the kernel enforces the policies for this pod's addresses.
    ///
    /// # Errors
    /// [`Retry`] when it can't be done now.
    pub(crate) async fn announce(&self, pod: Announcement) -> Result<OldConnections, Retry> {
        self.ask(|answer| PolicyRequest::Announce(pod, answer)).await
    }

    /// Returns when no policy counts the addresses as the pod's any more. One that was never announced is no error.
    ///
    /// # Errors
    /// [`Retry`] when it can't be done now. The DEL succeeds nevertheless: who gets an address next has it.
    pub(crate) async fn release(&self, ended: EndedSandbox) -> Result<(), Retry> {
        self.ask(|answer| PolicyRequest::Release(ended, answer)).await
    }

    /// Gives the text that answers a question.
    ///
    /// # Errors
    /// [`Retry`] when there is no answer now.
    pub(crate) async fn inquire(&self, inquiry: Inquiry) -> Result<String, Retry> {
        self.ask(|answer| PolicyRequest::Ask(inquiry, answer)).await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Retry>>) -> PolicyRequest,
    ) -> Result<T, Retry> {
        let retry = |why: &str| Err(Retry { why: why.to_owned() });
        let (answer, answered) = oneshot::channel();
        let asked = async {
            if self.0.send(request(answer)).await.is_err() {
                return retry("flanneld is stopping");
            }
            answered.await.unwrap_or_else(|_| retry("flanneld is stopping"))
        };
        tokio::time::timeout(TIMEOUT, asked)
            .await
            .unwrap_or_else(|_| retry("flanneld is busy with network policies; /readyz?verbose says more"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Announcement {
        Announcement {
            namespace: "shop".into(),
            pod: "web".into(),
            uid: String::new(),
            container: "c1".into(),
            host_interface: "veth1".into(),
            mac: None,
            addresses: vec!["10.244.1.7".parse().unwrap()],
        }
    }

    fn ended() -> EndedSandbox {
        let Announcement { namespace, pod, uid, container, .. } = pod();
        EndedSandbox { namespace, pod, uid, container }
    }

    #[tokio::test(start_paused = true)]
    async fn an_announcement_is_answered_by_the_task_or_refused_in_time() {
        let (announcer, mut requests) = Announcer::channel();
        let both = tokio::spawn({
            let announcer = announcer.clone();
            async move { (announcer.announce(pod()).await, announcer.release(ended()).await) }
        });
        let Some(PolicyRequest::Announce(got, answer)) = requests.recv().await else { panic!("no request") };
        assert_eq!(got, pod());
        answer.send(Ok(OldConnections::Kept)).unwrap();
        let Some(PolicyRequest::Release(got, answer)) = requests.recv().await else { panic!("no request") };
        assert_eq!(got, ended());
        answer.send(Ok(())).unwrap();
        assert_eq!(both.await.unwrap(), (Ok(OldConnections::Kept), Ok(())));
        // A task that answers nothing, and one that has ended.
        let why = announcer.announce(pod()).await.unwrap_err().why;
        assert!(why.contains("busy"), "{why}");
        drop(requests);
        let why = announcer.release(ended()).await.unwrap_err().why;
        assert!(why.contains("stopping"), "{why}");
    }

    #[test]
    fn the_socket_is_beside_the_file_that_names_it() {
        let path = socket_path(Path::new("/run/flannel/subnet.env"));
        assert_eq!(path.to_str(), Some("/run/flannel/policy.sock"));
    }
}
