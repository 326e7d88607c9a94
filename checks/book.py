#!/usr/bin/env python3
"""Checks the links of a built book: every linked file and anchor exists, and the book contains every page of
docs/.

`book.py BOOK README` also checks the links of README into docs/.
"""

import html.parser
import pathlib
import re
import sys
import urllib.parse


class Page(html.parser.HTMLParser):
    """The anchors of a page, and what it refers to."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.update(given[name] for name in ("id", "name") if given.get(name))
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


def wrong(pages, page, link):
    """Says what is wrong with a link of a page, or None."""
    url = urllib.parse.urlsplit(link)
    if url.scheme or url.netloc:
        return None
    target = (page.parent / urllib.parse.unquote(url.path)).resolve() if url.path else page
    if not target.exists():
        return f"{link}: no such file"
    anchor = urllib.parse.unquote(url.fragment)
    if anchor and target in pages and anchor not in pages[target].anchors:
        return f"{link}: no such anchor"
    return None


def main():
    book, readme = (pathlib.Path(argument).resolve() for argument in sys.argv[1:3])
    pages = {path: Page(path.read_text()) for path in book.rglob("*.html")}
    # All chapters on one page: their links are those of the chapters, and their anchors get numbers.
    checked = [path for path in pages if path.name not in ("print.html", "404.html", "toc.html")]
    links = [(path.relative_to(book), wrong(pages, path, link)) for path in checked for link in pages[path].links]
    for link in re.findall(r"\]\(docs/([^)]+\.md(?:#[^)]*)?)\)", readme.read_text()):
        page = link.replace("README.md", "index.html").replace(".md", ".html")
        links.append((readme.name, wrong(pages, book / "README", page)))
    for chapter in (readme.parent / "docs").rglob("*.md"):
        name = chapter.relative_to(readme.parent / "docs")
        if chapter.name != "SUMMARY.md" and chapter.name != "README.md" and not (book / name.with_suffix(".html")).exists():
            links.append((name, "docs/SUMMARY.md does not name it"))
    faults = [f"{page}: {what}" for page, what in links if what]
    print("\n".join(faults) if faults else f"{len(checked)} pages, {len(links)} links and anchors")
    if faults or len(checked) < 20:
        sys.exit("book: links lead nowhere" if faults else "book: pages are missing")


main()
