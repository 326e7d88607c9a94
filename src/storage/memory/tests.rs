use super::*;

const PAGE: u64 = ALIGNMENT as u64;

/// `len` bytes of `fill` at an aligned address.
fn aligned(buffer: &mut Vec<u8>, len: usize, fill: u8) -> &[u8] {
    *buffer = vec![fill; len + ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    &buffer[start..start + len]
}

fn begin(memory: &Memory, name: &str) -> Arc<dyn Writing> {
    memory.begin(name, Attempt::new(), true).unwrap()
}

fn kind<T: fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind()
}

fn publish(memory: &Memory, name: &str, bytes: &[u8]) {
    let writing = begin(memory, name);
    writing.put("file", bytes).unwrap();
    writing.publish(true).unwrap();
    writing.settle().unwrap();
}

fn contents(reading: &dyn Reading) -> Vec<u8> {
    let file = reading.open("file").unwrap();
    let mut bytes = vec![0; file.len() as usize];
    file.read_at(0, &mut bytes).unwrap();
    bytes
}

#[test]
fn a_step_appears_whole_at_publish_and_not_before() {
    let memory = Memory::new();
    let writing = memory.begin("step-1", Attempt::new(), false).unwrap();
    let file = writing.create("file", PAGE + 5).unwrap();
    let mut buffer = Vec::new();
    file.write_at(PAGE, aligned(&mut buffer, ALIGNMENT, 2)).unwrap();
    file.write_at(0, aligned(&mut buffer, ALIGNMENT, 1)).unwrap();
    file.seal().unwrap();
    assert_eq!((kind(memory.open("step-1")), memory.list().unwrap().len()), (ErrorKind::NotFound, 0));
    writing.publish(false).unwrap();
    let read = contents(&*memory.open("step-1").unwrap());
    assert_eq!(read, [vec![1; ALIGNMENT], vec![2; 5]].concat());
    assert_eq!(memory.list().unwrap(), ["step-1"]);
}

#[test]
fn writes_that_a_disk_might_let_pass_are_refused() {
    let memory = Memory::new();
    let writing = begin(&memory, "step-1");
    let file = writing.create("file", 2 * PAGE + 5).unwrap();
    let mut buffer = Vec::new();
    let page = aligned(&mut buffer, 4 * ALIGNMENT, 7);
    assert_eq!(kind(file.write_at(8, &page[..ALIGNMENT])), ErrorKind::Invalid, "offset");
    assert_eq!(kind(file.write_at(0, &page[1..=ALIGNMENT])), ErrorKind::Invalid, "address");
    assert_eq!(kind(file.write_at(0, &page[..100])), ErrorKind::Invalid, "length");
    assert_eq!(kind(file.write_at(0, &[])), ErrorKind::Invalid, "empty");
    assert_eq!(kind(file.write_at(0, page)), ErrorKind::Invalid, "beyond the end");
    assert_eq!(kind(file.write_at(4 * PAGE, &page[..ALIGNMENT])), ErrorKind::Invalid, "all beyond the end");
    assert_eq!(kind(file.write_at(u64::MAX - 4095, &page[..ALIGNMENT])), ErrorKind::Invalid, "overflow");
    file.write_at(0, &page[..ALIGNMENT]).unwrap();
    assert_eq!(kind(file.write_at(0, &page[..ALIGNMENT])), ErrorKind::Invalid, "twice");
    file.write_at(PAGE, &page[..ALIGNMENT + 5]).unwrap();
    file.seal().unwrap();
    assert_eq!(kind(file.write_at(0, &page[..ALIGNMENT])), ErrorKind::Invalid, "after seal");
    assert_eq!(kind(file.seal()), ErrorKind::Invalid, "sealed twice");
    assert_eq!(kind(writing.create("file", 1)), ErrorKind::Conflict);
    assert_eq!(kind(writing.put("file", b"")), ErrorKind::Conflict);
    writing.put("other", b"x").unwrap();
    assert_eq!(kind(writing.put("other", b"x")), ErrorKind::Conflict, "put twice");
}

#[test]
fn a_file_with_a_hole_cannot_be_sealed_and_its_attempt_cannot_be_published() {
    let memory = Memory::new();
    let writing = begin(&memory, "step-1");
    assert_eq!(kind(writing.publish(false)), ErrorKind::Invalid, "without files");
    let file = writing.create("file", 2 * PAGE).unwrap();
    let mut buffer = Vec::new();
    file.write_at(PAGE, aligned(&mut buffer, ALIGNMENT, 7)).unwrap();
    assert_eq!(kind(writing.publish(false)), ErrorKind::Invalid, "not sealed");
    assert_eq!(kind(file.seal()), ErrorKind::Invalid, "hole");
    assert_eq!(kind(file.seal()), ErrorKind::Invalid, "not repeated");
    assert_eq!(kind(writing.publish(false)), ErrorKind::Invalid, "lost");
    assert_eq!(kind(memory.open("step-1")), ErrorKind::NotFound);
}

#[test]
fn one_attempt_wins_and_an_attempt_is_over_once() {
    let memory = Memory::new();
    let (first, second) = (begin(&memory, "step-1"), begin(&memory, "step-1"));
    first.put("file", b"first").unwrap();
    second.put("file", b"second").unwrap();
    assert_eq!(kind(first.settle()), ErrorKind::Invalid, "before publish");
    first.publish(false).unwrap();
    assert_eq!(kind(second.publish(false)), ErrorKind::Conflict);
    assert_eq!(kind(memory.begin("step-1", Attempt::new(), false)), ErrorKind::Conflict);
    assert_eq!(kind(first.publish(true)), ErrorKind::Invalid);
    assert_eq!(kind(first.abandon()), ErrorKind::Invalid);
    assert_eq!(kind(first.put("late", b"")), ErrorKind::Invalid);
    first.settle().unwrap();
    second.abandon().unwrap();
    assert_eq!(kind(second.publish(true)), ErrorKind::Invalid);
    assert_eq!(contents(&*memory.open("step-1").unwrap()), b"first");
}

#[test]
fn a_reader_keeps_the_bytes_of_a_step_that_was_replaced_or_removed() {
    let memory = Memory::new();
    publish(&memory, "step-1", b"old");
    let old = memory.open("step-1").unwrap();
    publish(&memory, "step-1", b"new");
    let new = memory.open("step-1").unwrap();
    memory.remove("step-1").unwrap();
    assert_eq!((contents(&*old), contents(&*new)), (b"old".to_vec(), b"new".to_vec()));
    assert_eq!(kind(memory.remove("step-1")), ErrorKind::NotFound);
    assert_eq!(kind(memory.confirm("step-1")), ErrorKind::NotFound);
}

#[test]
fn a_sweep_takes_dropped_attempts_and_leaves_live_ones() {
    let memory = Memory::new();
    let live = begin(&memory, "step-1");
    drop(begin(&memory, "step-2"));
    let swept = memory.sweep(Sweep::default()).unwrap();
    assert!(swept.removed.len() == 1 && swept.removed[0].name.contains("step-2"), "{swept:?}");
    assert!(swept.left.len() == 1 && swept.left[0].name.contains("step-1"), "{swept:?}");
    live.abandon().unwrap();
    assert_eq!(memory.sweep(Sweep::default()).unwrap(), Swept::default());
}

#[test]
fn names_are_single_components_and_reads_stay_in_the_file() {
    let memory = Memory::new();
    for name in ["", ".", "..", "a/b", "a\0b"] {
        assert_eq!(kind(memory.begin(name, Attempt::new(), false)), ErrorKind::Invalid, "{name:?}");
    }
    publish(&memory, "step-1", b"1234");
    let step = memory.open("step-1").unwrap();
    assert_eq!(kind(step.open("../file")), ErrorKind::Corrupt);
    assert_eq!(kind(step.open("absent")), ErrorKind::NotFound);
    let file = step.open("file").unwrap();
    let mut buffer = [0; 2];
    file.read_at(2, &mut buffer).unwrap();
    assert_eq!(&buffer, b"34");
    for offset in [3, 4, 5, u64::MAX] {
        assert_eq!(kind(file.read_at(offset, &mut buffer)), ErrorKind::Corrupt, "{offset}");
    }
}
