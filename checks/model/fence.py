#!/usr/bin/env python3
"""Explicit-state model checker for the fence of `ashore` (late copy-on-write, decided by the GPU).

Modelled: every interleaving of five actors, breadth first, so that a counterexample is a shortest one.
  trainer  save k; fence_on(k) with its capacity rule, host wait and deadline; optimizer; drop of the sources. It runs ahead:
           fence_on may return before the GPU has done anything. For borrowed sources the fence is room, freeze, close, free.
           With `latest` the next save supersedes a waiting one that has already been fenced.
  stager   leases a slab; decides live or scratch; enqueues the copy (a separate step: other actors act in between); polls events
           in order; reads the published F after the event; hands over, or discards and copies again from scratch.
  writers  read a slab that was handed over and return it, at any later time.
  training stream  producer event; waits; fence kernel (latch F from the watermark, late copies one chunk at a time, publish F
           to pinned memory); optimizer, one chunk at a time; free.
  copy stream  first-in first-out; waits for the producer event; a copy to the host is two reads, so tearing is visible; then the
           watermark, then the event. A wait on an event that is not recorded when the wait is enqueued is a no-op, as in CUDA.
Checked
  safety   a writer finds exactly version k in every chunk of save k; no copy touches freed memory; a copy writes only the slab
           leased to it; a late copy always has a scratch slot of its own.
  liveness the graph has no cycle, and at its only ends all chunks are handed over (or the save was failed by its deadline), all
           slabs and slots are back, both streams are empty, dropped sources are freed.
  promise  with the GPU stalled, fence_on returns exactly when scratch + slabs hold the state: the wait is then on the GPU.
Abstracted away: bytes (a chunk is a version number, in a slab two halves); AtSave, gather, forgotten fences; further streams; the
  kernel's block structure; weak memory. Each step is atomic and visible at once, so the code itself must use acquire and release
  on the host, a system-scope fence before F is published, and a single latch of F. Saves are staged strictly in order.

The code is in src/staging: late_copy.rs (the states), scratch.rs (reserve, hand over), fence.rs (freeze), next_action.rs (judge). It
uses the same names.

Run:      checks/model/fence.py [--deep]                 the protocol with all parameters, the promise, then the mutants
          checks/model/fence.py --mutant NAME            one mutant and its trace
Expected: "ok" for every configuration, "caught" for every mutant, last line "RESULT: pass", exit status 0. A few
          minutes; `--deep` adds four chunks, and two saves of three chunks, and takes an hour or so and several GB.
"""
import argparse, itertools, sys, time
from collections import deque, namedtuple
from graphlib import CycleError, TopologicalSorter
from types import SimpleNamespace

LIVE, JUNK = -1, -9                      # a copy's source: live memory, or else a scratch slot number; a value that no actor wrote
CONFIG = "chunks saves window slabs scratch kind drop deadline latest mutant"
Config = namedtuple("Config", CONFIG, defaults=(False, False, False, ""))
FIELDS = ("t tq ts cq cs live W F pub prod done sent issued sk nxt base fly sp slabs slots hand frozen failed gone freed dropped").split()
#  t trainer's position in its program   tq, ts; cq, cs  training and copy stream: queue, step within its head   live  version per chunk
#  W watermark: k * chunks + chunks of save k copied      F, pub  per save: as latched on the GPU, as seen in pinned memory
#  prod, done  producer and copy events completed (counts: streams are FIFO)     sent  copies enqueued, their events recorded
#  issued  saves given to the stager      sk, nxt, base  stager: save, next chunk, `sent` at its start      fly  copies in flight
#  sp stager: 0 idle, 1 event seen, 2 decided for live, (3, F) F read too early (mutant)   hand  set of chunks handed over, per save
#  slabs (free 0 | leased L | handed over H, half 0, half 1)      slots  None | (save, chunk, value)      failed  at the deadline
#  gone  superseded by the next save before they were begun
#  frozen  saves < frozen take nothing more from live memory      freed  saves < freed have lost their memory      dropped  by all


class Bad(Exception):
    """A safety property does not hold."""


def unpack(key):
    return SimpleNamespace(**dict(zip(FIELDS, key)))


def put(tup, i, v):
    return tup[:i] + (v,) + tup[i + 1:]


def let(**values):
    return lambda s: [setattr(s, f, v) for f, v in values.items()]


class Model:
    def __init__(self, c):
        self.c, self.m = c, c.mutant
        self.steps = {"late-watermark": "01EM", "early-watermark": "M01E"}.get(c.mutant, "01ME")   # of one copy to the host
        ends = {"shared": ["fence"], "borrowed": ["room", "freeze", "close", "free"]}[c.kind]
        ends[:2] = ends[1::-1] if c.mutant == "freeze-first" else ends[:2]
        self.prog = [(op, k) for k in range(c.saves) for op in ["save"] + ends + ["opt"]] + [("end", c.saves)]

    def slot_of(self, s, k, i):
        mine = [j for j, x in enumerate(s.slots) if x and x[:2] == (k, i)]
        if not mine:
            raise Bad(f"scratch overflow: no slot for chunk {i} of save {k}")
        return mine[0]

    def actions(self, s, gpu=True):
        """The possible next actions: pairs of a label and a function that changes a fresh copy of the state."""
        out = self.trainer(s, *self.prog[s.t]) + self.stager(s, s.sk)
        out += [(f"writer: slab {j}", lambda s, j=j: self.write(s, j)) for j, x in enumerate(s.slabs) if x[0] and x[0][0] == "H"]
        if gpu and s.tq and (s.tq[0][0] != "W" or s.done > s.tq[0][1]):
            names = {"P": "producer event", "W": "wait ends, copy", "K": "fence kernel", "O": "optimizer", "X": "free"}
            out.append((f"train: {names[s.tq[0][0]]} {s.tq[0][1]} step {s.ts}", self.train))
        if gpu and s.cq:
            k, i, src, _ = s.cq[0]
            step = {"0": "read 1", "1": "read 2", "M": "watermark", "E": "event"}[self.steps[s.cs]]
            if s.prod > k or src != LIVE or self.m == "no-producer-wait":
                out.append((f"copy: save {k} chunk {i} {'live' if src == LIVE else 'scratch'}: {step}", self.copy))
        return out

    def trainer(self, s, op, k):
        c, label = self.c, f"trainer: {op} {k}"
        if op in ("save", "opt", "free"):
            kernel = (("K", k), ("O", k)) if op == "opt" and self.m == "second-kernel" else ()      # and the next optimizer
            more = (({"save": "P", "opt": "O", "free": "X"}[op], k),) + kernel
            # With `latest` a save replaces a waiting one: the monotonic count then has a gap.
            new = {k - 1} if c.latest and op == "save" and s.sk < k - 1 else set()
            slots = tuple(None if x and x[0] in new and self.m == "superseded-early" else x for x in s.slots)
            gone = s.gone | new
            return [(label, let(t=s.t + 1, issued=s.issued + (op == "save"), tq=s.tq + more, gone=gone, slots=slots))]
        if op in ("fence", "room"):                              # `room` is the first half of a fence for borrowed sources
            if s.sk > k:                                         # already staged: idle, one atomic load
                return [(label + " idle", let(t=s.t + 1))]
            sent = s.nxt if s.sk == k else 0                     # enqueued from live memory, events recorded
            if sent >= c.chunks - s.slots.count(None) or self.m in ("no-capacity", "unrecorded-wait"):
                return [(label, lambda s: self.reserve(s, k))]
            # At the deadline the save is failed before the host may enqueue a write; the stager checks that where it reads F.
            return [(label + " deadline", let(failed=s.failed | {k}, t=s.t + 1))] if c.deadline else []
        if op == "freeze":
            return [(label, let(frozen=k + 1, t=s.t + 1))]
        if op == "close" and (s.sk != k or s.sp != 2 or self.m == "freeze-race"):   # one that had decided must have enqueued
            return [(label, lambda s: self.close(s, k))]
        return []

    def reserve(self, s, k):
        c, s.t = self.c, s.t + 1
        free = [j for j, x in enumerate(s.slots) if x is None]
        aside = min(len(free), c.chunks - bin(s.hand[k]).count("1"))     # the last `aside` chunks have a slot each
        for j, i in zip(free, range(c.chunks - aside, c.chunks)):
            s.slots = put(s.slots, j, (k, i, JUNK))
        if c.kind == "shared":
            self.order(s, k, 0 if self.m == "no-capacity" else c.chunks - aside)
            s.tq += (("K", k),)

    def order(self, s, k, count):
        """The training stream waits for the first `count` copies of save k; not recorded yet: CUDA makes it a no-op."""
        if s.sk == k and 0 < count <= s.nxt:
            s.tq += (("W", s.base + count - 1),)

    def close(self, s, k):
        s.t += 1
        if s.sk > k and self.m != "slots-leak":                  # staged in the meantime: the slots are returned, no kernel runs
            s.slots = tuple(None if x and x[0] == k else x for x in s.slots)
        elif s.sk <= k:
            self.order(s, k, s.nxt if s.sk == k else 0)
            s.tq += (("K", k),) if k not in s.failed else ()

    def stager(self, s, k):
        c, m, out = self.c, self.m, []
        spare = [j for j, x in enumerate(s.slots) if x and self.is_spare(s, x[0], x[1])]
        if spare:                                                # F seen: the kernel has finished with its slots
            out.append((f"stager: slots {spare} back", let(slots=tuple(None if j in spare else x for j, x in enumerate(s.slots)))))
        if c.drop and s.t == len(self.prog) - 1 and not s.dropped:       # the trainer has dropped its reference; ours is the last
            reading = s.sp == 2 or m != "release-at-fence" and any(x[1] == LIVE for x in s.fly)
            if k == c.saves or k == c.saves - 1 and s.pub[k] >= 0 and not reading:
                out.append(("stager: last reference dropped", let(dropped=True, tq=s.tq + (("X", c.saves - 1),))))
        if k >= s.issued:
            return out
        free = next((j for j, x in enumerate(s.slabs) if x[0] == 0), None)
        seen = s.fly and s.done > s.sent - len(s.fly)            # the event of the oldest copy in flight
        if s.sp == 1 or isinstance(s.sp, tuple) and seen:
            out.append((f"stager: save {k} chunk {s.fly[0][0]} judged, F={s.pub[k]}", self.judge))
        elif s.sp == 2:
            out.append((f"stager: save {k} chunk {s.nxt} enqueued from live", lambda s: self.enqueue(s, s.nxt, True, free)))
        elif s.sp == 0:
            if s.fly and m == "f-before-event":
                out.append((f"stager: F={s.pub[k]} read early", let(sp=(3, s.pub[k]))))
            elif seen:
                out.append((f"stager: event of save {k} chunk {s.fly[0][0]} seen", let(sp=1)))
            if k in s.failed:
                return out + ([] if s.fly else [(f"stager: save {k} failed", self.go_on)])
            waits = self.prog[s.t] in (("fence", k), ("room", k)) and m != "no-lift"
            needed = c.chunks - s.slots.count(None) if waits else 0      # a fence waiting on the host lifts the window
            if s.nxt < c.chunks and (len(s.fly) < c.window or s.nxt < needed) and free is not None:
                if s.pub[k] >= 0 and m != "live-after-fence":
                    out.append((f"stager: save {k} chunk {s.nxt} enqueued from scratch", lambda s: self.enqueue(s, s.nxt, False, free)))
                elif s.frozen <= k:
                    out.append((f"stager: save {k} chunk {s.nxt} decided for live", let(sp=2)))
        return out

    def is_spare(self, s, k, i):
        handed = s.hand[k] >> i & 1 if self.m != "handed-count" else i < bin(s.hand[k]).count("1")
        handed = handed or k in s.gone and self.m != "forgets-superseded"
        return s.pub[k] >= 0 and (i < s.pub[k] or handed) and (k == s.sk or self.m != "forgets-staged")

    def enqueue(self, s, i, live, slab):
        """One copy, its watermark and its event (recorded when this returns)."""
        src = LIVE if live else self.slot_of(s, s.sk, i)
        s.slabs = put(s.slabs, slab, (("L", s.sk, i), JUNK, JUNK))
        s.cq, s.fly, s.sent = s.cq + ((s.sk, i, src, slab),), s.fly + ((i, src, slab),), s.sent + 1
        s.nxt, s.sp = max(s.nxt, i + 1), 0
        if src >= 0 and self.m == "early-slot":
            s.slots = put(s.slots, src, None)

    def judge(self, s):
        k, (i, src, slab), m = s.sk, s.fly[0], self.m
        F = s.sp[1] if isinstance(s.sp, tuple) else s.pub[k]
        s.fly, s.sp = s.fly[1:], 0
        if k in s.failed:
            s.slabs = put(s.slabs, slab, (0, JUNK, JUNK))
        elif src == LIVE and 0 <= F <= i and m != "no-discard":  # discard; again into the same slab: no second lease
            self.enqueue(s, i, False, slab)
        else:
            s.hand = put(s.hand, k, s.hand[k] | 1 << i)
            s.slabs = put(s.slabs, slab, (("H", k, i),) + s.slabs[slab][1:])
            if src >= 0 and m != "early-slot":
                s.slots = put(s.slots, src, None)
            if s.hand[k] == (1 << self.c.chunks) - 1:
                self.go_on(s)

    def go_on(self, s):
        s.sk, s.nxt, s.base = next(k for k in range(s.sk + 1, self.c.saves + 1) if k not in s.gone), 0, s.sent

    def write(self, s, j):
        (_, k, i), a, b = s.slabs[j]
        if (a, b) != (k, k):
            raise Bad(f"chunk {i} of save {k} was handed over holding versions {(a, b)}, not {(k, k)}")
        s.slabs = put(s.slabs, j, (0, JUNK, JUNK))

    def train(self, s):
        (op, k), c, m, i = s.tq[0], self.c, self.m, s.ts - 1
        if op in "PWX":
            s.prod, s.freed, s.tq = s.prod + (op == "P"), k + 1 if op == "X" else s.freed, s.tq[1:]
        elif op == "O":                                          # one chunk of live memory is written
            s.live, last = put(s.live, s.ts, s.live[s.ts] + 1), s.ts + 1 == c.chunks
            s.tq, s.ts = (s.tq[1:], 0) if last else (s.tq, s.ts + 1)
        elif s.ts == 0:                                          # latch F from the watermark, once
            F = {"unqualified-watermark": s.W, "no-copy-aside": c.chunks}.get(m, min(c.chunks, max(0, s.W - k * c.chunks)))
            s.F, s.ts = put(s.F, k, F), F + 1
            s.pub = put(s.pub, k, F) if m == "publish-first" else s.pub
        elif i < c.chunks:                                       # late copy of one chunk
            if s.freed > k:
                raise Bad(f"the late copy of chunk {i} of save {k} reads freed memory")
            s.slots, s.ts = put(s.slots, self.slot_of(s, k, i), (k, i, s.live[i])), s.ts + 1
        else:                                                    # publish F, after the copies
            s.pub, s.tq, s.ts = put(s.pub, k, s.F[k]), s.tq[1:], 0

    def copy(self, s):
        (k, i, src, slab), step = s.cq[0], self.steps[s.cs]
        if step == "E":
            s.done += 1
        elif step == "M":
            s.W = i + 1 + (0 if self.m == "unqualified-watermark" else k * self.c.chunks)
        elif src == LIVE and s.freed > k:
            raise Bad(f"the copy of chunk {i} of save {k} reads freed memory")
        elif s.slabs[slab][0] != ("L", k, i):
            raise Bad(f"the copy of chunk {i} of save {k} writes slab {slab}, which is {s.slabs[slab][0]}")
        else:
            value = s.live[i] if src == LIVE else s.slots[src][2] if s.slots[src] else JUNK
            s.slabs = put(s.slabs, slab, put(s.slabs[slab], 1 + int(step), value))
        s.cq, s.cs = (s.cq, s.cs + 1) if s.cs < 3 else (s.cq[1:], 0)

    def finished(self, s):
        home = not (s.tq or s.cq or any(s.slots) or any(x[0] for x in s.slabs))
        return home and self.prog[s.t][0] == "end" and s.sk == self.c.saves and s.dropped == self.c.drop


def explore(c, gpu=True):
    """Returns (states, end states, None or (what went wrong, trace))."""
    def trace(n, last):
        out = [last]
        while n > 0:
            n, label = parent[n]
            out.insert(0, label)
        return out

    model, start = Model(c), SimpleNamespace(
        t=0, tq=(), ts=0, cq=(), cs=0, live=(0,) * c.chunks, W=0, F=(-1,) * c.saves, pub=(-1,) * c.saves, prod=0, done=0, sent=0,
        issued=0, sk=0, nxt=0, base=0, fly=(), sp=0, slabs=((0, JUNK, JUNK),) * c.slabs, slots=(None,) * c.scratch,
        hand=(0,) * c.saves, frozen=0, failed=frozenset(), gone=frozenset(), freed=0, dropped=False)
    root = tuple(vars(start).values())                           # in the order of FIELDS
    number, queue, parent, ends, before, n = {root: 0}, deque([root]), [(-1, "")], [], {}, -1
    while queue:
        key, n = queue.popleft(), n + 1
        acts = model.actions(unpack(key), gpu)
        for label, step in acts:
            s = unpack(key)
            try:
                step(s)
            except Bad as e:
                return len(number), ends, (str(e), trace(n, label))
            new = tuple(vars(s).values())
            if new not in number:
                number[new] = len(parent)
                parent.append((n, label))
                queue.append(new)
            before.setdefault(number[new], []).append(n)
        if not acts:
            ends.append(key)
            if gpu and not model.finished(unpack(key)):
                return len(number), ends, ("deadlock", trace(n, "nothing can move; trainer at " + model.prog[key[0]][0]))
    try:
        TopologicalSorter(before).prepare()
    except CycleError as e:
        return len(parent), ends, ("livelock: a cycle of states", trace(e.args[1][0], "and round again"))
    return len(parent), ends, None


SMALL = Config(3, 1, 2, 2, 3, "shared")
TWO = SMALL._replace(saves=2)
LENT = SMALL._replace(kind="borrowed")
LATEST = Config(1, 3, 1, 1, 2, "shared", latest=True)
MUTANTS = {  # name: (smallest configuration that shows it, what is wrong with it)
    "no-copy-aside": (SMALL, "the fence ignores the watermark and copies nothing aside"),
    "no-discard": (SMALL, "the stager ignores F when it judges a finished copy"),
    "f-before-event": (SMALL, "F is read before the chunk's event instead of after"),
    "early-watermark": (SMALL, "the watermark is published before the copy it speaks of"),
    "late-watermark": (SMALL._replace(scratch=1), "the watermark is published after the event is recorded"),
    "publish-first": (SMALL, "F is published before the late copies and nothing orders scratch reads behind them"),
    "early-slot": (TWO, "a scratch slot is free as soon as its copy is enqueued"),
    "no-producer-wait": (TWO, "the copy stream does not wait for the producer event"),
    "unqualified-watermark": (TWO, "the watermark of the last save is taken for that of this one"),
    "second-kernel": (SMALL, "a second fence_on for the same save runs the kernel again"),
    "no-capacity": (SMALL._replace(scratch=1), "what scratch cannot hold is not waited for"),
    "unrecorded-wait": (SMALL._replace(scratch=1), "the stream waits on events that are not recorded yet"),
    "live-after-fence": (SMALL._replace(drop=True), "copies from live memory are enqueued although F is known"),
    "release-at-fence": (SMALL._replace(drop=True), "shared sources are released when F is seen, copies in flight or not"),
    "handed-count": (SMALL._replace(drop=True), "chunks handed over are a count, not a set: copies made again come out of order"),
    "forgets-staged": (SMALL, "F is not watched any more once a save is staged: its slots never come back"),
    "freeze-race": (LENT, "the scope ends while the stager is between its check and its enqueue"),
    "freeze-first": (LENT._replace(scratch=1), "borrowed memory is frozen before the rest fits into scratch"),
    "superseded-early": (LATEST, "the slots of a save that is superseded are free at once, before its kernel has run"),
    "forgets-superseded": (LATEST, "the slots of a save that is superseded never come back"),
    "slots-leak": (LENT, "the save is staged between reservation and scope end, and its slots are not given back"),
}


def configurations(deep):
    sizes = [(3, 1, (1, 2, 3), (0, 1, 2, 3)), (2, 2, (1, 2), (0, 1, 2, 3))]              # chunks, saves, slabs, scratch
    for chunks, saves, *memory in sizes + [(4, 1, (1, 2, 4), (0, 1, 2, 4)), (3, 2, (1, 2), (0, 1, 2, 3))] * deep:
        for kind, window, slabs, scratch, deadline in itertools.product(("shared", "borrowed"), (1, 2), *memory, (False, True)):
            yield Config(chunks, saves, window, slabs, scratch, kind, kind == "shared", deadline)
    for chunks, saves, *memory in [(1, 3, (1, 2), (0, 1, 2, 3)), (1, 4, (1,), (2,))] + [(2, 3, (1, 2), (2, 4))] * deep:
        for kind, window, slabs, scratch in itertools.product(("shared", "borrowed"), (1, 2), *memory):
            yield Config(chunks, saves, window, slabs, scratch, kind, kind == "shared", False, True)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--deep", action="store_true")
    p.add_argument("--mutant", choices=sorted(MUTANTS))
    a, ok, states, began, lifted = p.parse_args(), True, 0, time.time(), False
    for c in [] if a.mutant else configurations(a.deep):
        n, _, wrong = explore(c)
        states, ok = states + n, ok and not wrong
        print("WRONG " if wrong else "ok    ", f"{n:8} states ", *(f"{f}={v}" for f, v in zip(c._fields, c) if v != ""), flush=True)
        print(*["       " + x for x in [wrong[0]] + wrong[1]] if wrong else [], sep="\n", end="\n" if wrong else "")
    for slabs, scratch, m in [] if a.mutant else itertools.product((1, 2, 3), (0, 1, 2, 3), ("", "no-lift")):
        ends = explore(SMALL._replace(window=1, slabs=slabs, scratch=scratch, mutant=m), gpu=False)[1]
        passed = all(key[0] == 3 for key in ends)                # the trainer has left fence_on and enqueued the optimizer
        right = passed == (slabs + scratch >= SMALL.chunks)
        ok, lifted = ok and (right or m != ""), lifted or not right
        print("ok    " if right else "caught" if m else "WRONG ", f"GPU stalled, slabs={slabs} scratch={scratch} {m}:",
              "fence_on returns" if passed else "fence_on waits on the host")
    ok = ok and (lifted or bool(a.mutant))                       # without the lift, some fence must have waited needlessly
    for name in [a.mutant] if a.mutant else MUTANTS:
        _, _, wrong = explore(MUTANTS[name][0]._replace(mutant=name))
        ok = ok and bool(wrong)
        print("caught" if wrong else "MISSED", f"{name}: {MUTANTS[name][1]}")
        print(*["       " + x for x in wrong[1] + ["=> " + wrong[0]]] if wrong else [], sep="\n")
    print(f"RESULT: {'pass' if ok else 'FAIL'}  states={states} seconds={time.time() - began:.0f}")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
