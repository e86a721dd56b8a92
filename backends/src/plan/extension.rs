//! The `extension` backend: programs of the operator connect nodes (contract §5.8). Nothing of the kernel is planned;
//! the agent runs the programs for the peers that announce the same.

use ipnet::IpNet;
use subnet::{Attachment, Family, Mac};

use super::backend::{Backend, BackendError, Macs, Node, PlanInput};
use crate::state::KernelState;
use crate::state::name::Name;

/// The backend. Its commands make no difference to what is planned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extension;

impl Backend for Extension {
    fn words(&self) -> String {
        "extension".into()
    }

    /// What the first command prints is added when a lease is asked for.
    fn attachment(&self, _macs: &Macs) -> Attachment {
        Attachment::Extension(None)
    }

    fn reaches(&self, attachment: &Attachment) -> bool {
        matches!(attachment, Attachment::Extension(_))
    }

    fn previous_mac(&self, _before: &KernelState, _subnet: IpNet) -> Option<Mac> {
        None
    }

    fn mtu(&self, underlay: u32) -> u32 {
        underlay
    }

    fn devices(&self) -> Vec<(Family, Name)> {
        Vec::new()
    }

    fn check(&self, _node: &Node) -> Result<(), BackendError> {
        Ok(())
    }

    fn plan(&self, _scene: PlanInput<'_>) -> KernelState {
        KernelState::default()
    }
}
