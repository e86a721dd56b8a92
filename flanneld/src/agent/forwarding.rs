//! Forwarding of packets by this host.

use backends::prerequisites::{accept_ra, forwarding};
use backends::{Kernel, Name};
use subnet::Family;

/// Switches on forwarding of these families where it is off.
pub(super) fn switch_forwarding_on<K: Kernel>(kernel: &mut K, families: &[Family], outer: &[Name]) {
    for family in families {
        let key = forwarding(*family);
        if kernel.sysctls(&[key.to_owned()]).get(key).is_none_or(|value| value != "0") {
            continue;
        }
        if *family == Family::V6 {
            // Otherwise the kernel drops the default routes that it learned from routers.
            for key in outer.iter().map(accept_ra) {
                let found = kernel.sysctls(std::slice::from_ref(&key));
                if found.get(&key).is_some_and(|value| value == "1") && kernel.set_sysctl(&key, "2").is_ok() {
                    tracing::info!(
                        "net/{key} was 1 and is 2 now, so that routers are heard while forwarding is on"
                    );
                }
            }
        }
        match kernel.set_sysctl(key, "1") {
            Ok(()) => {
                tracing::info!("net/{key} was 0 and is 1 now: pods' packets need it (--ip-forward)")
            }
            Err(error) => tracing::warn!("net/{key} is 0 and can't be set: {error}"),
        }
    }
}
