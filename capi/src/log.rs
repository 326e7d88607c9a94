//! Writes the library's warnings to stderr, or passes them to a function of the program.
//!
//! # Safety argument
//! The safety argument of the crate applies; `callbacks.rs` says how the program's function is called. A
//! `Sink` is never freed, so a thread may use a `Sink` that it has read. Nothing is locked, so a fork cannot
//! leave a lock held.
#![expect(unsafe_code, reason = "calls the program's function; argument above")]

use crate::callbacks::{self, Context, Log};
use crate::failure::{run, text};
use crate::status::ashore_status::ASHORE_OK;
use std::ffi::{c_char, c_void};
use std::fmt::{self, Write as _};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

struct Sink {
    /// None means stderr.
    log: Option<Log>,
    context: Context,
    /// The previous sink, so that leak checkers find it.
    _earlier: AtomicPtr<Sink>,
}

/// Null means stderr.
static SINK: AtomicPtr<Sink> = AtomicPtr::new(ptr::null_mut());

/// Passes errors (level 0) and warnings (level 1) of the library to `log`, instead of writing them to stderr.
/// Any thread may call `log`, which must return soon and not call the library. Null restores stderr. Call
/// this function once: an earlier `log` may still be running when this function returns.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_log(
    log: Option<unsafe extern "C-unwind" fn(context: *mut c_void, level: i32, text: *const c_char)>,
    context: *mut c_void,
) -> i32 {
    run(|| {
        listen();
        let earlier = AtomicPtr::new(SINK.load(Ordering::Acquire));
        let sink = Sink { log, context: Context(context), _earlier: earlier };
        SINK.store(Box::into_raw(Box::new(sink)), Ordering::Release);
        Ok(ASHORE_OK)
    })
}

/// Begins to listen to the library, once.
pub fn listen() {
    static ONCE: Once = Once::new();
    // Fails only if this copy of the library is listening already.
    ONCE.call_once(|| drop(tracing::subscriber::set_global_default(Warnings)));
}

/// Writes without the lock of the standard library, which a fork of another thread can leave locked.
fn to_stderr(line: &str) {
    // SAFETY: the bytes of a string. What stderr does not take is lost.
    unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
}

struct Warnings;

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(tracing::level_filters::LevelFilter::WARN)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let Line { message, fields } = line;
        let (level, name) = if *event.metadata().level() == Level::ERROR { (0, "error") } else { (1, "warning") };
        let all = format!("{message}{fields}");
        // SAFETY: null, or made by `ashore_log` and never freed.
        match unsafe { SINK.load(Ordering::Acquire).as_ref() } {
            // SAFETY: the program's function and context.
            Some(Sink { log: Some(log), context, .. }) => unsafe {
                callbacks::log(*log, context.0, level, text(&all).as_ptr())
            },
            _ => to_stderr(&format!("ashore: {name}: {all}\n")),
        }
    }

    // No span of the library affects a line.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a `String` does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}
