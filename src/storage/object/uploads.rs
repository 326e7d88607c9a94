//! Connections for requests that send bytes from slabs.
//!
//! A connection keeps the bytes of a request until it has sent them, even if the request was given up. If the
//! peer accepts and never reads, it keeps them until the task of the connection ends. So requests with long
//! bodies have connections and a runtime of their own. If a connection still holds the bytes a second after
//! such a request has ended, that runtime is shut down with all of its connections, and the next request
//! starts another runtime. Other requests on it fail as if their connections had been reset, and are tried
//! again. **Safety.** Only the drop of its owner returns a slab, whatever ends first.

use super::file::LONG;
use crate::sync::{Mutex, lock};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::poll_fn;
use http_body::Body;
use object_store::PutPayload;
use object_store::client::{
    ClientOptions, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
    HttpService, ReqwestConnector,
};
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;

/// How long a connection may hold the bytes of a request that has ended.
const GRACE: Duration = Duration::from_secs(1);

/// How often a watch checks whether the bytes are still held.
const LOOK: Duration = Duration::from_millis(20);

/// Threads that encrypt and send the bodies of one store.
const THREADS: usize = 2;

/// Makes the clients of a store.
#[derive(Debug, Default)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let short = ReqwestConnector::default().connect(options)?;
        let long = Long { options: options.clone(), running: Mutex::new(None) };
        Ok(HttpClient::new(Service { short, long: Arc::new(long) }))
    }
}

/// Requests with short bodies go through one client, those with long bodies through another.
#[derive(Debug)]
struct Service {
    short: HttpClient,
    long: Arc<Long>,
}

/// The runtime and the client of requests with long bodies.
struct Long {
    options: ClientOptions,
    running: Mutex<Option<Running>>,
}

struct Running {
    runtime: Runtime,
    client: HttpClient,
    /// Identifies this runtime. Everything that runs on it holds a clone.
    identity: Arc<()>,
}

impl fmt::Debug for Long {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Long")
    }
}

fn interrupted(why: &'static str) -> HttpError {
    HttpError::new(HttpErrorKind::Interrupted, io::Error::new(io::ErrorKind::ConnectionReset, why))
}

impl Long {
    /// Returns the runtime and its client. Starts them if they are not running.
    fn enter(&self) -> Result<(Handle, HttpClient, Arc<()>), HttpError> {
        let mut running = lock(&self.running);
        if running.is_none() {
            // Make the client first, because a runtime that is dropped on a thread of another runtime panics.
            let client = ReqwestConnector::default().connect(&self.options);
            let client = client.map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
            let mut runtime = Builder::new_multi_thread();
            let runtime = runtime.worker_threads(THREADS).thread_name("ashore-upload").enable_all().build();
            let runtime = runtime.map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
            *running = Some(Running { runtime, client, identity: Arc::default() });
        }
        let Some(Running { runtime, client, identity }) = &*running else { return Err(interrupted("no runtime")) };
        Ok((runtime.handle().clone(), client.clone(), identity.clone()))
    }

    /// Shuts a runtime down, unless another one has replaced it.
    fn end(&self, identity: &Arc<()>) {
        let mut running = lock(&self.running);
        if running.as_ref().is_some_and(|running| Arc::ptr_eq(&running.identity, identity)) {
            tracing::warn!("a store does not read the bytes of an upload: all upload connections are closed");
            running.take().into_iter().for_each(|running| running.runtime.shutdown_background());
        }
    }
}

impl Drop for Long {
    fn drop(&mut self) {
        // The last owner may be a task on a runtime, where a blocking shutdown would panic.
        lock(&self.running).take().into_iter().for_each(|running| running.runtime.shutdown_background());
    }
}

/// Bytes with a count of how many buffers are still held.
struct Lent {
    bytes: Bytes,
    _held: Arc<()>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Wraps the bytes of a body, without a copy, so that `held` counts them.
async fn lend(mut body: HttpRequestBody, held: &Arc<()>) -> Result<HttpRequestBody, HttpError> {
    let mut pieces = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        if let Ok(bytes) = frame?.into_data() {
            pieces.push(Bytes::from_owner(Lent { bytes, _held: held.clone() }));
        }
    }
    Ok(pieces.into_iter().collect::<PutPayload>().into())
}

/// Checks, after the end of a request, whether a connection still holds its bytes.
struct Watch {
    long: Arc<Long>,
    handle: Handle,
    identity: Arc<()>,
    held: Arc<()>,
    task: Option<JoinHandle<Result<HttpResponse, HttpError>>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.take().inspect(JoinHandle::abort);
        let is_held = |held: &Arc<()>| Arc::strong_count(held) > 1;
        // The reference of the watch moves into the task.
        let held = std::mem::take(&mut self.held);
        if !is_held(&held) {
            return;
        }
        let (long, identity) = (self.long.clone(), self.identity.clone());
        self.handle.spawn(async move {
            let mut waited = Duration::ZERO;
            while is_held(&held) {
                if waited >= GRACE {
                    return long.end(&identity);
                }
                tokio::time::sleep(LOOK).await;
                waited += LOOK;
            }
        });
    }
}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if request.body().content_length() < LONG {
            return self.short.execute(request).await;
        }
        let (parts, body) = request.into_parts();
        let held = Arc::new(());
        let body = lend(body, &held).await?;
        let (handle, client, identity) = self.long.enter()?;
        let request = HttpRequest::from_parts(parts, body);
        let task = handle.spawn(async move {
            let (parts, body) = client.execute(request).await?.into_parts();
            // Read the whole body, which is short, because nothing may wait for this runtime after its
            // shutdown.
            Ok(HttpResponse::from_parts(parts, body.bytes().await?.into()))
        });
        let mut watch = Watch { long: self.long.clone(), handle, identity, held, task: Some(task) };
        let Some(task) = &mut watch.task else { return Err(interrupted("no request")) };
        task.await.unwrap_or_else(|_| Err(interrupted("the connections of uploads were ended")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use std::time::Instant;

    #[test]
    fn a_connection_that_keeps_bytes_is_ended_with_its_runtime_and_the_next_request_has_another() {
        let long = Arc::new(Long { options: ClientOptions::new(), running: Mutex::new(None) });
        let (handle, _, identity) = long.enter().unwrap();
        let held = Arc::new(());
        let (seen, kept) = (Arc::downgrade(&held), Lent { bytes: Bytes::new(), _held: held.clone() });
        handle.spawn(async move {
            let _kept = kept;
            std::future::pending::<()>().await;
        });
        let began = Instant::now();
        drop(Watch { long: long.clone(), handle, identity: identity.clone(), held, task: None });
        while seen.strong_count() > 0 {
            assert!(began.elapsed() < Duration::from_secs(20), "the bytes are still held");
            thread::sleep(LOOK);
        }
        assert!(began.elapsed() >= GRACE);
        let (.., next) = long.enter().unwrap();
        assert!(!Arc::ptr_eq(&next, &identity), "the next request has another runtime");
    }
}
