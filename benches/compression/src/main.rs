//! Would lossless compression shorten the time to durable? `just compression` trains the demo and runs this
//! study on its directory. The study has three parts: every scheme on every kind of data; the best scheme of
//! each kind on more memory and on two threads; and the best schemes from memory to disk. The answer is in
//! `docs/decisions/0001-compression.md`.

mod block;
mod coder;
mod coding;
mod data;
mod disk;
mod figures;
mod memory;
mod parts;
mod pipeline;
mod planes;
mod whole;

use std::error::Error;
use std::path::Path;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).ok_or("usage: compression-study DIRECTORY-OF-THE-DEMO")?;
    let dir = Path::new(&dir);
    let began = Instant::now();
    let mut kinds = data::trained(dir)?;
    kinds.extend(data::noise());
    for kind in &kinds {
        println!("{}: {} bytes{}", kind.name, kind.bytes.len(), zeros(kind));
    }
    let chosen = parts::every_scheme(dir, &kinds)?;
    parts::two_threads(dir, &kinds, &chosen)?;
    whole::whole_way(dir, &kinds, &chosen)?;
    println!("\n{:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// The share of zeros in the data: weights that no example ever used have zero moments.
fn zeros(kind: &data::Kind) -> String {
    let zeros = kind.bytes.chunks(kind.width).filter(|element| element.iter().all(|&b| b == 0)).count();
    format!(", {:.1} % of the elements zero", 100.0 * (zeros * kind.width) as f64 / kind.bytes.len() as f64)
}
