//! Steering, kept as the node's bridge and `br_netfilter` ask for.

use backends::NftError;
use backends::kernel::netlink::Netlink;
use backends::policy::{Enforcer, SteerMode, Steering, bridged_packets_are_seen};
use ipnet::IpNet;
use subnet::Family;

/// Has frames between pods of this node pass where policies are enforced.
pub(super) struct Steerer {
    netlink: Netlink,
    mode: SteerMode,
    /// What was found in the kernel and made, unless somebody may have changed it.
    made: Option<AppliedSteering>,
    /// A bridge may be another one since then.
    bridges_moved: bool,
}

#[derive(Clone, PartialEq, Eq)]
struct AppliedSteering {
    steering: Option<Steering>,
    seen: [bool; 2],
    wanted: bool,
}

/// What a look came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Steered {
    /// Frames are steered.
    On,
    /// They need not be.
    Off,
}

impl Steerer {
    pub(super) fn new(netlink: Netlink, mode: SteerMode) -> Self {
        Self { netlink, mode, made: None, bridges_moved: false }
    }

    /// The tables may have changed.
    pub(super) fn forget(&mut self) {
        self.made = None;
    }

    /// Bridges may have changed: each pod that comes makes its bridge tell of itself. The tables are as they were.
    pub(super) fn doubt_bridges(&mut self) {
        self.bridges_moved = true;
    }

    /// Makes steering be as it has to be for these subnets. `wanted` is whether any policy is enforced. Costs two small
    /// reads as long as nothing changes: a sysctl sends no notification.
    ///
    /// # Errors
    /// What the kernel refuses, in words.
    pub(super) fn look(
        &mut self,
        enforcer: &mut Enforcer,
        subnets: &[IpNet],
        wanted: bool,
    ) -> Result<Steered, String> {
        let seen = Family::BOTH.map(bridged_packets_are_seen);
        let known = self.made.as_ref().filter(|made| (made.seen, made.wanted) == (seen, wanted)).cloned();
        if let Some(made) = known.as_ref().filter(|_| !self.bridges_moved) {
            return Ok(steered(made.steering.as_ref()));
        }
        let steering = if wanted { self.steering(subnets, seen)? } else { None };
        self.bridges_moved = false;
        if let Some(made) = known.filter(|made| made.steering == steering) {
            return Ok(steered(made.steering.as_ref()));
        }
        let refused = |error: NftError| {
            format!(
                "frames between pods of this node can't be steered: {error}: load the kernel module nft_meta_bridge, or \
                 br_netfilter with net.bridge.bridge-nf-call-iptables=1"
            )
        };
        let before = self.made.as_ref().and_then(|made| made.steering.clone());
        let changed = enforcer.steer(steering.as_ref()).map_err(refused)?;
        if changed || before != steering {
            match &steering {
                Some(steering) => tracing::info!(
                    bridge = steering.bridge,
                    "frames between pods of this node are routed, so that network policies see them"
                ),
                None => {
                    tracing::info!("frames between pods of this node need not be routed for network policies")
                }
            }
        }
        let outcome = steered(steering.as_ref());
        self.made = Some(AppliedSteering { steering, seen, wanted });
        Ok(outcome)
    }

    fn steering(&mut self, subnets: &[IpNet], seen: [bool; 2]) -> Result<Option<Steering>, String> {
        let host = self.netlink.links_and_addresses().map_err(|error| error.to_string())?;
        // Without a bridge pods are routed anyway.
        let Some(bridge) = host.serving_bridge(subnets) else { return Ok(None) };
        let seen = |family| Family::BOTH.iter().position(|one| *one == family).is_some_and(|i| seen[i]);
        Ok(Steering::wanted(self.mode, bridge.name.as_str(), bridge.mac.0, subnets, seen))
    }
}

fn steered(steering: Option<&Steering>) -> Steered {
    if steering.is_some() { Steered::On } else { Steered::Off }
}
