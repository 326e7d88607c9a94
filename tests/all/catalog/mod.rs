//! Which steps there are, and which may go.

mod a_prune_keeps_what_is_durable;
mod steps_are_listed_when_whole;
