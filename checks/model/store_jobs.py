"""The root object, the objects and the processes of the model in `store.py`: how a store behaves, and which
invariants hold."""
from collections import namedtuple

C = namedtuple("C", "jobs ranks saves steps overwrite nodes prune retain reader deaths faults deadline fence mutant",
               defaults=(1, 1, 1, 1, False, (), False, False, False, 0, 0, False, "cas", ""))
FIELDS = "root obj fly procs hist dropped board local chain budget".split()
#  root   (version, generation, session, attempt per step, vetoes, newest changes): a version is content that never comes back
#  obj    (attempt, part, generation): part r is the file of rank r, part R the manifest, which is put last
#  fly    compare-and-swaps without an answer: (process, version, content, change); they land now, later or never
#  procs  (pc, save, generation, version, change, found, told per save, saw, replaced); hist: publishes of each step, in order
#  local  per node: its steps (step, attempt, session), None when the node is lost      chain  per node: sessions of its lineage
OLD = -1                                                         # an attempt that was there before
REMEMBERED = 2                                                   # so many of the newest changes stand in the root; 16 in the code
NONE = frozenset()


class Bad(Exception):
    pass


class S:
    __slots__ = FIELDS


def put(t, i, v):
    return t[:i] + (v,) + t[i + 1:]


class Model:
    def __init__(self, c):
        self.c, self.mut = c, c.mutant
        self.P = c.jobs * c.ranks
        self.pruner = self.P if c.prune else None
        self.reader = self.P + c.prune if c.reader else None

    def start(self):
        c, s = self.c, S()
        old = c.overwrite or c.prune or c.reader
        s.root = (0, 0, None, (OLD if old else 0,) + (0,) * (c.steps - 1), NONE, ())
        s.obj = frozenset((OLD, part, 0) for part in range(c.ranks + 1)) if old else NONE
        s.fly, s.board, s.dropped, s.budget = NONE, NONE, NONE, (c.deaths, c.faults)
        s.hist = ((OLD,) if old else (),) + ((),) * (c.steps - 1)
        pcs = [("begin" if p % c.ranks == 0 else "wait") for p in range(self.P)] + ["look"] * (c.prune + c.reader)
        s.procs = tuple((pc, 0, None, 0, None, None, ("",) * c.saves, None, 0) for pc in pcs)
        s.local, s.chain = (NONE,) * len(set(c.nodes)), ((),) * len(set(c.nodes))
        return s

    # -- names ---------------------------------------------------------------------------------------------------------
    def attempt(self, p, k):
        return 1 + p // self.c.ranks * self.c.saves + k

    def step_of(self, a):
        return 0 if a == OLD or self.c.steps == 1 else (a - 1) % self.c.saves

    def writer(self, a):
        return (a - 1) // self.c.saves * self.c.ranks            # rank 0 of the job whose attempt it is

    def generation(self, s, a):
        return 0 if a == OLD else s.procs[self.writer(a)][2]

    def name(self, p):
        return {self.pruner: "pruner", self.reader: "reader"}.get(p) or f"{'ABCD'[p // self.c.ranks]}{p % self.c.ranks}"

    def to(self, s, p, pc, **kw):
        names = "pc k g v change found told saw replaced".split()
        old = dict(zip(names, s.procs[p])) | kw
        s.procs = put(s.procs, p, (pc,) + tuple(old[n] for n in names[1:]))

    def tell(self, s, p, code):
        k, told = s.procs[p][1], s.procs[p][6]
        s.procs = put(s.procs, p, put(s.procs[p], 6, put(told, k, code)))

    # -- the root object -----------------------------------------------------------------------------------------------
    def lands(self, s, request):
        """The compare-and-swap, as the store does it. True if the root changed."""
        p, version, content, change = request
        if self.mut == "content-returns":
            if s.root[1:5] != content:
                return False
        elif self.c.fence != "cas" and change[0] == "step":      # an object of its own for each step, made if it is absent
            if s.root[3][change[1]]:
                return False
        elif s.root[0] != version and self.mut != "unconditional":
            return False
        v, g, session, steps, vetoes, recent = s.root
        what, *rest = change
        if what == "take":
            g, session, vetoes = g + 1, p, NONE
        elif what == "step":
            n, a = rest
            steps, s.hist = put(steps, n, a), put(s.hist, n, s.hist[n] + (a,))
        elif what == "veto":
            vetoes = vetoes | {rest[0]}
        elif what == "drop":
            n, a = rest
            s.dropped, steps = s.dropped | {a}, put(steps, n, 0)
            if self.mut == "vetoes-dropped":
                vetoes = NONE
        s.root = (v + 1, g, session, steps, vetoes, (recent + ((p, *change),))[-REMEMBERED:])
        return True

    def may(self, s, p, change):
        """What the root that a process has just read says to its change: None to try, else its outcome."""
        _, g, session, steps, vetoes, recent = s.root
        what, *rest = change
        if (p, *change) in recent and what != "veto" and self.mut != "forgets-changes":
            return "D"                                           # it landed, whatever has become of it since
        mine = s.procs[p][2] == g or self.mut == "no-generation" or self.c.fence != "cas"
        if what == "step":
            n, a = rest
            if steps[n] == a:
                return "D"
            if not mine or a in vetoes and self.mut != "redo-ignores-vetoes":
                return "F"
            return "F" if steps[n] and not self.c.overwrite else None
        if what == "veto":
            a = rest[0]
            return "D" if a in steps else "F" if a in vetoes or not mine else None
        if what == "drop":
            n, a = rest
            there = steps[n] == a or self.mut == "prune-by-number" and steps[n]
            return None if there else "D"
        return "D" if session == p else None                     # take-over

    def cas(self, s, p, out):
        """A process that has a version of the root in hand sends its change."""
        version, change = s.procs[p][3:5]
        request = (p, version, s.root[1:5] if self.mut == "content-returns" else None, change)
        def answered(s):
            if self.lands(s, request):
                self.to(s, p, "cas", v=s.root[0])
                self.after(s, p, "F" if change[0] == "veto" else "D")
            elif self.mut == "refused-is-lost" and change[0] == "step":
                self.after(s, p, "F")
            else:
                self.to(s, p, "read")
        def lost(s):
            self.spend(s, 1)
            self.lands(s, request)
            self.to(s, p, "read")
        def late(s):
            self.spend(s, 1)
            s.fly = s.fly | {request}
            self.to(s, p, "read")
            if self.mut == "silence-is-failed" and change[0] == "step" or self.mut == "veto-unanswered" and change[0] == "veto":
                self.after(s, p, "F")
        def nothing(s):
            self.spend(s, 1)
            self.to(s, p, "read")
        out.append((f"sends {change[0]}", answered))
        if s.budget[1]:
            out.append((f"sends {change[0]}, answer lost", lost))
            out.append((f"sends {change[0]}, no answer yet", late))
            out.append((f"sends {change[0]}: 409, nothing done", nothing))

    def aim(self, s, p, change):
        """A process reads the root, and will change what it has read."""
        said = self.may(s, p, change)
        old = s.root[3][change[1]] if change[0] == "step" else 0
        self.to(s, p, "cas", v=s.root[0], change=change, found=s.root[2] if change[0] == "take" else s.procs[p][5], replaced=old)
        if change[0] == "take":
            self.note(s, p)
        if said:
            self.after(s, p, said)
        elif self.mut == "settles-first" and change[0] == "step":
            self.destroy(s, old)

    def destroy(self, s, a):
        s.obj = frozenset(x for x in s.obj if x[0] != a)

    def spend(self, s, i):
        s.budget = put(s.budget, i, s.budget[i] - 1)

    def read(self, s, p, out):
        """An answer that is no outcome: the root is read, and decides."""
        version, change = s.procs[p][3:5]
        said, changed = self.may(s, p, change), self.c.fence == "cas" and s.root[0] != version
        if said == "D" or said and (changed or self.c.fence != "cas"):
            out.append((f"reads the root: {said}", lambda s: self.after(s, p, said)))
        elif self.mut == "absent-is-failed" and change[0] == "step":
            out.append(("reads the root: not there, so failed", lambda s: self.after(s, p, "F")))
        elif changed:
            # Many changes since: the root does not tell any more whether this one has landed and gone.
            known = s.root[0] - version <= REMEMBERED or change[0] != "step" or self.mut == "forgets-changes"
            if not said and known:
                out.append(("reads a changed root, sends anew", lambda s: self.aim(s, p, change)))
            if change[0] == "step":
                out.append(("reads a changed root: failed", lambda s: self.after(s, p, "F")))
        else:
            out.append(("reads the same root, sends again", lambda s: self.to(s, p, "cas")))
        if s.budget[1] < self.c.faults:                          # only after faults does a deadline pass here
            out.append(("cannot read: unknown", lambda s: self.after(s, p, "U")))
            if change[0] == "step" and self.c.fence == "cas" and not changed:
                out.append(("bumps the root", lambda s: self.bump(s)))

    def bump(self, s):
        s.root = (s.root[0] + 1, *s.root[1:5], (s.root[5] + (("bump",),))[-REMEMBERED:])

    def after(self, s, p, code):
        """A change of the root has an outcome: D it is there, F it is not and never will be, U unknown."""
        what = s.procs[p][4][0]
        k, a = s.procs[p][1], self.attempt(p, s.procs[p][1])
        if what == "take":
            newest = code == "D" and s.root[2] == p              # else a newer session has taken over since
            self.to(s, p, "list" if newest else "end", g=s.root[1] if newest else None)
        elif what == "drop":
            self.to(s, p, "delete" if code == "D" else "end")
            if code != "D" and p < self.P:
                self.go_on(s, p)                                 # the next save prunes again
        elif what == "veto":
            self.tell(s, p, code)
            self.go_on(s, p)
        else:
            own = s.procs[p][4][2] == a                          # not one of a session before, which is promoted
            if own:
                self.tell(s, p, code)
            if self.c.ranks > 1 and code != "U":
                s.board = s.board | {("outcome", a, code)}
            if code == "U" and self.mut == "abandons-unknown":
                code = "F"
            if code == "U" and self.mut == "settles-unknown":
                code = "D"
            self.to(s, p, {"D": "settle", "F": "abandon", "U": "next"}[code])

    def go_on(self, s, p):
        k = s.procs[p][1] + 1
        self.to(s, p, "end" if k == self.c.saves else "wait" if p % self.c.ranks else "go", k=min(k, self.c.saves - 1))

    # -- tiers -----------------------------------------------------------------------------------------------------------
    def node(self, p):
        return self.c.nodes[p // self.c.ranks] if self.c.nodes else None

    def label(self, s, p):
        """What names a session in the notes of a node: itself. A mutant takes its number."""
        return s.procs[p][2] if self.mut == "chain-by-number" else p

    def note(self, s, p):
        """Before its take-over is sent, a session notes locally which one it follows."""
        if not self.c.nodes:
            return
        node, found = self.node(p), s.root[1] if self.mut == "chain-by-number" else s.root[2]
        me = s.root[1] + 1 if self.mut == "chain-by-number" else p
        known = s.chain[node]
        s.chain = put(s.chain, node, known[:known.index(found) + 1] + (me,) if found in known else (me,))

    def lineage(self, s, p):
        """The local steps that a session may take for its own: of the chain that ends in the session that it found."""
        chain, steps = s.chain[self.node(p)], s.local[self.node(p)] or NONE
        return frozenset(x for x in steps if x[2] in chain or self.mut in ("promotes-any", "resumes-any"))

    def promotable(self, s, p):
        """Local steps to promote, newest first: numbers above the oldest that the store keeps."""
        steps = s.root[3]
        kept = [n for n, a in enumerate(steps) if a]
        lowest = min(kept) if kept and self.mut != "promotes-pruned" else -1
        mine = (x for x in self.lineage(s, p) if self.mut != "resumes-any" or x[2] in s.chain[self.node(p)])
        return sorted((x for x in mine if not steps[x[0]] and x[0] > lowest), reverse=True)

    # -- what holds ------------------------------------------------------------------------------------------------------
    def check(self, s):
        c, steps = self.c, s.root[3]
        for n, a in enumerate(steps):
            if a and {x[1] for x in s.obj if x[0] == a} != set(range(c.ranks + 1)):
                raise Bad(f"torn: the step is attempt {a}, whose objects are {sorted(x[1] for x in s.obj if x[0] == a)}")
            if not c.overwrite and len([b for b in s.hist[n] if b not in s.dropped]) > 1:
                raise Bad(f"once: attempts {s.hist[n]} were published")
            if a in s.dropped:
                raise Bad(f"comes back: attempt {a} was pruned, and is the step again")
            for p in range(0, self.P, c.ranks):
                g, saw = s.procs[p][2], s.procs[p][7]
                if g and saw is not None and any(self.forked(s, b, p) for b in saw):
                    raise Bad(f"fork: generation {g} goes on from a step that a session in between did not see")
                if a and g and saw is not None and a not in saw and self.generation(s, a) < g:
                    raise Bad(f"zombie: attempt {a} of generation {self.generation(s, a)} is the step, and generation {g} did not see it")
        for p in range(self.P):
            for k, code in enumerate(s.procs[p][6]):
                a, n = self.attempt(p, k), self.step_of(self.attempt(p, k))
                if code == "F" and steps[n] == a and not c.nodes:   # a later session may bring it from the node's disk
                    raise Bad(f"final: {self.name(p)} was told that attempt {a} has failed, and it is the step")
                if code == "D" and a not in s.dropped:
                    after = a in s.hist[n] and steps[n] in s.hist[n] and s.hist[n].index(steps[n]) >= s.hist[n].index(a)
                    if not after and not (a in s.hist[n] and any(x in s.dropped for x in s.hist[n][s.hist[n].index(a):])):
                        raise Bad(f"lost: {self.name(p)} was told that attempt {a} is durable, the step is {steps[n]}")
                if code == "L" and s.local[self.node(p)] is not None and a not in s.hist[n]:
                    if not any(x[1] == a for x in s.local[self.node(p)]):
                        raise Bad(f"lost: attempt {a} was durable on its node, and is in no tier")

    def forked(self, s, a, p):
        """A session between an attempt's and this one has gone on without it."""
        others = (s.procs[q] for q in range(0, self.P, self.c.ranks) if s.procs[q][7] is not None and s.procs[q][2])
        return any(self.generation(s, a) < x[2] < s.procs[p][2] and a not in x[7] for x in others)

    # -- actions ---------------------------------------------------------------------------------------------------------
    def actions(self, s):
        out = [(f"the late {r[3][0]} of {self.name(r[0])} arrives", lambda s, r=r: self.arrive(s, r)) for r in s.fly]
        for p, state in enumerate(s.procs):
            if state[0] in ("end", "dead"):
                continue
            acts = []
            getattr(self, state[0])(s, p, acts)
            out += [(f"{self.name(p)} {label}", step) for label, step in acts]
            if s.budget[0] and p < self.P and state[0] not in ("begin", "wait"):
                out.append((f"{self.name(p)} dies", lambda s, p=p: self.die(s, p)))
        for node in range(len(s.local)):
            if s.budget[0] and s.local[node]:
                out.append((f"node {node} is lost", lambda s, node=node: self.lose(s, node)))
        return out

    def arrive(self, s, request):
        s.fly = s.fly - {request}
        self.lands(s, request)

    def die(self, s, p):
        self.spend(s, 0)
        self.to(s, p, "dead")

    def lose(self, s, node):
        self.spend(s, 0)
        s.local = put(s.local, node, None)
        for p in range(self.P):
            if self.node(p) == node:
                self.to(s, p, "dead")
