"""The names, files and processes of the model in `commit.py`: how the file system behaves, and which
invariants hold."""
import itertools
from collections import namedtuple

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


class Disk:
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
