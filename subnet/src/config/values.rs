//! Values that several backends have.

use super::ConfigError;
use crate::gojson::Object;

/// `MTU`: that of the underlay; `None` follows the external interface.
pub(super) fn mtu(backend: &Object<'_>) -> Result<Option<u32>, ConfigError> {
    let mtu = backend.get::<i64>("MTU")?.filter(|mtu| *mtu != 0);
    if let Some(mtu) = mtu.filter(|mtu| !(576..=65_535).contains(mtu)) {
        return Err(ConfigError(format!(
            "Backend.MTU: {mtu} can't be used: give the underlay's MTU, 576 to 65535 bytes, or leave it out"
        )));
    }
    Ok(mtu.map(|mtu| mtu as u32))
}

/// `Workers`: threads for each direction.
pub(super) fn workers(backend: &Object<'_>) -> Result<u8, ConfigError> {
    let workers = backend.get::<i64>("Workers")?.unwrap_or(1);
    match u8::try_from(workers) {
        Ok(workers @ 1..=8) => Ok(workers),
        _ => Err(ConfigError(format!(
            "Backend.Workers: {workers} can't be used: give 1 to 8, since the device has eight queues"
        ))),
    }
}
