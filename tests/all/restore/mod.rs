//! A reader returns all that was written or an error, never anything else.

mod a_flipped_bit_is_refused;
mod a_slice_reads_only_its_blocks;
mod a_step_exchanged_while_opening;
mod a_step_opened_by_its_path;
mod damage_is_listed_whole;
mod tensors_come_back_bit_for_bit;
