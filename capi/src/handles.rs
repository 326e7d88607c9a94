//! Handles: numbers of a table, which look like pointers and are never dereferenced.
//!
//! A handle is a number that was never given before, so a freed handle is detected however late it is used.
//! The first number is random, so another copy of the library in the same process does not know it. All
//! numbers are odd, and no object has an odd address.
//!
//! **Fork.** A thread may hold the table's lock while another thread forks, and the child would then wait for
//! the lock for ever. So a handler takes the lock before the fork, and releases it after the fork in both
//! processes.
//!
//! # Safety argument
//! Only the thread that holds the table's lock reads and writes `Held`, which contains the guard of that
//! lock. The handlers run in the thread that forks, one after the other. They allocate nothing.
#![expect(unsafe_code, reason = "pthread_atfork, and what its handlers keep; argument above")]

use crate::failure::{Failed, Result};
use ashore_core::{Checkpoint, CheckpointExecutor, Save};
use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

/// Saves the state of one program under one root. Valid from `ashore_open` until `ashore_close`.
pub struct ashore_executor {
    _opaque: [u8; 0],
}

/// A save that is under way or has ended. Valid from `ashore_save_begin` until `ashore_save_free`.
pub struct ashore_save {
    _opaque: [u8; 0],
}

/// A step that can be read. Valid until `ashore_checkpoint_free`.
pub struct ashore_checkpoint {
    _opaque: [u8; 0],
}

/// A type of handle, and the type of the object that it names.
pub trait Handle: Sized {
    /// The object that the handle names.
    type Object;
    /// The name of the handle in messages.
    const WHAT: &'static str;

    fn kept(object: Arc<Self::Object>) -> Object;
    fn found(object: &Object) -> Option<&Arc<Self::Object>>;
}

/// A checkpoint, and whether it uses the device of an executor.
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

/// An object that a handle names.
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
    /// The last number that was given; 0 if none was given.
    last: u64,
    /// Objects by number, each with the number of the executor from which it came.
    objects: BTreeMap<u64, (u64, Object)>,
}

static TABLE: Mutex<Table> = Mutex::new(Table { last: 0, objects: BTreeMap::new() });

fn table() -> MutexGuard<'static, Table> {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        // SAFETY: the functions exist for the life of the process, because the library is never unloaded.
        let code = unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(after_fork)) };
        if code != 0 {
            tracing::warn!(code, "forks cannot be watched: a forked child must not use the library");
        }
    });
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lock's guard, from the handler before a fork to the handler after it.
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
    // SAFETY: this thread took the lock, or is the copy of the thread that took it.
    drop(unsafe { (*HELD.0.get()).take() });
}

/// Puts an object into the table. `owner` is the number of its executor, or 0 for none.
pub fn give<H: Handle>(object: H::Object, owner: u64) -> *mut H {
    let object = H::kept(Arc::new(object));
    let mut table = table();
    if table.last == 0 {
        table.last = RandomState::new().hash_one(0_u64) | 1;
    }
    // The number is odd, never 0, and not given again before 2^63 others.
    table.last = table.last.wrapping_add(2);
    let number = table.last;
    table.objects.insert(number, (owner, object));
    std::ptr::without_provenance_mut(number as usize)
}

/// Returns the number of a handle.
pub fn number<H: Handle>(handle: *mut H) -> u64 {
    handle.addr() as u64
}

/// Finds the object that a handle names. The object stays while the caller uses it, even if another thread
/// frees the handle meanwhile.
///
/// # Errors
/// `Invalid` for null, and for a handle that is not in the table or of another type.
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

/// Returns how many handles of saves and of checkpoints came from an executor and are not freed.
pub fn alive(owner: u64) -> (usize, usize) {
    let table = table();
    let of_owner = |wanted: fn(&Object) -> bool| {
        table.objects.values().filter(|(of, object)| *of == owner && wanted(object)).count()
    };
    (of_owner(|object| matches!(object, Object::Save(_))), of_owner(|object| matches!(object, Object::Checkpoint(_))))
}

/// Frees a handle if it is valid. Does not change the thread's last error, even if dropping the object
/// panics.
pub fn free<H: Handle>(handle: *mut H) {
    let taken = take(handle);
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(taken))).is_err() {
        tracing::error!(handle = H::WHAT, "an object panicked when it was dropped");
    }
}
