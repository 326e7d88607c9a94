//! Reads what launchers of jobs say about a process: its rank, the number of ranks, and the identity of the
//! run.
//!
//! Processes inherit environment variables. The worker processes of a data loader see the `RANK` of their
//! parent, and the batch script of a Slurm job sees the `SLURM_NTASKS` of the whole job although it is a
//! single process. So the variables are read only when an executor is built, which such processes do not do.
//! For Slurm only the variables of a step count, which `srun` starts. A program that a launcher started as
//! one of several ranks must say whether these ranks save together; [`Launched::undecided`] has the text.
//!
//! | launcher | rank and number of ranks | run token |
//! |---|---|---|
//! | torchrun, Kubernetes' PyTorchJob | `RANK`, `WORLD_SIZE`, `LOCAL_RANK` | `TORCHELASTIC_RUN_ID`, unless it is `none`, with `TORCHELASTIC_RESTART_COUNT` |
//! | Open MPI | `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK` | `PMIX_NAMESPACE` or `OMPI_MCA_ess_base_jobid`, with the host of mpirun |
//! | MPICH, Intel MPI, and others with PMI | `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID` | `PMI_JOBID`, or Slurm's |
//! | Slurm, by `srun` | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS`, `SLURM_LOCALID` | `SLURM_JOB_ID`, `SLURM_STEP_ID`, `SLURM_RESTART_COUNT` |
//!
//! The first launcher of the table whose variables are set is used, because torchrun may run below srun, and
//! mpirun below a Slurm step of its own daemons.

use super::Member;
use crate::error::{Error, Result};

/// What a launcher says about this process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Launched {
    /// Its position among the ranks.
    pub member: Member,
    /// The identity of the run, if the launcher gives one that no other run has.
    pub token: Option<String>,
    /// The variable that gave the number of ranks, for messages.
    pub variable: &'static str,
}

impl Launched {
    /// Returns the error of a program that did not say whether its ranks save together.
    pub fn undecided(&self) -> Error {
        let Member { rank, world, .. } = self.member;
        let variable = self.variable;
        let text = format!(
            "a launcher started this process as one of several ranks: say `.ranks(...)` if they save one checkpoint \
             together, or `.alone()` if this process saves one of its own {variable}={world}"
        );
        Error::invalid(text).with_rank(rank)
    }
}

/// Returns the position that a launcher gave to this process. None without a launcher.
///
/// # Errors
/// `Invalid` if a variable is not a number, or the rank is not below the number of ranks.
pub fn detect() -> Result<Option<Member>> {
    Ok(launched()?.map(|launched| launched.member))
}

/// Returns everything that a launcher says about this process. None without a launcher.
///
/// # Errors
/// As [`detect`].
pub fn launched() -> Result<Option<Launched>> {
    read(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
}

/// Reads the variables through `lookup`.
///
/// ```
/// use ashore::ranks::launcher;
/// let variables = [("RANK", "5"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1"), ("TORCHELASTIC_RUN_ID", "none")];
/// let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
/// let launched = launcher::read(find)?.expect("torchrun");
/// assert_eq!((launched.member.rank, launched.member.world, launched.token), (5, 16, None));
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// # Errors
/// As [`detect`].
pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Launched>> {
    let get = |name: &str| lookup(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
    let number = |name: &'static str| -> Result<Option<u32>> {
        let Some(value) = get(name) else { return Ok(None) };
        let wrong = |_| Error::invalid(format!("a launcher's variable is no number of a rank {name}={value:?}"));
        value.parse().map(Some).map_err(wrong)
    };
    let member = |rank: &'static str, world: &'static str, local: &'static str| -> Result<Option<Member>> {
        match (number(rank)?, number(world)?) {
            (Some(r), Some(w)) => {
                let local_rank = number(local)?.unwrap_or(0);
                let member = Member { rank: r, world: w, local_rank };
                let wrong = |e: Error| Error::invalid(format!("{}: {rank}={r} {world}={w}", e.message()));
                member.checked().map(Some).map_err(wrong)
            }
            (None, None) => Ok(None),
            (Some(_), None) => Err(Error::invalid(format!("{rank} is set and {world} is not: set both, or neither"))),
            (None, Some(_)) => Err(Error::invalid(format!("{world} is set and {rank} is not: set both, or neither"))),
        }
    };
    let joined = |parts: &[Option<String>]| {
        let parts: Option<Vec<String>> = parts.iter().cloned().collect();
        parts.map(|parts| parts.join("."))
    };
    let or_zero = |name| Some(get(name).unwrap_or_else(|| "0".into()));
    let slurm = || joined(&[get("SLURM_JOB_ID"), get("SLURM_STEP_ID"), or_zero("SLURM_RESTART_COUNT")]);

    let found = |member, variable, token: Option<String>| Some(Launched { member, token, variable });
    if let Some(member) = member("RANK", "WORLD_SIZE", "LOCAL_RANK")? {
        let run = get("TORCHELASTIC_RUN_ID").filter(|id| id != "none");
        return Ok(found(member, "WORLD_SIZE", joined(&[run, or_zero("TORCHELASTIC_RESTART_COUNT")])));
    }
    if let Some(member) = member("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")? {
        let job = get("PMIX_NAMESPACE").or_else(|| get("OMPI_MCA_ess_base_jobid"));
        let server = get("OMPI_MCA_orte_hnp_uri");
        // Before version 5 the name of a job is a number, which is unique only together with the address of
        // its mpirun.
        let token = job.map(|job| server.map_or(job.clone(), |server| format!("{job}@{server}")));
        return Ok(found(member, "OMPI_COMM_WORLD_SIZE", token));
    }
    if let Some(member) = member("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")? {
        return Ok(found(member, "PMI_SIZE", get("PMI_JOBID").or_else(slurm)));
    }
    // Use only the variables of a step: a batch script has a rank, too, and the SLURM_NTASKS of its job, but
    // is one process.
    if get("SLURM_STEP_NUM_TASKS").is_some()
        && let Some(member) = member("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")?
    {
        return Ok(found(member, "SLURM_STEP_NUM_TASKS", slurm()));
    }
    if let Some(rank) = number("PMIX_RANK")? {
        let text = "the launcher tells the rank by PMIx, and the number of ranks not at all: set RANK and WORLD_SIZE";
        return Err(Error::invalid(text).with_rank(rank));
    }
    Ok(None)
}

/// Refuses a run token that does not distinguish this run from others.
pub(super) fn checked_token(token: &str) -> Result<()> {
    if !token.trim().is_empty() && token != "none" {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the ranks need the identity of their run, and the launcher gives none: give `torchrun --rdzv-id`, or name the \
         run with `.run(name)`, equal on all ranks and new for each run token={token:?}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rank, world, local rank and token.
    type Read = Option<(u32, u32, u32, Option<String>)>;

    fn reading(variables: &[(&str, &str)]) -> Result<Read> {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let tuple = |Launched { member: m, token, .. }| (m.rank, m.world, m.local_rank, token);
        Ok(read(find)?.map(tuple))
    }

    fn ok(variables: &[(&str, &str)]) -> Option<(u32, u32, u32, Option<String>)> {
        reading(variables).unwrap()
    }

    fn refused(variables: &[(&str, &str)]) -> String {
        reading(variables).unwrap_err().to_string()
    }

    const TORCHRUN: &[(&str, &str)] = &[
        ("GROUP_RANK", "1"),
        ("GROUP_WORLD_SIZE", "2"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29500"),
        ("RANK", "5"),
        ("ROLE_NAME", "default"),
        ("ROLE_RANK", "5"),
        ("ROLE_WORLD_SIZE", "8"),
        ("TORCHELASTIC_ERROR_FILE", "error.json"),
        ("TORCHELASTIC_MAX_RESTARTS", "3"),
        ("TORCHELASTIC_RESTART_COUNT", "2"),
        ("TORCHELASTIC_RUN_ID", "job-9"),
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
        ("WORLD_SIZE", "8"),
    ];
    /// The batch script itself, which is one process, whatever number the job requested.
    const SLURM_BATCH: &[(&str, &str)] = &[
        ("SLURM_JOB_ID", "4242"),
        ("SLURM_JOB_NUM_NODES", "2"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_NNODES", "2"),
        ("SLURM_NODEID", "0"),
        ("SLURM_NPROCS", "16"),
        ("SLURM_NTASKS", "16"),
        ("SLURM_PROCID", "0"),
        ("SLURM_TASKS_PER_NODE", "8(x2)"),
    ];
    const SLURM_STEP: &[(&str, &str)] = &[
        ("SLURM_JOB_ID", "4242"),
        ("SLURM_LOCALID", "3"),
        ("SLURM_NTASKS", "16"),
        ("SLURM_PROCID", "11"),
        ("SLURM_STEP_ID", "1"),
        ("SLURM_STEP_NODELIST", "node[0-1]"),
        ("SLURM_STEP_NUM_NODES", "2"),
        ("SLURM_STEP_NUM_TASKS", "16"),
        ("SLURM_STEP_TASKS_PER_NODE", "8(x2)"),
    ];
    const OPEN_MPI: &[(&str, &str)] = &[
        ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ("OMPI_COMM_WORLD_NODE_RANK", "0"),
        ("OMPI_COMM_WORLD_RANK", "2"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_MCA_ess_base_jobid", "1093337089"),
        ("OMPI_MCA_orte_hnp_uri", "1093337088.0;tcp://10.0.0.7:40761"),
        // The address of the daemon on this host, different on each host.
        ("PMIX_SERVER_URI41", "1093337088.1;tcp4://127.0.0.1:44877"),
        ("OMPI_UNIVERSE_SIZE", "4"),
        ("PMIX_NAMESPACE", "1093337089"),
        ("PMIX_RANK", "2"),
    ];
    const HYDRA: &[(&str, &str)] =
        &[("MPI_LOCALNRANKS", "2"), ("MPI_LOCALRANKID", "1"), ("PMI_FD", "9"), ("PMI_RANK", "1"), ("PMI_SIZE", "2")];

    #[test]
    fn each_launcher_is_read() {
        assert_eq!(ok(&[]), None);
        assert_eq!(ok(TORCHRUN), Some((5, 8, 1, Some("job-9.2".into()))));
        assert_eq!(ok(SLURM_STEP), Some((11, 16, 3, Some("4242.1.0".into()))));
        let token = "1093337089@1093337088.0;tcp://10.0.0.7:40761";
        assert_eq!(ok(OPEN_MPI), Some((2, 4, 0, Some(token.into()))));
        assert_eq!(ok(HYDRA), Some((1, 2, 1, None)));
        let version_5 =
            [("PMIX_NAMESPACE", "prterun-node0-4711@1"), ("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
        assert_eq!(ok(&version_5), Some((1, 2, 0, Some("prterun-node0-4711@1".into()))));
        // Kubernetes' PyTorchJob: one process per pod.
        assert_eq!(ok(&[("RANK", "1"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "a-0")]), Some((1, 3, 0, None)));
    }

    #[test]
    fn a_batch_script_is_no_rank() {
        assert_eq!(ok(SLURM_BATCH), None);
    }

    #[test]
    fn the_innermost_launcher_counts() {
        assert_eq!(ok(&[SLURM_STEP, TORCHRUN].concat()), ok(TORCHRUN));
        // mpirun starts its daemons as a step of Slurm.
        assert_eq!(ok(&[SLURM_STEP, OPEN_MPI].concat()), ok(OPEN_MPI));
        let hydra = ok(&[SLURM_STEP, HYDRA].concat());
        assert_eq!(hydra, Some((1, 2, 1, Some("4242.1.0".into()))));
    }

    #[test]
    fn a_run_without_an_identity_has_no_token() {
        let of =
            |id: &[(&'static str, &'static str)]| ok(&[&[("RANK", "0"), ("WORLD_SIZE", "2")], id].concat()).unwrap().3;
        assert_eq!(of(&[("TORCHELASTIC_RUN_ID", "none"), ("TORCHELASTIC_RESTART_COUNT", "0")]), None);
        assert_eq!(of(&[("TORCHELASTIC_RUN_ID", " ")]), None);
        for token in ["", " ", "none"] {
            assert!(checked_token(token).unwrap_err().to_string().contains(".run(name)"));
        }
        checked_token("job-9.2").unwrap();
    }

    #[test]
    fn wrong_variables_are_named() {
        let cases: [(&[(&str, &str)], &str); 7] = [
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK=\"x\""),
            (&[("RANK", "-1"), ("WORLD_SIZE", "2")], "RANK=\"-1\""),
            (&[("RANK", "2"), ("WORLD_SIZE", "2")], "RANK=2 WORLD_SIZE=2"),
            (&[("RANK", "0"), ("WORLD_SIZE", "4000000000")], "WORLD_SIZE=4000000000"),
            (&[("RANK", "0")], "RANK is set and WORLD_SIZE is not"),
            (&[("WORLD_SIZE", "2")], "WORLD_SIZE is set and RANK is not"),
            (&[("PMIX_RANK", "1"), ("PMIX_NAMESPACE", "prterun-a-1@1")], "set RANK and WORLD_SIZE"),
        ];
        for (variables, text) in cases {
            let error = refused(variables);
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn the_text_says_what_to_decide() {
        let member = Member { rank: 3, world: 8, local_rank: 3 };
        let text = Launched { member, token: None, variable: "WORLD_SIZE" }.undecided().to_string();
        assert!(text.contains(".ranks(...)") && text.contains(".alone()") && text.ends_with("WORLD_SIZE=8 rank=3"));
    }
}
