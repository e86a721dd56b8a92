//! The agent's loop over fakes.
