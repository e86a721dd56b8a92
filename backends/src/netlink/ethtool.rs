//! The one feature of a device that matters to us, read and set over ethtool's netlink family.

#[cfg(test)]
mod tests;

use std::io;

use super::generic::GenericFamily;
use super::wire::{Writer, attributes, find, find_string};

/// Whether the device takes packets whose checksum is yet to be computed. Off, the stack computes it before
/// the device sees the packet.
const TX_CHECKSUM: &str = "tx-checksum-ip-generic";

const ETHTOOL_FAMILY: &str = "ethtool";
const ETHTOOL_MSG_FEATURES_GET: u8 = 11;
const ETHTOOL_MSG_FEATURES_SET: u8 = 12;
const ETHTOOL_A_HEADER_DEV_INDEX: u16 = 1;
const ETHTOOL_A_FEATURES_HEADER: u16 = 1;
const ETHTOOL_A_FEATURES_WANTED: u16 = 3;
const ETHTOOL_A_FEATURES_ACTIVE: u16 = 4;
const ETHTOOL_A_BITSET_NOMASK: u16 = 1;
const ETHTOOL_A_BITSET_BITS: u16 = 3;
const ETHTOOL_A_BITSET_BITS_BIT: u16 = 1;
const ETHTOOL_A_BITSET_BIT_NAME: u16 = 2;
const ETHTOOL_A_BITSET_BIT_VALUE: u16 = 3;

/// Ethtool in the network namespace in which it is first used.
#[derive(Default)]
pub(crate) struct Ethtool {
    family: Option<GenericFamily>,
}

/// What an answer says about the feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bit {
    On,
    Off,
    Unlisted,
}

impl Ethtool {
    /// Opens nothing yet: most nodes never need it.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Whether checksums of what is sent through the device may be left to it.
    pub(crate) fn tx_checksum(&mut self, index: u32) -> io::Result<bool> {
        let answer = |body: &[u8]| find(body, ETHTOOL_A_FEATURES_ACTIVE).and_then(feature);
        let bit = self.features(ETHTOOL_MSG_FEATURES_GET, index, |_| {}, answer)?;
        Ok(bit == Bit::On)
    }

    /// Sets whether checksums of what is sent through the device may be left to it.
    pub(crate) fn set_tx_checksum(&mut self, index: u32, on: bool) -> io::Result<()> {
        let wanted = |w: &mut Writer| {
            w.nest(ETHTOOL_A_FEATURES_WANTED, |w| {
                w.nest(ETHTOOL_A_BITSET_BITS, |w| {
                    w.nest(ETHTOOL_A_BITSET_BITS_BIT, |w| {
                        w.string(ETHTOOL_A_BITSET_BIT_NAME, TX_CHECKSUM);
                        if on {
                            w.bytes_attribute(ETHTOOL_A_BITSET_BIT_VALUE, &[]);
                        }
                    });
                });
            });
        };
        let answer = |body: &[u8]| find(body, ETHTOOL_A_FEATURES_WANTED).and_then(feature);
        // The kernel accepts a wish for a feature that the device can't change. Its answer then lists what it
        // did not do.
        match self.features(ETHTOOL_MSG_FEATURES_SET, index, wanted, answer)? {
            Bit::Unlisted => Ok(()),
            Bit::On | Bit::Off => {
                let state = if on { "off" } else { "on" };
                let words = format!(
                    "{TX_CHECKSUM} of the device with index {index} stays {state}: its driver doesn't let it be \
                     changed (ethtool -k shows [fixed]), so leave the setting at its default"
                );
                Err(io::Error::new(io::ErrorKind::Unsupported, words))
            }
        }
    }

    /// One message about the features of a device, in which `body` follows the header.
    fn features<T>(
        &mut self,
        command: u8,
        index: u32,
        body: impl FnOnce(&mut Writer),
        answer: impl FnOnce(&[u8]) -> Option<T>,
    ) -> io::Result<T> {
        // Without flags: feature bits come with their names, whose numbers differ between kernels, and a
        // change is answered with what became of it.
        let request = |w: &mut Writer| {
            w.nest(ETHTOOL_A_FEATURES_HEADER, |w| {
                w.bytes_attribute(ETHTOOL_A_HEADER_DEV_INDEX, &index.to_ne_bytes());
            });
            body(w);
        };
        let family = match &mut self.family {
            Some(family) => family,
            none => none.insert(GenericFamily::open(ETHTOOL_FAMILY)?),
        };
        family.ask(command, request, answer)
    }
}

/// What a bitset with names says about the feature; `None` when it has no names.
fn feature(bitset: &[u8]) -> Option<Bit> {
    let bits = find(bitset, ETHTOOL_A_BITSET_BITS)?;
    // Without a mask only the bits that are set are listed; with one, those that it covers.
    let all_set = find(bitset, ETHTOOL_A_BITSET_NOMASK).is_some();
    let ours = attributes(bits).find(|(kind, bit)| {
        *kind == ETHTOOL_A_BITSET_BITS_BIT
            && find_string(bit, ETHTOOL_A_BITSET_BIT_NAME).is_some_and(|name| name == TX_CHECKSUM)
    });
    Some(match ours {
        None => Bit::Unlisted,
        Some((_, bit)) if all_set || find(bit, ETHTOOL_A_BITSET_BIT_VALUE).is_some() => Bit::On,
        Some(_) => Bit::Off,
    })
}
