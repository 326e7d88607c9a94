//! The devices, and the state of each: its context, memory, streams, events, settings and counts.

use crate::abi::{INVALID_DEVICE, Kind, OUT_OF_MEMORY, Status, handle};
use crate::event::Event;
use crate::memory::{Heap, Window};
use crate::module::Module;
use crate::settings::{Fault, Settings, faults_from_env, number};
use crate::work::{Capture, Graph, PATIENCE, Role, Stream};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// A simulated device with its primary context.
pub struct Device {
    pub ordinal: usize,
    window: OnceLock<Window>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The mutable state, under the device's lock.
pub struct State {
    /// Number of retains of the primary context that were not released.
    pub retained: u32,
    /// The sticky error.
    pub sticky: Option<i32>,
    /// Number of pieces of work that touch memory at this moment.
    pub running: u32,
    pub settings: Settings,
    pub faults: Vec<Fault>,
    pub calls: BTreeMap<&'static str, u64>,
    pub heap: Heap,
    pub streams: BTreeMap<u64, Stream>,
    pub events: BTreeMap<u64, Arc<Event>>,
    pub modules: BTreeMap<u64, Module>,
    pub functions: BTreeMap<u64, &'static crate::kernel::Kernel>,
    pub graphs: BTreeMap<u64, Graph>,
    pub executables: BTreeMap<u64, Graph>,
    pub captures: BTreeMap<u64, Capture>,
    /// Objects that were left when the context ended.
    pub lost: BTreeMap<&'static str, u64>,
    serial: u32,
}

/// All devices, in order.
pub fn all() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| (0..number("devices").unwrap_or(16).min(64) as usize).map(Device::new).collect())
}

pub fn get(ordinal: usize) -> Status<&'static Device> {
    all().get(ordinal).ok_or(INVALID_DEVICE)
}

/// Finds the device whose window contains an address.
pub fn holding(address: u64) -> Option<&'static Device> {
    all().iter().find(|d| d.window.get().is_some_and(|w| w.holds(address)))
}

impl Device {
    fn new(ordinal: usize) -> Self {
        let state = State {
            retained: 0,
            sticky: None,
            running: 0,
            settings: Settings::from_env(ordinal),
            faults: faults_from_env(),
            calls: BTreeMap::new(),
            heap: Heap::default(),
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            graphs: BTreeMap::new(),
            executables: BTreeMap::new(),
            captures: BTreeMap::new(),
            lost: BTreeMap::new(),
            serial: 0,
        };
        Self { ordinal, window: OnceLock::new(), state: Mutex::new(state), changed: Condvar::new() }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all threads that wait for a change.
    pub fn changed(&self) {
        self.changed.notify_all();
    }

    /// Waits for a change, at most `at_most`.
    pub fn wait<'s>(&self, state: MutexGuard<'s, State>, at_most: Duration) -> MutexGuard<'s, State> {
        self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Waits, after a sticky error, until no work touches memory any more, because a caller that learns of
    /// the error may unmap its memory.
    pub fn stopped(&self) {
        let mut state = self.state();
        while state.sticky.is_some() && state.running > 0 {
            state = self.wait(state, PATIENCE);
        }
    }

    /// The address window of this device, mapped at first use.
    pub fn window(&self) -> Status<&Window> {
        if self.window.get().is_none() {
            let window = Window::new(number("span_gb").unwrap_or(64).max(1) << 30)?;
            // If another thread was faster, its window is used. Ours stays mapped and unused.
            let _ = self.window.set(window);
        }
        self.window.get().ok_or(OUT_OF_MEMORY)
    }

    pub fn retain(&self) -> Status<u64> {
        self.window()?;
        let mut state = self.state();
        state.retained += 1;
        Ok(handle(Kind::Context, self.ordinal, 1))
    }

    /// Releases the context. The last release destroys everything left in the context.
    pub fn release(&self) -> Status {
        let mut state = self.state();
        state.retained = state.retained.checked_sub(1).ok_or(crate::abi::INVALID_CONTEXT)?;
        if state.retained == 0 {
            for (what, count) in state.live(self.ordinal) {
                *state.lost.entry(what).or_default() += count;
            }
            state.clear(self.window()?);
        }
        drop(state);
        self.changed();
        Ok(())
    }

    /// Resets the device: nothing is allocated, there is no error, no counts, and settings are as at start.
    /// The context stays retained as often as it was.
    pub fn reset(&self) -> Status {
        let window = self.window()?;
        let mut state = self.state();
        state.clear(window);
        state.lost.clear();
        state.calls.clear();
        state.settings = Settings::from_env(self.ordinal);
        state.faults = faults_from_env();
        drop(state);
        self.changed();
        for range in crate::host::ranges().iter().filter(|r| r.ordinal == self.ordinal) {
            let _ = crate::host::release(range.start, range.owned);
        }
        Ok(())
    }
}

impl State {
    pub fn serial(&mut self, kind: Kind, ordinal: usize) -> u64 {
        self.serial += 1;
        handle(kind, ordinal, self.serial)
    }

    /// Fails with the sticky error, if there is one.
    pub fn healthy(&self) -> Status {
        self.sticky.map_or(Ok(()), Err)
    }

    /// Counts objects that were not released, by name.
    pub fn live(&self, ordinal: usize) -> BTreeMap<&'static str, u64> {
        let pinned = crate::host::ranges().into_iter().filter(|r| r.ordinal == ordinal);
        let (owned, registered): (Vec<_>, Vec<_>) = pinned.partition(|r| r.owned);
        let mine = |s: &&Stream| !s.destroyed && matches!(s.role, Role::Blocking | Role::NonBlocking);
        let user_streams = self.streams.values().filter(mine).count();
        BTreeMap::from([
            ("bytes", self.heap.used),
            ("blocks", self.heap.blocks().count() as u64),
            ("host", owned.len() as u64),
            ("registered", registered.len() as u64),
            ("streams", user_streams as u64),
            ("events", self.events.len() as u64),
            ("modules", self.modules.len() as u64),
            ("graphs", (self.graphs.len() + self.executables.len()) as u64),
        ])
    }

    fn clear(&mut self, window: &Window) {
        self.sticky = None;
        self.heap.clear(window);
        for stream in self.streams.values_mut() {
            stream.close();
        }
        self.events.clear();
        self.modules.clear();
        self.functions.clear();
        self.graphs.clear();
        self.executables.clear();
        self.captures.clear();
    }
}
