//! One agent enforces network policies in a network namespace: its tables, and its bits of connection marks, can't be shared
//! with a second one, which would take the first one's rules for its own from an earlier run.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

/// The name of a socket without a file. The kernel keeps such names for each network namespace, and forgets them with the
/// process, however it ends. The zero in front makes it such a name.
const NAME: &str = "\0flanneld-network-policy";
/// How long an agent that ends just now may take for it.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(50);
/// How long the other agent may take for saying who it is.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// The longest path.
const MAX_ANSWER: u64 = 4096;

/// Held by the agent that enforces policies in this network namespace.
#[derive(Debug)]
pub(crate) struct Sole(Option<JoinHandle<()>>);

/// Who has the name.
#[derive(Debug)]
enum NameHolder {
    /// No process any more, or one that takes no connections.
    Silent,
    /// A process of another user, which is no flanneld.
    Stranger { user: u32 },
    /// Another flanneld.
    Agent { process: Option<i32>, subnet_file: String },
}

impl Sole {
    /// Claims this network namespace, until the value is dropped.
    ///
    /// # Errors
    /// Another agent enforces policies in it; the sentence names it.
    pub(crate) async fn claim(subnet_file: &Path) -> anyhow::Result<Self> {
        let given_up = Instant::now() + PATIENCE;
        loop {
            match UnixListener::bind(NAME) {
                Ok(listener) => {
                    let answer = subnet_file.display().to_string();
                    return Ok(Self(Some(tokio::spawn(answer_all(listener, answer)))));
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => {
                    return Err(error).context("--network-policy: a socket for other agents to see");
                }
            }
            let holder = holder().await;
            if Instant::now() < given_up && !matches!(holder, NameHolder::Stranger { .. }) {
                sleep(PAUSE).await;
                continue;
            }
            let who = match holder {
                NameHolder::Agent { process, subnet_file } => {
                    let process = process.map(|id| format!("process {id}, ")).unwrap_or_default();
                    bail!(
                        "another flanneld enforces network policies in this network namespace ({process}--subnet-file \
                         {subnet_file}): two can't share tables and connection marks; set --network-policy=off for one of \
                         them, or give it a network namespace of its own"
                    );
                }
                NameHolder::Stranger { user } => format!("a process of user {user}"),
                NameHolder::Silent => "a process that does not answer".to_owned(),
            };
            // Anybody on this host can take a name; that is no reason to leave pods without policies.
            tracing::warn!(
                "{who} has the name @{}, by which a second flanneld with --network-policy in this network namespace would be \
                 noticed: end that process",
                &NAME[1..]
            );
            return Ok(Self(None));
        }
    }
}

impl Drop for Sole {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

/// Tells those who connect which subnet file this agent writes.
async fn answer_all(listener: UnixListener, answer: String) {
    loop {
        match listener.accept().await {
            Ok((mut stream, _)) => drop(stream.write_all(answer.as_bytes()).await),
            Err(_) => sleep(PAUSE).await,
        }
    }
}

async fn holder() -> NameHolder {
    let Ok(stream) = UnixStream::connect(NAME).await else { return NameHolder::Silent };
    let Ok(peer) = stream.peer_cred() else { return NameHolder::Silent };
    if peer.uid() != rustix::process::geteuid().as_raw() {
        return NameHolder::Stranger { user: peer.uid() };
    }
    let mut answer = Vec::new();
    let read = timeout(ANSWER_TIMEOUT, stream.take(MAX_ANSWER).read_to_end(&mut answer)).await;
    let subnet_file = match read {
        Ok(Ok(_)) if !answer.is_empty() => String::from_utf8_lossy(&answer).into_owned(),
        _ => "unknown".to_owned(),
    };
    NameHolder::Agent { process: peer.pid().filter(|id| *id != 0), subnet_file }
}

#[cfg(test)]
mod tests {
    use super::*;
    use backends::testing::Namespace;

    /// On a thread of its own in a network namespace, so that other tests have other names.
    fn within(work: impl Future<Output = ()> + Send) {
        let namespace = Namespace::new().unwrap();
        namespace.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(work);
        });
    }

    #[test]
    fn a_second_agent_is_refused_with_the_name_of_the_first_until_that_one_ends() {
        within(async {
            let first = Sole::claim(Path::new("/run/first/subnet.env")).await.unwrap();
            let refusal = Sole::claim(Path::new("/run/second/subnet.env")).await.unwrap_err().to_string();
            let own = format!("(process {}, --subnet-file /run/first/subnet.env)", std::process::id());
            assert!(refusal.contains(&own) && refusal.contains("--network-policy=off"), "{refusal}");
            drop(first);
            Sole::claim(Path::new("/run/second/subnet.env")).await.unwrap();
        });
    }

    #[test]
    fn agents_of_two_network_namespaces_do_not_see_each_other() {
        within(async {
            let _first = Sole::claim(Path::new("/run/first/subnet.env")).await.unwrap();
            std::thread::spawn(|| {
                within(async { drop(Sole::claim(Path::new("/run/second/subnet.env")).await.unwrap()) });
            })
            .join()
            .unwrap();
        });
    }
}
