//! A reader returns all that was written or an error, never anything else.

mod boxes;
mod damage;
mod exchanged_steps;
mod flipped_bits;
mod paths;
mod round_trip;
mod slices;
mod strided;
