mod overlap;
mod reporting;
