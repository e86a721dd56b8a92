//! The `extension` backend's commands: programs of the operator that connect nodes (contract §5.8).
//!
//! `PreStartupCommand` runs before a lease is asked for ([`prepare`]). The others are the business of a task beside the
//! loop: it is told what commands have to know ([`ExtensionFacts`]), and sees to it that `SubnetAddCommand` has succeeded for
//! exactly the peers that there are, as the rest of the agent does with routes. For which peers it has is on disk, so that
//! `SubnetRemoveCommand` also runs for a peer that left while the agent was down.

mod entry;
mod run;
mod task;
#[cfg(test)]
mod tests;
mod words;

use std::path::PathBuf;
use std::sync::Arc;

use subnet::{ExtensionConfig, PublicAddrs, Subnets};
use tokio::sync::watch;

use entry::Memory;
pub(crate) use entry::{Entries, Entry, file};
use words::Variables;

use crate::serve::Health;

/// The condition of readiness that there is with this backend.
pub(crate) const CONDITION: &str = "extension";

/// Why commands are not run without permission.
pub(crate) const REFUSAL: &str = "Backend.Type: \"extension\" runs commands of the network configuration as root, so that who may write it has every \
     node; allow it on this node: start flanneld with --allow-extension-commands or, where the configuration is a file \
     (--net-config-path), set \"AllowCommands\": true in its Backend";

/// What commands have to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExtensionFacts {
    pub(crate) config: ExtensionConfig,
    pub(crate) start: StartupFacts,
    /// The peers that announce this backend.
    pub(crate) peers: Entries,
}

/// What `PostStartupCommand` has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StartupFacts {
    pub(crate) command: String,
    pub(crate) networks: Subnets,
    pub(crate) own: Subnets,
    /// The addresses of the external interface.
    pub(crate) local: PublicAddrs,
}

/// What the loop says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ExtensionUse {
    /// Nothing is known yet.
    #[default]
    Nothing,
    /// The cluster has another backend.
    Other,
    /// The cluster has this backend.
    Facts(Arc<ExtensionFacts>),
}

/// The loop's end of the conversation with the task.
#[derive(Clone, Debug)]
pub(crate) struct Hooks {
    /// Commands are allowed by the operator's flag.
    pub(crate) allowed: bool,
    pub(crate) told: watch::Sender<ExtensionUse>,
    /// For which lease `PostStartupCommand` has succeeded.
    pub(crate) started: watch::Receiver<Option<StartupFacts>>,
}

/// The task's end.
pub(crate) struct ExtensionTask {
    told: watch::Receiver<ExtensionUse>,
    started: watch::Sender<Option<StartupFacts>>,
    allowed: bool,
    file: PathBuf,
    health: Health,
}

impl Hooks {
    /// Both ends. `file` is where it is noted for which peers commands ran.
    pub(crate) fn new(allowed: bool, file: PathBuf, health: Health) -> (Self, ExtensionTask) {
        let (told, hear) = watch::channel(ExtensionUse::Nothing);
        let (tell, started) = watch::channel(None);
        let task = ExtensionTask { told: hear, started: tell, allowed, file, health };
        (Self { allowed, told, started }, task)
    }

    /// Whether a configuration's commands may be run on this node.
    ///
    /// # Errors
    /// [`REFUSAL`].
    pub(crate) fn permit(hooks: Option<&Self>, config: &ExtensionConfig) -> Result<(), String> {
        let allowed = hooks.is_some_and(|hooks| hooks.allowed || config.allowed);
        if allowed { Ok(()) } else { Err(REFUSAL.to_owned()) }
    }
}

/// What this node publishes: what `PreStartupCommand` prints, if there is one.
///
/// # Errors
/// A sentence with the reason and the remedy.
pub(crate) async fn prepare(config: &ExtensionConfig) -> Result<Option<Box<str>>, String> {
    if config.pre_startup.trim().is_empty() {
        return Ok(None);
    }
    let output = run::run(&config.pre_startup, &Variables::new(), "", run::TIMEOUT).await;
    let output = output.map_err(|why| format!("PreStartupCommand: {why}"))?;
    if output.cut {
        let most = run::MAX_OUTPUT / 1024;
        return Err(format!(
            "PreStartupCommand: it printed more than the {most} KiB that a lease has room for"
        ));
    }
    tracing::info!(bytes = output.text.len(), "PreStartupCommand succeeded");
    Ok(Some(output.text.into()))
}

/// For which peers commands of an earlier run have made something that `SubnetRemoveCommand` would remove.
///
/// # Errors
/// In words why the file can't be used.
pub(crate) fn remaining(file: &std::path::Path) -> Result<Vec<Subnets>, String> {
    Ok(Memory::read(file)?.peers.into_keys().collect())
}
