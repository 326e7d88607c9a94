//! Published versions: weights that a training program hands to other programs, each as the changes since the
//! version before it.
//!
//! A *chain* is a directory of *versions*, `v-00000001` and so on. A version is a *full*, which is a complete
//! step, or a *delta*, which says what changed since its *base*. A [`Publisher`] writes versions. A
//! [`Follow`] brings memory of another process to each new version. At learning rates near 1e-6 about 1 % of
//! bf16 weights change from one step to the next, and a delta is about 1 % of a full, or 0.6 % compressed.
//! Deltas do not help full training: fp32 masters and moments change entirely at every step. See
//! `docs/deltas.md` for more.
//!
//! **Protocol.** The first version is a full. A delta is acknowledged only when it is durable, and every
//! version that it is built on is durable, too. After an error that leaves the outcome of a publish unknown,
//! and after a restart, the publisher builds only on versions that it has read from the directory and made
//! durable itself. Numbers are never used twice: a program that goes back to an older state publishes a full
//! under the next number. Only versions older than the newest durable full are removed.
//! **Consistency.** A follower applies a delta only to the bytes that the delta was made for. Before that,
//! the follower makes the delta durable, computes the digest of the result from the base's digest, and
//! compares it. So a refused delta has written nothing. `checks/model/chain.py` tries these rules over all
//! interleavings of small sizes.
//! **Crash.** A version appears by one rename, like a step.
//!
//! ```
//! use ashore::chain::{Follow, Kind, Publisher, Weights};
//! use ashore::{HostTensor, StateDict};
//! use std::{sync::Arc, time::Duration};
//! # let dir = tempfile::tempdir().unwrap();
//! # let root = dir.path();
//! let minute = Duration::from_secs(60);
//! let publisher = Publisher::open(root)?.arena(4 << 20).build()?;
//! let mut weights = vec![1.0_f32; 1000];
//! let publish = |weights: &Vec<f32>| -> ashore::Result<_> {
//!     let mut state = StateDict::new();
//!     state.tensor("w", HostTensor::new(Arc::new(weights.clone()), [10, 100]))?;
//!     publisher.publish(state)?.wait(minute)
//! };
//! assert_eq!(publish(&weights)?.kind, Kind::Full);
//!
//! let mut follow = Follow::open(root)?.start(Weights::new())?; // in another process
//! assert_eq!(follow.advance(minute)?, Some(1));
//! weights[7] = 1.5;
//! assert!(matches!(publish(&weights)?.kind, Kind::Delta { changed: 1, .. }));
//! assert_eq!(follow.advance(minute)?, Some(2));
//! assert_eq!(follow.weights().elements::<f32>("w")?, weights);
//! # Ok::<(), ashore::Error>(())
//! ```

mod copying;
mod double;
mod encoding;
mod files;
mod follow;
mod inventory;
mod listing;
mod publisher;
mod reading;
mod recover;
mod retention;
mod settings;
mod shared;
mod watch;
mod weights;
mod writing;

pub use double::Reader;
pub use files::{Report, apply_files, delta_file};
pub use follow::{Changed, Follow, Follower, Switch, Update};
pub use listing::{Chain, Hole, Version};
pub use publisher::{Publish, Publisher};
pub use settings::{Kind, Published, PublisherBuilder};
pub use weights::Weights;

use crate::mutant::{self, Mutant};

/// Whether a follower skips its checks. Tests use this to show that they detect the missing checks.
fn blind() -> bool {
    mutant::on(Mutant::FollowBlind)
}
