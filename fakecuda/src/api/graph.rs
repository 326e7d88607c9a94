//! Capture and graphs.

use crate::abi::{CAPTURE_IMPLICIT, INVALID_HANDLE, Kind, ordinal_of, put, take};
use crate::capture::exchange_mode;
use crate::device::get;
use crate::exported::export;
use crate::stream::{enqueue, find};

export! {
    context fn cuStreamBeginCapture_v2(stream: u64, mode: i32) {
        let (device, id) = find(stream)?;
        device.state().begin_capture(device.ordinal, id, mode)
    }

    context fn cuStreamEndCapture(stream: u64, graph: *mut u64) {
        let (device, id) = find(stream)?;
        let mut state = device.state();
        put(graph, 0)?;
        let captured = state.end_capture(id)?;
        let id = state.serial(Kind::Graph, device.ordinal);
        state.graphs.insert(id, captured);
        put(graph, id)
    }

    context fn cuStreamIsCapturing(stream: u64, status: *mut u32) {
        let (device, id) = find(stream)?;
        let state = device.state();
        if stream < 2 && !state.captures_of_blocking_streams().is_empty() {
            return Err(CAPTURE_IMPLICIT);
        }
        put(status, state.capture_status(id))
    }

    init fn cuThreadExchangeStreamCaptureMode(mode: *mut i32) {
        let new = take(mode, 1)?[0];
        put(mode, exchange_mode(new)?)
    }

    context fn cuGraphInstantiateWithFlags(executable: *mut u64, graph: u64, _flags: u64) {
        let device = get(ordinal_of(Kind::Graph, graph)?)?;
        let mut state = device.state();
        let captured = state.graphs.get(&graph).ok_or(INVALID_HANDLE)?.clone();
        let id = state.serial(Kind::Executable, device.ordinal);
        state.executables.insert(id, captured);
        put(executable, id)
    }

    context fn cuGraphLaunch(executable: u64, stream: u64) {
        let device = get(ordinal_of(Kind::Executable, executable)?)?;
        let work = device.state().executables.get(&executable).ok_or(INVALID_HANDLE)?.clone();
        work.into_iter().try_for_each(|work| enqueue(stream, work, false))
    }

    context fn cuGraphUpload(executable: u64, stream: u64) {
        let device = get(ordinal_of(Kind::Executable, executable)?)?;
        device.state().executables.get(&executable).ok_or(INVALID_HANDLE)?;
        find(stream).map(drop)
    }

    context fn cuGraphDestroy(graph: u64) {
        let device = get(ordinal_of(Kind::Graph, graph)?)?;
        device.state().graphs.remove(&graph).map(drop).ok_or(INVALID_HANDLE)
    }

    context fn cuGraphExecDestroy(executable: u64) {
        let device = get(ordinal_of(Kind::Executable, executable)?)?;
        device.state().executables.remove(&executable).map(drop).ok_or(INVALID_HANDLE)
    }
}
