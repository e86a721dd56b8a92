//! Memory of a process that lives for a millisecond or two: a bump allocator in front of the C library's.
//!
//! An ADD asks for memory about two thousand times, for some hundred bytes each. Here that is a few instructions, and no page is mapped, given back and
//! mapped again, each of which costs as much as a file that is opened. What comes back is given out again for the same size, since
//! each further page costs a fault. What does not fit any more comes from the C library: a call that goes on for long, such as GC of a
//! large node, needs no more memory than it would need without this.

#![expect(unsafe_code, reason = "an allocator is unsafe by its interface")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

/// The size of the piece. It takes memory only where it was used.
const SIZE: usize = 512 << 10;

/// The allocator of the program.
pub(crate) struct Bump;

#[repr(align(4096))]
struct Piece(UnsafeCell<[MaybeUninit<u8>; SIZE]>);

// SAFETY: only the thread that has claimed the piece gives parts of it out, each of them once at a time.
unsafe impl Sync for Piece {}

static PIECE: Piece = Piece(UnsafeCell::new([MaybeUninit::uninit(); SIZE]));
static CLAIMED: AtomicBool = AtomicBool::new(false);

/// Sizes are multiples of this, and at least it.
const GRAIN: usize = 32;
/// So many sizes have a list of memory that came back.
const LISTS: usize = 32;
/// The end of a list.
const NOTHING: usize = usize::MAX;

thread_local! {
    /// For each size the place in the piece of what came back last; there is the place of what came back before it.
    static FREE: [Cell<usize>; LISTS] = const { [const { Cell::new(NOTHING) }; LISTS] };
    /// How much of the piece this thread has given out. `NOT_MINE` in all threads but the one that has claimed it.
    static USED: Cell<usize> = const { Cell::new(NOT_MINE) };
}

/// More than any piece has, so that nothing fits behind it and nothing ends there.
const NOT_MINE: usize = usize::MAX;

/// Has this thread use the piece, unless another one does.
pub(crate) fn claim() {
    if !CLAIMED.swap(true, Ordering::Relaxed) {
        USED.set(0);
    }
}

fn rounded(size: usize) -> usize {
    size.saturating_add(GRAIN - 1) / GRAIN * GRAIN
}

/// The number of the list for such memory, if it has one.
fn list(layout: Layout) -> Option<usize> {
    (layout.size() <= LISTS * GRAIN && layout.align() <= GRAIN).then(|| rounded(layout.size()) / GRAIN - 1)
}

/// Where memory begins and ends if `used` bytes are given out; `None` if it does not fit.
fn place(used: usize, layout: Layout) -> Option<(usize, usize)> {
    let start = used.checked_next_multiple_of(layout.align())?;
    let end = start.checked_add(rounded(layout.size()))?;
    (end <= SIZE && layout.align() <= align_of::<Piece>()).then_some((start, end))
}

/// The place of memory in the piece; `None` for what is from the C library.
fn offset(pointer: *mut u8) -> Option<usize> {
    pointer.addr().checked_sub(PIECE.0.get().addr()).filter(|offset| *offset < SIZE)
}

/// The pointer to a place in the piece.
fn pointer(offset: usize) -> *mut u8 {
    PIECE.0.get().cast::<u8>().wrapping_add(offset)
}

/// What came back and fits.
fn again(layout: Layout) -> Option<*mut u8> {
    let list = list(layout)?;
    FREE.with(|free| {
        let found = Some(free[list].get()).filter(|offset| *offset != NOTHING)?;
        // SAFETY: what is in a list is a part of the piece that is not given out, and begins with a place that `keep` wrote.
        free[list].set(unsafe { pointer(found).cast::<usize>().read() });
        Some(pointer(found))
    })
}

/// Takes a part of the piece back.
fn keep(start: usize, layout: Layout) {
    let used = USED.get();
    if start + rounded(layout.size()) == used {
        USED.set(start);
    } else if let Some(list) = list(layout).filter(|_| used != NOT_MINE) {
        FREE.with(|free| {
            // SAFETY: the part is not given out any more, has room for a number, and is aligned by GRAIN as all sizes are its multiples.
            unsafe { pointer(start).cast::<usize>().write(free[list].get()) };
            free[list].set(start);
        });
    }
}

// SAFETY: memory is either the C library's, and goes back to it, or a part of the piece that is aligned, lies in it, and is either
// behind all parts that are given out or came back. `USED` is reduced only to the start of the last part, when that comes back. Only the
// thread that has claimed the piece has lists.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if let Some(again) = again(layout) {
            return again;
        }
        let Some((start, end)) = place(USED.get(), layout) else {
            // SAFETY: the caller's.
            return unsafe { System.alloc(layout) };
        };
        USED.set(end);
        pointer(start)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        match offset(pointer) {
            // SAFETY: the caller's; it is not of the piece, so that the C library has given it.
            None => unsafe { System.dealloc(pointer, layout) },
            Some(start) => keep(start, layout),
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Some(start) = offset(pointer) else {
            // SAFETY: as in dealloc.
            return unsafe { System.realloc(pointer, layout, size) };
        };
        let (old, new) = (rounded(layout.size()), rounded(size));
        if old == new {
            return pointer;
        }
        if start + old == USED.get() && new <= SIZE - start {
            USED.set(start + new);
            return pointer;
        }
        // SAFETY: the caller's, whose size is not too large for the alignment. Both parts are as long as what is copied, and the new one
        // does not overlap the old one, which is still given out.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !new.is_null() {
                new.copy_from_nonoverlapping(pointer, layout.size().min(size));
                self.dealloc(pointer, layout);
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Memory, and the byte that it is full of.
    struct Part {
        pointer: *mut u8,
        layout: Layout,
        byte: u8,
    }

    impl Part {
        fn new(layout: Layout, byte: u8) -> Self {
            // SAFETY: the size is not 0.
            let pointer = unsafe { Bump.alloc(layout) };
            assert!(!pointer.is_null() && pointer.addr().is_multiple_of(layout.align()));
            let part = Self { pointer, layout, byte };
            part.fill(0);
            part
        }

        fn fill(&self, from: usize) {
            // SAFETY: the memory is this long.
            unsafe { self.pointer.add(from).write_bytes(self.byte, self.layout.size() - from) };
        }

        fn is_intact(&self) -> bool {
            // SAFETY: the memory is this long, and was filled.
            let bytes = unsafe { std::slice::from_raw_parts(self.pointer, self.layout.size()) };
            bytes.iter().all(|byte| *byte == self.byte)
        }

        fn resize(&mut self, size: usize) {
            let old = self.layout.size();
            // SAFETY: the memory is of this allocator and has this layout; the size is neither 0 nor large.
            self.pointer = unsafe { Bump.realloc(self.pointer, self.layout, size) };
            self.layout = Layout::from_size_align(size, self.layout.align()).unwrap();
            self.fill(old.min(size));
        }

        fn free(self) {
            // SAFETY: as above, and nothing uses it any more.
            unsafe { Bump.dealloc(self.pointer, self.layout) };
        }
    }

    #[test]
    fn memory_keeps_its_content_in_the_piece_and_behind_it() {
        claim();
        let first = Part::new(Layout::new::<u64>(), 1);
        assert_eq!(offset(first.pointer), Some(0));
        first.free();
        let size = prop_oneof![1usize..200, 1usize..60_000];
        let step = (any::<usize>(), size, 0u32..13);
        proptest!(|(steps in proptest::collection::vec(step, 1..80))| {
            let mut parts = Vec::<Part>::new();
            for (number, (which, size, align)) in steps.into_iter().enumerate() {
                match (which % 4, parts.len()) {
                    (0, count @ 1..) => parts.swap_remove(which % count).free(),
                    (1, count @ 1..) => parts[which % count].resize(size),
                    _ => parts.push(Part::new(Layout::from_size_align(size, 1 << align).unwrap(), number as u8)),
                }
                prop_assert!(parts.iter().all(Part::is_intact));
            }
            // The last one first, so that the piece is empty again for the next case.
            parts.sort_by_key(|part| part.pointer);
            parts.into_iter().rev().for_each(Part::free);
        });
    }

    #[test]
    fn what_does_not_fit_is_not_of_the_piece() {
        let layout = |size, align| Layout::from_size_align(size, align).unwrap();
        assert_eq!(place(0, layout(SIZE, 8)), Some((0, SIZE)));
        assert_eq!(place(32, layout(16, 64)), Some((64, 96)));
        assert_eq!(place(0, layout(33, 1)), Some((0, 64)));
        for (used, size, align) in
            [(32, SIZE, 1), (SIZE, 1, 1), (0, 16, 8192), (NOT_MINE, 1, 1), (NOT_MINE, 1, 4096)]
        {
            assert_eq!(place(used, layout(size, align)), None, "{used} {size} {align}");
        }
    }
}
