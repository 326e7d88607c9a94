//! Which steps the catalog lists, and which it may delete.

mod branches;
mod damaged_steps;
mod listing;
mod marks;
mod policies;
mod prune_durability;
mod prune_soundness;
