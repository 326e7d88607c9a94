//! Adapts a store of this crate to an engine that defines its own `Checkpointer` trait.

use super::{ActiveSnapshot, Checkpointer, GraphState};
use crate::error::Result;
use async_trait::async_trait;
use std::sync::Arc;
use uuid::Uuid;

/// A shared store.
#[async_trait]
impl<S: GraphState, C: Checkpointer<S> + ?Sized> Checkpointer<S> for Arc<C> {
    async fn save(&self, run_id: Uuid, step: u64, state: &S) -> Result<()> {
        (**self).save(run_id, step, state).await
    }

    async fn load(&self, run_id: Uuid, step: Option<u64>) -> Result<Option<S>> {
        (**self).load(run_id, step).await
    }

    async fn list(&self, run_id: Uuid) -> Result<Vec<u64>> {
        (**self).list(run_id).await
    }

    async fn save_active(&self, run_id: Uuid, step: u64, active: &[ActiveSnapshot]) -> Result<()> {
        (**self).save_active(run_id, step, active).await
    }

    async fn load_active(&self, run_id: Uuid, step: u64) -> Result<Vec<ActiveSnapshot>> {
        (**self).load_active(run_id, step).await
    }
}

/// Makes a type that implements the `Checkpointer` of an engine, such as `cognis_graph`, with a store of this
/// crate. The arguments are the name of the type; the crate or module of the engine that has `Checkpointer`,
/// `GraphState` and `ActiveSnapshot`; the conversion of an error; and the type of the converted error.
///
/// ```
/// # mod engine {
/// #     pub trait GraphState: Sized + Send + Sync + 'static { type Update: Default + Send + 'static; fn apply(&mut self, update: Self::Update); }
/// #     pub struct ActiveSnapshot { pub node_name: String, pub payload: Option<serde_json::Value> }
/// #     #[async_trait::async_trait]
/// #     pub trait Checkpointer<S: GraphState>: Send + Sync {
/// #         async fn save(&self, run_id: uuid::Uuid, step: u64, state: &S) -> Result<(), String>;
/// #         async fn load(&self, run_id: uuid::Uuid, step: Option<u64>) -> Result<Option<S>, String>;
/// #         async fn list(&self, run_id: uuid::Uuid) -> Result<Vec<u64>, String>;
/// #         async fn save_active(&self, run_id: uuid::Uuid, step: u64, active: &[ActiveSnapshot]) -> Result<(), String>;
/// #         async fn load_active(&self, run_id: uuid::Uuid, step: u64) -> Result<Vec<ActiveSnapshot>, String>;
/// #     }
/// # }
/// use ashore::compat::graph::{InMemory, checkpointer_for};
/// checkpointer_for! {
///     /// A store of ashore, for the engine.
///     pub struct Store for engine, |error| format!("{error:#}") => String
/// }
/// let store = Store(InMemory::new()); // or a `Directory`, or an `Arc` of either
/// # struct State;
/// # let _: fn(&Store<InMemory>) -> &dyn engine::Checkpointer<Counter> = |store| store;
/// # #[derive(serde::Serialize, serde::Deserialize)]
/// # struct Counter(u32);
/// # impl engine::GraphState for Counter { type Update = u32; fn apply(&mut self, update: u32) { self.0 += update } }
/// ```
#[doc(hidden)]
#[macro_export]
macro_rules! __checkpointer_for {
    ($(#[$meta:meta])* $visibility:vis struct $name:ident for $($engine:ident)::+, $convert:expr => $error:ty) => {
        $(#[$meta])*
        #[derive(Clone, Debug)]
        $visibility struct $name<C>(pub C);

        impl<C> $name<C> {
            fn converted<T>(result: $crate::Result<T>) -> ::core::result::Result<T, $error> {
                let convert: fn($crate::Error) -> $error = $convert;
                result.map_err(convert)
            }
        }

        #[$crate::compat::graph::async_trait]
        impl<S, C> $($engine)::+::Checkpointer<S> for $name<C>
        where
            S: $($engine)::+::GraphState + $crate::compat::graph::GraphState,
            C: $crate::compat::graph::Checkpointer<S>,
        {
            async fn save(&self, run: $crate::compat::graph::Uuid, step: u64, state: &S) -> ::core::result::Result<(), $error> {
                Self::converted($crate::compat::graph::Checkpointer::<S>::save(&self.0, run, step, state).await)
            }

            async fn load(
                &self,
                run: $crate::compat::graph::Uuid,
                step: ::core::option::Option<u64>,
            ) -> ::core::result::Result<::core::option::Option<S>, $error> {
                Self::converted($crate::compat::graph::Checkpointer::<S>::load(&self.0, run, step).await)
            }

            async fn list(&self, run: $crate::compat::graph::Uuid) -> ::core::result::Result<::std::vec::Vec<u64>, $error> {
                Self::converted($crate::compat::graph::Checkpointer::<S>::list(&self.0, run).await)
            }

            async fn save_active(
                &self,
                run: $crate::compat::graph::Uuid,
                step: u64,
                active: &[$($engine)::+::ActiveSnapshot],
            ) -> ::core::result::Result<(), $error> {
                let ours = |task: &$($engine)::+::ActiveSnapshot| $crate::compat::graph::ActiveSnapshot {
                    node_name: task.node_name.clone(),
                    payload: task.payload.clone(),
                };
                let active: ::std::vec::Vec<_> = active.iter().map(ours).collect();
                Self::converted($crate::compat::graph::Checkpointer::<S>::save_active(&self.0, run, step, &active).await)
            }

            async fn load_active(
                &self,
                run: $crate::compat::graph::Uuid,
                step: u64,
            ) -> ::core::result::Result<::std::vec::Vec<$($engine)::+::ActiveSnapshot>, $error> {
                let active = $crate::compat::graph::Checkpointer::<S>::load_active(&self.0, run, step).await;
                let theirs = |task: $crate::compat::graph::ActiveSnapshot| $($engine)::+::ActiveSnapshot {
                    node_name: task.node_name,
                    payload: task.payload,
                };
                Self::converted(active.map(|active| active.into_iter().map(theirs).collect()))
            }
        }
    };
}
