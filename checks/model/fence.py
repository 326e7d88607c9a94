#!/usr/bin/env python3
"""Explicit-state model checker for the fence of `ashore` (late copy-on-write, decided by the GPU).

Modelled: every interleaving of five actors, breadth first, so that a counterexample is a shortest one.
  trainer  save k; fence_on(k) with its capacity rule, host wait and deadline; optimizer; drop of the sources. It runs ahead:
           fence_on may return before the GPU has done anything. For borrowed sources the fence is room, freeze, close, free.
           With `latest` the next save supersedes a waiting one that has already been fenced.
  stager   leases a slab; decides live or scratch; enqueues the copy (a separate step: other actors act in between); polls events
           in order; reads the published F after the event; hands over, or discards and copies again from scratch.
  writers  read a slab that was handed over and return it, at any later time.
  training stream  one per device: producer event; waits; fence kernel (latch F from the watermark, late copies one chunk at a
           time, publish F to pinned memory); optimizer, one chunk at a time; free. A device none of whose streams is fenced runs
           its kernel in a stream of its own. Each fenced stream waits for the kernels of all devices: it may write them all.
  copy stream  one per device, first-in first-out; waits for the producer event; a copy to the host is two reads, so tearing is
           visible; then the watermark, then the event. A wait on an event that is not recorded when the wait is enqueued is a
           no-op, as in CUDA.
A chunk has a part on one device or on both. Watermark, F and slots are per device: the watermark of a device says which chunks'
parts have left it. A chunk has arrived when the copies of all its parts have.
Checked
  safety   a writer finds exactly version k in every part of every chunk of save k; no copy touches freed memory; a copy writes
           only the slab leased to it; a late copy always has a scratch slot of its own.
  liveness the graph has no cycle, and at its only ends all chunks are handed over (or the save was failed by its deadline), all
           slabs and slots are back, both streams are empty, dropped sources are freed.
  promise  with the GPU stalled, fence_on returns exactly when scratch + slabs hold the state: the wait is then on the GPU.
Abstracted away: bytes (a part of a chunk is a version number, in a slab two halves); AtSave, gather, forgotten fences; further
  streams; a third device; how programs order the work of their devices (here a producer event waits for all earlier writes); the
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

LIVE, SETTLED, JUNK = -1, -2, -9         # a part's source: live memory, nothing to copy, or else a scratch slot number; an unwritten value
CONFIG = "chunks saves window slabs scratch kind drop deadline latest parts streams cross mutant"
Config = namedtuple("Config", CONFIG, defaults=(False, False, False, (), (), False, ""))
#  parts    the devices on which each chunk has a part; () is one device      streams  the devices whose streams are fenced; () all
#  cross    each fenced stream writes the memory of the other device           scratch  slots of each device
FIELDS = ("t tq ts cq cs live W F pub prod done sent issued sk nxt base fly sp slabs slots hand frozen failed gone freed dropped").split()
#  t trainer's position in its program   tq, ts; cq, cs  per stream: queue, step within its head; the streams of `tq` are a training
#  stream of each device, then a stream of its own    live  version per device and chunk      W watermark of each device: k * chunks +
#  chunks of save k copied      F, pub  per save and device: as latched on the GPU, as seen in pinned memory
#  prod, done  producer and copy events completed, per device (counts: streams are FIFO)     sent  copies enqueued, their events recorded
#  issued  saves given to the stager      sk, nxt, base  stager: save, next chunk, `sent` at its start      fly  copies in flight
#  sp stager: None idle, "seen" an event, ("live", told) decided for live, ("early", F) F read too early (mutant)
#  hand  set of chunks handed over, per save       slabs (free 0 | leased L | handed over H, two halves per device)
#  slots per device: None | (save, chunk, value)      failed  at the deadline      gone  superseded by the next save before it began
#  frozen  saves < frozen take nothing more from live memory      freed  per device: saves < freed have lost their memory
#  dropped  by all


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
        self.parts = c.parts or ((0,),) * c.chunks
        self.devices = sorted(set(itertools.chain(*self.parts)))
        self.fenced = c.streams or tuple(self.devices)
        D = len(self.devices)
        self.nothing = (JUNK,) * (2 * D)
        self.kernel_in = {d: d if d in self.fenced else D + d for d in self.devices}     # the stream in which a device's kernel runs
        all_fenced = len(self.fenced) == D                       # else the stream that is fenced writes the memory of all devices
        self.writes = {s: tuple(self.devices) if not all_fenced else (1 - s,) if c.cross else (s,) for s in self.fenced}

    def slot_of(self, s, d, k, i):
        mine = [j for j, x in enumerate(s.slots[d]) if x and x[:2] == (k, i)]
        if not mine:
            raise Bad(f"scratch overflow: no slot on device {d} for chunk {i} of save {k}")
        return mine[0]

    def push(self, s, stream, *ops):
        s.tq = put(s.tq, stream, s.tq[stream] + ops)

    def told(self, s, k):
        """All devices have told F of save k."""
        known = [f >= 0 for f in s.pub[k]]
        return any(known) if self.m == "any-told" else all(known)

    def actions(self, s, gpu=True):
        """The possible next actions: pairs of a label and a function that changes a fresh copy of the state."""
        out = self.trainer(s, *self.prog[s.t]) + self.stager(s, s.sk)
        out += [(f"writer: slab {j}", lambda s, j=j: self.write(s, j)) for j, x in enumerate(s.slabs) if x[0] and x[0][0] == "H"]
        names = {"P": "producer event", "W": "wait ends, copy", "J": "wait ends, kernel", "K": "fence kernel", "O": "optimizer",
                 "X": "free"}
        for q, queue in enumerate(s.tq if gpu else ()):
            if queue and self.may_run(s, queue[0], s.ts[q]):
                out.append((f"stream {q}: {names[queue[0][0]]} {queue[0][1:]} step {s.ts[q]}", lambda s, q=q: self.train(s, q)))
        for d, queue in enumerate(s.cq if gpu else ()):
            if queue:
                k, i, src, _ = queue[0]
                step = {"0": "read 1", "1": "read 2", "M": "watermark", "E": "event"}[self.steps[s.cs[d]]]
                if s.prod[d] > k or src != LIVE or self.m == "no-producer-wait":
                    label = f"copy {d}: save {k} chunk {i} {'live' if src == LIVE else 'scratch'}: {step}"
                    out.append((label, lambda s, d=d: self.copy(s, d)))
        return out

    def may_run(self, s, op, step):
        """Whether the head of a stream need not wait. Programs order the producers of a save behind all writes of the one before."""
        kind, k, *rest = op
        return {
            "P": lambda: all(version is None or version >= k for of in s.live for version in of),
            "W": lambda: s.done[rest[0]] > rest[1],
            "J": lambda: s.pub[k][rest[0]] >= 0,
            "K": lambda: step > 0 or s.prod[rest[0]] > k or self.m == "no-dependency",
        }.get(kind, lambda: True)()

    def trainer(self, s, op, k):
        c, label = self.c, f"trainer: {op} {k}"
        if op == "save":
            # With `latest` a save replaces a waiting one: the monotonic count then has a gap.
            new = {k - 1} if c.latest and s.sk < k - 1 else set()
            early = self.m == "superseded-early"
            return [(label, lambda s: self.save(s, k, new, early))]
        if op in ("opt", "free"):
            return [(label, lambda s: self.enqueue_work(s, op, k))]
        if op in ("fence", "room"):                              # `room` is the first half of a fence for borrowed sources
            if s.sk > k:                                         # already staged: idle, one atomic load
                return [(label + " idle", let(t=s.t + 1))]
            sent = s.nxt if s.sk == k else 0                     # enqueued from live memory, events recorded
            asked = self.devices[:1] if self.m == "capacity-of-one" else self.devices
            if all(sent >= self.reserved(s, d, k)[0] for d in asked) or self.m in ("no-capacity", "unrecorded-wait"):
                return [(label, lambda s: self.reserve(s, k))]
            # At the deadline the save is failed before the host may enqueue a write; the stager checks that where it reads F.
            return [(label + " deadline", let(failed=s.failed | {k}, t=s.t + 1))] if c.deadline else []
        if op == "freeze":
            return [(label, let(frozen=k + 1, t=s.t + 1))]
        if op == "close" and (s.sk != k or not decided(s) or self.m == "freeze-race"):   # one that had decided must have enqueued
            return [(label, lambda s: self.close(s, k))]
        return []

    def save(self, s, k, new, early):
        s.t, s.issued, s.gone = s.t + 1, s.issued + 1, s.gone | new
        s.slots = tuple(tuple(None if early and x and x[0] in new else x for x in of) for of in s.slots)
        for d in self.devices:
            self.push(s, d, ("P", k))

    def enqueue_work(self, s, op, k):
        s.t += 1
        for stream in self.fenced:
            again = [("K", k, d) for d in self.devices if self.kernel_in[d] == stream]
            again = again + [("O", k)] if op == "opt" and self.m == "second-kernel" else []        # and the next optimizer
            self.push(s, stream, ({"opt": "O", "free": "X"}[op], k), *again)

    def reserved(self, s, d, k):
        """The first chunk from which on each part on the device can have a slot; those chunks; which slots are free."""
        handed, free = bin(s.hand[k]).count("1"), [j for j, x in enumerate(s.slots[d]) if x is None]
        left = [i for i in range(handed, self.c.chunks) if d in self.parts[i]]
        without = left[:max(0, len(left) - len(free))]
        return without[-1] + 1 if without else 0, left[len(without):], free

    def reserve(self, s, k):
        s.t += 1
        firsts = {}
        for d in self.devices:
            firsts[d], chunks, free = self.reserved(s, d, k)     # the last chunks of each device have a slot each
            for j, i in zip(free, chunks):
                s.slots = put(s.slots, d, put(s.slots[d], j, (k, i, JUNK)))
        if self.c.kind == "shared":
            self.launch(s, k, {d: 0 if self.m == "no-capacity" else firsts[d] for d in self.devices})

    def launch(self, s, k, behind):
        """Each device's kernel, behind its copies of the first `behind` chunks; then each fenced stream waits for all kernels."""
        for d in self.devices:
            self.order(s, k, d, behind[d])
            self.push(s, self.kernel_in[d], ("K", k, d))
        for stream in self.fenced if self.m != "no-cross-wait" else ():
            self.push(s, stream, *[("J", k, d) for d in self.devices if self.kernel_in[d] != stream])

    def order(self, s, k, d, count):
        """The stream of the kernel waits for the copies of the first `count` chunks of save k; not recorded yet: a no-op."""
        copies = sum(d in self.parts[i] for i in range(min(count, self.c.chunks)))
        if s.sk == k and 0 < count <= s.nxt and copies > 0:
            self.push(s, self.kernel_in[d], ("W", k, d, s.base[d] + copies - 1))

    def close(self, s, k):
        s.t += 1
        if s.sk > k and self.m != "slots-leak":                  # staged in the meantime: the slots are returned, no kernel runs
            s.slots = tuple(tuple(None if x and x[0] == k else x for x in of) for of in s.slots)
        elif s.sk <= k:
            count = s.nxt if s.sk == k else 0
            if k not in s.failed:
                self.launch(s, k, {d: count for d in self.devices})
            else:                                                # the streams wait for the copies of a save that has failed
                for d in self.devices:
                    for stream in self.fenced:
                        copies = sum(d in self.parts[i] for i in range(count))
                        self.push(s, stream, *[("W", k, d, s.base[d] + copies - 1)] * (copies > 0))

    def stager(self, s, k):
        c, m, out = self.c, self.m, []
        spare = {(d, j) for d in self.devices for j, x in enumerate(s.slots[d]) if x and self.is_spare(s, d, x[0], x[1])}
        if spare:                                                # F seen: the kernel has finished with its slots
            rest = tuple(tuple(None if (d, j) in spare else x for j, x in enumerate(of)) for d, of in enumerate(s.slots))
            out.append((f"stager: slots {sorted(spare)} back", let(slots=rest)))
        if c.drop and s.t == len(self.prog) - 1 and not s.dropped:       # the trainer has dropped its reference; ours is the last
            reading = decided(s) or m != "release-at-fence" and any(LIVE in x[1] for x in s.fly)
            if k == c.saves or k == c.saves - 1 and self.told(s, k) and not reading:
                out.append(("stager: last reference dropped", self.drop))
        if k >= s.issued:
            return out
        free = next((j for j, x in enumerate(s.slabs) if x[0] == 0), None)
        seen = s.fly and all(done >= mark for done, mark in zip(s.done, s.fly[0][3]))      # the events of the oldest chunk in flight
        if s.sp == "seen" or s.sp and s.sp[0] == "early" and seen:
            out.append((f"stager: save {k} chunk {s.fly[0][0]} judged, F={s.pub[k]}", self.judge))
        elif decided(s):
            out.append((f"stager: save {k} chunk {s.nxt} enqueued from live", lambda s: self.enqueue(s, s.nxt, s.sp[1], free)))
        elif s.sp is None:
            if s.fly and m == "f-before-event":
                out.append((f"stager: F={s.pub[k]} read early", let(sp=("early", s.pub[k]))))
            elif seen:
                out.append((f"stager: event of save {k} chunk {s.fly[0][0]} seen", let(sp="seen")))
            if k in s.failed:
                return out + ([] if s.fly else [(f"stager: save {k} failed", self.go_on)])
            waits = self.prog[s.t] in (("fence", k), ("room", k)) and m != "no-lift"
            needed = max(self.reserved(s, d, k)[0] for d in self.devices) if waits else 0      # a fence on the host lifts the window
            if s.nxt < c.chunks and (len(s.fly) < c.window or s.nxt < needed) and free is not None:
                if self.told(s, k) and m != "live-after-fence":
                    out.append((f"stager: save {k} chunk {s.nxt} enqueued from scratch", lambda s: self.enqueue(s, s.nxt, s.pub[k], free)))
                elif s.frozen <= k:
                    told = s.pub[k] if m != "live-after-fence" else (-1,) * len(self.devices)
                    out.append((f"stager: save {k} chunk {s.nxt} decided for live, F={told}", let(sp=("live", told))))
        return out

    def drop(self, s):
        s.dropped = True
        for d in self.devices:                                   # each device's memory is freed in its own stream
            self.push(s, d, ("X", self.c.saves - 1, d))

    def is_spare(self, s, d, k, i):
        handed = s.hand[k] >> i & 1 if self.m != "handed-count" else i < bin(s.hand[k]).count("1")
        handed = handed or k in s.gone and self.m != "forgets-superseded"
        F = max(s.pub[k]) if self.m == "slots-of-any" else s.pub[k][d]
        return F >= 0 and (i < F or handed) and (k == s.sk or self.m != "forgets-staged")

    def enqueue(self, s, i, told, slab):
        """The first copy of a chunk: the part on a device that has told F is read from its slot, any other from live memory."""
        first = {d: f for d, f in zip(self.devices, told)}
        if self.m == "any-told" and max(told) >= 0:
            first = dict.fromkeys(first, 0)
        sources = [SETTLED if d not in self.parts[i] else LIVE if first[d] < 0 else self.slot_of(s, d, s.sk, i) for d in self.devices]
        s.nxt = max(s.nxt, i + 1)
        self.send(s, i, tuple(sources), slab, self.nothing)

    def send(self, s, i, sources, slab, halves):
        """Copies of the parts of a chunk, their watermarks and their events (recorded when this returns)."""
        s.slabs, marks = put(s.slabs, slab, (("L", s.sk, i), *halves)), [0] * len(self.devices)
        for d in self.devices:
            if sources[d] != SETTLED:
                s.cq, s.sent = put(s.cq, d, s.cq[d] + ((s.sk, i, sources[d], slab),)), put(s.sent, d, s.sent[d] + 1)
                marks[d] = s.sent[d]
                if sources[d] >= 0 and self.m == "early-slot":
                    s.slots = put(s.slots, d, put(s.slots[d], sources[d], None))
        s.fly, s.sp = s.fly + ((i, sources, slab, tuple(marks)),), None

    def judge(self, s):
        k, (i, sources, slab, _), m = s.sk, s.fly[0], self.m
        F = s.sp[1] if isinstance(s.sp, tuple) else s.pub[k]
        F = F[:1] * len(F) if m == "judged-by-one" else F
        written = [d for d in self.devices if sources[d] == LIVE and 0 <= F[d] <= i]
        s.fly, s.sp = s.fly[1:], None
        if k in s.failed:
            s.slabs = put(s.slabs, slab, (0, *self.nothing))
        elif written and m != "no-discard":                      # discard these parts; again into the same slab: no second lease
            other = LIVE if m == "again-live" else SETTLED
            again = [self.slot_of(s, d, k, i) if d in written else other if d in self.parts[i] else SETTLED for d in self.devices]
            halves = tuple(JUNK if again[n // 2] != SETTLED else x for n, x in enumerate(s.slabs[slab][1:]))
            self.send(s, i, tuple(again), slab, halves)
        else:
            s.hand = put(s.hand, k, s.hand[k] | 1 << i)
            s.slabs = put(s.slabs, slab, (("H", k, i),) + s.slabs[slab][1:])
            for d in self.devices:
                if sources[d] >= 0 and m != "early-slot":
                    s.slots = put(s.slots, d, put(s.slots[d], sources[d], None))
            if s.hand[k] == (1 << self.c.chunks) - 1:
                self.go_on(s)

    def go_on(self, s):
        s.sk, s.nxt, s.base = next(k for k in range(s.sk + 1, self.c.saves + 1) if k not in s.gone), 0, s.sent

    def write(self, s, j):
        (_, k, i), *halves = s.slabs[j]
        for d in self.parts[i]:
            found = tuple(halves[2 * d:2 * d + 2])
            if found != (k, k):
                raise Bad(f"chunk {i} of save {k} was handed over holding versions {found} of device {d}, not {(k, k)}")
        s.slabs = put(s.slabs, j, (0, *self.nothing))

    def train(self, s, q):
        (op, k, *rest), c, m, step = s.tq[q][0], self.c, self.m, s.ts[q]
        if op == "P":
            s.prod = put(s.prod, q, s.prod[q] + 1)
        elif op == "X":
            for d in rest or self.writes[q]:
                s.freed = put(s.freed, d, k + 1)
        elif op == "O":                                          # one chunk of live memory is written
            own = [(d, i) for d in self.writes[q] for i in range(c.chunks) if d in self.parts[i]]
            if own:
                d, i = own[step]
                s.live = put(s.live, d, put(s.live[d], i, s.live[d][i] + 1))
            if step + 1 < len(own):
                s.ts = put(s.ts, q, step + 1)
                return
        elif op == "K" and step == 0:                            # latch F from the watermark, once
            (d,) = rest
            W = max(s.W) if m == "one-watermark" else s.W[d]
            F = {"unqualified-watermark": W, "no-copy-aside": c.chunks}.get(m, min(c.chunks, max(0, W - k * c.chunks)))
            s.F, s.ts = put(s.F, k, put(s.F[k], d, F)), put(s.ts, q, F + 1)
            s.pub = put(s.pub, k, put(s.pub[k], d, F)) if m == "publish-first" else s.pub
            return
        elif op == "K" and step - 1 < c.chunks:                  # late copy of one chunk
            (d,), i = rest, step - 1
            if d in self.parts[i]:
                if s.freed[d] > k:
                    raise Bad(f"the late copy of chunk {i} of save {k} reads freed memory of device {d}")
                slot = self.slot_of(s, d, k, i)
                s.slots = put(s.slots, d, put(s.slots[d], slot, (k, i, s.live[d][i])))
            s.ts = put(s.ts, q, step + 1)
            return
        elif op == "K":                                          # publish F, after the copies
            (d,) = rest
            s.pub = put(s.pub, k, put(s.pub[k], d, s.F[k][d]))
        s.tq, s.ts = put(s.tq, q, s.tq[q][1:]), put(s.ts, q, 0)

    def copy(self, s, d):
        (k, i, src, slab), step = s.cq[d][0], self.steps[s.cs[d]]
        if step == "E":
            s.done = put(s.done, d, s.done[d] + 1)
        elif step == "M":
            if src == LIVE:
                s.W = put(s.W, d, i + 1 + (0 if self.m == "unqualified-watermark" else k * self.c.chunks))
        elif src == LIVE and s.freed[d] > k:
            raise Bad(f"the copy of chunk {i} of save {k} reads freed memory of device {d}")
        elif s.slabs[slab][0] != ("L", k, i):
            raise Bad(f"the copy of chunk {i} of save {k} writes slab {slab}, which is {s.slabs[slab][0]}")
        else:
            slots = s.slots[d]
            value = s.live[d][i] if src == LIVE else slots[src][2] if slots[src] else JUNK
            s.slabs = put(s.slabs, slab, put(s.slabs[slab], 1 + 2 * d + int(step), value))
        if s.cs[d] < 3:
            s.cs = put(s.cs, d, s.cs[d] + 1)
        else:
            s.cq, s.cs = put(s.cq, d, s.cq[d][1:]), put(s.cs, d, 0)

    def finished(self, s):
        home = not (any(s.tq) or any(s.cq) or any(x for of in s.slots for x in of) or any(x[0] for x in s.slabs))
        return home and self.prog[s.t][0] == "end" and s.sk == self.c.saves and s.dropped == self.c.drop

    def start(self):
        c, D = self.c, len(self.devices)
        scratch = c.scratch if isinstance(c.scratch, tuple) else (c.scratch,) * D
        live = tuple(tuple(0 if d in self.parts[i] else None for i in range(c.chunks)) for d in self.devices)
        zeros, untold = (0,) * D, ((-1,) * D,) * c.saves
        return SimpleNamespace(
            t=0, tq=((),) * (2 * D), ts=(0,) * (2 * D), cq=((),) * D, cs=zeros, live=live, W=zeros, F=untold, pub=untold, prod=zeros,
            done=zeros, sent=zeros, issued=0, sk=0, nxt=0, base=zeros, fly=(), sp=None, slabs=((0, *self.nothing),) * c.slabs,
            slots=tuple((None,) * n for n in scratch), hand=(0,) * c.saves, frozen=0, failed=frozenset(), gone=frozenset(),
            freed=zeros, dropped=False)


def decided(s):
    return isinstance(s.sp, tuple) and s.sp[0] == "live"


def explore(c, gpu=True):
    """Returns (states, end states, None or (what went wrong, trace))."""
    def trace(n, last):
        out = [last]
        while n > 0:
            n, label = parent[n]
            out.insert(0, label)
        return out

    model = Model(c)
    root = tuple(vars(model.start()).values())                   # in the order of FIELDS
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
PAIR = Config(2, 1, 2, 2, 2, "shared", parts=((0,), (0, 1)))             # the second chunk has a part on each of two devices
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
    "one-watermark": (PAIR, "a device takes the watermark of another one for its own"),
    "no-cross-wait": (PAIR._replace(streams=(0,)), "a stream does not wait for the kernels of the other device, which it writes"),
    "no-dependency": (PAIR._replace(chunks=1, saves=2, slabs=1, scratch=1, parts=((0, 1),), streams=(0,)),
                      "a kernel in its own stream does not wait for producers"),
    "any-told": (PAIR, "one device's F counts as that of all: parts of others are read from slots, and sources are released"),
    "slots-of-any": (PAIR._replace(chunks=1, parts=((0, 1),)), "one device's F frees the slots of the others"),
    "judged-by-one": (PAIR, "one device's F judges the parts of all"),
    "again-live": (PAIR, "a chunk that is copied again is read from live memory where its device has not told F"),
    "capacity-of-one": (PAIR._replace(scratch=(2, 0)), "what the scratch of the second device cannot hold is not waited for"),
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


def on_two_devices(deep):
    memory = list(itertools.product(((0, 1), (1, 2), (2, 2)), (1, 2)))                     # scratch of each device, slabs
    sizes = [(((0,), (1,)), 1, memory), (((0,), (0, 1)), 1, memory), (((0, 1), (0, 1)), 1, memory), (((0, 1),), 2, [((1, 1), 1)])]
    sizes += [(((0,), (0, 1), (1,)), 1, memory), (((0, 1),), 2, [((2, 2), 1), ((2, 2), 2)])] * deep
    ways = [("shared", (), False), ("shared", (), True), ("shared", (0,), False), ("shared", (1,), False), ("borrowed", (), False)]
    for (parts, saves, memory), (kind, streams, cross) in itertools.product(sizes, ways):
        for scratch, slabs in memory:
            drop, window = kind == "shared" and not streams, 3 - saves
            yield Config(len(parts), saves, window, slabs, scratch, kind, drop, False, False, parts, streams, cross)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--deep", action="store_true")
    p.add_argument("--mutant", choices=sorted(MUTANTS))
    a, ok, states, began, lifted = p.parse_args(), True, 0, time.time(), False
    for c in [] if a.mutant else itertools.chain(configurations(a.deep), on_two_devices(a.deep)):
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
    for slabs, scratch in [] if a.mutant else itertools.product((1, 2), itertools.product((0, 1, 2), repeat=2)):
        ends = explore(PAIR._replace(window=1, slabs=slabs, scratch=scratch), gpu=False)[1]
        passed = all(key[0] == 3 for key in ends)
        right = passed == (slabs >= 2 or scratch[0] >= 2 and scratch[1] >= 1 or slabs == 1 and scratch[0] >= 1 and scratch[1] >= 1)
        ok = ok and right
        print("ok    " if right else "WRONG ", f"GPUs stalled, slabs={slabs} scratch={scratch}:",
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
