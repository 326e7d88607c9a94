//! Chooses which saves a trace of limited size shows chunk by chunk.

/// The maximum size of a trace.
const FILE_MAX: u64 = 64 << 20;
/// The bytes of it for chunks. One half is for each Nth save, the other for the slowest saves so far.
const CHUNKS_MAX: u64 = 32 << 20;
/// How many times the distance between saves with chunks doubles before that half is used up.
const DOUBLINGS: u64 = 8;
/// The bytes kept for the ends of saves that have begun, and for the last line.
const RESERVE: u64 = 64 << 10;

/// The used part of a trace.
#[derive(Debug)]
pub(super) struct Budget {
    /// The limits. A test makes them small.
    file: u64,
    chunks: u64,
    reserve: u64,
    /// Bytes in the file.
    pub used: u64,
    /// Bytes of chunks: of each Nth save, and of slow saves.
    regular: u64,
    slow: u64,
    saves: u64,
    /// The longest save so far, in microseconds.
    longest: u64,
}

/// Why a save is written chunk by chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunks {
    Regular,
    Slow,
}

impl Default for Budget {
    fn default() -> Self {
        Self::of(FILE_MAX, CHUNKS_MAX, RESERVE)
    }
}

impl Budget {
    pub fn of(file: u64, chunks: u64, reserve: u64) -> Self {
        Self { file, chunks, reserve, used: 0, regular: 0, slow: 0, saves: 0, longest: 0 }
    }

    /// Whether `bytes` fit. With `reserved`, for the end of a save or the last line, the reserve may be used,
    /// too.
    pub fn fits(&self, bytes: u64, reserved: bool) -> bool {
        let limit = if reserved { self.file } else { self.file - self.reserve };
        self.used.saturating_add(bytes) <= limit
    }

    /// Decides whether to show the chunks of the next save, which took `micros`. The chunks need at most
    /// `bytes`.
    pub fn chunks(&mut self, micros: u64, bytes: u64) -> Option<Chunks> {
        let half = self.chunks / 2;
        let distance = 1 << (self.regular * DOUBLINGS / half).min(DOUBLINGS);
        let regular = self.saves.is_multiple_of(distance) && self.regular + bytes <= half;
        let slow = micros > self.longest && self.slow + bytes <= half;
        self.saves += 1;
        self.longest = self.longest.max(micros);
        match (regular, slow) {
            (true, _) => Some(Chunks::Regular),
            (false, true) => Some(Chunks::Slow),
            (false, false) => None,
        }
    }

    /// Counts the bytes that the chunks of a save needed.
    pub fn spent(&mut self, of: Chunks, bytes: u64) {
        match of {
            Chunks::Regular => self.regular += bytes,
            Chunks::Slow => self.slow += bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_of_the_first_saves_of_each_nth_one_and_of_the_slowest() {
        let mut budget = Budget::of(1 << 20, 2 * 800, 0);
        let mut with_chunks = Vec::new();
        for save in 0..1000 {
            let micros = if save == 900 { 50 } else { 10 };
            if let Some(why) = budget.chunks(micros, 10) {
                budget.spent(why, 10);
                with_chunks.push((save, why));
            }
        }
        assert!(with_chunks.contains(&(900, Chunks::Slow)), "{with_chunks:?}");
        let regular: Vec<_> =
            with_chunks.iter().filter(|(_, why)| *why == Chunks::Regular).map(|(at, _)| *at).collect();
        assert_eq!(regular[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "each one as long as there is room");
        assert!(regular.windows(2).all(|pair| pair[1] - pair[0] <= 256) && regular.len() <= 80, "{regular:?}");
        assert!(budget.regular <= 800 && budget.slow <= 800);
    }

    #[test]
    fn a_save_whose_chunks_do_not_fit_has_none() {
        let mut budget = Budget::of(1000, 100, 100);
        assert_eq!(budget.chunks(10, 51), None);
        assert_eq!(budget.chunks(20, 50), Some(Chunks::Regular));
        assert!(budget.fits(900, false) && !budget.fits(901, false) && budget.fits(1000, true));
    }
}
