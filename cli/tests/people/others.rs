//! What the verbs print that write steps elsewhere.

use crate::run::Run;

#[test]
fn conversions_copies_and_versions_are_told_in_a_line() {
    for columns in [80, 200] {
        let run = Run::new([10, 20, 30]);
        let shows = |name: &str, args: &[&str]| run.shows_at(name, args, columns);
        shows("convert", &["convert", "run", "10", "--to", "hf", "whole"]);
        shows("convert-again", &["convert", "run", "10", "--to", "hf", "whole"]);
        shows("convert-taken", &["convert", "run", "20", "--to", "hf", "whole"]);
        run.json(&["mark", "run", "30", "bad", "--json"], 0);
        shows("copy-dry", &["copy", "run", "other", "--dry-run"]);
        shows("copy", &["copy", "run", "other"]);
        shows("copy-again", &["copy", "run", "other", "--all"]);
        run.change(&run.shard(10), |bytes| *bytes.last_mut().unwrap() ^= 1);
        // The digests in the message are of files that hold the attempt.
        let refused = run.ashore(&["copy", "run", "third", "--step", "10"], columns);
        let said = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(3), "{said}");
        assert!(said.starts_with("ashore: not copied: step 10: a file is not what was written ("), "{said}");
        run.change(&run.step(10).join("manifest.json"), |bytes| bytes.truncate(100));
        shows("ls-several", &["ls", "run", "other"]);
        let (older, newer) = ("run/step-00000020", "run/step-00000030");
        shows("delta", &["delta", older, newer, "-o", "delta"]);
        shows("apply", &["apply", older, "delta", "-o", "made"]);
        shows("apply-other", &["apply", newer, "delta", "-o", "none"]);
        run.publish(3);
        shows("chain", &["chain", "chain"]);
        shows("follow", &["follow", "chain", "--into", "copy", "--idle", "0"]);
        std::fs::remove_dir_all(run.root().with_file_name("chain").join("v-00000002")).unwrap();
        shows("chain-hole", &["chain", "chain"]);
        shows("report-none", &["report", "whole"]);
    }
}
