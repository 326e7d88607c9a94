//! A file size limit (`ulimit -f`) fails a save. It once ended the process by SIGXFSZ.

use crate::fixtures::executor::{LONG, one, pattern};
use crate::fixtures::process::alone;
use ashore::{CheckpointExecutor, Engine, ErrorKind};
use rustix::process::{Resource, Rlimit, setrlimit};
use std::sync::Arc;

#[test]
#[cfg_attr(miri, ignore = "starts processes")]
fn a_save_beyond_the_limit_for_files_is_an_error_and_the_process_lives() {
    if !alone("saves::file_limit::a_save_beyond_the_limit_for_files_is_an_error_and_the_process_lives") {
        return;
    }
    let limit = Some(256 << 10);
    setrlimit(Resource::Fsize, Rlimit { current: limit, maximum: limit }).unwrap();
    for engine in [Engine::Pwrite, Engine::Auto] {
        let root = tempfile::tempdir().unwrap();
        let builder = CheckpointExecutor::builder(root.path()).arena(1 << 20).chunk(64 << 10);
        let executor = builder.engine(engine).build().unwrap();
        let error = executor.save(1, one("t", Arc::new(pattern(1, 1 << 20)))).unwrap().wait(LONG).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:#}");
        executor.save(2, one("t", Arc::new(pattern(1, 100_000)))).unwrap().wait(LONG).unwrap();
        assert_eq!(executor.latest().unwrap().unwrap().step(), 2);
        executor.shutdown(LONG).unwrap();
    }
}
