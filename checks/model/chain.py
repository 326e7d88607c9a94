#!/usr/bin/env python3
"""Explicit-state model checker for chains of published versions (`ashore`, src/chain).

Modelled: every interleaving, breadth first, so that a counterexample is a shortest one.
  directory  items: a full ("full", n, state), a delta ("delta", n, state, base n, base state), a full beside a delta ("beside", n, state).
             A rename makes an item visible; it never replaces another one of its name. An fsync makes it durable.
  publisher  publishes versions one after the other. Each state is another value, so a version that is made again differs. Its fsync may
             fail: then it does not know whether the version is there. It may die and start again at any time by a power cut, may begin
             with a full instead of reading the chain, writes a full beside a delta, and removes old items one by one.
  follower   has memory of its own that survives. It applies deltas to it, or loads fulls, in any order that its rule allows.
  power      a power cut loses any subset of the items that are visible and not durable.
Checked in every state
  never      the follower holds no state that was not published.
  promise    the newest acknowledged version, or a later one, can be built from what is durable.
  alone      the rename never refuses a version: there is one publisher.
  firm       the follower switches only to durable versions.
  reach      the follower alone, while nothing else moves, gets to the newest version that can be built.
Abstracted: bytes and digests (a state is its number), grace, the length of chains, two publishers (the rename decides).

The code is in src/chain/shared.rs (the publisher), recover.rs (its start), retention.rs, and follow.rs.

Run:      checks/model/chain.py [--deep] [--mutant NAME]
Expected: "ok" for the rules, "caught" for every mutant, last line "RESULT: pass", exit status 0.
"""

import argparse
import sys
import time
from collections import deque, namedtuple

# What memory holds: `state` None after an unclear publish. `item` is what is visible and not yet known to be durable; `known` the number
# of the newest full that is known to be durable.
Publisher = namedtuple("Publisher", "n state item known")
World = namedtuple("World", "publisher visible durable follower fresh cuts acknowledged")

MUTANTS = {
    "out of order": "a delta is put on a version whose publish has not ended",
    "goes on after unclear": "after a failed fsync the publisher keeps what it holds",
    "start does not confirm": "a publisher that starts builds on what it has not made durable",
    "prunes behind visible": "old items are removed because of a full that is visible",
    "keeps the last items": "the oldest items are removed, whatever they are",
    "old number": "a publisher that goes back numbers from the newest full",
    "never loads a full again": "a follower that has weights only applies deltas",
    "no fsync, no digests": "a follower does not make versions durable, and matches deltas by number",
}
GARBAGE = -1


def built(items):
    """The versions that a new reader can build: state to number."""
    found = {item[2]: item[1] for item in items if item[0] != "delta"}
    grown = True
    while grown:
        grown = False
        for item in items:
            if item[0] == "delta" and item[4] in found and item[2] not in found:
                found[item[2]] = item[1]
                grown = True
    return found


def newest(items):
    found = built(items)
    return max(((n, state) for state, n in found.items()), default=None)


def way(items, state):
    """The items by which a state is built."""
    full = next((item for item in items if item[2] == state and item[0] != "delta"), None)
    if full:
        return frozenset([full])
    delta = next(item for item in items if item[2] == state)
    return way(items, delta[4]) | {delta}


class Model:
    def __init__(self, mutant, versions, cuts):
        self.mutant, self.versions, self.cuts = mutant, versions, cuts

    def steps(self, w):
        yield from self.publisher(w) if w.publisher else self.start(w)
        if w.cuts < self.cuts:
            loose = sorted(w.visible - w.durable)
            for lost in range(1 << len(loose)):
                left = w.durable | {item for bit, item in enumerate(loose) if lost >> bit & 1}
                yield "power cut", w._replace(publisher=None, visible=left, cuts=w.cuts + 1)
        for label, follower, durable in self.follower(w.visible, w.durable, w.follower):
            yield label, w._replace(follower=follower, durable=durable)

    def start(self, w):
        highest = max((item[1] for item in w.visible), default=0)
        fulls = [item[1] for item in w.visible if item[0] != "delta"]
        first = max(fulls, default=0) if self.mutant == "old number" else highest
        yield "starts, begins with a full", w._replace(publisher=Publisher(first, None, None, None))
        there = newest(w.visible)
        if there:
            confirmed = way(w.visible, there[1])
            durable = w.durable if self.mutant == "start does not confirm" else w.durable | confirmed
            known = max(item[1] for item in confirmed if item[0] != "delta")
            yield "starts, reads the chain", w._replace(publisher=Publisher(highest, there[1], None, known), durable=durable)

    def publisher(self, w):
        p = w.publisher
        if p.item:
            kind, n, state = p.item[:3]
            known = n if kind != "delta" else p.known
            done = p._replace(state=p.state if kind == "beside" else state, item=None, known=known)
            told = w.acknowledged if kind == "beside" else max(w.acknowledged, n)
            yield "durable", w._replace(publisher=done, durable=w.durable | {p.item}, acknowledged=told)
            forgets = p._replace(state=None, item=None)
            if self.mutant == "goes on after unclear":
                forgets = p._replace(state=state, item=None)
            yield "unclear", w._replace(publisher=forgets)
        ready = p.item is None or self.mutant == "out of order" and p.item[0] != "beside"
        if ready and p.n < self.versions:
            base = (p.n, p.state) if p.item is None else (p.item[1], p.item[2])
            kind = ("full", p.n + 1, w.fresh)
            if base[1] is not None:
                kind = ("delta", p.n + 1, w.fresh, self.number(w.visible, base[1]), base[1])
            yield from self.shows(w, p, kind)
        beside = ("beside", self.number(w.visible, p.state), p.state)
        if p.item is None and p.state is not None and ("delta",) + beside[1:] in {item[:3] for item in w.visible}:
            yield from self.shows(w, p, beside)
        for item in self.victims(w):
            yield f"removes {item[0]} {item[1]}", w._replace(visible=w.visible - {item}, durable=w.durable - {item})

    @staticmethod
    def number(items, state):
        return next((item[1] for item in items if item[2] == state), 0)

    def shows(self, w, p, item):
        name = lambda item: (item[0] == "beside", item[1])
        if name(item) in {name(there) for there in w.visible}:
            # A full that is beside its delta already is not written again.
            if item[0] != "beside":
                yield "conflict", w._replace(publisher=p._replace(n=self.versions, item=None))
            return
        fresh = w.fresh if item[0] == "beside" else w.fresh + 1
        now = p._replace(n=max(p.n, item[1]), item=item)
        yield f"shows {item[0]} {item[1]}", w._replace(publisher=now, visible=w.visible | {item}, fresh=fresh)

    def victims(self, w):
        """Old items, the oldest first."""
        p = w.publisher
        if self.mutant == "keeps the last items":
            return sorted(w.visible, key=lambda item: item[1])[:1] if len(w.visible) > 2 else []
        fulls = [item[1] for item in w.visible if item[0] != "delta"]
        full = max(fulls, default=None) if self.mutant == "prunes behind visible" else p.known
        if full is None or p.item and self.mutant != "prunes behind visible":
            return []
        beside = {item[1] for item in w.visible if item[0] == "beside"}
        old = lambda item: item[1] < full or item[0] == "delta" and item[1] == full and full in beside
        return sorted(filter(old, w.visible), key=lambda item: (item[1], item[0]))[:1]

    def follower(self, visible, durable, follower):
        blind = self.mutant == "no fsync, no digests"
        firm = lambda item: durable if blind else durable | {item}
        applied = False
        for item in visible if follower else ():
            if item[0] == "delta" and item[1] > follower[0]:
                fits = item[4] == follower[1]
                if fits or blind and item[3] == follower[0]:
                    applied = True
                    yield f"applies {item[1]}", (item[1], item[2] if fits else GARBAGE), firm(item)
        if follower and self.mutant == "never loads a full again" or applied:
            return
        known = follower and follower[1] in {item[2] for item in visible}
        for item in visible:
            if item[0] != "delta" and (follower is None or item[2] != follower[1]):
                if follower is None or item[1] > follower[0] or not known:
                    yield f"loads {item[1]}", (item[1], item[2]), firm(item)

    def wrong(self, label, w):
        if w.follower and w.follower[1] == GARBAGE:
            return "never: the follower holds a state that was not published"
        if label == "conflict":
            return "alone: the publisher meets a version of its own number"
        if w.acknowledged and not any(n >= w.acknowledged for n in built(w.durable).values()):
            return "promise: an acknowledged version cannot be built from what is durable"
        if label.startswith(("applies", "loads")):
            if not any(item[2] == w.follower[1] and item in w.durable for item in w.visible):
                return "firm: the follower switched to a version that a power cut takes away"
        there, follower, durable = newest(w.visible), w.follower, w.durable
        for _ in range(2 * self.versions + 4):
            if not there or follower and follower[1] == there[1]:
                return None
            moves = sorted(self.follower(w.visible, durable, follower), key=lambda move: move[1][0])
            if not moves:
                break
            _, follower, durable = moves[-1]
        return f"reach: the follower alone gets to {follower}, and not to {there}"


def explore(model, limit):
    """(states, None or (what is wrong, trace))"""
    begin = World(None, frozenset(), frozenset(), None, 1, 0, 0)
    parents, queue = {begin: None}, deque([begin])
    while queue:
        world = queue.popleft()
        for label, after in model.steps(world):
            known = after in parents
            wrong = model.wrong(label, after)
            if known and not wrong:
                continue
            if not known:
                parents[after] = (world, label)
                queue.append(after)
            if wrong:
                trace, at = [label], world
                while parents[at]:
                    at, label = parents[at]
                    trace.append(label)
                return len(parents), (wrong, trace[::-1])
        if len(parents) > limit:
            return len(parents), ("the model is larger than its limit", [])
    return len(parents), None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--deep", action="store_true", help="more versions and two power cuts")
    parser.add_argument("--mutant", choices=MUTANTS, help="this one alone")
    given = parser.parse_args()
    size = (5, 2) if given.deep else (4, 1)
    passed = True
    for mutant in [given.mutant] if given.mutant else [None, *MUTANTS]:
        began = time.monotonic()
        # A mutant is looked for in the larger size, which it needs: it ends where it is found.
        states, found = explore(Model(mutant, *(size if mutant is None else (5, 2))), 3_000_000)
        good = (found is None) == (mutant is None)
        passed &= good
        verdict = ("caught" if mutant else "WRONG") if found else ("MISSED" if mutant else "ok")
        print(f"{mutant or 'the rules':26} {verdict:7} {states:8} states {time.monotonic() - began:6.1f} s", flush=True)
        if found:
            print(f"  {found[0]}\n  {' > '.join(found[1])}", flush=True)
    print(f"RESULT: {'pass' if passed else 'FAIL'}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
