#!/usr/bin/env python3
"""Saves the same state with ashore and with its peers, in turn, each beside the disk's own limit. See README.md.

    run.py --envs DIR --dir SCRATCH --ashore PROGRAM [--workload large|small|adam-1b] [--scale F] [--rounds N]
           [--systems A,B,...] [--warm whole|tiny] [--seed N] [--interference] [--json]
"""
import argparse
import json
import os
import pathlib
import platform
import random
import shutil
import signal
import sys

import report
import samples
import workload

SAVES = [
    ("blocked s", "blocked_seconds", "{:.3f}"),
    ("tensors free s", "free_seconds", "{:.3f}"),
    ("done s", "done_seconds", "{:.2f}"),
    ("durable s", "durable_seconds", "{:.2f}"),
    ("of the limit", "fraction_of_limit", "{:.2f}"),
    ("CPU s/GB", "cpu_seconds_per_gb", "{:.2f}"),
    ("peak / state", "peak_share", "{:.2f}"),
    ("ashore sooner", "sooner", "{:.2f}x"),
    ("by limits", "sooner_by_limit", "{:.2f}x"),
]
LOOPS = [
    ("rounds/s before", "before", "{:.0f}"),
    ("during", "during", "{:.0f}"),
    ("loss", "loss", "{:.0%}"),
    ("save s", "save_seconds", "{:.2f}"),
    ("loop seconds lost", "lost_seconds", "{:.2f}"),
]
NOTHING = "nothing"


def arguments():
    parser = argparse.ArgumentParser(description="ashore and its peers, side by side")
    parser.add_argument("--envs", type=pathlib.Path, required=True, help="where setup.sh made the environments")
    parser.add_argument("--dir", type=pathlib.Path, required=True, help="an existing directory on the disk to measure")
    parser.add_argument("--ashore", help="the program, built for release")
    parser.add_argument("--workload", choices=workload.NAMES, default="large")
    parser.add_argument("--scale", type=float, default=1.0, help="a share of the workload")
    parser.add_argument("--warm", choices=("whole", "tiny"), default="whole", help="what peers save before they are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(samples.NAMES))
    parser.add_argument("--seed", type=int, default=0, help="of the order of systems in each round")
    parser.add_argument("--interference", action="store_true", help="time a loop beside the saves instead")
    parser.add_argument("--json", action="store_true", help="one JSON value with every sample on stdout")
    args = parser.parse_args()
    if unknown := set(args.systems) - set(samples.NAMES):
        parser.error(f"unknown systems: {', '.join(sorted(unknown))}; known: {', '.join(samples.NAMES)}")
    if samples.OURS in args.systems and not args.ashore:
        parser.error("ashore is to be measured, so --ashore must say where the program is")
    return args


def take(bench, system, interference):
    """A sample; one that failed says why."""
    try:
        if interference:
            return bench.interference(None if system == NOTHING else system)
        taken = bench.sample(system)
    except samples.Failed as failure:
        return {"failed": str(failure)}
    taken["cpu_seconds_per_gb"] = taken["cpu_seconds"] / taken["bytes"] * 1e9
    taken["peak_share"] = taken["peak_bytes"] / taken["bytes"]
    return taken


def measure(bench, args):
    """Takes all samples: rounds, each a map from system to sample, in the order taken."""
    order, rounds = random.Random(args.seed), []
    systems = args.systems + ([NOTHING] if args.interference else [])
    for number in range(args.rounds):
        taken = {}
        for system in order.sample(systems, len(systems)):
            taken[system] = sample = take(bench, system, args.interference)
            what = {name: round(value, 3) for name, value in sample.items() if isinstance(value, float) and name != "began"}
            print(f"round {number + 1} {system}: {sample.get('failed') or what}", file=sys.stderr, flush=True)
        rounds.append(taken)
    return systems, rounds


def heading(bench, args, load, rounds):
    """The machine and versions of the figures."""
    every = [sample for taken in rounds for sample in taken.values()]
    limits = [bench.bytes / seconds for sample in every for seconds in sample.get("limit_seconds", [])]
    versions = {}
    for sample in every:
        versions |= sample.get("versions", {})
    return {
        "workload": args.workload,
        "scale": args.scale,
        "warm": args.warm,
        "tensors": len(bench.tensors),
        "bytes": bench.bytes,
        "rounds": args.rounds,
        "seed": args.seed,
        "machine": f"{os.cpu_count()} processors, {platform.system()} {platform.release()}",
        "load_before": load,
        "load_after": os.getloadavg()[0],
        "limit_bytes_per_second": report.spread(limits) if limits else None,
        "versions": dict(sorted(versions.items())),
    }


def show(top, summaries, columns):
    size = f"{top['tensors']} tensors, {top['bytes'] / 1e9:.2f} GB"
    print(f"{top['workload']} x {top['scale']:g}: {size}; {top['warm']} state saved to warm up")
    print(f"{top['rounds']} rounds in random order from seed {top['seed']}; medians (quartiles)")
    print(f"{top['machine']}, load {top['load_before']:.1f} to {top['load_after']:.1f}")
    if limit := top["limit_bytes_per_second"]:
        low, middle, high = (f"{limit[name] / 1e9:.2f}" for name in ("low", "median", "high"))
        print(f"limit {middle} GB/s ({low} to {high})")
    if top["versions"]:
        print(", ".join(f"{name} {version}" for name, version in top["versions"].items()))
    print("\n" + report.table(summaries, columns))
    for system, found in summaries.items():
        for failure in found["failures"]:
            print(f"{system} failed: {failure}")


def main():
    args = arguments()
    bench = samples.Bench(args)
    if shutil.disk_usage(bench.scratch).free < 3 * bench.bytes:
        sys.exit(f"{bench.scratch} has no room for 3 times {bench.bytes} bytes")
    # SIGTERM ends the program in order: processes end, files are deleted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    load = os.getloadavg()[0]
    systems, rounds = measure(bench, args)
    columns = LOOPS if args.interference else SAVES
    fields = [field for _, field, _ in columns if not field.startswith("sooner")]
    ours = None if args.interference else samples.OURS
    summaries = {system: report.summary(rounds, system, ours, fields) for system in systems}
    top = heading(bench, args, load, rounds)
    if args.json:
        print(json.dumps({**top, "systems": summaries, "samples": rounds}, indent=1))
    else:
        show(top, summaries, columns)
    return 1 if any(found["failures"] for found in summaries.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
