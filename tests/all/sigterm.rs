//! SIGTERM, in a program of its own: which saves are finished, promoted or abandoned, what the hook reports,
//! and how the program ends.

use crate::fixtures::executor::{eventually, one, pattern};
use crate::fixtures::hooked::{Call, Hooked};
use ashore::sigterm::{Exit, OnTerm, Sigterm};
use ashore::storage::local::Local;
use ashore::{Catalog, CheckpointExecutor, Outcome, Overlap};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SCENARIO: &str = "ASHORE_TEST_SIGTERM";
const DURABLE: i32 = 10;
const LOST: i32 = 20;

/// A root whose attempts begin once the file `open` exists.
fn gated(root: &Path, open: PathBuf) -> Hooked {
    Hooked::new(Local::open(root).unwrap(), move |call| {
        while matches!(call, Call::Begin) && !open.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    })
}

fn say(what: &str) {
    println!("\n=={what}");
    std::io::stdout().flush().unwrap();
}

/// The program that the tests below start: saves of steps 1 and 2 are under way, both staged.
#[test]
#[ignore = "the other process of the tests below"]
fn the_program() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    let (scenario, root) = scenario.split_once(':').unwrap();
    let root = Path::new(root);
    let storage = gated(&root.join("steps"), root.join("open"));
    let builder = CheckpointExecutor::builder(root).storage(Arc::new(storage)).overlap(Overlap::Queue(3));
    let executor = Arc::new(builder.arena(8 * 4096).chunk(4096).build().unwrap());
    let code = Exit::Code { durable: DURABLE, lost: LOST };
    let ms = Duration::from_millis;
    let (on_term, exit, deadline) = match scenario {
        "finish" | "second" | "child" | "going" => (OnTerm::Finish, code, ms(60_000)),
        "late" => (OnTerm::Finish, code, ms(50)),
        "hang" => (OnTerm::Finish, code, ms(10)),
        "promote" | "offer" | "old offer" | "offer and go" => (OnTerm::Promote, code, ms(60_000)),
        "abandon" => (OnTerm::Abandon, code, ms(60_000)),
        "signal" => (OnTerm::Abandon, Exit::Signal, ms(60_000)),
        _ => (OnTerm::Finish, Exit::Return, Duration::MAX),
    };
    let hangs = scenario == "hang";
    let hook = Sigterm::on(&executor).timeout(deadline).on_term(on_term).exit(exit);
    let hook = hook
        .report(move |report| {
            let durable = report.durable.as_ref().map(|(step, _)| *step);
            let lost: Vec<u64> = report.lost.iter().map(|(step, _)| *step).collect();
            say(&format!("{durable:?} {:?} {lost:?} {}", report.finished, report.cut_short));
            if hangs {
                loop {
                    std::thread::park();
                }
            }
        })
        .install()
        .unwrap();
    let saves: Vec<_> = [1, 2].map(|step| executor.save(step, one("t", pattern(step, 500))).unwrap()).into();
    for save in &saves {
        save.staged().wait(Duration::from_secs(60)).unwrap();
    }
    match scenario {
        "offer" => hook.offer(9, one("t", pattern(9, 500))).unwrap(),
        "old offer" => hook.offer(1, one("t", pattern(9, 500))).unwrap(),
        "fork" => die_in_a_child(),
        "removed" => drop(Sigterm::on(&executor).install().unwrap()),
        "child" => drop_in_a_child(&hook),
        "order" => return leave(hook, executor),
        "going" => go(executor, &hook),
        "offer and go" => {
            hook.offer(9, one("t", pattern(9, 500))).unwrap();
            go(executor, &hook);
        }
        "taken away" => drop(Sigterm::on(&executor).install().unwrap()),
        _ => {}
    }
    say("ready");
    if scenario == "taken away" {
        drop(hook);
        say("gone");
        park();
    }
    eventually("the signal", || hook.requested());
    say("requested");
    match scenario {
        "leaves" => return leave(hook, executor),
        "again" => {
            ashore::testing::block_on(hook.reported());
            say("reported");
            park();
        }
        _ if exit != Exit::Return => park(),
        _ => {}
    }
    let skipped = executor.save(3, one("t", pattern(3, 500))).unwrap();
    assert!(matches!(skipped.wait(Duration::ZERO).unwrap(), Outcome::Skipped { by: 2 }));
    let report = ashore::testing::block_on(hook.reported());
    assert!(report.newest_is_durable() && hook.report().is_some());
    executor.shutdown(Duration::from_secs(60)).unwrap();
    let closed = executor.save(4, one("t", pattern(4, 500))).unwrap_err();
    assert_eq!(closed.kind(), ashore::ErrorKind::Invalid);
    executor.shutdown(Duration::from_secs(60)).unwrap();
    std::process::exit(33);
}

fn park() -> ! {
    loop {
        std::thread::park();
    }
}

/// Returns from `main` while saves are under way: its variables are dropped, then the process ends.
fn leave(hook: Sigterm, executor: Arc<CheckpointExecutor>) {
    say("ready");
    drop(hook);
    assert_eq!(Arc::strong_count(&executor), 1, "a hook that is gone holds the executor");
    drop(executor);
    std::process::exit(33);
}

/// Drops the executor while saves are under way, and prints that it is ready once there is no owner.
fn go(executor: Arc<CheckpointExecutor>, hook: &Sigterm) -> ! {
    let weak = Arc::downgrade(&executor);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            eventually("the executor is being dropped", || weak.strong_count() == 0);
            say("ready");
            eventually("the signal", || hook.requested());
            say("requested");
        });
        drop(executor);
    });
    park();
}

/// A forked child drops its copy of the hook.
#[expect(unsafe_code, reason = "fork, and a second owner in the child")]
fn drop_in_a_child(hook: &Sigterm) {
    // SAFETY: the child drops what it has a copy of, and leaves.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            drop(std::ptr::read(hook));
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        status
    };
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
}

/// A forked child dies of the signal, and the parent gets no notice.
#[expect(unsafe_code, reason = "fork")]
fn die_in_a_child() {
    // SAFETY: the child does nothing but sleep and leave.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::sleep(60);
            libc::_exit(1);
        }
        libc::kill(child, libc::SIGTERM);
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        status
    };
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGTERM);
}

struct Program {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
    root: tempfile::TempDir,
}

impl Program {
    fn start(scenario: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "sigterm::the_program", "--nocapture", "--test-threads", "1"])
            .env(SCENARIO, format!("{scenario}:{}", root.path().display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap());
        let mut program = Self { child, said, root };
        assert_eq!(program.hear(), "ready");
        program
    }

    /// The next line that the program prints.
    fn hear(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.said.read_line(&mut line).unwrap() > 0, "it ended");
            if let Some(said) = line.strip_prefix("==") {
                return said.trim_end().to_owned();
            }
        }
    }

    #[expect(unsafe_code, reason = "kill")]
    fn term(&self) {
        // SAFETY: a signal to a child of ours that was not waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, libc::SIGTERM) }, 0);
    }

    fn open(&self) {
        std::fs::write(self.root.path().join("open"), "").unwrap();
    }

    /// Sends the signal, and waits until the program has seen it.
    fn terminate(mut self) -> Self {
        self.term();
        while self.hear() != "requested" {}
        self
    }

    /// How the program ends, what it reports, and the steps that it leaves.
    fn ends(mut self) -> (ExitStatus, String, Vec<u64>) {
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut self.said, &mut rest).unwrap();
        // The program's own thread may say that it saw the signal after the hook's has reported.
        let mut said = rest.lines().filter_map(|line| line.strip_prefix("==")).filter(|said| *said != "requested");
        let report = said.next_back().unwrap_or_default().to_owned();
        let status = self.child.wait().unwrap();
        let steps = Catalog::open(self.root.path().join("steps")).unwrap().list().unwrap();
        (status, report, steps.iter().map(|entry| entry.step).collect())
    }
}

#[test]
fn saves_under_way_are_finished_and_the_durable_step_is_reported() {
    let program = Program::start("finish").terminate();
    program.open();
    let (status, report, steps) = program.ends();
    assert_eq!((status.code(), &report[..], &steps[..]), (Some(DURABLE), "Some(2) [1, 2] [] false", &[1, 2][..]));
}

#[test]
fn a_save_that_is_unfinished_at_the_deadline_is_lost() {
    let began = Instant::now();
    let program = Program::start("late");
    program.term();
    let (status, report, steps) = program.ends();
    assert_eq!((status.code(), &steps[..]), (Some(LOST), &[][..]));
    assert_eq!(report, "None [] [1, 2] true");
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn the_newest_staged_state_is_promoted_and_those_before_it_give_way() {
    let program = Program::start("promote").terminate();
    program.open();
    let (status, report, steps) = program.ends();
    assert_eq!((status.code(), &report[..], &steps[..]), (Some(DURABLE), "Some(2) [2] [1] false", &[2][..]));
}

#[test]
fn a_state_that_was_offered_is_saved_if_it_is_the_newest() {
    let program = Program::start("offer").terminate();
    program.open();
    let (status, report, steps) = program.ends();
    assert_eq!((status.code(), &report[..], &steps[..]), (Some(DURABLE), "Some(9) [9] [1, 2] false", &[9][..]));
    let program = Program::start("old offer").terminate();
    program.open();
    assert_eq!(program.ends().2, [2]);
}

#[test]
fn saves_under_way_are_abandoned_where_that_is_the_policy() {
    let program = Program::start("abandon");
    program.term();
    let (status, report, steps) = program.ends();
    assert_eq!((status.code(), &report[..], &steps[..]), (Some(LOST), "None [] [1, 2] false", &[][..]));
}

#[test]
fn a_second_signal_ends_the_wait() {
    let program = Program::start("second").terminate();
    program.term();
    let (status, report, _) = program.ends();
    assert_eq!((status.code(), &report[..]), (Some(LOST), "None [] [1, 2] true"));
}

#[test]
fn a_report_that_hangs_does_not_keep_the_program() {
    let program = Program::start("hang");
    program.term();
    assert_eq!(program.ends().0.code(), Some(LOST));
}

#[test]
fn a_program_may_go_on_or_die_of_the_signal() {
    for scenario in ["return", "fork", "removed"] {
        let program = Program::start(scenario).terminate();
        program.open();
        let (status, _, steps) = program.ends();
        assert_eq!((status.code(), &steps[..]), (Some(33), &[1, 2][..]), "{scenario}");
    }
    let program = Program::start("signal");
    program.term();
    assert_eq!(program.ends().0.signal(), Some(libc::SIGTERM));
}

/// A forked child that dropped its copy wrote to the socket that it shares with its parent. The parent's
/// listener took that for the signal and drained; the signal itself was then the second one, and the saves
/// were lost.
#[test]
fn a_hook_that_a_forked_child_drops_stays_with_the_parent() {
    let program = Program::start("child").terminate();
    program.open();
    let (status, report, steps) = program.ends();
    assert_eq!((status.code(), &report[..], &steps[..]), (Some(DURABLE), "Some(2) [1, 2] [] false", &[1, 2][..]));
}

/// The listener of a hook held an `Arc` of the executor, which was often the last one when the hook was
/// dropped first: the executor was dropped on a thread that `main` did not wait for, and saves were lost with
/// exit status 0.
#[test]
fn saves_are_waited_for_whichever_goes_first_hook_or_executor() {
    let program = Program::start("order");
    program.open();
    let (status, _, steps) = program.ends();
    assert_eq!((status.code(), &steps[..]), (Some(33), &[1, 2][..]));
}

/// The hook found no saves in the executor while its last owner waited for them in its drop: the program
/// ended at once, with the exit code for "nothing lost".
#[test]
fn saves_that_the_drop_of_an_executor_waits_for_are_drained() {
    let program = Program::start("going").terminate();
    program.open();
    let (status, report, steps) = program.ends();
    assert_eq!((status.code(), &report[..], &steps[..]), (Some(DURABLE), "Some(2) [1, 2] [] false", &[1, 2][..]));
    // The offered state can no longer be saved, and counts as lost.
    let program = Program::start("offer and go").terminate();
    program.open();
    let (status, report, steps) = program.ends();
    assert_eq!((status.code(), &report[..], &steps[..]), (Some(LOST), "Some(2) [2] [1, 9] false", &[2][..]));
}

/// A hook that was dropped while its thread drained closed the socket that the thread read: the thread spun,
/// and the program ended before the saves had.
#[test]
fn a_program_whose_main_returns_while_saves_are_drained_loses_none() {
    let mut program = Program::start("leaves").terminate();
    assert_eq!(program.hear(), "ready");
    program.open();
    let (status, report, steps) = program.ends();
    assert_eq!((status.code(), &report[..], &steps[..]), (Some(33), "Some(2) [1, 2] [] false", &[1, 2][..]));
}

/// The handler stayed after the hook was dropped, and after the report of a program that continued: the
/// signal no longer ended it.
#[test]
fn the_signal_ends_the_program_again_when_the_hook_is_gone_or_has_reported() {
    let mut program = Program::start("taken away");
    assert_eq!(program.hear(), "gone");
    program.term();
    assert_eq!(program.ends().0.signal(), Some(libc::SIGTERM));
    let mut program = Program::start("again").terminate();
    program.open();
    while program.hear() != "reported" {}
    eventually("its end", || {
        program.term();
        program.child.try_wait().unwrap().is_some()
    });
    assert_eq!(program.ends().0.signal(), Some(libc::SIGTERM));
}
