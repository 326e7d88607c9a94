//! Sessions of several ranks in a root, and the attempts that they write together.
//!
//! A session is a directory in `.ranks`. It is made under another name and renamed to its number. The rename
//! fails if another session has the number, because the directory of that session is not empty. The directory
//! holds the record of the session and the notes of its ranks.

use super::attempt::{AttemptFiles, LocalAttempt};
use super::dir::Dir;
use super::direct::{self, Bypass};
use super::owner::{Owners, Record};
use super::sys::{Kind, Rename};
use super::{durable, names, publish, transfer, trash};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::storage::shared::{SessionRecord, Shared, SharedAttempt, SharedWriting, Vetoed};
use crate::storage::{Adopted, FileReading, FileWriting, Writing, name};
use std::sync::Arc;
use uuid::Uuid;

/// The record in the directory of a session.
const RECORD: &str = "session.json";

/// Maximum length of the record of a session: 100,000 nonces.
const MAX_RECORD: u64 = 4 << 20;

/// Maximum length of an owner record.
const MAX_OWNER: u64 = 4096;

/// The interface to sessions in a local root; see the module.
#[derive(Debug)]
pub(super) struct LocalShared {
    root: Dir,
    direct: bool,
    owners: Arc<Owners>,
}

impl LocalShared {
    pub(super) fn new(root: Dir, direct: bool, owners: Arc<Owners>) -> Self {
        Self { root, direct, owners }
    }

    fn sessions(&self) -> Result<Option<Dir>> {
        match self.root.enter(names::RANKS) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            opened => Ok(Some(opened.map_err(self.root.error("cannot open the sessions", names::RANKS))?)),
        }
    }

    fn session(&self, generation: u64) -> Result<Dir> {
        let missing = || Error::new(ErrorKind::NotFound, format!("no such session generation={generation}"));
        let sessions = self.sessions()?.ok_or_else(|| missing().with_path(self.root.path()))?;
        let name = names::session(generation);
        sessions.enter(&name).map_err(sessions.error("cannot open the session", &name))
    }
}

fn generations(sessions: &Dir) -> Result<Vec<u64>> {
    let listed = sessions.list().map_err(sessions.own_error("cannot list the sessions"))?;
    Ok(listed.iter().filter_map(|name| names::parse_session(name.to_str()?)).collect())
}

impl Shared for LocalShared {
    fn open_session(&self, record: &SessionRecord) -> Result<u64> {
        let root = self.root.afresh()?;
        match root.mkdir(names::RANKS) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            made => made.map_err(root.error("cannot create the directory of sessions", names::RANKS))?,
        }
        durable::session(&root).map_err(root.error("cannot make the directory of sessions durable", names::RANKS))?;
        let sessions = root.enter(names::RANKS).map_err(root.error("cannot open the sessions", names::RANKS))?;
        let aside = format!("{}.new", record.session);
        sessions.mkdir(&aside).map_err(sessions.error("cannot create a session", &aside))?;
        let dir = sessions.enter(&aside).map_err(sessions.error("cannot open a session", &aside))?;
        let bytes = serde_json::to_vec(record)
            .map_err(|error| Error::internal("cannot write the record of a session").with_source(error))?;
        let (fd, bypass): (_, Bypass) =
            direct::create(&dir, RECORD, false).map_err(dir.error("cannot create file", RECORD))?;
        transfer::write_all(&fd, &bypass, &bytes, 0).map_err(dir.error("cannot write file", RECORD))?;
        durable::file(&fd).map_err(dir.error("cannot make file durable", RECORD))?;
        durable::session(&dir).map_err(dir.own_error("cannot make a session durable"))?;
        let mut generation = generations(&sessions)?.into_iter().max().map_or(1, |newest| newest + 1);
        // Each iteration means that another session took the number.
        while let Err(error) = sessions.rename(&aside, &names::session(generation), Rename::Plain) {
            match error.raw_os_error() {
                Some(libc::EEXIST | libc::ENOTEMPTY) => generation += 1,
                _ => return Err(sessions.error("cannot record a session", names::session(generation))(error)),
            }
        }
        durable::session(&sessions).map_err(sessions.own_error("cannot make a session durable"))?;
        Ok(generation)
    }

    fn newest(&self) -> Result<Option<(u64, Option<SessionRecord>)>> {
        let Some(sessions) = self.sessions()? else { return Ok(None) };
        let Some(newest) = generations(&sessions)?.into_iter().max() else { return Ok(None) };
        let record = self.note(newest, RECORD, MAX_RECORD).ok().flatten();
        Ok(Some((newest, record.and_then(|bytes| serde_json::from_slice(&bytes).ok()))))
    }

    fn take_over(&self, generation: u64) -> Result<()> {
        let root = self.root.afresh()?;
        let listed = root.list().map_err(root.own_error("cannot list"))?;
        let mut buried = Vec::new();
        for record in listed.iter().filter_map(|name| name.to_str()) {
            let Some((step, attempt)) = names::parse_owner(record) else { continue };
            if generation_of(&root, record)?.is_none_or(|theirs| theirs >= generation) {
                continue;
            }
            for name in [names::temp(step, attempt), names::claimed(step, attempt)] {
                let to = names::trash(Attempt::new());
                match root.rename(&name, &to, Rename::Plain) {
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                    renamed => {
                        renamed.map_err(root.error("cannot bury an attempt of an older session", &name))?;
                        buried.push((to, record));
                    }
                }
            }
        }
        durable::taken_over(&root).map_err(root.own_error("cannot make a take-over durable"))?;
        for (attempt, record) in buried {
            // The rest is trash, which any sweep removes.
            let cleared = trash::delete(&root, &attempt)
                .and_then(|()| root.unlink(record, Kind::File).map_err(root.error("cannot delete", record)));
            if let Err(error) = cleared {
                tracing::warn!(error = format_args!("{error:#}"), "an attempt of an older session is left to a sweep");
            }
        }
        if let Some(sessions) = self.sessions()? {
            for old in generations(&sessions)?.into_iter().filter(|old| *old < generation) {
                if let Err(error) = trash::delete(&sessions, &names::session(old)) {
                    tracing::debug!(error = format_args!("{error:#}"), "notes of an older session are left");
                }
            }
        }
        Ok(())
    }

    fn begin(&self, attempt: SharedAttempt<'_>, overwrite: bool) -> Result<Arc<dyn SharedWriting>> {
        let SharedAttempt { name, attempt, generation } = attempt;
        let (root, owners) = (self.root.afresh()?, self.owners.clone());
        Ok(Arc::new(LocalAttempt::begin(root, name, attempt, overwrite, self.direct, owners, Some(generation))?))
    }

    fn join(&self, attempt: SharedAttempt<'_>) -> Result<Arc<dyn SharedWriting>> {
        name::check_step(attempt.name)?;
        let root = self.root.afresh()?;
        let files = AttemptFiles::open(&root, &names::temp(attempt.name, attempt.attempt), self.direct)?;
        Ok(Arc::new(Joined { root, files, step: attempt.name.to_owned(), attempt: attempt.attempt }))
    }

    fn put_note(&self, generation: u64, name: &str, bytes: &[u8]) -> Result<()> {
        name::check_file(name).map_err(|error| error.with_kind(ErrorKind::Invalid))?;
        let dir = self.session(generation)?;
        let aside = format!("{name}.{}.new", Uuid::new_v4());
        let (fd, bypass): (_, Bypass) =
            direct::create(&dir, &aside, false).map_err(dir.error("cannot create a note", &aside))?;
        transfer::write_all(&fd, &bypass, bytes, 0).map_err(dir.error("cannot write a note", &aside))?;
        dir.rename(&aside, name, Rename::Plain).map_err(dir.error("cannot write a note", name))
    }

    fn note(&self, generation: u64, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        name::check_file(name).map_err(|error| error.with_kind(ErrorKind::Invalid))?;
        read(&self.session(generation)?, name, limit)
    }

    fn delete_note(&self, generation: u64, name: &str) -> Result<()> {
        name::check_file(name).map_err(|error| error.with_kind(ErrorKind::Invalid))?;
        let dir = self.session(generation)?;
        dir.unlink(name, Kind::File).map_err(dir.error("cannot delete a note", name))
    }
}

/// The generation of the session that writes an attempt, from its owner record.
fn generation_of(root: &Dir, record: &str) -> Result<Option<u64>> {
    let bytes = read(root, record, MAX_OWNER)?.unwrap_or_default();
    Ok(Record::parse(&bytes).and_then(|record| record.generation))
}

/// Reads a file of at most `limit` bytes; None if it does not exist.
fn read(dir: &Dir, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    let (fd, bypass) = match direct::open(dir, name, false) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        opened => opened.map_err(dir.error("cannot open file", name))?,
    };
    let len = fd.sys().stat(fd.raw()).map_err(dir.error("cannot stat file", name))?.len;
    if len > limit {
        let why = format!("a file is longer than it can be length={len} limit={limit}");
        return Err(Error::corrupt(why).with_path(dir.path().join(name)));
    }
    let mut bytes = vec![0; len as usize];
    let read = transfer::read_full(&fd, &bypass, &mut bytes, 0).map_err(dir.error("cannot read file", name))?;
    bytes.truncate(read);
    Ok(Some(bytes))
}

/// An attempt that rank 0 began, as another rank has it open.
#[derive(Debug)]
struct Joined {
    /// Its own descriptor of the root: a failed fsync spoils this attempt and no other.
    root: Dir,
    files: AttemptFiles,
    step: String,
    attempt: Attempt,
}

impl Writing for Joined {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        self.files.create(file, len)
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.files.put(file, bytes)
    }

    fn adopt(&self, file: &str, source: &dyn FileReading, head: &[u8]) -> Result<Adopted> {
        self.files.adopt(file, source, head)
    }

    fn publish(&self, _: bool) -> Result<()> {
        Err(Error::internal("only rank 0 publishes").with_path(self.files.dir.path()))
    }

    fn settle(&self) -> Result<()> {
        Ok(())
    }

    fn abandon(&self) -> Result<()> {
        Ok(())
    }
}

impl SharedWriting for Joined {
    fn sync_names(&self) -> Result<()> {
        self.files.check_sealed()?;
        self.files.sync_names()
    }

    fn claim(&self) -> Result<()> {
        Err(Error::internal("only rank 0 claims").with_path(self.files.dir.path()))
    }

    fn veto(&self) -> Result<Vetoed> {
        publish::veto(&self.root, &self.step, self.attempt)
    }
}
