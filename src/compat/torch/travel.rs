//! The encoding of plans and results that ranks hand to each other in notes on the storage.

use super::plan::{SavePlan, WriteItem, WriteResult};
use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A plan. Data of planners and writers can be any JSON value, so the note has it as text.
#[derive(Serialize, Deserialize)]
pub(super) struct PlanNote {
    items: Vec<WriteItem>,
    planner_data: Option<String>,
    storage_data: Option<String>,
    /// From the coordinator: the planner's data in the metadata.
    shared_data: Option<String>,
}

/// What a rank has written: name, length and data of each item.
type ResultsNote = Vec<(String, u64, String)>;

fn text(value: Option<&Value>) -> Option<String> {
    value.map(Value::to_string)
}

fn value(text: Option<String>) -> Result<Option<Value>> {
    text.map(|text| serde_json::from_str(&text).map_err(spoilt)).transpose()
}

fn spoilt(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::corrupt("a plan between ranks cannot be read: do all ranks run the same version?").with_source(error)
}

fn encode(note: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(note).map_err(|e| Error::internal("a plan cannot be sent to another rank").with_source(e))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    postcard::from_bytes(bytes).map_err(spoilt)
}

/// Encodes a plan; `shared_data` is the planner's data in the metadata.
pub(super) fn encode_plan(plan: &SavePlan, shared_data: Option<&Value>) -> Result<Vec<u8>> {
    encode(&PlanNote {
        items: plan.items.to_vec(),
        planner_data: text(plan.planner_data.as_ref()),
        storage_data: text(plan.storage_data.as_ref()),
        shared_data: text(shared_data),
    })
}

/// Decodes what [`encode_plan`] made.
pub(super) fn decode_plan(bytes: &[u8]) -> Result<(SavePlan, Option<Value>)> {
    let PlanNote { items, planner_data, storage_data, shared_data } = decode(bytes)?;
    let (planner_data, storage_data) = (value(planner_data)?, value(storage_data)?);
    Ok((SavePlan { items: Arc::new(items), planner_data, storage_data }, value(shared_data)?))
}

/// Encodes the results of a rank.
pub(super) fn encode_results(results: Vec<WriteResult>) -> Result<Vec<u8>> {
    let results = results.into_iter().map(|r| (r.fqn, r.size_in_bytes, r.storage_data.to_string()));
    encode(&results.collect::<ResultsNote>())
}

/// Decodes what [`encode_results`] made.
pub(super) fn decode_results(bytes: &[u8]) -> Result<Vec<WriteResult>> {
    let result = |(fqn, size_in_bytes, data): (String, u64, String)| {
        let storage_data = serde_json::from_str(&data).map_err(spoilt)?;
        Ok(WriteResult { fqn, size_in_bytes, storage_data })
    };
    decode::<ResultsNote>(bytes)?.into_iter().map(result).collect()
}

/// Encodes values of a state dict.
pub(super) fn encode_values(values: &BTreeMap<String, Value>) -> Result<Vec<u8>> {
    serde_json::to_vec(values).map_err(spoilt)
}

/// Decodes what [`encode_values`] made.
pub(super) fn decode_values(bytes: &[u8]) -> Result<BTreeMap<String, Value>> {
    serde_json::from_slice(bytes).map_err(spoilt)
}
