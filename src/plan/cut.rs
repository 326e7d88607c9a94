//! Splits the boxes that a rank writes into files. This is a pure function, because rank 0 computes the same
//! split for every rank.

use crate::error::{Error, Result};
use crate::format::shard::MAX_HEADER;
use std::ops::Range;

/// The maximum header length of a file, in bytes. Readers refuse headers above 100,000,000, and read the
/// whole header before the first tensor.
const HEADER: u64 = 48 << 20;

/// The weight of a box in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weight {
    /// The number of boxes of the same tensor before this one. A file holds at most one box of a tensor.
    pub layer: u32,
    /// Boxes of different classes are in different files.
    pub class: u32,
    /// Bytes of its elements.
    pub bytes: u64,
    /// Bytes of its entry in the header.
    pub header: u64,
}

impl Weight {
    /// The bytes that the box counts for in its file. A tensor without bytes counts for its header.
    fn share(self) -> u64 {
        if self.bytes > 0 { self.bytes } else { self.header }
    }
}

/// Refuses a tensor whose own entry makes a header longer than readers accept.
pub(super) fn check_name(name: &str, header: u64) -> Result<()> {
    // The rest of a header: prefix, stamp, keys of `__metadata__`, padding.
    if header + 8192 <= MAX_HEADER as u64 {
        return Ok(());
    }
    let begin: String = name.chars().take(40).collect();
    let what = "the name of a tensor is longer than the header of a file can be";
    Err(Error::invalid(format!("{what} limit_bytes={MAX_HEADER} name_bytes={} begins={begin:?}", name.len())))
}

/// Splits boxes, sorted by layer and class, into runs, one for each file: about `files` runs of about equal
/// bytes, and more where a file would hold two boxes of a tensor, two classes or too long a header. Every run
/// has at least one box.
pub(super) fn cut(boxes: &[Weight], files: usize) -> Vec<Range<usize>> {
    let layers = boxes.last().map_or(1, |last| last.layer as usize + 1);
    let mut runs = Vec::new();
    let mut begin = 0;
    for layer in boxes.chunk_by(|a, b| a.layer == b.layer) {
        let (files, total) = ((files / layers).max(1), bytes(layer).max(1));
        for class in layer.chunk_by(|a, b| a.class == b.class) {
            let share = (files as u128 * bytes(class) + total / 2) / total;
            cut_class(begin, class, (share as usize).max(1), &mut runs);
            begin += class.len();
        }
    }
    runs
}

fn bytes(boxes: &[Weight]) -> u128 {
    boxes.iter().map(|weight| u128::from(weight.share())).sum()
}

fn cut_class(first: usize, boxes: &[Weight], files: usize, runs: &mut Vec<Range<usize>>) {
    let total: u64 = boxes.iter().map(|b| b.share()).sum();
    let headers: u64 = boxes.iter().map(|b| b.header).sum();
    let needed = usize::try_from(headers.div_ceil(HEADER)).unwrap_or(usize::MAX);
    let files = files.max(needed).clamp(1, boxes.len());
    let (mut begin, mut done, mut sum, mut header) = (0, 0, 0_u64, 0_u64);
    for (i, weight) in boxes.iter().enumerate() {
        if i > begin && header + weight.header > HEADER {
            runs.push(first + begin..first + i);
            (begin, done, header) = (i, done + 1, 0);
        }
        sum += weight.share();
        header += weight.header;
        let full = u128::from(sum) * files as u128 >= u128::from(total) * (done as u128 + 1);
        let left = files.saturating_sub(done + 1);
        if left > 0 && (full || boxes.len() - i - 1 == left) && i + 1 < boxes.len() {
            runs.push(first + begin..first + i + 1);
            (begin, done, header) = (i + 1, done + 1, 0);
        }
    }
    if begin < boxes.len() {
        runs.push(first + begin..first + boxes.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn alike(n: usize, bytes: u64, header: u64) -> Vec<Weight> {
        vec![Weight { layer: 0, class: 0, bytes, header }; n]
    }

    #[test]
    fn files_have_about_equal_bytes() {
        assert_eq!(cut(&alike(6, 10, 1), 3), [0..2, 2..4, 4..6]);
        assert_eq!(cut(&alike(2, 10, 1), 3), [0..1, 1..2]);
        assert_eq!(cut(&alike(6, 10, 1), 1), vec![0..6; 1]);
        let mut one_is_large = alike(3, 1, 1);
        one_is_large[0].bytes = 1000;
        assert_eq!(cut(&one_is_large, 2), [0..1, 1..3]);
        assert!(cut(&[], 3).is_empty());
    }

    #[test]
    fn classes_share_no_file_and_have_files_by_their_bytes() {
        let mut boxes = alike(100, 10, 1);
        boxes[95..].iter_mut().for_each(|weight| weight.class = 1);
        assert_eq!(cut(&boxes, 1), [0..95, 95..100]);
        let runs = cut(&boxes, 8);
        assert_eq!((runs.len(), runs.last()), (9, Some(&(95..100))));
        boxes[50..].iter_mut().for_each(|weight| weight.class = 1);
        assert_eq!(cut(&boxes, 4), [0..25, 25..50, 50..75, 75..100]);
    }

    /// Regression: files were split by bytes alone. So 1.3 million tensors without bytes, or with few bytes
    /// beside a large one, stayed in one file, whose header was longer than readers accept.
    #[test]
    fn a_file_ends_where_its_header_would_be_too_long() {
        let header = |run: &Range<usize>, of: &[Weight]| of[run.clone()].iter().map(|w| w.header).sum::<u64>();
        let small = alike(1_300_000, 4, 107);
        let without = alike(1_300_000, 0, 107);
        let mut beside_a_large_one = small.clone();
        beside_a_large_one[0].bytes = 1 << 40;
        for (of, most) in [(&small, 3), (&without, 3), (&beside_a_large_one, 5)] {
            let runs = cut(of, 1);
            assert!((3..=most).contains(&runs.len()), "{}", runs.len());
            assert!(runs.iter().all(|run| header(run, of) <= HEADER), "{runs:?}");
        }
        let sizes: Vec<_> = cut(&without, 4).iter().map(Range::len).collect();
        assert_eq!(sizes, [325_000; 4]);
    }

    #[test]
    fn a_name_that_no_header_can_hold_is_refused_with_its_begin() {
        check_name("w", 50_000_000).unwrap();
        let refused = check_name(&"w".repeat(100_000_000), 100_000_077).unwrap_err();
        assert_eq!(refused.kind(), crate::ErrorKind::Invalid);
        assert!(refused.message().len() < 250 && refused.message().contains("wwww"), "{refused}");
    }

    proptest! {
        #[test]
        fn every_box_is_in_one_file_and_no_file_has_two_of_a_layer(
            mut boxes in prop::collection::vec((0_u32..3, 0_u32..3, 0_u64..100, prop_oneof![1_u64..200, 1 << 24..1_u64 << 25]), 0..60),
            files in 1_usize..9,
        ) {
            boxes.sort_by_key(|b| (b.0, b.1));
            let weight = |(layer, class, bytes, header)| Weight { layer, class, bytes, header };
            let boxes: Vec<_> = boxes.into_iter().map(weight).collect();
            let runs = cut(&boxes, files);
            let joined: Vec<usize> = runs.iter().cloned().flatten().collect();
            prop_assert_eq!(joined, (0..boxes.len()).collect::<Vec<_>>());
            for run in &runs {
                let run = &boxes[run.clone()];
                prop_assert!(!run.is_empty() && run.iter().all(|w| (w.layer, w.class) == (run[0].layer, run[0].class)));
                prop_assert!(run.len() == 1 || run.iter().map(|w| w.header).sum::<u64>() <= HEADER);
            }
        }
    }
}
