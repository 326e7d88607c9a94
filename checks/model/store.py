#!/usr/bin/env python3
"""Explicit-state model checker for steps in an object store, and for a node's disk in front of it (`ashore`).

Modelled: every interleaving, breadth first, so that a counterexample is a shortest one.
  root       one object, changed by compare-and-swap only: generation, session, attempt of each step, vetoes, and which changes were the
             newest. Its content never repeats, so a change lands only on what its sender has read.
  request    is answered, or refused with or without reason, or lands and the answer is lost, or lands later or never.
  jobs       of one or several ranks. Any may be a zombie: a process that takes its next step late. Rank 0: takes the root over, lists,
             sweeps dead attempts of older generations, then for each save: its part, receipts of all, the manifest, the commit.
             The others: part, receipt, outcome; at its deadline a rank vetoes by a change of the root.
  others     `ashore prune`, which does not take over the root; a reader, which reads the root and then file by file.
  tiers      a job's node keeps each step first, and may return late or be lost; steps that are not in the store yet are promoted later.
  faults     `faults` answers go wrong, `deaths` processes or nodes die.
Checked in every state
  torn       every attempt that the root names has all its objects.
  lost       a step that was reported durable is named, or was replaced or pruned; a step reported local is in some tier while the node
             lives.
  final      an attempt that was reported failed for certain never becomes the step; with tiers, this session did not promote it.
  once       without overwriting, at most one attempt of a step is published.
  zombie     once a session has listed, no attempt of an older one that it did not see becomes a step.
  fork       no session goes on from a step that a session in between did not see.
  comes back a pruned attempt is never a step again.
  corrupt    a reader never reports a step as damaged because it was pruned.
  resolved   at every end every living process has an outcome for every save.
  promise    without faults and deaths every save of one job ends durable.
The protocol in short: a process reads the root, changes it by compare-and-swap, and reads it again whenever the answer is not a plain
  success. If the root contains or remembers the own change, the change is done. If the root has another version without the change, the
  change failed for certain, because the request named a version that never returns. If the root has the same version, the process sends
  the change again, or bumps the root, or the outcome is unknown. Only a change that has never landed is made again. It first checks in
  the new root: is the generation mine, is the attempt vetoed, is the step free. A session takes over first, then lists, then sweeps
  objects that older generations left unnamed. It deletes the objects of an attempt only after a change that removed the attempt from the
  root, or ensured that it never enters the root. Before a session sends its take-over, it notes on its node which session it follows.
  Steps of that chain on the node are its own; all other steps are forks.
Abstracted: bytes, multipart uploads, retries below the root object. Lists of keys decide only what is swept.

The code is in src/storage/object/. First ideas that this model refused are its mutants.

Run:      checks/model/store.py [--deep] [--only NAME] [--mutant NAME]
Expected: "ok" for every configuration, "caught" for every mutant, last line "RESULT: pass", exit status 0.
"""
import argparse, sys, time
from collections import deque

from store_jobs import Bad, C, FIELDS, NONE, S, Model, put


class Jobs(Model):
    """What each process does next: one method for each place in its program."""

    # -- rank 0 --------------------------------------------------------------------------------------------------------
    def begin(self, s, p, out):
        before = range(0, p, self.c.ranks)
        alone = all(s.procs[q][0] in ("end", "dead") for q in before if self.c.nodes and self.node(q) == self.node(p))
        if alone and all(s.procs[q][0] != "begin" for q in before) and (not s.local or s.local[self.node(p)] is not None):
            if self.mut == "list-first":
                out.append(("lists before it takes over", lambda s: (self.see(s, p), self.aim(s, p, ("take",)))))
            else:
                out.append(("starts", lambda s: self.aim(s, p, ("take",))))

    def see(self, s, p):
        local = {x[1] for x in self.lineage(s, p)} if s.local else set()
        self.to(s, p, s.procs[p][0], saw=frozenset(a for a in s.root[3] if a) | local)

    def list(self, s, p, out):
        def step(s):
            if self.mut != "list-first" and s.root[1] == s.procs[p][2]:
                self.see(s, p)
            self.to(s, p, "sweep")
        out.append(("lists", step))

    def sweep(self, s, p, out):
        def step(s):
            saw, g = s.procs[p][7], s.procs[p][2]
            named = NONE if self.mut == "sweep-committed" else saw if saw is not None else s.root[3]
            old = lambda x: x[2] < g or self.mut == "sweep-any-generation" and self.writer(x[0]) != p
            s.obj = frozenset(x for x in s.obj if x[0] in named or not old(x))
            self.to(s, p, "promote" if s.local else "go")
        out.append(("sweeps", step))

    def promote(self, s, p, out):
        if s.root[1] != s.procs[p][2]:
            out.append(("is not the newest", lambda s: self.to(s, p, "end")))
            return
        waiting = self.promotable(s, p)
        def step(s):
            n, a, _ = waiting[0]
            s.obj = s.obj | {(a, part, s.procs[p][2]) for part in range(self.c.ranks + 1)}
            self.aim(s, p, ("step", n, a))
        out.append(("promotes", step) if waiting else ("has nothing to promote", lambda s: self.to(s, p, "go")))

    def go(self, s, p, out):
        a, g = self.attempt(p, s.procs[p][1]), s.procs[p][2]
        n = self.step_of(a)
        taken = s.root[3][n] and not self.c.overwrite
        def step(s):
            if self.c.ranks > 1:
                s.board = s.board | {("go", a, g)}
            if s.local:
                s.local = put(s.local, self.node(p), s.local[self.node(p)] | {(n, a, self.label(s, p))})
                self.tell(s, p, "D" if self.mut == "told-early" else "L")
            self.to(s, p, "part")
        def conflict(s):
            self.tell(s, p, "F")
            self.go_on(s, p)
        out.append(("finds the step", conflict) if taken else ("begins", step))

    def part(self, s, p, out):
        r, k = p % self.c.ranks, s.procs[p][1]
        a = self.attempt(p, k)
        g = s.procs[p][2] if r == 0 else next(m[2] for m in s.board if m[:2] == ("go", a))
        def step(s):
            s.obj = s.obj | {(a, r, g)}
            if r:
                s.board = s.board | {("receipt", a, r)}
            self.to(s, p, "outcome" if r else "receipts")
        out.append(("writes its part", step))
        self.give_up(s, p, out)

    def receipts(self, s, p, out):
        k, g = s.procs[p][1:3]
        a = self.attempt(p, k)
        def step(s):
            if self.mut != "manifest-missing":
                s.obj = s.obj | {(a, self.c.ranks, g)}
            self.to(s, p, "commit")
        def failed(s):
            self.tell(s, p, "F")
            s.board = s.board | {("outcome", a, "F")}
            self.to(s, p, "abandon")
        if all(("receipt", a, r) in s.board for r in range(1, self.c.ranks)) or self.mut == "no-receipts":
            out.append(("puts the manifest", step))
        elif self.c.deadline:
            out.append(("gives up without receipts", failed))

    def commit(self, s, p, out):
        a = self.attempt(p, s.procs[p][1])
        if self.mut == "local-drop-early":
            s_local = frozenset(x for x in s.local[self.node(p)] if x[1] != a)
            out.append(("drops the local step, reads the root", lambda s: (
                setattr(s, "local", put(s.local, self.node(p), s_local)), self.aim(s, p, ("step", self.step_of(a), a)))))
        elif self.c.fence == "look" and s.root[1] != s.procs[p][2]:
            out.append(("sees a newer session", lambda s: self.after(s, p, "F")))
        else:
            out.append(("reads the root", lambda s: self.aim(s, p, ("step", self.step_of(a), a))))

    def settle(self, s, p, out):
        def step(s):
            if s.procs[p][8]:
                self.destroy(s, s.procs[p][8])
            self.to(s, p, "next")
        out.append(("settles", step))

    def abandon(self, s, p, out):
        a = s.procs[p][4][2] if s.procs[p][4][0] == "step" else self.attempt(p, s.procs[p][1])
        def step(s):
            self.destroy(s, a)
            self.to(s, p, "next")
        out.append(("abandons", step))

    def next(self, s, p, out):
        what = s.procs[p][4]
        if s.local and what[0] == "step" and what[2] != self.attempt(p, s.procs[p][1]):
            out.append(("promotes on", lambda s: self.to(s, p, "promote" if what[2] in s.root[3] else "go")))
            return
        kept = [(n, a) for n, a in enumerate(s.root[3]) if a]
        if self.c.retain and len(kept) > 1 and s.root[1] == s.procs[p][2]:
            out.append(("prunes the oldest", lambda s: self.aim(s, p, ("drop",) + kept[0])))
        else:
            out.append(("goes on", lambda s: self.go_on(s, p)))

    # -- the other ranks -----------------------------------------------------------------------------------------------
    def give_up(self, s, p, out):
        """Before its receipt a rank may fail by itself: nothing can be committed without it."""
        def step(s):
            self.tell(s, p, "F")
            self.go_on(s, p)
            if self.mut == "late-receipt" and s.procs[p][0] == "end":
                s.board = s.board | {("receipt", a, p % self.c.ranks)}
        a = self.attempt(p, s.procs[p][1])
        if p % self.c.ranks and self.c.deadline:
            out.append(("gives up", step))

    def wait(self, s, p, out):
        a = self.attempt(p, s.procs[p][1])
        if any(m[:2] == ("go", a) for m in s.board):
            g = next(m[2] for m in s.board if m[:2] == ("go", a))
            out.append(("is told to write", lambda s: self.to(s, p, "part", g=g)))
        else:
            self.give_up(s, p, out)

    def outcome(self, s, p, out):
        a = self.attempt(p, s.procs[p][1])
        for m in s.board:
            if m[:2] == ("outcome", a):
                out.append((f"is told {m[2]}", lambda s, m=m: (self.tell(s, p, m[2]), self.go_on(s, p))))
        if self.c.deadline and self.mut == "deadline-is-failed":
            out.append(("gives up, says failed", lambda s: (self.tell(s, p, "F"), self.go_on(s, p))))
        elif self.c.deadline:
            out.append(("gives up, reads the root", lambda s: self.aim(s, p, ("veto", a))))

    # -- the programs beside them --------------------------------------------------------------------------------------
    def look(self, s, p, out):
        a = s.root[3][0]
        def prune(s):
            if self.mut == "prune-deletes-first":
                self.destroy(s, a)
            self.aim(s, p, ("drop", 0, a))
        if not a:
            out.append(("finds nothing", lambda s: self.to(s, p, "end")))
        elif p == self.reader:
            out.append((f"opens attempt {a}", lambda s: self.to(s, p, "file", change=("read", 0, a))))
        else:
            out.append((f"prunes attempt {a}", prune))

    def delete(self, s, p, out):
        a = s.procs[p][4][2]
        def step(s):
            self.destroy(s, a)
            self.to(s, p, "next" if p < self.P else "end")
        out.append((f"deletes the objects of attempt {a}", step))

    def file(self, s, p, out):
        k, a = s.procs[p][1], s.procs[p][4][2]
        def step(s):
            if not any(x[:2] == (a, self.c.ranks - k) for x in s.obj):
                if a in s.root[3] or self.mut == "404-is-corrupt":
                    raise Bad(f"corrupt: the reader says so of attempt {a}")
                self.to(s, p, "end")
            else:
                self.to(s, p, "end" if k == self.c.ranks else "file", k=k + 1)
        out.append((f"reads file {k}", step))





def explore(c, limit=3_000_000):
    """(states, ends, None or (what is wrong, trace)); ends counts the outcomes at the ends."""
    model = Jobs(c)
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
    first = key(model.start())
    number, queue, parent, n, ends = {first: 0}, deque([first]), [(-1, "")], -1, {}
    while queue:
        k, n = queue.popleft(), n + 1
        acts = model.actions(load(k))
        for label, step in acts:
            s = load(k)
            try:
                step(s)
                model.check(s)
            except Bad as e:
                return len(number), ends, (str(e), trace(n, label))
            new = key(s)
            if new not in number:
                number[new] = len(parent)
                parent.append((n, label))
                queue.append(new)
                if len(number) > limit:
                    return len(number), ends, ("too many states", [])
        if all("arrives" in label or "dies" in label or "lost" in label for label, _ in acts):
            s = load(k)
            for p in range(model.P):
                pc, told = s.procs[p][0], s.procs[p][6]
                stuck = pc not in ("end", "dead", "begin") and not (c.ranks > 1 and not c.deadline)
                if stuck or pc == "end" and "" in told and s.procs[p][2] is not None and s.root[1] == s.procs[p][2]:
                    return len(number), ends, (f"resolved: {model.name(p)} is at {pc}, told {told}", trace(n, "the end"))
                if c.jobs == 1 and not (c.faults or c.deaths or c.deadline) and set(told) != {"D"}:
                    return len(number), ends, (f"promise: without faults {model.name(p)} was told {told}", trace(n, "the end"))
            o = "".join(sorted({code or "-" for x in s.procs[:model.P] for code in x[6]}))
            ends[o] = ends.get(o, 0) + 1
    return len(number), ends, None


TWO = C(jobs=2, faults=2)
RANKS = C(ranks=2, faults=1, deadline=True)
OVER = C(jobs=2, overwrite=True, faults=1)
PRUNED = C(prune=True, overwrite=True, faults=1)
NODES = C(jobs=3, nodes=(0, 1, 0), deaths=2, faults=1)
KEPT = C(jobs=2, saves=2, steps=2, nodes=(0, 0), retain=True, deaths=1)
CONFIGS = {
    "calm": C(), "calm, twice": C(saves=2, overwrite=True), "calm, 3 ranks": C(ranks=3), "calm, tiers": C(saves=2, steps=2, nodes=(0,), retain=True),
    "faults": C(faults=3, deaths=1), "two jobs": TWO, "two jobs overwrite": OVER._replace(deaths=1),
    "ranks": RANKS, "ranks, 3": C(ranks=3, deadline=True), "ranks die": RANKS._replace(deaths=1, faults=0),
    "ranks overwrite": RANKS._replace(overwrite=True), "ranks, two jobs": RANKS._replace(jobs=2, faults=0),
    "prune": PRUNED._replace(reader=True), "prune, ranks": RANKS._replace(prune=True, overwrite=True),
    "prune, two jobs": PRUNED._replace(jobs=2, faults=0), "reader overwrite": C(overwrite=True, reader=True, faults=1, deaths=1),
    "a node comes back": NODES._replace(faults=0), "one node twice": KEPT,
}
DEEP = {
    "deep three jobs": C(jobs=3, deaths=1), "deep two jobs": TWO._replace(deaths=1),
    "deep overwrite": C(jobs=2, saves=2, overwrite=True, faults=1), "deep ranks": RANKS._replace(ranks=3, faults=2),
    "deep ranks, two jobs": RANKS._replace(jobs=2, faults=0, deaths=1), "deep prune": PRUNED._replace(reader=True, deaths=1, faults=2),
    "deep node, faults": NODES._replace(deaths=1), "deep one node": KEPT._replace(faults=1, deaths=1, jobs=3, nodes=(0, 0, 0)),
}
MUTANTS = {  # name: (configuration, what is wrong with it)
    "create-if-absent": (C(jobs=2, faults=2, fence="create"), "a step is an object of its own, made if it is absent"),
    "look-then-create": (C(jobs=2, faults=2, fence="look"), "the same, after a look whether the session is the newest"),
    "unconditional": (TWO, "the root is put without a condition"),
    "content-returns": (TWO, "the root has the same content twice: a compare-and-swap by content lands again"),
    "refused-is-lost": (TWO, "a refusal is taken for a loss, although it answers a request that was sent twice"),
    "silence-is-failed": (TWO, "a time-out is taken for a failure"),
    "absent-is-failed": (TWO, "a root that is unchanged is taken for a failure"),
    "no-generation": (TWO, "a re-done commit does not ask whether its session still is the newest"),
    "list-first": (TWO, "a session lists before it takes the root over"),
    "sweep-any-generation": (C(jobs=2, faults=0, deaths=0, overwrite=True), "a sweep takes attempts of its own and of newer generations"),
    "sweep-committed": (C(jobs=2), "a sweep takes what the root names"),
    "manifest-missing": (C(), "promotion or commit is told before all objects are there"),
    "settles-first": (OVER, "what is replaced is deleted before the commit"),
    "settles-unknown": (OVER, "what may have been replaced is deleted after an unknown outcome"),
    "abandons-unknown": (TWO, "an attempt is deleted after an unknown outcome"),
    "no-receipts": (RANKS, "rank 0 commits before all receipts are there"),
    "late-receipt": (RANKS, "a rank that has given up still sends its receipt"),
    "deadline-is-failed": (RANKS, "a rank that has sent its receipt calls the save failed at its deadline"),
    "veto-unanswered": (RANKS, "a rank calls the save failed although its veto was not answered"),
    "redo-ignores-vetoes": (RANKS, "a commit that is re-done after a veto does not look for it"),
    "vetoes-dropped": (RANKS._replace(prune=True, overwrite=True), "another change of the root leaves the vetoes out"),
    "prune-deletes-first": (PRUNED, "a prune deletes the objects before the root forgets the step"),
    "prune-by-number": (PRUNED, "a prune that is re-done takes whatever has the number"),
    "forgets-changes": (PRUNED, "the root does not say which changes it has seen: a commit is re-done that landed, and was pruned since"),
    "404-is-corrupt": (PRUNED._replace(reader=True), "a reader takes a missing object for damage without a look at the root"),
    "told-early": (NODES, "what is durable on the node is told as durable in the store"),
    "local-drop-early": (NODES, "the node drops a step that the store may not have"),
    "promotes-any": (NODES._replace(faults=0), "a session promotes whatever lies on its node"),
    "resumes-any": (NODES._replace(faults=0), "a session goes on from whatever lies on its node"),
    "chain-by-number": (NODES._replace(jobs=4, nodes=(0, 0, 1, 0)), "a node notes the number of a generation, not the session"),
    "promotes-pruned": (KEPT, "a step that the store's retention dropped is promoted again"),
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
        print("WRONG" if wrong else "ok   ", f"{n:8} states {time.time() - t:5.1f} s  {name:26}", "ends", dict(sorted(ends.items())), flush=True)
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


if __name__ == "__main__":
    main()
