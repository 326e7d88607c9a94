//! Switches that break one promise each, so that `just mutants` can show that the test suite notices. Without the feature
//! `mutants` every switch is the constant `false` and disappears.

/// A promise to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// Shards are not fsynced.
    ShardFsync,
    /// Small files (manifest, index) are not fsynced.
    FileFsync,
    /// The attempt's directory is not fsynced.
    AttemptFsync,
    /// The parent is not fsynced after the publish.
    ParentFsync,
    /// The owner record is not fsynced.
    OwnerFsync,
    /// The root is not fsynced before trash is unlinked.
    TrashFsync,
    /// A step that somebody else published is counted without being made durable.
    ConfirmFsync,
    /// The publish replaces what is there.
    NoReplace,
    /// The publish comes before the fsync of the files.
    PublishFirst,
    /// The tail is cut after the fsync.
    TruncateLate,
    /// Digests are not compared on restore.
    DigestCheck,
    /// The fence does not wait.
    Fence,
    /// A slab goes home before it is written.
    #[cfg(feature = "mutants")]
    SlabEarly,
    /// Sources are dropped before their copies are done.
    SourceEarly,
    /// Retention counts steps that are not durable.
    RetentionCount,
    /// A sweep ignores locks.
    SweepLock,
}

/// True when `mutant` is switched on, by `ASHORE_MUTANT=Name` in the environment.
#[cfg(feature = "mutants")]
pub(crate) fn on(mutant: Mutant) -> bool {
    static CHOSEN: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var("ASHORE_MUTANT").ok());
    chosen.as_deref().is_some_and(|name| name == format!("{mutant:?}"))
}

/// Always false.
#[cfg(not(feature = "mutants"))]
pub(crate) const fn on(_: Mutant) -> bool {
    false
}
