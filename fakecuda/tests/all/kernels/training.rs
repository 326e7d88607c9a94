//! `adamw`, `fill` and `busy`, the demo's training step, equal the host's results bit for bit.

use crate::fixture::{Fixture, synchronize};

#[derive(Clone, Copy)]
#[repr(C)]
struct Adamw {
    tensors: [u64; 4],
    count: u64,
    rate: f32,
    unbias: f32,
    beta_first: f32,
    beta_second: f32,
    epsilon: f32,
    decay: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Fill {
    to: u64,
    count: u64,
    seed: u64,
    scale: f32,
    unused: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Busy {
    out: u64,
    rounds: u64,
}

fn floats(fixture: &Fixture, at: u64, count: usize) -> Vec<f32> {
    fixture.peek(at, 4 * count).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn a_step_is_that_of_the_host() {
    let (fixture, count) = (Fixture::new(), 1001);
    let (fill, adamw, stream) =
        (fixture.kernel("training", "fill"), fixture.kernel("training", "adamw"), fixture.stream(1));
    let tensors = [1, 2, 3, 4].map(|seed| {
        let to = fixture.memory(4 * count);
        let argument = Fill { to, count: count as u64, seed, scale: 0.5, unused: 0 };
        assert_eq!(fixture.launch(fill, 3, 32, stream, argument), 0);
        to
    });
    assert_eq!(synchronize(stream), 0);
    let [p, m, mut v, g] = tensors.map(|t| floats(&fixture, t, count));
    assert!([&p, &m, &g].iter().all(|x| x.iter().all(|x| x.abs() <= 0.5) && x[0] != x[1]) && p != m);
    // Second moments are never negative.
    v.iter_mut().for_each(|v| *v = v.abs());
    fixture.poke(tensors[2], &v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    let (rate, unbias, beta_first, beta_second, epsilon, decay) = (1.3e-3, 1.1, 0.9, 0.999, 1e-8, 1e-5);
    let step = Adamw { tensors, count: count as u64, rate, unbias, beta_first, beta_second, epsilon, decay };
    assert_eq!((fixture.launch(adamw, 2, 64, stream, step), synchronize(stream)), (0, 0));
    let [p_new, m_new, v_new, _] = tensors.map(|t| floats(&fixture, t, count));
    for i in 0..count {
        let first = beta_first * m[i] + (1.0 - beta_first) * g[i];
        let second = beta_second * v[i] + (1.0 - beta_second) * (g[i] * g[i]);
        let moved = p[i] - (rate * first / ((second * unbias).sqrt() + epsilon) + decay * p[i]);
        assert_eq!([p_new[i], m_new[i], v_new[i]].map(f32::to_bits), [moved, first, second].map(f32::to_bits), "{i}");
    }
}

#[test]
fn being_busy_writes_nothing() {
    let fixture = Fixture::new();
    let (out, stream) = (fixture.memory(4), fixture.stream(1));
    let busy = Busy { out, rounds: 100 };
    assert_eq!((fixture.launch(fixture.kernel("training", "busy"), 2, 64, stream, busy), synchronize(stream)), (0, 0));
    assert_eq!(fixture.peek(out, 4), [0xCD; 4]);
}
