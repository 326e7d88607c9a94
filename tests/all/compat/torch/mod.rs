mod executing;
mod failing;
mod ranks;
mod staging;
