//! A server for tests. It speaks the part of the protocol of S3 that uploads and ranges need, and misbehaves
//! as a test requests.

use super::client::Client;
use super::uploads::Connector;
use crate::digest::Digest;
use crate::sync::{Mutex, lock};
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientOptions, RetryConfig};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// How a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Well,
    /// The peer never reads the body and never answers, until it has recovered.
    Deaf,
    /// With this status, before the body, which is never read.
    Early(u16),
    /// With this status, after the body was read.
    Status(u16),
    /// Carries the request out, but closes the connection before the answer.
    Lost,
    /// Closes the connection after this many bytes of the body of the answer.
    Cut(usize),
    /// As `Cut`, but the connection stays open and silent.
    Stall(usize),
    /// A bit of the body of the answer is flipped.
    Flip,
}

/// A request, with the fields by which tests distinguish requests.
#[derive(Debug)]
pub(super) struct Asked {
    pub method: String,
    pub key: String,
    pub query: String,
    pub range: Option<Range<usize>>,
    /// The tag that the object must have; `*` for an object that must not exist.
    condition: Option<String>,
    /// How many requests came before it.
    pub number: usize,
}

impl Asked {
    pub fn is_part(&self) -> bool {
        self.method == "PUT" && self.query.contains("partNumber")
    }

    fn query(&self, name: &str) -> Option<&str> {
        self.query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }
}

type Script = dyn Fn(&Asked) -> Answer + Send + Sync;

#[derive(Default)]
struct Kept {
    objects: BTreeMap<String, Vec<u8>>,
    uploads: BTreeMap<String, BTreeMap<usize, Vec<u8>>>,
    asked: Vec<String>,
}

/// See the module.
pub(super) struct Peer {
    address: String,
    state: Arc<State>,
}

struct State {
    kept: Mutex<Kept>,
    script: Box<Script>,
    well: AtomicBool,
}

impl Peer {
    pub fn start(script: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State { kept: Mutex::default(), script: Box::new(script), well: AtomicBool::new(false) });
        let serving = state.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let state = serving.clone();
                thread::spawn(move || _ = serve(&state, &stream));
            }
        });
        Self { address, state }
    }

    /// Answers every later request correctly.
    pub fn recover(&self) {
        self.state.well.store(true, Ordering::Release);
    }

    /// A client of this server.
    pub fn client(&self, patience: Duration) -> Client {
        let retry = RetryConfig {
            backoff: BackoffConfig { init_backoff: Duration::from_millis(5), ..BackoffConfig::default() },
            max_retries: 1,
            retry_timeout: Duration::from_secs(1),
        };
        let options = ClientOptions::new().with_allow_http(true).with_timeout_disabled();
        let store = AmazonS3Builder::new()
            .with_endpoint(&self.address)
            .with_bucket_name("bucket")
            .with_access_key_id("key")
            .with_secret_access_key("secret")
            .with_unsigned_payload(true)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
            .with_client_options(options)
            .with_retry(retry)
            .with_http_connector(Connector)
            .build()
            .unwrap();
        Client::new(Arc::new(store), Key::default(), "s3://bucket").with_patience(patience)
    }

    pub fn object(&self, key: &str) -> Option<Vec<u8>> {
        lock(&self.state.kept).objects.get(key).cloned()
    }

    pub fn insert(&self, key: &str, bytes: Vec<u8>) {
        lock(&self.state.kept).objects.insert(key.into(), bytes);
    }

    pub fn remove(&self, key: &str) {
        lock(&self.state.kept).objects.remove(key);
    }

    /// The methods, keys and queries of all requests so far.
    pub fn asked(&self) -> Vec<String> {
        lock(&self.state.kept).asked.clone()
    }

    /// How many uploads are neither completed nor aborted.
    pub fn uploads(&self) -> usize {
        lock(&self.state.kept).uploads.len()
    }
}

/// Serves one connection.
fn serve(state: &State, stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace();
        let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default());
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let key = path.trim_start_matches("/bucket").trim_start_matches('/').to_owned();
        let (mut length, mut range, mut condition) = (0, None, None);
        loop {
            let mut header = String::new();
            reader.read_line(&mut header)?;
            let Some((name, value)) = header.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().unwrap(),
                "if-match" | "if-none-match" => condition = Some(value.to_owned()),
                "range" => {
                    let (start, end) = value.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                    range = Some(start.parse().unwrap()..end.parse::<usize>().unwrap() + 1);
                }
                _ => {}
            }
        }
        let asked = {
            let mut kept = lock(&state.kept);
            let asked = Asked { number: kept.asked.len(), method, key, query: query.to_owned(), range, condition };
            kept.asked.push(format!("{} {} {}", asked.method, asked.key, asked.query));
            asked
        };
        let mut answer = (state.script)(&asked);
        if state.well.load(Ordering::Acquire) {
            answer = Answer::Well;
        }
        if let Answer::Early(status) = answer {
            let text = format!("<Error><Code>Status{status}</Code><Message>as the test says</Message></Error>");
            write!(&*stream, "HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{text}", text.len())?;
        }
        if matches!(answer, Answer::Deaf | Answer::Early(_)) {
            while !state.well.load(Ordering::Acquire) {
                thread::sleep(Duration::from_millis(5));
            }
            return Ok(());
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body)?;
        if let Answer::Status(status) = answer {
            let text = format!("<Error><Code>Status{status}</Code><Message>as the test says</Message></Error>");
            write!(&*stream, "HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n{text}", text.len())?;
            continue;
        }
        let (status, headers, mut body) = carry_out(&mut lock(&state.kept), &asked, body);
        if answer == Answer::Lost {
            return Ok(());
        }
        let length = body.len();
        match answer {
            Answer::Cut(most) | Answer::Stall(most) => body.truncate(most),
            Answer::Flip => body.iter_mut().take(100).for_each(|byte| *byte ^= 0x10),
            _ => {}
        }
        let length = if asked.method == "HEAD" { String::new() } else { format!("content-length: {length}\r\n") };
        write!(
            &*stream,
            "HTTP/1.1 {status} x\r\nlast-modified: Sun, 29 Nov 2026 03:00:00 GMT\r\n{length}{headers}\r\n"
        )?;
        if asked.method != "HEAD" {
            (&*stream).write_all(&body)?;
        }
        match answer {
            Answer::Cut(_) => return Ok(()),
            Answer::Stall(_) => {
                while !state.well.load(Ordering::Acquire) {
                    thread::sleep(Duration::from_millis(5));
                }
                return Ok(());
            }
            _ => {}
        }
    }
}

/// Does what a request asks for. Returns status, headers and body of the answer.
fn carry_out(kept: &mut Kept, asked: &Asked, body: Vec<u8>) -> (u16, String, Vec<u8>) {
    let tag = |bytes: &[u8]| format!("\"{:x}-{}\"", Digest::of(bytes).to_bits(), bytes.len());
    let etag = |bytes: &[u8]| format!("etag: {}\r\n", tag(bytes));
    let none = || (404, String::new(), b"<Error><Code>NoSuchKey</Code><Message>m</Message></Error>".to_vec());
    match (asked.method.as_str(), asked.query("uploadId")) {
        ("POST", None) if asked.query.contains("uploads") => {
            let id = format!("upload{}", asked.number);
            kept.uploads.insert(id.clone(), BTreeMap::new());
            let key = &asked.key;
            let text = format!(
                "<InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>{key}</Key><UploadId>{id}</UploadId>\
                </InitiateMultipartUploadResult>"
            );
            (200, String::new(), text.into_bytes())
        }
        ("PUT", Some(id)) => {
            let number: usize = asked.query("partNumber").unwrap().parse().unwrap();
            let Some(parts) = kept.uploads.get_mut(id) else { return none() };
            let tag = etag(&body);
            parts.insert(number, body);
            (200, tag, Vec::new())
        }
        ("POST", Some(id)) => {
            let Some(parts) = kept.uploads.remove(id) else {
                return (404, String::new(), b"<Error><Code>NoSuchUpload</Code><Message>m</Message></Error>".to_vec());
            };
            let whole: Vec<u8> = parts.into_values().flatten().collect();
            kept.objects.insert(asked.key.clone(), whole);
            let text = "<CompleteMultipartUploadResult><ETag>\"done\"</ETag></CompleteMultipartUploadResult>";
            (200, String::new(), text.as_bytes().to_vec())
        }
        ("PUT", None) => {
            let (there, wanted) = (kept.objects.get(&asked.key).map(|there| tag(there)), &asked.condition);
            if wanted.as_ref().is_some_and(|wanted| there.as_ref().unwrap_or(&"*".into()) != wanted) {
                return (412, String::new(), b"<Error><Code>PreconditionFailed</Code></Error>".to_vec());
            }
            let tag = etag(&body);
            kept.objects.insert(asked.key.clone(), body);
            (200, tag, Vec::new())
        }
        ("DELETE", id) => {
            _ = id.and_then(|id| kept.uploads.remove(id));
            kept.objects.remove(&asked.key);
            (204, String::new(), Vec::new())
        }
        ("POST", _) => {
            let text = String::from_utf8(body).unwrap();
            let mut done = String::from("<DeleteResult>");
            for key in text.split("<Key>").skip(1) {
                let key = key.split("</Key>").next().unwrap();
                kept.objects.remove(key);
                done += &format!("<Deleted><Key>{key}</Key></Deleted>");
            }
            (200, String::new(), (done + "</DeleteResult>").into_bytes())
        }
        ("GET", _) if asked.key.is_empty() => {
            let prefix = asked.query("prefix").unwrap_or_default().replace("%2F", "/");
            let mut text = String::from("<ListBucketResult><IsTruncated>false</IsTruncated>");
            for (key, bytes) in kept.objects.iter().filter(|(key, _)| key.starts_with(&prefix)) {
                let (tag, size) = (tag(bytes), bytes.len());
                text += &format!(
                    "<Contents><Key>{key}</Key><LastModified>2026-11-29T03:00:00.000Z</LastModified>\
                    <ETag>{tag}</ETag><Size>{size}</Size></Contents>"
                );
            }
            (200, String::new(), (text + "</ListBucketResult>").into_bytes())
        }
        ("GET" | "HEAD", _) => match (kept.objects.get(&asked.key), &asked.range) {
            (None, _) => none(),
            (Some(whole), Some(range)) if range.start >= whole.len() => (416, String::new(), Vec::new()),
            (Some(whole), Some(range)) => {
                let end = range.end.min(whole.len());
                let given = format!("content-range: bytes {}-{}/{}\r\n", range.start, end - 1, whole.len());
                (206, given + &etag(whole), whole[range.start..end].to_vec())
            }
            (Some(whole), None) if asked.method == "HEAD" => {
                (200, etag(whole) + &format!("content-length: {}\r\n", whole.len()), Vec::new())
            }
            (Some(whole), None) => (200, etag(whole), whole.clone()),
        },
        _ => (400, String::new(), Vec::new()),
    }
}
