//! `Backend` of `net-conf.json`: each backend's keys, from JSON to values that need no further checking.

use super::values::{mtu, workers};
use super::wireguard::WireguardConfig;
use super::{
    BackendConfig, ChecksumOffload, ConfigError, DEFAULT_UDP_PORT, ExtensionConfig, IpipConfig, Origin,
    VxlanConfig,
};
use crate::gojson::Object;
use crate::text::shortened;

/// The backend that the document asks for.
pub(super) fn backend(object: &Object<'_>, origin: Origin) -> Result<BackendConfig, ConfigError> {
    if !object.has("Backend") {
        return Ok(BackendConfig::FALLBACK);
    }
    let missing = "Backend: it has no Type: set it to \"vxlan\", \"host-gw\", \"wireguard\", \"udp\" or another backend";
    let Some(backend) = object.object("Backend")? else { return Err(ConfigError(missing.into())) };
    let kind = backend.get::<String>("Type")?.unwrap_or_default().to_lowercase();
    match kind.as_str() {
        "" => Err(ConfigError(missing.into())),
        "vxlan" => vxlan(&backend).map(BackendConfig::Vxlan),
        "host-gw" => Ok(BackendConfig::HostGw),
        "ipip" => ipip(&backend).map(BackendConfig::Ipip),
        "alloc" => Ok(BackendConfig::Alloc),
        "extension" => extension(&backend, origin).map(BackendConfig::Extension),
        "wireguard" => WireguardConfig::parse(&backend).map(BackendConfig::Wireguard),
        "udp" => Ok(BackendConfig::Udp {
            port: port(&backend)?.unwrap_or(DEFAULT_UDP_PORT),
            check_sources: backend.get::<bool>("CheckSources")?.unwrap_or(true),
            workers: workers(&backend)?,
        }),
        _ => Ok(BackendConfig::Unknown(shortened(&kind))),
    }
}

fn vxlan(backend: &Object<'_>) -> Result<VxlanConfig, ConfigError> {
    const LARGEST_VNI: i64 = (1 << 24) - 1;
    let vni = backend.get::<i64>("VNI")?.unwrap_or(1);
    // "flannel." and the number have to fit into a device name of 15 bytes.
    if !(0..=LARGEST_VNI.min(9_999_999)).contains(&vni) {
        return Err(ConfigError(format!(
            "Backend.VNI: {vni} can't be used: the device name flannel.<VNI> has room for 0 to 9999999"
        )));
    }
    let flag = |key| backend.get::<bool>(key).map(Option::unwrap_or_default);
    Ok(VxlanConfig {
        vni: vni as u32,
        port: port(backend)?,
        mtu: mtu(backend)?,
        gbp: flag("GBP")?,
        learning: flag("Learning")?,
        direct_routing: flag("DirectRouting")?,
        checksum_offload: checksum_offload(backend)?,
        fallback: fallback(backend)?,
        check_sources: backend.get::<bool>("CheckSources")?.unwrap_or(true),
    })
}

fn ipip(backend: &Object<'_>) -> Result<IpipConfig, ConfigError> {
    Ok(IpipConfig {
        direct_routing: backend.get::<bool>("DirectRouting")?.unwrap_or_default(),
        fallback: fallback(backend)?,
        check_sources: backend.get::<bool>("CheckSources")?.unwrap_or(true),
    })
}

fn extension(backend: &Object<'_>, origin: Origin) -> Result<ExtensionConfig, ConfigError> {
    let command = |key| backend.get::<String>(key).map(Option::unwrap_or_default);
    let allowed = backend.get::<bool>("AllowCommands")?.unwrap_or_default();
    Ok(ExtensionConfig {
        pre_startup: command("PreStartupCommand")?,
        post_startup: command("PostStartupCommand")?,
        subnet_add: command("SubnetAddCommand")?,
        subnet_remove: command("SubnetRemoveCommand")?,
        allowed: allowed && origin == Origin::File,
    })
}

fn checksum_offload(backend: &Object<'_>) -> Result<ChecksumOffload, ConfigError> {
    let text: Option<String> = backend.get("ChecksumOffload")?;
    match text.as_deref().map(str::to_ascii_lowercase).as_deref() {
        None | Some("" | "auto") => Ok(ChecksumOffload::Auto),
        Some("on") => Ok(ChecksumOffload::On),
        Some("off") => Ok(ChecksumOffload::Off),
        Some(other) => Err(ConfigError(format!(
            "Backend.ChecksumOffload: {:?} is none of \"auto\", \"on\" and \"off\"",
            shortened(other)
        ))),
    }
}

fn fallback(backend: &Object<'_>) -> Result<bool, ConfigError> {
    let text: Option<String> = backend.get("Fallback")?;
    match text.as_deref().map(str::to_ascii_lowercase).as_deref() {
        None | Some("") => Ok(false),
        Some("udp") => Ok(true),
        Some(other) => Err(ConfigError(format!(
            "Backend.Fallback: {:?} can't stand in for a tunnel of the kernel: use \"udp\", or leave it out",
            shortened(other)
        ))),
    }
}

fn port(backend: &Object<'_>) -> Result<Option<u16>, ConfigError> {
    match backend.get::<i64>("Port")? {
        None | Some(0) => Ok(None),
        Some(port) => u16::try_from(port).map(Some).map_err(|_| {
            ConfigError(format!("Backend.Port: {port} is not a UDP port: give 1 to 65535, or leave it out"))
        }),
    }
}
