//! The kinds of system calls, and the faults that make a future call fail.

/// A system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "named after the calls")]
pub enum Call {
    Open,
    Mkdir,
    Pwrite,
    Pread,
    Fsync,
    Fallocate,
    Ftruncate,
    Rename,
    Link,
    Clone,
    Protect,
    Unlink,
    Stat,
    Touch,
    List,
    Lock,
    Direct,
}

/// A fault: a future call that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The kind of call; any kind when `None`.
    pub call: Option<Call>,
    /// How many calls of that kind succeed first.
    pub after: u64,
    /// The error code.
    pub errno: i32,
    /// Every later call of that kind fails too.
    pub sticky: bool,
    /// The call does its work and still fails. Not for an fsync, which never does its work when it fails.
    pub done: bool,
}
