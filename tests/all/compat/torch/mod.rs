mod executing;
mod failing;
mod hanging;
mod job;
mod process;
mod ranks;
mod sharded;
mod staging;
