//! Tunnel devices.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use subnet::{Family, Mac};

use super::name::Name;

/// How the names of devices begin that have made room for one with another port.
pub(crate) const SPARE_PREFIXES: [&str; 2] = ["flo.", "flo6."];

/// The name of the device of the `ipip` backend (contract §5.5).
pub(crate) const IPIP_DEVICE: &str = "flannel.ipip";

/// A tunnel device. `identity` can't change unless the device is recreated; `settings` are corrected in
/// place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// What the device is.
    pub identity: LinkIdentity,
    /// How it is set up.
    pub settings: LinkSettings,
}

/// What a device is, for as long as it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkIdentity {
    /// A VXLAN tunnel endpoint.
    Vxlan(VxlanIdentity),
    /// An IP-in-IP tunnel.
    Ipip(IpipIdentity),
    /// A TUN device that this process holds.
    Tun,
    /// WireGuard by the kernel.
    Wireguard,
    /// Something of the same name that is not what we make.
    Other(String),
}

/// The properties of a VXLAN device that the kernel refuses to change (drivers/net/vxlan/vxlan_core.c,
/// `vxlan_changelink`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanIdentity {
    /// Network identifier.
    pub vni: u32,
    /// UDP port; when wanted: `None` takes any.
    pub port: Option<u16>,
    /// Group-based policy extension.
    pub gbp: bool,
    /// Family of the underlay.
    pub family: Family,
    /// Joins a multicast group, or notifies or answers instead of the FDB: never wanted.
    pub foreign_modes: bool,
}

/// The properties of an IP-in-IP tunnel that a patch can't change: the kernel takes them all at once
/// (net/ipv4/ipip.c, `ipip_changelink`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpipIdentity {
    /// Source address of encapsulated packets, and the only address at which they are taken.
    pub local: Ipv4Addr,
    /// Leads to one peer alone, is bound to a device, or has outer headers of its own: never wanted.
    pub foreign_modes: bool,
}

/// How a device is set up; all of it can be changed without losing what hangs on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkSettings {
    /// Set up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// The device's own address.
    pub mac: Mac,
    /// Index of the device that carries the tunnel.
    pub lower: u32,
    /// Source address of encapsulated packets.
    pub local: IpAddr,
    /// Learns peers from their frames.
    pub learning: bool,
    /// Leaves checksums to the device underneath (`tx-checksum-ip-generic`); when wanted: `None` takes any,
    /// and when found: `None` was not asked for.
    pub tx_checksum: Option<bool>,
    /// Takes router advertisements (`accept_ra`); `None` as with `accept_local`.
    pub accept_ra: Option<bool>,
    /// Takes packets from addresses of this host (`accept_local`); when wanted: `None` takes any, and when
    /// found: `None` can't be known or set.
    pub accept_local: Option<bool>,
}

/// The settings of a device that are to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkPatch {
    /// See [`LinkSettings::up`].
    pub up: Option<bool>,
    /// See [`LinkSettings::mtu`].
    pub mtu: Option<u32>,
    /// See [`LinkSettings::mac`].
    pub mac: Option<Mac>,
    /// See [`LinkSettings::lower`].
    pub lower: Option<u32>,
    /// See [`LinkSettings::local`].
    pub local: Option<IpAddr>,
    /// See [`LinkSettings::learning`].
    pub learning: Option<bool>,
    /// See [`LinkSettings::tx_checksum`].
    pub tx_checksum: Option<bool>,
    /// See [`LinkSettings::accept_ra`].
    pub accept_ra: Option<bool>,
    /// See [`LinkSettings::accept_local`].
    pub accept_local: Option<bool>,
}

impl LinkIdentity {
    /// Whether the device `actual` can serve as `self`, the desired one.
    pub(crate) fn accepts(&self, actual: &Self) -> bool {
        match (self, actual) {
            (Self::Vxlan(want), Self::Vxlan(have)) => {
                VxlanIdentity { port: have.port, ..*want } == *have
                    && (want.port.is_none() || want.port == have.port)
            }
            _ => self == actual,
        }
    }

    /// Whether a device that is `actual` need not be removed before one that is `self` is made: another
    /// process may hold it, or have made a device of another kind that the kernel won't replace.
    pub(crate) fn takes_over(&self, actual: &Self) -> bool {
        match (self, actual) {
            (Self::Tun, Self::Other(kind)) => kind == "tun",
            (Self::Ipip(_), actual) => !matches!(actual, Self::Ipip(_)),
            _ => false,
        }
    }
}

impl LinkSettings {
    /// Those of a device that has neither MAC nor device underneath.
    pub fn plain(mtu: u32) -> Self {
        let local = Ipv4Addr::UNSPECIFIED.into();
        Self {
            up: true,
            mtu,
            mac: Mac([0; 6]),
            lower: 0,
            local,
            learning: false,
            tx_checksum: None,
            accept_ra: Some(false),
            // Its own address is the source of the errors that a datapath sends; otherwise the kernel takes
            // them for forged.
            accept_local: Some(true),
        }
    }

    /// What has to change for `self` to become `want`.
    pub(crate) fn patch_to(&self, want: &Self) -> LinkPatch {
        fn differing<T: PartialEq>(have: T, want: T) -> Option<T> {
            (have != want).then_some(want)
        }
        fn known(have: Option<bool>, want: Option<bool>) -> Option<bool> {
            want.filter(|want| have.is_some_and(|have| have != *want))
        }
        LinkPatch {
            up: differing(self.up, want.up),
            mtu: differing(self.mtu, want.mtu),
            mac: differing(self.mac, want.mac),
            lower: differing(self.lower, want.lower),
            local: differing(self.local, want.local),
            learning: differing(self.learning, want.learning),
            tx_checksum: want.tx_checksum.filter(|_| self.tx_checksum != want.tx_checksum),
            accept_ra: known(self.accept_ra, want.accept_ra),
            accept_local: known(self.accept_local, want.accept_local),
        }
    }

    /// Applies a patch.
    pub(crate) fn patch(&mut self, patch: &LinkPatch) {
        self.up = patch.up.unwrap_or(self.up);
        self.mtu = patch.mtu.unwrap_or(self.mtu);
        self.mac = patch.mac.unwrap_or(self.mac);
        self.lower = patch.lower.unwrap_or(self.lower);
        self.local = patch.local.unwrap_or(self.local);
        self.learning = patch.learning.unwrap_or(self.learning);
        self.tx_checksum = patch.tx_checksum.or(self.tx_checksum);
        self.accept_ra = patch.accept_ra.or(self.accept_ra);
        self.accept_local = patch.accept_local.or(self.accept_local);
    }
}

impl LinkPatch {
    /// Whether nothing changes.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl fmt::Display for LinkPatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(up) = self.up {
            f.write_str(if up { " up" } else { " down" })?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if let Some(mac) = self.mac {
            write!(f, " address {mac}")?;
        }
        if let Some(lower) = self.lower {
            write!(f, " dev #{lower}")?;
        }
        if let Some(local) = self.local {
            write!(f, " local {local}")?;
        }
        if let Some(learning) = self.learning {
            f.write_str(if learning { " learning" } else { " nolearning" })?;
        }
        if let Some(on) = self.tx_checksum {
            write!(f, " tx-checksum-ip-generic {}", if on { "on" } else { "off" })?;
        }
        for (sysctl, on) in [("accept_ra", self.accept_ra), ("accept_local", self.accept_local)] {
            if let Some(on) = on {
                write!(f, " {sysctl} {}", u8::from(on))?;
            }
        }
        Ok(())
    }
}

/// Whether a device has the name and kind of one that a backend of Flannel makes, ours or Go flannel's. Its
/// addresses tell whose it is: see `Scope::owns_device_with`.
pub fn is_tunnel(name: &Name, identity: &LinkIdentity) -> bool {
    let name = name.as_str();
    match identity {
        LinkIdentity::Vxlan(_) => {
            let number = name.strip_prefix("flannel.").or_else(|| name.strip_prefix("flannel-v6."));
            number.is_some_and(is_number) || SPARE_PREFIXES.iter().any(|aside| name.starts_with(aside))
        }
        LinkIdentity::Ipip(_) => name == IPIP_DEVICE,
        LinkIdentity::Tun => true,
        LinkIdentity::Wireguard => matches!(name, "flannel-wg" | "flannel-wg-v6"),
        LinkIdentity::Other(kind) if kind == "tun" => {
            name.strip_prefix("flannel").is_some_and(is_number)
                || matches!(name, "flannel-wg" | "flannel-wg-v6")
        }
        LinkIdentity::Other(_) => false,
    }
}

/// Whether a device has the name of one that a backend of Flannel makes, of any kind: what can't be an
/// external interface.
pub fn is_tunnel_name(name: &Name) -> bool {
    let name = name.as_str();
    let numbered = ["flannel.", "flannel-v6.", "flannel"];
    numbered.iter().any(|prefix| name.strip_prefix(prefix).is_some_and(is_number))
        || SPARE_PREFIXES.iter().any(|aside| name.starts_with(aside))
        || matches!(name, "flannel-wg" | "flannel-wg-v6" | IPIP_DEVICE)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}
