//! Complete transfers: handles short reads and writes, interruptions and refused direct I/O.

use super::direct::Bypass;
use super::sys::Fd;
use std::io;

/// Writes all of `bytes` at `offset`.
pub(super) fn write_all(fd: &Fd, bypass: &Bypass, bytes: &[u8], offset: u64) -> io::Result<()> {
    let written =
        transfer(fd, bypass, bytes.len(), |done| fd.sys().pwrite(fd.raw(), &bytes[done..], offset + done as u64))?;
    if written < bytes.len() { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
}

/// Reads at `offset` until `buffer` is full or the file ends. Returns the number of bytes.
pub(super) fn read_full(fd: &Fd, bypass: &Bypass, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    transfer(fd, bypass, buffer.len(), |done| fd.sys().pread(fd.raw(), &mut buffer[done..], offset + done as u64))
}

fn transfer(
    fd: &Fd,
    bypass: &Bypass,
    len: usize,
    mut part: impl FnMut(usize) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut done = 0;
    while done < len {
        let was_direct = bypass.is_on();
        match part(done) {
            Ok(0) => break,
            Ok(more) => done += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The medium has no direct I/O after all, or a short transfer ended at an unaligned offset.
            Err(error) if was_direct && error.raw_os_error() == Some(libc::EINVAL) => bypass.turn_off(fd)?,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
