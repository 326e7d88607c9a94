"""Tables of medians and quartiles."""
import statistics


def spread(values):
    """Median and quartiles."""
    values = sorted(values)
    low, middle, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def sooner(rounds, system, ours):
    """How many times later than ours this system is durable, round by round; and the same in shares of the disk's limit."""
    pairs = [(taken[system], taken[ours]) for taken in rounds if good(taken, system) and good(taken, ours)]
    times = [peer["durable_seconds"] / own["durable_seconds"] for peer, own in pairs]
    shares = [own["fraction_of_limit"] / peer["fraction_of_limit"] for peer, own in pairs]
    return {"sooner": spread(times), "sooner_by_limit": spread(shares)} if pairs else {}


def good(taken, system):
    return system in taken and "failed" not in taken[system]


def summary(rounds, system, ours, fields):
    """The spread of every field of a system's samples."""
    samples = [taken[system] for taken in rounds if system in taken]
    well = [sample for sample in samples if "failed" not in sample]
    found = {field: spread([sample[field] for sample in well]) for field in fields} if well else {}
    failures = [sample["failed"] for sample in samples if "failed" in sample]
    return found | sooner(rounds, system, ours) | {"n": len(well), "failures": failures}


def cell(value, form):
    if value is None:
        return "-"
    middle = form.format(value["median"])
    return middle if value["n"] == 1 else f"{middle} ({form.format(value['low'])} to {form.format(value['high'])})"


def table(summaries, columns):
    """Markdown; columns are (title, field, form)."""
    rows = [["system", "n", *(title for title, _, _ in columns)]]
    for system, found in summaries.items():
        n = f"{found['n']}" + (f", {len(found['failures'])} failed" if found["failures"] else "")
        rows.append([system, n, *(cell(found.get(field), form) for _, field, form in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
