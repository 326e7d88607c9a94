//! Counts in the simulation what a save costs for each number of ranks. `just scale` prints the tables of
//! `docs/scale.md`.

use super::jobs::{By, Plan, Seen, run};
use super::memory::{Meter, most_taken, reset_most_taken, taken};
use super::place::{Asked, Manners};
use crate::commit::several::part::Structure;
use crate::plan::{BoxOf, Described, Description, Merge};
use crate::state::Dtype;

/// A job of `world` ranks without faults, which meets and saves three times.
fn calm(world: u32, server: bool) -> Plan {
    let by = By::Board(Manners { server, takes: 200, ..Manners::PERFECT });
    Plan { world, by, saves: 3, clocks: (0, 0), one_token: true, overwrite: false, ..Plan::calm(0, true) }
}

fn row(what: &str, world: u32, rank: usize, asked: &Asked) {
    let Asked { puts, reads, lists, lives, removes, written, read } = asked;
    println!("| {world} | {what} | {rank} | {puts} | {reads} | {lists} | {lives} | {removes} | {written} | {read} |");
}

/// Counts grow with the number of ranks as `docs/scale.md` says.
#[test]
fn a_rank_sends_two_messages_a_save_whatever_the_number_of_ranks() {
    for (world, server) in [(4, false), (64, false), (64, true)] {
        let Seen { asked: [first, other], .. } = run(1, &calm(world, server), &mut |_, _| ());
        let puts = |asked: &[Asked]| asked.iter().map(|asked| asked.puts).collect::<Vec<_>>();
        // Two rounds, and one more when the structure is new. Rank 0 tells a message in each round.
        assert_eq!((puts(&first)[1..].to_vec(), puts(&other)[1..].to_vec()), (vec![3, 2, 2], vec![3, 2, 2]));
        for save in &other[1..] {
            assert!(save.written < 1_024 && save.lists == 0, "{save:?}");
        }
        // Rank 0 reads each message once.
        assert!(first[2].reads <= 2 * u64::from(world) && first[2].lives <= 64 * first[2].lists, "{first:?}");
    }
}

#[test]
#[ignore = "prints the tables of docs/scale.md; run alone: `just scale`"]
fn messages_bytes_and_memory_by_world() {
    for server in [false, true] {
        println!("\nserver={server}");
        println!("| ranks | in | by rank | puts | reads | lists | lives | removes | bytes put | bytes read |");
        println!("|---|---|---|---|---|---|---|---|---|---|");
        let mut memory = Vec::new();
        for world in [1, 4, 64, 1_000, 10_000] {
            let mut meter = Meter::new(world as usize);
            let seen = run(1, &calm(world, server), &mut |who, begins| meter.turn(who, begins));
            assert_eq!(seen.outcomes.keys().collect::<Vec<_>>(), ["durable"]);
            for (rank, asked) in seen.asked.iter().enumerate().filter(|(_, asked)| !asked.is_empty()) {
                for (at, what) in [(0, "meeting"), (1, "first save"), (3, "later save")] {
                    row(what, world, rank, &asked[at]);
                }
            }
            let others = meter.most.iter().skip(1).max().copied().unwrap_or_default();
            memory.push((world, meter.most[0], others));
        }
        println!("\n| ranks | memory of rank 0 | of another rank, at most |");
        println!("|---|---|---|");
        for (world, first, other) in memory {
            println!("| {world} | {first} | {other} |");
        }
    }
}

/// The byte counts of a structure with `tensors` tensors, each split by rows over the ranks.
struct Sizes {
    description: usize,
    share: usize,
    table: usize,
    /// The highest number of bytes that rank 0 holds while it makes the plan.
    memory: isize,
}

fn sizes(world: u32, tensors: usize) -> Sizes {
    let describe = |rank: u32| {
        let one = |number: usize| Described {
            name: format!("model.layers.{number:05}.mlp.weight"),
            dtype: Dtype::BF16,
            shape: vec![world as usize, 4096],
            boxes: vec![BoxOf { at: vec![rank as usize, 0], extent: vec![1, 4096] }],
            alias_of: None,
        };
        Description { files: 1, tensors: (0..tensors).map(one).collect() }
    };
    let mut merge = Merge::new(world);
    let mut description = 0;
    reset_most_taken();
    let before = taken();
    for rank in 0..world {
        let (bytes, _) = describe(rank).encode().unwrap();
        description = bytes.len();
        merge.add(rank, &Description::decode(&bytes).unwrap()).unwrap();
    }
    let whole = merge.finish().unwrap();
    let shares: Vec<_> = whole.shares.iter().map(|share| share.encode().unwrap()).collect();
    let table = Structure::of(whole).unwrap().table_len();
    let memory = most_taken() - before;
    Sizes { description, share: shares.last().map_or(0, Vec::len), table, memory }
}

#[test]
#[ignore = "prints a table of docs/scale.md; run alone: `just scale`"]
fn bytes_of_a_plan_by_world() {
    println!("\n| ranks | tensors | a description | a share | structure in `tensors.table` | memory of rank 0 |");
    println!("|---|---|---|---|---|---|");
    for world in [1, 4, 64, 1_000, 10_000] {
        let Sizes { description, share, table, memory } = sizes(world, 100);
        println!("| {world} | 100 | {description} | {share} | {table} | {memory} |");
    }
}
