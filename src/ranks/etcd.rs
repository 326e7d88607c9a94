//! A coordinator through etcd, by the JSON gateway that every etcd server has: plain requests over HTTP.

use super::board::{Board, Life, OnBoard};
use super::{Coordinator, Hello, Member, Round, Session};
use crate::error::{Error, ErrorKind, Result};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The seconds after which the server forgets a rank that does not renew its lease.
const LEASE_SECONDS: u64 = 10;
/// The seconds for which the server keeps a call and its verdict.
const MEETING_SECONDS: u64 = 24 * 3600;
/// The time limit of a single request. After that, a hanging server is asked again, or another server is
/// asked.
const REQUEST: Duration = Duration::from_secs(5);

/// The coordinator of ranks that reach an etcd cluster, version 3.4 or later.
///
/// A rank holds a lease on its greeting, so the death of a rank on any host is noticed 10 to 15 s later. Rank
/// 0 watches the messages of a round, and each other rank watches the message of rank 0. A save costs two
/// puts and about two watches per rank. If a server does not answer, it or the next server of the list is
/// asked again, until the deadline.
///
/// Requests go to the JSON gateway at the server's client address. The gateway is present unless etcd runs
/// with `--enable-grpc-gateway=false`. Requests are neither encrypted nor authenticated: use a server, or a
/// proxy on this host, that only the job's network reaches.
///
/// ```no_run
/// use ashore::ranks::{Etcd, launcher};
/// let member = launcher::detect()?.expect("a launcher");
/// let ranks = Etcd::new(["http://etcd-0:2379", "http://etcd-1:2379"], "/runs/gpt-7", member)?;
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct Etcd(OnBoard<Keys>);

impl Etcd {
    /// Creates the coordinator of one rank. All keys begin with `prefix`, which belongs to one directory of
    /// steps.
    ///
    /// # Errors
    /// `Invalid` if no server is given, if a server does not begin with `http://`, or if the rank is not
    /// below the number of ranks. Errors of the servers are found when the ranks meet.
    pub fn new(
        servers: impl IntoIterator<Item = impl Into<String>>,
        prefix: impl Into<String>,
        member: Member,
    ) -> Result<Self> {
        let servers: Vec<String> = servers.into_iter().map(|s| s.into().trim_end_matches('/').to_owned()).collect();
        if let Some(other) = servers.iter().find(|server| !server.starts_with("http://")) {
            return Err(Error::invalid(format!("a server of etcd is given as http://host:port server={other}")));
        }
        if servers.is_empty() {
            return Err(Error::invalid("no server of etcd is given"));
        }
        // Watches have an agent of their own, because their connections are closed when a wait ends.
        let agent = || ureq::Agent::config_builder().http_status_as_error(false).proxy(None).build().new_agent();
        let client = Client { servers, agent: agent(), current: AtomicUsize::new(0) };
        let (client, prefix) = (Arc::new(client), prefix.into());
        let world = member.checked()?.world;
        Ok(Self(OnBoard::new(
            Keys { client, prefix, world, since: Mutex::default(), meeting: Mutex::default() },
            member,
        )?))
    }
}

super::board::delegate!(Etcd);

#[derive(Debug)]
struct Client {
    servers: Vec<String>,
    agent: ureq::Agent,
    /// The server that answered last.
    current: AtomicUsize,
}

impl Client {
    fn send(&self, path: &str, request: &Value, patience: Duration) -> Result<ureq::Body, ureq::Error> {
        let server = &self.servers[self.current.load(Ordering::Relaxed) % self.servers.len()];
        let call = self.agent.post(format!("{server}{path}")).content_type("application/json");
        let call = call.config().timeout_global(Some(patience)).build();
        let response = call.send(request.to_string())?;
        match response.status().as_u16() {
            200 => Ok(response.into_body()),
            status => Err(ureq::Error::StatusCode(status)),
        }
    }

    /// Sends the request until a server answers, and returns the answer. None if the answer has more than
    /// `longest` bytes.
    fn ask(&self, path: &str, request: &Value, longest: u64, until: Instant) -> Result<Option<Value>> {
        let mut pause = Duration::from_millis(20);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let asked = self.send(path, request, left.clamp(Duration::from_millis(50), REQUEST));
            let answer = asked.and_then(|mut body| body.with_config().limit(longest).read_to_string());
            let error = match answer {
                Ok(answer) => match serde_json::from_str(&answer) {
                    Ok(answer) => return Ok(Some(answer)),
                    Err(_) => Error::new(ErrorKind::Unavailable, format!("etcd answered with no JSON path={path}")),
                },
                Err(ureq::Error::BodyExceedsLimit(_)) => return Ok(None),
                Err(ureq::Error::StatusCode(status @ 400..=499)) => {
                    let what = "etcd refused a request: is this its client address, with the JSON gateway and without authentication";
                    return Err(Error::invalid(format!("{what}? status={status} path={path}")));
                }
                Err(e) => {
                    let server = self.current.fetch_add(1, Ordering::Relaxed) % self.servers.len();
                    let server = &self.servers[server];
                    Error::new(ErrorKind::Unavailable, format!("etcd does not answer server={server}")).with_source(e)
                }
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(error);
            }
            tracing::debug!(%error, "etcd is asked again");
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Sends a request whose answer is short.
    fn order(&self, path: &str, request: &Value, until: Instant) -> Result<Value> {
        let long = || Error::new(ErrorKind::Unavailable, format!("etcd answered too much path={path}"));
        self.ask(path, request, 64 << 10, until)?.ok_or_else(long)
    }

    fn grant(&self, seconds: u64, until: Instant) -> Result<String> {
        let granted = self.order("/v3/lease/grant", &json!({ "TTL": seconds.to_string() }), until)?;
        let id = granted["ID"].as_str().map(str::to_owned);
        id.ok_or_else(|| Error::new(ErrorKind::Unavailable, "etcd granted no lease"))
    }
}

#[derive(Debug)]
struct Keys {
    client: Arc<Client>,
    prefix: String,
    world: u32,
    /// The revision of the first answer since the last wait. Changes after that revision end the next wait.
    since: Mutex<Option<u64>>,
    /// The lease of this rank's calls and verdicts.
    meeting: Mutex<Option<String>>,
}

/// A lease, and the thread that renews it.
#[derive(Debug)]
struct Held {
    client: Arc<Client>,
    lease: String,
    /// Ends the thread when it is dropped.
    _stop: Sender<()>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let until = Instant::now() + Duration::from_millis(500);
        if let Err(error) = self.client.order("/v3/lease/revoke", &json!({ "ID": self.lease }), until) {
            tracing::debug!(%error, "a lease expires by itself");
        }
    }
}

impl Keys {
    fn key(&self, key: &str) -> String {
        BASE64.encode(format!("{}/{key}", self.prefix))
    }

    /// Returns key and end of the range of all names in a folder.
    fn range(&self, folder: &str) -> (String, String) {
        // '0' is the character after '/'.
        (self.key(&format!("{folder}/")), self.key(&format!("{folder}0")))
    }

    fn ask(&self, path: &str, request: &Value, longest: u64, until: Instant) -> Result<Option<Value>> {
        let answer = self.client.ask(path, request, longest, until)?;
        let revision = answer.as_ref().and_then(|answer| number(&answer["header"]["revision"]));
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        *since = since.or(revision);
        Ok(answer)
    }

    fn put_under(&self, key: &str, bytes: &[u8], lease: Option<&str>, until: Instant) -> Result<()> {
        let mut put = json!({ "key": self.key(key), "value": BASE64.encode(bytes) });
        if let Some(lease) = lease {
            put["lease"] = json!(lease);
        }
        self.client.order("/v3/kv/put", &put, until).map(drop)
    }

    fn remove_range(&self, from: String, to: String, until: Instant) {
        let range = json!({ "key": from, "range_end": to });
        if let Err(error) = self.client.order("/v3/kv/deleterange", &range, until) {
            tracing::debug!(%error, "messages of ended sessions cannot be removed");
        }
    }

    /// Waits for a change of a name with this prefix after the revision.
    fn watch(&self, prefix: &str, since: u64, patience: Duration) -> Result<(), String> {
        // '~' is after every character of a name.
        let (key, range_end) = (self.key(prefix), self.key(&format!("{prefix}~")));
        let start = (since + 1).to_string();
        let request = json!({ "create_request": { "key": key, "range_end": range_end, "start_revision": start } });
        let body = self.client.send("/v3/watch", &request, patience).map_err(|e| e.to_string())?;
        // Each answer is one line. The first line says that the watch exists, the next line has an event.
        let mut lines = BufReader::new(body.into_with_config().limit(1 << 20).reader());
        let mut line = String::new();
        loop {
            line.clear();
            match lines.read_line(&mut line) {
                Ok(0) => return Err("the watch ended".into()),
                Ok(_) if line.contains("\"events\"") => return Ok(()),
                Ok(_) if line.contains("\"canceled\"") => return Err(line),
                Ok(_) => {}
                Err(e) => return Err(e.to_string()),
            }
        }
    }
}

impl Board for Keys {
    type Held = Held;

    fn check_token(&self, token: &str) -> Result<()> {
        super::launcher::checked_token(token)
    }

    fn put(&self, key: &str, bytes: &[u8], until: Instant) -> Result<()> {
        if !key.starts_with("meeting-") {
            return self.put_under(key, bytes, None, until);
        }
        // No later session removes the meeting of a run with another token, so the meeting has to expire.
        let mut meeting = self.meeting.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if meeting.is_none() {
            meeting = Some(self.client.grant(MEETING_SECONDS, until)?);
            self.meeting.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&meeting);
        }
        self.put_under(key, bytes, meeting.as_deref(), until)
    }

    fn announce(&self, key: &str, bytes: &[u8], until: Instant) -> Result<Held> {
        let lease = self.client.grant(LEASE_SECONDS, until)?;
        let (stop, stopped) = bounded::<()>(0);
        let (client, id) = (Arc::clone(&self.client), lease.clone());
        crate::thread::spawn("ashore-lease".into(), move || {
            let third = Duration::from_secs(LEASE_SECONDS) / 3;
            while stopped.recv_timeout(third) == Err(RecvTimeoutError::Timeout) {
                // The loss of a lease matters only to other ranks. The storage decides what this rank may do.
                if let Err(error) = client.order("/v3/lease/keepalive", &json!({ "ID": id }), Instant::now() + third) {
                    tracing::warn!(%error, "a rank cannot renew its lease, and may be taken for dead");
                }
            }
        })?;
        let held = Held { client: Arc::clone(&self.client), lease, _stop: stop };
        self.put_under(key, bytes, Some(&held.lease), until)?;
        Ok(held)
    }

    fn read(&self, key: &str, longest: usize, until: Instant) -> Result<Option<Vec<u8>>> {
        let longest = longest as u64 * 4 / 3 + 4096;
        let Some(answer) = self.ask("/v3/kv/range", &json!({ "key": self.key(key) }), longest, until)? else {
            // The answer is longer than any message.
            return Ok(Some(Vec::new()));
        };
        let value = &answer["kvs"][0];
        if value.is_null() {
            return Ok(None);
        }
        Ok(Some(BASE64.decode(value["value"].as_str().unwrap_or_default()).unwrap_or_default()))
    }

    fn list(&self, folder: &str, until: Instant) -> Result<Vec<String>> {
        let (key, range_end) = self.range(folder);
        // A rank keeps the messages of two saves, and a greeting for each meeting.
        let most = 1000 + 16 * u64::from(self.world);
        let request = json!({ "key": key, "range_end": range_end, "keys_only": true, "limit": most.to_string() });
        let bytes = most * (400 + 2 * self.prefix.len() as u64);
        let Some(answer) = self.ask("/v3/kv/range", &request, bytes, until)? else {
            return Err(Error::invalid("keys of another program are among those of the ranks: give another prefix"));
        };
        let folder = format!("{}/{folder}/", self.prefix);
        let name = |found: &Value| {
            let key = String::from_utf8(BASE64.decode(found["key"].as_str()?).ok()?).ok()?;
            key.strip_prefix(&folder).map(str::to_owned)
        };
        Ok(answer["kvs"].as_array().into_iter().flatten().filter_map(name).collect())
    }

    fn remove(&self, key: &str, until: Instant) {
        if let Err(error) = self.client.order("/v3/kv/deleterange", &json!({ "key": self.key(key) }), until) {
            tracing::debug!(key, %error, "a message of the ranks cannot be removed");
        }
    }

    fn remove_others(&self, session: &str, until: Instant) {
        let (mine, end) = self.range(session);
        self.remove_range(self.key("messages-"), mine, until);
        self.remove_range(end, self.key("messages."), until);
    }

    fn life(&self, key: &str, _nearby: bool, until: Instant) -> Life {
        let counted = json!({ "key": self.key(key), "count_only": true });
        match self.client.order("/v3/kv/range", &counted, until) {
            Ok(answer) if number(&answer["count"]).unwrap_or(0) == 0 => Life::Dead,
            Ok(_) => Life::Alive,
            Err(_) => Life::Unknown,
        }
    }

    fn hint(&self) -> &'static str {
        "missing ranks have not started, hang, have ended, or use another server or prefix"
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn wait(&self, prefix: &str, turn: u32, until: Instant) {
        let since = self.since.lock().unwrap_or_else(PoisonError::into_inner).take();
        let left = || until.saturating_duration_since(Instant::now());
        // End the wait now and then, to check for ranks that have ended.
        let patience = left().min(Duration::from_secs(2));
        if patience.is_zero() {
            return;
        }
        let started = Instant::now();
        let watched = since.ok_or_else(String::new).and_then(|since| self.watch(prefix, since, patience));
        if let Err(error) = watched
            && started.elapsed() < patience / 2
        {
            tracing::debug!(error, "a watch of etcd ended early");
            std::thread::sleep(left().min(Duration::from_millis(20 << turn.min(5))));
        }
    }
}

/// The gateway encodes numbers of 64 bits as JSON strings.
fn number(value: &Value) -> Option<u64> {
    value.as_str().and_then(|text| text.parse().ok()).or_else(|| value.as_u64())
}
