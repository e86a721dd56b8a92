//! Memory given back to the system: an agent of a large cluster needs much of it once, at its start.

#![expect(unsafe_code, reason = "the settings of the C library's allocator have no safe interface")]

/// Keeps all threads to one heap, so that what one of them frees another one uses.
pub fn prepare() {
    // SAFETY: mallopt only sets a number of the allocator, which takes a lock for it; it is called before
    // there is any other thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives back what is free, which the allocator would keep for later.
pub fn give_back() {
    // SAFETY: malloc_trim takes the allocator's locks and touches only memory that nobody has.
    unsafe {
        libc::malloc_trim(0);
    }
}
