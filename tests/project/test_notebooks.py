"""What nbval does not check: every notebook was run, has clean output, and is easy to read."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbstripout import strip_output

from ..support.project import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FORBIDDEN = {
    "a path": r"(/(home|tmp|root|Users|var)/|[A-Z]:\\)",
    "an address or a port": r"(127\.0\.0\.1|localhost|::1)",
    "a token": r"eyJ[\w.-]{20}",
    "a password in a URL": r"://[^\s/]*:[^\s/]*@",
}
Notebook = Any


def code_cells(notebook: Notebook) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Notebook) -> Iterator[str]:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield from (str(text) for name, text in output.get("data", {}).items() if name.startswith("text"))
            yield output.get("text", "")


def ran_in_order(notebook: Notebook) -> None:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def shows_no_error(notebook: Notebook) -> None:
    kinds = {output.output_type for cell in code_cells(notebook) for output in cell.outputs}
    assert "error" not in kinds


def has_quiet_outputs(notebook: Notebook) -> None:
    for text in outputs(notebook):
        for what, pattern in FORBIDDEN.items():
            assert not re.search(pattern, text), f"{what} in: {text}"


def has_outputs_as_wide_as_a_page(notebook: Notebook) -> None:
    # A wider line has to be scrolled in JupyterLab, and nobody reads its end.
    assert [line for text in outputs(notebook) for line in text.splitlines() if len(line) > 100] == []


def has_outputs_in_one_piece(notebook: Notebook) -> None:
    # Output that is printed at two moments is stored in two pieces, with a gap between them where no JavaScript runs.
    names = [[o.name for o in cell.outputs if o.output_type == "stream"] for cell in code_cells(notebook)]
    assert [each for each in names if len(each) > len(set(each))] == []


def has_one_title_and_it_comes_first(notebook: Notebook) -> None:
    titles = [cell for cell in notebook.cells if cell.cell_type == "markdown" and re.search(r"(?m)^# ", cell.source)]
    assert titles == [notebook.cells[0]]


def has_short_cells(notebook: Notebook) -> None:
    assert [cell.source for cell in code_cells(notebook) if len(cell.source.splitlines()) > 8] == []
    assert [line for cell in code_cells(notebook) for line in cell.source.splitlines() if len(line) > 100] == []
    assert 20 <= len(notebook.cells) <= 40


def stores_a_token_soon(notebook: Notebook) -> None:
    logs_in = r"\.(store_token|get_or_create_token|store_token_batch)\(|StoredTokenAuth\("
    first = [bool(re.search(logs_in, cell.source)) for cell in code_cells(notebook)].index(True)
    assert first <= 3, "at most four cells of code, and the last of them stores a token"


def ends_with_something_to_try(notebook: Notebook) -> None:
    titles = [place for place, cell in enumerate(notebook.cells) if "## Try it yourself" in cell.source]
    assert len(titles) == 1
    questions = re.findall(r"(?m)^(\d)\. ", notebook.cells[titles[0]].source.partition("## Try it yourself")[2])
    answers = [re.findall(r"(?m)\A# (\d)\. ", cell.source) for cell in notebook.cells[titles[0] + 1 :]]
    assert questions == [number for found in answers for number in found], "each question has an answer that runs"
    assert 2 <= len(questions) <= 3


def hides_nothing_by_a_semicolon(notebook: Notebook) -> None:
    # JupyterLab then hides the value but nbval stores it, so anything could end up in the committed file.
    assert [cell.source for cell in code_cells(notebook) if cell.source.rstrip().endswith(";")] == []


def has_more_prose_than_code(notebook: Notebook) -> None:
    prose = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert prose > sum(len(cell.source.split()) for cell in code_cells(notebook))


def has_links_that_lead_somewhere(notebook: Notebook) -> None:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (NOTEBOOKS[0].parent / link).exists(), link


def is_as_nbstripout_leaves_it(notebook: Notebook) -> None:
    stripped = strip_output(copy.deepcopy(notebook), True, True, True, extra_keys=["cell.metadata.scrolled"])
    assert stripped == notebook


CHECKS: list[Callable[[Notebook], None]] = [
    ran_in_order,
    shows_no_error,
    has_quiet_outputs,
    has_outputs_as_wide_as_a_page,
    has_outputs_in_one_piece,
    has_one_title_and_it_comes_first,
    has_short_cells,
    stores_a_token_soon,
    ends_with_something_to_try,
    hides_nothing_by_a_semicolon,
    has_more_prose_than_code,
    has_links_that_lead_somewhere,
    is_as_nbstripout_leaves_it,
]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook(path: Path, check: Callable[[Notebook], None]) -> None:
    check(nbformat.read(path, as_version=4))


def test_each_check_fails_on_a_bad_notebook() -> None:
    bad = nbformat.v4.new_notebook()
    error = nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
    shown = nbformat.v4.new_output("stream", text="postgresql://user:password@127.0.0.1:5432 " * 3)
    bad.cells = [
        nbformat.v4.new_markdown_cell("## No title\n[gone](nowhere.ipynb)"),
        nbformat.v4.new_code_cell(
            "pass\n" * 11 + ";", execution_count=2, outputs=[error, shown, shown], metadata={"scrolled": True}
        ),
    ]
    for check in CHECKS:
        with pytest.raises((AssertionError, ValueError)):
            check(bad)


@pytest.mark.parametrize("text", ["/tmp/x", "C:\\x", "127.0.0.1:80", "localhost", "eyJ" + "x" * 20, "x://u:p@h"])
def test_each_forbidden_thing_is_found(text: str) -> None:
    bad = nbformat.v4.new_notebook()
    bad.cells = [nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("stream", text=text)])]
    with pytest.raises(AssertionError):
        has_quiet_outputs(bad)
