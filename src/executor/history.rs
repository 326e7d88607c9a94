//! The memory of a run about its last durable step, which predicts the unchanged files of the next step.
//!
//! A tensor is *still* when it was declared frozen, or when its digests in the last two saves are equal. A
//! file is predicted to be unchanged when all its tensors are still. A wrong prediction costs a copy of the
//! bytes that were not written. It never loses a byte.
//!
//! **One copy on the medium** serves all steps that share a file. So a file that is old enough is written
//! again, one shared file is read back after each save (`executor/scrub.rs`), and a file that was found
//! damaged is never shared again.

use super::scrub::Scrub;
use crate::commit::shard_digests;
use crate::digest::Digest;
use crate::error::Result;
use crate::format::template::FilledFile;
use crate::plan::{Made, Plan, Prediction, Receipts, Request};
use crate::settings::Settings;
use crate::storage::Storage;
use crate::sync::{Mutex, lock};
use crate::writer::{Older, OlderFile};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The tensor bytes below which a file is always written: the write costs little, and a second copy is worth
/// more.
const LEAST: u64 = 1 << 20;
/// The number of saves between two regroupings, and between the refusal of a file and the next request to
/// share it.
const PATIENCE: u32 = 16;

/// The history of an executor's saves. See the module.
#[derive(Debug)]
pub(super) struct History {
    /// Whether files are shared at all.
    on: bool,
    /// Whether tensors that turn out to be still get files of their own. With one file, a step stays one
    /// file.
    regroup: bool,
    /// A shared file is written again after this many saves and this time.
    most_saves: u32,
    most_time: Duration,
    inner: Mutex<Inner>,
    /// An empty set of tensors.
    none: Arc<[bool]>,
    pub scrub: Scrub,
}

#[derive(Debug)]
struct Inner {
    last: Option<Arc<Last>>,
    /// The tensors that new plans group with the ones declared frozen, for states of this fingerprint.
    still: (u64, Arc<[bool]>),
    /// The bytes of still tensors that were written since the last regrouping, because other tensors of their
    /// files had changed.
    wasted: u64,
    /// The number of saves since the last regrouping.
    saves: u32,
}

/// The last durable step.
#[derive(Debug)]
struct Last {
    plan: Arc<Plan>,
    digests: Arc<[Digest]>,
    /// By index in the state dict.
    tensors: Vec<Seen>,
    /// For each shard that is predicted to be unchanged, its file.
    files: Vec<Option<Arc<OlderFile>>>,
    /// For each shard, the number of saves until its file is shared again after the storage has refused that.
    /// A refusal can concern one file only, such as one that has the maximum number of links.
    paused: Vec<u32>,
}

/// A tensor in the saves so far.
#[derive(Clone, Copy, Debug)]
struct Seen {
    digest: Digest,
    /// Whether the tensor is predicted to be the same in the next save.
    still: bool,
}

impl History {
    pub fn new(settings: &Settings, storage: &dyn Storage, alone: bool) -> Self {
        let none: Arc<[bool]> = Arc::from([]);
        let inner = Inner { last: None, still: (0, none.clone()), wasted: 0, saves: 0 };
        Self {
            on: settings.links && alone && storage.adopts(),
            regroup: settings.files > 1,
            most_saves: settings.link_saves,
            most_time: settings.link_age,
            inner: Mutex::new(inner),
            none,
            scrub: Scrub::default(),
        }
    }

    /// Whether files are shared at all.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Returns the tensors that a new plan of a state of this fingerprint takes for frozen, by their index.
    /// Empty if there are none.
    pub fn still(&self, fingerprint: u64) -> Arc<[bool]> {
        let (of, still) = &lock(&self.inner).still;
        if *of == fingerprint { still.clone() } else { self.none.clone() }
    }

    /// Closes the files. A later save writes everything.
    pub fn close(&self) {
        self.scrub.close();
        lock(&self.inner).last = None;
    }

    /// Returns the files that a save of `plan` may adopt.
    pub fn predict(&self, plan: &Arc<Plan>) -> Option<Older> {
        let inner = lock(&self.inner);
        let last = inner.last.as_ref().filter(|last| Arc::ptr_eq(&last.plan, plan))?;
        let fresh = |file: &OlderFile| file.saves < self.most_saves || file.written.elapsed() < self.most_time;
        let usable = |(file, paused): (&Option<Arc<OlderFile>>, &u32)| {
            let sound = |file: &&Arc<OlderFile>| fresh(file) && !file.damaged.load(Ordering::Acquire);
            file.as_ref().filter(|_| *paused == 0).filter(sound).cloned()
        };
        let files: Vec<_> = last.files.iter().zip(&last.paused).map(usable).collect();
        let shards: Vec<bool> = files.iter().map(Option::is_some).collect();
        let any = shards.contains(&true);
        any.then(|| Older { prediction: Arc::new(Prediction { digests: last.digests.clone(), shards }), files })
    }

    /// Records a step that has just become durable under the root. Its files may have been adopted from
    /// `older`. Only the committer calls this.
    pub fn durable(&self, request: &Request, receipts: Receipts, older: Option<&Older>, storage: &dyn Storage) {
        let plan = &request.plan;
        // The lock is not held while files are opened, because the call of `save` takes it.
        let before = lock(&self.inner).last.clone().filter(|last| last.plan.fingerprint() == plan.fingerprint());
        let tensors = look(plan, &receipts, before.as_deref());
        let files = files(request, &receipts, &tensors, older, storage).unwrap_or_else(|error| {
            tracing::debug!(error = format_args!("{error:#}"), "files of this step are not shared with the next");
            vec![None; plan.shards.len()]
        });
        self.scrub.offer(files.iter().flatten().filter(|file| file.saves > 0).cloned().collect());
        let mut paused =
            before.filter(|last| Arc::ptr_eq(&last.plan, plan)).map_or_else(Vec::new, |b| b.paused.clone());
        paused.resize(plan.shards.len(), 0);
        for (paused, made) in paused.iter_mut().zip(&receipts.made) {
            *paused = if *made == Made::Refused { PATIENCE } else { paused.saturating_sub(1) };
        }
        let mut inner = lock(&self.inner);
        inner.weigh(plan, &tensors, &receipts.made, self.regroup);
        inner.last =
            Some(Arc::new(Last { plan: plan.clone(), digests: receipts.digests.into(), tensors, files, paused }));
    }
}

impl Inner {
    /// Gives still tensors files of their own when the bytes written in vain reach the size of the files that
    /// would change.
    fn weigh(&mut self, plan: &Plan, tensors: &[Seen], made: &[Made], regroup: bool) {
        self.saves = self.saves.saturating_add(1);
        if !regroup {
            return;
        }
        let mut changes = vec![false; plan.shards.len()];
        for (index, seen) in tensors.iter().enumerate().filter(|(index, _)| !plan.is_declared(*index)) {
            let Some(shard) = plan.shard_of(index) else { continue };
            if seen.still && made[shard] == Made::Written && !plan.is_apart(index) {
                self.wasted = self.wasted.saturating_add(plan.bytes_of(index));
            }
            changes[shard] |= seen.still != plan.is_apart(index);
        }
        let cost: u64 = plan.shards.iter().zip(changes).filter(|(_, change)| *change).map(|(s, _)| s.length).sum();
        if cost > 0 && self.wasted >= cost && self.saves >= PATIENCE {
            tracing::info!(written_in_vain = self.wasted, "tensors that do not change get files of their own");
            self.still = (plan.fingerprint(), tensors.iter().map(|seen| seen.still).collect());
            (self.wasted, self.saves) = (0, 0);
        }
    }
}

/// Compares the digests of tensors with those of the save before.
fn look(plan: &Plan, receipts: &Receipts, before: Option<&Last>) -> Vec<Seen> {
    let mut tensors: Vec<Seen> = Vec::with_capacity(plan.places.len());
    for (index, place) in plan.places.iter().enumerate() {
        let digest = place.map_or(Digest::EMPTY, |place| {
            let range = plan.tensors[place].segments.clone();
            let lengths = plan.segments[range.clone()].iter().map(|segment| segment.length as u64);
            Digest::concat(receipts.digests[range].iter().copied().zip(lengths))
        });
        let seen = before.and_then(|last| last.tensors.get(index));
        let still = match seen {
            Some(seen) => seen.digest == digest,
            // A declaration counts until it was wrong.
            None => plan.is_declared(index),
        };
        if seen.is_some_and(|seen| seen.still) && !still && plan.is_declared(index) {
            tracing::debug!(tensor = plan.name(index), "a tensor that was declared frozen has changed");
        }
        tensors.push(Seen { digest, still });
    }
    tensors
}

/// Opens the files of the step that are predicted to be unchanged and are large enough to be shared.
fn files(
    request: &Request,
    receipts: &Receipts,
    tensors: &[Seen],
    older: Option<&Older>,
    storage: &dyn Storage,
) -> Result<Vec<Option<Arc<OlderFile>>>> {
    let plan = &request.plan;
    let mut still: Vec<bool> = plan.shards.iter().map(|s| s.length - s.header.len() >= LEAST).collect();
    for (tensor, _) in tensors.iter().enumerate().filter(|(_, seen)| !seen.still) {
        plan.shard_of(tensor).into_iter().for_each(|shard| still[shard] = false);
    }
    let mut files = vec![None; plan.shards.len()];
    if !still.contains(&true) {
        return Ok(files);
    }
    let step = storage.open(&request.name)?;
    for (number, shard) in plan.shards.iter().enumerate().filter(|(number, _)| still[*number]) {
        let (filled, source) = match receipts.made[number] {
            Made::Linked(filled) => (filled, older),
            made => {
                let (header, whole) = shard_digests(plan, shard, &receipts.digests, &receipts.chunks);
                let origin = Some((request.ticket.step, request.ticket.attempt()));
                (FilledFile { header, whole, origin }, older.filter(|_| made == Made::Cloned))
            }
        };
        let reading = step.open(&shard.name)?;
        // Another process may have replaced the step since. The header names step and attempt, so its digest
        // shows that.
        let mut header = vec![0; shard.header.len() as usize];
        reading.read_at(0, &mut header)?;
        if Digest::of(&header) != filled.header || reading.len() != shard.length {
            continue;
        }
        files[number] = Some(Arc::new(match source.map(|older| older.file(number)).transpose()? {
            Some(source) => OlderFile {
                reading,
                filled,
                saves: source.saves + 1,
                written: source.written,
                damaged: source.damaged.clone(),
            },
            None => OlderFile { reading, filled, saves: 0, written: Instant::now(), damaged: Arc::default() },
        }));
    }
    Ok(files)
}
