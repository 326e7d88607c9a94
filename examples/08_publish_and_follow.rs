//! A trainer publishes weights, and two servers follow. One server updates its only copy in place. The other
//! keeps two copies, so that readers never wait. In real use the servers are other processes or machines.

use ashore::chain::{Follow, Kind, Publisher, Switch, Weights};
use ashore::{HostTensor, Result, StateDict};
use half::bf16;
use std::{path::Path, sync::Arc, thread, time::Duration};

const VERSIONS: u64 = 5;
const LONG: Duration = Duration::from_secs(60);

fn train(root: &Path) -> Result<Vec<bf16>> {
    let publisher = Publisher::open(root)?.arena(8 << 20).build()?;
    let mut weights = vec![bf16::ONE; 1 << 20];
    for version in 1..=VERSIONS {
        for weight in weights.iter_mut().skip(version as usize).step_by(100) {
            *weight = bf16::from_bits(weight.to_bits() + 1); // a small update: the last place of one weight in 100
        }
        let mut state = StateDict::new();
        state.tensor("model.weight", HostTensor::new(Arc::new(weights.clone()), [1024, 1024]))?;
        let published = publisher.publish(state)?.wait(LONG)?;
        match published.kind {
            Kind::Delta { changed, .. } => println!("version {version}: {changed} changed, {} bytes", published.bytes),
            _ => println!("version {version}: all of it, {} bytes", published.bytes),
        }
    }
    Ok(weights)
}

fn serve(root: &Path, switch: Switch) -> Result<Vec<bf16>> {
    let mut follow = Follow::open(root)?.switch(switch).start(Weights::new())?;
    let reader = follow.reader(); // threads that serve requests would use this
    while follow.version() != Some(VERSIONS) {
        let version = follow.advance(LONG)?.expect("a version within a minute");
        if let Some(reader) = &reader {
            assert_eq!(reader.get().version(), Some(version));
        }
    }
    follow.weights().verify()?;
    follow.weights().elements("model.weight")
}

fn main() -> Result<()> {
    let root = &std::env::temp_dir().join(format!("ashore-chain-{}", std::process::id()));
    std::fs::create_dir_all(root).map_err(|e| ashore::Error::io("cannot make a directory", e))?;
    let (trained, one, two) = thread::scope(|scope| {
        let servers = [Switch::InPlace, Switch::Double].map(|switch| scope.spawn(move || serve(root, switch)));
        let trained = train(root);
        let [one, two] = servers.map(|server| server.join().expect("a server"));
        (trained, one, two)
    });
    let trained = trained?;
    assert!(one? == trained && two? == trained);
    let _ = std::fs::remove_dir_all(root);
    Ok(())
}
