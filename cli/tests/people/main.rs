//! The program as people meet it: what its verbs print on directories of real steps, at 80 and at 200
//! columns.
//!
//! What is printed is compared with files in `shown/`. `ASHORE_BLESS=1` writes them anew.

mod book;
mod contents;
mod damage;
mod listing;
mod marks;
mod others;
mod run;
mod schemas;
mod tune;
