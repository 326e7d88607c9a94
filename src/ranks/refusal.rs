//! The errors that refuse processes as ranks of one job. The texts name both processes.

use super::Hello;
use crate::error::{Error, Result};

/// The text that says where a process runs.
pub(super) fn place(hello: &Hello) -> String {
    format!("host={} pid={}", hello.host, hello.pid)
}

pub(super) fn same_process(one: &Hello, other: &Hello) -> bool {
    (&one.host, one.pid) == (&other.host, other.pid)
}

/// Refuses ranks that were started as different jobs.
pub(super) fn same_job(ours: &Hello, theirs: &Hello) -> Result<()> {
    let (a, b) = (ours.member, theirs.member);
    let what = if ours.token != theirs.token {
        format!("two processes have different run tokens tokens={:?},{:?}", ours.token, theirs.token)
    } else if a.world != b.world {
        format!("two processes have different numbers of ranks worlds={},{}", a.world, b.world)
    } else if b.rank >= a.world {
        format!("a process has a rank that is not below the number of ranks world={}", a.world)
    } else {
        return Ok(());
    };
    let text = format!("{what}: {} and {}", place(ours), place(theirs));
    Err(Error::invalid(text).with_ranks([a.rank, b.rank]))
}

/// The error for two processes with the same rank.
pub(super) fn twice(one: &Hello, other: &Hello) -> Error {
    let text = format!("two processes have the same rank: {} and {}", place(one), place(other));
    Error::invalid(text).with_rank(one.member.rank)
}
