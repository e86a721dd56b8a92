//! Network policies for tests: what is right by an evaluator that is slow and obvious, what the tables in nftables
//! do by an interpreter, random clusters, and a table of cases.

mod cases;
mod evaluate;
mod interpret;
mod random;

pub use cases::{Case, Cases, Cell, Step, in_family, net_in_family, settings};
pub use evaluate::{Packet, World};
pub use interpret::{Connection, Interpreter, Outcome, apply};
pub use random::Random;
