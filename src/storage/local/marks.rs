//! The marks of steps: one small file beside the steps, replaced by a rename.

use super::dir::Dir;
use super::direct::{self, Bypass};
use super::sys::{Kind, Open, Rename, uninterrupted};
use super::{durable, names, transfer};
use crate::error::{Error, Result};

/// The maximum length of the marks in bytes, enough for about 100,000 steps.
const MOST: u64 = 16 << 20;

/// Reads the marks in `root`; None if there are none.
pub(super) fn read(root: &Dir) -> Result<Option<Vec<u8>>> {
    let failed = |error| root.error("cannot read the marks of steps", names::MARKS)(error);
    let fd = match root.open(names::MARKS, Open::Read { direct: false }) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let stat = uninterrupted(|| fd.sys().stat(fd.raw())).map_err(failed)?;
    if stat.kind != Kind::File || stat.len > MOST {
        let what = format!("not a file of marks, or too long bytes={} most={MOST}", stat.len);
        return Err(Error::corrupt(what).with_path(root.path().join(names::MARKS)));
    }
    let mut bytes = vec![0; stat.len as usize];
    let read = transfer::read_full(&fd, &Bypass::off(), &mut bytes, 0).map_err(failed)?;
    bytes.truncate(read);
    Ok(Some(bytes))
}

/// Replaces the marks in `root`, which was opened for this call.
pub(super) fn write(root: &Dir, marks: &[u8]) -> Result<()> {
    let failed = |error| root.error("cannot write the marks of steps", names::MARKS)(error);
    root.unlink(names::MARKS_NEW, Kind::File).map_err(failed)?;
    let (fd, bypass) = direct::create(root, names::MARKS_NEW, false).map_err(failed)?;
    transfer::write_all(&fd, &bypass, marks, 0).map_err(failed)?;
    durable::file(&fd).map_err(failed)?;
    root.rename(names::MARKS_NEW, names::MARKS, Rename::Plain).map_err(failed)?;
    durable::marked(root).map_err(failed)
}
