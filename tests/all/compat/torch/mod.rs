mod executing;
mod failing;
mod job;
mod process;
mod ranks;
mod sharded;
mod staging;
