//! Which backend a configuration asks for.

use std::sync::Arc;

use subnet::{BackendConfig, Family, NetworkConfig};

use super::alloc::Alloc;
use super::backend::{Backend, BackendError};
use super::extension::Extension;
use super::host_gw::HostGw;
use super::ipip::Ipip;
use super::udp::Udp;
use super::vxlan::Vxlan;
use super::wireguard::Wireguard;
use crate::wg::key_file::KeyFiles;

/// What a configuration without a usable backend can have.
const INSTEAD: &str = "\"vxlan\", \"host-gw\", \"wireguard\", \"ipip\", \"udp\", \"alloc\" or \"extension\"";

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
        BackendConfig::Ipip(config) => Ok(Arc::new(Ipip::new(*config, &families)?)),
        BackendConfig::Alloc => Ok(Arc::new(Alloc)),
        BackendConfig::Extension(_) => Ok(Arc::new(Extension)),
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
            "ipsec" => format!(
                "Backend.Type: {name:?} is a backend of Go flannel that this release doesn't have: use {INSTEAD}"
            ),
            // Of Go flannel, or of its older releases; each makes routes in a cloud.
            "tencent-vpc" | "ali-vpc" | "aws-vpc" | "gce" => format!(
                "Backend.Type: {name:?} is not built in: the same is done by \"extension\" with commands of the cloud's \
                 own program, for which docs/extension.md has a recipe, or by \"alloc\" and routes that you make"
            ),
            _ => format!("Backend.Type: {name:?} is no backend: use {INSTEAD}"),
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
            (r#""Backend":{"Type":"tencent-vpc"}"#, "docs/extension.md has a recipe"),
            (r#""Backend":{"Type":"AWS-VPC"}"#, "\"alloc\" and routes"),
            (
                r#""EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"ipip"}"#,
                "\"ipip\" carries IPv4 alone",
            ),
            (
                r#""EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan","VNI":10000}"#,
                "VNI: 10000",
            ),
        ] {
            let text = refused(config);
            let remedy = ["host-gw", "9999", "\"extension\" with"].iter().any(|remedy| text.contains(remedy));
            assert!(text.contains(part) && remedy, "{text}");
        }
    }
}
