//! Changes the root object, and determines the outcome of each change.
//!
//! **Protocol.** A change is one put, on the condition that the root still is the version from which the
//! change was made. An `Ok` decides the outcome. No other answer does: a store may refuse a condition because
//! our own request had arrived before, or say 409 without an object, or not answer at all. Then this module
//! reads the root and [`judge`]s it. If the root has our change, the change *landed*. If another change came
//! first, ours is *lost*: the version that it named never exists again, so no late request can land. If the
//! root remembers too few changes to tell these cases apart, its content shows whether the change was made.
//! If nothing changed, the same request is sent again: the same content under the same condition lands at
//! most once. **Deadline.** At the deadline an unchanged root is *bumped*: a change of its counter alone.
//! Then our request is lost for certain. Only if the root cannot be read or bumped, the outcome is unknown,
//! which is `Indeterminate`.

use super::client::{Answered, Client, Condition, Fetched};
use super::state::{MAX_LENGTH, State};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::sync::{Mutex, lock};
use bytes::Bytes;
use object_store::UpdateVersion;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The key of the root object.
pub(super) const ROOT: &str = "ashore.json";

/// How long after its deadline the outcome of a change may still be determined.
const GRACE: Duration = Duration::from_secs(30);

/// How often a root object that cannot be parsed is read again, because its bytes may have been damaged in
/// transit.
const READS: usize = 3;

/// The pause before a request is sent again, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The root object of a client's prefix.
#[derive(Debug)]
pub(super) struct Root {
    client: Client,
    /// The root that this process last put or read, so that a change needs no read before it. The lock is
    /// held during a change, so that the changes of one process do not overlap.
    known: Mutex<Option<Seen>>,
    /// The root that was read last. If it has not changed since, the store says so instead of sending it.
    read: Mutex<Option<Seen>>,
}

/// The root object as it was seen.
#[derive(Clone, Debug)]
struct Seen {
    state: State,
    version: UpdateVersion,
}

/// The state of the root that a change requests.
#[expect(clippy::large_enum_variant, reason = "one is made for each change, and moved")]
pub(super) enum Edit {
    To(State),
    /// There is nothing to change.
    Nothing,
}

/// A change that was sent, and whose outcome is not known.
struct Sent {
    /// The state from which the change was made. None if there was no root object.
    from: Option<State>,
    to: State,
    bytes: Bytes,
    condition: Condition,
}

/// The outcome of a change that was sent.
#[derive(Debug, PartialEq, Eq)]
enum Judged {
    Landed,
    /// The change will never land any more. With `known` it has never landed. Without, it may have landed and
    /// been replaced since.
    Lost {
        known: bool,
    },
    /// The change did not land, and still may.
    Unchanged,
}

/// Judges a change with the nonce `nonce`, made from `from`, by the present state `now`.
fn judge(nonce: Uuid, from: Option<&State>, now: Option<&State>) -> Judged {
    let Some(now) = now else {
        return if from.is_none() { Judged::Unchanged } else { Judged::Lost { known: false } };
    };
    if now.recent.contains(&nonce) {
        return Judged::Landed;
    }
    let Some(from) = from else {
        // Known, if the root remembers every change since the first.
        return Judged::Lost { known: now.change == now.recent.len() as u64 };
    };
    if now.change == from.change && now.nonce() == from.nonce() {
        return Judged::Unchanged;
    }
    // Known, if the root remembers every change since `from`.
    Judged::Lost { known: now.recent.contains(&from.nonce()) }
}

impl Root {
    pub fn new(client: Client) -> Self {
        Self { client, known: Mutex::new(None), read: Mutex::new(None) }
    }

    /// Reads the present root. None if there is no root object.
    pub fn read(&self) -> Result<Option<State>> {
        Ok(self.look(self.client.deadline())?.map(|seen| seen.state))
    }

    /// The root that this process last put or read for a change, without a request. None if there is none, or
    /// if this process is changing the root.
    pub fn last_seen(&self) -> Option<State> {
        Some(self.known.try_lock().ok()?.as_ref()?.state.clone())
    }

    fn look(&self, deadline: Instant) -> Result<Option<Seen>> {
        let mut reads = 1;
        loop {
            let last = lock(&self.read).clone();
            let known = last.as_ref().and_then(|last| last.version.e_tag.clone());
            let (what, limit) = ("read the root object", MAX_LENGTH);
            let (bytes, meta) = match self.client.get_unless(what, ROOT, limit, known, deadline)? {
                Fetched::Absent => return Ok(None),
                Fetched::Same => return Ok(last),
                Fetched::Whole(bytes, meta) => (bytes, meta),
            };
            match State::parse(&bytes) {
                Ok(state) => {
                    let version = UpdateVersion { e_tag: meta.e_tag, version: meta.version };
                    return Ok(lock(&self.read).insert(Seen { state, version }).clone().into());
                }
                Err(error) if error.kind() == ErrorKind::Corrupt && reads < READS && Instant::now() < deadline => {
                    reads += 1;
                }
                Err(error) => return Err(error.with_path(self.path())),
            }
        }
    }

    /// Changes the root. `edit` makes the new state from the present one, and may be called several times. If
    /// the root has forgotten the nonce of the change, `landed` tells whether the root shows that the change
    /// was made.
    ///
    /// # Errors
    /// `Indeterminate`: the change may have been made, or may still be made. Any other error, including the
    /// errors of `edit`: the change was not made, and never will be.
    pub fn change(
        &self,
        landed: &dyn Fn(&State) -> bool,
        edit: &mut dyn FnMut(Option<&State>) -> Result<Edit>,
    ) -> Result<()> {
        self.change_until(None, landed, edit)
    }

    /// As `change`, with the deadline `until` if it is before the client's own deadline.
    pub fn change_until(
        &self,
        until: Option<Instant>,
        landed: &dyn Fn(&State) -> bool,
        edit: &mut dyn FnMut(Option<&State>) -> Result<Edit>,
    ) -> Result<()> {
        let mut known = lock(&self.known);
        let deadline = self.client.deadline();
        let deadline = until.map_or(deadline, |until| until.min(deadline));
        if Instant::now() >= deadline {
            let why = "the deadline passed before a change of the root was sent";
            return Err(Error::new(ErrorKind::Deadline, why).with_path(self.path()));
        }
        // The known root may be old. Use it only for a new state that `edit` makes from it, not for a
        // refusal.
        if let Some(seen) = known.take()
            && let Ok(Edit::To(state)) = edit(Some(&seen.state))
        {
            let sent = self.prepare(Some(seen), state)?;
            if self.settle(sent, deadline, landed, &mut known)? {
                return Ok(());
            }
        }
        loop {
            let seen = self.look(deadline)?;
            let state = match edit(seen.as_ref().map(|seen| &seen.state)) {
                Ok(Edit::To(state)) => state,
                Ok(Edit::Nothing) => return Ok(()),
                Err(error) => return Err(error),
            };
            let sent = self.prepare(seen, state)?;
            if self.settle(sent, deadline, landed, &mut known)? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let why = "other writers changed the root object until the deadline, so this change was not made";
                return Err(Error::new(ErrorKind::Busy, why).with_path(self.path()));
            }
        }
    }

    fn prepare(&self, from: Option<Seen>, state: State) -> Result<Sent> {
        let to = state.changed();
        let bytes = to.to_bytes().map_err(|error| error.with_path(self.path()))?.into();
        let (from, condition) = match from {
            None => (None, Condition::Absent),
            Some(seen) => (Some(seen.state), Condition::Is(seen.version)),
        };
        Ok(Sent { from, to, bytes, condition })
    }

    /// Sends a change until its outcome is known. Returns false if another change came first, and this change
    /// may be made again.
    fn settle(
        &self,
        sent: Sent,
        deadline: Instant,
        landed: &dyn Fn(&State) -> bool,
        known: &mut Option<Seen>,
    ) -> Result<bool> {
        let end = deadline + GRACE.min(self.client.patience());
        let (mut pause, mut doubtful) = (FIRST_PAUSE, false);
        loop {
            let answered = match self.client.put_if(ROOT, sent.bytes.clone(), sent.condition.clone(), deadline) {
                Ok(version) => {
                    *known = version.map(|version| Seen { state: sent.to, version });
                    return Ok(true);
                }
                Err(answered) => answered,
            };
            if answered.unsent && !doubtful {
                return Err(answered.error);
            }
            if mutant::on(Mutant::StoreLossIsCertain) && answered.refused
                || mutant::on(Mutant::StoreTimeoutIsFailure) && !answered.refused
            {
                return Err(answered.error);
            }
            tracing::debug!(error = format_args!("{:#}", answered.error), "a change of the root has no clear answer");
            doubtful |= !answered.certain;
            match self.judged(&sent, landed, end)? {
                (Judged::Landed, _) => return Ok(true),
                (Judged::Lost { known: true }, _) => {
                    std::thread::sleep(super::client::varied(FIRST_PAUSE));
                    return Ok(false);
                }
                (Judged::Lost { known: false }, None) => return Err(self.vanished().with_source(answered.error)),
                (Judged::Lost { known: false }, Some(_)) => return Err(self.passed_by(&answered)),
                (Judged::Unchanged, _) if answered.certain && !doubtful => return Err(answered.error),
                (Judged::Unchanged, _) => {}
            }
            if Instant::now() + pause >= deadline {
                return self.give_up(&sent, answered, landed, end).map(|()| true);
            }
            std::thread::sleep(super::client::varied(pause));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Reads the root and judges a change that was sent.
    fn judged(&self, sent: &Sent, landed: &dyn Fn(&State) -> bool, end: Instant) -> Result<(Judged, Option<Seen>)> {
        let seen = self.look(end).map_err(|error| {
            let why = "whether a change of the root was made is unknown: the root object cannot be read";
            Error::new(ErrorKind::Indeterminate, why).with_path(self.path()).with_source(error)
        })?;
        let now = seen.as_ref().map(|seen| &seen.state);
        let judged = match judge(sent.to.nonce(), sent.from.as_ref(), now) {
            Judged::Lost { known: false } if now.is_some_and(landed) => Judged::Landed,
            judged => judged,
        };
        Ok((judged, seen))
    }

    /// Changes the counter alone, so that a change that has not landed never will. `Ok` if the change has
    /// landed after all.
    fn give_up(&self, sent: &Sent, answered: Answered, landed: &dyn Fn(&State) -> bool, end: Instant) -> Result<()> {
        let error = if answered.refused {
            let why = "the store refuses a change of the root, and no other has changed it: check the store";
            Error::new(ErrorKind::Unavailable, why).with_path(self.path()).with_source(answered.error)
        } else {
            answered.error
        };
        let mut bump = None;
        let mut pause = FIRST_PAUSE;
        loop {
            match self.judged(sent, landed, end)? {
                (Judged::Landed, _) => return Ok(()),
                (Judged::Lost { .. }, _) => return Err(error),
                (Judged::Unchanged, seen) => {
                    // Send the same bump each time, so that it lands at most once, too.
                    if bump.is_none() {
                        let state = seen.as_ref().map_or_else(State::empty, |seen| seen.state.clone());
                        bump = Some(self.prepare(seen, state)?);
                    }
                }
            }
            if Instant::now() >= end {
                let why = "whether a change of the root object will be made is unknown: the store answers no write";
                return Err(Error::new(ErrorKind::Indeterminate, why).with_path(self.path()).with_source(error));
            }
            if let Some(Sent { bytes, condition, .. }) = &bump {
                // The stored root decides, whatever the answer was.
                let _ = self.client.put_if(ROOT, bytes.clone(), condition.clone(), end);
            }
            std::thread::sleep(super::client::varied(pause));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The error for a root object that this process has changed before and that is missing.
    pub fn vanished(&self) -> Error {
        let why = "the root object is gone: was the bucket emptied? Build a new executor to begin a new root";
        Error::new(ErrorKind::Conflict, why).with_path(self.path())
    }

    fn passed_by(&self, answered: &Answered) -> Error {
        let why = "other writers have changed the root object many times since this change, which is not in it";
        Error::new(ErrorKind::Conflict, why).with_path(self.path()).with_source(answered.error.clone())
    }

    fn path(&self) -> String {
        format!("{}/{ROOT}", self.client.name())
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::REMEMBERED;
    use super::*;

    fn after(state: &State, changes: usize) -> State {
        (0..changes).fold(state.clone(), |state, _| state.changed())
    }

    #[test]
    fn a_change_is_judged_by_what_is_there_and_by_nothing_else() {
        let from = after(&State::empty(), 5);
        let ours = after(&from, 1);
        let nonce = ours.nonce();
        let seen = |now: Option<&State>| judge(nonce, Some(&from), now);
        assert_eq!(seen(Some(&from)), Judged::Unchanged);
        assert_eq!(seen(Some(&ours)), Judged::Landed);
        assert_eq!(seen(Some(&after(&ours, 3))), Judged::Landed, "others have changed it since");
        assert_eq!(seen(Some(&after(&from, 1))), Judged::Lost { known: true });
        assert_eq!(seen(Some(&after(&from, REMEMBERED - 1))), Judged::Lost { known: true });
        assert_eq!(seen(Some(&after(&from, REMEMBERED))), Judged::Lost { known: false }, "the first is forgotten");
        assert_eq!(seen(None), Judged::Lost { known: false }, "a late request names a version that is gone");
        assert_eq!(seen(Some(&after(&State::empty(), 5))), Judged::Lost { known: false }, "another root");
    }

    #[test]
    fn the_first_change_of_a_root_is_judged_like_any_other() {
        let ours = after(&State::empty(), 1);
        let seen = |now: Option<&State>| judge(ours.nonce(), None, now);
        assert_eq!(seen(None), Judged::Unchanged);
        assert_eq!(seen(Some(&ours)), Judged::Landed);
        assert_eq!(seen(Some(&after(&State::empty(), 1))), Judged::Lost { known: true });
    }
}
