//! Tests of the state table, and of every interleaving of two threads that use a late copy.

/// Kernels that a test controls, and a save on their device.
pub mod fixtures {
    use super::super::*;
    use crate::call_thread::CallThread;
    use crate::completion::Signal;
    use crate::device::{Dependency, DeviceLateCopy, FenceKernels, Launch};
    use crate::error::Error;
    use crate::ticket::{Extent, Issue};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    /// F, if the kernels tell it, and true if the kernels have run.
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
        fn refuse_captures(&self, _: &[DeviceStream]) -> Result<()> {
            Ok(())
        }
        fn launch(&self, _: Option<DeviceStream>, _: &Dependency, _: bool, _: &[u64]) -> Result<Launch> {
            Ok(Launch { kernels: self.clone(), queued: Ok(()) })
        }
        fn check(&self) -> Result<()> {
            Ok(())
        }
    }

    /// A save of three chunks. Each device has a part of the chunks that are listed with it.
    pub fn late_copy(devices: Vec<(Box<dyn DeviceLateCopy>, Vec<usize>)>) -> LateCopy {
        let on = |(at, (device, chunks))| OnOneDevice {
            place: at,
            ordinal: at as u32,
            device,
            gathered: Vec::new(),
            chunks,
        };
        LateCopy::new(Planned {
            chunks: 3,
            devices: devices.into_iter().enumerate().map(on).collect(),
            ordinals: Vec::new(),
            dependency: Arc::new(()),
            slotted: true,
            base: 0,
            host: 0,
        })
    }

    /// A save of three chunks on one device.
    pub fn on_one(device: impl DeviceLateCopy + 'static) -> LateCopy {
        late_copy(vec![(Box::new(device), vec![0, 1, 2])])
    }

    /// The kernels of a fence for a save on one device.
    pub fn kernels(late_copy: &LateCopy) -> Arc<KernelSet> {
        let launched = KernelSet::launch(&late_copy.save, &[DeviceStream::legacy(0)], &[Vec::new()], |_, _| false);
        Arc::new(launched.unwrap().0)
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
    use super::fixtures::{Told, kernels, late_copy, on_one, ticket};
    use crate::device::{Dependency, DeviceLateCopy, Launch};
    use std::sync::atomic::Ordering;

    fn slot(number: u64) -> Slot {
        Slot { device: 0, address: number * 4096 }
    }

    type Event = (&'static str, fn(&LateCopy, &Arc<Told>, &Ticket));

    const EVENTS: [Event; 9] = [
        ("reserve", |late_copy, _, _| {
            _ = late_copy.reserve(vec![Slots { first: 1, held: vec![Some(slot(7)), Some(slot(5))] }]);
        }),
        ("freeze", |late_copy, _, _| late_copy.freeze()),
        ("give_up", |late_copy, _, _| _ = late_copy.give_up()),
        ("launch", |late_copy, _, ticket| _ = late_copy.launch(ticket)),
        ("set_kernels", |late_copy, _, _| late_copy.set_kernels(kernels(late_copy))),
        ("latched", |late_copy, told, _| {
            told.over.store(true, Ordering::Relaxed);
            _ = late_copy.told();
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
                let late_copy = on_one(told.clone());
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
            let late_copy = on_one(told.clone());
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
        let late_copy = on_one(told.clone());
        run(&["reserve", "launch", "set_kernels"], &late_copy, &told);
        // Chunks 1 and 2 have slots 7 and 5. Before F is told, no slot is free.
        assert_eq!((late_copy.hand_over(0), late_copy.reap(false)), (vec![], (vec![], false)));
        told.over.store(true, Ordering::Relaxed);
        assert_eq!(late_copy.reap(false), (vec![slot(7)], false));
        assert_eq!((late_copy.slot(0, 1), late_copy.slot(0, 2)), (None, Some(5 * 4096)));
        assert_eq!((late_copy.hand_over(2), late_copy.reap(true)), (vec![slot(5)], (vec![], true)));
    }

    #[test]
    fn slots_of_kernels_that_were_refused_in_part_are_free_when_the_save_is_staged_and_the_rest_has_run() {
        let told = Arc::new(Told::default());
        let late_copy = on_one(told.clone());
        run(&["reserve", "launch", "set_kernels", "end"], &late_copy, &told);
        assert_eq!((late_copy.pending(), late_copy.reap(true)), (true, (vec![], false)));
        told.over.store(true, Ordering::Relaxed);
        assert_eq!((late_copy.reap(false), late_copy.reap(true)), ((vec![], false), (vec![slot(7), slot(5)], true)));
        assert_eq!((late_copy.pending(), format!("{late_copy:?}")), (false, "LateCopy(done)".into()));
    }

    /// Chunk 0 has a part on the first device, chunk 1 on both, chunk 2 on the second.
    fn on_two(told: [&Arc<Told>; 2]) -> LateCopy {
        let parts = told.map(|told| Box::new(told.clone()) as Box<dyn DeviceLateCopy>).into_iter();
        let late_copy = late_copy(parts.zip([vec![0, 1], vec![1, 2]]).collect());
        let slot = |device, number: u64| Some(Slot { device, address: number * 4096 });
        let slots = vec![
            Slots { first: 0, held: vec![slot(0, 1), slot(0, 2), None] },
            Slots { first: 1, held: vec![slot(1, 3), slot(1, 4)] },
        ];
        late_copy.reserve(slots).unwrap();
        assert_eq!(late_copy.launch(&ticket(3)).unwrap(), [vec![4096, 8192, 0], vec![3 * 4096, 4 * 4096]]);
        let (slots, streams) = ([vec![0; 3], vec![0; 2]], [DeviceStream::legacy(1)]);
        late_copy.set_kernels(Arc::new(KernelSet::launch(&late_copy.save, &streams, &slots, |_, _| false).unwrap().0));
        late_copy
    }

    #[test]
    fn each_part_of_a_chunk_is_judged_by_f_of_its_own_device() {
        use Origin::{Live, Nothing, Slot};
        let told = |first| Arc::new(Told { first: Some(first), ..Told::default() });
        let (first, second) = (told(1), told(2));
        let late_copy = on_two([&first, &second]);
        let origins =
            |told: &super::super::Told| (0..3).map(|chunk| late_copy.origins(chunk, told).to_vec()).collect::<Vec<_>>();
        assert_eq!(late_copy.told()[..], [None, None]);
        assert_eq!(origins(&late_copy.told()), [[Live, Nothing], [Live, Live], [Nothing, Live]]);
        first.over.store(true, Ordering::Relaxed);
        // Live memory of the other device may still be read, and its slots are kept.
        assert_eq!((late_copy.told()[..].to_vec(), late_copy.pending()), (vec![Some(1), None], true));
        assert_eq!(origins(&late_copy.told()), [[Slot, Nothing], [Slot, Live], [Nothing, Live]]);
        assert!(late_copy.decide().is_some());
        let of = |device, number: u64| super::super::Slot { device, address: number * 4096 };
        assert_eq!((late_copy.reap(false), late_copy.hand_over(1)), ((vec![of(0, 1)], false), vec![of(0, 2)]));
        second.over.store(true, Ordering::Relaxed);
        assert_eq!((late_copy.told()[..].to_vec(), late_copy.pending()), (vec![Some(1), Some(2)], false));
        assert!(late_copy.decide().is_none());
        assert_eq!((late_copy.reap(false), late_copy.slot(1, 2)), ((vec![of(1, 3)], false), Some(4 * 4096)));
        assert_eq!((late_copy.hand_over(2), late_copy.reap(true)), (vec![of(1, 4)], (vec![], true)));
    }

    #[test]
    fn slots_are_for_the_last_parts_of_each_device() {
        let on = |chunks| {
            let device = Box::new(Arc::new(Told::default()));
            OnOneDevice { place: 0, ordinal: 0, device, gathered: Vec::new(), chunks }
        };
        // Chunks with a part, the first chunk that may have a slot, free slots, and the first that has one.
        for (chunks, from, free, first) in [
            (vec![0, 1, 2], 0, 3, 0),
            (vec![0, 1, 2], 0, 2, 1),
            (vec![0, 1, 2], 2, 3, 2),
            (vec![0, 1, 2], 0, 0, 3),
            (vec![1, 4], 0, 1, 2),
            (vec![1, 4], 3, 9, 2),
            (vec![1, 4], 9, 9, 5),
            (vec![], 0, 0, 0),
        ] {
            assert_eq!(on(chunks.clone()).first_with_slot(from, free), first, "{chunks:?} {from} {free}");
        }
        let parts = on(vec![1, 4]);
        assert_eq!(
            [0..1, 0..2, 2..4, 2..5, 5..9].map(|chunks| parts.has_any(chunks)),
            [false, true, false, true, false]
        );
    }

    /// A device that refuses once the kernels of another device are queued.
    struct Refusing;

    impl DeviceLateCopy for Refusing {
        fn gather(&self, _: usize) -> Result<u64> {
            Err(crate::Error::internal("nothing is gathered"))
        }
        fn publish(&self, _: u64) -> Result<()> {
            Ok(())
        }
        fn refuse_captures(&self, _: &[DeviceStream]) -> Result<()> {
            Ok(())
        }
        fn launch(&self, _: Option<DeviceStream>, _: &Dependency, _: bool, _: &[u64]) -> Result<Launch> {
            Err(crate::Error::invalid("this device refuses"))
        }
        fn check(&self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn kernels_of_one_device_count_when_another_one_refuses_its_own() {
        let told = Arc::new(Told { first: Some(0), ..Told::default() });
        let streams = [DeviceStream::legacy(0)];
        for refusing_first in [false, true] {
            let mut devices: Vec<(Box<dyn DeviceLateCopy>, _)> =
                vec![(Box::new(told.clone()), vec![0, 1, 2]), (Box::new(Refusing), vec![0, 1, 2])];
            if refusing_first {
                devices.reverse();
            }
            let late_copy = late_copy(devices);
            let launched = KernelSet::launch(&late_copy.save, &streams, &[vec![], vec![]], |_, _| false);
            if refusing_first {
                // Nothing is queued, and the host can wait instead.
                assert_eq!(launched.err().map(|error| error.kind()), Some(crate::ErrorKind::Invalid));
                continue;
            }
            let (kernels, queued) = launched.unwrap();
            assert_eq!((queued.unwrap_err().kind(), kernels.over()), (crate::ErrorKind::Device, false));
            told.over.store(true, Ordering::Relaxed);
            assert_eq!((kernels.told()[..].to_vec(), kernels.over()), (vec![Some(0), None], true));
        }
    }

    #[test]
    fn no_kernels_are_launched_for_a_save_that_has_failed() {
        let (told, failed) = (Arc::new(Told::default()), ticket(3));
        let late_copy = on_one(told.clone());
        run(&["reserve"], &late_copy, &told);
        assert!(failed.fail(crate::Error::internal("it failed")));
        assert_eq!(late_copy.launch(&failed), None);
        assert_eq!((late_copy.give_up(), format!("{late_copy:?}")), (vec![slot(7), slot(5)], "LateCopy(open)".into()));
    }
}

#[cfg(loom)]
mod models {
    use super::super::*;
    use super::fixtures::{Told, kernels, on_one, ticket};
    use loom::sync::Arc as Shared;
    use loom::sync::atomic::{AtomicBool, Ordering};
    use loom::thread;

    fn reserved() -> Shared<LateCopy> {
        let late_copy = on_one(Arc::new(Told::default()));
        let held = vec![Some(Slot { device: 0, address: 4096 })];
        assert!(late_copy.reserve(vec![Slots { first: 2, held }]).is_ok());
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
                late_copy.set_kernels(kernels(&late_copy));
                assert!(!freed.load(Ordering::SeqCst), "kernels read sources that are dropped");
            }
            stager.join().unwrap();
        });
    }
}
