//! Tests of steps that several ranks write together.

use super::*;
use crate::digest::Digest;
use crate::error::ErrorKind;
use crate::state::{Dtype, HostTensor, StateDict};
use proptest::prelude::*;
use std::time::Instant;

fn boxes(boxes: &[(&[usize], &[usize])]) -> Vec<BoxOf> {
    boxes.iter().map(|(at, extent)| BoxOf { at: at.to_vec(), extent: extent.to_vec() }).collect()
}

fn tensor(name: &str, shape: &[usize], held: &[(&[usize], &[usize])]) -> Described {
    Described { name: name.into(), dtype: Dtype::F32, shape: shape.into(), boxes: boxes(held), alias_of: None }
}

fn merged(ranks: &[Vec<Described>]) -> crate::Result<Whole> {
    let encode = |tensors: &Vec<Described>| Description { files: 1, tensors: tensors.clone() }.encode().unwrap().0;
    let (whole, shares) = share_out(ranks.iter().map(encode))?;
    assert!(shares.iter().zip(&whole.shares).all(|(bytes, share)| Share::decode(bytes).unwrap() == *share));
    Ok(whole)
}

fn refused(ranks: &[Vec<Described>]) -> (String, Vec<u32>) {
    let error = merged(ranks).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    (error.message().into(), error.ranks().into())
}

#[test]
fn a_hole_is_named_with_its_box_and_the_ranks_that_hold_the_rest() {
    let rows = |at, n| vec![tensor("w", &[10, 4], &[(&[at, 0], &[n, 4])])];
    let (text, ranks) = refused(&[rows(0, 4), rows(4, 2), rows(8, 2)]);
    assert_eq!(text, "no rank holds a part of a tensor tensor=\"w\" dtype=F32 shape=[10, 4] missing_box=[6..8, 0..4]");
    assert_eq!(ranks, [0, 1, 2]);
    let quarter = |at: [usize; 2]| vec![tensor("w", &[4, 6], &[(&at, &[2, 3])])];
    let (text, _) = refused(&[quarter([0, 0]), quarter([0, 3]), quarter([2, 3])]);
    assert!(text.ends_with("missing_box=[2..4, 0..3]"), "{text}");
    let (text, ranks) = refused(&[vec![tensor("w", &[4, 6], &[(&[0, 0], &[0, 6])])], vec![]]);
    assert!(text.ends_with("missing_box=[0..4, 0..6]"), "{text}");
    assert!(ranks.is_empty(), "no rank holds anything of it");
}

#[test]
fn an_overlap_is_named_with_both_boxes_and_their_ranks() {
    let rows = |at, n| vec![tensor("w", &[10, 4], &[(&[at, 0], &[n, 4])])];
    let (text, ranks) = refused(&[rows(0, 4), rows(3, 3), rows(6, 4)]);
    let what = "boxes of a tensor overlap and are not the same";
    assert_eq!(text, format!("{what} tensor=\"w\" dtype=F32 shape=[10, 4] box=[0..4, 0..4] other_box=[3..6, 0..4]"));
    assert_eq!(ranks, [0, 1]);
    let (text, ranks) = refused(&[rows(0, 10), rows(0, 10), rows(0, 5)]);
    assert!(text.contains(what), "{text}");
    assert_eq!(ranks, [0, 1, 2]);
}

#[test]
fn ranks_that_disagree_are_named_with_what_each_says() {
    let one = vec![tensor("w", &[4], &[(&[0], &[2])])];
    let mut other = vec![tensor("w", &[4], &[(&[2], &[2])])];
    other[0].dtype = Dtype::BF16;
    let (text, ranks) = refused(&[one.clone(), one.clone(), other]);
    assert_eq!(text, "ranks disagree about a tensor tensor=\"w\" rank_0=F32[4] rank_2=BF16[4]");
    assert_eq!(ranks, [0, 2]);
    let (text, _) = refused(&[vec![], one, vec![tensor("w", &[5], &[(&[2], &[3])])]]);
    assert_eq!(text, "ranks disagree about a tensor tensor=\"w\" rank_1=F32[4] rank_2=F32[5]");
}

#[test]
fn empty_boxes_are_written_only_of_empty_tensors_and_once() {
    let last = |at, n| vec![tensor("e", &[0, 6], &[(&[0, at], &[0, 3])]), tensor("w", &[2], &[(&[at.min(2)], &[n])])];
    let whole = merged(&[last(0, 2), last(3, 0)]).unwrap();
    assert_eq!(whole.tensors[0].boxes.len(), 1);
    assert_eq!(whole.tensors[0].boxes[0].place, boxes(&[(&[0, 0], &[0, 6])])[0]);
    assert_eq!(whole.tensors[0].boxes[0].rank, 0);
    assert_eq!(whole.tensors[1].boxes.len(), 1);
    assert_eq!(
        whole.shares[1].boxes.iter().map(|part| (part.tensor, part.writes)).collect::<Vec<_>>(),
        [(0, false), (1, false)]
    );
    assert_eq!(whole.files, ["shard-00000-model-00001-of-00001.safetensors"], "rank 1 writes nothing, so no file");
}

#[test]
fn replicas_are_shared_out_by_bytes() {
    let held = |n: usize| (0..n).map(|i| tensor(&format!("w{i:02}"), &[1000 + i], &[(&[0], &[1000 + i])])).collect();
    let mut ranks: Vec<Vec<Described>> = vec![held(40); 4];
    // Rank 2 also holds a tensor of its own, and therefore writes less of the others.
    ranks[2].push(tensor("x", &[20_000], &[(&[0], &[20_000])]));
    let whole = merged(&ranks).unwrap();
    let bytes = |rank: u32| -> usize {
        let mine = whole.tensors.iter().flat_map(|t| &t.boxes).filter(|b| b.rank == rank);
        mine.map(|b| b.place.extent[0]).sum()
    };
    let each: Vec<usize> = (0..4).map(bytes).collect();
    assert!(each.iter().max().unwrap() < &(each.iter().min().unwrap() + 7_000), "{each:?}");
    assert_eq!(bytes(2), 20_000);
}

#[test]
fn the_same_box_twice_in_one_rank_is_written_once() {
    let whole = merged(&[vec![tensor("w", &[2], &[(&[0], &[2]), (&[0], &[2])])]]).unwrap();
    assert_eq!(whole.shares[0].boxes.iter().map(|part| part.writes).collect::<Vec<_>>(), [true, false]);
    assert!(!whole.shares[0].sharded && whole.replicas.is_empty());
}

/// Three ranks hold the same half of a tensor, and the bytes of one rank have drifted.
#[test]
fn a_replica_that_drifted_is_named_with_its_rank() {
    let half = |at| vec![tensor("v", &[2], &[(&[0], &[2])]), tensor("w", &[8], &[(&[at], &[4])])];
    let whole = merged(&[half(0), half(4), half(4), half(4)]).unwrap();
    let w = whole.shares[3].boxes[1].replica.unwrap();
    assert_eq!((whole.shares[0].boxes[1].replica, whole.shares[1].boxes[1].replica), (None, Some(w)));
    assert_eq!(whole.replicas[w as usize].ranks, [1, 2, 3]);
    let (good, bad) = (Digest::of(b"good"), Digest::of(b"bad"));
    let compare = |digests: [Digest; 3]| {
        let of = |(rank, digest): (u32, Digest)| (rank, vec![(w, digest), (0, good)]);
        let mut comparison = Comparison::default();
        comparison.add(0, &[(0, good)]);
        (1..4).zip(digests).map(of).for_each(|(rank, digests)| comparison.add(rank, &digests));
        comparison.finish(&whole)
    };
    compare([bad; 3]).unwrap();
    let error = compare([good, bad, good]).unwrap_err();
    let (what, about) = error.message().split_once(" tensor=").unwrap();
    assert!(what.starts_with("ranks hold different values of one tensor"), "{what}");
    assert_eq!(about, "\"w\" box=[4..8]");
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[2][..]));
    assert_eq!(compare([bad, good, good]).unwrap_err().ranks(), [1]);
    let no_majority = compare([good, bad, Digest::EMPTY]).unwrap_err();
    assert_eq!(no_majority.ranks(), [2, 3], "the lowest rank counts as right");
    let mut alone = Comparison::default();
    alone.add(2, &[(w, bad)]);
    alone.finish(&whole).unwrap();
}

#[test]
fn aliases_stand_for_a_tensor_that_is_there_and_alike() {
    let alias =
        |of: &str, shape: &[usize]| Described { boxes: vec![], alias_of: Some(of.into()), ..tensor("a", shape, &[]) };
    let w = tensor("w", &[2], &[(&[0], &[2])]);
    let whole = merged(&[vec![alias("w", &[2]), w.clone()]]).unwrap();
    assert_eq!((whole.tensors[0].alias_of, whole.tensors[0].boxes.len()), (Some(1), 0));
    for wrong in [alias("x", &[2]), alias("w", &[3]), alias("a", &[2])] {
        let (text, _) = refused(&[vec![wrong, w.clone()]]);
        assert!(text.contains("tensor=\"a\" alias_of="), "{text}");
    }
    let (text, ranks) = refused(&[vec![alias("w", &[2]), w.clone()], vec![tensor("a", &[2], &[(&[0], &[2])]), w]]);
    assert_eq!(text, "ranks disagree about a tensor tensor=\"a\" rank_0=F32[2] alias_of=\"w\" rank_1=F32[2]");
    assert_eq!(ranks, [0, 1]);
}

#[test]
fn ranks_that_did_not_come_are_named() {
    let mut merge = Merge::new(4);
    let none = Description { files: 1, tensors: vec![] };
    merge.add(1, &none).unwrap();
    assert_eq!(merge.add(1, &none).unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(merge.add(4, &none).unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(merge.finish().unwrap_err().ranks(), [0, 2, 3]);
}

#[test]
fn damaged_and_hostile_descriptions_are_refused() {
    let good = Description { files: 3, tensors: vec![tensor("w", &[4, 2], &[(&[0, 0], &[2, 2]), (&[2, 0], &[2, 2])])] };
    let (bytes, digest) = good.encode().unwrap();
    assert_eq!(Description::decode(&bytes).unwrap(), good);
    assert_eq!(digest, Digest::of(&bytes[..bytes.len() - 8]));
    for bit in 0..8 * bytes.len() {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Description::decode(&flipped).unwrap_err().kind(), ErrorKind::Corrupt, "{bit}");
    }
    for cut in 0..bytes.len() {
        assert!(Description::decode(&bytes[..cut]).is_err(), "{cut}");
    }
    let sealed = |text: &[u8]| [text, &Digest::of(text).to_bits().to_le_bytes()].concat();
    let mut later = bytes[..bytes.len() - 8].to_vec();
    later[7] = 2;
    let error = Description::decode(&sealed(&later)).unwrap_err();
    assert_eq!((error.kind(), error.message().ends_with("version=2")), (ErrorKind::Invalid, true), "{error}");
    let longer = [&bytes[..bytes.len() - 8], b"x"].concat();
    assert!(Description::decode(&sealed(&longer)).is_err());
    // The bytes claim that 2^60 tensors follow.
    let many = [&b"ashplan\x01\x01"[..], &[0x80; 8], &[0x10]].concat();
    assert!(Description::decode(&sealed(&many)).is_err());
    let share = Share::decode(&bytes);
    assert_eq!(share.unwrap_err().kind(), ErrorKind::Corrupt, "a description is no share");

    let with = |change: fn(&mut Vec<Described>)| {
        let mut tensors = good.tensors.clone();
        change(&mut tensors);
        Description::decode(&Description { files: 3, tensors }.encode().unwrap().0)
    };
    type Harm = fn(&mut Vec<Described>);
    let wrong: [(&str, Harm); 8] = [
        ("beyond", |t| t[0].boxes[1].at[0] = 3),
        ("overflow", |t| t[0].boxes[1].at[0] = usize::MAX),
        ("dimensions", |t| t[0].boxes[0].extent.push(1)),
        ("no boxes", |t| t[0].boxes.clear()),
        ("twice", |t| t.push(t[0].clone())),
        ("no name", |t| t[0].name.clear()),
        ("too large", |t| t[0].shape = vec![usize::MAX, 2]),
        ("half a byte", |t| (t[0].dtype, t[0].shape[1], t[0].boxes[0].extent[1]) = (Dtype::F4, 3, 1)),
    ];
    for (why, change) in wrong {
        assert_eq!(with(change).expect_err(why).kind(), ErrorKind::Corrupt, "{why}");
    }
}

/// Makes the state of a rank from boxes of tensors of bytes, given as begin and extent.
fn rank_state(of: &[(String, Vec<usize>, BoxOf)]) -> StateDict<'static> {
    let mut state = StateDict::new();
    for (name, shape, BoxOf { at, extent }) in of {
        let bytes = vec![0_u8; extent.iter().product()];
        state.tensor_box(name, shape, at, HostTensor::new(bytes, extent)).unwrap();
    }
    state
}

/// A cut: the number of a part, the dimension of the cut, and its place in that dimension.
type Cut = (usize, usize, usize);

proptest! {
    /// Tensors are cut at random. The boxes are given to random ranks, some to several.
    #[test]
    fn every_element_is_written_once_and_every_rank_plans_the_same(
        world in 1_u32..6,
        tensors in prop::collection::btree_map(
            "[a-e]{1,2}",
            (prop::collection::vec(1_usize..6, 1..3), prop::collection::vec(any::<Cut>(), 0..6), any::<u64>()),
            1..6,
        ),
        files in 1_usize..4,
    ) {
        let mut held: Vec<Vec<(String, Vec<usize>, BoxOf)>> = vec![Vec::new(); world as usize];
        for (name, (shape, cuts, deal)) in &tensors {
            let mut parts = vec![BoxOf { at: vec![0; shape.len()], extent: shape.clone() }];
            for (which, dim, place) in cuts {
                let (which, dim) = (which % parts.len(), dim % shape.len());
                let BoxOf { at, extent } = parts[which].clone();
                if extent[dim] > 1 {
                    let near = 1 + place % (extent[dim] - 1);
                    parts[which].extent[dim] = near;
                    let mut far = BoxOf { at, extent };
                    far.at[dim] += near;
                    far.extent[dim] -= near;
                    parts.push(far);
                }
            }
            for (i, part) in parts.into_iter().enumerate() {
                let deal = deal.rotate_left(7 * i as u32);
                held[(deal % u64::from(world)) as usize].push((name.clone(), shape.clone(), part.clone()));
                if deal & 256 > 0 {
                    held[(deal / 512 % u64::from(world)) as usize].push((name.clone(), shape.clone(), part));
                }
            }
        }
        let states: Vec<_> = held.iter().map(|of| rank_state(of)).collect();
        let described: Vec<_> = states.iter().map(|state| Description::of(state, files).unwrap()).collect();
        let merge = |order: Vec<u32>| {
            let mut merge = Merge::new(world);
            order.into_iter().for_each(|rank| merge.add(rank, &described[rank as usize].0).unwrap());
            merge.finish().unwrap()
        };
        let whole = merge((0..world).collect());
        prop_assert_eq!(&whole, &merge((0..world).rev().collect()), "in any order");

        let mut seen = 0;
        for ((state, (_, order)), share) in states.iter().zip(&described).zip(&whole.shares) {
            prop_assert_eq!(share, &Share::decode(&share.encode().unwrap()).unwrap());
            let plan = Plan::of_share(state, Shape { chunk: 4096, files, rank: (world > 1).then_some(share.rank) }, order, share).unwrap();
            for (file, shard) in (share.first_file as usize..).zip(&plan.shards) {
                prop_assert_eq!(&shard.name, &whole.files[file]);
            }
            for planned in &plan.tensors {
                let (tensor, file) = (&whole.tensors[planned.number as usize], share.first_file + planned.shard as u32);
                let SegmentSource::Tensor(index) = plan.segments[planned.segments.start].source else { panic!() };
                let mine = state.tensors.get_index(index).unwrap();
                let found = tensor.boxes.iter().filter(|b| {
                    b.place.at == mine.1.place.as_ref().unwrap().at[..] && b.place.extent == mine.1.layout.shape[..]
                });
                let found: Vec<_> = found.map(|b| (b.rank, b.file)).collect();
                prop_assert_eq!(found, vec![(share.rank, file)]);
                prop_assert_eq!(&tensor.name, &mine.0.name);
                seen += 1;
            }
        }
        prop_assert_eq!(seen, whole.tensors.iter().map(|t| t.boxes.len()).sum::<usize>());
        for tensor in &whole.tensors {
            let volume: usize = tensor.boxes.iter().map(|b| b.place.extent.iter().product::<usize>()).sum();
            prop_assert_eq!(volume, tensor.shape.iter().product::<usize>());
            let mut files: Vec<_> = tensor.boxes.iter().map(|b| b.file).collect();
            files.sort_unstable();
            files.dedup();
            prop_assert_eq!(files.len(), tensor.boxes.len(), "one box of a tensor in a file");
        }
    }
}

/// A tenth of the promised size, in the debug build. The full size is run by hand.
#[test]
fn many_ranks_are_put_together_in_little_time() {
    many_ranks(300, 300);
}

#[test]
#[ignore = "seconds; run by hand in release"]
fn a_thousand_ranks_of_a_thousand_tensors() {
    many_ranks(1000, 1000);
}

fn many_ranks(world: usize, tensors: usize) {
    let describe = |rank: usize| {
        let tensors = (0..tensors).map(|i| {
            let name = format!("model.layers.{i:05}.self_attn.q_proj.weight");
            match i % 10 {
                0 => tensor(&name, &[64], &[(&[0], &[64])]),
                _ => tensor(&name, &[world * 4, 128], &[(&[rank * 4, 0], &[4, 128])]),
            }
        });
        Description { files: 1, tensors: tensors.collect() }.encode().unwrap().0
    };
    let all: Vec<Vec<u8>> = (0..world).map(describe).collect();
    let began = Instant::now();
    let mut merge = Merge::new(world as u32);
    for (rank, bytes) in all.iter().enumerate() {
        merge.add(rank as u32, &Description::decode(bytes).unwrap()).unwrap();
    }
    let whole = merge.finish().unwrap();
    println!("{world} ranks x {tensors} tensors, {} bytes each: {:?}", all[0].len(), began.elapsed());
    assert_eq!(whole.files.len(), world);
}
