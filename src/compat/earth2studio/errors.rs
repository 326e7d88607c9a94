//! The errors that have names of their own; each is the source of an `Invalid`.

use crate::error::Error;
use std::fmt;

/// Two states of one type were bound to a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointStateCollision {
    /// The type.
    pub state_id: String,
}

/// What was saved of a state does not fit the type as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointStateSchemaError {
    /// The type.
    pub state_id: String,
    /// The fields that were saved.
    pub saved: Vec<String>,
    /// The fields that there are.
    pub current: Vec<String>,
}

/// Something cannot be written so that it comes back as it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointSerializationError {
    /// The metadata or the field.
    pub name: String,
    /// Why.
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
        write!(f, "the fields are not those that were saved saved={saved:?} current={current:?} state={state_id}")
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
            /// Not a `From`: a second one would leave `?` without a type in programs that infer theirs.
            pub(super) fn error(self) -> Error {
                Error::invalid($message).with_source(self)
            }
        }
    )* };
}
sources! {
    CheckpointStateCollision: "a state cannot be bound",
    CheckpointStateSchemaError: "a state cannot be restored",
    CheckpointSerializationError: "something cannot be kept exactly"
}
