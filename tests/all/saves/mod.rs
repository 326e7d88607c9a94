mod engines;
mod every_failing_call;
mod forgotten_handles;
mod forked;
mod futures;
mod hostile_callers;
mod overlap;
mod reporting;
