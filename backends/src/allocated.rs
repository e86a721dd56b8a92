//! What a test allocates: memory that is taken for a moment stays with the process, so that a change of one peer must take nothing
//! for each of the others.

#![expect(unsafe_code, reason = "the interface of a global allocator is unsafe")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static BYTES: Cell<usize> = const { Cell::new(0) };
}

/// How many bytes this thread asks for meanwhile, whether it gives them back or not.
pub(crate) fn bytes_of<R>(act: impl FnOnce() -> R) -> (usize, R) {
    let before = BYTES.get();
    let result = act();
    (BYTES.get() - before, result)
}

fn count(bytes: usize) {
    // A thread that ends has no counter any more.
    let _ = BYTES.try_with(|sum| sum.set(sum.get() + bytes));
}

// SAFETY: each call is handed on to the system's allocator unchanged. Counting allocates nothing: the counter is initialised at compile
// time and has no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the conditions.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller keeps the conditions.
        unsafe { System.realloc(place, layout, size) }
    }
}
