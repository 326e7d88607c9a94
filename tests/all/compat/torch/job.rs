//! The executors of a job of several ranks, as threads of one process, over the all-gather of a process
//! group.

use crate::compat::engine;
use ashore::compat::torch::{ProcessGroup, ThreadExecutor, ThreadGroup, coordinator};
use ashore::{CheckpointExecutor, Result};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

pub struct Job {
    pub ranks: Vec<ThreadExecutor>,
    pub groups: Vec<Arc<Counting>>,
}

/// A process group that keeps the messages of its rank.
pub struct Counting {
    group: Arc<ThreadGroup>,
    pub sent: Mutex<Vec<Vec<u8>>>,
    /// Runs after every all-gather of this rank until it returns true.
    pub after: Mutex<Option<Hook>>,
}

pub type Hook = Box<dyn FnMut() -> bool + Send>;

impl ProcessGroup for Counting {
    fn rank(&self) -> u32 {
        self.group.rank()
    }

    fn world_size(&self) -> u32 {
        self.group.world_size()
    }

    fn all_gather(&self, message: Vec<u8>, deadline: Instant) -> Result<Vec<Vec<u8>>> {
        self.sent.lock().unwrap().push(message.clone());
        let gathered = self.group.all_gather(message, deadline);
        let mut after = self.after.lock().unwrap();
        if after.as_mut().is_some_and(|hook| hook()) {
            *after = None;
        }
        gathered
    }
}

impl Job {
    pub fn start(root: &Path, world: u32) -> Self {
        let groups: Vec<_> = ThreadGroup::new(world)
            .into_iter()
            .map(|group| Arc::new(Counting { group, sent: Mutex::default(), after: Mutex::default() }))
            .collect();
        let build = |group: &Arc<Counting>| -> Result<CheckpointExecutor> {
            engine(root).ranks(Arc::new(coordinator(group.clone())?)).run("test").build()
        };
        let engines: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = groups.iter().map(|group| scope.spawn(|| build(group).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let ranks = engines.into_iter().map(|engine| ThreadExecutor::new(Arc::new(engine)).unwrap()).collect();
        Self { ranks, groups }
    }

    /// Calls `work` for each rank, all at once.
    pub fn each<T: Send>(&self, work: impl Fn(usize, &ThreadExecutor, Arc<Counting>) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let ranks = self.ranks.iter().zip(&self.groups).enumerate();
            let threads: Vec<_> = ranks
                .map(|(rank, (executor, group))| scope.spawn(move || work(rank, executor, group.clone())))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }
}
