//! The interface to what carries out traffic rules: nftables, or the iptables programs.

pub mod blocking;
mod foreign;
pub mod nftables;
mod offload;
mod tables;
mod tunnel;

use ipnet::IpNet;

use crate::state::tunnel::TunnelFilter;
use crate::traffic::rules::Traffic;

/// The rules can't be read or made.
#[derive(Debug, thiserror::Error)]
#[error("traffic rules: {what}: {why}")]
pub struct FirewallError {
    /// What was being done.
    pub what: String,
    /// The cause, with the remedy where one is known.
    pub why: String,
}

/// What a run of [`Firewall::converge`] did and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FirewallReport {
    /// What was changed, in words.
    pub changed: Vec<String>,
    /// What keeps pods' packets from passing and can't be put right from here.
    pub obstacles: Vec<String>,
    /// What an operator should know, though it keeps nothing from working.
    pub notes: Vec<String>,
    /// How many chains of others end forwarded packets that nothing accepts before.
    pub dropping: usize,
}

/// Whether the kernel is asked, or taken to be as it was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// All is read and compared.
    Kernel,
    /// No change by another program is known since, so only the difference between the last desired state and the present one is applied.
    Remembered,
}

/// Something that makes traffic rules.
pub trait Firewall: Send + 'static {
    /// Its name for the log.
    fn name(&self) -> &'static str;

    /// Makes the rules of each family be as `wanted`: those of a family that is not in it, and those that
    /// are off, are removed. Changes nothing where all is right. `former` are networks that this agent had
    /// before, whose rules are its own too.
    ///
    /// # Errors
    /// [`FirewallError`] when the rules can't be read, or can't be changed; then the old ones are in place.
    fn converge(&mut self, wanted: &[Traffic], former: &[IpNet]) -> Result<FirewallReport, FirewallError>;

    /// Makes the filter of each family's tunnel ports be as `wanted`, one element for each peer that came or went.
    /// The filter is always in nftables, because iptables has no sets.
    ///
    /// # Errors
    /// [`FirewallError`] when the filter can't be read or changed; then the old one is in place.
    fn filter_tunnels(
        &mut self,
        wanted: &[TunnelFilter],
        former: &[IpNet],
        look: Look,
    ) -> Result<FirewallReport, FirewallError>;
}
