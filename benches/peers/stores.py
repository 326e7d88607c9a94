#!/usr/bin/env python3
"""Uploads and downloads the same number of bytes with ashore and with other clients of S3, in turn, to one server. See README.md.

    stores.py --tools TOOLS --ashore PROGRAM --dir SCRATCH [--mib N] [--rounds N] [--tls] [--seed N] [--json]

TOOLS is where `.ci/install` puts its tools: the server is their s3s-fs, with its files in SCRATCH. PROGRAM is the benchmark `store`, built
for release: it saves and restores, and compares what it read. With --tls stunnel stands before the server (Debian's package `stunnel4`),
with a CA made for the run. Run it with the Python in TOOLS/stores, which can make certificates.
"""
import argparse
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile

import report

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "checks/stores"))
import run as servers
import tls

OURS = "ashore"
# Over plain HTTP the default is to sign a SHA-256 of each body.
UNSIGNED = "ashore, AWS_UNSIGNED_PAYLOAD"
PEERS = ["awscrt", "s3torchconnector", "boto3"]
COLUMNS = [
    ("MB/s", "speed", "{:.0f}"),
    ("times ashore's", "speed_ratio", "{:.2f}"),
    ("CPU s/GB", "cpu", "{:.2f}"),
    ("times ashore's", "cpu_ratio", "{:.2f}"),
    ("memory grew MiB", "grew", "{:.0f}"),
]
# Where the CRT that s3torchconnector is built with looks for authorities, on Debian.
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tools", type=pathlib.Path, required=True)
    parser.add_argument("--ashore", help="the benchmark `store`, built for release")
    parser.add_argument("--dir", type=pathlib.Path, required=True)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def secured(root, port):
    """stunnel before the server at this port: its process, its URL, and the CA that signed it."""
    tls.write_certificates(root)
    accept = servers.free_port()
    (root / "stunnel.conf").write_text(
        f"foreground = yes\npid =\n[s3]\naccept = 127.0.0.1:{accept}\nconnect = 127.0.0.1:{port}\n"
        f"cert = {root / 'server.pem'}\n")
    log = open(root / "stunnel.log", "wb")
    return subprocess.Popen(["stunnel", str(root / "stunnel.conf")], stdout=log, stderr=log), f"https://localhost:{accept}", root / "ca.pem"


def sample(command, what, url, key, length, ca):
    """What one client measured, as figures of a table."""
    full = [*command, what, url, "bucket", key, str(length), *([str(ca)] if ca else [])]
    if ca and command[-1] == "s3torchconnector":
        # Nothing tells it of a CA: it gets one in the place of the machine's.
        script = f'mount --bind "$0" {AUTHORITIES} && exec "$@"'
        full = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(ca), *full]
    keys = {"AWS_ACCESS_KEY_ID": servers.KEY, "AWS_SECRET_ACCESS_KEY": servers.SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    done = subprocess.run(full, env=os.environ | keys, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no reason"])[-1]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    gb = length / 1e9
    return {"speed": gb * 1e3 / found["seconds"], "cpu": found["cpu_seconds"] / gb, "grew": found["grew"] / 2**20, "sum": found["sum"]}


def ours(program, url, key, length, ca, more):
    """What the benchmark `store` measured: an upload and a download by one process, which holds the data, and then twice."""
    env = {"AWS_ACCESS_KEY_ID": servers.KEY, "AWS_SECRET_ACCESS_KEY": servers.SECRET, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": url}
    env |= {"SSL_CERT_FILE": str(ca)} if ca else {"AWS_ALLOW_HTTP": "true"}
    env |= more
    command = [program, f"s3://bucket/{key}", str(length >> 20), "1"]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return {what: {"failed": (done.stderr.strip().splitlines() or ["no reason"])[-1]} for what in ("put", "get")}
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {
        one["what"]: {"speed": one["mb_per_s"], "cpu": one["cpu_s_per_gb"], "grew": one["peak_mib"] - (length >> 20) * copies, "sum": "compared"}
        for one, copies in zip(found, (1, 2))
    }  # fmt: skip


def measure(args, url, ca):
    """The samples of each client in each round, by direction."""
    clients = {name: [str(args.tools / "stores/bin/python"), str(pathlib.Path(__file__).with_name("store_client.py")), name] for name in PEERS}
    settings = {OURS: {}, UNSIGNED: {"AWS_UNSIGNED_PAYLOAD": "true"}}
    if args.ashore:
        clients |= {OURS: None} if ca else dict.fromkeys(settings)
    order, taken = random.Random(args.seed), {"put": [], "get": []}
    for _ in range(args.rounds):
        names = list(clients)
        order.shuffle(names)
        rounds = {what: {} for what in taken}
        for name in names:
            key, length = "of-" + name.replace(", ", "-"), args.mib << 20
            mine = ours(args.ashore, url, key, length, ca, settings[name]) if name in settings else None
            for what in taken:
                found = mine[what] if mine else sample(clients[name], what, url, key, length, ca)
                rounds[what][name] = found
                print(f"{what} {name}: {found}", file=sys.stderr, flush=True)
            sums = {rounds[what][name].get("sum") for what in taken}
            if len(sums) != 1:
                sys.exit(f"{name} did not get back what it had put: {sums}")
        for what in taken:
            compare(rounds[what])
            taken[what].append(rounds[what])
    return taken


def compare(clients):
    """Adds to each sample of one round how it relates to that of `ashore`: the load of the machine is the same for both."""
    own = clients.get(OURS, {})
    for found in clients.values():
        for field in ("speed", "cpu"):
            if field in found and field in own:
                found[f"{field}_ratio"] = found[field] / own[field]


def main():
    args = arguments()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=args.dir) as root:
        root, started = pathlib.Path(root), []
        try:
            commands, ports = servers.commands(args.tools, root)
            log = root / "s3s.log"
            with open(log, "wb") as output:
                started.append(subprocess.Popen([str(x) for x in commands["s3s"]], stdout=output, stderr=output))
            servers.wait_for("s3s", started[-1], ports["s3s"], log)
            url, ca = f"http://127.0.0.1:{ports['s3s']}", None
            if args.tls:
                tunnel, url, ca = secured(root, ports["s3s"])
                started.append(tunnel)
                servers.wait_for("stunnel", tunnel, url.rsplit(":")[-1], root / "stunnel.log", plain=False)
            taken = measure(args, url, ca)
        finally:
            for process in reversed(started):
                servers.end(process)
    if args.json:
        print(json.dumps(taken))
        return
    print(f"{args.mib} MiB, {'TLS' if args.tls else 'plain HTTP'}, {args.rounds} rounds, {os.cpu_count()} cores, {platform.machine()}, "
          f"load {load:.1f} before and {os.getloadavg()[0]:.1f} after\n")
    failed = False
    for what, rounds in taken.items():
        found = {}
        for name in rounds[0]:
            samples = [one[name] for one in rounds]
            well = [one for one in samples if "failed" not in one]
            failed |= len(well) < len(samples)
            fields = [field for _, field, _ in COLUMNS if well and all(field in one for one in well)]
            found[name] = {field: report.spread([one[field] for one in well]) for field in fields}
            found[name] |= {"n": len(well), "failures": [one["failed"] for one in samples if "failed" in one]}
        print(f"{what}\n\n{report.table(dict(sorted(found.items())), COLUMNS)}\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
