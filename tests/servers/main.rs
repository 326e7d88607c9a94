//! Steps on real servers of object stores, with a proxy between that makes faults. `just stores` starts the
//! servers and runs these tests; without them every test fails.

mod chains;
mod executors;
mod faults;
mod http;
mod input;
mod program;
mod proxy;
mod races;
mod roots;
mod servers;
mod stock;
mod tls;

/// Runs one request of a client that ashore does not wrap.
fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
