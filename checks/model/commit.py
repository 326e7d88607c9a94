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
  torn       what has the name of the step is whole: manifest and all files, of the ranks of one session, covering every tensor.
  lost       a step that was there before, and an attempt that some rank was told is durable, is there (or one that replaced it).
  final      an attempt that some rank was told has failed is never published.
  once       without overwriting, at most one attempt is published.
  zombie     once a session has taken the root over, no attempt of an older one is published.
  resolved   at every end every living rank has an outcome for every save; no cycles.
  promise    without faults and deadlines every rank ends durable; what was displaced is never in the way.
The protocol in one line each: rank 0 makes the attempt, says go; all write, sync file and directory, send a receipt with attempt, save and
  plan; rank 0 checks them, writes the manifest, claims the attempt (renames it to a second name), looks whether its session is the newest,
  publishes from that name, syncs the root, tells. A rank that gives up after its receipt renames the attempt away from the first name
  and syncs that before it says "failed"; where it comes too late it says "indeterminate". A new session is recorded first, then it buries
  what older ones have in flight or claimed, syncs the root, and only then looks for steps. Only rank 0 makes a directory.
First ideas that this model refused: see FIRST_IDEAS at the end.
Abstracted: bytes; the plan (right or not); several steps; object stores. Directory operations are seen by all in one order.

The code is in src/commit/several (the rounds), src/storage/local/{shared,attempt,publish}.rs (claim, veto, take-over) and
src/executor/ranks.rs (the numbers of saves).

Run:      checks/model/commit.py [--deep] [--only NAME] [--mutant NAME]
Expected: "ok" for every configuration, "caught" for every mutant, last line "RESULT: pass", exit status 0.
"""
import argparse, itertools, sys, time
from collections import deque, namedtuple

C = namedtuple("C", "R jobs saves medium coord overwrite crash power restart fail skew sweep deadline coarse skip mutant",
               defaults=(2, 1, 1, "any", "board", False, 0, 0, 0, 0, False, False, True, False, False, ""))
FIELDS = "procs f m where base pend board rounds sess taken hist res hello dead budget sw seen".split()
#  procs  (pc, inc, k, g, seq, aux) per process      f  per attempt, per rank: (level, job, plan)   level 2 written 3 fsynced 4 named
#  m  manifest level per attempt    where  name of each directory: 0 none, ("T",a) in flight, ("R",a) claimed by its publisher,
#  "S" the step, "X" trash, "Z" destroyed   base, pend  durable names, and operations since, with their node   hist  publishes in order
#  sess  (job, incs) by generation     taken  generations whose take-over is complete     res  per process and save (code, attempt)
class Bad(Exception):
    pass


class S:
    __slots__ = FIELDS


def put(t, i, v):
    return t[:i] + (v,) + t[i + 1:]


def apply(where, op):
    """One operation on names, as the file system does it."""
    kind, x, y = op
    if kind == "mk":
        return put(where, x, ("T", x)) if (where[x] == 0 or y) and ("T", x) not in where else where
    if x not in where:
        return where
    i = where.index(x)
    if kind == "mv":
        return where if y != "X" and y in where else put(where, i, y)
    if kind == "rp":                                             # a plain rename that replaces
        j = where.index(y) if y in where else None
        where = put(where, j, "Z") if j is not None else where
        return put(where, i, y)
    j = where.index(y) if y in where else None                   # exchange
    return where if j is None else put(put(where, i, y), j, x)


class Model:
    def __init__(self, c):
        self.c, self.mut = c, c.mutant
        self.G = c.jobs + (1 if c.restart else 0)                # generations at most
        self.A = 1 + self.G * c.saves                            # attempt 0 is the step that was there before
        self.P = c.jobs * c.R

    def start(self):
        c, s = self.c, S()
        s.procs = tuple(("J" if p < c.R else "off", 0, 0, -1, -1, ()) for p in range(self.P))
        s.f = ((),) + (((0, 0, 0),) * c.R,) * (self.A - 1)
        s.m = (4,) + (0,) * (self.A - 1)
        s.where = ("S" if c.overwrite else 0,) + (0,) * (self.A - 1)
        s.base, s.pend, s.board, s.rounds, s.sess, s.taken = s.where, (), frozenset(), (), (), frozenset()
        s.hist, s.res = ((0,) if c.overwrite else ()), ((((0, 0),) * c.saves),) * self.P
        s.hello, s.dead, s.seen = ((0,) * c.R,) * c.jobs, frozenset(), frozenset()
        s.budget, s.sw = (c.crash, c.power, c.restart, c.fail), ()
        return s

    def aid(self, g, seq):
        return 1 + g * self.c.saves + seq

    def owner(self, a):
        return (a - 1) // self.c.saves                           # the generation of an attempt

    # -- names -------------------------------------------------------------------------------------------------------
    def do(self, s, node, op):
        new = apply(s.where, op)
        if new == s.where:
            return False
        s.where, s.pend = new, s.pend + ((node, op),)
        return True

    def fsync(self, s, node):
        while True:                                              # and whatever its own operations depend on
            at = [i for i, (n, _) in enumerate(s.pend) if self.c.medium == "any" or n == node]
            if not at:
                return
            before = s.base
            s.base = apply(s.base, s.pend[at[0]][1])
            if s.base == before and at[0] > 0:
                for _, o in s.pend[:at[0] + 1]:
                    s.base = apply(s.base, o)
                s.pend = s.pend[at[0] + 1:]
            else:
                s.pend = s.pend[:at[0]] + s.pend[at[0] + 1:]

    def destroy(self, s, i):
        s.where, s.base = put(s.where, i, "Z"), put(s.base, i, "Z") if s.base[i] != "S" else s.base
        s.f, s.m = put(s.f, i, ()) if i == 0 else s.f, put(s.m, i, 0)

    def dirsync(self, s, a, node, manifest=False):
        """fsync of the attempt's directory: names in it are durable."""
        r = node % self.c.R
        lift = lambda x: (4,) + x[1:] if x[0] == 3 else x
        if self.c.medium == "any":
            s.f = put(s.f, a, tuple(lift(x) for x in s.f[a]))
            s.m = put(s.m, a, 4) if s.m[a] == 3 else s.m
        else:
            s.f = put(s.f, a, put(s.f[a], r, lift(s.f[a][r])))
            s.m = put(s.m, a, 4) if s.m[a] == 3 and manifest else s.m

    # -- what holds ----------------------------------------------------------------------------------------------------
    def whole(self, s, a, level):
        if s.m[a] < level:
            return False
        if a == 0:
            return True
        job = s.sess[self.owner(a)][0]
        return all(x[0] >= level and x[1] == job and x[2] == s.f[a][0][2] and x[2] % 10 == 0 for x in s.f[a])

    def check(self, s):
        c = self.c
        acked = [0] if c.overwrite else []
        failed = set()
        for row in s.res:
            for code, a in row:
                if code == "D":
                    acked.append(a)
                elif code == "F" and a:
                    failed.add(a)
        for a in failed:
            if a in s.hist:
                raise Bad(f"final: attempt {a} was published, and some rank was told that it failed")
        if not c.overwrite and len(s.hist) > 1:
            raise Bad(f"once: attempts {s.hist} were published")
        if "S" in s.where and not self.whole(s, s.where.index("S"), 2):
            raise Bad(f"torn: the step is attempt {s.where.index('S')}, which is not whole")
        images = {s.base}
        for _, op in s.pend:                                     # every subset, in order
            images |= {apply(w, op) for w in images}
        for w in images:
            i = w.index("S") if "S" in w else None
            if i is not None and not self.whole(s, i, 4):
                raise Bad(f"torn after a power failure: the step is attempt {i}")
            for a in acked:
                if i is None or i != a and (i not in s.hist or s.hist.index(i) < s.hist.index(a)):
                    raise Bad(f"lost after a power failure: attempt {a} was durable, the step is {i}")

    # -- actions -------------------------------------------------------------------------------------------------------
    def actions(self, s):
        out = []
        for p in range(self.P):
            pc = s.procs[p][0]
            j, r = divmod(p, self.c.R)
            who = f"{'AB'[j]}{r}"
            if pc == "off":
                if p % self.c.R == 0:
                    out.append((f"job {'AB'[j]} starts", lambda s, j=j: self.boot(s, j)))
                continue
            if pc in ("end", "dead"):
                if pc == "dead" and s.budget[2] and p not in s.dead:
                    out.append((f"{who} restarts", lambda s, p=p: self.restart(s, p)))
                if pc == "end" and s.budget[1] and any(n == p for n, _ in s.pend):
                    for keep in self.subsets(s, p):
                        out.append((f"{who} loses power keep={keep}", lambda s, p=p, keep=keep: self.die(s, p, 1, keep)))
                continue
            acts = self.rank0(s, p, pc) if r == 0 else self.rank(s, p, pc)
            out += [(f"{who} {l}", fn) for l, fn in acts]
            if s.budget[0]:
                out.append((f"{who} crashes", lambda s, p=p: self.die(s, p, 0)))
            if s.budget[1]:
                for keep in self.subsets(s, p):
                    out.append((f"{who} loses power keep={keep}", lambda s, p=p, keep=keep: self.die(s, p, 1, keep)))
        if self.c.sweep:
            out += self.sweeper(s)
        return out

    def subsets(self, s, p):
        mine = [i for i, (n, _) in enumerate(s.pend) if n == p] if self.c.medium == "own" else []
        return [k for n in range(len(mine) + 1) for k in itertools.combinations(mine, n)]

    def boot(self, s, j):
        for r in range(self.c.R):
            s.procs = put(s.procs, j * self.c.R + r, ("J", 0, 0, -1, -1, ()))

    def restart(self, s, p):
        j, r = divmod(p, self.c.R)
        inc = s.procs[p][1] + 1
        s.budget = put(s.budget, 2, s.budget[2] - 1)
        s.hello = put(s.hello, j, put(s.hello[j], r, inc))
        k = self.c.saves - 1                                     # it takes part in the last save
        if self.mut == "old-place":                              # it goes on with what its place in the session was doing
            g, seq = s.procs[p][3:5]
            s.procs = put(s.procs, p, ("G" if g >= 0 else "J", inc, s.procs[p][2], g, seq, ()))
            return
        s.procs = put(s.procs, p, ("J", inc, k, -1, -1, ()))

    def die(self, s, p, how, keep=()):
        s.budget = put(s.budget, how, s.budget[how] - 1)
        s.procs = put(s.procs, p, ("dead",) + s.procs[p][1:])
        if how == 1:                                             # what the node had not synced is gone
            r = p % self.c.R
            j = p // self.c.R
            for a in range(1, self.A):
                if self.owner(a) < len(s.sess) and s.sess[self.owner(a)][0] == j and s.f[a][r][0] < 4:
                    if not (self.c.medium == "any" and s.f[a][r][0] == 3):
                        s.f = put(s.f, a, put(s.f[a], r, (0, 0, 0)))
                if r == 0 and s.m[a] < (3 if self.c.medium == "any" else 4) and self.owner(a) < len(s.sess) and s.sess[self.owner(a)][0] == j:
                    s.m = put(s.m, a, 0)
            if self.c.medium == "own":
                s.pend = tuple(x for i, x in enumerate(s.pend) if x[0] != p or i in keep)
                w = s.base
                for _, op in s.pend:
                    w = apply(w, op)
                s.where = w                                      # a publish that was undone was none
                s.hist = tuple(a for a in s.hist if w[a] not in (0, ("T", a), ("R", a)))

    def go_on(self, s, p, code, a, tell=True):
        """A future resolves, and the rank comes to its next save."""
        pc, inc, k, g, seq, _ = s.procs[p]
        if s.res[p][k][0] == 0:
            s.res = put(s.res, p, put(s.res[p], k, (code, a)))
        broken = ("B",) if code != "D" and self.c.coord == "rounds" and self.mut != "no-tags" else ()
        nxt = "J" if k + 1 < self.c.saves else "end"
        s.procs = put(s.procs, p, (nxt, inc, min(k + 1, self.c.saves - 1), g, seq, broken))

    def to(self, s, p, pc, **kw):
        _, inc, k, g, seq, aux = s.procs[p]
        s.procs = put(s.procs, p, (pc, inc, k, kw.get("g", g), kw.get("seq", seq), kw.get("aux", aux)))

    def say(self, s, *message):
        s.board = s.board | {message}

    def key(self, a):
        """What a message is about: the attempt; a mutant says the step, which is the same for all."""
        return 0 if self.mut in ("key-by-step",) else a

    def newest(self, s, p):
        """The session that a rank takes part in: the newest that lists it, by its nonce."""
        j, r = divmod(p, self.c.R)
        inc = s.procs[p][1]
        for g in range(len(s.sess) - 1, -1, -1):
            job, incs = s.sess[g]
            mine = job == j and incs[r] == inc or self.mut == "no-nonce"
            mixed = self.mut == "no-token" and incs[r] == inc
            if (mine or mixed) and g in s.taken:
                return g
        return None

    # -- rank 1, 2, ... ------------------------------------------------------------------------------------------------
    def rank(self, s, p, pc):
        c, m, out = self.c, self.mut, []
        j, r = divmod(p, c.R)
        _, inc, k, g, seq, aux = s.procs[p]
        a = self.aid(g, seq) if g >= 0 and seq >= 0 else 0
        late = c.deadline
        if pc == "J":
            if aux == ("B",):
                return [("fails: its group is broken", lambda s: self.go_on(s, p, "F", 0))]
            if c.coord == "rounds":
                return [("next save", lambda s: self.to(s, p, "G", seq=seq + 1))] if g >= 0 else self.gather(s, p, "J")
            if ("hello", j, r, inc) not in s.board:
                return [("says hello", lambda s: self.say(s, "hello", j, r, inc))]
            n = self.newest(s, p)
            if n is not None and (n != g or seq + 1 < c.saves):
                q = seq + 1 if n == g else 0
                out.append((f"is in session {n}", lambda s: self.to(s, p, "G", g=n, seq=q)))
            if c.skip and k == 0:                                # an overlap policy that each rank applies by itself
                out.append(("skips", lambda s: self.go_on(s, p, "S", 0)))
            if late:
                out.append(("deadline before a session", lambda s: self.go_on(s, p, "F", 0)))
        elif pc == "G":
            if c.coord == "rounds":
                return self.gather(s, p, "G")
            if ("go", a) in s.board or m == "all-mkdir" and len(s.sess) > g:
                out.append(("begins to write", lambda s: self.begin(s, p, a)))
            if late:
                out.append(("deadline before go", lambda s: self.no(s, p, a)))
        elif pc in ("W1", "W2", "W3", "W4"):
            out += self.writing(s, p, pc, a)
            if late and c.coord == "board":
                give_up = (lambda s: self.resolve(s, p, k, "F", a)) if m == "late-receipt" else lambda s: self.no(s, p, a)
                out.append(("deadline while it writes", give_up))
        elif pc == "O":
            if c.coord == "rounds":
                return self.gather(s, p, "O")
            if ("out", self.key(a), "ok") in s.board:
                out.append(("is told: durable", lambda s: self.go_on(s, p, "D", a)))
            if ("out", self.key(a), "no") in s.board:
                out.append(("is told: failed", lambda s: self.go_on(s, p, "F", a)))
            if m == "visible-is-durable" and s.where[a] == "S":
                def confirm(s):
                    self.fsync(s, p)
                    self.go_on(s, p, "D", a)
                out.append(("sees the step, fsyncs the root: durable", confirm))
            if late:
                out.append(("deadline", lambda s: self.to(s, p, "V") if m != "deadline-is-failed" else self.go_on(s, p, "F", a)))
        elif pc == "V":
            out.append(("vetoes", lambda s: self.veto(s, p, a)))
        elif pc == "VS":
            def sure(s):
                self.fsync(s, p)
                self.go_on(s, p, "F", a)
            out.append(("fsyncs its veto", sure))
        return out

    def begin(self, s, p, a):
        if self.mut == "all-mkdir" and s.where[a] in (0, "X", "Z"):
            self.do(s, p, ("mk", a, 1))                          # a fresh, empty directory of that name
            s.f, s.m = put(s.f, a, ((0, 0, 0),) * self.c.R), put(s.m, a, 0)
        self.to(s, p, "W1")

    def no(self, s, p, a):
        self.say(s, "rec", a, p % self.c.R, "no", 0)
        self.go_on(s, p, "F", a)

    def writing(self, s, p, pc, a):
        c, m, out = self.c, self.mut, []
        j, r = divmod(p, c.R)
        plan = 10 * s.procs[p][2] + (1 if c.skew and r == c.R - 1 and s.procs[p][2] == 0 else 0)
        nxt = "R" if r == 0 else "O"

        def write(s):
            if s.where[a] in (0, "Z"):                           # the directory is gone: an error
                return self.to(s, p, "AB") if r == 0 else self.no(s, p, a)
            s.f = put(s.f, a, put(s.f[a], r, (2, j, plan)))
            self.to(s, p, "W2")

        def sync(s):
            x = s.f[a][r]
            s.f = put(s.f, a, put(s.f[a], r, (max(3, x[0]),) + x[1:]))
            self.to(s, p, "W3")

        def name(s):
            if not (m == "no-dirsync" or m == "coordinator-dirsync" and r):
                self.dirsync(s, a, p)
            self.to(s, p, "W4")

        def broke(s):
            s.budget = put(s.budget, 3, s.budget[3] - 1)
            if m == "fsync-again":                               # the page is clean now: the second call says ok
                return self.to(s, p, "W3")
            return self.to(s, p, "AB") if r == 0 else self.fails(s, p, a)

        def receipt(s):
            if r:
                if c.coord == "board":
                    self.say(s, "rec", 0 if m == "stale-receipt" else a, r, "ok", plan)
            self.to(s, p, nxt, aux=("ok", plan) if c.coord == "rounds" else ())

        if c.coarse:
            def all_at_once(s):
                if s.where[a] in (0, "Z"):
                    return self.to(s, p, "AB") if r == 0 else self.no(s, p, a)
                s.f = put(s.f, a, put(s.f[a], r, (4, j, plan)))
                receipt(s)
            return [("writes, syncs, receipt", all_at_once)]
        if pc == "W1":
            out.append(("writes", write))
        elif pc == "W2":
            out.append(("fsyncs", sync if m != "no-fsync" else lambda s: self.to(s, p, "W3")))
            if s.budget[3]:
                out.append(("fsync fails", broke))
        elif pc == "W3":
            out.append(("fsyncs the directory", name))
        else:
            out.append(("receipt", receipt))
        return out

    def fails(self, s, p, a):
        if self.c.coord == "rounds":
            return self.to(s, p, "O", aux=("no", 0))
        self.no(s, p, a)

    def veto(self, s, p, a):
        if self.c.coord == "rounds" and ("mark", a) in s.board:  # the outcome is on the storage, too
            return self.go_on(s, p, "D", a)
        if self.do(s, p, ("mv", ("T", a), "X")):
            return self.to(s, p, "VS") if self.mut != "veto-not-durable" else self.go_on(s, p, "F", a)
        self.go_on(s, p, "F" if self.mut == "others-veto" and s.where[a] in ("X", "Z") else "I", a)

    # -- rank 0 --------------------------------------------------------------------------------------------------------
    def rank0(self, s, p, pc):
        c, m, out = self.c, self.mut, []
        j, _ = divmod(p, c.R)
        _, inc, k, g, seq, aux = s.procs[p]
        a = self.aid(g, seq) if g >= 0 and seq >= 0 else 0
        late = c.deadline
        if pc == "J":
            if aux == ("B",):
                return [("fails: its group is broken", lambda s: self.go_on(s, p, "F", 0))]
            if g >= 0 and (c.coord == "rounds" or s.sess[g][1] == self.members(s, j, inc)):  # the session goes on
                if len(s.sess) - 1 > g and m not in ("no-takeover",):
                    return [("is fenced out", lambda s: self.go_on(s, p, "F", 0))]
                if seq + 1 < c.saves:
                    return [("begins the next save", lambda s: self.to(s, p, "B", seq=seq + 1))]
            if c.coord == "rounds":
                return self.gather(s, p, "J")
            them = self.members(s, j, inc)
            if None not in them and len(s.sess) < self.G:
                out.append(("claims the next generation", lambda s: self.claim(s, p, them)))
            if late:
                out.append(("deadline before all have come", lambda s: self.go_on(s, p, "F", 0)))
        elif pc == "TK":
            if m in ("no-takeover", "check-only"):
                return [("takes over", lambda s: self.took(s, p, g))]
            old = tuple(x for x in s.where if isinstance(x, tuple) and self.owner(x[1]) < g and x[0] in ("T" if m == "buries-open" else "TR"))
            if m == "stale-list":
                old = ()
            if aux == ():
                out.append((f"lists {old}", lambda s: self.to(s, p, "TK", aux=("L",) + old)))
            elif len(aux) > 1:
                def bury(s, x=aux[1]):
                    self.do(s, p, ("mv", x, "X"))
                    rest = aux[:1] + aux[2:]
                    self.to(s, p, "TK", aux=rest)
                out.append((f"buries {aux[1]}", bury))
            else:
                def done(s):
                    self.fsync(s, p)
                    self.took(s, p, g)
                out.append(("fsyncs the root: has taken over", done))
        elif pc == "B":
            def make(s):
                self.do(s, p, ("mk", a, 0))
                if c.coord == "board":
                    self.say(s, "go", a)
                self.to(s, p, "W1" if c.coord == "board" else "G", aux=())
            out.append(("makes the attempt: go", make))
        elif pc == "G":
            return self.gather(s, p, "G")
        elif pc in ("W1", "W2", "W3", "W4"):
            out += self.writing(s, p, pc, a)
        elif pc == "R":
            if c.coord == "rounds":
                return self.gather(s, p, "R")
            key = 0 if m == "stale-receipt" else a
            recs = {(x[2], x[4]) for x in s.board if x[0] == "rec" and x[1] == key and x[3] == "ok"}
            right = lambda plan: m == "no-coverage" or plan == 10 * k or m == "no-step-check" and plan % 10 == 0
            have = {r for r, plan in recs if right(plan)}
            if len(have) == c.R - 1 and not (c.skew and c.R == 1) or m == "no-receipts":
                out.append(("has all receipts, which cover", lambda s: self.to(s, p, "M")))
            bad = any(x[0] == "rec" and x[1] == a and (x[3] == "no" or not right(x[4])) for x in s.board)
            if bad:
                out.append(("sees a rank fail", lambda s: self.to(s, p, "AB")))
            if late and m != "no-deadline":
                out.append(("deadline: ranks are missing", lambda s: self.to(s, p, "AB")))
        elif pc == "M":
            def manifest(s):
                s.m = put(s.m, a, 4 if c.coarse else 2)
                self.to(s, p, "RD" if c.coarse else "MS")
            out.append(("writes the manifest", manifest))
        elif pc == "MS":
            def msync(s):
                s.m = put(s.m, a, s.m[a] if m == "manifest-unsynced" else 3)
                self.to(s, p, "MD")
            out.append(("fsyncs the manifest", msync))
        elif pc == "MD":
            def mdir(s):
                if m != "no-dirsync":
                    self.dirsync(s, a, p, manifest=True)
                self.to(s, p, "RD")
            out.append(("fsyncs the directory", mdir))
            if late:
                out.append(("deadline before the publish", lambda s: self.to(s, p, "AB")))
        elif pc == "RD":
            if m == "no-claim":
                return [("goes on", lambda s: self.to(s, p, "P"))]
            if m == "check-first" and aux != ("C",):
                newest = len(s.sess) - 1 == g
                return [("checks its generation", lambda s: self.to(s, p, "RD", aux=("C",)) if newest else self.to(s, p, "AB"))]
            def ready(s):
                ok = self.do(s, p, ("mv", ("T", a), ("R", a)))
                self.to(s, p, "RC" if ok else "AB", aux=())
            out.append(("claims the attempt", ready))
        elif pc == "RC":
            newest = len(s.sess) - 1 == g or m in ("check-first", "no-check", "no-takeover", "check-only")
            out.append(("is the newest" if newest else "is fenced out", lambda s: self.to(s, p, "P" if newest else "AB")))
        elif pc == "P":
            if m == "check-only" and len(s.sess) - 1 > g and aux != ("C",):
                return [("is fenced out", lambda s: self.to(s, p, "AB"))]
            if m == "check-only" and aux != ("C",):
                return [("checks its generation", lambda s: self.to(s, p, "P", aux=("C",)))]
            out.append(("publishes", lambda s: self.publish(s, p, a, g)))
            if late and s.res[p][k][0] == 0:
                code = "F" if m == "late-is-failed" else "I"
                out.append(("deadline in the publish", lambda s: self.resolve(s, p, k, code, a)))
        elif pc == "PS":
            def psync(s):
                if m != "no-rootsync":
                    self.fsync(s, p)
                self.resolve(s, p, k, "D", a)
                self.to(s, p, "PA")
            out.append(("fsyncs the root: durable", psync))
            if m == "told-first":
                def tell(s):
                    self.say(s, "out", self.key(a), "ok")
                    self.to(s, p, "PS", aux=("T",))
                out = [("tells the outcome", tell)] if aux != ("T",) else out
            if late and s.res[p][k][0] == 0:
                out.append(("deadline in the publish", lambda s: self.resolve(s, p, k, "I", a)))
        elif pc == "PA":
            def tell(s):
                self.say(s, *(("out", self.key(a), "ok") if c.coord == "board" else ("mark", a)))
                self.to(s, p, "ST" if c.coord == "board" else "O", aux=("ok", 0))
            out.append(("tells the outcome", tell))
        elif pc == "O":
            return self.gather(s, p, "O")
        elif pc == "ST":
            def settle(s):
                for i, x in enumerate(s.where):
                    if x in (("R", a), ("T", a)) and i != a:
                        self.destroy(s, i)
                self.go_on(s, p, "D", a)
            out.append(("settles", settle))
        elif pc == "AB":
            def abort(s):
                if c.coord == "board":
                    self.say(s, "out", self.key(a), "no")
                for name in (("T", a), ("R", a)):
                    if name in s.where and s.where.index(name) == a:
                        self.do(s, p, ("mv", name, "X"))
                self.go_on(s, p, "F", a)
            out.append(("abandons", abort))
        return out

    def members(self, s, j, inc0):
        """The nonces of the job's ranks, by their hellos; None: has not come."""
        out = [inc0]
        for r in range(1, self.c.R):
            jobs = range(self.c.jobs) if self.mut == "no-token" else [j]
            inc = [s.hello[x][r] for x in jobs if ("hello", x, r, s.hello[x][r]) in s.board]
            out.append(inc[-1] if inc else None)
        return tuple(out)

    def claim(self, s, p, them):
        g = len(s.sess)
        s.sess = s.sess + ((p // self.c.R, them),)
        self.to(s, p, "TK", g=g, seq=-1, aux=())

    def took(self, s, p, g):
        s.taken = s.taken | {g}
        self.to(s, p, "B", seq=0, aux=())

    def resolve(self, s, p, k, code, a):
        if s.res[p][k][0] == 0:
            s.res = put(s.res, p, put(s.res[p], k, (code, a)))

    def publish(self, s, p, a, g):
        c, m, src = self.c, self.mut, ("T" if self.mut == "no-claim" else "R", a)
        there = "S" in s.where
        how = "rp" if m == "replaces" else "xc" if c.overwrite and there else "mv"
        if not self.do(s, p, (how, src, "S")):
            return self.to(s, p, "AB")                           # gone: vetoed, buried; or another attempt won
        s.hist += (a,)
        if any(x > g for x in s.taken):
            raise Bad(f"zombie: attempt {a} was published after session {max(s.taken)} had taken over")
        if m == "settles-first":
            for i, x in enumerate(s.where):
                if x == src and i != a:
                    self.destroy(s, i)
        self.to(s, p, "PS", aux=())

    # -- all-gathers ---------------------------------------------------------------------------------------------------
    def gather(self, s, p, what):
        """A collective call: deposit, wait for all, or give up at the deadline. rounds: per job (calls per rank, deposits)."""
        c, m, out = self.c, self.mut, []
        j, r = divmod(p, c.R)
        _, inc, k, g, seq, aux = s.procs[p]
        calls = [x for x in s.board if x[0] == "call" and x[1] == j and x[2] == r]
        a = self.aid(g, seq) if g >= 0 and seq >= 0 else 0
        mine = [x for x in calls if x[4] == "open"]
        n = len(calls)
        if not mine:
            # seq and phase in every message: an answer to another question is seen to be one
            phase = {"J": 0, "G": 1, "R": 2, "O": 2 if r else 3}[what]
            if r and what == "O" and aux == ("W",):
                phase = 3
            body = aux if phase == 2 and r else ("ok", 0)
            if phase == 3 and r == 0:
                body = aux
            def deposit(s):
                s.board = s.board | {("call", j, r, n, "open", (k, phase), body)}
            out.append((f"calls all_gather {n} save {k} phase {phase}", deposit))
            return out
        (_, _, _, i, _, tag, body) = mine[0]
        got = {x[2]: x for x in s.board if x[0] == "call" and x[1] == j and x[3] == i}
        close = lambda s: setattr(s, "board", (s.board - {mine[0]}) | {mine[0][:4] + ("done",) + mine[0][5:]})
        if len(got) == c.R:
            same = all(x[5] == tag for x in got.values()) or m == "no-tags"
            good = all(x[6][0] == "ok" and (x[6][1] % 10 == 0 or m == "no-coverage") for x in got.values())
            def complete(s):
                close(s)
                self.gathered(s, p, tag[1], same, good, a)
            out.append((f"has gathered {i}", complete))
        if c.deadline:
            def give_up(s):
                close(s)
                self.gave_up(s, p, tag[1], a)
            out.append((f"deadline in all_gather {i}", give_up))
        return out

    def gathered(self, s, p, phase, same, good, a):
        r, (_, _, k, g, seq, _) = p % self.c.R, s.procs[p]
        if phase == 0:                                           # the session: rank 0 claims, and says so in the next round
            if r == 0 and same:
                return self.claim(s, p, (0,) * self.c.R)
            return self.to(s, p, "G", g=p // self.c.R, seq=0, aux=()) if same else self.go_on(s, p, "F", 0)
        if phase == 1:
            ok = same and good
            if r == 0:
                return self.to(s, p, "W1" if ok else "AB", aux=())
            gg = [g for g, x in enumerate(s.sess) if x[0] == p // self.c.R][-1:] if ok else []
            return self.to(s, p, "W1", g=gg[0], aux=()) if gg else self.go_on(s, p, "F", 0)
        if phase == 2:
            if r == 0:
                return self.to(s, p, "M" if same and good else "AB")
            if same and not good:                                # rank 0 sees the same, or nothing: it will not publish
                return self.go_on(s, p, "F", a)
            return self.to(s, p, "O", aux=("W",)) if same else self.to(s, p, "V")
        if r == 0:
            return self.to(s, p, "ST")
        return self.go_on(s, p, "D", a) if same and good else self.to(s, p, "V")

    def gave_up(self, s, p, phase, a):
        r = p % self.c.R
        if r == 0:
            return self.to(s, p, "AB") if phase in (1, 2) else self.to(s, p, "ST") if phase == 3 else self.go_on(s, p, "F", 0)
        return self.go_on(s, p, "F", a if phase > 1 else 0) if phase < 2 or self.mut == "deadline-is-failed" else self.to(s, p, "V")

    # -- the sweeper of another process ----------------------------------------------------------------------------------
    def sweeper(self, s):
        m, out = self.mut, []
        if s.sw == ():
            for x in s.where:
                if isinstance(x, tuple):
                    g = self.owner(x[1])
                    if g >= len(s.sess):
                        continue
                    job, incs = s.sess[g]
                    p = job * self.c.R
                    gone = s.procs[p][0] == "dead" or s.procs[p][1] != incs[0]
                    if gone or m == "sweep-others":
                        out.append((f"sweeper: {x} has a dead owner", lambda s, x=x: setattr(s, "sw", (1, x))))
            if "X" in s.where:
                out.append(("sweeper: trash", lambda s: setattr(s, "sw", (3, 0))))
        elif s.sw[0] == 1:
            def bury(s):
                if m != "sweep-no-fsync":
                    self.fsync(s, 99)
                self.do(s, 99, ("mv", s.sw[1], "X"))
                s.sw = ()
            out.append(("sweeper: fsyncs the root, buries", bury))
        else:
            def delete(s):                                       # a rename of its own first: its fsync then covers all before it
                if m != "trash-as-found":
                    self.do(s, 99, ("mv", "X", "Y"))
                if m != "sweep-no-fsync":
                    self.fsync(s, 99)
                for i, x in enumerate(s.where):
                    if x in ("X", "Y"):
                        self.destroy(s, i)
                        break
                s.sw = ()
            out.append(("sweeper: renames trash, fsyncs the root, deletes", delete))
        return out


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
