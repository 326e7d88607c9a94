//! SIGTERM: what happens to saves when the machine is about to be taken away.
//!
//! **Protocol.** The first signal stops the admission of saves. The hook then finishes, promotes or abandons
//! the saves in progress, until a deadline, and reports. After that the program ends or continues. If it
//! continues, the next signal has the effect that it had before the hook was installed. A second signal
//! before the report abandons the remaining saves at once.
//! **Deadline.** A program that is to end does so at most one second after the deadline, even if a storage or
//! a report hangs.
//! **Fork.** A forked child has no hook: the signal has its earlier effect there, and dropping the child's
//! copy of a hook does nothing.
//! **Ownership.** A hook does not keep its executor alive: the program's last `Arc` waits for saves in
//! progress, before or after the hook is dropped.

mod handler;

use crate::catalog::Catalog;
use crate::completion::{Completion, Waiter, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{CheckpointExecutor, Threads};
use crate::guard::logged;
use crate::id::step_name;
use crate::outcome::Outcome;
use crate::save::Save;
use crate::state::StateDict;
use crate::sync::{Arc as CellArc, Mutex, lock};
use crate::thread::spawn;
use crate::tiers::{Behind, TierReport};
use handler::{Hook, SIGNAL};
use signal_hook::consts::SIGTERM;
use signal_hook::low_level;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// A program that is to end does so at most this long after the deadline, even if something hangs.
const GRACE: Duration = Duration::from_secs(1);

/// What happens to saves in progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnTerm {
    /// All saves in progress are finished.
    #[default]
    Finish,
    /// The newest staged state is finished, or a newer state that was [offered](Sigterm::offer). The other
    /// saves are cancelled, so that this save has the full bandwidth of the storage.
    Promote,
    /// All saves in progress are cancelled.
    Abandon,
}

/// What the program does after the report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// It goes on, and can read [`Sigterm::requested`] and [`Sigterm::report`].
    #[default]
    Return,
    /// It ends at once, without running destructors and exit handlers.
    Code {
        /// The code if no lost step is newer than the newest durable one.
        durable: i32,
        /// The code otherwise.
        lost: i32,
    },
    /// It dies of the signal.
    Signal,
}

/// What happened to the saves.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// The newest durable step, and its path.
    pub durable: Option<(u64, PathBuf)>,
    /// Steps that were in progress and became durable, oldest first.
    pub finished: Vec<u64>,
    /// Steps that were in progress and did not become durable, oldest first, and why.
    pub lost: Vec<(u64, Error)>,
    /// Which steps each tier behind the executor's root has and lacks. Of the steps that were not promoted
    /// before the signal, only the newest durable step is promoted, until the deadline.
    pub tiers: Vec<TierReport>,
    /// A second signal or the deadline ended the saves, or the promotion, early.
    pub cut_short: bool,
}

impl Report {
    /// True when no lost step is newer than the newest durable one.
    pub fn newest_is_durable(&self) -> bool {
        let durable = self.durable.as_ref().map(|(step, _)| *step);
        self.lost.iter().all(|(step, _)| durable.is_some_and(|durable| *step < durable))
    }
}

type Tell = Box<dyn Fn(&Report) + Send + Sync>;

/// Builds a hook.
///
/// ```
/// use ashore::CheckpointExecutor;
/// use ashore::sigterm::{OnTerm, Sigterm};
/// use std::{sync::Arc, time::Duration};
/// # let root = tempfile::tempdir().unwrap();
/// # let executor = Arc::new(CheckpointExecutor::builder(root.path()).arena(16 << 20).chunk(1 << 20).build()?);
/// let hook = Sigterm::on(&executor)
///     .timeout(Duration::from_secs(10))
///     .on_term(OnTerm::Promote)
///     .report(|report| println!("newest durable step: {:?}", report.durable))
///     .install()?;
/// assert!(!hook.requested());
/// # Ok::<(), ashore::Error>(())
/// ```
#[must_use = "nothing happens until `install`"]
pub struct SigtermBuilder {
    executor: Weak<CheckpointExecutor>,
    /// Can be upgraded while the executor's drop waits for saves. The reference to the executor cannot.
    threads: Weak<Threads>,
    catalog: Catalog,
    timeout: Duration,
    on_term: OnTerm,
    exit: Exit,
    tell: Tell,
}

impl SigtermBuilder {
    /// How long saves may take. Default: 20 seconds.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// What happens to saves in progress. Default: they are finished.
    pub fn on_term(mut self, on_term: OnTerm) -> Self {
        self.on_term = on_term;
        self
    }

    /// What the program does after the report. Default: it goes on.
    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// Sets the function that receives the report before the program ends. Default: it prints a line to
    /// stderr.
    pub fn report(mut self, tell: impl Fn(&Report) + Send + Sync + 'static) -> Self {
        self.tell = Box::new(tell);
        self
    }

    /// Installs the hook until the returned value is dropped. Other handlers of the signal still run.
    ///
    /// # Errors
    /// `Busy` when the system has no descriptor or thread for it, or the program has too many hooks.
    pub fn install(self) -> Result<Sigterm> {
        let busy = |e| Error::new(ErrorKind::Busy, "the hook for SIGTERM cannot be installed").with_source(e);
        let (signals, wake) = UnixStream::pair().map_err(busy)?;
        let shared = Arc::new(HookState::default());
        let hook = Sigterm { shared: shared.clone(), wake, timeout: self.timeout.saturating_add(2 * GRACE) };
        *lock(&shared.hook) = Some(Hook::new(&hook.wake).map_err(busy)?);
        let listener = Arc::new(Listener { hook: self, shared: shared.clone() });
        spawn("ashore-sigterm".into(), move || {
            listen(&listener, signals);
            drop(listener);
            shared.ended.complete(());
        })
        .inspect_err(|_| _ = hook.shared.ended.complete(()))?;
        Ok(hook)
    }
}

impl std::fmt::Debug for SigtermBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigtermBuilder({:?}, {:?}, {:?})", self.timeout, self.on_term, self.exit)
    }
}

#[derive(Debug)]
struct HookState {
    requested: AtomicBool,
    report: CellArc<Completion<Report>>,
    offered: Mutex<Option<(u64, StateDict<'static>)>>,
    hook: Mutex<Option<Hook>>,
    /// The thread that drains, once it has started.
    drain: OnceLock<ThreadId>,
    /// Set when the listening thread has ended.
    ended: Completion<()>,
}

impl Default for HookState {
    fn default() -> Self {
        let (requested, report) = (AtomicBool::new(false), CellArc::new(Completion::new()));
        let (offered, hook) = (Mutex::new(None), Mutex::new(None));
        Self { requested, report, offered, hook, drain: OnceLock::new(), ended: Completion::new() }
    }
}

/// An installed hook.
///
/// ```
/// use ashore::sigterm::{Exit, OnTerm, Sigterm};
/// use std::{sync::Arc, time::Duration};
/// # let dir = tempfile::tempdir().unwrap();
/// let executor = Arc::new(ashore::CheckpointExecutor::builder(dir.path()).arena(16 << 20).chunk(1 << 20).build()?);
/// let hook = Sigterm::on(&executor)
///     .timeout(Duration::from_secs(20)) // well below the scheduler's own
///     .on_term(OnTerm::Promote)
///     .exit(Exit::Code { durable: 0, lost: 75 })
///     .install()?;
/// assert!(!hook.requested());
/// executor.shutdown(Duration::from_secs(60))?;
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// Dropping the value removes the hook. If saves are being drained, the drop first waits for the end of the
/// drain. A program whose `main` returns meanwhile then loses nothing and ends as [`Exit`] says.
#[derive(Debug)]
pub struct Sigterm {
    shared: Arc<HookState>,
    wake: UnixStream,
    timeout: Duration,
}

impl Sigterm {
    /// Begins to build a hook for the saves of `executor`.
    pub fn on(executor: &Arc<CheckpointExecutor>) -> SigtermBuilder {
        let tell = |report: &Report| {
            let durable = report.durable.as_ref().map(|(step, path)| format!("step {step} in {}", path.display()));
            let (durable, lost) = (durable.unwrap_or_else(|| "no step".into()), report.lost.len());
            let mut text = format!("ashore: SIGTERM: durable is {durable}; saves lost: {lost}");
            for TierReport { tier, newest, lacks, .. } in &report.tiers {
                let newest = newest.map_or_else(|| "no step".into(), |step| format!("step {step}"));
                text += &format!("; durable in {tier:?} is {newest}, which lacks {lacks:?}");
            }
            let _ = writeln!(std::io::stderr(), "{text}");
        };
        SigtermBuilder {
            executor: Arc::downgrade(executor),
            threads: Arc::downgrade(executor.threads()),
            catalog: executor.catalog().clone(),
            timeout: Duration::from_secs(20),
            on_term: OnTerm::default(),
            exit: Exit::default(),
            tell: Box::new(tell),
        }
    }

    /// Keeps the newest state without saving it. [`OnTerm::Promote`] saves it if it is newer than every save
    /// in progress. It replaces the state that was offered before.
    ///
    /// # Errors
    /// `Invalid` for a state that the program can write while the hook keeps it.
    pub fn offer(&self, step: u64, state: StateDict<'static>) -> Result<()> {
        state.settled()?;
        let before = lock(&self.shared.offered).replace((step, state));
        drop(before);
        Ok(())
    }

    /// Returns the state that was offered last, and forgets it.
    pub fn withdraw(&self) -> Option<(u64, StateDict<'static>)> {
        lock(&self.shared.offered).take()
    }

    /// True when the signal has arrived. No later save begins: its handle resolves to `Outcome::Skipped`.
    pub fn requested(&self) -> bool {
        self.shared.requested.load(Ordering::Acquire)
    }

    /// Returns what happened to the saves, once it is known.
    pub fn report(&self) -> Option<Report> {
        self.shared.report.get()
    }

    /// Returns a future of the report. It resolves when a signal has arrived and the saves have ended.
    pub fn reported(&self) -> impl Future<Output = Report> + Send + 'static + use<> {
        Waiter::new(self.shared.report.clone())
    }
}

impl Drop for Sigterm {
    fn drop(&mut self) {
        if lock(&self.shared.hook).as_ref().is_some_and(|hook| !hook.is_ours()) {
            return; // in a forked child the socket and its thread belong to the parent
        }
        // The report callback may drop the hook: the draining thread cannot wait for itself.
        let timeout =
            if self.shared.drain.get() == Some(&std::thread::current().id()) { Duration::ZERO } else { self.timeout };
        if self.requested() {
            // A second signal still counts during this wait.
            self.shared.ended.wait(deadline_after(timeout));
        }
        drop(lock(&self.shared.hook).take());
        let _ = self.wake.write(&[!SIGNAL]);
        self.shared.ended.wait(deadline_after(timeout));
    }
}

struct Listener {
    hook: SigtermBuilder,
    shared: Arc<HookState>,
}

/// The listening thread, which the signal wakes.
fn listen(listener: &Arc<Listener>, mut signals: UnixStream) {
    let (hook, shared, mut byte) = (&listener.hook, &listener.shared, [!SIGNAL]);
    while matches!(signals.read(&mut byte), Err(e) if e.kind() == std::io::ErrorKind::Interrupted) {}
    if byte != [SIGNAL] {
        return;
    }
    let (deadline, end) = (deadline_after(hook.timeout), deadline_after(hook.timeout.saturating_add(GRACE)));
    shared.requested.store(true, Ordering::Release);
    let executor = hook.executor.upgrade();
    if let Some(threads) = hook.threads.upgrade() {
        threads.close_admission();
    }
    let again = Arc::new(AtomicBool::new(false));
    let (draining, interrupted) = (listener.clone(), again.clone());
    let drain = spawn("ashore-drain".into(), move || {
        let _ = draining.shared.drain.set(std::thread::current().id());
        logged("the drain at SIGTERM panicked", || draining.drain(executor, deadline, &interrupted));
    });
    if let Err(error) = &drain {
        tracing::error!(error = format_args!("{error:#}"), "saves cannot be drained at SIGTERM");
    }
    let slice = Duration::from_millis(5);
    let _ = signals.set_read_timeout(Some(slice));
    while drain.as_ref().is_ok_and(|thread| !thread.is_finished()) && Instant::now() < end {
        match signals.read(&mut byte) {
            Ok(0) => std::thread::sleep(slice), // the draining thread has dropped the hook
            Ok(_) if byte == [SIGNAL] => again.store(true, Ordering::Release),
            Ok(_) | Err(_) => {}
        }
    }
    let kept = shared.report.get().is_some_and(|report| report.newest_is_durable());
    match hook.exit {
        Exit::Return => {
            drop(lock(&shared.hook).take());
            // A report is missing here only if the drain panicked or hangs.
            shared.report.complete(Report { cut_short: true, ..Report::default() });
        }
        Exit::Code { durable, lost } => low_level::exit(if kept { durable } else { lost }),
        Exit::Signal => _ = low_level::emulate_default_handler(SIGTERM),
    }
}

impl Listener {
    /// Ends the saves, and reports.
    fn drain(&self, executor: Option<Arc<CheckpointExecutor>>, deadline: Instant, again: &AtomicBool) {
        let Self { hook, shared } = self;
        let mut report = Report::default();
        let threads = hook.threads.upgrade();
        let mut saves = threads.as_ref().map(|threads| threads.unfinished()).unwrap_or_default();
        let behind = threads.and_then(|threads| threads.behind().cloned());
        if let Some(behind) = &behind {
            behind.only_newest();
        }
        let cancel = |save: &Save| _ = save.cancel();
        match hook.on_term {
            OnTerm::Finish => {}
            OnTerm::Abandon => saves.iter().for_each(cancel),
            OnTerm::Promote => {
                let staged = saves.iter().filter(|save| save.is_staged()).map(Save::step).max();
                let newest = staged.or_else(|| saves.iter().map(Save::step).max());
                let kept = self.promote(executor.as_deref(), newest, &mut saves, &mut report);
                saves.iter().filter(|save| Some(save.step()) != kept).for_each(cancel);
            }
        }
        // Drop the executor before any wait: if this is the last `Arc`, the drop waits for saves, too.
        drop(executor);
        for save in &saves {
            let ended = loop {
                let now = Instant::now();
                if now >= deadline || again.load(Ordering::Acquire) {
                    report.cut_short = true;
                    save.cancel();
                    break save.wait(Duration::from_millis(100));
                }
                // Wait in slices, to notice the second signal.
                if let Ok(done) = slice(save, (deadline - now).min(Duration::from_millis(5))) {
                    break done;
                }
            };
            match ended {
                Ok(Outcome::Durable(_)) => report.finished.push(save.step()),
                Ok(Outcome::Skipped { .. } | Outcome::Superseded { .. }) => {}
                Err(error) => report.lost.push((save.step(), error)),
            }
        }
        report.finished.sort_unstable();
        report.lost.sort_by_key(|(step, _)| *step);
        let newest = hook.catalog.latest().ok().flatten();
        // A step under another name is not promoted to a tier.
        let named = newest.as_ref().is_some_and(|newest| newest.name() == step_name(newest.step()));
        report.durable = newest.map(|newest| (newest.step(), newest.path().to_owned()));
        if let Some(behind) = &behind {
            let newest = report.durable.as_ref().map(|(step, _)| *step);
            report.cut_short |=
                newest.filter(|_| named).is_some_and(|newest| !promoted(behind, newest, deadline, again));
            report.tiers = behind.report();
            behind.all_again();
        }
        shared.report.complete(report.clone());
        (hook.tell)(&report);
    }

    /// Saves the offered state if it is newer than `newest` and every durable step. Returns the step to
    /// finish.
    fn promote(
        &self,
        executor: Option<&CheckpointExecutor>,
        newest: Option<u64>,
        saves: &mut Vec<Save>,
        report: &mut Report,
    ) -> Option<u64> {
        let Some((step, state)) = lock(&self.shared.offered).take() else { return newest };
        let durable = self.hook.catalog.latest().ok().flatten().map(|newest| newest.step());
        if newest.max(durable).is_some_and(|newest| newest >= step) {
            return newest;
        }
        let Some(executor) = executor else {
            let gone = Error::invalid("a state was offered, but the executor was dropped before the signal");
            report.lost.push((step, gone.with_step(step)));
            return newest;
        };
        // Cancel the saves in progress first, so that the offered state does not wait for them.
        saves.iter().for_each(|save| _ = save.cancel());
        match executor.save_at_the_end(step, state) {
            Ok(save) => saves.push(save),
            Err(error) => report.lost.push((step, error)),
        }
        Some(step)
    }
}

/// Waits until every tier has the step `newest`. False at the deadline and at a second signal.
fn promoted(behind: &Behind, newest: u64, deadline: Instant, again: &AtomicBool) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if behind.has_newest(newest, left.min(Duration::from_millis(5))) {
            return true;
        }
        if left.is_zero() || again.load(Ordering::Acquire) {
            return false;
        }
    }
}

/// Returns how the save ended, if it ends within `timeout`.
fn slice(save: &Save, timeout: Duration) -> Result<Result<Outcome>, ()> {
    match save.wait(timeout) {
        // The save's deadline or the deadline of this wait has passed. `try_get` tells whether the save has
        // ended.
        Err(error) if error.kind() == ErrorKind::Deadline => save.try_get().ok_or(()),
        ended => Ok(ended),
    }
}
