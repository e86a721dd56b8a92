//! What the original before 1.6 left for a container: a chain of iptables, and rules that jump to it. Those of
//! iptables-nft are tables of nf_tables, and go from here; those of legacy iptables only its own programs can remove.

use crate::hash;
use crate::netlink::Errno;
use crate::netlink::nft;
use crate::netlink::socket::Socket;

const TABLE: &str = "nat";
/// The longest name that iptables allows to a chain.
const NAME_LENGTH: usize = 28;

/// Removes the chain of the container with all jumps to it.
pub(super) fn remove(socket: &mut Socket, family: u8, network: &str, container: &str) -> Result<(), Errno> {
    let chain = hash::name("CNI-DN-", NAME_LENGTH, &format!("{network}{container}"));
    let rules = nft::rules(socket, family, TABLE)?;
    let jumps: Vec<_> = rules.iter().filter(|rule| rule.jump.as_ref() == Some(&chain)).collect();
    if jumps.is_empty() && rules.iter().all(|rule| rule.chain != chain) {
        return Ok(());
    }
    let mut changes: Vec<_> = jumps.into_iter().map(|rule| nft::delete_rule(family, TABLE, rule)).collect();
    changes.push(nft::flush(family, TABLE, &chain));
    changes.push(nft::delete_chain(family, TABLE, &chain));
    match nft::commit(socket, changes).map_err(Errno::from) {
        Err(Errno::NO_ENTRY) => Ok(()),
        outcome => outcome,
    }
}
