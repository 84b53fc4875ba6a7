"""What is served is found by its module's name or by its file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgmcp.errors import TargetError
from pgmcp.session.target import load

SERVED = """
from beside_the_served import served

class Nested:
    name = "inner"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a server's file and one beside it; what is imported from there is forgotten again."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {**sys.modules}
    (tmp_path / "beside_the_served.py").write_text("served = 'from beside'\n")
    (tmp_path / "served_here.py").write_text(SERVED)
    yield tmp_path
    for name in sys.modules.keys() - before:
        del sys.modules[name]
    sys.modules.update(before)


def test_a_file_may_import_those_beside_it(folder: Path) -> None:
    assert load(f"{folder / 'served_here.py'}:served") == "from beside"


def test_a_module_is_found_in_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load("served_here:Nested.name") == "inner"


def test_a_file_is_loaded_that_has_the_name_of_another_module(folder: Path) -> None:
    (folder / "mcp.py").write_text("name = 'the file'\n")
    assert load(f"{folder / 'mcp.py'}:name") == "the file"


@pytest.mark.parametrize(
    "target",
    ["served_here", ":served", "served_here.py:", "nowhere.py:served", "no_such_module:served", "json:nothing"],
)
def test_what_cannot_be_loaded_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(TargetError, match=target):
        load(target)


def test_a_mistake_in_the_file_is_said(folder: Path) -> None:
    (folder / "mistaken.py").write_text("def broken(:\n")
    (folder / "needy.py").write_text("import a_module_that_is_not_installed\n")
    with pytest.raises(TargetError, match="invalid syntax"):
        load(f"{folder / 'mistaken.py'}:served")
    with pytest.raises(TargetError, match="a_module_that_is_not_installed"):
        load(f"{folder / 'needy.py'}:served")
