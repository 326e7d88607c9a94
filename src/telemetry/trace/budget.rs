//! Which saves a trace of limited size has chunk by chunk.

/// The size that a trace never exceeds.
const FILE_MAX: u64 = 64 << 20;
/// The part of it for chunks, in halves: of each Nth save, and of the slowest so far.
const CHUNKS_MAX: u64 = 32 << 20;
/// Number of times that the distance of saves with chunks doubles before their part is used up.
const DOUBLINGS: u64 = 8;
/// Kept for the ends of saves that have begun, and for the last line.
const RESERVE: u64 = 64 << 10;

/// How much of a trace is used.
#[derive(Debug)]
pub(super) struct Budget {
    /// The limits that a test makes small.
    file: u64,
    chunks: u64,
    reserve: u64,
    /// Bytes in the file.
    pub used: u64,
    /// Bytes of chunks: of each Nth save, and of slow ones.
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

    /// Whether `bytes` fit: of a save's end or of the last line into the reserve, too.
    pub fn fits(&self, bytes: u64, reserved: bool) -> bool {
        let limit = if reserved { self.file } else { self.file - self.reserve };
        self.used.saturating_add(bytes) <= limit
    }

    /// Decides about the chunks of the next save, which took `micros`; they take at most `bytes`.
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

    /// Counts what the chunks of a save took.
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
