//! The program's own group of ranks.
//!
//! # Safety argument
//! The safety argument of the crate applies: one thread calls the program's function, as the header says.
#![expect(unsafe_code, reason = "calls the program's function; argument above")]

use crate::callbacks::{self, Context, Gather, Released};
use crate::failure::{Failed, Result};
use crate::given;
use ashore_core::ranks::{Callback, Coordinator, Member};
use ashore_core::{Builder, Error, ErrorKind};
use std::ffi::{c_char, c_void};
use std::sync::Arc;
use std::time::Instant;

/// The program's own group of ranks. Every rank opens an executor over the same root and begins the same
/// saves in the same order; rank 0 decides, and its values and metadata are kept.
///
/// A process that shall save alone, although a launcher has started it as one of several, sets `world` to 1
/// and leaves `all_gather` null.
#[repr(C)]
pub struct ashore_ranks {
    /// The rank of this process, from 0.
    pub rank: u32,
    /// The number of ranks.
    pub world: u32,
    /// The number of this process among the ranks of its host, which chooses its GPU.
    pub local_rank: u32,
    /// Puts `bytes` bytes from each rank, in the order of ranks, into `all`. `bytes` is the same on all
    /// ranks. Returns 0; 1 if `seconds` passed first; or 2 for another failure, after which the group is not
    /// used until the ranks open their executors again. One thread of the library makes these calls, one at a
    /// time, in the same order on each rank.
    pub all_gather: Option<
        unsafe extern "C-unwind" fn(
            context: *mut c_void,
            mine: *const c_void,
            bytes: usize,
            all: *mut c_void,
            seconds: f64,
        ) -> i32,
    >,
    /// Called once when `all_gather` will not be called any more, also after a failure of `ashore_open`. May
    /// be null.
    pub release: Option<unsafe extern "C-unwind" fn(context: *mut c_void)>,
    /// Passed to both functions.
    pub context: *mut c_void,
    /// The identity of the run, the same on all its ranks, which keeps the ranks of two jobs apart. Null: the
    /// identity that the launcher gives, if it gives one.
    pub run: *const c_char,
}

/// The longest length that is accepted as the length of a message. Messages are below 4.2 KiB.
const LONGEST: u32 = 1 << 16;

struct Group {
    function: Gather,
    context: Context,
    world: usize,
    _released: Option<Released>,
}

impl ashore_ranks {
    /// Returns the callback, which is called once, when the returned object is dropped.
    pub fn released(&self) -> Option<Released> {
        self.release.map(|release| Released(release, Context(self.context)))
    }

    /// Sets the builder's ranks.
    ///
    /// # Safety
    /// The safety argument of the crate applies.
    pub unsafe fn of(&self, builder: Builder, released: Option<Released>) -> Result<Builder> {
        let Self { rank, world, local_rank, all_gather, context, run, .. } = *self;
        let member = Member { rank, world, local_rank };
        let Some(function) = all_gather else {
            return if world == 1 && rank == 0 {
                Ok(builder.alone())
            } else {
                Err(Failed::invalid(format!("several ranks need `all_gather` rank={rank} world={world}")))
            };
        };
        let group = Group { function, context: Context(context), world: world as usize, _released: released };
        let all_gather = move |message: &[u8], deadline| group.messages(message, deadline);
        let coordinator: Arc<dyn Coordinator> = Arc::new(Callback::new(member, all_gather)?);
        let builder = builder.ranks(coordinator);
        if run.is_null() {
            return Ok(builder);
        }
        // SAFETY: the caller guarantees this.
        Ok(builder.run(unsafe { given::text("run", run)? }))
    }
}

impl Group {
    /// Returns the messages of all ranks. Messages have different lengths, but the program's function needs
    /// one length. So the ranks first exchange their lengths, and then each sends as many bytes as the
    /// longest message has.
    fn messages(&self, message: &[u8], deadline: Instant) -> ashore_core::Result<Vec<Vec<u8>>> {
        let mine = u32::try_from(message.len()).unwrap_or(u32::MAX).to_le_bytes();
        let lengths: Vec<usize> = self
            .gather(&mine, deadline)?
            .chunks_exact(mine.len())
            .map(|length| u32::from_le_bytes(length.try_into().unwrap_or_default()) as usize)
            .collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if longest > LONGEST as usize || lengths.len() != self.world {
            let why = "the ranks are not in step: the all-gather returned something else than lengths";
            return Err(Error::new(ErrorKind::Unavailable, format!("{why} longest={longest}")));
        }
        let mut padded = message.to_vec();
        padded.resize(longest.max(1), 0);
        let all = self.gather(&padded, deadline)?;
        let each = all.chunks_exact(padded.len()).zip(&lengths);
        Ok(each.map(|(message, &length)| message[..length].to_vec()).collect())
    }

    fn gather(&self, mine: &[u8], deadline: Instant) -> ashore_core::Result<Vec<u8>> {
        let seconds = deadline.saturating_duration_since(Instant::now()).as_secs_f64();
        let mut all = vec![0_u8; mine.len() * self.world];
        let (from, to) = (mine.as_ptr().cast(), all.as_mut_ptr().cast());
        // SAFETY: the program's function and context; there is space for the bytes of each rank.
        let code = unsafe { callbacks::gather(self.function, self.context.0, from, mine.len(), to, seconds) };
        match code {
            0 => Ok(all),
            1 => Err(Error::new(ErrorKind::Deadline, "the all-gather of the program did not end in time")),
            code => {
                Err(Error::new(ErrorKind::Unavailable, format!("the all-gather of the program failed code={code}")))
            }
        }
    }
}
