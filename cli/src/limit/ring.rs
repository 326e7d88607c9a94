//! The io_uring loop: one thread, `depth` transfers in flight, from registered memory if the kernel allows
//! it.
//!
//! # Safety argument
//! The kernel uses a part of the memory from the submission of a transfer to its completion. [`transfer`] has
//! the only reference to the parts, reuses each only after its completion, and returns when nothing is in
//! flight; if it cannot know that, it aborts the program.
#![expect(unsafe_code, reason = "submissions to the kernel's queue; argument above")]

use super::Direction;
use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Transfers all of the file. A short transfer is an error: it does not occur on disks that are worth
/// measuring.
pub fn transfer(file: &File, total: u64, way: Direction, chunk: u64, parts: Vec<&mut [u8]>) -> io::Result<()> {
    let mut ring = IoUring::new(parts.len().next_power_of_two() as u32)?;
    let vectors: Vec<_> = parts
        .iter()
        .map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() })
        .collect();
    // SAFETY: the parts outlive the ring, which is dropped at the end of this function.
    let known = unsafe { ring.submitter().register_buffers(&vectors) }.is_ok();
    let fd = types::Fd(file.as_raw_fd());
    let (mut at, mut in_flight, mut failed) = (0, 0, None);
    let mut free: Vec<usize> = (0..parts.len()).collect();
    let mut expected = vec![0; parts.len()];
    loop {
        while at < total && failed.is_none() {
            let Some(part) = free.pop() else { break };
            let len = (total - at).min(chunk) as u32;
            let (memory, index) = (vectors[part].iov_base.cast::<u8>(), part as u16);
            let entry = match (way, known) {
                (Direction::Write, true) => opcode::WriteFixed::new(fd, memory, len, index).offset(at).build(),
                (Direction::Write, false) => opcode::Write::new(fd, memory, len).offset(at).build(),
                (Direction::Read, true) => opcode::ReadFixed::new(fd, memory, len, index).offset(at).build(),
                (Direction::Read, false) => opcode::Read::new(fd, memory, len).offset(at).build(),
            };
            // SAFETY: the part is free, and not accessed before its completion.
            if unsafe { ring.submission().push(&entry.user_data(part as u64)) }.is_err() {
                free.push(part);
                break;
            }
            expected[part] = len as i32;
            at += u64::from(len);
            in_flight += 1;
        }
        if in_flight == 0 {
            return failed.map_or(Ok(()), Err);
        }
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(Errno::INTR.raw_os_error()) => {}
            Err(_) => std::process::abort(),
        }
        for done in ring.completion() {
            let part = done.user_data() as usize;
            if done.result() != expected[part] {
                let error = match done.result() {
                    error @ ..0 => io::Error::from_raw_os_error(-error),
                    _ => io::ErrorKind::UnexpectedEof.into(),
                };
                failed.get_or_insert(error);
            }
            free.push(part);
            in_flight -= 1;
        }
    }
}
