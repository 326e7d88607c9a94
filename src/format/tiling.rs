//! Checks whether boxes cover a tensor, each element once.

use foldhash::fast::FixedState;
use std::collections::HashMap;

/// Maximum number of dimensions that the boxes of one tensor may split.
pub(crate) const MAX_SPLIT: usize = 4;

/// Why boxes do not tile a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The boxes split more than [`MAX_SPLIT`] dimensions.
    Split(usize),
    /// The first element, in row-major order, that is in no box.
    Hole(Vec<usize>),
    /// The first element that is in several boxes.
    Overlap(Vec<usize>),
}

/// Checks that boxes, given as begin and extent and all within `shape`, cover `shape` exactly once.
///
/// The check counts the corners of each box with alternating signs. The boxes cover `shape` exactly once when
/// these counts equal those of the whole: the counts are the mixed differences of the coverage of each point,
/// and so determine the coverage. At the first point where a count remains, all differences before it are
/// zero. So the remaining count is the coverage of that point less one. The check is linear in the number of
/// boxes; comparing pairs of boxes would be quadratic.
pub(crate) fn check<'a>(
    shape: &[usize],
    boxes: impl Iterator<Item = (&'a [usize], &'a [usize])> + Clone,
) -> Result<(), Fault> {
    let whole = |(at, extent): (&[usize], &[usize]), d: usize| at.get(d) == Some(&0) && extent.get(d) == shape.get(d);
    let split: Vec<usize> = (0..shape.len()).filter(|&d| !boxes.clone().all(|b| whole(b, d))).collect();
    if split.len() > MAX_SPLIT {
        return Err(Fault::Split(split.len()));
    }
    let mut corners = HashMap::<[usize; MAX_SPLIT], i64, FixedState>::default();
    let mut count = |at: &[usize], extent: &[usize], sign: i64| {
        for far in 0_u32..1 << split.len() {
            let mut corner = [0; MAX_SPLIT];
            for (i, (place, d)) in corner.iter_mut().zip(&split).enumerate() {
                let extent = if far >> i & 1 == 1 { extent.get(*d) } else { None };
                *place = at.get(*d).copied().unwrap_or(0) + extent.copied().unwrap_or(0);
            }
            *corners.entry(corner).or_default() += if far.count_ones() % 2 == 0 { sign } else { -sign };
        }
    };
    boxes.clone().for_each(|(at, extent)| count(at, extent, 1));
    count(&[], shape, -1);
    let Some((corner, count)) = corners.into_iter().filter(|(_, count)| *count != 0).min() else { return Ok(()) };
    let mut point = vec![0; shape.len()];
    for (&d, place) in split.iter().zip(corner) {
        if let Some(to) = point.get_mut(d) {
            *to = place;
        }
    }
    Err(if count < 0 { Fault::Hole(point) } else { Fault::Overlap(point) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The coverage of each point, counted.
    fn counted(shape: &[usize], boxes: &[(Vec<usize>, Vec<usize>)]) -> Result<(), Fault> {
        for index in 0..shape.iter().product() {
            let (mut point, mut left) = (vec![0; shape.len()], index);
            for (to, dim) in point.iter_mut().zip(shape).rev() {
                (*to, left) = (left % dim, left / dim);
            }
            let within = |(at, extent): &&(Vec<usize>, Vec<usize>)| {
                point.iter().zip(at.iter().zip(extent)).all(|(p, (at, extent))| (*at..at + extent).contains(p))
            };
            match boxes.iter().filter(within).count() {
                0 => return Err(Fault::Hole(point)),
                1 => {}
                _ => return Err(Fault::Overlap(point)),
            }
        }
        Ok(())
    }

    /// Cuts a box at random places. The parts tile the box.
    fn cut_up(shape: Vec<usize>, cuts: Vec<(usize, usize, usize)>) -> Vec<(Vec<usize>, Vec<usize>)> {
        let mut boxes = vec![(vec![0; shape.len()], shape.clone())];
        for (which, dim, place) in cuts {
            let (which, dim) = (which % boxes.len(), dim % shape.len());
            let (at, extent) = boxes[which].clone();
            if extent[dim] > 1 {
                let near = 1 + place % (extent[dim] - 1);
                boxes[which].1[dim] = near;
                let (mut far_at, mut far) = (at, extent);
                far_at[dim] += near;
                far[dim] -= near;
                boxes.push((far_at, far));
            }
        }
        boxes
    }

    proptest! {
        #[test]
        fn the_first_point_that_is_not_covered_once_is_found(
            shape in prop::collection::vec(1_usize..5, 1..4),
            cuts in prop::collection::vec(any::<(usize, usize, usize)>(), 0..9),
            wrong in prop::option::of(any::<(usize, usize, bool)>()),
        ) {
            let mut boxes = cut_up(shape.clone(), cuts);
            if let Some((which, dim, less)) = wrong {
                let (which, dim) = (which % boxes.len(), dim % shape.len());
                let (at, extent) = &mut boxes[which];
                if less { extent[dim] -= 1 } else if at[dim] + extent[dim] < shape[dim] { extent[dim] += 1 }
            }
            let found = check(&shape, boxes.iter().map(|(at, extent)| (&at[..], &extent[..])));
            prop_assert_eq!(found, counted(&shape, &boxes));
        }
    }

    #[test]
    fn more_dimensions_than_readers_take_are_not_split() {
        let halves: Vec<Vec<usize>> = (0..32).map(|i| (0..5).map(|d| i >> d & 1).collect()).collect();
        let boxes = halves.iter().map(|at| (&at[..], &[1; 5][..]));
        assert_eq!(check(&[2; 5], boxes), Err(Fault::Split(5)));
    }
}
