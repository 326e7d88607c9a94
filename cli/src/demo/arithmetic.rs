//! Dense arithmetic whose result does not depend on the number of threads.
//!
//! Exactly one thread computes each output element, always in the same order; threads only divide the
//! outputs. So a run repeats bit for bit on any number of threads, which lets the demo compare losses by
//! their bits.

const LANES: usize = 16;

/// Fills `out`, rows of `width` elements, by calling `fill(row, elements)` for each row.
pub fn fill_rows(threads: usize, out: &mut [f32], width: usize, fill: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = out.len() / width;
    let share = rows.div_ceil(threads.max(1)).max(1);
    let run = |first: usize, part: &mut [f32]| {
        for (i, row) in part.chunks_exact_mut(width).enumerate() {
            fill(first + i, row);
        }
    };
    std::thread::scope(|scope| {
        let mut parts = out.chunks_mut(share * width).enumerate();
        let mine = parts.next();
        for (i, part) in parts {
            let run = &run;
            scope.spawn(move || run(i * share, part));
        }
        if let Some((_, part)) = mine {
            run(0, part);
        }
    });
}

/// Returns the sum of products. Sixteen partial sums let the compiler use vector registers without reordering
/// anything.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (a_lanes, a_rest) = a.as_chunks::<LANES>();
    let (b_lanes, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a_lanes.iter().zip(b_lanes) {
        for i in 0..LANES {
            sums[i] += x[i] * y[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    sums.iter().sum::<f32>() + rest
}

/// Computes `out += scale * x`.
pub fn add_scaled(out: &mut [f32], scale: f32, x: &[f32]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o += scale * x;
    }
}

/// Transposes a matrix of `columns` columns.
pub fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    let rows = matrix.len() / columns;
    let mut out = vec![0.0; matrix.len()];
    for (r, row) in matrix.chunks_exact(columns).enumerate() {
        for (c, &x) in row.iter().enumerate() {
            out[c * rows + r] = x;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_filled_once_each_whatever_the_number_of_threads() {
        for threads in [1, 2, 3, 8, 50] {
            let mut out = vec![0.0; 7 * 3];
            fill_rows(threads, &mut out, 3, |row, part| part.iter_mut().for_each(|x| *x += row as f32));
            let expected: Vec<f32> = (0..7).flat_map(|row| [row as f32; 3]).collect();
            assert_eq!(out, expected, "threads={threads}");
        }
    }

    #[test]
    fn dot_counts_the_rest_that_fills_no_lane() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&a, &a), (0..37).map(|i| (i * i) as f32).sum::<f32>());
    }

    #[test]
    fn transposing_twice_is_nothing() {
        let m: Vec<f32> = (0..12).map(|i| i as f32).collect();
        assert_eq!(transposed(&m, 4)[..3], [0.0, 4.0, 8.0]);
        assert_eq!(transposed(&transposed(&m, 4), 3), m);
    }
}
