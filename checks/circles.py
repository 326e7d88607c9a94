#!/usr/bin/env python3
"""Finds import cycles between the files of a crate: file A uses B, and B, perhaps through others, uses A.

  circles.py FOLDER...    fails when there is one; FOLDER holds lib.rs or main.rs

A module and the modules inside it count as one unit: `use super::X` of a re-export and `mod x; use x::Y` are
no cycle. Code below `#[cfg(test)]` and files of tests are skipped.
"""
import re, sys
from pathlib import Path


def modules(folder):
    """The files by module path: `staging/fence.rs` is ("staging", "fence")."""
    found = {}
    for file in sorted(folder.rglob("*.rs")):
        parts = file.relative_to(folder).with_suffix("").parts
        if "tests" in parts:
            continue
        if parts[-1] in ("mod", "lib", "main"):
            parts = parts[:-1]
        found[parts] = file
    return found


def spread(path):
    """`a::{b, c::{d}}` as `a::b`, `a::c::d`."""
    before, brace, rest = path.partition("{")
    if not brace:
        return [path]
    inside, items, item, depth = rest.rstrip()[:-1], [], "", 0
    for letter in inside + ",":
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            items.append(item)
            item = ""
        else:
            item += letter
    return [whole for item in items if item.strip() for whole in spread(before + item.strip())]


def imports(module, file, known):
    text = re.sub(r"#\[cfg\((?:all\()?test.*?\nmod \w+ \{.*\Z", "", file.read_text(), flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    for use in re.findall(r"\buse\s+((?:crate|super|self)::[^;]+);", text):
        for path in spread(re.sub(r"\s+", " ", use)):
            steps = re.sub(r" as \w+", "", path).replace(" ", "").split("::")
            at = () if steps[0] == "crate" else module
            steps = steps[1:] if steps[0] in ("crate", "self") else steps
            while steps and steps[0] == "super":
                at, steps = at[:-1], steps[1:]
            target = at + tuple(steps)
            while target and target not in known:
                target = target[:-1]
            # The crate itself, and a module's own house, are left out.
            if target and module[: len(target)] != target and target[: len(module)] != module:
                yield target


def circles(graph):
    """The strongly connected components of more than one module."""
    reach = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for target in graph[todo.pop()]:
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        reach[start] = seen
    found = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted(sorted("/".join(module) for module in circle) for circle in found)


def main():
    wrong = []
    for folder in map(Path, sys.argv[1:]):
        known = modules(folder)
        graph = {module: set(imports(module, file, known)) for module, file in known.items()}
        wrong += [f"{folder}: {', '.join(circle)}" for circle in circles(graph)]
    if wrong:
        sys.exit("files import each other in a circle:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
