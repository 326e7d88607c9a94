//! Ranks other than rank 0: they read the tiers that rank 0 has taken over, and promote nothing.
//!
//! **Consistency.** All ranks must find the same newest step. So a rank reads exactly the tiers that rank 0
//! has noted as taken over, by the lineages in that note. A tier that the rank cannot reach is an error,
//! where a process alone leaves the tier out.

use super::behind::{Behind, Part};
use super::line::{Line, Ours, Standing};
use super::lineage::{Found, Looked, Note};
use super::{Tier, open};
use crate::catalog::Catalog;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::Storage;
use crate::sync::lock;
use std::sync::Arc;

impl Behind {
    /// Makes the tiers that rank 0 has taken over, as another rank sees them.
    ///
    /// # Errors
    /// `Invalid` if this rank does not see a tier of rank 0. A tier that does not answer is tried again when
    /// something is read.
    pub fn follow(root: Arc<dyn Storage>, tiers: Vec<Tier>, part: Part) -> Result<Arc<Self>> {
        let behind = Self::over(root, Note::default(), tiers, part)?;
        match behind.refresh() {
            Err(error) if error.kind() == ErrorKind::Invalid => return Err(error),
            Err(error) => tracing::warn!(error = format_args!("{error:#}"), "a tier is away"),
            Ok(()) => {}
        }
        Ok(Arc::new(behind))
    }

    /// Whether several ranks read the tiers.
    pub(super) fn several(&self) -> bool {
        self.part != Part::Alone
    }

    /// Reads the note of rank 0 about the tiers, unless this process takes them over itself.
    ///
    /// # Errors
    /// `Invalid` if this rank does not see a tier of rank 0; the reason if a tier cannot be reached.
    pub(super) fn refresh(&self) -> Result<()> {
        let (Part::Follows { generation, .. }, Some(shared)) = (self.part, &self.shared) else { return Ok(()) };
        let mut note = Note::of(shared.as_ref(), generation)?;
        for line in &self.lines {
            let is_ours = note.ours.contains(&*line.name);
            let mut state = lock(&line.state);
            state.lineage = note.tiers.remove(&*line.name).unwrap_or_default();
            if !is_ours {
                state.standing = Standing::Away;
                continue;
            }
            let reached = matches!(state.standing, Standing::Ours(_));
            drop(state);
            if !reached {
                let ours = self.see(line).map_err(|error| line.located("this rank does not reach a tier", &error))?;
                lock(&line.state).standing = Standing::Ours(Arc::new(ours));
            }
        }
        Ok(())
    }

    /// Opens a tier that rank 0 has taken over.
    fn see(&self, line: &Line) -> Result<Ours> {
        let storage = open(&line.tier.root)?;
        let look = Looked::at(storage.as_ref())?;
        if look.shared.is_some() && look.found != Found::Session(self.session) {
            let why = "this rank does not see what rank 0 has written to the tier: give all ranks the same shared \
                       directory or URL, and no other job the same tier";
            return Err(Error::invalid(why).with_path(&line.place));
        }
        let catalog = Catalog::over(storage.clone());
        Ok(Ours { storage, catalog, shared: look.shared, generation: self.generation })
    }
}
