"""What the site needs beside Sphinx: pages of the linked source files, and lists of inherited methods.

A claim links to the test that shows it. On GitHub that link opens the file. Here it opens a page with the file's code,
at the test. (Sphinx alone would offer the file as a download, and `sphinx.ext.viewcode` knows documented modules only.)
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

import upstox_db_examples
from upstox_db_examples import TokenStorage

logger = logging.getLogger(__name__)


def link_pages(app: Sphinx, doctree: nodes.document) -> None:
    """Let links to a heading of a notebook and links to source files lead to pages of the site."""
    docname = app.env.docname
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link.get("reftargetid") and str(app.env.doc2path(link["reftarget"])).endswith(".ipynb"):
            # Jupyter keeps capitals and commas in an anchor; here it is made as for any other page.
            link["reftargetid"] = re.sub(r"[^\w-]", "", link["reftargetid"].lower())
    for link in list(doctree.findall(addnodes.download_reference)):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(docname), link["reftarget"]))
        file, wanted = Path(app.srcdir, path), link.get("reftitle", "")
        if not file.is_file() or (wanted and f"def {wanted}(" not in file.read_text()):
            logger.warning("the link to %s %s leads nowhere", path, wanted, location=link)
            continue
        linked_files(app).add(path)
        target = app.builder.get_relative_uri(docname, f"code/{path}") + (f"#{wanted}" if wanted else "")
        link.replace_self(nodes.reference("", "", *link.children, refuri=target, reftitle=wanted or path))


def linked_files(app: Sphinx) -> set[str]:
    """Return the source files that some page links to, relative to the repository."""
    found: set[str] = app.env.__dict__.setdefault("site_linked_files", set())
    return found


def merge_linked_files(app: Sphinx, _: object, __: object, other: Any) -> None:
    linked_files(app).update(other.__dict__.get("site_linked_files", ()))


def make_code_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield a page for each linked source file, with an anchor at each function and class."""
    for path in sorted(linked_files(app)):
        text = Path(app.srcdir, path).read_text()
        try:
            lexer = get_lexer_for_filename(path).aliases[0]
        except ClassNotFound:
            lexer = "text"
        highlighted: str = app.builder.highlighter.highlight_block(text, lexer)  # type: ignore[attr-defined]
        before, _, code = highlighted.partition("<pre>")
        shown = code.split("\n")
        for number, line in enumerate(text.lstrip("\n").split("\n")):
            if named := re.match(r"\s*(?:def|class) (\w+)", line):
                shown[number] = f'<span id="{named[1]}"></span>{shown[number]}'
        body = f"<h1>{path}</h1>\n{before}<pre>" + "\n".join(shown)
        yield f"code/{path}", {"title": path, "body": body}, "page.html"


class Inherited(Directive):
    """`.. inherited:: Class`: a table of the methods that this store has from `TokenStorage`, each with a link."""

    required_arguments = 1
    has_content: ClassVar[bool] = False

    def run(self) -> list[nodes.Node]:
        store = getattr(upstox_db_examples, self.arguments[0])
        names = [name for name in vars(TokenStorage) if name[0] != "_" and name not in vars(store)]
        text = ["", ".. autosummary::", "   :signatures: none", "", *(f"   ~TokenStorage.{name}" for name in names), ""]
        parent = nodes.Element()
        self.state.nested_parse(StringList(text, source="inherited"), self.content_offset, parent)
        return parent.children


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("inherited", Inherited)
    app.connect("doctree-read", link_pages, priority=100)  # before Sphinx collects downloads
    app.connect("env-merge-info", merge_linked_files)
    app.connect("html-collect-pages", make_code_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
