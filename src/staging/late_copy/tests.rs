//! Tests of the state table, and of every interleaving of two threads that use a late copy.

/// Kernels that a test controls, and a save on their device.
pub mod fixtures {
    use super::super::*;
    use crate::call_thread::CallThread;
    use crate::completion::Signal;
    use crate::error::Error;
    use crate::ticket::{Extent, Issue};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    /// F, if the kernels tell it, and whether they have run.
    #[derive(Default)]
    pub struct Told {
        pub first: Option<usize>,
        pub over: AtomicBool,
    }

    impl FenceKernels for Told {
        fn follow(&self, _: &[DeviceStream]) -> Result<()> {
            Ok(())
        }
        fn over(&self) -> bool {
            self.over.load(Ordering::Relaxed)
        }
        fn latched(&self) -> Option<usize> {
            self.first.filter(|_| self.over())
        }
    }

    impl DeviceLateCopy for Arc<Told> {
        fn gather(&self, _: usize) -> Result<u64> {
            Err(Error::internal("nothing is gathered"))
        }
        fn publish(&self, _: u64) -> Result<()> {
            Ok(())
        }
        fn launch(&self, _: &[DeviceStream], _: &Dependency, _: bool, _: &[u64]) -> Result<Launch> {
            Ok(Launch { kernels: self.clone(), queued: Ok(()) })
        }
        fn check(&self) -> Result<()> {
            Ok(())
        }
    }

    pub fn late_copy(device: Box<dyn DeviceLateCopy>) -> LateCopy {
        let (dependency, gathered): (Dependency, _) = (Arc::new(()), Vec::new());
        LateCopy::new(Planned {
            device,
            dependency,
            ordinal: 0,
            gathered,
            spans: false,
            slotted: true,
            base: 0,
            host: 0,
        })
    }

    pub fn ticket(chunks: usize) -> Arc<Ticket> {
        let (now, attempt) = (Instant::now(), Default::default());
        let deadline = now + Duration::from_secs(600);
        let issue = Issue { step: 1, attempt, deadline, grace: Duration::ZERO };
        let signal = Arc::new(Signal::default());
        let ticket = Ticket::new(issue, now, signal.clone(), Arc::new(CallThread::new(signal)));
        ticket.begin(Extent { chunks, ..Extent::default() });
        Arc::new(ticket)
    }
}

#[cfg(not(loom))]
mod cases {
    use super::super::*;
    use super::fixtures::{Told, late_copy, ticket};
    use std::sync::atomic::Ordering;

    type Event = (&'static str, fn(&LateCopy, &Arc<Told>, &Ticket));

    const EVENTS: [Event; 9] = [
        ("reserve", |late_copy, _, _| {
            _ = late_copy.reserve(Slots { first: 1, held: vec![Some((7, 4096)), Some((5, 8192))] });
        }),
        ("freeze", |late_copy, _, _| late_copy.freeze()),
        ("give_up", |late_copy, _, _| _ = late_copy.give_up()),
        ("launch", |late_copy, _, ticket| _ = late_copy.launch(ticket)),
        ("set_kernels", |late_copy, told, _| late_copy.set_kernels(told.clone())),
        ("latched", |late_copy, told, _| {
            told.over.store(true, Ordering::Relaxed);
            _ = late_copy.latched();
            told.over.store(false, Ordering::Relaxed);
        }),
        ("withdraw", |late_copy, _, _| _ = late_copy.withdraw()),
        ("end", |late_copy, _, _| late_copy.end()),
        ("reap", |late_copy, _, _| _ = late_copy.reap(true)),
    ];

    /// A state, the events that lead to it, and the events that lead out of it. Other events change nothing.
    type Row = (&'static str, &'static [&'static str], &'static [(&'static str, &'static str)]);

    const TABLE: [Row; 9] = [
        ("open", &[], &[("reserve", "reserved"), ("withdraw", "withdrawn"), ("end", "done")]),
        (
            "reserved",
            &["reserve"],
            &[
                ("freeze", "reserved, frozen"),
                ("give_up", "open"),
                ("launch", "launched"),
                ("withdraw", "withdrawn"),
                ("end", "done"),
            ],
        ),
        (
            "reserved, frozen",
            &["reserve", "freeze"],
            &[("give_up", "open"), ("launch", "launched, frozen"), ("withdraw", "withdrawn"), ("end", "done")],
        ),
        ("launched", &["reserve", "launch"], &[("give_up", "open"), ("set_kernels", "launched, with kernels")]),
        (
            "launched, frozen",
            &["reserve", "freeze", "launch"],
            &[("give_up", "open"), ("set_kernels", "launched, with kernels, frozen")],
        ),
        ("launched, with kernels", &["reserve", "launch", "set_kernels"], &[("latched", "latched")]),
        ("latched", &["reserve", "launch", "set_kernels", "latched"], &[("reap", "done")]),
        ("withdrawn", &["withdraw"], &[]),
        ("done", &["reserve", "launch", "set_kernels", "latched", "reap"], &[]),
    ];

    fn run(path: &[&str], late_copy: &LateCopy, told: &Arc<Told>) {
        for name in path {
            let (_, event) = EVENTS.iter().find(|(known, _)| known == name).expect("an event of the table");
            event(late_copy, told, &ticket(3));
        }
    }

    #[test]
    fn every_event_in_every_state_leads_where_the_table_says() {
        for (state, path, ways) in TABLE {
            for (event, _) in EVENTS {
                let told = Arc::new(Told { first: Some(2), ..Told::default() });
                let late_copy = late_copy(Box::new(told.clone()));
                run(path, &late_copy, &told);
                assert_eq!(format!("{late_copy:?}"), format!("LateCopy({state})"));
                run(&[event], &late_copy, &told);
                let to = ways.iter().find(|(known, _)| *known == event).map_or(state, |(_, to)| to);
                assert_eq!(format!("{late_copy:?}"), format!("LateCopy({to})"), "{event} when {state}");
            }
        }
    }

    #[test]
    fn chunks_are_queued_from_live_memory_until_it_is_frozen_or_f_is_told() {
        for (state, path, _) in TABLE {
            let told = Arc::new(Told { first: Some(2), ..Told::default() });
            let late_copy = late_copy(Box::new(told.clone()));
            run(path, &late_copy, &told);
            let live = ["open", "reserved", "launched", "launched, with kernels"].contains(&state);
            assert_eq!(
                (late_copy.decide().is_some(), late_copy.frozen()),
                (live, state.ends_with("frozen")),
                "{state}"
            );
        }
    }

    #[test]
    fn slots_are_free_when_f_is_told_and_their_chunks_are_before_it_or_handed_over() {
        let told = Arc::new(Told { first: Some(2), ..Told::default() });
        let late_copy = late_copy(Box::new(told.clone()));
        run(&["reserve", "launch", "set_kernels"], &late_copy, &told);
        // Chunks 1 and 2 have slots 7 and 5; before F is told, none of them is free.
        assert_eq!((late_copy.hand_over(0), late_copy.reap(false)), (vec![], (vec![], false)));
        told.over.store(true, Ordering::Relaxed);
        assert_eq!(late_copy.reap(false), (vec![7], false));
        assert_eq!((late_copy.location(1), late_copy.location(2)), (None, Some((0, 8192))));
        assert_eq!((late_copy.hand_over(2), late_copy.reap(true)), (vec![5], (vec![], true)));
    }

    #[test]
    fn slots_of_kernels_that_were_refused_in_part_are_free_when_the_save_is_staged_and_the_rest_has_run() {
        let told = Arc::new(Told::default());
        let late_copy = late_copy(Box::new(told.clone()));
        run(&["reserve", "launch", "set_kernels", "end"], &late_copy, &told);
        assert_eq!((late_copy.pending(), late_copy.reap(true)), (true, (vec![], false)));
        told.over.store(true, Ordering::Relaxed);
        assert_eq!((late_copy.reap(false), late_copy.reap(true)), ((vec![], false), (vec![7, 5], true)));
        assert_eq!((late_copy.pending(), format!("{late_copy:?}")), (false, "LateCopy(done)".into()));
    }

    #[test]
    fn no_kernels_are_launched_for_a_save_that_has_failed() {
        let (told, failed) = (Arc::new(Told::default()), ticket(3));
        let late_copy = late_copy(Box::new(told.clone()));
        run(&["reserve"], &late_copy, &told);
        assert!(failed.fail(crate::Error::internal("it failed")));
        assert_eq!(late_copy.launch(&failed), None);
        assert_eq!((late_copy.give_up(), format!("{late_copy:?}")), (vec![7, 5], "LateCopy(open)".into()));
    }
}

#[cfg(loom)]
mod models {
    use super::super::*;
    use super::fixtures::{Told, late_copy, ticket};
    use loom::sync::Arc as Shared;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread;

    fn reserved() -> Shared<LateCopy> {
        let late_copy = late_copy(Box::new(Arc::new(Told::default())));
        assert!(late_copy.reserve(Slots { first: 0, held: vec![Some((0, 4096))] }).is_ok());
        Shared::new(late_copy)
    }

    #[test]
    fn nothing_is_queued_from_live_memory_once_it_is_frozen() {
        loom::model(|| {
            let (late_copy, freed) = (reserved(), Shared::new(AtomicBool::new(false)));
            let (stager, theirs) = (late_copy.clone(), freed.clone());
            let stager = thread::spawn(move || {
                for _ in 0..2 {
                    if let Some(decided) = stager.decide() {
                        assert!(!theirs.load(Ordering::SeqCst));
                        thread::yield_now();
                        assert!(!theirs.load(Ordering::SeqCst), "freed while a chunk is being queued");
                        drop(decided);
                    }
                }
            });
            late_copy.freeze();
            freed.store(true, Ordering::SeqCst);
            stager.join().unwrap();
        });
    }

    #[test]
    fn a_save_ends_before_its_kernels_are_launched_or_sees_them() {
        loom::model(|| {
            let (late_copy, freed) = (reserved(), Shared::new(AtomicBool::new(false)));
            let (stager, theirs) = (late_copy.clone(), freed.clone());
            let stager = thread::spawn(move || {
                stager.end();
                if !stager.pending() {
                    theirs.store(true, Ordering::SeqCst);
                }
            });
            if late_copy.launch(&ticket(1)).is_some() {
                assert!(!freed.load(Ordering::SeqCst));
                late_copy.set_kernels(Arc::new(Told::default()));
                assert!(!freed.load(Ordering::SeqCst), "kernels read sources that are dropped");
            }
            stager.join().unwrap();
        });
    }
}
