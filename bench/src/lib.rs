//! What the measurements of this crate have in common.

pub mod figure;
