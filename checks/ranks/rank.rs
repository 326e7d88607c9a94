//! One rank of a job: `ranks.py` and mpirun start it several times.
//!
//! ```text
//! rank suite directory ROOT   runs every behaviour of `ashore::testing::ranks`
//! rank rounds directory ROOT  exchanges messages until it is killed, or another rank is
//! rank ... etcd URL[#PREFIX]  the same through an etcd server
//! rank ... mpi                the same by MPI
//! rank saves MEANS PLACE ROOT STEPS TIMEOUT_MS
//!                             goes on from the newest step in ROOT, and saves
//! rank one ROOT STEPS TIMEOUT_MS
//!                             the same without ranks; one process
//! rank look ROOT              compares every step in ROOT with what it must hold; one process
//! rank admits RECORD MOUNT [early]
//!                             compares the tree at MOUNT with what the simulated file system predicts, for each
//!                             position that it reads; RECORD is what `saves` and `one` have recorded
//! ```

mod admits;
mod saves;

use ashore::ranks::{Coordinator, Hello, Member, Phase, Round, Session, SharedDirectory, launcher};
use ashore::testing::ranks::{Join, Kind, run_rank};
use ashore::{Error, ErrorKind, Result};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["look", root] = arguments[..] {
        return saves::look(root);
    }
    if let ["admits", record, mount, how @ ..] = &arguments[..] {
        return admits::admits(record, mount, *how == ["early"]);
    }
    if let ["one", root, steps, timeout] = arguments[..] {
        return saves::saves(None, root, steps, timeout);
    }
    let [what, means, more @ ..] = &arguments[..] else { return Err(wrong("give what to run, and by which means")) };
    let place = more.first().copied().unwrap_or_default().to_owned();
    let launched = launcher::launched()?.ok_or_else(|| wrong("start it as one of several ranks"))?;
    let token = launched.token.ok_or_else(|| wrong("the launcher gives no token"))?;
    let (kind, join) = coordinator(means, place)?;
    match *what {
        "suite" => {
            run_rank(kind, launched.member, &token, &join);
            println!("all behaviours rank={}", launched.member.rank);
            Ok(())
        }
        "rounds" => rounds(&*join(launched.member.rank, launched.member)?, &token),
        "saves" => {
            let [_, root, steps, timeout] = more else { return Err(wrong("give place, root, steps and timeout")) };
            saves::saves(Some(join(launched.member.rank, launched.member)?), root, steps, timeout)
        }
        _ => Err(wrong("suite, rounds, saves or look")),
    }
}

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::Invalid, what)
}

fn coordinator(means: &str, place: String) -> Result<(Kind, Join)> {
    match means {
        "directory" => Ok((
            Kind::Board,
            Arc::new(move |_, member| Ok(Arc::new(SharedDirectory::new(&place, member)?) as Arc<dyn Coordinator>)),
        )),
        #[cfg(feature = "etcd")]
        "etcd" => Ok((
            Kind::Board,
            Arc::new(move |_, member| {
                let (server, prefix) = place.split_once('#').unwrap_or((&place, "/check"));
                Ok(Arc::new(ashore::ranks::Etcd::new([server], prefix, member)?) as Arc<dyn Coordinator>)
            }),
        )),
        #[cfg(feature = "mpi")]
        "mpi" => {
            let ranks: Arc<dyn Coordinator> =
                Arc::new(ashore::ranks::Mpi::start(Instant::now() + Duration::from_secs(60))?);
            Ok((Kind::Wired, Arc::new(move |_, _| Ok(Arc::clone(&ranks)))))
        }
        _ => Err(wrong("these means are unknown, or their feature is off")),
    }
}

fn rounds(ranks: &dyn Coordinator, token: &str) -> Result<()> {
    let member = ranks.member();
    let hello = |member: Member| Hello {
        member,
        nonce: Uuid::new_v4(),
        token: token.to_owned(),
        host: "localhost".into(),
        pid: std::process::id(),
    };
    let open = &mut |_: &[Hello]| Ok(Session { id: Uuid::new_v4(), generation: 1 });
    let session = ranks.meet(&hello(member), open, Instant::now() + Duration::from_secs(60))?;
    println!("met session={}", session.id);
    for save in 0.. {
        let start = Instant::now();
        let deadline = start + Duration::from_secs(20);
        let round = Round { session: session.id, save, phase: Phase::Receipt };
        let message = save.to_le_bytes();
        let each = &mut |_: u32, received: &[u8]| {
            assert_eq!(received, message);
            ControlFlow::Continue(())
        };
        let gathered = ranks.gather(round, &message, each, deadline);
        let told = gathered.and_then(|()| ranks.tell(round, (member.rank == 0).then_some(&message), deadline));
        match told {
            Ok(told) => assert_eq!(told, message),
            Err(error) => {
                let (kind, after) = (error.kind(), start.elapsed().as_millis());
                println!("ended kind={kind:?} ranks={:?} after_ms={after}", error.ranks());
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
