//! Switches that break one promise each, so that `just mutants` can show that the test suite notices. Without `--cfg mutants`
//! every switch is the constant `false` and disappears. It is no feature, because any dependency could switch that on for a
//! whole program. The comments name the tests that are run first.

/// A promise to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// Shards are not fsynced.
    // seen by: storage::promises_are_kept_in_order
    ShardFsync,
    /// Small files (manifest, index) are not fsynced.
    // seen by: storage::promises_are_kept_in_order
    FileFsync,
    /// The attempt's directory is not fsynced.
    // seen by: storage::promises_are_kept_in_order
    AttemptFsync,
    /// The parent is not fsynced after the publish.
    // seen by: storage::promises_are_kept_in_order
    ParentFsync,
    /// The owner record is not fsynced.
    // seen by: storage::promises_are_kept_in_order
    OwnerFsync,
    /// The root is not fsynced before trash is unlinked.
    // seen by: storage::promises_are_kept_in_order
    TrashFsync,
    /// A step that somebody else published is counted without being made durable.
    // seen by: catalog::a_prune
    ConfirmFsync,
    /// The publish replaces what is there.
    // seen by: storage::a_local_root_conforms
    NoReplace,
    /// The publish comes before the fsync of the files.
    // seen by: storage::a_local_root_conforms
    PublishFirst,
    /// The tail is cut after the fsync.
    // seen by: storage::promises_are_kept_in_order
    TruncateLate,
    /// Digests are not compared on restore.
    // seen by: restore::a_flipped_bit_is_refused
    DigestCheck,
    /// The fence does not wait.
    // seen by: fence::late_copies
    Fence,
    /// Copies from live memory are handed over although their chunk was set aside.
    // seen by: cuda::aside
    Discard,
    /// F is read before the mark of a chunk, not after.
    // seen by: cuda::aside
    LatchEarly,
    /// The kernel of a fence takes the watermark of earlier saves for this one's.
    #[cfg(feature = "cuda")]
    // seen by: cuda::aside
    Watermark,
    /// Streams do not wait at the end of a scope for copies that are queued.
    // seen by: cuda::lent
    ScopeOrder,
    /// Streams that wait for a number in memory are let go before the copies have ended, although no save has failed.
    // seen by: cuda::waits::cuda_streams_write_after
    HoldEarly,
    /// Copies do not wait for the streams that wrote the tensors.
    // seen by: cuda::aside
    ProducerWait,
    /// Copies that are held back are queued behind the watermark that speaks of them.
    // seen by: cuda::batch
    BatchLate,
    /// Copies that were held back when a save failed are queued by the next.
    #[cfg(feature = "cuda")]
    // seen by: cuda::batch
    BatchKept,
    /// A slot of the scratch is given to another save before its chunk is handed over.
    // seen by: cuda::aside
    SlotEarly,
    /// What was captured on a device is written over by the next save before it has left.
    // seen by: cuda::gather
    RoomEarly,
    /// Bytes are handed to a device before their digest was compared.
    // seen by: cuda::restoring
    LoadEarly,
    /// Copies of a restore do not wait for what the program had queued.
    // seen by: cuda::restoring
    LoadOrder,
    /// A slab is read into while it is still copied from to a device.
    // seen by: cuda::restoring
    LoadReuse,
    /// A restore does not wait for its last copies to a device.
    // seen by: cuda::restoring
    LoadWait,
    /// A slab goes home before it is written.
    #[cfg(mutants)]
    // seen by: fence::late_copies
    SlabEarly,
    /// Sources are dropped before their copies are done.
    // seen by: fence::
    SourceEarly,
    /// Retention counts steps that are not durable.
    // seen by: catalog::a_prune
    RetentionCount,
    /// A prune reads none of the steps that stay.
    // seen by: catalog::a_prune_keeps_a_sound
    PruneBlind,
    /// A sweep ignores locks.
    // seen by: storage::sweeping_takes_only_dead_attempts
    SweepLock,
    /// A manager that is dropped does not wait for its saves.
    // seen by: compat::orbax::managing
    ManagerDrop,
    /// Every rank of a group is told that it is the coordinator.
    // seen by: compat::torch::ranks
    Coordinator,
    /// A session begins with the metadata of the row that it resumes from.
    // seen by: compat::earth2studio
    ResumeMetadata,
    /// Of few checkpoints those without metrics go.
    // seen by: compat::orbax::policies
    BestFew,
    /// One more is kept than the best so many.
    // seen by: compat::orbax::policies
    BestEdge,
}

/// True when `mutant` is switched on, by `ASHORE_MUTANT=Name` in the environment.
#[cfg(mutants)]
pub(crate) fn on(mutant: Mutant) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var("ASHORE_MUTANT").ok());
    chosen.as_deref().is_some_and(|name| name == format!("{mutant:?}"))
}

/// Always false.
#[cfg(not(mutants))]
pub(crate) const fn on(_: Mutant) -> bool {
    false
}
