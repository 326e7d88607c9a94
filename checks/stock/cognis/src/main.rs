//! Interrupts a graph of cognis, and resumes it in a program that has only the store; runs a subgraph in a
//! namespace of its own.

use ashore::compat::graph::{Checkpointer, Directory, InMemory, Namespaced, Sqlite, checkpointer_for};
use cognis_core::{CognisError, Runnable, RunnableConfig};
use cognis_graph::{CompiledGraph, Goto, Graph, GraphState, NodeOut, node_fn};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use uuid::Uuid;

checkpointer_for! {
    /// A store of ashore, for cognis.
    struct Store for cognis_graph, |error| CognisError::Internal(format!("{error:#}")) => CognisError
}

#[derive(GraphState, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct State {
    #[reducer(append)]
    trace: Vec<String>,
    #[reducer(ephemeral)]
    scratch: String,
}

fn node(name: &'static str, next: Option<&'static str>) -> impl cognis_graph::Node<State> + 'static {
    node_fn::<State, _, _>(name, move |_, _| async move {
        let goto = next.map_or_else(Goto::end, Goto::node);
        Ok(NodeOut { update: StateUpdate { trace: vec![name.into()], scratch: Some(name.into()) }, goto })
    })
}

fn graph(store: impl Checkpointer<State> + 'static) -> Result<CompiledGraph<State>, CognisError> {
    let graph = Graph::new().node("plan", node("plan", Some("act"))).node("act", node("act", Some("review")));
    let compiled = graph.node("review", node("review", None)).start_at("plan").compile()?;
    Ok(compiled.with_checkpointer(Arc::new(Store(store))))
}

/// Interrupts a run in one store, and resumes it in the next, which finds what the first has kept.
async fn interrupted<C: Checkpointer<State> + 'static>(run: Uuid, open: impl Fn() -> C) -> Result<(), CognisError> {
    let config = || RunnableConfig { run_id: run, ..RunnableConfig::default() };
    let first = graph(open())?.with_interrupt_before(["review"]);
    let step = match first.invoke(State::default(), config()).await {
        Err(CognisError::GraphInterrupted { step, node, .. }) if node == "review" => step,
        other => panic!("it was not interrupted: {other:?}"),
    };
    let again = graph(open())?;
    let state = again.get_state(run).await?.expect("the state at the interrupt");
    assert_eq!(state.trace, ["plan", "act"]);
    assert_eq!(again.get_state_at(run, u64::MAX).await?, None, "never another step");
    let ended = again.resume(run, step, state, config()).await?;
    assert_eq!(ended.trace, ["plan", "act", "review"]);
    assert!(again.get_state_history(run).await?.len() >= 2);
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), CognisError> {
    let root = tempfile::tempdir().expect("a place");
    let (run, memory) = (Uuid::from_u128(7), Arc::new(InMemory::new()));
    interrupted(run, || memory.clone()).await?;
    interrupted(run, || Directory::open(root.path().join("runs")).expect("a directory")).await?;
    interrupted(run, || Sqlite::open(root.path().join("runs.db")).expect("a database")).await?;
    // The same run, without the graph's own state.
    interrupted(run, || Namespaced::new(memory.clone(), "subgraph")).await?;
    Ok(())
}
