//! The tables of a step, read from its storage. Over a network, one read fetches a whole stretch of a table,
//! because the next lookups are often in the same stretch.

use crate::error::Result;
use crate::format::index::Medium;
use crate::format::table::Source;
use crate::storage::{FileReading, Reading};
use foldhash::fast::FixedState;
use lru::LruCache;
use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a table that one request fetches, called a stretch. Their transfer takes no longer than the
/// request.
const AHEAD: u64 = 1 << 20;

/// Maximum number of stretches that an open step keeps, over all its tables.
const KEPT: NonZeroUsize = NonZeroUsize::new(16).expect("not zero");

/// Stretches of tables that were read ahead, by the number of the table and the offset in it.
type Ahead = LruCache<(usize, u64), Arc<[u8]>, FixedState>;

/// The directory in which the tables of a step are opened.
pub(super) struct Directory {
    reading: Arc<dyn Reading>,
    path: PathBuf,
    ahead: Arc<Mutex<Ahead>>,
    opened: AtomicUsize,
}

impl Directory {
    pub fn new(reading: Arc<dyn Reading>, path: &Path) -> Self {
        let ahead = Arc::new(Mutex::new(LruCache::with_hasher(KEPT, FixedState::default())));
        Self { reading, path: path.into(), ahead, opened: 0.into() }
    }
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Directory({})", self.path.display())
    }
}

impl Medium for Directory {
    fn table(&self, name: &str) -> Result<Arc<dyn Source>> {
        let path = self.path.join(name);
        let file = self.reading.open(name).map_err(|error| error.with_path(&path))?;
        let access = self.reading.access();
        let number = self.opened.fetch_add(1, Ordering::Relaxed);
        let ahead = access.read.map(|_| (number, self.ahead.clone()));
        Ok(Arc::new(TableFile { file, path, again: access.again, ahead }))
    }
}

/// The file of a table.
struct TableFile {
    file: Arc<dyn FileReading>,
    path: PathBuf,
    again: bool,
    /// The number of the table, and the stretches that were read ahead. None where short reads cost little.
    ahead: Option<(usize, Arc<Mutex<Ahead>>)>,
}

impl fmt::Debug for TableFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TableFile({})", self.path.display())
    }
}

impl TableFile {
    /// Returns the stretch that begins at `start`. Reads it if it is not kept.
    fn stretch(&self, number: usize, ahead: &Mutex<Ahead>, start: u64) -> Result<Arc<[u8]>> {
        let lock = || ahead.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = lock().get(&(number, start)) {
            return Ok(bytes.clone());
        }
        let mut bytes = vec![0; self.file.len().saturating_sub(start).min(AHEAD) as usize];
        self.file.read_at(start, &mut bytes)?;
        let bytes = Arc::<[u8]>::from(bytes);
        lock().put((number, start), bytes.clone());
        Ok(bytes)
    }
}

impl Source for TableFile {
    fn length(&self) -> u64 {
        self.file.len()
    }

    fn fill(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let inside = offset.checked_add(buffer.len() as u64).is_some_and(|end| end <= self.file.len());
        let (Some((number, ahead)), true) = (&self.ahead, inside && (buffer.len() as u64) < AHEAD) else {
            return self.file.read_at(offset, buffer);
        };
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let start = at - at % AHEAD;
            let bytes = self.stretch(*number, ahead, start)?;
            let from = bytes.get((at - start) as usize..).unwrap_or_default();
            let (now, later) = rest.split_at_mut(from.len().min(rest.len()));
            if now.is_empty() {
                return self.file.read_at(at, later);
            }
            now.copy_from_slice(&from[..now.len()]);
            (at, rest) = (at + now.len() as u64, later);
        }
        Ok(())
    }

    fn again(&self) -> bool {
        if let Some((number, ahead)) = &self.ahead {
            let mut ahead = ahead.lock().unwrap_or_else(PoisonError::into_inner);
            let mine: Vec<_> = ahead.iter().map(|(key, _)| *key).filter(|(of, _)| of == number).collect();
            mine.iter().for_each(|key| _ = ahead.pop(key));
        }
        self.again
    }

    fn path(&self) -> PathBuf {
        self.path.clone()
    }
}
