//! What is in a step, and how two differ: whole and sharded.

use crate::run::Run;
use serde_json::json;

#[test]
fn inspect_shows_what_is_in_a_step() {
    let run = Run::new([10]);
    run.shows("inspect", &["inspect", "run", "10"]);
    run.shows("inspect-stats", &["inspect", "run", "--tensor", "*eight", "--stats"]);
    run.shows("inspect-none", &["inspect", "run", "--tensor", "x*"]);
    let inspected = run.json(&["inspect", "run", "--stats", "--json"], 0);
    assert_eq!(inspected["elements"], 6400 + 600 + 8);
    let counts = inspected["tensors"].as_array().unwrap().iter().find(|tensor| tensor["name"] == "counts").unwrap();
    let norm = counts["stats"]["norm"].as_f64().unwrap();
    assert!((norm - 800_f64.sqrt()).abs() < 1e-9, "{counts}");
    assert_eq!((&counts["stats"]["min"], &counts["stats"]["nan"]), (&json!(10.0), &json!(0)));
}

#[test]
fn diff_reads_what_digests_do_not_answer() {
    let run = Run::new([10, 20]);
    run.shows("diff", &["diff", "run", "10", "20"]);
    run.shows("diff-quick", &["diff", "run", "10", "20", "--quick", "--tensor", "layers.*"]);
    run.shows("diff-same", &["diff", "run/step-00000010", "run/step-00000010"]);
    let found = run.json(&["diff", "run", "10", "20", "--json"], 0);
    assert_eq!((&found["same"], &found["tensors"]), (&json!(1), &json!(3)));
    let weights = found["changed"].as_array().unwrap().iter().find(|one| one["name"] == "layers.0.weight").unwrap();
    assert_eq!(weights["difference"]["greatest"], 10.0);
    assert_eq!((&weights["difference"]["changed"], &weights["difference"]["elements"]), (&json!(6400), &json!(6400)));
    assert_eq!(found["values"][0], json!({"name": "lr", "a": 0.1, "b": 0.05}));
}

#[test]
fn a_sharded_step_is_shown_located_and_repaired_like_any() {
    let run = Run::new([10]);
    let converted = run.ashore(&["convert", "run", "10", "--to", "ranks", "3", "sharded/step-00000010"], 80);
    assert!(converted.status.success(), "{converted:?}");
    run.shows("inspect-sharded", &["inspect", "sharded"]);
    let same = run.json(&["diff", "run/step-00000010", "sharded/step-00000010", "--json"], 0);
    assert_eq!((&same["same"], &same["changed"]), (&json!(3), &json!([])), "boxes do not matter");
    let inspected = run.json(&["inspect", "sharded", "--json"], 0);
    let tensors = inspected["tensors"].as_array().unwrap();
    let slice = &tensors.iter().find(|tensor| tensor["name"] == "layers.0.weight").unwrap()["slices"][1];
    let root = run.root().parent().unwrap().join("sharded/step-00000010");
    let place = slice["offset"].as_u64().unwrap() as usize + 2;
    run.change(&root.join(slice["file"].as_str().unwrap()), |bytes| bytes[place] ^= 0b101);
    let found = run.json(&["verify", "sharded", "--json"], 3);
    let index = &found["damage"][0]["flip"]["elements"][0]["index"];
    assert!(index[0].as_u64().unwrap() > 0, "the index is that in the tensor, not in the box: {found}");
    run.shows("verify-sharded", &["verify", "sharded"]);
    run.json(&["repair", "sharded", "10", "--yes", "--json"], 0);
    run.json(&["verify", "sharded", "--json"], 0);
}
