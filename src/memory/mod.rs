//! The arena: pinned, aligned memory bought once, lent out in slabs.
