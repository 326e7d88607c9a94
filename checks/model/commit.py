#!/usr/bin/env python3
"""Explicit-state model checker for the commit of one checkpoint by several ranks (`ashore`).

Modelled: every interleaving, breadth first, so that a counterexample is a shortest one.
  ranks      one process on one node each. Rank 0 coordinates and is the only one that publishes. A rank: join, wait for `go`, write,
             fsync the file, fsync the attempt's directory, receipt, wait for the outcome; at its deadline it vetoes (renames the
             attempt away): the file system decides between veto and publish.
  jobs       A and B save the same step into one root; B may start at any time while A is alive, paused or dead: a zombie is a process
             that takes its next step late. A session is one set of processes (by nonce); the newest session owns the root.
  board      messages of a shared directory, etcd or MPI: a set that only grows, and is read at any time. So a message can be late,
             lost (a deadline may pass at any time), seen twice and out of order.
  rounds     messages of a callback: an all-gather by order of calls, which some ranks may complete and others not.
  medium     a name made, moved or swapped is visible at once and durable after an fsync of its directory: by anybody ("any", what
             docs/format.md assumes) or only by the node that did it ("own": caching clients). Unlinking is durable at once.
  faults     crash and restart of a process, power loss of a node (what it had not synced is gone, names in any subset), a failing
             fsync, ranks with unlike plans, a sweeper. Deadlines may pass whenever a rank waits.
Checked in every state, and on every disk that a power failure of the whole system could leave behind
  torn       the directory with the name of the step is complete: manifest and all files, of the ranks of one session, covering every
             tensor.
  lost       a step that existed before, and an attempt that was reported durable to some rank, exists (or one that replaced it).
  final      an attempt that was reported failed to some rank is never published.
  once       without overwriting, at most one attempt is published.
  zombie     once a session has taken over the root, no attempt of an older session is published.
  resolved   at every end every living rank has an outcome for every save; no cycles.
  promise    without faults and deadlines every rank ends durable; a displaced step never blocks another.
The protocol in short: rank 0 creates the attempt and says go. All ranks write, sync file and directory, and send a receipt with attempt,
  save and plan. Rank 0 checks the receipts, writes the manifest, claims the attempt (renames it to a second name), checks that its session
  is the newest, publishes from that name, syncs the root, and tells the outcome. A rank that gives up after its receipt renames the attempt
  away from the first name and syncs that before it says "failed"; if it is too late it says "indeterminate". A new session is recorded
  first. Then it buries attempts that older sessions have in flight or claimed, syncs the root, and only then looks for steps. Only rank 0
  creates a directory.
First ideas that this model refused: see FIRST_IDEAS at the end.
Abstracted: bytes; the plan (right or not); several steps; object stores. Directory operations are seen by all in one order.

The code is in src/commit/several (the rounds), src/storage/local/{shared,attempt,publish}.rs (claim, veto, take-over) and
src/executor/ranks.rs (the numbers of saves).

Run:      checks/model/commit.py [--deep] [--only NAME] [--mutant NAME]
Expected: "ok" for every configuration, "caught" for every mutant, last line "RESULT: pass", exit status 0.
"""
import argparse, sys, time
from collections import deque

from commit_disk import Bad, C, FIELDS, S
from commit_ranks import Model


def explore(c, limit=3_000_000):
    """(states, ends, None or (what is wrong, trace)); ends counts the outcomes at the ends."""
    model = Model(c)
    key = lambda s: tuple(getattr(s, f) for f in FIELDS)
    def load(k):
        s = S()
        for f, v in zip(FIELDS, k):
            setattr(s, f, v)
        return s
    def trace(n, last):
        out = [last]
        while n > 0:
            n, label = parent[n]
            out.insert(0, label)
        return out
    root = key(model.start())
    number, queue, parent, n, ends = {root: 0}, deque([root]), [(-1, "")], -1, {}
    while queue:
        k, n = queue.popleft(), n + 1
        acts = model.actions(load(k))
        moved = False
        for label, step in acts:
            s = load(k)
            try:
                step(s)
                model.check(s)
            except Bad as e:
                return len(number), ends, (str(e), trace(n, label))
            new = key(s)
            moved |= new != k
            if new not in number:
                number[new] = len(parent)
                parent.append((n, label))
                queue.append(new)
                if len(number) > limit:
                    return len(number), ends, ("too many states", [])
        if not moved or all(l.startswith(("sweeper", "job")) or "restarts" in l for l, _ in acts):
            s = load(k)
            for p, (pc, _, kk, *_) in enumerate(s.procs):
                if not c.deadline and (c.jobs > 1 or c.crash or c.power or c.fail or c.skew or c.skip):
                    continue                                     # without deadlines, a rank that waits for the dead waits
                if pc not in ("dead", "off", "end"):
                    return len(number), ends, (f"resolved: rank {p} waits for ever at {pc}", trace(n, "nothing can move"))
                if pc == "end" and any(code == 0 for code, _ in s.res[p]) and not (c.restart and s.procs[p][1]):
                    return len(number), ends, (f"resolved: rank {p} has a future without an outcome", trace(n, "end"))
            o = "".join(sorted({code for row in s.res for code, _ in row if code}))
            ends[o] = ends.get(o, 0) + 1
            if not c.deadline and not any((c.crash, c.power, c.fail, c.skew, c.skip)) and c.jobs == 1 and o != "D":
                return len(number), ends, (f"promise: without faults the outcomes are {o}", trace(n, "end"))
    return len(number), ends, None


ONE = C()
OWN = C(medium="own")
CONFIGS = {
    "calm 2": C(deadline=False), "calm 3": C(R=3, deadline=False), "calm overwrite": C(overwrite=True, deadline=False, saves=2),
    "calm, sweeper": C(deadline=False, sweep=True, overwrite=True),
    "calm rounds": C(coord="rounds", deadline=False, saves=2, overwrite=True), "calm rounds 3": C(R=3, coord="rounds", deadline=False),
    "late": ONE, "late own": OWN, "late 3": C(R=3, coarse=True), "twice, overwriting": C(saves=2, overwrite=True, coarse=True),
    "twice": C(saves=2, coarse=True),
    "crash": C(crash=1), "crash 3": C(R=3, crash=1, coarse=True), "crash all": C(crash=2),
    "crash overwrite": C(crash=1, overwrite=True, sweep=True, coarse=True), "crash, twice": C(crash=1, saves=2, overwrite=True, coarse=True),
    "power": C(power=1), "power own": OWN._replace(power=1), "power own 3": OWN._replace(power=1, R=3, deadline=False),
    "power twice own": OWN._replace(power=2), "power overwrite": C(power=1, overwrite=True, sweep=True),
    "fsync fails": C(fail=1, power=1), "plans differ": C(skew=True, crash=1), "plans differ 3": C(R=3, skew=True, coarse=True),
    "restart": C(crash=1, restart=1, saves=2, coarse=True), "restart, written": C(crash=1, restart=1, saves=1, deadline=False),
    "a rank skips": C(saves=2, overwrite=True, coarse=True, skip=True), "a rank skips 3": C(R=3, saves=2, overwrite=True, coarse=True, skip=True, deadline=False),
    "sweeper": C(crash=2, sweep=True), "sweeper 3": C(R=3, crash=1, sweep=True, coarse=True, overwrite=True),
    "zombie": C(jobs=2, coarse=True), "zombie crash": C(jobs=2, crash=1, coarse=True, deadline=False),
    "zombie overwrite": C(jobs=2, overwrite=True, coarse=True, deadline=False, sweep=True),
    "rounds": C(coord="rounds"), "rounds crash": C(coord="rounds", crash=1), "rounds power own": OWN._replace(coord="rounds", power=1),
    "rounds twice": C(coord="rounds", saves=2, coarse=True, overwrite=True), "rounds 3": C(R=3, coord="rounds", coarse=True),
    "rounds fsync fails": C(coord="rounds", fail=1), "rounds plans differ": C(coord="rounds", skew=True),
    "rounds zombie": C(coord="rounds", jobs=2, coarse=True, deadline=False),
}
DEEP = {
    "deep 3 crash": C(R=3, crash=1), "deep 3 power own": OWN._replace(R=3, power=1), "deep zombie twice": C(jobs=2, saves=2, coarse=True, deadline=False),
    "deep zombie crash": C(jobs=2, crash=1, coarse=True), "deep zombie power own": OWN._replace(jobs=2, power=1, coarse=True),
    "deep zombie overwrite": C(jobs=2, overwrite=True, coarse=True, sweep=True),
    "deep zombie overwrite own": OWN._replace(jobs=2, overwrite=True, coarse=True, sweep=True, deadline=False),
    "deep rounds zombie crash": C(coord="rounds", jobs=2, crash=1, coarse=True, deadline=False),
    "deep rounds 3 crash": C(R=3, coord="rounds", crash=1, coarse=True), "deep restart power": C(power=1, restart=1, saves=2, overwrite=True, coarse=True),
    "deep overwrite power own": OWN._replace(overwrite=True, power=1, sweep=True), "deep rounds power twice": C(coord="rounds", power=2),
}
MUTANTS = {  # name: (configuration, what is wrong with it)
    "no-receipts": (ONE, "publish before all receipts are there"),
    "stale-receipt": (C(saves=2, overwrite=True, coarse=True), "a receipt is looked up by step: one of the attempt before counts"),
    "no-coverage": (C(skew=True), "coverage is not checked against the plan that was agreed"),
    "told-first": (ONE, "the outcome is told before the root is synced"),
    "no-rootsync": (ONE, "the root is not synced after the publish"),
    "visible-is-durable": (OWN._replace(power=1), "a rank that sees the step, and syncs the root itself, takes it for durable"),
    "no-fsync": (ONE, "a receipt without an fsync of the file"),
    "fsync-again": (C(fail=1), "a failed fsync is repeated and believed"),
    "no-dirsync": (ONE, "no rank syncs the attempt's directory"),
    "coordinator-dirsync": (OWN, "only rank 0 syncs the attempt's directory, on a medium with caching clients"),
    "manifest-unsynced": (ONE, "the manifest is not synced before the publish"),
    "deadline-is-failed": (ONE, "a rank that has sent its receipt calls the save failed at its deadline"),
    "veto-not-durable": (OWN._replace(power=1, R=2), "a rank calls the save failed before its veto is durable"),
    "others-veto": (OWN._replace(power=1, R=3, coarse=True), "a rank believes the veto of another, which is not durable yet"),
    "no-claim": (C(overwrite=True, sweep=True), "an overwrite exchanges out of the name that a veto takes away"),
    "late-is-failed": (ONE, "a deadline in the middle of the publish is a failure"),
    "replaces": (C(jobs=2, coarse=True, deadline=False), "a plain rename that replaces"),
    "no-takeover": (C(jobs=2, coarse=True, deadline=False), "a new session buries nothing"),
    "check-only": (C(jobs=2, coarse=True, deadline=False), "the zombie only looks whether it is still the newest, then publishes"),
    "check-first": (C(jobs=2, coarse=True, deadline=False), "the generation is checked before the attempt is claimed, not after"),
    "no-check": (C(jobs=2, coarse=True, deadline=False), "the generation is not checked after the claim"),
    "buries-open": (C(jobs=2, coarse=True, deadline=False), "a new session buries attempts in flight, not claimed ones"),
    "no-nonce": (C(jobs=2, coarse=True, deadline=True, crash=1), "a rank joins the newest session without being listed in it"),
    "no-token": (C(jobs=2, coarse=True, deadline=True), "a coordinator counts the hello of another job's rank"),
    "old-place": (C(crash=1, restart=1), "a rank that was started again goes on in its old place"),
    "key-by-step": (C(saves=2, overwrite=True, coarse=True), "outcomes are looked up by step: the same step twice"),
    "all-mkdir": (C(R=3, coarse=True), "every rank makes the attempt's directory where it is missing"),
    "sweep-others": (C(sweep=True, deadline=False), "a sweeper judges owners of other hosts"),
    "sweep-no-fsync": (C(crash=1, overwrite=True, sweep=True), "a sweeper deletes what was displaced without making the exchange durable"),
    "trash-as-found": (OWN._replace(jobs=2, overwrite=True, coarse=True, sweep=True, deadline=False), "trash that another node renamed is deleted under the name it has"),
    "settles-first": (C(overwrite=True), "what was displaced is deleted before the exchange is durable"),
    "no-deadline": (C(crash=1), "rank 0 waits for receipts without a deadline"),
    "no-tags": (C(coord="rounds", saves=2, coarse=True, overwrite=True), "messages of an all-gather do not say which save and phase"),
    "late-receipt": (ONE, "a rank that has given up still sends its receipt"),
    "no-step-check": (C(saves=2, overwrite=True, coarse=True, skip=True), "a receipt does not say its step, and one rank skipped a save by itself"),
    "stale-list": (C(jobs=2, coarse=True, deadline=False), "the new session's listing is stale (a medium that caches listings)"),
}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--deep", action="store_true")
    ap.add_argument("--only")
    ap.add_argument("--mutant", choices=sorted(MUTANTS))
    a, ok, total, began = ap.parse_args(), True, 0, time.time()
    for name, c in ({} if a.mutant else CONFIGS | (DEEP if a.deep else {})).items():
        if a.only and a.only != name:
            continue
        t = time.time()
        n, ends, wrong = explore(c)
        total, ok = total + n, ok and not wrong
        print("WRONG" if wrong else "ok   ", f"{n:8} states {time.time() - t:5.1f} s  {name:24}", "ends", dict(sorted(ends.items())), flush=True)
        if wrong:
            print(*["       " + x for x in [wrong[0]] + wrong[1]], sep="\n")
    caught = 0
    for name, (c, what) in MUTANTS.items():
        if a.only or a.mutant and a.mutant != name:
            continue
        n, ends, wrong = explore(c._replace(mutant=name))
        ok, caught = ok and bool(wrong) and wrong[0] != "too many states", caught + bool(wrong)
        print("caught" if wrong else "MISSED", f"{n:7} states  {name}: {what}", "->", wrong[0] if wrong else ends, flush=True)
        if a.mutant and wrong:
            print(*["       " + x for x in wrong[1]], sep="\n")
    print(f"{total} states, {caught} mutants caught, {time.time() - began:.0f} s")
    print("RESULT:", "pass" if ok else "FAIL")
    sys.exit(not ok)


FIRST_IDEAS = """
 1 A deadline is a failure, on every rank by itself                -> final: rank 0 publishes a second later. So: a veto that the file system
   decides.
 2 The veto renames the attempt away, and an overwrite exchanges from the same name -> after the exchange that name holds the OLD step, and
   the veto trashes it. So: a second name (`claimed`) from which it is published, and which no veto touches.
 3 A veto counts when rename returns; one that another rank made counts too -> undone by a power loss, the attempt is back and is published.
   So: sync the root first; of another rank's veto a rank only knows "indeterminate".
 4 The zombie looks whether it is the newest right before its rename -> it sleeps between look and rename. So: the new session renames
   what the old one has, and the file system decides.
 5 The look comes after mkdir, and the new session buries until a listing shows nothing -> passes on "any", fails on "own": a veto that a
   power loss undoes brings an attempt back after the last listing. So: the look comes after the CLAIM; then one listing is enough.
 6 Rank 0 syncs the attempt's directory for all -> torn on clients that hold names back. So: the process that makes a name syncs it.
 7 Survivors of rank 0 find the step, sync the root and say durable -> lost on "own". So: "indeterminate"; the next start confirms it.
 8 Every rank makes the attempt's directory if it is missing -> after a veto a slow rank makes it anew, and that is published.
 9 Saves are numbered by each rank's own count of calls -> with an overlap policy applied locally one rank is a save behind, and files of
   two saves are published as one. So: receipts say the step and the save, and rank 0 alone skips.
   A sweeper syncs the root and empties the trash -> on "own" the rename to the trash was another node's, and a power loss undoes it with the
   bytes gone. So: a process that deletes renames first, then syncs, then unlinks.
10 An all-gather group is used again after a time-out -> safe as long as messages say session, save and phase, torn without; but the ranks
   never come into step again. So: broken until a new session.
"""


if __name__ == "__main__":
    main()
