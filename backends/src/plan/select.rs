//! Which backend a configuration asks for.

use std::sync::Arc;

use subnet::{BackendConfig, Family, NetworkConfig};

use super::backend::{Backend, BackendError};
use super::host_gw::HostGw;
use super::udp::Udp;
use super::vxlan::Vxlan;
use super::wireguard::Wireguard;
use crate::wg::key_file::KeyFiles;

/// The backend that the configuration of this network asks for.
///
/// # Errors
/// [`BackendError`] naming what is not available in this release and what is.
pub(crate) fn select(
    config: &BackendConfig,
    network: &NetworkConfig,
) -> Result<Arc<dyn Backend>, BackendError> {
    let families: Vec<Family> = network.ranges().map(|range| Family::of(range.network.addr())).collect();
    match config {
        BackendConfig::Vxlan(config) => {
            Ok(Arc::new(Vxlan::new(config.clone(), &families)?.on_kernel(&kernel_release())))
        }
        BackendConfig::HostGw => Ok(Arc::new(HostGw)),
        BackendConfig::Udp { port, check_sources, workers } => {
            let networks = network.ranges().map(|range| range.network).collect();
            Ok(Arc::new(Udp::new(*port, *check_sources, *workers, networks)?))
        }
        BackendConfig::Wireguard(config) => {
            let identity = KeyFiles::of_environment().identity().map_err(BackendError)?;
            let networks = network.ranges().map(|range| range.network).collect();
            Ok(Arc::new(Wireguard::new(config.clone(), Arc::new(identity), networks)?))
        }
        BackendConfig::Unknown(name) => Err(BackendError(match name.as_str() {
            "ipip" | "ipsec" | "alloc" | "extension" | "tencent-vpc" => format!(
                "Backend.Type: {name:?} is a backend of Go flannel that this release doesn't have: use \"vxlan\", \"host-gw\", \"wireguard\" or \"udp\""
            ),
            _ => format!(
                "Backend.Type: {name:?} is no backend: use \"vxlan\", \"host-gw\", \"wireguard\" or \"udp\""
            ),
        })),
    }
}

/// The release of the running kernel, such as `6.1.0-13-amd64`.
fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(config: &str) -> String {
        let network = NetworkConfig::parse(&format!(r#"{{"Network":"10.1.0.0/16",{config}}}"#)).unwrap();
        select(&network.backend, &network).err().unwrap().to_string()
    }

    #[test]
    fn what_this_release_lacks_is_refused_by_name() {
        for (config, part) in [
            (r#""Backend":{"Type":"ipsec"}"#, "\"ipsec\" is a backend of Go flannel"),
            (r#""Backend":{"Type":"vxlann"}"#, "\"vxlann\" is no backend"),
            (
                r#""EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan","VNI":10000}"#,
                "VNI: 10000",
            ),
        ] {
            let text = refused(config);
            assert!(text.contains(part) && (text.contains("host-gw") || text.contains("9999")), "{text}");
        }
    }
}
