mod every_failing_call;
mod forgotten_handles;
mod forked;
mod futures;
mod overlap;
mod reporting;
