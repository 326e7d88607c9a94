//! The `ashore` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    ashore_cli::run(std::env::args_os())
}
