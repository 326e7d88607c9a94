//! Published versions: publisher, followers, power cuts, and processes that are killed.

mod bad_input;
mod crashes;
mod executors;
mod fixtures;
mod following;
mod killed;
mod publishing;
mod updates;
