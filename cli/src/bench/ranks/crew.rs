//! The processes of the ranks: the first process starts them, gives them orders and ends them.

use super::words::{Answer, Order};
use ashore::{Error, ErrorKind, Result};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Rank processes that have met.
pub struct Crew(Vec<Rank>);

struct Rank {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Crew {
    /// Starts this program once for each rank, with the arguments of this process and those that make it a
    /// rank. Returns the answer of each rank once they have met.
    pub fn start(dir: &Path, world: u32) -> Result<(Self, Vec<Answer>)> {
        let failed = |e| Error::io("cannot start a rank", e);
        let program = std::env::current_exe().map_err(failed)?;
        let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        let token = dir.file_name().unwrap_or_default().to_os_string();
        let mut crew = Self(Vec::new());
        for rank in 0..world {
            let mut command = Command::new(&program);
            command.args(&arguments).arg("--dir").arg(dir).arg("--rank").arg(rank.to_string()).arg(&token);
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
            let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
                return Err(Error::new(ErrorKind::Internal, "a rank without pipes"));
            };
            crew.0.push(Rank { child, orders, answers: BufReader::new(answers) });
        }
        let met = crew.answers()?;
        Ok((crew, met))
    }

    /// Gives every rank its order, and waits for all answers.
    pub fn order(&mut self, order: impl Fn(usize) -> Order) -> Result<Vec<Answer>> {
        let lines = (0..self.0.len()).map(|rank| serde_json::to_string(&order(rank)).map(|line| line + "\n"));
        let lines = lines.collect::<Result<Vec<_>, _>>();
        let lines = lines.map_err(|e| Error::new(ErrorKind::Internal, "cannot write an order").with_source(e))?;
        for (rank, line) in self.0.iter_mut().zip(lines) {
            // Ignore the error: the last answer of a rank that has ended is read below.
            let _ = rank.orders.write_all(line.as_bytes());
        }
        self.answers()
    }

    fn answers(&mut self) -> Result<Vec<Answer>> {
        let mut answers = Vec::with_capacity(self.0.len());
        for (number, rank) in (0..).zip(&mut self.0) {
            let mut line = String::new();
            let failed = |why: String| {
                Err(Error::new(ErrorKind::Unavailable, format!("a rank of the benchmark failed: {why}"))
                    .with_ranks([number]))
            };
            match rank.answers.read_line(&mut line).map(|_| serde_json::from_str(&line)) {
                Ok(Ok(Answer::Failed(why))) => return failed(why),
                Ok(Ok(answer)) => answers.push(answer),
                _ => return failed("it has ended".to_owned()),
            }
        }
        Ok(answers)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        // Ranks that have left end by themselves when their orders end.
        for rank in &mut self.0 {
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }
}
