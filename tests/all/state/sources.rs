//! Sources over the memory of other owners, and what a state dict refuses.

use crate::fixtures::executor::{Buffer, LONG, fixture, one, pattern};
use crate::fixtures::strided::View;
use ashore::{Dtype, ErrorKind, HostTensor, Layout, StateDict, promise};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// An owner with its bytes in itself. It counts calls, and lends other bytes in a second one.
struct Inline {
    bytes: [u8; 12],
    calls: Arc<AtomicUsize>,
}

impl AsRef<[u8]> for Inline {
    fn as_ref(&self) -> &[u8] {
        if self.calls.fetch_add(1, Ordering::Relaxed) == 0 { &self.bytes[..] } else { &[] }
    }
}

#[test]
fn the_bytes_of_any_owner_are_borrowed_once_and_the_owner_is_dropped_with_its_source() {
    let (fixture, calls) = (fixture(|b| b), Arc::new(AtomicUsize::new(0)));
    let bytes = *b"twelve bytes";
    let tensor = HostTensor::from_owner(Inline { bytes, calls: calls.clone() }, Dtype::F32, [3]);
    let (moved, other) = (Box::new(tensor.clone()), tensor);
    let mut state = StateDict::new();
    state.tensor("moved", *moved).unwrap().tensor("other", other).unwrap();
    assert_eq!(state.bytes(), 24);
    fixture.executor.save(1, state).unwrap().wait(LONG).unwrap();
    fixture.executor.fence().unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("moved").unwrap(), bytes);
    assert_eq!(fixture.checkpoint(1).unwrap().read("other").unwrap(), bytes);
    assert_eq!((calls.load(Ordering::Relaxed), Arc::strong_count(&calls)), (1, 1));
}

#[test]
fn an_owner_of_another_length_is_refused_with_the_name_of_the_tensor() {
    let mut state = StateDict::new();
    for (shape, expected) in [(&[3_usize, 2][..], 24), (&[0], 0), (&[], 4)] {
        let error =
            state.tensor("layer.weight", HostTensor::from_owner(vec![0_u8; 23], Dtype::F32, shape)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let wrong = format!("expected_bytes={expected} found_bytes=23");
        assert!(error.message().contains(&wrong) && error.message().contains("tensor=\"layer.weight\""), "{error}");
    }
    state.tensor("layer.weight", HostTensor::from_owner("eight ch", Dtype::U16, [4])).unwrap();
    assert_eq!(state.len(), 1);
}

/// Every second byte of memory that nothing writes.
struct Halves(Vec<u8>);

#[expect(unsafe_code, reason = "a source at strides that is not writable")]
mod halves {
    use super::Halves;
    use ashore::{Dtype, Layout, MemoryLocation, Source};

    // SAFETY: the vector is owned and never written, and has every second byte.
    unsafe impl Source for Halves {
        fn layout(&self) -> Layout {
            Layout::new(Dtype::U8, [self.0.len() / 2])
        }

        fn location(&self) -> MemoryLocation {
            MemoryLocation::Host { bytes: self.0.len() as u64 / 2, writable: false }
        }

        fn read(&self, copy: &mut dyn FnMut(*const u8)) {
            copy(self.0.as_ptr());
        }

        fn strides(&self) -> Option<&[i64]> {
            Some(&[2])
        }
    }
}

#[test]
fn a_source_of_a_users_own_may_have_strides_but_what_was_promised_is_packed() {
    let (fixture, memory) = (fixture(|b| b), pattern(1, 20_000));
    fixture.executor.save(1, one("t", Halves(memory.clone()))).unwrap().wait(LONG).unwrap();
    let expected: Vec<_> = memory.iter().copied().step_by(2).collect();
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), expected);
    let (promise, promised) = promise(Layout::new(Dtype::U8, [10_000]));
    let save = fixture.executor.save(2, one("t", promised)).unwrap();
    let error = promise.fulfil(Halves(memory)).unwrap_err();
    assert!(error.message().contains("must be packed"), "{error}");
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn strides_that_do_not_fit_their_tensor_are_refused_by_name() {
    let buffer = Buffer::new(pattern(1, 64));
    let refused = |dtype: Dtype, shape: &[usize], strides: &[i64]| {
        let view = View { dtype, shape: shape.into(), strides: strides.into(), first: 0, len: 64 };
        let error = StateDict::new().tensor("t", view.source(&buffer)).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().contains("tensor=\"t\""), "{error}");
        error.message().to_owned()
    };
    for strides in [&[4_i64][..], &[4, 8, 8], &[]] {
        assert!(refused(Dtype::F32, &[2, 2], strides).contains("one for each dimension"), "{strides:?}");
    }
    assert!(refused(Dtype::F4, &[2, 2], &[1, 1]).contains("whole bytes"));
    assert!(refused(Dtype::U8, &[1 << 40, 1 << 40], &[1, 1]).contains("overflow"));
    // Strides of packed elements, and of none.
    for (shape, strides) in [(&[2_usize, 3][..], &[12_i64, 4][..]), (&[1, 3], &[-7, 4]), (&[0, 3], &[1, 1])] {
        let view = View { dtype: Dtype::F32, shape: shape.into(), strides: strides.into(), first: 0, len: 64 };
        assert_eq!(one("t", view.source(&buffer)).len(), 1);
    }
}
