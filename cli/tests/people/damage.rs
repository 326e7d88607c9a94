//! Damage is located, and what is certain is repaired.

use crate::run::Run;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// A run of two steps, the newer with one flipped bit.
fn flipped() -> (Run, usize) {
    let run = Run::new([10, 20]);
    let place = run.offset(20, "layers.0.weight") + 4 * (17 * 100 + 90) + 3;
    run.change(&run.shard(20), |bytes| bytes[place] ^= 0x40);
    (run, place)
}

#[test]
fn verify_names_the_flipped_bit_its_element_and_both_values() {
    let (run, place) = flipped();
    let found = run.json(&["verify", "run", "--json"], 3);
    let damage = &found["damage"][0];
    assert_eq!(
        (&damage["step"], &damage["tensor"], &damage["again"]),
        (&20.into(), &"layers.0.weight".into(), &"same".into())
    );
    let flip = &damage["flip"];
    assert_eq!((&flip["offset"], &flip["bit"], &flip["masks"]), (&place.into(), &6.into(), &serde_json::json!([0x40])));
    assert_eq!(flip["elements"][0]["index"], serde_json::json!([17, 90]));
    assert!(flip["elements"][0]["written"] != flip["elements"][0]["read"], "{damage}");
    assert_eq!(found["checkpoints"][1]["repairable"], true);
    run.shows("verify-flip", &["verify", "run"]);
    run.shows("verify-one", &["verify", "run", "10"]);
}

#[test]
fn a_flipped_bit_is_repaired_in_a_copy_that_takes_the_steps_name() {
    let (run, place) = flipped();
    let damaged = fs::read(run.shard(20)).unwrap();
    let time = |file: &str| fs::metadata(run.step(20).join(file)).unwrap().modified().unwrap();
    let before = (time("manifest.json"), time("model.safetensors"));
    run.shows("repair-dry", &["repair", "run", "20"]);
    assert_eq!(fs::read(run.shard(20)).unwrap(), damaged, "a dry run writes nothing");
    run.shows("repair-sound", &["repair", "run", "10"]);

    let repaired = run.json(&["repair", "run", "20", "--yes", "--json"], 0);
    assert_eq!((&repaired["repaired"], &repaired["changes"][0]["offset"]), (&true.into(), &place.into()), "{repaired}");
    let mut sound = damaged;
    sound[place] ^= 0x40;
    assert!(fs::read(run.shard(20)).unwrap() == sound);
    assert_eq!((time("manifest.json"), time("model.safetensors")), before, "a repair is not a new save");
    assert_eq!(run.json(&["verify", "run", "--json"], 0)["valid"], true);
    let left = fs::read_dir(run.root()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| name.starts_with('.') && name != ".runs").collect::<Vec<_>>(), [""; 0]);
    assert_eq!(ashore::Catalog::open(run.root()).unwrap().latest_valid().unwrap().unwrap().checkpoint.step(), 20);
}

#[test]
fn a_flip_in_a_header_is_repaired_as_well() {
    let run = Run::new([10]);
    let sound = fs::read(run.shard(10)).unwrap();
    let place = sound.windows(6).position(|window| window == b"counts").unwrap();
    run.change(&run.shard(10), |bytes| bytes[place] ^= 0x01);
    let found = run.json(&["verify", "run", "--json"], 3);
    assert_eq!((&found["damage"][0]["tensor"], &found["damage"][0]["flip"]["offset"]), (&Value::Null, &place.into()));
    run.json(&["repair", "run", "10", "--yes", "--json"], 0);
    assert!(fs::read(run.shard(10)).unwrap() == sound);
}

#[test]
fn flips_in_the_manifest_and_in_a_table_are_located_and_repaired() {
    let run = Run::new([]);
    run.save_many(10, 700);
    for (file, place) in [("manifest.json", 40), ("manifest.json", usize::MAX), ("tensors.table", 50_000)] {
        let path = run.step(10).join(file);
        let sound = fs::read(&path).unwrap();
        // The last digit of the manifest's own digest is before two other bytes and a newline.
        let place = place.min(sound.len() - 4);
        run.change(&path, |bytes| bytes[place] ^= 0x01);
        let found = run.json(&["verify", "run", "--json"], 3);
        let damage = &found["damage"][0];
        assert_eq!((&damage["file"], &damage["flip"]["offset"]), (&file.into(), &place.into()), "{found}");
        if place == 40 {
            run.shows("verify-manifest", &["verify", "run"]);
            run.shows("repair-manifest", &["repair", "run", "10"]);
        }
        run.json(&["repair", "run", "10", "--yes", "--json"], 0);
        assert!(fs::read(&path).unwrap() == sound, "{file} {place}");
        run.json(&["verify", "run", "--json"], 0);
    }
    run.change(&run.step(10).join("manifest.json"), |bytes| (bytes[40] ^= 1, bytes[90] ^= 1).0);
    assert_eq!(run.json(&["verify", "run", "--json"], 3)["damage"][0]["flip"], Value::Null);
    let refused = run.ashore(&["repair", "run", "10", "--yes"], 80);
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
}

#[test]
fn what_is_not_certain_is_not_repaired() {
    let run = Run::new([10]);
    let place = run.offset(10, "layers.0.weight");
    run.change(&run.shard(10), |bytes| (bytes[place] ^= 1, bytes[place + 900] ^= 1).0);
    let damaged = fs::read(run.shard(10)).unwrap();
    assert_eq!(run.json(&["verify", "run", "--json"], 3)["damage"][0]["flip"], Value::Null, "two flips are not one");
    run.shows("verify-two-flips", &["verify", "run"]);
    run.shows("repair-two-flips", &["repair", "run", "10"]);
    let refused = run.json(&["repair", "run/step-00000010", "--yes", "--json"], 3);
    assert_eq!((&refused["repaired"], refused["uncertain"].as_array().unwrap().len()), (&false.into(), 1));
    assert!(fs::read(run.shard(10)).unwrap() == damaged);
    let run = Run::new([10]);
    run.change(&run.shard(10), |bytes| {
        let weights = bytes.len() - 20_000;
        bytes[weights / 4096 * 4096..][..8192].fill(0);
    });
    let found = run.json(&["verify", "run", "--json"], 3);
    assert!(found["damage"][0]["zero_pages"].as_u64().unwrap() >= 1, "{found}");
    run.shows("verify-zeros", &["verify", "run"]);
}

/// Three steps, of which the first two share their shard, and the third has its own.
fn sharing() -> (Run, usize) {
    let run = Run::new([]);
    run.save_alike([10, 20, 30]);
    run.share(10, 20);
    assert_eq!(run.json(&["verify", "run", "--json"], 0)["valid"], true);
    let place = run.offset(20, "layers.0.weight") + 4 * 1790 + 3;
    run.change(&run.shard(20), |bytes| bytes[place] ^= 0x40);
    (run, place)
}

#[test]
fn damage_of_a_shared_file_names_every_step_and_is_repaired_in_all() {
    let (run, place) = sharing();
    let found = run.json(&["verify", "run", "20", "--json"], 3);
    assert_eq!(found["damage"][0]["shared_with"], serde_json::json!([10]));
    let said = run.said(&["verify", "run"]);
    for other in [10, 20] {
        let what = format!("model.safetensors is shared with step {other}, which has the same damage.");
        assert!(said.contains(&what), "{said}");
    }
    let said = run.said(&["repair", "run", "20"]);
    assert!(said.contains("step 10 shares the damaged file, and would get the repaired one"), "{said}");

    let before = fs::metadata(run.shard(10)).unwrap();
    let others = fs::metadata(run.step(20).join("manifest.json")).unwrap();
    let repaired = run.json(&["repair", "run", "20", "--yes", "--json"], 0);
    assert_eq!((&repaired["repaired"], &repaired["changes"][0]["offset"]), (&true.into(), &place.into()));
    let shared = &repaired["shared"][0];
    assert_eq!((&shared["step"], &shared["repaired"], &shared["why"]), (&10.into(), &true.into(), &Value::Null));
    assert_eq!(run.json(&["verify", "run", "--json"], 0)["valid"], true);
    let [ten, twenty] = [10, 20].map(|step| fs::metadata(run.shard(step)).unwrap());
    assert_eq!(ten.modified().unwrap(), before.modified().unwrap(), "a repair is not a new save");
    assert_ne!(ten.ino(), before.ino(), "the damaged file was not changed in place");
    // A file system that clones gives each step a file of its own.
    assert!(ten.ino() == twenty.ino() || ten.nlink() == 1 && twenty.nlink() == 1);
    let manifest = fs::metadata(run.step(20).join("manifest.json")).unwrap();
    assert_eq!(manifest.modified().unwrap(), others.modified().unwrap());
}

#[test]
fn a_step_that_shares_a_damaged_file_and_has_other_damage_stays_as_it_is() {
    let (run, _) = sharing();
    let table = run.step(10).join("tensors.table");
    run.change(&table, |bytes| *bytes.iter_mut().rev().nth(20).unwrap() ^= 1);
    let damaged = fs::read(&table).unwrap();
    let repaired = run.json(&["repair", "run", "20", "--yes", "--json"], 3);
    assert_eq!((&repaired["repaired"], &repaired["shared"][0]["repaired"]), (&true.into(), &false.into()));
    assert!(repaired["shared"][0]["why"].is_string(), "{repaired}");
    assert!(fs::read(&table).unwrap() == damaged);
    run.json(&["verify", "run", "20", "--json"], 0);
    run.json(&["verify", "run", "10", "--json"], 3);
}
