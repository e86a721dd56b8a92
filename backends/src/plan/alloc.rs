//! The `alloc` backend: a lease, `subnet.env` and traffic rules; packets to other nodes are left to the host's other
//! routes (contract §5.7).
//!
//! For networks in which each node's subnet is routed to it from outside, such as by a cloud's route table or a router.

use ipnet::IpNet;
use subnet::{Attachment, Family, Mac};

use super::backend::{Backend, BackendError, Macs, Node, PlanInput};
use crate::state::KernelState;
use crate::state::name::Name;

/// The backend; it has nothing to configure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Alloc;

impl Backend for Alloc {
    fn words(&self) -> String {
        "alloc".into()
    }

    /// Go flannel writes an empty type, as for `udp`.
    fn attachment(&self, _macs: &Macs) -> Attachment {
        Attachment::Udp
    }

    fn reaches(&self, attachment: &Attachment) -> bool {
        *attachment == Attachment::Udp
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

#[cfg(test)]
mod tests {
    use super::*;
    use subnet::lease::encode_value;
    use subnet::{NetworkConfig, PublicAddrs};

    #[test]
    fn a_lease_is_byte_for_byte_that_of_go_flannel_which_has_no_type() {
        let json = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"Alloc"}}"#;
        let network = NetworkConfig::parse(json).unwrap();
        let backend = crate::plan::select::select(&network.backend, &network).unwrap();
        let public = PublicAddrs { v4: Some("192.0.2.1".parse().unwrap()), v6: None };
        assert_eq!(
            encode_value(&public, &backend.attachment(&Macs::default())),
            r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#
        );
        assert_eq!(
            (backend.mtu(1500), backend.devices(), backend.tunnel_port(Family::V4)),
            (1500, vec![], None)
        );
    }
}
