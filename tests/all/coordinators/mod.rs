//! Coordinators of several ranks, which are threads here. `checks/ranks/` runs processes.

mod callback;
mod conformance;
mod directory;

use ashore::ranks::{Hello, Member, Session};
use std::time::{Duration, Instant};
use uuid::Uuid;

pub fn hello(member: Member, token: &str) -> Hello {
    Hello { member, nonce: Uuid::new_v4(), token: token.into(), host: format!("host-{}", member.rank), pid: 1 }
}

pub fn member(rank: u32, world: u32) -> Member {
    Member { rank, world, local_rank: rank }
}

pub fn session() -> Session {
    Session { id: Uuid::new_v4(), generation: 1 }
}

pub fn within(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}
