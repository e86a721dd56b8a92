//! Whose tables those in the kernel are: those of the agent whose nodes' addresses are in them.

use std::net::IpAddr;

use super::keys::address_of;
use super::layout::filter_table;
use super::{own_tables, remove_all};
use crate::nft::{Nft, NftError};

/// Who made the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// There are none.
    Nobody,
    /// An agent in whose cluster nodes have these addresses; none if that can't be seen.
    Nodes(Vec<IpAddr>),
}

/// Removes the tables in the calling thread's network namespace.
///
/// # Errors
/// [`NftError`] when the kernel refuses.
pub fn remove_tables() -> Result<(), NftError> {
    remove_all(&mut Nft::open()?).map(drop)
}

/// Looks at the tables in the kernel, in the calling thread's network namespace.
///
/// # Errors
/// [`NftError`] when the kernel doesn't say.
pub fn owner() -> Result<Owner, NftError> {
    let found = Nft::open()?.dump_tables(&own_tables())?;
    if found.tables.is_empty() {
        return Ok(Owner::Nobody);
    }
    let sets = found.table(&filter_table()).into_iter().flat_map(|table| &table.sets);
    let nodes = sets.filter(|set| matches!(set.name.as_str(), "nodes4" | "nodes6"));
    Ok(Owner::Nodes(
        nodes.flat_map(|set| set.elements.keys()).filter_map(|span| address_of(&span.from)).collect(),
    ))
}
