#!/usr/bin/env python3
"""Runs a command beside servers of object stores: `run.py TOOLS COMMAND...`.

TOOLS is where `.ci/install` puts its tools. The servers are moto and s3s-fs, which implement S3, and Azurite.
Each listens at a free port of the loopback interface, and keeps its data in memory or in a temporary
directory. The command finds these variables in its environment

    ASHORE_TEST_MOTO, ASHORE_TEST_S3S     http://HOST:PORT of a server of S3, with the bucket `bucket`; key id and secret are in
    ASHORE_TEST_KEY, ASHORE_TEST_SECRET   these: s3s-fs checks signatures, moto does not
    ASHORE_TEST_AZURITE                   http://HOST:PORT/ACCOUNT of a server of Azure, with the container `bucket`, and
    ASHORE_TEST_ACCOUNT, ASHORE_TEST_ACCOUNT_KEY
    ASHORE_TEST_STOCK, ASHORE_TEST_BOTO   Pythons: with safetensors and torch, and with boto3

The exit status is the command's; 2 when a server does not start, 3 when the command takes longer than --minutes.
"""
import argparse
import base64
import email.utils
import hmac
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

KEY, SECRET = "AKIAASHORETESTS00000", "of-the-tests/not-a-secret-of-any-store"
# Azurite's own, which its documentation names.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def commands(tools, root):
    """Each server's command, and the port that it listens at."""
    stores, ports = tools / "stores", {name: free_port() for name in ("moto", "s3s", "azurite")}
    (root / "s3s" / "bucket").mkdir(parents=True)
    azurite = stores / "azurite/node_modules/azurite/dist/src/blob/main.js"
    return {
        "moto": [stores / "bin/python", "-m", "moto.server", "-H", "127.0.0.1", "-p", ports["moto"]],
        "s3s": [tools / "bin/s3s-fs", "--host", "127.0.0.1", "--port", ports["s3s"], "--access-key", KEY, "--secret-key", SECRET,
                root / "s3s"],
        "azurite": [stores / "bin/node", azurite, "--blobHost", "127.0.0.1", "--blobPort", ports["azurite"], "--inMemoryPersistence",
                    "--silent", "--disableTelemetry"],
    }, ports


def make_container(port):
    """The one request to Azurite that no client of the tests makes."""
    date = email.utils.formatdate(usegmt=True)
    headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
    text = "PUT" + "\n" * 12 + "".join(f"{k}:{v}\n" for k, v in headers.items())
    text += f"/{ACCOUNT}/{ACCOUNT}/bucket\nrestype:container"
    digest = hmac.new(base64.b64decode(ACCOUNT_KEY), text.encode(), "sha256").digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"http://127.0.0.1:{port}/{ACCOUNT}/bucket?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()


def wait_for(name, process, port, log, plain=True):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            if plain:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
            else:
                socket.create_connection(("127.0.0.1", port), 5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    print(f"stores: {name} does not start:\n{log.read_text()[-2000:]}", file=sys.stderr)
    sys.exit(2)


def end(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--minutes", type=float, default=5)
    arguments.add_argument("tools", type=pathlib.Path)
    arguments.add_argument("command", nargs=argparse.REMAINDER)
    given = arguments.parse_args()
    # So that the servers are ended, too, when this program is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
    started = []
    with tempfile.TemporaryDirectory() as root:
        root = pathlib.Path(root)
        try:
            each, ports = commands(given.tools, root)
            for name, command in each.items():
                log = root / f"{name}.log"
                # A server's answers are no news, and moto writes a line for each.
                with open(log, "wb") as output:
                    started.append(subprocess.Popen([str(x) for x in command], stdin=subprocess.DEVNULL, stdout=output, stderr=output))
                wait_for(name, started[-1], ports[name], log)
            urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{ports['moto']}/bucket", method="PUT")).close()
            make_container(ports["azurite"])
            env = {
                "ASHORE_TEST_MOTO": f"http://127.0.0.1:{ports['moto']}", "ASHORE_TEST_S3S": f"http://127.0.0.1:{ports['s3s']}",
                "ASHORE_TEST_KEY": KEY, "ASHORE_TEST_SECRET": SECRET,
                "ASHORE_TEST_AZURITE": f"http://127.0.0.1:{ports['azurite']}/{ACCOUNT}",
                "ASHORE_TEST_ACCOUNT": ACCOUNT, "ASHORE_TEST_ACCOUNT_KEY": ACCOUNT_KEY,
                "ASHORE_TEST_STOCK": str(given.tools / "stock/bin/python"), "ASHORE_TEST_BOTO": str(given.tools / "stores/bin/python"),
            }
            # A group of its own, so that what it has started ends with it.
            run = subprocess.Popen(given.command, env=os.environ | env, start_new_session=True)
            try:
                code = run.wait(given.minutes * 60)
            except subprocess.TimeoutExpired:
                print(f"stores: the command takes longer than {given.minutes:g} minutes", file=sys.stderr)
                code = 3
            finally:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)
                    run.wait()
        finally:
            for server in started:
                end(server)
    sys.exit(code)


if __name__ == "__main__":
    main()
