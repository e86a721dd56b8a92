//! Memory given back to the system: an agent of a large cluster needs much of it once, at its start.

#![expect(unsafe_code, reason = "the settings of the C library's allocator have no safe interface")]

/// Keeps all threads to one heap, so that what one of them frees another one uses, and large buffers out of
/// it: they come from the system and go back to it at once. Left alone, the allocator takes them from the
/// heap as soon as one of their size has been freed, and small things that live long settle between them.
pub fn prepare() {
    // SAFETY: mallopt only sets numbers of the allocator, which takes a lock for it; it is called before
    // there is any other thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// From how many bytes on a buffer is large.
const LARGE: i32 = 64 * 1024;

/// Gives back what is free, which the allocator would keep for later.
pub fn give_back() {
    // SAFETY: malloc_trim takes the allocator's locks and touches only free memory.
    unsafe {
        libc::malloc_trim(0);
    }
}
