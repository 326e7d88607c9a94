//! `adamw`, `fill` and `busy`, the demo's training step, equal the host's results bit for bit.

use crate::rig::{Rig, synchronize};

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

fn floats(rig: &Rig, at: u64, count: usize) -> Vec<f32> {
    rig.peek(at, 4 * count).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn a_step_is_that_of_the_host() {
    let (rig, count) = (Rig::new(), 1001);
    let (fill, adamw, stream) = (rig.kernel("training", "fill"), rig.kernel("training", "adamw"), rig.stream(1));
    let tensors = [1, 2, 3, 4].map(|seed| {
        let to = rig.memory(4 * count);
        let argument = Fill { to, count: count as u64, seed, scale: 0.5, unused: 0 };
        assert_eq!(rig.launch(fill, 3, 32, stream, argument), 0);
        to
    });
    assert_eq!(synchronize(stream), 0);
    let [p, m, mut v, g] = tensors.map(|t| floats(&rig, t, count));
    assert!([&p, &m, &g].iter().all(|x| x.iter().all(|x| x.abs() <= 0.5) && x[0] != x[1]) && p != m);
    // Second moments are never negative.
    v.iter_mut().for_each(|v| *v = v.abs());
    rig.poke(tensors[2], &v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
    let (rate, unbias, beta_first, beta_second, epsilon, decay) = (1.3e-3, 1.1, 0.9, 0.999, 1e-8, 1e-5);
    let step = Adamw { tensors, count: count as u64, rate, unbias, beta_first, beta_second, epsilon, decay };
    assert_eq!((rig.launch(adamw, 2, 64, stream, step), synchronize(stream)), (0, 0));
    let [p_new, m_new, v_new, _] = tensors.map(|t| floats(&rig, t, count));
    for i in 0..count {
        let first = beta_first * m[i] + (1.0 - beta_first) * g[i];
        let second = beta_second * v[i] + (1.0 - beta_second) * (g[i] * g[i]);
        let moved = p[i] - (rate * first / ((second * unbias).sqrt() + epsilon) + decay * p[i]);
        assert_eq!([p_new[i], m_new[i], v_new[i]].map(f32::to_bits), [moved, first, second].map(f32::to_bits), "{i}");
    }
}

#[test]
fn being_busy_writes_nothing() {
    let rig = Rig::new();
    let (out, stream) = (rig.memory(4), rig.stream(1));
    let busy = Busy { out, rounds: 100 };
    assert_eq!((rig.launch(rig.kernel("training", "busy"), 2, 64, stream, busy), synchronize(stream)), (0, 0));
    assert_eq!(rig.peek(out, 4), [0xCD; 4]);
}
