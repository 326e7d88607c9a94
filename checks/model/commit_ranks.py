"""The ranks of the model in `commit.py`: the next steps of each rank."""
from commit_disk import Bad, Disk, put


class Model(Disk):
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
