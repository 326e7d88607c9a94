//! The storage back ends, and the local one when calls fail, owners die and names are hostile.

mod a_local_root_conforms;
mod a_memory_storage_conforms;
mod a_writer_process_conforms;
mod every_failing_call_leaves_steps_whole;
mod links_and_devices_are_not_followed;
mod locking;
mod locks_do_not_survive_into_children;
mod promises_are_kept_in_order;
mod sweeping_takes_only_dead_attempts;
mod transfers_survive_short_and_refused_calls;
