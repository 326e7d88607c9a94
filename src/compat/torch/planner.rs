//! Planners: which rank writes what.

use super::plan::{Metadata, SavePlan, StorageMeta, WriteItem, metadata};
use crate::error::{Error, Result};
use crate::state::StateDict;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Decides which rank writes what: torch's `SavePlanner`. The methods are called in this order, once per
/// save; some are called on the coordinator only, as their documentation says.
pub trait SavePlanner: Send {
    /// Inspects the state of this rank.
    ///
    /// # Errors
    /// Any error fails the save on every rank.
    fn set_up_planner(
        &mut self,
        state: &StateDict<'_>,
        storage_meta: Option<&StorageMeta>,
        is_coordinator: bool,
    ) -> Result<()>;

    /// Returns what this rank could write.
    ///
    /// # Errors
    /// As [`set_up_planner`](Self::set_up_planner).
    fn create_local_plan(&mut self) -> Result<SavePlan>;

    /// On the coordinator: returns what each rank is to write, by rank, and the metadata of the whole save.
    ///
    /// # Errors
    /// As [`set_up_planner`](Self::set_up_planner).
    fn create_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<(Vec<SavePlan>, Metadata)>;

    /// Returns the final plan of this rank. Items that are left out are not written.
    ///
    /// # Errors
    /// As [`set_up_planner`](Self::set_up_planner).
    fn finish_plan(&mut self, plan: SavePlan) -> Result<SavePlan>;

    /// Returns the data to write: the tensors and values that `plan` names, each as planned. A planner that
    /// renames or converts data does so here, from `state` or from its own data. A plan that does not fit the
    /// returned state is `Invalid`. This is torch's `resolve_data` for all items at once.
    ///
    /// # Errors
    /// As [`set_up_planner`](Self::set_up_planner).
    fn resolve_data(&mut self, plan: &SavePlan, state: StateDict<'static>) -> Result<StateDict<'static>> {
        if plan.items.len() == state.len() + state.value_names().len() {
            return Ok(state);
        }
        let wanted: HashSet<_> = plan.items.iter().map(WriteItem::index).collect();
        state.kept(|name, offsets| wanted.contains(&(name, offsets)))
    }
}

/// Writes every item once: of the ranks that have an item, the one with the fewest bytes so far writes it.
///
/// State dicts are already flat. Each planner caches its plans, as long as the structure of the state stays
/// the same on every rank. In torch the class caches them.
#[derive(Debug, Default)]
pub struct DefaultSavePlanner {
    dedup_save_to_lowest_rank: bool,
    local: Option<Local>,
    global: Option<(Vec<SavePlan>, Vec<SavePlan>, Metadata)>,
    reused: u64,
}

#[derive(Debug)]
struct Local {
    fingerprint: u64,
    tensors: usize,
    values: Vec<String>,
    plan: SavePlan,
}

impl DefaultSavePlanner {
    /// Creates the planner.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the lowest rank that has an item write it.
    #[must_use]
    pub fn dedup_save_to_lowest_rank(mut self, lowest: bool) -> Self {
        self.dedup_save_to_lowest_rank = lowest;
        self.global = None;
        self
    }

    /// How often the plans of the previous save were reused.
    pub fn reused(&self) -> u64 {
        self.reused
    }
}

impl SavePlanner for DefaultSavePlanner {
    fn set_up_planner(&mut self, state: &StateDict<'_>, _: Option<&StorageMeta>, _: bool) -> Result<()> {
        let fits = |local: &Local| {
            let values = local.values.iter().map(String::as_str).eq(state.value_names());
            (local.fingerprint, local.tensors) == (state.fingerprint(), state.len()) && values
        };
        if !self.local.as_ref().is_some_and(fits) {
            let values = state.value_names().map(str::to_owned).collect();
            let (fingerprint, tensors) = (state.fingerprint(), state.len());
            self.local = Some(Local { fingerprint, tensors, values, plan: SavePlan::of(state) });
        }
        Ok(())
    }

    fn create_local_plan(&mut self) -> Result<SavePlan> {
        let set_up = self.local.as_ref().ok_or_else(|| Error::invalid("a planner was not set up"))?;
        Ok(set_up.plan.clone())
    }

    fn create_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<(Vec<SavePlan>, Metadata)> {
        let same = |a: &SavePlan, b: &SavePlan| Arc::ptr_eq(&a.items, &b.items) || a == b;
        if let Some((seen, global, metadata)) = &self.global
            && seen.len() == plans.len()
            && seen.iter().zip(&plans).all(|(a, b)| same(a, b))
        {
            self.reused += 1;
            return Ok((global.clone(), metadata.clone()));
        }
        let global = dedup(&plans, self.dedup_save_to_lowest_rank);
        let metadata = metadata(&global)?;
        self.global = Some((plans, global.clone(), metadata.clone()));
        Ok((global, metadata))
    }

    fn finish_plan(&mut self, plan: SavePlan) -> Result<SavePlan> {
        Ok(plan)
    }
}

/// Assigns each item that several ranks have to one of these ranks: to the lowest rank, or, largest items
/// first, to the rank with the fewest bytes.
fn dedup(plans: &[SavePlan], to_lowest: bool) -> Vec<SavePlan> {
    let mut ranks: HashMap<_, Vec<usize>> = HashMap::new();
    for (rank, item) in plans.iter().enumerate().flat_map(|(rank, plan)| plan.items.iter().map(move |i| (rank, i))) {
        ranks.entry(item.index()).or_default().push(rank);
    }
    if ranks.values().all(|having| having.len() == 1) {
        return plans.to_vec();
    }
    let mut load = vec![0_u64; plans.len()];
    let mut shared = Vec::new();
    for (rank, item) in plans.iter().enumerate().flat_map(|(rank, plan)| plan.items.iter().map(move |i| (rank, i))) {
        match &ranks[&item.index()][..] {
            [_] => load[rank] = load[rank].saturating_add(item.bytes()),
            [first, ..] if *first == rank => shared.push(item),
            _ => {}
        }
    }
    shared.sort_by(|a, b| b.bytes().cmp(&a.bytes()).then_with(|| a.index().cmp(&b.index())));
    for item in shared {
        let Some(having) = ranks.get_mut(&item.index()) else { continue };
        let lightest = having.iter().copied().min_by_key(|rank| if to_lowest { 0 } else { load[*rank] });
        let Some(chosen) = lightest else { continue };
        load[chosen] = load[chosen].saturating_add(item.bytes());
        *having = vec![chosen];
    }
    let mut written = HashSet::new();
    let mut global = Vec::with_capacity(plans.len());
    for (rank, plan) in plans.iter().enumerate() {
        let mine = plan.items.iter().filter(|item| ranks[&item.index()] == [rank] && written.insert(item.index()));
        global.push(SavePlan { items: Arc::new(mine.cloned().collect()), ..plan.clone() });
    }
    global
}
