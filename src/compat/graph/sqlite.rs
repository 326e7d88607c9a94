//! Runs in one SQLite database: for many small states, where one directory for each state would cost too
//! much.

use super::records::{Kind, Records, checkpointer};
use super::worker::Worker;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use rusqlite::types::ToSql;
use rusqlite::{Connection, ErrorCode, OptionalExtension, params};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;
use uuid::Uuid;

/// Identifies a database of this library: `asho`.
const APPLICATION: i32 = 0x6173_686f;

/// The version of the table below.
const VERSION: i32 = 1;

/// How long a call waits for another process that writes.
const PATIENCE: Duration = Duration::from_secs(10);

const TABLE: &str = "CREATE TABLE record (
    run BLOB NOT NULL, kind INTEGER NOT NULL, step BLOB NOT NULL, value TEXT NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (run, kind, step)) WITHOUT ROWID";

/// Keeps runs in an SQLite database: write-ahead log, fsynced at each commit, with a digest for each record.
/// Several processes may use one database; a call that has waited for another process for 10 seconds is
/// `Busy`. One thread performs the calls, in order.
///
/// ```
/// use ashore::compat::graph::{Checkpointer, Prune, Sqlite, Uuid};
/// # let directory = tempfile::tempdir().unwrap();
/// # futures_executor::block_on(async {
/// let (store, run) = (Sqlite::open(directory.path().join("runs.db"))?, Uuid::new_v4());
/// for step in 0..5 {
///     store.save(run, step, &format!("state {step}")).await?;
/// }
/// store.prune(run, 2).await?;
/// assert_eq!(Checkpointer::<String>::list(&store, run).await?, [3, 4]);
/// # Ok::<(), ashore::Error>(())
/// # }).unwrap();
/// ```
#[derive(Debug)]
pub struct Sqlite(Worker);

impl Sqlite {
    /// Opens the runs in the database `path`, which is created when it is missing.
    ///
    /// # Errors
    /// `Invalid` when the file cannot be created, or is not a database of this library. Such a file is left
    /// unchanged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let database = connect(path).map_err(|e| e.with_path(path))?;
        Ok(Self(Worker::start(Database(database))?))
    }
}

checkpointer!(Sqlite);

struct Database(Connection);

fn connect(path: &Path) -> Result<Connection> {
    let opened = |e| failed("cannot open a database", e);
    let mut database = Connection::open(path).map_err(opened)?;
    database.busy_timeout(PATIENCE).map_err(opened)?;
    let pragma = |of: &Connection, name: &str| of.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    // Changes nothing before the database is known to belong to this library.
    let transaction = database.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate).map_err(opened)?;
    let whose = (pragma(&transaction, "application_id"), pragma(&transaction, "user_version"));
    match (whose.0.map_err(opened)?, whose.1.map_err(opened)?) {
        (APPLICATION, VERSION) => {}
        (0, 0) if pragma(&transaction, "schema_version").map_err(opened)? == 0 => {
            transaction.execute(TABLE, []).map_err(opened)?;
            transaction.pragma_update(None, "application_id", APPLICATION).map_err(opened)?;
            transaction.pragma_update(None, "user_version", VERSION).map_err(opened)?;
        }
        (application, version) => {
            let foreign =
                format!("not a database of this library; use another path application={application} version={version}");
            return Err(Error::invalid(foreign));
        }
    }
    transaction.commit().map_err(opened)?;
    database.pragma_update(None, "synchronous", "FULL").map_err(opened)?;
    database.pragma_update_and_check(None, "journal_mode", "WAL", |_| Ok(())).map_err(opened)?;
    Ok(database)
}

fn failed(what: &str, error: rusqlite::Error) -> Error {
    let kind = match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => ErrorKind::Busy,
        Some(ErrorCode::DiskFull) => ErrorKind::NoSpace,
        Some(ErrorCode::DatabaseCorrupt) => ErrorKind::Corrupt,
        Some(ErrorCode::CannotOpen | ErrorCode::NotADatabase | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            ErrorKind::Invalid
        }
        _ => ErrorKind::Unavailable,
    };
    Error::new(kind, what).with_source(error)
}

/// Encodes a step in bytes that sort like the number.
fn key(step: u64) -> [u8; 8] {
    step.to_be_bytes()
}

impl Database {
    fn write(&self, sql: &str, values: &[&dyn ToSql]) -> Result<()> {
        self.0
            .prepare_cached(sql)
            .and_then(|mut sql| sql.execute(values))
            .map(drop)
            .map_err(|e| failed("cannot write", e))
    }
}

impl Records for Database {
    fn put(&mut self, run: Uuid, kind: Kind, step: u64, value: Value) -> Result<()> {
        let (text, sql) = (value.to_string(), "INSERT OR REPLACE INTO record VALUES (?, ?, ?, ?, ?)");
        let digest = Digest::of(text.as_bytes()).to_string();
        let put = self.write(sql, params![run.as_bytes(), kind as u8, key(step), text, digest]);
        put.map_err(|e| e.with_step(step))
    }

    fn get(&mut self, run: Uuid, kind: Kind, step: Option<u64>) -> Result<Option<Value>> {
        let sql = "SELECT step, value, digest FROM record WHERE run = ? AND kind = ? AND step >= ? \
            AND (step = ?3 OR ?4) ORDER BY step DESC LIMIT 1";
        let read = |e| failed("cannot read", e);
        let mut sql = self.0.prepare_cached(sql).map_err(read)?;
        let found = sql
            .query_row(params![run.as_bytes(), kind as u8, key(step.unwrap_or(0)), step.is_none()], |row| {
                Ok((row.get::<_, [u8; 8]>(0)?, row.get::<_, String>(1)?, row.get::<_, String>(2)?))
            })
            .optional()
            .map_err(read)?;
        let Some((step, text, digest)) = found else { return Ok(None) };
        let damaged = || Error::corrupt("a record is not what was written").with_step(u64::from_be_bytes(step));
        if Digest::of(text.as_bytes()).to_string() != digest {
            return Err(damaged());
        }
        serde_json::from_str(&text).map(Some).map_err(|e| damaged().with_source(e))
    }

    fn list(&mut self, run: Uuid) -> Result<Vec<u64>> {
        let read = |e| failed("cannot list", e);
        let sql = "SELECT step FROM record WHERE run = ? AND kind = ? ORDER BY step";
        let mut sql = self.0.prepare_cached(sql).map_err(read)?;
        let steps = sql.query_map(params![run.as_bytes(), Kind::State as u8], |row| row.get::<_, [u8; 8]>(0));
        steps.map_err(read)?.map(|step| step.map(u64::from_be_bytes).map_err(read)).collect()
    }

    fn prune(&mut self, run: Uuid, keep_last: usize) -> Result<()> {
        let Some(above) = keep_last.checked_sub(1) else {
            return self.write("DELETE FROM record WHERE run = ?", params![run.as_bytes()]);
        };
        let sql = "DELETE FROM record WHERE run = ?1 AND step < \
            (SELECT step FROM record WHERE run = ?1 AND kind = ?2 ORDER BY step DESC LIMIT 1 OFFSET ?3)";
        let above = i64::try_from(above).unwrap_or(i64::MAX);
        self.write(sql, params![run.as_bytes(), Kind::State as u8, above])
    }
}
