//! For tests, demo and bench.
