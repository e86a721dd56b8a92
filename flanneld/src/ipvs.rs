//! Whether the kernel has IPVS, by which kube-proxy may serve Services.

use std::path::Path;

/// Whether it is loaded, and so may send packets on that pass no forward hook. The module sends no notification, but
/// kube-proxy makes a device for it.
pub(crate) fn is_there() -> bool {
    Path::new("/proc/self/net/ip_vs").exists()
}
