//! The steps of rules that keep something for later packets, as attributes in both directions.

use super::expr::{Expr, Reg};
use super::registers::{only, reg, register};
use super::uapi::*;
use crate::netlink::wire::{Writer, find_string, find_u32};

pub(super) fn write(w: &mut Writer, expr: &Expr) {
    match expr {
        Expr::Count { modulus, to } => {
            w.u32(NFTA_NG_DREG, register(*to));
            w.u32(NFTA_NG_MODULUS, *modulus);
            w.u32(NFTA_NG_TYPE, NFT_NG_INCREMENTAL);
        }
        Expr::Remember { set, from } => {
            w.string(NFTA_DYNSET_SET_NAME, set);
            w.u32(NFTA_DYNSET_OP, NFT_DYNSET_OP_ADD);
            w.u32(NFTA_DYNSET_SREG_KEY, register(*from));
        }
        Expr::Quota { name } => {
            w.u32(NFTA_OBJREF_IMM_TYPE, NFT_OBJECT_QUOTA);
            w.string(NFTA_OBJREF_IMM_NAME, name);
        }
        _ => {}
    }
}

/// `None` if it says more than [`Expr`] can hold.
pub(super) fn read(name: &str, b: &[u8]) -> Option<Expr> {
    match name {
        "numgen" => {
            only(b, &[NFTA_NG_DREG, NFTA_NG_MODULUS, NFTA_NG_TYPE, NFTA_NG_OFFSET])?;
            let plain = find_u32(b, NFTA_NG_TYPE)? == NFT_NG_INCREMENTAL
                && find_u32(b, NFTA_NG_OFFSET).unwrap_or(0) == 0;
            let to: Reg = reg(b, NFTA_NG_DREG)?;
            plain.then_some(Expr::Count { modulus: find_u32(b, NFTA_NG_MODULUS)?, to })
        }
        "dynset" => {
            only(b, &[NFTA_DYNSET_SET_NAME, NFTA_DYNSET_OP, NFTA_DYNSET_SREG_KEY])?;
            let add = find_u32(b, NFTA_DYNSET_OP)? == NFT_DYNSET_OP_ADD;
            let from = reg(b, NFTA_DYNSET_SREG_KEY)?;
            Some(Expr::Remember { set: find_string(b, NFTA_DYNSET_SET_NAME).filter(|_| add)?, from })
        }
        "objref" => {
            only(b, &[NFTA_OBJREF_IMM_TYPE, NFTA_OBJREF_IMM_NAME])?;
            let quota = find_u32(b, NFTA_OBJREF_IMM_TYPE)? == NFT_OBJECT_QUOTA;
            Some(Expr::Quota { name: find_string(b, NFTA_OBJREF_IMM_NAME).filter(|_| quota)? })
        }
        _ => None,
    }
}
