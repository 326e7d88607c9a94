//! Which steps the catalog lists, and which it may delete.

mod a_prune_keeps_a_sound_step;
mod a_prune_keeps_what_is_durable;
mod branches;
mod damaged_steps;
mod policies;
mod steps_are_listed_when_whole;
