//! Registers as the kernel numbers them, and steps that say no more than is read of them.

use super::expr::Reg;
use crate::netlink::wire::{attributes, find_u32};

/// Registers below this number in messages are 128 bits long.
const FIRST_SHORT_REGISTER: u32 = 8;

/// `None` if there are other attributes than these.
pub(super) fn only(b: &[u8], kinds: &[u16]) -> Option<()> {
    attributes(b).all(|(kind, _)| kinds.contains(&kind)).then_some(())
}

pub(super) fn reg(b: &[u8], kind: u16) -> Option<Reg> {
    find_u32(b, kind).and_then(from_register)
}

pub(super) fn register(reg: Reg) -> u32 {
    FIRST_SHORT_REGISTER + u32::from(reg.0)
}

/// The kernel names a register of 128 bits, 1 to 4, where one begins.
pub(super) fn from_register(number: u32) -> Option<Reg> {
    let index = match number {
        1..=4 => (number - 1) * 4,
        8..=23 => number - FIRST_SHORT_REGISTER,
        _ => return None,
    };
    Some(Reg(index as u8))
}
