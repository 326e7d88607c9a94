//! Steps to convert, and what is compared.

use ashore::ranks::{Member, SharedDirectory};
use ashore::{Checkpoint, CheckpointExecutor, Dtype, HostTensor, StateDict};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

pub const MINUTE: Duration = Duration::from_secs(60);

/// Every dtype, 0-d and empty tensors, and one of several blocks.
pub fn tensors() -> Vec<(String, Dtype, Vec<usize>)> {
    use Dtype::*;
    let all = [
        BOOL,
        U8,
        I8,
        F8_E5M2,
        F8_E4M3,
        F8_E8M0,
        F8_E4M3FNUZ,
        F8_E5M2FNUZ,
        I16,
        U16,
        F16,
        BF16,
        I32,
        U32,
        F32,
        C64,
        F64,
        I64,
        U64,
    ];
    let mut tensors: Vec<(String, Dtype, Vec<usize>)> = Vec::new();
    for dtype in all {
        tensors.push((format!("model.{dtype}.scalar"), dtype, vec![]));
        tensors.push((format!("model.{dtype}.matrix"), dtype, vec![7, 5]));
        tensors.push((format!("model.{dtype}.empty"), dtype, vec![0, 3]));
    }
    tensors.push(("model.half bytes".into(), F4, vec![7, 6]));
    tensors.push(("model.six bits".into(), F6_E2M3, vec![12, 2]));
    tensors.push(("model.six bits more".into(), F6_E3M2, vec![1, 4]));
    tensors.push(("model.long".into(), F32, vec![1003, 2 << 10]));
    tensors.push(("model.cube".into(), BF16, vec![3, 200, 301]));
    tensors.push(("optimizer.\"odd\" \u{e9}\n".into(), I64, vec![11]));
    tensors
}

/// The bytes of a tensor: of a BOOL 0 and 1, of any other anything.
pub fn content(number: usize, dtype: Dtype, shape: &[usize]) -> Vec<u8> {
    let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    let modulus = if dtype == Dtype::BOOL { 2 } else { 256 };
    (0..length).map(|i| ((i * 31 + i / 256 * 7 + number * 17 + 7) % 251 % modulus) as u8).collect()
}

/// Every tensor with its bytes.
pub type Expected = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub fn expected() -> Expected {
    let with = |(number, (name, dtype, shape)): (usize, (String, Dtype, Vec<usize>))| {
        let bytes = content(number, dtype, &shape);
        (name, (dtype, shape, bytes))
    };
    tensors().into_iter().enumerate().map(with).collect()
}

/// The executor of a rank of a session.
pub fn of_session(root: &Path, rank: u32, world: u32) -> CheckpointExecutor {
    let builder = CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20);
    let member = Member { rank, world, local_rank: rank };
    builder.ranks(Arc::new(SharedDirectory::new(root, member).unwrap())).run("test").build().unwrap()
}

/// Saves step 7 by `world` ranks: matrices by columns, others by rows, tensors of one row or less by all.
pub fn save(root: &Path, world: u32) -> PathBuf {
    let rank = |rank: u32| {
        let executor = if world == 1 {
            CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20).alone().build().unwrap()
        } else {
            of_session(root, rank, world)
        };
        let mut state = StateDict::new();
        for (name, (dtype, shape, bytes)) in expected() {
            let axis = usize::from(name.ends_with("matrix"));
            if world == 1 || shape.contains(&0) || shape.is_empty() || dtype.bitsize() < 8 {
                state.tensor(name, HostTensor::with_dtype(bytes, dtype, shape)).unwrap();
                continue;
            }
            let each = shape[axis].div_ceil(world as usize);
            let begin = (each * rank as usize).min(shape[axis]);
            let end = (begin + each).min(shape[axis]);
            let (mut at, mut extent) = (vec![0; shape.len()], shape.clone());
            (at[axis], extent[axis]) = (begin, end - begin);
            let item = dtype.bitsize() / 8 * shape[axis + 1..].iter().product::<usize>();
            let rows = bytes.chunks(item * shape[axis]);
            let mine: Vec<u8> = rows.flat_map(|row| row[begin * item..end * item].to_vec()).collect();
            state.tensor_box(name, shape, at, HostTensor::with_dtype(mine, dtype, extent)).unwrap();
        }
        state.value("epoch", &3).unwrap().rank_value("seed", &(100 + rank)).unwrap().metadata("run", "a").unwrap();
        executor.save(7, state).unwrap().wait(MINUTE).unwrap();
        executor.shutdown(MINUTE).unwrap();
    };
    std::thread::scope(|scope| (0..world).for_each(|number| drop(scope.spawn(move || rank(number)))));
    root.join("step-00000007")
}

pub fn convert(arguments: &[&str], source: &Path, output: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ashore"));
    command.arg("convert").arg(source).args(arguments).arg(output).stdin(Stdio::null());
    command
}

pub fn json(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*stderr), (Some(0), ""), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

pub fn refused(output: &Output, status: i32) -> String {
    assert_eq!((output.status.code(), output.stdout.len()), (Some(status), 0), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The names and bytes of all files of a directory.
pub fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

pub fn hidden(path: &Path) -> Vec<String> {
    let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.') && name != ".ranks" && name != ".runs").collect()
}

/// Compares every tensor, as this library reads it.
pub fn assert_equal(path: &Path, expected: &Expected) -> Checkpoint {
    let checkpoint = Checkpoint::open(path).unwrap();
    let report = checkpoint.verify().unwrap();
    assert!(report.is_sound(), "{report:?}");
    let listed: Vec<String> = checkpoint.tensors().unwrap().map(|tensor| tensor.name.to_owned()).collect();
    assert_eq!(listed, expected.keys().cloned().collect::<Vec<_>>());
    for (name, (dtype, shape, bytes)) in expected {
        let tensor = checkpoint.tensor(name).unwrap();
        assert_eq!((tensor.dtype, tensor.shape), (*dtype, &shape[..]), "{name}");
        assert!(checkpoint.read(name).unwrap() == *bytes, "{name}");
    }
    checkpoint
}

/// Compares every tensor, as the safetensors crate reads the files of a Hugging Face model.
pub fn assert_plain(path: &Path, expected: &Expected) {
    let all = files(path);
    let mut left = expected.clone();
    let index: Option<Value> =
        all.get("model.safetensors.index.json").map(|text| serde_json::from_slice(text).unwrap());
    for (file, bytes) in all.iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        let read = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(bytes).unwrap();
        assert!(!header.metadata().as_ref().unwrap().contains_key("DCP_SHARDING_INFO"), "{file}");
        for (name, tensor) in read.tensors() {
            let (dtype, shape, bytes) = left.remove(&name).unwrap();
            assert_eq!((tensor.dtype().to_string(), tensor.shape()), (dtype.to_string(), &shape[..]), "{name}");
            assert!(tensor.data() == bytes, "{name}");
            if let Some(index) = &index {
                assert_eq!(index["weight_map"][&name], *file);
            }
        }
    }
    assert_eq!(left.keys().collect::<Vec<_>>(), [""; 0]);
    if let Some(index) = index {
        let total: usize = expected.values().map(|(_, _, bytes)| bytes.len()).sum();
        assert_eq!(index["metadata"]["total_size"], total);
        assert_eq!(index["weight_map"].as_object().unwrap().len(), expected.len());
    }
}

/// A step of one shard and one tensor, `embed` of F32, with another name for it if `tied`. Without content
/// the shard is a hole as long as the shape says.
pub fn made(root: &Path, shape: &[usize], content: Option<&[u8]>, tied: bool) -> PathBuf {
    use ashore::internal::digest::Digest;
    use ashore::internal::format::entries::{FileEntry, SliceEntry, TensorEntry, block_count};
    use ashore::internal::format::manifest::Manifest;
    use ashore::internal::format::shard::{HeaderTemplate, Stamp};
    use ashore::internal::format::template::TableTemplate;
    use ashore::memory::AlignedBuffer;
    let (attempt, path, dtype) = (ashore::Attempt::new(), root.join("step-00000009"), Dtype::F32);
    let length = 4 * shape.iter().map(|dim| *dim as u64).product::<u64>();
    let header = HeaderTemplate::new([("embed", dtype, shape, 0..length)]).unwrap();
    let mut bytes = vec![0; header.len() as usize];
    assert!(header.copy(&Stamp::new(9, attempt), 0, &mut bytes));
    let (data, header) = (bytes.len() as u64, Digest::of(&bytes));
    bytes.extend_from_slice(content.unwrap_or_default());
    let (at, shape, blocks) = (vec![0; shape.len()], shape.to_vec(), vec![Digest::EMPTY; block_count(length)]);
    let digest = Digest::of(content.unwrap_or_default());
    let slice = SliceEntry { file: 0, offset: data, length, at, shape: shape.clone(), digest, blocks };
    let tensor = |name: &str, slices| TensorEntry { name: name.into(), dtype, shape: shape.clone(), slices };
    let mut tensors = vec![tensor("embed", vec![slice])];
    if tied {
        tensors.push(tensor("head", vec![]));
    }
    let (name, length) = ("model.safetensors".to_owned(), data + length);
    let entry = FileEntry { name, length, data, header, digest: Digest::of(&bytes) };
    let aliases = (1..tensors.len()).map(|number| (number, 0)).collect();
    let digests = tensors.iter().flat_map(|tensor| &tensor.slices).map(|slice| (slice.digest, &slice.blocks[..]));
    let template = TableTemplate::new(std::slice::from_ref(&entry), &tensors, &aliases).unwrap();
    let mut table = AlignedBuffer::new(0);
    let said = template.fill((9, attempt), [(entry.header, entry.digest)], digests, &mut table).unwrap();
    let manifest = Manifest { bytes: length + said.length, tables: vec![said], ..Manifest::new(9, attempt) };
    fs::create_dir(&path).unwrap();
    fs::write(path.join("model.safetensors"), bytes).unwrap();
    let shard = fs::File::options().write(true).open(path.join("model.safetensors")).unwrap();
    shard.set_len(length).unwrap();
    fs::write(path.join("tensors.table"), &table[..]).unwrap();
    fs::write(path.join("manifest.json"), manifest.to_bytes().unwrap()).unwrap();
    path
}
