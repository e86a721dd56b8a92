//! Observe, diff, apply, until the kernel is as it should be.

mod increment;
mod recalled;

use std::collections::BTreeSet;

use crate::kernel::{Kernel, KernelError, Observed, Scope};
use crate::state::diff::conflicts;
use crate::state::name::Name;
use crate::state::{KernelChange, KernelState, LinkIdentity, is_tunnel};

pub use increment::{Settled, converge_since};
pub use recalled::changes;

/// A kernel has side effects that no model knows: setting a MAC flushes neighbours, taking the last
/// address flushes routes. A second round repairs what the first one broke; a third is for bad luck.
const ROUNDS: usize = 3;

/// What a run of [`converge`] did.
#[derive(Debug, Default)]
pub struct Report {
    /// The changes made, in order.
    pub applied: Vec<KernelChange>,
    /// The changes that the kernel refused in the last round.
    pub failed: Vec<KernelError>,
    /// Wanted routes that the host's own addresses stand in the way of.
    pub conflicts: Vec<String>,
    /// Whether the kernel was found to be as desired at the end, but for failures, conflicts and what is
    /// held back.
    pub settled: bool,
    /// Devices of other programs that were deleted, because their names are those of devices that are wanted.
    pub replaced: Vec<String>,
    /// The kernel as last read: before the changes if the run had only one round.
    pub observed: Observed,
}

/// Makes the kernel agree with `desired`. Failures of single changes are in the report.
///
/// # Errors
/// [`KernelError`] when the kernel can't be read at all.
pub fn converge<K: Kernel>(
    kernel: &mut K,
    desired: &KernelState,
    scope: &Scope,
) -> Result<Report, KernelError> {
    converge_but(kernel, desired, scope, &BTreeSet::new())
}

/// The same, but for changes that are held back because somebody undoes them again and again
/// ([`crate::Fights::held`]).
///
/// # Errors
/// As [`converge`].
pub(crate) fn converge_but<K: Kernel>(
    kernel: &mut K,
    desired: &KernelState,
    scope: &Scope,
    held: &BTreeSet<String>,
) -> Result<Report, KernelError> {
    let mut report = Report::default();
    for _ in 0..ROUNDS {
        let observed = kernel.observe(desired, scope)?;
        let mut changes = changes(desired, &observed.state, scope);
        hold_back(&mut changes, held);
        report.conflicts = conflicts(desired, &observed.state);
        report.observed = observed;
        if changes.is_empty() {
            report.failed.clear();
            report.settled = true;
            return Ok(report);
        }
        let failures = kernel.apply(&changes);
        let refused = failures.len();
        for (index, _) in failures.iter().rev() {
            changes.remove(*index);
        }
        let progress = !changes.is_empty();
        report.replaced.extend(replaced(&changes, desired, &report.observed.state));
        report.applied.append(&mut changes);
        report.failed = causes(failures.into_iter().map(|(_, error)| error).collect());
        if refused > 0 && !progress {
            return Ok(report);
        }
    }
    Ok(report)
}

/// Leaves out what is held back. Without its device nothing can be made that hangs on it.
fn hold_back(changes: &mut Vec<KernelChange>, held: &BTreeSet<String>) {
    if held.is_empty() {
        return;
    }
    let is_held = |change: &KernelChange| held.contains(&change.to_string());
    let devices: BTreeSet<Name> = changes
        .iter()
        .filter(|change| {
            matches!(
                change,
                KernelChange::AddLink(..) | KernelChange::DelLink(_) | KernelChange::RenameLink(..)
            )
        })
        .filter(|change| is_held(change))
        .filter_map(KernelChange::device)
        .collect();
    changes
        .retain(|change| !is_held(change) && change.device().is_none_or(|device| !devices.contains(&device)));
}

/// Which devices of other programs were deleted for one of the same name that is wanted, as Go flannel does.
fn replaced(applied: &[KernelChange], desired: &KernelState, before: &KernelState) -> Vec<String> {
    let of_another = |change: &KernelChange| {
        let KernelChange::DelLink(name) = change else { return None };
        let identity = &before.links.get(name)?.identity;
        let LinkIdentity::Other(kind) = identity else { return None };
        // A TUN device of the tunnel's name is one that an agent has left which encrypted in process.
        (desired.links.contains_key(name) && !is_tunnel(name, identity)).then(|| {
            let kind = if kind.is_empty() { "physical" } else { kind };
            format!(
                "{name} was a device of the kind {kind} that another program had made: it was deleted, because the backend's \
                 device has this name; give that program's device another name"
            )
        })
    };
    applied.iter().filter_map(of_another).collect()
}

const ENODEV: i32 = 19;

/// Leaves out what only follows from a device that could not be made, which is said by itself.
fn causes(mut failed: Vec<KernelError>) -> Vec<KernelError> {
    let refused = |error: &KernelError| match error {
        KernelError::Refused { object: "link", device, .. } => *device,
        _ => None,
    };
    let refused: BTreeSet<Name> = failed.iter().filter_map(refused).collect();
    failed.retain(|error| match error {
        KernelError::NoDevice(name) => !refused.contains(name),
        KernelError::Refused { object, device: Some(name), source, .. } => {
            *object == "link" || !refused.contains(name) || source.raw_os_error() != Some(ENODEV)
        }
        _ => true,
    });
    failed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::fake::FakeKernel;
    use crate::state::{Link, LinkSettings, Route};

    fn desired() -> KernelState {
        let dst = "10.1.2.0/24".parse().unwrap();
        let via = Some("192.0.2.2".parse().unwrap());
        let dev = Some("eth0".parse().unwrap());
        let route = Route { via, dev, ..Route::ours(dst) };
        KernelState { routes: [(dst, route)].into(), ..KernelState::default() }
    }

    #[test]
    fn a_refused_change_is_reported_and_made_later() {
        let mut kernel = FakeKernel::default();
        kernel.failing.insert("route", 101);
        let report = converge(&mut kernel, &desired(), &Scope::default()).unwrap();
        assert!(report.applied.is_empty() && !report.settled);
        assert!(report.failed[0].to_string().starts_with("route replace 10.1.2.0/24"), "{:?}", report.failed);

        kernel.failing.clear();
        let report = converge(&mut kernel, &desired(), &Scope::default()).unwrap();
        assert!(report.failed.is_empty() && report.settled);
        assert_eq!(report.applied.len(), 1);
    }

    #[test]
    fn a_kernel_that_is_right_is_read_once_and_left_alone() {
        let mut kernel = FakeKernel::new(desired());
        let report = converge(&mut kernel, &desired(), &Scope::default()).unwrap();
        assert!(report.applied.is_empty() && report.settled);
        assert_eq!(kernel.observed, 1);
    }

    #[test]
    fn what_hangs_on_a_device_that_could_not_be_made_is_not_complained_about() {
        let name: Name = "flannel0".parse().unwrap();
        let refused = KernelError::Refused {
            object: "link",
            device: Some(name),
            change: "link add flannel0 type tun".into(),
            source: std::io::Error::from_raw_os_error(16),
        };
        let failed = causes(vec![
            refused,
            KernelError::NoDevice(name),
            KernelError::Refused {
                object: "forwarding",
                device: Some(name),
                change: "forwarding set flannel0".into(),
                source: std::io::Error::from_raw_os_error(ENODEV),
            },
            KernelError::NoDevice("eth9".parse().unwrap()),
        ]);
        let texts: Vec<String> = failed.iter().map(ToString::to_string).collect();
        assert_eq!(texts.len(), 2, "{texts:?}");
        assert!(texts[0].contains("flannel0") && texts[1].contains("eth9"));
    }

    #[test]
    fn a_deleted_device_is_another_programs_unless_an_agent_leaves_one_like_it() {
        let name: Name = "flannel-wg".parse().unwrap();
        let link = |identity| Link { identity, settings: LinkSettings::plain(1420) };
        let of = |identity| KernelState { links: [(name, link(identity))].into(), ..KernelState::default() };
        let desired = of(LinkIdentity::Wireguard);
        for (kind, of_another) in [("bridge", true), ("", true), ("tun", false)] {
            let before = of(LinkIdentity::Other(kind.to_owned()));
            let replaced = replaced(&[KernelChange::DelLink(name)], &desired, &before);
            assert_eq!(replaced.len(), usize::from(of_another), "{kind}: {replaced:?}");
        }
    }

    #[test]
    fn what_is_held_back_is_not_made_and_all_else_is() {
        let mut kernel = FakeKernel::default();
        let mut desired = desired();
        let second =
            Route { dst: "10.1.3.0/24".parse().unwrap(), ..*desired.routes.values().next().unwrap() };
        desired.routes.insert(second.dst, second);
        let held = [KernelChange::SetRoute(second).to_string()].into();
        let report = converge_but(&mut kernel, &desired, &Scope::default(), &held).unwrap();
        assert!(report.settled && report.applied.len() == 1, "{:?}", report.applied);
        let report = converge(&mut kernel, &desired, &Scope::default()).unwrap();
        assert_eq!(report.applied, [KernelChange::SetRoute(second)]);
    }
}
