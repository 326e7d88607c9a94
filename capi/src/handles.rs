//! Handles: names in a table, which look like pointers and are never followed.
//!
//! A handle is a number that was never given before, so that a freed one is found out however late it is
//! used. The first number is drawn at random, so that another copy of the library in the same process does
//! not know it. All numbers are odd, and no address of an object is.
//!
//! **Fork.** A thread may hold the table's lock while another one forks, and the child would wait for it for
//! ever. So a handler takes the lock before the fork, and gives it back after it in both processes.
//!
//! # Safety argument
//! `Held` is read and written only by the thread that holds the table's lock, which is that of its guard: the
//! handlers run in the thread that forks, one after the other. They allocate nothing.
#![expect(unsafe_code, reason = "pthread_atfork, and what its handlers keep; argument above")]

use crate::failure::{Failed, Result};
use ashore_core::{Checkpoint, CheckpointExecutor, Save};
use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

/// Saves the state of one program under one root. From `ashore_open`, until `ashore_close`.
pub struct ashore_executor {
    _opaque: [u8; 0],
}

/// A save under way or ended. From `ashore_save_begin`, until `ashore_save_free`.
pub struct ashore_save {
    _opaque: [u8; 0],
}

/// A step that can be read. Until `ashore_checkpoint_free`.
pub struct ashore_checkpoint {
    _opaque: [u8; 0],
}

/// A type of handle, and the object that it names.
pub trait Handle: Sized {
    /// What it names.
    type Object;
    /// What messages call it.
    const WHAT: &'static str;

    fn kept(object: Arc<Self::Object>) -> Object;
    fn found(object: &Object) -> Option<&Arc<Self::Object>>;
}

/// A checkpoint, and whether it has the device of an executor.
pub struct Opened {
    pub checkpoint: Checkpoint,
    pub lent: bool,
}

impl Deref for Opened {
    type Target = Checkpoint;

    fn deref(&self) -> &Checkpoint {
        &self.checkpoint
    }
}

/// What a handle names.
pub enum Object {
    Executor(Arc<CheckpointExecutor>),
    Save(Arc<Save>),
    Checkpoint(Arc<Opened>),
}

macro_rules! handles {
    ($($handle:ident, $object:ty, $variant:ident, $what:literal;)*) => { $(
        impl Handle for $handle {
            type Object = $object;
            const WHAT: &'static str = $what;

            fn kept(object: Arc<$object>) -> Object {
                Object::$variant(object)
            }

            fn found(object: &Object) -> Option<&Arc<$object>> {
                if let Object::$variant(object) = object { Some(object) } else { None }
            }
        }
    )* };
}
handles! {
    ashore_executor, CheckpointExecutor, Executor, "executor";
    ashore_save, Save, Save, "save";
    ashore_checkpoint, Opened, Checkpoint, "checkpoint";
}

#[derive(Default)]
struct Table {
    /// The last number that was given; 0: none.
    last: u64,
    /// Objects by number, each with the number of the executor that it came from.
    objects: BTreeMap<u64, (u64, Object)>,
}

static TABLE: Mutex<Table> = Mutex::new(Table { last: 0, objects: BTreeMap::new() });

fn table() -> MutexGuard<'static, Table> {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        // SAFETY: functions for the life of the process: the library is never unloaded.
        let code = unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(after_fork)) };
        if code != 0 {
            tracing::warn!(code, "forks cannot be watched: a forked child must not use the library");
        }
    });
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lock, from the handler before a fork to that behind it.
struct Held(UnsafeCell<Option<MutexGuard<'static, Table>>>);

// SAFETY: only the thread that holds the lock uses it.
unsafe impl Sync for Held {}

static HELD: Held = Held(UnsafeCell::new(None));

extern "C" fn before_fork() {
    let guard = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY: this thread holds the lock.
    unsafe { *HELD.0.get() = Some(guard) };
}

extern "C" fn after_fork() {
    // SAFETY: this thread took the lock, or is the copy of the thread that did, and gives it back now.
    drop(unsafe { (*HELD.0.get()).take() });
}

/// Puts an object into the table. `owner` is the number of its executor, 0 for none.
pub fn give<H: Handle>(object: H::Object, owner: u64) -> *mut H {
    let object = H::kept(Arc::new(object));
    let mut table = table();
    if table.last == 0 {
        table.last = RandomState::new().hash_one(0_u64) | 1;
    }
    // Odd, never 0, and not given again before 2^63 others.
    table.last = table.last.wrapping_add(2);
    let number = table.last;
    table.objects.insert(number, (owner, object));
    std::ptr::without_provenance_mut(number as usize)
}

/// The number of a handle.
pub fn number<H: Handle>(handle: *mut H) -> u64 {
    handle.addr() as u64
}

/// Finds the object that a handle names. It stays while the caller uses it, even if it is freed meanwhile.
///
/// # Errors
/// `Invalid` for null, and for what is not in the table, or of another type.
pub fn find<H: Handle>(handle: *mut H) -> Result<Arc<H::Object>> {
    let there = table().objects.get(&number(handle)).and_then(|(_, object)| H::found(object)).cloned();
    there.ok_or_else(|| unknown(handle))
}

fn unknown<H: Handle>(handle: *mut H) -> Failed {
    let what = H::WHAT;
    if handle.is_null() {
        return Failed::invalid(format!("the handle is null handle={what}"));
    }
    let why = "no such handle: it was freed, is of another type, or of another copy of the library";
    Failed::invalid(format!("{why} handle={what}"))
}

/// Takes an object out of the table.
///
/// # Errors
/// As [`find`].
pub fn take<H: Handle>(handle: *mut H) -> Result<Arc<H::Object>> {
    let mut table = table();
    let number = number(handle);
    let of_type = table.objects.get(&number).is_some_and(|(_, object)| H::found(object).is_some());
    let taken = if of_type { table.objects.remove(&number) } else { None };
    drop(table);
    taken.and_then(|(_, object)| H::found(&object).cloned()).ok_or_else(|| unknown(handle))
}

/// The number of handles of saves, and of checkpoints, that came from an executor and are not freed.
pub fn alive(owner: u64) -> (usize, usize) {
    let table = table();
    let of_owner = |wanted: fn(&Object) -> bool| {
        table.objects.values().filter(|(of, object)| *of == owner && wanted(object)).count()
    };
    (of_owner(|object| matches!(object, Object::Save(_))), of_owner(|object| matches!(object, Object::Checkpoint(_))))
}

/// Frees a handle, if it is one. Leaves the thread's last error alone, also when what it drops panics.
pub fn free<H: Handle>(handle: *mut H) {
    let taken = take(handle);
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(taken))).is_err() {
        tracing::error!(handle = H::WHAT, "an object panicked when it was dropped");
    }
}
