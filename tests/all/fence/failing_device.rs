//! A failing device fails the saves that it was copying, and nothing else.

use crate::fixtures::executor::{LONG, eventually, fixture, one, pattern};
use ashore::{CheckpointExecutor, DeviceChoice, DeviceStream, ErrorKind, Phase, Save, Source};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Weak};

#[test]
fn a_copy_that_fails_now_or_later_fails_the_save_and_returns_all_slabs() {
    for n in 1..=8 {
        for later in [false, true] {
            let fixture = fixture(|b| b);
            let tensor = Arc::new(pattern(n, 30_000));
            if later {
                fixture.device.fail_when_run(n);
            } else {
                fixture.device.fail_when_queued(n);
            }
            let save = fixture.executor.save(1, one("t", tensor.clone())).unwrap();
            fixture.executor.fence().unwrap();
            assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Device, "copy {n} later {later}");
            assert_eq!(Arc::strong_count(&tensor), 1);
            fixture.slabs_returned();
            assert_eq!(
                fixture.executor.save(2, one("t", tensor.clone())).unwrap().wait(LONG).unwrap_err().kind(),
                ErrorKind::Device
            );
            fixture.device.heal();
            fixture.executor.save(3, one("t", tensor.clone())).unwrap().wait(LONG).unwrap();
            assert!(fixture.checkpoint(1).is_err());
            assert_eq!(fixture.checkpoint(3).unwrap().read("t").unwrap(), *tensor);
            let device = fixture.device.clone();
            fixture.executor.shutdown(LONG).unwrap();
            drop(fixture.executor);
            eventually("the arena is unregistered", || device.registered() == 0);
        }
    }
}

#[test]
fn a_save_that_was_staged_commits_after_the_device_has_failed() {
    let fixture = fixture(|b| b);
    let tensor = Arc::new(pattern(1, 12_000));
    let save = fixture.executor.save(1, one("t", tensor.clone())).unwrap();
    save.staged().wait(LONG).unwrap();
    fixture.device.fail_when_queued(1);
    let failing = fixture.executor.save(2, one("t", tensor.clone())).unwrap();
    save.wait(LONG).unwrap();
    failing.wait(LONG).unwrap_err();
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), *tensor);
}

#[test]
fn a_cancelled_save_ends_without_a_trace() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 30_000)))).unwrap();
    eventually("staging", || save.progress().phase == Phase::Staging && fixture.device.queued() == 2);
    assert!(save.cancel());
    assert!(!save.cancel());
    fixture.device.release();
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    fixture.slabs_returned();
    assert!(fixture.storage.list().unwrap().is_empty());
    fixture.executor.save(2, one("t", Arc::new(pattern(2, 30_000)))).unwrap().wait(LONG).unwrap();
}

#[test]
fn a_source_that_panics_or_keeps_its_bytes_fails_the_save_by_name() {
    struct Odd(bool);
    #[expect(unsafe_code, reason = "a source that breaks its contract in a harmless way")]
    // SAFETY: it never hands out a pointer.
    unsafe impl Source for Odd {
        fn layout(&self) -> ashore::Layout {
            ashore::Layout::new(ashore::Dtype::U8, [10])
        }
        fn location(&self) -> ashore::MemoryLocation {
            ashore::MemoryLocation::Host { bytes: 10, writable: false }
        }
        fn read(&self, _: &mut dyn FnMut(*const u8)) {
            assert!(!self.0, "a source that panics");
        }
    }
    let fixture = fixture(|b| b);
    let error = fixture.executor.save(1, one("kept", Odd(false))).unwrap().wait(LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("kept"), "{error}");
    let error = fixture.executor.save(2, one("odd", Odd(true))).unwrap().wait(LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    fixture.slabs_returned();
    fixture.executor.save(3, one("t", Arc::new(pattern(2, 30_000)))).unwrap().wait(LONG).unwrap();
}

/// The sources of a refused save were dropped under the lock of the call of `save`, and a drop that saved
/// waited for itself.
#[test]
fn a_source_of_a_refused_save_may_save_when_it_is_dropped() {
    struct Saving(Weak<CheckpointExecutor>, Sender<ashore::Result<Save>>);
    #[expect(unsafe_code, reason = "a source in memory of a GPU that the executor refuses")]
    // SAFETY: it never hands out a pointer, and no driver sees the stream.
    unsafe impl Source for Saving {
        fn layout(&self) -> ashore::Layout {
            ashore::Layout::new(ashore::Dtype::U8, [10])
        }
        fn location(&self) -> ashore::MemoryLocation {
            // SAFETY: no driver sees it.
            ashore::MemoryLocation::Device { bytes: 10, stream: unsafe { DeviceStream::new(0, 1) } }
        }
        fn read(&self, _: &mut dyn FnMut(*const u8)) {}
    }
    impl Drop for Saving {
        fn drop(&mut self) {
            let Some(executor) = self.0.upgrade() else { return };
            self.1.send(executor.save(2, one("t", Arc::new(pattern(2, 100))))).unwrap();
        }
    }
    let root = tempfile::tempdir().unwrap();
    let builder = CheckpointExecutor::builder(root.path()).device(DeviceChoice::Host).arena(1 << 20).chunk(4096);
    let executor = Arc::new(builder.build().unwrap());
    let (send, saved) = channel();
    let source = Saving(Arc::downgrade(&executor), send);
    let saving = executor.clone();
    let refused = std::thread::spawn(move || saving.save(1, one("gpu", source)).map(drop));
    saved.recv_timeout(LONG).unwrap().unwrap().wait(LONG).unwrap();
    assert_eq!(refused.join().unwrap().unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(executor.latest().unwrap().unwrap().step(), 2);
}
