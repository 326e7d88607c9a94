"""The table of a kit's results so far; it leaves out figures of a simulated driver."""
import json
import re
import statistics

GB = 1e9


def load(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def lines(path):
    """The objects of a file of JSON lines, without a last one that was cut off."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            pass
    return found


def number(value, form="{:.2f}", none="-"):
    return none if value is None else form.format(value)


def percent(value):
    return number(value if value is None else 100 * value, "{:+.2f} %")


def of(results):
    """The table as text."""
    stages = [load(path) for path in sorted(results.glob("*.json"), key=lambda path: path.stat().st_mtime)]
    stages = [stage for stage in stages if stage and "rcs" in stage]
    rows = ["=" * 100]
    for stage in stages:
        killed = f" killed after {stage['limit']} s: {', '.join(stage['killed'])}" * bool(stage["killed"])
        rows.append(f"{stage['stage']:9} rc={stage['rc']:<4} {stage['seconds']:>6} s {killed}")
    rows += ["-" * 100, *machine(results), *limits(results), *tests(results), *staging(results), *ways(results)]
    rows += [*peers(results, any(stage["simulated"] for stage in stages)), *drive(results), "=" * 100]
    return "\n".join(rows)


def machine(results):
    log = results / "machine.log"
    told = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line for line in told if line.startswith(("commit:", "kernels:", "gpu:", "libc:", "torch:"))]


def limits(results):
    told = load(results / "limits.result.json")
    if not told:
        return []
    rates = {
        "D2H": "d2h_bytes_per_second", "by chunks": "d2h_chunked_bytes_per_second",
        "registered": "d2h_registered_chunked_bytes_per_second", "H2D": "h2d_bytes_per_second", "D2D": "d2d_bytes_per_second",
    }  # fmt: skip
    figures = [f"{name} {number(told[key] and told[key] / GB, '{:.1f}')}" for name, key in rates.items()]
    return [f"limits, GB/s: {', '.join(figures)}; chunk {told['chunk']}"]


def tests(results):
    rows = []
    for name in ("suite", "kernels"):
        log = results / f"{name}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        if not text:
            continue
        ended = re.findall(r"^test result: .*$", text, re.M)
        passed, failed = (len(re.findall(rf"^test .* \.\.\. {word}", text, re.M)) for word in ("ok", "FAILED"))
        left_out = text.count("left out:")
        rows.append(f"{name}: {passed} passed, {failed} failed, {left_out} say that a part was left out{' (cut off)' * (not ended)}")
        rows += re.findall(r"^test .* \.\.\. FAILED$", text, re.M)[:12]
    return rows


def staging(results):
    rows = []
    for path in sorted(results.glob("*.result.json")):
        told = load(path)
        if not told or "saves_equal" not in told or "block_steps" not in told:
            continue
        kind = f"{told['workload']}, every {told['every']}, {'graph' if told['graph'] else 'eager'}"
        rows += [
            f"{path.name.removesuffix('.result.json')}: {kind}, arena {told['arena_bytes'] >> 20} MiB, scratch {told['scratch_slots']} slots",
            f"    saves {told['saves']}, equal {told['saves_equal']}, late chunks {told['late_chunks']}",
            f"    D2H of the limit: alone {number(told['fraction_of_limit'])}"
            f" ({number(told['fraction_low'])} to {number(told['fraction_high'])}),"
            f" computing {number(told['computing_fraction_of_limit'])}"
            f" ({number(told['computing_fraction_low'])} to {number(told['computing_fraction_high'])})",
            f"    stall {number(told['stall_ms_per_save'])} ms per save (noise {number(told['stall_ms_noise'])}), overhead"
            f" {percent(told['overhead_fraction'])} ({percent(told['overhead_low'])} to {percent(told['overhead_high'])}),"
            f" step {number(told['step_ms_without'])} ms",
            f"    calls, us p50/p99: save {number(told['save_us_p50'], '{:.0f}')}/{number(told['save_us_p99'], '{:.0f}')},"
            f" fence {number(told['fence_us_p50'], '{:.0f}')}/{number(told['fence_us_p99'], '{:.0f}')};"
            f" 4 bytes read beside a save {number(told['readback_us_p99'], '{:.0f}')} us p99,"
            f" else {number(told['readback_idle_us_p99'], '{:.0f}')}",
        ]
    return rows


def ways(results):
    rows = []
    for path in sorted(results.glob("*ways*.result.json")):
        told = load(path)
        if told:
            rows.append(f"{path.name.removesuffix('.result.json')}: {told['verdict']}; computing: {told['computing_verdict']}")
            names = [key.removesuffix("_fraction_of_limit") for key in told if key.endswith("_fraction_of_limit")]
            figures = [f"{name} {number(told[f'{name}_fraction_of_limit'])}" for name in names if "computing" not in name]
            rows.append(f"    of the limit: {', '.join(figures)}; saves {told['saves']}, equal {told['saves_equal']}")
    return rows


def peers(results, simulated):
    """One row for each system: medians of all saves but the first of each process."""
    rows = []
    for name in ("peers", "ring", "disk", "dcp"):
        groups = {}
        for line in lines(results / f"{name}.jsonl"):
            groups.setdefault((line["workload"], line["system"]), []).append(line)
        if groups and not simulated:
            columns = "stall ms", "every 10", "every 50", "blocked ms", "staged/bare", "durable s", "late", "saves", "right"
            rows.append(f"{name:20}" + "".join(f"{column:>12}" for column in columns))
        for (workload, system), group in groups.items():
            failed = [line["failed"] for line in group if "failed" in line]
            group = [line for line in group if line.get("save")]
            if not group:
                rows.append(f"{workload} {system:17} {'; '.join(failed) or 'no save but the first'}")
                continue

            def median(key, scale=1, form="{:.2f}"):
                values = [line[key] * scale for line in group if line.get(key) is not None]
                return number(statistics.median(values) if values else None, form)

            if simulated:  # no time measured beside it is a figure
                rows.append(f"{workload} {system:17} saves {len(group)}, right {all(line['right'] for line in group)}")
                continue
            told = [
                median("stall_ms"), median("overhead_10", 100, "{:.2f} %"), median("overhead_50", 100, "{:.2f} %"),
                median("blocked_ms"), median("staged_by_bare"), median("durable_s"), median("late_chunks", 1, "{:.0f}"),
                str(len(group)), str(all(line["right"] for line in group)),
            ]  # fmt: skip
            rows.append(f"{workload} {system:17}" + "".join(f"{each:>12}" for each in told) + " ".join(["", *failed]))
    return rows


def drive(results):
    rows = []
    for path in sorted(results.glob("*.jsonl")):
        for line in lines(path):
            if "scenario" in line:
                late = line.get("late chunks", "-")
                rows.append(
                    f"{path.stem}: {line['scenario']:15} {line['outcome']:8} saves {line['saves']:>4},"
                    f" wrong bytes {line['wrong_bytes']}, late chunks {late}"
                )
    return rows
