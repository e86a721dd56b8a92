//! Quotas as objects of tables. The kernel notifies, once, when one is used up: that is how a rule tells this process something.

use super::uapi::*;
use crate::netlink::wire::{Writer, find, find_string, find_u32, find_u64};

/// So many bytes, of which each packet that a rule hands to it takes its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Its name.
    pub name: String,
    /// How many.
    pub bytes: u64,
    /// They are used up.
    pub depleted: bool,
}

impl Quota {
    /// One of which nothing is used.
    pub fn new(name: impl Into<String>, bytes: u64) -> Self {
        Self { name: name.into(), bytes, depleted: false }
    }
}

/// The attributes of a message that makes it.
pub(super) fn write(w: &mut Writer, table: &str, quota: &Quota) {
    w.string(NFTA_OBJ_TABLE, table);
    w.string(NFTA_OBJ_NAME, &quota.name);
    w.u32(NFTA_OBJ_TYPE, NFT_OBJECT_QUOTA);
    w.nest(NFTA_OBJ_DATA, |w| w.u64(NFTA_QUOTA_BYTES, quota.bytes));
}

/// The quota that a message tells; `None` if it tells another object.
pub(super) fn read(attributes: &[u8]) -> Option<Quota> {
    let data = find(attributes, NFTA_OBJ_DATA)?;
    (find_u32(attributes, NFTA_OBJ_TYPE)? == NFT_OBJECT_QUOTA).then_some(Quota {
        name: find_string(attributes, NFTA_OBJ_NAME)?,
        bytes: find_u64(data, NFTA_QUOTA_BYTES)?,
        depleted: find_u32(data, NFTA_QUOTA_FLAGS).unwrap_or(0) & NFT_QUOTA_F_DEPLETED != 0,
    })
}
