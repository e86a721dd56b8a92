//! Which queue of the device a packet waits in: one for all packets of a pod.
//!
//! The kernel drops what finds its queue full, whose ever it is, so with one queue a flood of one pod costs the
//! others their packets. With several it would choose by a hash of the flow, or the queue that the flow's
//! answers were written to (drivers/net/tun.c, `tun_automq_select_queue`). Then fragments and whole datagrams
//! of a flow wait in different queues, and the first answer moves a flow to another one while packets of it
//! still wait: its order is lost. So the choice is a program's (`TUNSETSTEERINGEBPF`): the source address.

#![expect(unsafe_code, reason = "bpf(2) takes pointers and has no wrapper")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Queues of a device. The addresses of a node's pods follow each other, so eight of them rarely collide.
pub(super) const QUEUES: usize = 8;

/// `_IOR('T', 224, int)` (include/uapi/linux/if_tun.h).
const TUNSETSTEERINGEBPF: libc::c_ulong = 0x8004_54e0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_TYPE_SOCKET_FILTER: u32 = 1;
/// Where the source address of a packet has its last four bytes.
const SOURCE: i32 = 12;
const SOURCE_V6: i32 = 20;

/// An instruction (include/uapi/linux/bpf.h, `struct bpf_insn`).
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The beginning of `union bpf_attr` for loading a program; the rest of it may be left out.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    version: u32,
    flags: u32,
}

/// Lets the device choose the queue by the source address; the kernel takes the rest of a division by the
/// number of queues.
///
/// # Errors
/// EPERM without `CAP_BPF`, where the kernel wants it for every program; ENOSYS or EINVAL of a kernel without
/// BPF.
pub(super) fn by_source(file: &OwnedFd) -> io::Result<()> {
    let instruction = |code, registers, immediate| Instruction { code, registers, offset: 0, immediate };
    let program = [
        // r6 = context, where the loads below look for it.
        instruction(0xbf, 0x16, 0),
        // r0 = the first byte, of which the upper half is the version.
        instruction(0x30, 0x00, 0),
        instruction(0x77, 0x00, 4),
        // Over the next two if it is 6.
        Instruction { offset: 2, ..instruction(0x15, 0x00, 6) },
        // r0 = the four bytes at SOURCE, as a number. Return it.
        instruction(0x20, 0x00, SOURCE),
        instruction(0x95, 0x00, 0),
        instruction(0x20, 0x00, SOURCE_V6),
        instruction(0x95, 0x00, 0),
    ];
    let license = c"Apache-2.0";
    let load = Load {
        kind: BPF_PROG_TYPE_SOCKET_FILTER,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        version: 0,
        flags: 0,
    };
    // SAFETY: the kernel reads `load` in the length that is given, the instructions by their number and the
    // license to its end; all of them live until the call returns.
    let loaded = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<Load>()) };
    if loaded < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call gave a new descriptor, which nothing else owns. The device keeps the program without it.
    let program = unsafe { OwnedFd::from_raw_fd(loaded as RawFd) };
    let number: libc::c_int = program.as_raw_fd();
    // SAFETY: the ioctl reads one int at the address, which lives until the call returns.
    let set = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETSTEERINGEBPF as _, &raw const number) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
