//! A store that loses answers, answers falsely, and lets requests arrive late: on changes of the root object,
//! where it matters.

use bytes::Bytes;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::*;
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What happens to a change of the root object.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    None,
    /// It is done, and the answer is lost.
    LoseAnswer,
    /// It is done, and the answer says that the condition was refused: a repeat of the crate met its own
    /// first try.
    DoneAndRefused,
    /// It is not done, and the answer says that the condition was refused.
    FalselyRefused,
    /// It is not done, and the answer says that the object is there: a 409.
    FalselyThere,
    /// It is not done, and the answer is a 503.
    Unavailable,
    /// It is not done, and the answer is a 403.
    Forbidden,
    /// The answer is a time-out, and the request arrives after this time.
    Late(Duration),
    /// The answer is a 403, and the request arrives after this time all the same.
    LateAndForbidden(Duration),
    /// There is no answer, and it is not done.
    Silent,
}

/// See the module.
pub struct Faulty {
    store: Arc<InMemory>,
    script: Mutex<VecDeque<Fault>>,
    /// Changes to a content with this text get a time-out for an answer, and arrive after this time.
    pub late_for: Mutex<Option<(String, Duration)>>,
    /// The store does not answer reads of the root object.
    pub blind: AtomicBool,
    /// Conditions are not heard.
    pub deaf: AtomicBool,
    /// The contents of the root object that were put, in order.
    pub contents: Mutex<Vec<Bytes>>,
    /// How often the root object was sent.
    pub sent: AtomicU64,
    /// Requests that have not arrived yet.
    pub late: Arc<AtomicU64>,
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

fn generic(text: &'static str) -> Error {
    Error::Generic { store: "test", source: text.into() }
}

impl Faulty {
    pub fn new(store: InMemory) -> Self {
        let (script, contents, late_for) = (Mutex::default(), Mutex::default(), Mutex::default());
        let (blind, deaf) = (AtomicBool::new(false), AtomicBool::new(false));
        Self {
            store: Arc::new(store),
            script,
            late_for,
            blind,
            deaf,
            contents,
            sent: AtomicU64::new(0),
            late: Arc::default(),
        }
    }

    /// What happens to the next changes of the root object, one after another.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        *self.script.lock().unwrap() = faults.into_iter().collect();
    }

    /// The store without faults.
    pub fn plain(&self) -> &Arc<InMemory> {
        &self.store
    }

    /// All keys.
    pub fn keys(&self) -> Vec<String> {
        use futures_util::TryStreamExt;
        let listed: Vec<ObjectMeta> = futures_executor::block_on(self.store.list(None).try_collect()).unwrap();
        listed.into_iter().map(|object| object.location.to_string()).collect()
    }

    /// Waits until every late request has arrived.
    pub fn settle(&self) {
        while self.late.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn is_root(key: &Path) -> bool {
    key.filename() == Some("ashore.json")
}

#[async_trait::async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, key: &Path, payload: PutPayload, mut opts: PutOptions) -> Result<PutResult> {
        if self.deaf.load(Ordering::SeqCst) {
            opts.mode = PutMode::Overwrite;
        }
        if !is_root(key) {
            return self.store.put_opts(key, payload, opts).await;
        }
        self.contents.lock().unwrap().push(Bytes::from(payload.clone()));
        let mut fault = self.script.lock().unwrap().pop_front().unwrap_or(Fault::None);
        if let Some((text, after)) = &*self.late_for.lock().unwrap()
            && String::from_utf8_lossy(&Bytes::from(payload.clone())).contains(text)
        {
            fault = Fault::Late(*after);
        }
        let path = key.to_string();
        match fault {
            Fault::None => self.store.put_opts(key, payload, opts).await,
            Fault::LoseAnswer => {
                let _ = self.store.put_opts(key, payload, opts).await;
                Err(generic("connection reset"))
            }
            Fault::DoneAndRefused => {
                self.store.put_opts(key, payload, opts).await?;
                Err(Error::Precondition { path, source: "status code: 412".into() })
            }
            Fault::FalselyRefused => Err(Error::Precondition { path, source: "status code: 412".into() }),
            Fault::FalselyThere => Err(Error::AlreadyExists { path, source: "status code: 409".into() }),
            Fault::Unavailable => Err(generic("status code: 503 Service Unavailable")),
            Fault::Forbidden => Err(Error::PermissionDenied { path, source: "status code: 403".into() }),
            Fault::Late(after) | Fault::LateAndForbidden(after) => {
                let (store, key, late) = (self.store.clone(), key.clone(), self.late.clone());
                late.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    let _ = store.put_opts(&key, payload, opts).await;
                    late.fetch_sub(1, Ordering::SeqCst);
                });
                if matches!(fault, Fault::Late(_)) {
                    return Err(generic("operation timed out"));
                }
                Err(Error::PermissionDenied { path, source: "status code: 403".into() })
            }
            Fault::Silent => std::future::pending().await,
        }
    }

    async fn put_multipart_opts(&self, key: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(key, opts).await
    }

    async fn get_opts(&self, key: &Path, options: GetOptions) -> Result<GetResult> {
        if is_root(key) && self.blind.load(Ordering::SeqCst) {
            return Err(generic("status code: 503 Service Unavailable"));
        }
        let answer = self.store.get_opts(key, options).await;
        if is_root(key) && answer.is_ok() {
            self.sent.fetch_add(1, Ordering::SeqCst);
        }
        answer
    }

    fn delete_stream(&self, keys: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(keys)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }

    async fn get_ranges(&self, key: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.store.get_ranges(key, ranges).await
    }
}

#[async_trait::async_trait]
impl MultipartStore for Faulty {
    async fn create_multipart(&self, key: &Path) -> Result<MultipartId> {
        self.store.create_multipart(key).await
    }

    async fn put_part(&self, key: &Path, id: &MultipartId, part: usize, data: PutPayload) -> Result<PartId> {
        self.store.put_part(key, id, part, data).await
    }

    async fn complete_multipart(&self, key: &Path, id: &MultipartId, parts: Vec<PartId>) -> Result<PutResult> {
        self.store.complete_multipart(key, id, parts).await
    }

    async fn abort_multipart(&self, key: &Path, id: &MultipartId) -> Result<()> {
        self.store.abort_multipart(key, id).await
    }
}
