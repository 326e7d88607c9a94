//! Encodes messages as bytes, with their subject, their sender and a digest. So bytes of another round or
//! another program, or truncated bytes, are never taken for a message.

use super::{Hello, MAX_MESSAGE, Phase, Round, Session};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::wire::WireError;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const MAGIC: &[u8; 4] = b"ashr";
const HEADER: usize = 4 + 1 + 16 + 8 + 4;

/// The longest envelope of a message between ranks.
pub(super) const MAX_ENVELOPE: usize = HEADER + MAX_MESSAGE + 8;

/// What an envelope is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum About {
    /// A message of a rank to rank 0.
    Gather(Round),
    /// The message of rank 0 to all.
    Tell(Round),
    /// Rank 0 calls the ranks together.
    Call(Uuid),
    /// The answer of a rank to this call.
    Greeting(Uuid),
    /// The verdict of rank 0 on this call.
    Verdict(Uuid),
}

const PHASES: [Phase; 4] = [Phase::Agree, Phase::Plan, Phase::Receipt, Phase::Outcome];

impl About {
    fn parts(self) -> (u8, Uuid, u64) {
        match self {
            Self::Gather(round) => (round.phase as u8, round.session, round.save),
            Self::Tell(round) => (4 + round.phase as u8, round.session, round.save),
            Self::Call(call) => (8, call, 0),
            Self::Greeting(call) => (9, call, 0),
            Self::Verdict(call) => (10, call, 0),
        }
    }

    fn from_parts(kind: u8, id: Uuid, save: u64) -> Option<Self> {
        let round = |phase: u8| Some(Round { session: id, save, phase: *PHASES.get(usize::from(phase))? });
        // A meeting has no save, so an envelope of a meeting that names a save is not a message.
        match (kind, save) {
            (0..4, _) => round(kind).map(Self::Gather),
            (4..8, _) => round(kind - 4).map(Self::Tell),
            (8, 0) => Some(Self::Call(id)),
            (9, 0) => Some(Self::Greeting(id)),
            (10, 0) => Some(Self::Verdict(id)),
            _ => None,
        }
    }
}

/// Packs a message.
pub(super) fn pack(about: About, rank: u32, message: &[u8]) -> Vec<u8> {
    let (kind, id, save) = about.parts();
    let mut bytes = Vec::with_capacity(HEADER + message.len() + 8);
    bytes.extend_from_slice(MAGIC);
    bytes.push(kind);
    bytes.extend_from_slice(id.as_bytes());
    bytes.extend_from_slice(&save.to_le_bytes());
    bytes.extend_from_slice(&rank.to_le_bytes());
    bytes.extend_from_slice(message);
    bytes.extend_from_slice(&Digest::of(&bytes).to_bits().to_le_bytes());
    bytes
}

/// Returns the subject, the sender and the bytes of a message. None if `bytes` are not a whole message.
pub(super) fn unpack(bytes: &[u8]) -> Option<(About, u32, &[u8])> {
    let (packed, digest) = bytes.split_last_chunk::<8>()?;
    let (magic, rest) = packed.split_first_chunk::<4>()?;
    let (kind, rest) = rest.split_first()?;
    let (id, rest) = rest.split_first_chunk::<16>()?;
    let (save, rest) = rest.split_first_chunk::<8>()?;
    let (rank, message) = rest.split_first_chunk::<4>()?;
    if magic != MAGIC || u64::from_le_bytes(*digest) != Digest::of(packed).to_bits() {
        return None;
    }
    let about = About::from_parts(*kind, Uuid::from_bytes(*id), u64::from_le_bytes(*save))?;
    Some((about, u32::from_le_bytes(*rank), message))
}

/// The message of a rank when it meets the others: its hello, and the identity of this meeting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Greeting {
    pub hello: Hello,
    /// Drawn at random at each call of `meet`, because one process can meet the others several times.
    pub meeting: Uuid,
    /// The boot of the host of the rank. A lock is meaningful only for processes of the same boot.
    pub boot: String,
}

impl Greeting {
    pub fn new(hello: &Hello) -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { hello: hello.clone(), meeting: Uuid::new_v4(), boot: boot.trim().to_owned() }
    }

    pub fn of_this_boot(&self, other: &Self) -> bool {
        !self.boot.is_empty() && self.boot == other.boot
    }

    /// # Errors
    /// `Invalid` when token and host name are too long for a message.
    pub fn pack(&self, about: About) -> Result<Vec<u8>> {
        let text = to_json(self)?;
        if text.len() > MAX_MESSAGE {
            let bytes = text.len();
            return Err(Error::invalid(format!("the run token and the host name are too long bytes={bytes}")));
        }
        Ok(pack(about, self.hello.member.rank, &text))
    }

    pub fn unpack(bytes: &[u8]) -> Option<(About, Self)> {
        let (about, rank, text) = unpack(bytes)?;
        let greeting: Self = serde_json::from_slice(text).ok()?;
        (greeting.hello.member.rank == rank).then_some((about, greeting))
    }
}

/// The result of a meeting.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Verdict {
    /// A session was opened, with these greetings in the order of ranks.
    Opened(Session, Vec<Uuid>),
    /// No session was opened.
    Refused(WireError),
}

impl Verdict {
    /// The maximum length of a verdict for `world` ranks.
    pub fn longest(world: u32) -> usize {
        MAX_ENVELOPE + 48 * world as usize
    }

    pub fn json(&self) -> Result<Vec<u8>> {
        to_json(self)
    }

    pub fn pack(&self, about: About) -> Result<Vec<u8>> {
        Ok(pack(about, 0, &self.json()?))
    }

    pub fn unpack(bytes: &[u8]) -> Option<(About, Self)> {
        let (about, rank, text) = unpack(bytes)?;
        if rank != 0 {
            return None;
        }
        Some((about, serde_json::from_slice(text).ok()?))
    }
}

/// Reads bytes as each kind of message. Panics if packing an accepted message does not give the same bytes.
pub(crate) fn read_any(bytes: &[u8]) {
    if let Some((about, rank, message)) = unpack(bytes) {
        assert_eq!(pack(about, rank, message), bytes, "a message is packed in another way");
    }
    if let Some((about, greeting)) = Greeting::unpack(bytes) {
        let again = greeting.pack(about).ok().and_then(|bytes| Greeting::unpack(&bytes));
        assert!(again.is_none_or(|again| again == (about, greeting)), "a greeting is read as another one");
    }
    let _ = Verdict::unpack(bytes);
}

fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::internal("a message cannot be written as JSON").with_source(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_message_says_what_it_is_about() {
        let id = Uuid::new_v4();
        let rounds = PHASES.map(|phase| Round { session: id, save: u64::MAX - 1, phase });
        let meeting = [About::Call(id), About::Greeting(id), About::Verdict(id)];
        for about in rounds.map(About::Gather).into_iter().chain(rounds.map(About::Tell)).chain(meeting) {
            let bytes = pack(about, 7, b"message");
            assert_eq!(unpack(&bytes), Some((about, 7, &b"message"[..])));
            for len in 0..bytes.len() {
                assert_eq!(unpack(&bytes[..len]), None, "cut short");
            }
        }
        assert_eq!(pack(meeting[0], 0, &[0; MAX_MESSAGE]).len(), MAX_ENVELOPE);
    }

    /// Fuzzing found that the number was not checked, so that such bytes were taken for a message.
    #[test]
    fn a_message_of_a_meeting_that_names_a_save_is_no_message() {
        let mut bytes = pack(About::Call(Uuid::nil()), 0, b"");
        bytes.truncate(HEADER);
        bytes[21] = 7;
        bytes.extend_from_slice(&Digest::of(&bytes).to_bits().to_le_bytes());
        assert_eq!(unpack(&bytes), None);
    }

    #[test]
    fn the_longest_verdict_is_bounded() {
        for world in [1, 64, 1000] {
            let session = Session { id: Uuid::max(), generation: u64::MAX };
            let opened = Verdict::Opened(session, vec![Uuid::max(); world as usize]);
            assert!(opened.pack(About::Verdict(Uuid::nil())).unwrap().len() <= Verdict::longest(world));
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_no_message(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..80), flip in any::<proptest::sample::Index>(),
        ) {
            prop_assert!(unpack(&bytes).is_none());
            let mut packed = pack(About::Call(Uuid::nil()), 1, &bytes);
            let at = flip.index(packed.len());
            packed[at] ^= 0x10;
            prop_assert!(unpack(&packed).is_none());
            bytes.truncate(8);
            let _ = (Greeting::unpack(&pack(About::Call(Uuid::nil()), 1, &bytes)), Verdict::unpack(&bytes));
        }
    }
}
