//! When the files for the CNI plugin are written, and what follows from it.

use std::io;
use std::time::Duration;

use subnet::env_file::SubnetEnv;

use super::{Action, Machine};
use crate::agent::condition;
use crate::agent::files::Written;

/// A disk that was full may have room again at any time, and until then no pod can be added.
const AGAIN: Duration = Duration::from_secs(5);

/// Why this process has not written `subnet.env` yet, where the kernel refuses a device.
const WAITS: &str =
    "it is written once the node's devices and addresses are in place: see the condition `kernel`";

impl Machine {
    /// Has the files written.
    pub(super) fn write_files(&mut self) {
        let (Some(lease), Some(external)) = (self.own.lease(), &self.underlay.external) else {
            self.keeper.files = None;
            return self.save();
        };
        if !self.hooks_have_started() {
            return self.save();
        }
        let env = SubnetEnv {
            networks: self.force.network.networks(),
            subnets: lease.subnets,
            mtu: self.force.active.mtu(external.mtu),
            ip_masq: self.settings.traffic.masquerade,
            policy_socket: self.settings.policy_socket.clone(),
        };
        let current = self.keeper.written.as_ref() == Some(&env);
        if !self.turn.sound && !current {
            // Pods that start would have no way to others. What was written before stays in force, and is kept whole.
            if self.keeper.written.is_none() {
                self.status.health.set(condition::SUBNET_FILE, Err(WAITS.to_owned()));
            }
            return self.save();
        }
        self.act(Action::WriteFiles { env, current });
    }

    /// Takes note of what came of it.
    pub(super) fn written(&mut self, outcome: &Written) {
        let Written { env, rewritten, written, copied } = outcome;
        if written.is_ok() {
            self.keeper.written = Some(env.clone());
        }
        let path = &self.settings.subnet_file;
        let note = rewritten.then(|| {
            format!(
                "{} was rewritten by another program after this node had written it: left alone until this node's \
                 subnet, network or MTU change",
                path.display()
            )
        });
        let (health, journal) = (&self.status.health, &mut self.status.journal);
        journal.rewritten(note.as_deref());
        health.note("subnet-file", note.into_iter().collect());
        journal.subnet_file(path, env, written);
        let state = |result: &io::Result<bool>| result.as_ref().map(drop).map_err(ToString::to_string);
        health.set(condition::SUBNET_FILE, state(written));
        let mut failed = written.is_err();
        if let (Some((_, to)), Some(copied)) = (&self.settings.cni_conf, copied) {
            journal.cni_conf(to, copied);
            failed |= copied.is_err();
            health.set(condition::CNI_CONF, state(copied));
        }
        if health.ready().is_ok() {
            journal.ready();
            if !self.own.is_recalled() {
                self.act(Action::AnnounceReady);
            }
        }
        self.keeper.files = failed.then_some(AGAIN);
    }
}
