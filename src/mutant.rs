//! Switches that break one promise each, so that `just mutants` can show that the test suite detects it.
//! Without `--cfg mutants` every switch is the constant `false` and is compiled out. This is not a feature,
//! because any dependency could enable a feature for the whole program. The comments name the tests that run
//! first.

/// A promise to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// Shards are not fsynced.
    // seen by: storage::ordering
    ShardFsync,
    /// Small files (manifest, index) are not fsynced.
    // seen by: storage::ordering
    FileFsync,
    /// Clones of files of older steps are not fsynced.
    // seen by: storage::adopting
    CloneFsync,
    /// A chunk of a file that is predicted to be unchanged counts as unchanged, without a check of its
    /// digests.
    // seen by: saves::unchanged
    StaleChunk,
    /// The row of a linked file names the step that links to the file, and not the step that wrote it.
    // seen by: saves::unchanged
    LinkedOrigin,
    /// A file that is copied from an older step is not compared with its digests.
    // seen by: saves::unchanged
    CopiedRot,
    /// The attempt's directory is not fsynced.
    // seen by: storage::ordering
    AttemptFsync,
    /// The parent is not fsynced after the publish.
    // seen by: storage::ordering
    ParentFsync,
    /// The owner record is not fsynced.
    // seen by: storage::ordering
    OwnerFsync,
    /// The root is not fsynced before trash is unlinked.
    // seen by: storage::ordering
    TrashFsync,
    /// A veto is reported before it is durable.
    // seen by: storage::shared
    VetoFsync,
    /// The record of a session, or its take-over, is not fsynced.
    // seen by: storage::shared
    SessionFsync,
    /// Rank 0 publishes before it has the receipts of all ranks.
    // seen by: several::
    Receipts,
    /// Rank 0 accepts a receipt for another attempt, or for another plan.
    // seen by: several::
    ReceiptCheck,
    /// Rank 0 does not compare the digests of replicas.
    // seen by: ranks::
    Replicas,
    /// Rank 0 reports that the step is durable before it is.
    // seen by: several::
    ToldFirst,
    /// Rank 0 does not check whether its session is the newest.
    // seen by: several::
    Zombie,
    /// A rank whose deadline passes after its receipt reports a failure without a veto.
    // seen by: several::
    NoVeto,
    /// A step of another process is counted without being made durable.
    // seen by: catalog::prune_
    ConfirmFsync,
    /// The publish replaces an existing step.
    // seen by: storage::local_conformance
    NoReplace,
    /// The publish comes before the fsync of the files.
    // seen by: storage::local_conformance
    PublishFirst,
    /// The tail is cut after the fsync.
    // seen by: storage::ordering
    TruncateLate,
    /// Digests are not compared on restore.
    // seen by: restore::flipped_bits
    DigestCheck,
    /// The fence does not wait.
    // seen by: fence::late_copies
    Fence,
    /// Copies from live memory are handed to writers although their chunk was copied late.
    // seen by: cuda::late_copies
    Discard,
    /// F is read before the completion event of a chunk, not after.
    // seen by: cuda::late_copies
    LatchEarly,
    /// A fence's kernel uses the watermark of earlier saves as the watermark of this save.
    #[cfg(feature = "cuda")]
    // seen by: cuda::late_copies
    Watermark,
    /// A device's clock is read with an error of one hour.
    #[cfg(feature = "cuda")]
    // seen by: cuda::traced
    Anchor,
    /// A stream waits at a fence only for the kernels of its own device.
    // seen by: cuda::several_devices::cuda_stream_of_one_gpu
    OwnKernels,
    /// Streams do not wait for queued copies at the end of a scope.
    // seen by: cuda::borrowed
    ScopeOrder,
    /// Streams that wait for a number in memory are released before the copies have ended, although no save
    /// has failed.
    // seen by: cuda::waits::cuda_streams_write_after
    HoldEarly,
    /// Copies do not wait for the streams that wrote the tensors.
    // seen by: cuda::late_copies
    ProducerWait,
    /// Copies that are held back are queued after the watermark that counts them.
    // seen by: cuda::batch
    BatchLate,
    /// Copies that were held back when a save failed are queued by the next save.
    #[cfg(feature = "cuda")]
    // seen by: cuda::batch
    BatchKept,
    /// A scratch slot is reused by another save before its chunk is handed to a writer.
    // seen by: cuda::late_copies
    SlotEarly,
    /// The next save overwrites the capture pool before its copies have left the device.
    // seen by: cuda::gather
    RoomEarly,
    /// A target is filled although its elements overlap.
    // seen by: restore::strided
    Overlap,
    /// Bytes are handed to a device before their digest was compared.
    // seen by: cuda::restoring
    LoadEarly,
    /// Copies of a restore do not wait for work that the program had queued.
    // seen by: cuda::restoring
    LoadOrder,
    /// A slab is overwritten while a device still copies from it.
    // seen by: cuda::restoring
    LoadReuse,
    /// A restore does not wait for its last copies to a device.
    // seen by: cuda::restoring
    LoadWait,
    /// A slab returns to the arena before it is written.
    #[cfg(mutants)]
    // seen by: fence::late_copies
    SlabEarly,
    /// Sources are dropped before their copies are done.
    // seen by: fence::
    SourceEarly,
    /// Retention counts steps that are not durable.
    // seen by: catalog::prune_
    RetentionCount,
    /// A prune verifies none of the steps that it keeps.
    // seen by: catalog::prune_soundness
    PruneBlind,
    /// A delta uses as its base a version whose publish has not ended.
    // seen by: a_version_that_was_not_published_is_no_base
    ChainOrder,
    /// A publisher continues from a version although it is unknown whether the version was published.
    // seen by: after_an_unclear_publish_the_next_version_is_a_full
    ChainUnclear,
    /// Old versions are removed because of a full that is visible but not known to be durable.
    // seen by: nothing_is_removed_behind_a_full_that_a_crash_can_take
    ChainPruneVisible,
    /// A publisher that goes back to an earlier version uses version numbers again.
    // seen by: going_back_is_a_full_under_the_next_number
    ChainOldNumber,
    /// A follower neither makes a version durable nor compares digests.
    // seen by: a_follower_never_holds_a_state_that_was_not_published
    FollowBlind,
    /// A sweep ignores locks.
    // seen by: storage::sweeping
    SweepLock,
    /// A change of a root object that the store reports as refused counts as lost.
    #[cfg(feature = "object-store")]
    // seen by: faults::a_refusal_of_a_root
    StoreLossIsCertain,
    /// A change of a root object that gets no answer counts as failed.
    #[cfg(feature = "object-store")]
    // seen by: faults::a_commit_that_landed
    StoreTimeoutIsFailure,
    /// After a step was added and deleted, the root object has the same content as before.
    #[cfg(feature = "object-store")]
    // seen by: faults::the_root_object_never
    StoreContentReturns,
    /// A sweep deletes unknown attempts of the newest session.
    #[cfg(feature = "object-store")]
    // seen by: sessions::a_sweep_leaves_attempts
    StoreSweepsOwnGeneration,
    /// A manager that is dropped does not wait for its saves.
    // seen by: compat::orbax::managing
    ManagerDrop,
    /// Every rank of a group is told that it is the coordinator.
    // seen by: compat::torch::ranks
    Coordinator,
    /// A session begins with the metadata of the row that it resumes from.
    // seen by: compat::earth2studio
    ResumeMetadata,
    /// A save reports that its step is durable in a tier before it is.
    // seen by: a_promotion_is_told_only_after
    PromoteEarly,
    /// Steps of every session are promoted.
    // seen by: a_node_that_comes_back_late
    ForeignGeneration,
    /// With few checkpoints, those without metrics are deleted.
    // seen by: compat::orbax::policies
    BestFew,
    /// One more checkpoint is kept than the requested number of best ones.
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
