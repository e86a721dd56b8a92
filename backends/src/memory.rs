//! Memory given back to the system: an agent of a large cluster needs much of it once, at its start.

#![expect(unsafe_code, reason = "the C library's allocator and madvise have no safe interface")]

use std::fs;
use std::ops::Range;

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

/// Unmaps the pages of the program's code. After a start nearly all are mapped, for the kernel maps sixteen at a time, and
/// only some are needed later: those come from the page cache again. To be done once, because each page costs a fault.
pub fn give_back_code() {
    let Ok(maps) = fs::read_to_string("/proc/self/maps") else { return };
    if let Some(code) = code_around(&maps, give_back_code as *const () as usize) {
        // SAFETY: the pages are mapped from the program's file, and are never written, being executable and not
        // writable, and without relocations: dropped ones are read from the file again with the same content.
        unsafe {
            libc::madvise(code.start as *mut libc::c_void, code.len(), libc::MADV_DONTNEED);
        }
    }
}

/// The mapping in the format of proc_pid_maps(5) that contains this address, if it is code of a file and not writable.
fn code_around(maps: &str, address: usize) -> Option<Range<usize>> {
    maps.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (from, to) = words.next()?.split_once('-')?;
        let range = usize::from_str_radix(from, 16).ok()?..usize::from_str_radix(to, 16).ok()?;
        let (permissions, path) = (words.next()?, words.nth(3)?);
        (range.contains(&address) && permissions == "r-xp" && path.starts_with('/')).then_some(range)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d000000000-55d000128000 r--p 00000000 fe:00 42 /usr/bin/flanneld
55d000129000-55d000ac7000 r-xp 00128000 fe:00 42 /usr/bin/flanneld
55d000ac7000-55d000b25000 r--p 00ac5000 fe:00 42 /usr/bin/flanneld
55d000b25000-55d000b32000 rw-p 00b22000 fe:00 42 /usr/bin/flanneld
7fff0000d000-7fff0000f000 r-xp 00000000 00:00 0 [vdso]
7fff00010000-7fff00011000 r-xp 00000000 00:00 0
7fff00020000-7fff00021000 rwxp 00000000 fe:00 42 /usr/bin/flanneld
";

    #[test]
    fn only_code_of_a_file_that_nothing_can_have_written_is_found() {
        assert_eq!(code_around(MAPS, 0x55d0_0020_0000), Some(0x55d0_0012_9000..0x55d0_00ac_7000));
        for other in
            [0x55d0_0000_0000, 0x55d0_00b0_0000, 0x7fff_0000_d000, 0x7fff_0001_0000, 0x7fff_0002_0000, 1]
        {
            assert_eq!(code_around(MAPS, other), None, "{other:x}");
        }
        assert_eq!(code_around("nonsense\n1-2\nx-y r-xp 0 0 0 /a", 1), None);
    }

    #[test]
    fn code_runs_on_after_its_pages_went() {
        let resident = || {
            let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
            let code = code_around(
                &fs::read_to_string("/proc/self/maps").unwrap(),
                give_back_code as *const () as usize,
            );
            let head = format!("{:x}-", code.unwrap().start);
            let rest = smaps.split(&head).nth(1).unwrap();
            let line = rest.lines().find(|line| line.starts_with("Rss:")).unwrap();
            line.split_ascii_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
        };
        let before = resident();
        for _ in 0..3 {
            give_back_code();
        }
        assert!(resident() < before, "{} KiB of code of {before}", resident());
    }
}
