//! A save to an object store takes no memory beside the arena. A binary of its own, because it counts what
//! the whole process allocates.
#![cfg(not(any(loom, miri)))]

use ashore::storage::ObjectStore as Steps;
use ashore::{CheckpointExecutor, StateDict};
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartId, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use peak_alloc::PeakAlloc;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

const LONG: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

/// A store that takes its time for parts, counts their bytes and forgets them.
#[derive(Debug, Default)]
struct Forgetful {
    store: InMemory,
    bytes: AtomicUsize,
    in_flight: AtomicUsize,
    most: AtomicUsize,
}

impl fmt::Display for Forgetful {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Forgetful")
    }
}

#[async_trait::async_trait]
impl ObjectStore for Forgetful {
    async fn put_opts(&self, key: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.store.put_opts(key, payload, options).await
    }
    async fn put_multipart_opts(&self, key: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(key, options).await
    }
    async fn get_opts(&self, key: &Path, options: GetOptions) -> Result<GetResult> {
        self.store.get_opts(key, options).await
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
}

#[async_trait::async_trait]
impl MultipartStore for Forgetful {
    async fn create_multipart(&self, key: &Path) -> Result<MultipartId> {
        self.store.create_multipart(key).await
    }
    async fn put_part(&self, _: &Path, _: &MultipartId, _: usize, data: PutPayload) -> Result<PartId> {
        let in_flight = self.in_flight.fetch_add(1, Ordering::AcqRel) + 1;
        self.most.fetch_max(in_flight, Ordering::AcqRel);
        tokio::time::sleep(Duration::from_millis(60)).await;
        self.bytes.fetch_add(data.content_length(), Ordering::AcqRel);
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        Ok(PartId { content_id: String::new() })
    }
    async fn complete_multipart(&self, key: &Path, _: &MultipartId, _: Vec<PartId>) -> Result<PutResult> {
        self.store.put_opts(key, PutPayload::new(), PutOptions::default()).await
    }
    async fn abort_multipart(&self, key: &Path, id: &MultipartId) -> Result<()> {
        self.store.abort_multipart(key, id).await
    }
}

#[test]
fn a_save_five_times_as_long_as_the_arena_takes_no_memory_beside_it_nor_more_parts_in_flight_than_writers() {
    let store = Arc::new(Forgetful::default());
    let steps = Arc::new(Steps::over(store.clone(), "memory://bucket/run").unwrap());
    let builder = CheckpointExecutor::builder("unused").storage(steps).arena(48 * MIB as u64).chunk(8 << 20);
    let executor = builder.writers(4).build().unwrap();
    let data = Arc::new(vec![3_u8; 32 * MIB]);
    let save = |step| {
        let mut state = StateDict::new();
        for number in 0..8 {
            state.tensor(format!("tensor.{number}"), data.clone()).unwrap();
        }
        executor.save(step, state).unwrap().wait(LONG).unwrap();
    };
    // What is allocated once: clients, threads, plans.
    save(1);
    let before = HEAP.current_usage();
    HEAP.reset_peak_usage();
    save(2);
    let more = HEAP.peak_usage().saturating_sub(before);
    assert!(more < 4 * MIB, "bytes beside the arena: {more}");
    assert!(store.bytes.load(Ordering::Acquire) >= 2 * 8 * 32 * MIB);
    let most = store.most.load(Ordering::Acquire);
    assert!((2..=4).contains(&most), "parts in flight: {most}");
}
