//! The errors that have their own names; each is the source of an `Invalid`.

use crate::error::Error;
use std::fmt;

/// Two states of one type were bound to a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointStateCollision {
    /// The type.
    pub state_id: String,
}

/// The saved fields of a state do not fit the type as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointStateSchemaError {
    /// The type.
    pub state_id: String,
    /// The fields that were saved.
    pub saved: Vec<String>,
    /// The fields of the type now.
    pub current: Vec<String>,
}

/// A value cannot be written exactly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointSerializationError {
    /// The name of the metadata or of the field.
    pub name: String,
    /// The reason.
    pub why: String,
}

impl fmt::Display for CheckpointStateCollision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "another state of this type is bound state={}", self.state_id)
    }
}

impl fmt::Display for CheckpointStateSchemaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { state_id, saved, current } = self;
        write!(f, "the fields differ from those that were saved saved={saved:?} current={current:?} state={state_id}")
    }
}

impl fmt::Display for CheckpointSerializationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} name={:?}", self.why, self.name)
    }
}

macro_rules! sources {
    ($($type:ident: $message:literal),*) => { $(
        impl std::error::Error for $type {}
        impl $type {
            /// Not a `From`: a second implementation would break inference of `?` in programs that rely on
            /// it.
            pub(super) fn error(self) -> Error {
                Error::invalid($message).with_source(self)
            }
        }
    )* };
}
sources! {
    CheckpointStateCollision: "a state cannot be bound",
    CheckpointStateSchemaError: "a state cannot be restored",
    CheckpointSerializationError: "a value cannot be kept exactly"
}
