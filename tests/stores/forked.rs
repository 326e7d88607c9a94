//! A forked child has no threads that answer requests: it is refused, and does not hang.

use super::{NAME, begun, faulty, over, published};
use ashore::ErrorKind;
use ashore::storage::Storage;

#[test]
#[expect(unsafe_code, reason = "fork, and _exit in the child")]
fn a_forked_child_is_refused_at_once_and_the_parent_goes_on() {
    let store = faulty();
    let storage = over(&store);
    let (attempt, writing) = begun(&storage, NAME, false);
    // SAFETY: the child calls what it is here to call, touches no lock of another thread's, and ends with
    // _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let invalid = |r: ashore::Result<()>| r.is_err_and(|e| e.kind() == ErrorKind::Invalid);
        let refused = [
            invalid(storage.list().map(drop)),
            invalid(writing.put("late", b"bytes")),
            invalid(writing.publish(false)),
            invalid(storage.remove(NAME)),
        ];
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(if refused == [true; 4] { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child was let in");
    writing.publish(false).unwrap();
    assert_eq!(published(&store, NAME), Some(attempt));
}
