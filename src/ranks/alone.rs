//! The coordinator of a job of one rank.

use super::{Coordinator, Hello, Member, Round, Session, checked_length, told};
use crate::error::Result;
use std::ops::ControlFlow;
use std::time::Instant;

/// The coordinator of a job of one rank. It sends no message and never waits.
///
/// ```
/// use ashore::ranks::{Alone, Coordinator};
/// assert_eq!(Alone.member().world, 1);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Alone;

impl Coordinator for Alone {
    fn member(&self) -> Member {
        Member::ALONE
    }

    fn meet(
        &self,
        hello: &Hello,
        open: &mut dyn FnMut(&[Hello]) -> Result<Session>,
        _deadline: Instant,
    ) -> Result<Session> {
        open(std::slice::from_ref(hello))
    }

    fn gather(
        &self,
        _round: Round,
        message: &[u8],
        each: &mut dyn FnMut(u32, &[u8]) -> ControlFlow<()>,
        _deadline: Instant,
    ) -> Result<()> {
        checked_length(message)?;
        let _ = each(0, message);
        Ok(())
    }

    fn tell(&self, _round: Round, message: Option<&[u8]>, _deadline: Instant) -> Result<Vec<u8>> {
        Ok(told(self.member(), message)?.unwrap_or_default().to_vec())
    }

    fn missing(&self, _round: Round) -> Vec<u32> {
        Vec::new()
    }

    fn leave(&self) {}
}
