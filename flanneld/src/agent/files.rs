//! The files for the CNI plugin and the container runtime, written when a pod can be added and not before.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backends::Kernel;
use subnet::LeaseStore;
use subnet::env_file::{Standing, SubnetEnv, write_atomically};
use subnet::regular;

use super::tenure::Task;
use super::{Agent, condition};

/// A disk that was full may have room again at any time, and until then no pod can be added.
const AGAIN: Duration = Duration::from_secs(5);

impl<K: Kernel, S: LeaseStore> Agent<'_, K, S> {
    /// Makes `subnet.env` say what is so, and then lets the container runtime know that there is a network.
    /// Says after how long to try again what failed.
    pub(super) fn write_files(&mut self) -> Option<Duration> {
        let (Some(lease), Some(external)) = (&self.lease, &self.external) else { return None };
        let env = SubnetEnv {
            networks: self.network.networks(),
            subnets: lease.subnets,
            mtu: self.ways.mtu(external.mtu),
            ip_masq: self.settings.traffic.masquerade,
            policy_socket: self.settings.policy_socket.clone(),
        };
        let path = &self.settings.subnet_file;
        // Another program may make something of the file that it needs at its own start; it has to be written
        // again only when it would say something else, or nothing.
        let standing = env.standing(path);
        let rewritten = self.written.as_ref() == Some(&env) && standing == Standing::Rewritten;
        let written = if rewritten { Ok(false) } else { env.write(path) };
        if written.is_ok() {
            self.written = Some(env.clone());
        }
        let note = rewritten.then(|| {
            format!(
                "{} was rewritten by another program after this node had written it: left alone until this node's \
                 subnet, network or MTU change",
                path.display()
            )
        });
        self.journal.rewritten(note.as_deref());
        self.health.note("subnet-file", note.into_iter().collect());
        self.journal.subnet_file(&self.settings.subnet_file, &env, &written);
        let done = written.is_ok();
        let mut failed = !done;
        self.health.set(condition::SUBNET_FILE, written.map(drop).map_err(|error| error.to_string()));
        if let Some((from, to)) = self.settings.cni_conf.as_ref().filter(|_| done) {
            let copied = copy(from, to);
            self.journal.cni_conf(to, &copied);
            failed |= copied.is_err();
            self.health.set(condition::CNI_CONF, copied.map(drop).map_err(|error| error.to_string()));
        }
        if self.health.ready().is_ok() {
            self.journal.ready();
            if self.announcing.is_none() && self.reconnecting.is_none() {
                let store = Arc::clone(&self.store);
                self.announcing = Some(Task::spawn(async move { store.announce_ready().await }));
            }
        }
        failed.then_some(AGAIN)
    }
}

/// Makes `to` have the content of `from`, in one step. Says whether anything was written.
fn copy(from: &Path, to: &Path) -> io::Result<bool> {
    let content = regular::read(from)
        .map_err(|error| io::Error::new(error.kind(), format!("--cni-conf: {}: {error}", from.display())))?;
    if regular::read(to).is_ok_and(|current| current == content) {
        return Ok(false);
    }
    write_atomically(to, &content, 0o644)?;
    Ok(true)
}
