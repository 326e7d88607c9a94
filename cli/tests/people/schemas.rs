//! `schemas/output.json` says what `--json` prints: real output is checked against it, and help, completions
//! and the manual are made.

use crate::run::Run;
use serde_json::{Value, json};

fn schema() -> Value {
    serde_json::from_str(include_str!("../../schemas/output.json")).unwrap()
}

/// Returns what is wrong with a value by the keywords of JSON Schema that the file uses.
fn wrong(root: &Value, schema: &Value, value: &Value, at: &str) -> Option<String> {
    if let Some(name) = schema["$ref"].as_str() {
        let target = root.pointer(name.strip_prefix('#').unwrap()).unwrap_or_else(|| panic!("no {name}"));
        return wrong(root, target, value, at);
    }
    let known = [
        "$ref",
        "$schema",
        "$defs",
        "title",
        "description",
        "type",
        "enum",
        "properties",
        "required",
        "additionalProperties",
        "items",
    ];
    if let Some(other) = schema.as_object().unwrap().keys().find(|key| !known.contains(&key.as_str())) {
        return Some(format!("{at}: the schema uses {other}, which this test does not check"));
    }
    let is = |name: &str| match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    };
    let fits = match &schema["type"] {
        Value::Null => true,
        Value::String(name) => is(name),
        names => names.as_array().unwrap().iter().any(|name| is(name.as_str().unwrap())),
    };
    if !fits {
        return Some(format!("{at}: {value} is not {}", schema["type"]));
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        return Some(format!("{at}: {value} is not one of {allowed:?}"));
    }
    if let Some(items) = value.as_array()
        && schema["items"].is_object()
    {
        return items
            .iter()
            .enumerate()
            .find_map(|(i, item)| wrong(root, &schema["items"], item, &format!("{at}[{i}]")));
    }
    let fields = value.as_object()?;
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    if let Some(missing) = required.into_iter().find(|name| !fields.contains_key(*name)) {
        return Some(format!("{at}: {missing} is missing"));
    }
    fields.iter().find_map(|(name, field)| {
        let here = format!("{at}.{name}");
        match (schema["properties"].get(name), &schema["additionalProperties"]) {
            (Some(of), _) => wrong(root, of, field, &here),
            (None, Value::Bool(false)) => Some(format!("{here} is not in the schema")),
            (None, of @ Value::Object(_)) => wrong(root, of, field, &here),
            _ => None,
        }
    })
}

fn check(verb: &str, value: &Value) {
    let root = schema();
    let of = root["$defs"].get(verb).unwrap_or_else(|| panic!("{verb} has no schema"));
    assert_eq!(wrong(&root, of, value, verb), None, "{value}");
}

#[test]
fn what_is_printed_as_json_is_what_the_schema_says() {
    let run = Run::new([10, 20, 30]);
    check("mark", &run.json(&["mark", "run", "10", "keep", "--json"], 0));
    check("mark", &run.json(&["mark", "run", "10", "none", "--json"], 0));
    check("ls", &run.json(&["ls", "run", "--json"], 0));
    check("inspect", &run.json(&["inspect", "run", "--stats", "--json"], 0));
    check("inspect", &run.json(&["inspect", "run", "--json"], 0));
    check("diff", &run.json(&["diff", "run", "10", "20", "--json"], 0));
    check("diff", &run.json(&["diff", "run", "10", "20", "--quick", "--json"], 0));
    check("verify", &run.json(&["verify", "run", "--json"], 0));
    let place = run.offset(30, "layers.0.weight");
    run.change(&run.shard(30), |bytes| bytes[place] ^= 4);
    std::fs::write(run.step(20).join("manifest.json"), "").unwrap();
    check("ls", &run.json(&["ls", "run", "--json"], 0));
    check("verify", &run.json(&["verify", "run", "--json"], 3));
    check("repair", &run.json(&["repair", "run", "30", "--json"], 3));
    check("repair", &run.json(&["repair", "run", "30", "--yes", "--json"], 0));
    let watched = String::from_utf8(run.ashore(&["watch", "run", "--for", "0s", "--json"], 80).stdout).unwrap();
    assert_eq!(watched.lines().count(), 3, "{watched}");
    watched.lines().for_each(|line| check("watch", &serde_json::from_str(line).unwrap()));
    check("convert", &run.json(&["convert", "run", "30", "--to", "hf", "out", "--json"], 0));
    check("prune", &run.json(&["prune", "run", "--keep-last", "1", "--json"], 0));
    check("prune", &run.json(&["prune", "run", "--damaged", "--yes", "--json"], 0));
    let tune = ["tune", "run", "--for", "0s", "--fails-every", "8h", "--step-ms", "0.5", "--json"];
    check("tune", &run.json(&tune, 0));
    let small = ["--model", "tiny", "--arena", "16KiB", "--json", "--dir", "demo"];
    check("demo", &run.json(&[&["demo", "--steps", "20", "--report", "page.html"][..], &small].concat(), 0));
    assert!(std::fs::read_to_string(run.root().with_file_name("page.html")).unwrap().starts_with("<!DOCTYPE html>"));
    check("report", &run.json(&["report", "demo", "--json"], 0));
    check("bench", &run.json(&["bench", "save", ".", "--no-limit", "--rounds", "1", "--scale", "0.0001", "--json"], 0));
    run.save([40, 50]);
    check("copy", &run.json(&["copy", "run", "other", "--dry-run", "--json"], 0));
    check("copy", &run.json(&["copy", "run", "other", "--json"], 0));
    check("copy", &run.json(&["copy", "run", "other", "--json"], 0));
    check("ls_of_several", &run.json(&["ls", "run", "other", "--json"], 0));
    let (older, newer) = ("run/step-00000040", "run/step-00000050");
    check("delta", &run.json(&["delta", older, newer, "-o", "delta", "--json"], 0));
    check("apply", &run.json(&["apply", older, "delta", "-o", "made", "--json"], 0));
    run.publish(3);
    check("chain", &run.json(&["chain", "chain", "--json"], 0));
    let followed = run.ashore(&["follow", "chain", "--into", "copy", "--idle", "0", "--json"], 80);
    let followed = String::from_utf8(followed.stdout).unwrap();
    assert_eq!(followed.lines().count(), 3, "{followed}");
    followed.lines().for_each(|line| check("follow", &serde_json::from_str(line).unwrap()));
    std::fs::remove_dir_all(run.root().with_file_name("chain").join("v-00000002")).unwrap();
    check("chain", &run.json(&["chain", "chain", "--json"], 3));
}

#[test]
fn a_schema_that_does_not_fit_is_noticed() {
    let root = schema();
    let ls = &root["$defs"]["ls"];
    assert_eq!(wrong(&root, ls, &json!([]), "ls"), None);
    assert!(wrong(&root, ls, &json!({}), "ls").is_some_and(|what| what.contains("is not")));
    assert!(wrong(&root, ls, &json!([{"step": 1}]), "ls").is_some_and(|what| what.contains("missing")));
    let extra = json!({"step": 1, "mark": null, "more": 1});
    assert!(wrong(&root, &root["$defs"]["mark"], &extra, "mark").is_some_and(|what| what.contains("more is not in")));
}

#[test]
fn help_completions_and_the_manual_are_made() {
    let run = Run::new([]);
    let help = String::from_utf8(run.ashore(&["--help"], 80).stdout).unwrap();
    assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
    for verb in ["ls", "inspect", "verify", "diff", "repair", "watch", "mark", "tune", "completions", "man"] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{verb} "))), "{verb}: {help}");
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let made = run.ashore(&["completions", shell], 80);
        let text = String::from_utf8(made.stdout).unwrap();
        assert!(made.status.success() && text.contains("repair") && text.contains("keep-last"), "{shell}: {text}");
    }
    let text = String::from_utf8(run.ashore(&["man"], 80).stdout).unwrap();
    for said in [".TH", "ASHORE PRUNE", "\\-\\-keep\\-last", "Exit status"] {
        assert!(text.contains(said), "{said}: {text}");
    }
}
