//! Backtraces, which a shipped program can't make.

#![expect(unsafe_code, reason = "the environment has no safe interface for changes")]

/// Switches backtraces off in a release build: it is linked without the tables that they are made from, and trying to make one
/// ends the process. `RUST_BACKTRACE` in the environment would turn each error into a crash.
///
/// To be called before there is any other thread.
pub fn prepare() {
    if cfg!(debug_assertions) {
        return;
    }
    for variable in ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"] {
        // SAFETY: main calls this first, when no other thread can be reading the environment.
        unsafe { std::env::remove_var(variable) };
    }
}
