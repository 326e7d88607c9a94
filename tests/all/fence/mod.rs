mod capture;
mod deadline;
mod failing_device;
mod forgotten;
mod late_copies;
