//! Retries: another attempt at a save that failed for a transient reason.
//!
//! **Protocol.** The committer begins the new attempt when nothing is left of the previous one: every chunk
//! was returned, and the previous attempt was abandoned. The new attempt has the same ticket, so the handle,
//! the deadline and the position among other saves stay the same.
//! **Cancellation.** A save that was cancelled or given up is not retried: the ticket decides that under one
//! lock.

use crate::completion::deadline_after;
use crate::error::{Error, Result};
use crate::guard::{dropped, guarded};
use crate::id::Attempt;
use crate::plan::{DeferredDigests, Request};
use crate::staging::{Captured, Job, Stager};
use crate::state::StateDict;
use crate::writer::{RetryState, Task};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Keeps a second copy of the sources of `state`, if the options allow a retry.
///
/// # Errors
/// `Invalid` if the state could change before the next attempt.
pub(super) fn keep(
    state: &mut StateDict<'static>,
    left: u32,
    backoff: Duration,
    borrowed: bool,
) -> Result<Option<RetryState>> {
    if left == 0 {
        return Ok(None);
    }
    if borrowed {
        return Err(Error::invalid("what is borrowed for a scope cannot be kept for another attempt"));
    }
    state.settled()?;
    let (now, later) = split(std::mem::take(state))?;
    *state = now;
    Ok(Some(RetryState { state: later, left, backoff }))
}

fn split(state: StateDict<'static>) -> Result<(StateDict<'static>, StateDict<'static>)> {
    guarded("a source panicked while it was read", || state.split())
}

/// Retries the save of `task`, which failed with `why`. Returns false if the save ends with that error.
pub(super) fn try_again(task: &Task, stager: &Stager, why: &Error) -> bool {
    let Request { ticket, plan, name, parent, brought, overwrite, session, .. } = &task.request;
    let Some(mut kept) = task.take_kept() else { return false };
    let (left, backoff, not_before) = (kept.left, kept.backoff, deadline_after(kept.backoff));
    if left == 0 || !why.is_transient() || not_before >= ticket.deadline {
        return false;
    }
    let Ok((mut state, later)) = split(std::mem::take(&mut kept.state)) else { return false };
    let kept = RetryState { state: later, left: left - 1, backoff: backoff.saturating_mul(2) };
    if !ticket.try_again(Attempt::new()) {
        dropped(state);
        return false;
    }
    tracing::warn!(step = ticket.step, error = format_args!("{why:#}"), left, ?backoff, "the save is tried again");
    let request = Request {
        ticket: ticket.clone(),
        plan: plan.clone(),
        name: name.clone(),
        parent: parent.clone(),
        brought: brought.clone(),
        overwrite: *overwrite,
        session: *session,
        values: state.take_values(),
        rank_values: BTreeMap::new(),
        metadata: std::mem::take(&mut state.metadata),
        // No thread can write the kept state, so no digests are compared.
        expected: Vec::new(),
        replicas: None,
        device_digests: DeferredDigests(Box::new(|| Ok(Vec::new()))),
    };
    let left_over = stager.push_again(Job {
        ticket: ticket.clone(),
        plan: plan.clone(),
        state,
        captured: Captured::default(),
        behind: None,
        late_copy: None,
        allocation: None,
        queued: Vec::new(),
        prediction: None,
        borrowed: false,
        not_before: Some(not_before),
        sink: Arc::new(task.again(request, kept)),
    });
    let Some(job) = left_over else { return true };
    dropped(job.state);
    // The ticket is marked as failed again, and nothing reads its sources.
    ticket.fail(why.clone());
    ticket.release();
    false
}
