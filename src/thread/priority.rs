//! CPU and I/O priority of a thread.
//!
//! # Safety argument
//! Both calls affect only the calling thread. The only memory of this crate that they touch is a local value
//! that outlives them.
#![expect(unsafe_code, reason = "two system calls without safe bindings")]

use crate::settings::Priority;

const NICE: i32 = 10;
/// `IOPRIO_WHO_PROCESS`, and the lowest level of the best-effort class.
const THIS_THREAD: i32 = 1;
const BEST_EFFORT: i32 = 2 << 13 | 7;

/// Gives the calling thread `priority`. This is best effort: a refusal is logged.
pub(crate) fn adopt(priority: Priority) {
    if priority == Priority::Normal {
        return;
    }
    let report = |what: &str, done: bool| {
        if !done {
            tracing::warn!(error = %std::io::Error::last_os_error(), "a thread keeps its {what}");
        }
    };
    // On Linux this sets the calling thread, not the process.
    report("nice value", rustix::process::setpriority_process(None, NICE).is_ok());
    // SAFETY: all fields of the struct are integers, and zero is the value that batch scheduling requires.
    let parameters = unsafe { std::mem::zeroed::<libc::sched_param>() };
    // SAFETY: see the module.
    report("scheduling", unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &parameters) } == 0);
    // SAFETY: see the module.
    report("I/O priority", unsafe { libc::syscall(libc::SYS_ioprio_set, THIS_THREAD, 0, BEST_EFFORT) } == 0);
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn a_low_priority_is_that_of_its_thread_alone() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let before = nice();
        let inside = std::thread::spawn(move || {
            adopt(Priority::Normal);
            let normal = nice();
            adopt(Priority::Low);
            // SAFETY: reads the policy of the calling thread and touches no memory.
            let batch = unsafe { libc::sched_getscheduler(0) } == libc::SCHED_BATCH;
            // SAFETY: as above.
            let io = unsafe { libc::syscall(libc::SYS_ioprio_get, THIS_THREAD, 0) };
            (normal, nice(), batch, io)
        });
        let inside = inside.join().unwrap();
        assert_eq!(inside, (before, NICE.max(before), true, i64::from(BEST_EFFORT)));
        assert_eq!(nice(), before);
    }
}
