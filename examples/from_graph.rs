//! A graph runner that is killed and resumes from its active set. The program kills a child of its own.

use ashore::compat::graph::{ActiveSnapshot, Checkpointer, Directory};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use uuid::Uuid;

const RUN: Uuid = Uuid::from_u128(0x5eed);

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct State {
    trace: Vec<String>,
}

/// Runs a node and returns the nodes that come next.
fn node(name: &str, state: &mut State) -> &'static [&'static str] {
    state.trace.push(format!("{name} {}", state.trace.len()));
    match name {
        "plan" => &["search", "write"],
        "search" => &[],
        "write" => &["review"],
        _ => &["plan"],
    }
}

pub(crate) async fn run(store: &dyn Checkpointer<State>, supersteps: u64) -> ashore::Result<State> {
    let task = |name: &str| ActiveSnapshot { node_name: name.into(), payload: None };
    let last = store.list(RUN).await?.last().copied();
    let mut state = if last.is_some() { store.load(RUN, last).await?.unwrap_or_default() } else { State::default() };
    let first = last.map_or(0, |last| last + 1);
    let mut active = store.load_active(RUN, first).await?;
    if active.is_empty() {
        active = vec![task("plan")];
    }
    for step in first..supersteps {
        active = active.iter().flat_map(|it| node(&it.node_name, &mut state)).map(|name| task(name)).collect();
        // Save the active set first: a run that is killed between the two saves repeats this superstep.
        store.save_active(RUN, step + 1, &active).await?;
        store.save(RUN, step, &state).await?;
        println!("{step}");
    }
    Ok(state)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(root) = std::env::args().nth(1) {
        futures_executor::block_on(run(&Directory::open(root)?, u64::MAX))?;
    }
    let root = tempfile::tempdir()?;
    let mut child = Command::new(std::env::current_exe()?).arg(root.path()).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let seen = lines.take(5).count();
    child.kill()?;
    child.wait()?;
    let resumed = futures_executor::block_on(run(&Directory::open(root.path())?, 40))?;
    let whole = futures_executor::block_on(run(&ashore::compat::graph::InMemory::new(), 40))?;
    assert_eq!((seen, resumed), (5, whole), "the run went on as if nothing had happened");
    Ok(())
}
