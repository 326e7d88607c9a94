mod executing;
mod failing;
mod process;
mod ranks;
mod staging;
