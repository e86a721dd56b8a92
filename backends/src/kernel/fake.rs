//! A kernel that is a value, with the side effects of the real one that matter to convergence.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

use super::{Kernel, KernelError, Observed, Scope};
use crate::kernel::prerequisites::Sysctls;
use crate::state::host::Direct;
use crate::state::host::{HostView, ResolvedRoute};
use crate::state::{KernelChange, KernelState, LinkIdentity};

/// The fake kernel. Stands in for netlink where a test is about the agent and not about the kernel.
#[derive(Clone, Debug, Default)]
pub struct FakeKernel {
    /// What is ours.
    pub state: KernelState,
    /// What is not ours: nothing may ever touch it.
    pub strangers: KernelState,
    /// The host's links and addresses.
    pub host: HostView,
    /// The answers of [`Kernel::route_to`].
    pub resolved: BTreeMap<IpAddr, ResolvedRoute>,
    /// The module for WireGuard is not there.
    pub without_wireguard: bool,
    /// Objects (by [`KernelChange::object`], or "vxlan", "ipip" and "wireguard" for the making of such devices) whose changes fail
    /// with this errno.
    pub failing: BTreeMap<&'static str, i32>,
    /// All changes made so far.
    pub log: Vec<String>,
    /// Settings below `/proc/sys/net`.
    pub sysctls: Sysctls,
    /// The subnets of peers for which there are sessions of WireGuard.
    pub sessions: BTreeSet<IpNet>,
    /// How often it was read.
    pub observed: usize,
}

impl FakeKernel {
    /// A kernel in this state.
    #[cfg(test)]
    pub(crate) fn new(state: KernelState) -> Self {
        Self { state, ..Self::default() }
    }

    /// Applies one change with its side effects: addresses and routes die with the link's downfall, and
    /// setting a MAC flushes the permanent neighbours.
    fn make(&mut self, change: &KernelChange) {
        self.state.apply(change);
        match change {
            KernelChange::AddLink(name, _) => {
                if let Some(link) = self.state.links.get_mut(name)
                    && let LinkIdentity::Vxlan(vxlan) = &mut link.identity
                {
                    vxlan.port = vxlan.port.or(Some(8472));
                }
            }
            KernelChange::SetLink(name, patch) if patch.mac.is_some() => {
                self.state.neighbours.retain(|(dev, _), _| dev != name);
            }
            _ => {}
        }
    }
}

impl Kernel for FakeKernel {
    fn observe(&mut self, _desired: &KernelState, _scope: &Scope) -> Result<Observed, KernelError> {
        self.observed += 1;
        Ok(Observed { state: self.state.clone(), host: self.host.clone() })
    }

    fn apply(&mut self, changes: &[KernelChange]) -> Vec<(usize, KernelError)> {
        let mut failures = Vec::new();
        for (index, change) in changes.iter().enumerate() {
            let kind = match change {
                KernelChange::AddLink(_, link) => match link.identity {
                    LinkIdentity::Vxlan(_) => self.failing.get("vxlan"),
                    LinkIdentity::Ipip(_) => self.failing.get("ipip"),
                    LinkIdentity::Wireguard => self.failing.get("wireguard"),
                    _ => None,
                },
                _ => None,
            };
            if let Some(errno) = kind.or_else(|| self.failing.get(change.object())) {
                let source = io::Error::from_raw_os_error(*errno);
                let (object, device) = (change.object(), change.device());
                failures.push((
                    index,
                    KernelError::Refused { object, device, change: change.to_string(), source },
                ));
                continue;
            }
            self.log.push(change.to_string());
            self.make(change);
        }
        failures
    }

    fn route_to(&mut self, addr: IpAddr) -> Result<ResolvedRoute, KernelError> {
        self.resolved.get(&addr).copied().ok_or_else(|| KernelError::Netlink {
            what: "route lookup",
            source: io::Error::from_raw_os_error(101),
        })
    }

    fn direct(&mut self, addrs: &[IpAddr], _before: &Direct) -> Result<Direct, KernelError> {
        Ok(direct(self, addrs))
    }

    fn has_wireguard(&mut self) -> bool {
        !self.without_wireguard
    }

    fn wireguard_sessions(&mut self, _desired: &KernelState) -> BTreeSet<IpNet> {
        self.sessions.clone()
    }

    fn sysctls(&mut self, keys: &[String]) -> Sysctls {
        let value = |key: &String| Some((key.clone(), self.sysctls.get(key)?.clone()));
        keys.iter().filter_map(value).collect()
    }

    fn set_sysctl(&mut self, key: &str, value: &str) -> io::Result<()> {
        self.sysctls.insert(key.to_owned(), value.to_owned());
        Ok(())
    }
}

/// A fake kernel that the test and the agent both hold.
#[derive(Clone, Debug, Default)]
pub struct SharedKernel(Arc<Mutex<FakeKernel>>);

impl SharedKernel {
    /// Shares `kernel`.
    pub fn new(kernel: FakeKernel) -> Self {
        Self(Arc::new(Mutex::new(kernel)))
    }

    /// Access for the test.
    pub fn lock(&self) -> MutexGuard<'_, FakeKernel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those that are reached without a gateway, as if all of them answered.
fn direct(kernel: &FakeKernel, addrs: &[IpAddr]) -> Direct {
    let device = |addr: &IpAddr| {
        let route = kernel.resolved.get(addr).filter(|route| route.gateway.is_none())?;
        Some((*addr, kernel.host.links.get(&route.link)?.name))
    };
    Arc::new(addrs.iter().filter_map(device).collect())
}

impl Kernel for SharedKernel {
    fn observe(&mut self, desired: &KernelState, scope: &Scope) -> Result<Observed, KernelError> {
        self.lock().observe(desired, scope)
    }

    fn apply(&mut self, changes: &[KernelChange]) -> Vec<(usize, KernelError)> {
        self.lock().apply(changes)
    }

    fn route_to(&mut self, addr: IpAddr) -> Result<ResolvedRoute, KernelError> {
        self.lock().route_to(addr)
    }

    fn direct(&mut self, addrs: &[IpAddr], before: &Direct) -> Result<Direct, KernelError> {
        self.lock().direct(addrs, before)
    }

    fn has_wireguard(&mut self) -> bool {
        self.lock().has_wireguard()
    }

    fn wireguard_sessions(&mut self, desired: &KernelState) -> BTreeSet<IpNet> {
        self.lock().wireguard_sessions(desired)
    }

    fn sysctls(&mut self, keys: &[String]) -> Sysctls {
        self.lock().sysctls(keys)
    }

    fn set_sysctl(&mut self, key: &str, value: &str) -> io::Result<()> {
        self.lock().set_sysctl(key, value)
    }
}
