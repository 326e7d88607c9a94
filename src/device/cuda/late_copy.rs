//! Late copies: when a stream of the program reaches a fence, kernels copy the chunks that have not left the
//! GPU. The kernels run in that stream, or in a stream of ours where a fence names no stream of this GPU.
//!
//! `fences` has the kernels and their memory.
//!
//! # Safety argument
//! Lists of slots and cells are pinned memory that belongs to one save at a time. The host writes a list
//! before it queues the kernels that read it, and a cell only while no kernel uses it. Lists and cells return
//! to their pools, and the table of pieces is released, only when the kernels of the save have run: dropping
//! [`Launched`] waits for that, and after a timeout leaks everything. The addresses of tensors are those of
//! sources. The stager keeps the sources until F is reported or everything has left the device.
#![expect(unsafe_code, reason = "kernels over memory that outlives them; argument above")]

use super::fences::{Cell, Fence, Latch, List};
use super::gpu::{POLL_INTERVAL, SETTLE_TIMEOUT};
use super::loaded::Loaded;
use super::pooled_event::{PooledEvent, events_of};
use super::table::Table;
use crate::device::{Dependency, DeviceLateCopy, FenceKernels, Launch};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use std::mem::forget;
use std::sync::Arc;
use std::time::Instant;

/// The device's part of one save.
pub(super) struct Save {
    loaded: Arc<Loaded>,
    table: Arc<Table>,
    fence: Option<Fence>,
}

impl Save {
    /// Returns None if too many saves are tracked already. The context must be current.
    pub fn new(loaded: &Arc<Loaded>, number: u64, base: u64, table: Arc<Table>) -> Option<Self> {
        let fence = match &loaded.late_copies {
            Ok(slots) => Some(Fence::new(&slots.fences, number, base, u32::try_from(table.chunks()).ok()?)?),
            // The save is gathered, but gets no late copy.
            Err(_) => None,
        };
        Some(Self { loaded: loaded.clone(), table, fence })
    }

    fn fence(&self) -> Result<&Fence> {
        if let Err(why) = &self.loaded.late_copies {
            return Err(why.clone());
        }
        self.fence.as_ref().ok_or_else(|| Error::internal("a fence on the device for a save that is not copied late"))
    }
}

impl DeviceLateCopy for Save {
    fn gather(&self, chunk: usize) -> Result<u64> {
        // SAFETY: a save, and its table with it, is dropped only when none of its copies is queued any more.
        unsafe { self.loaded.gather(&self.table, chunk) }
    }

    fn publish(&self, watermark: u64) -> Result<()> {
        let (fences, gpu) = (&self.fence()?.cell.fences, &self.loaded.gpu);
        let _entered = gpu.context.enter()?;
        // SAFETY: the address is aligned. The watermark lives as long as the kernels, whose owner waits for
        // the stream before it drops them.
        unsafe { gpu.copies.write(fences.watermark(), watermark) }
    }

    fn refuse_captures(&self, streams: &[DeviceStream]) -> Result<()> {
        self.loaded.shared.refuse_captures(streams)
    }

    fn launch(
        &self,
        stream: Option<DeviceStream>,
        dependency: &Dependency,
        behind_copies: bool,
        slots: &[u64],
    ) -> Result<Launch> {
        let (Fence { cell, latch }, gpu, table) = (self.fence()?, &self.loaded.gpu, &self.table);
        let stream = stream.map_or_else(|| cell.fences.own(), |stream| (&stream).into());
        let _entered = gpu.context.enter()?;
        let memory = cell.fences.list(gpu, size_of_val(slots))?;
        // SAFETY: the memory is large enough for all slots, aligned, and not shared yet.
        unsafe { memory.pointer().cast::<u64>().copy_from_nonoverlapping(slots.as_ptr(), slots.len()) };
        let at = memory.address();
        let list = List { fences: cell.fences.clone(), memory: Some(memory) };
        // Events of this GPU are behind the work that wrote the kernels' input.
        let ours = |event: &&PooledEvent| event.context().ordinal == gpu.context.ordinal;
        for event in events_of(dependency)?.iter().filter(ours) {
            event.make_wait(stream)?;
        }
        table.arrive(stream)?;
        let after = gpu.event()?;
        if behind_copies {
            let event = gpu.event()?;
            event.record(gpu.copies.handle())?;
            event.make_wait(stream)?;
        }
        let latch = Latch { base: if mutant::on(Mutant::Watermark) { 0 } else { latch.base }, ..*latch };
        let arguments = (table.pieces(), table.views(), table.begins(), at, latch.chunks - slots.len() as u32);
        let (loaded, table) = (self.loaded.clone(), table.clone());
        let mut launched = Launched { whole: false, after, list: Some(list), cell: cell.clone(), table, loaded };
        // From here on work may be queued, even if a later call fails.
        let queued = cell.fences.queue(gpu, stream, cell.index, &latch, arguments);
        let recorded = launched.after.insist(stream);
        let queued = queued.and(recorded);
        launched.whole = queued.is_ok();
        let queued = queued.map_err(|error| error.with_kind(ErrorKind::Device));
        Ok(Launch { kernels: Arc::new(launched), queued })
    }

    fn check(&self) -> Result<()> {
        self.loaded.gpu.context.alive()
    }
}

/// The queued kernels of a fence, and what they use.
struct Launched {
    /// True if all kernels were queued.
    whole: bool,
    /// An event behind the kernels.
    after: PooledEvent,
    list: Option<List>,
    cell: Arc<Cell>,
    table: Arc<Table>,
    loaded: Arc<Loaded>,
}

impl FenceKernels for Launched {
    fn follow(&self, streams: &[DeviceStream]) -> Result<()> {
        self.loaded.shared.refuse_captures(streams)?;
        self.loaded.shared.make_wait(streams, &self.after)
    }

    fn over(&self) -> bool {
        if self.latched().is_some() {
            return true;
        }
        // The query also detects a lost context. The thread that asks need not have used the context before.
        let ended = self.after.is_over();
        self.loaded.gpu.context.lost() || (!self.whole && ended)
    }

    fn latched(&self) -> Option<usize> {
        self.cell.latched()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let context = &self.loaded.gpu.context;
        if self.latched().is_some() || context.alive().is_err() {
            return;
        }
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        while !self.after.is_over() && !context.lost() {
            if Instant::now() >= deadline {
                tracing::error!("kernels of a fence did not end; their memory is leaked");
                forget((self.loaded.clone(), self.table.clone(), self.cell.clone(), self.list.take()));
                return;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}
