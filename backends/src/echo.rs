//! ICMP and ICMPv6 echo: one raw socket for each family, requests of any size, and answers with the moment at which the
//! kernel received them.
//!
//! The message is a value (`message`), the socket takes and gives it ([`EchoSocket`]). Only the kernel of the other host
//! has to answer, so this works towards any node.

mod message;
mod socket;
mod sys;

pub use message::{MIN_PACKET, Token};
pub use socket::{Arrival, EchoSocket};
