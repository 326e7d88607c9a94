//! Tiers: roots behind an executor's root, to which durable steps are copied.
//!
//! # Safety argument
//! The safety argument of the crate applies.
#![expect(unsafe_code, reason = "exported names, and the program's pointers; argument above")]

use crate::failure::{Result, run, text};
use crate::given;
use crate::handles::{self, ashore_executor, ashore_save};
use crate::status::ashore_status::ASHORE_OK;
use ashore_core::tiers::{Tier, TierReport, TierState};
use ashore_core::{Error, ErrorKind};
use serde_json::{Value, json};
use std::ffi::c_char;
use std::ptr;

/// Waits until the step of a save is also durable in the tier of this name; `ashore_save_wait` covers only
/// the executor's own root. Returns the failure of the save; ASHORE_CANCELLED if the save did not begin, or
/// the tier does not want the step any more; ASHORE_CONFLICT if another session owns the tier;
/// ASHORE_INVALID for a tier that the executor of this process does not have. ASHORE_DEADLINE means not yet,
/// and the step can be waited for again; after `ashore_close` it means that the step was not promoted. While
/// a tier is away, the step does not become durable in it.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_save_durable_in(save: *mut ashore_save, tier: *const c_char, seconds: f64) -> i32 {
    run(|| {
        let save = handles::find(save)?;
        // SAFETY: see the safety argument of the crate.
        let tier = unsafe { given::text("tier", tier)? };
        save.durable_in(tier).wait(given::seconds(seconds)?)?;
        Ok(ASHORE_OK)
    })
}

/// Makes a JSON array of what each tier has and lacks: [{"tier": "shared", "root": "...", "state": "ours",
/// "newest": 8, "lacks": [], "forks": [], "error": null}, ...]. `state` is "ours", "away" (the tier does not
/// answer at present) or "lost" (another session owns the tier). The array is empty if another rank promotes.
/// Free the text with ashore_text_free.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ashore_tiers(executor: *mut ashore_executor, json: *mut *mut c_char) -> i32 {
    run(|| {
        // SAFETY: see the safety argument of the crate.
        let json = unsafe { given::result("json", json)? };
        *json = ptr::null_mut();
        let reports = handles::find(executor)?.tiers().iter().map(of_report).collect();
        *json = text(&Value::Array(reports).to_string()).into_raw();
        Ok(ASHORE_OK)
    })
}

fn of_report(report: &TierReport) -> Value {
    let state = match report.state {
        TierState::Ours => "ours",
        TierState::Lost => "lost",
        _ => "away",
    };
    json!({
        "tier": report.tier,
        "root": report.root.to_string_lossy(),
        "state": state,
        "newest": report.newest,
        "lacks": report.lacks,
        "forks": report.forks,
        "error": report.error.as_ref().map(|error| format!("{error:#}")),
    })
}

/// Removes the tiers from the settings, and parses them.
pub fn taken(settings: &mut Value) -> Result<Vec<Tier>> {
    let tiers = settings.as_object_mut().and_then(|settings| settings.remove("tiers"));
    let wrong = "`tiers` do not parse: they are an array of objects with `root`, `name`, `keep_last`, `keep_every`, \
                 `unpromoted`";
    let parsed = tiers.map_or_else(|| Ok(Vec::new()), serde_json::from_value);
    parsed.map_err(|e| Error::new(ErrorKind::Invalid, wrong).with_source(e).into())
}
