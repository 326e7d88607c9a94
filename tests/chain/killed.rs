//! A publisher and two followers, killed again and again: at every look each follower's bytes are those of a
//! published version, and in the end both have the newest. `ASHORE_VERSIONS` sets how many versions there
//! are.

use crate::fixtures::{Model, random, small};
use ashore::chain::{Chain, Follow, Publisher, Switch, Weights};
use std::collections::HashSet;
use std::fs::{File, OpenOptions, read_to_string};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ROLE: &str = "ASHORE_CHAIN_ROLE";
const DIR: &str = "ASHORE_CHAIN_DIR";
const ELEMENTS: usize = 8000;

fn versions() -> u64 {
    std::env::var("ASHORE_VERSIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(100)
}

/// A sum over all bytes that does not come from the library.
fn sum(weights: &Weights<'_>) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    for name in ["embedding.weight", "layer.weight", "scale"] {
        for byte in weights.bytes(name).unwrap() {
            sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    sum
}

fn log(path: &Path) -> File {
    OpenOptions::new().create(true).append(true).open(path).unwrap()
}

/// The weights as the newest version has them, which go on from there.
fn read(root: &Path) -> Option<Model> {
    let mut follow = Follow::open(root).unwrap().start(Weights::new()).unwrap();
    follow.advance(Duration::ZERO).unwrap()?;
    let numbers = |name| bytemuck::pod_collect_to_vec(follow.weights().bytes(name).unwrap());
    let scale = follow.weights().elements("scale").unwrap();
    Some(Model { embedding: numbers("embedding.weight"), layer: numbers("layer.weight"), scale })
}

fn sum_of(model: &Model) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    let tensors: [&[u8]; 2] = [bytemuck::cast_slice(&model.embedding), bytemuck::cast_slice(&model.layer)];
    for byte in tensors.into_iter().chain([bytemuck::cast_slice(&model.scale)]).flatten() {
        sum = (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    sum
}

fn publish_until_killed(dir: &Path) {
    let root = dir.join("chain");
    let mut model = read(&root).unwrap_or_else(|| Model::new(1, ELEMENTS));
    let id = u64::from(std::process::id());
    let builder = Publisher::open(&root).unwrap().full_every(20).grace(4);
    let publisher = small(if id % 5 == 0 { builder.begin_with_full() } else { builder });
    let (mut intents, mut ends) = (log(&dir.join("intents")), log(&dir.join("ends")));
    let mut turn = 0;
    while publisher.newest().unwrap_or(0) < versions() {
        turn += 1;
        model.update(id << 16 | turn, 100);
        writeln!(intents, "{}", sum_of(&model)).unwrap();
        let published = publisher.publish(model.state()).unwrap().wait(Duration::from_secs(60)).unwrap();
        writeln!(ends, "{} {}", published.version, sum_of(&model)).unwrap();
    }
    publisher.prune().unwrap();
}

fn follow_until_killed(dir: &Path, role: &str) {
    let mut follower = Follow::open(dir.join("chain")).unwrap().poll_every(Duration::from_millis(20));
    if role == "double" {
        follower = follower.switch(Switch::Double).copy_to(dir.join("own")).unwrap();
    }
    let mut follow = follower.start(Weights::new()).unwrap();
    let mut looks = log(&dir.join(role));
    loop {
        let applied = match follow.next(Duration::from_millis(100)) {
            Ok(update) => update.map(|update| follow.apply(update)).transpose(),
            Err(error) => Err(error),
        };
        if let Err(error) = applied {
            writeln!(looks, "error {error:#}").unwrap();
        }
        if let Some(version) = follow.version() {
            writeln!(looks, "{version} {}", sum(follow.weights())).unwrap();
        }
    }
}

/// Not a test of its own: what the processes of the test below do.
#[test]
fn a_process_of_the_test_with_kills() {
    let Some(role) = std::env::var_os(ROLE) else { return };
    let (role, dir) = (role.into_string().unwrap(), PathBuf::from(std::env::var_os(DIR).unwrap()));
    if role == "publisher" { publish_until_killed(&dir) } else { follow_until_killed(&dir, &role) }
}

fn start(dir: &Path, role: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "killed::a_process_of_the_test_with_kills", "--nocapture"]);
    command.env(ROLE, role).env(DIR, dir).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(log(&dir.join("stderr"))).spawn().unwrap()
}

/// The whole lines of a log: what a kill cut off is not one.
fn lines(path: &Path) -> Vec<String> {
    let text = read_to_string(path).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(str::to_owned).collect()
}

#[test]
fn killed_publishers_and_followers_never_show_anything_but_published_versions() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let dir = dir.path();
    std::fs::create_dir(dir.join("chain")).unwrap();
    let roles = ["publisher", "in_place", "double"];
    let mut children = roles.map(|role| start(dir, role));
    let (mut next, mut kills) = (random(u64::from(std::process::id())), [0; 3]);
    let deadline = Instant::now() + Duration::from_secs(60 + versions());
    let newest =
        || lines(&dir.join("ends")).last().and_then(|line| line.split(' ').next()?.parse().ok()).unwrap_or(0_u64);
    while newest() < versions() {
        assert!(Instant::now() < deadline, "stuck at {}: {:?}", newest(), lines(&dir.join("stderr")));
        std::thread::sleep(Duration::from_millis(10 + next() % 100));
        let one = next() as usize % 3;
        let ended = children[one].try_wait().unwrap();
        assert!(ended.is_none_or(|status| one == 0 && status.success()), "{one}: {:?}", lines(&dir.join("stderr")));
        children[one].kill().unwrap();
        children[one].wait().unwrap();
        children[one] = start(dir, roles[one]);
        kills[one] += 1;
    }
    assert!(children[0].wait().unwrap().success());
    let last = lines(&dir.join("ends")).pop().unwrap();
    for role in &roles[1..] {
        while !lines(&dir.join(role)).contains(&last) {
            assert!(Instant::now() < deadline, "{role} does not reach {last}: {:?}", lines(&dir.join(role)).last());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    for child in &mut children[1..] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let published: HashSet<String> = lines(&dir.join("intents")).into_iter().collect();
    for role in &roles[1..] {
        let looks = lines(&dir.join(role));
        // A kill can cut a line, and the next process goes on in it.
        let sums = looks.iter().filter_map(|look| look.split_once(' ')).filter(|(version, _)| *version != "error");
        let wrong: Vec<_> = sums.filter(|(_, sum)| !published.contains(*sum)).collect();
        assert!(wrong.is_empty(), "{role}: {wrong:?}");
        let errors: Vec<_> = looks.iter().filter(|look| look.starts_with("error")).collect();
        assert!(errors.is_empty(), "{role}: {errors:?}");
        assert!(!looks.is_empty());
    }
    assert!(Chain::open(dir.join("chain")).unwrap().holes().unwrap().is_empty());
    assert!(kills.iter().sum::<u32>() > 2, "{kills:?}");
}
