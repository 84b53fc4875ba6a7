"""What is served is found by its module's name or by its file, shadows nothing, and tells its own mistakes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from pgmcp.cli import main
from pgmcp.cli.options import PGMCP
from pgmcp.errors import TargetError
from pgmcp.session.target import check, created, load, target_of

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


def test_those_beside_a_file_may_import_it_back(folder: Path) -> None:
    (folder / "both_ways.py").write_text("own = []\nfrom both_ways_too import seen\n")
    (folder / "both_ways_too.py").write_text("import both_ways\nseen = both_ways.own\n")
    assert load(f"{folder / 'both_ways.py'}:own") is load("both_ways:seen")


def test_a_module_is_found_in_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load("served_here:Nested.name") == "inner"


def test_a_file_is_loaded_that_has_the_name_of_another_module(folder: Path) -> None:
    (folder / "mcp.py").write_text("name = 'the file'\n")
    assert load(f"{folder / 'mcp.py'}:name") == "the file"


def test_a_file_takes_no_name_from_the_standard_library(folder: Path) -> None:
    for name in ("json", "this", "wave"):  # loaded already, loaded nowhere, loaded nowhere and beside the served one
        (folder / f"{name}.py").write_text("name = 'the file'\n")
    assert load(f"{folder / 'json.py'}:name") == load(f"{folder / 'this.py'}:name") == "the file"
    found = {name: __import__(name).__file__ for name in ("json", "wave")}
    assert found == {"json": json.__file__, "wave": str(Path(json.__file__).parents[1] / "wave.py")}
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("served_here", "not of the form"),
        (":served", "not of the form"),
        ("served_here.py:", "not of the form"),
        ("nowhere.py:served", "there is no file {folder}/nowhere.py"),
        ("no_such_module:served", "there is no module no_such_module in {folder} or installed"),
        ("served_here.no:served", "'served_here' is not a package"),
        ("json:nothing", "json has no attribute nothing"),
        ("served_here.py:Nestedd", "served_here.py has no attribute Nestedd; did you mean Nested?"),
        ("served_here.py:Nested.names", "served_here.py has no attribute Nested.names; did you mean Nested.name?"),
        ("broken.py:served", "invalid syntax in {folder}/broken.py, line 2: def broken(:"),
        ("imports_broken.py:served", "invalid syntax in {folder}/broken.py, line 2: def broken(:"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / "broken.py").write_text("\ndef broken(:\n")
    (folder / "imports_broken.py").write_text("import broken\n")
    with pytest.raises(TargetError) as caught:
        load(target)
    text = str(caught.value)
    assert said.format(folder=folder) in text
    assert target in text
    assert "\n" not in text
    assert not caught.value.trace


def test_what_can_be_seen_without_running_it_is_refused_at_once(folder: Path) -> None:
    (folder / "broken.py").write_text("\ndef broken(:\n")
    (folder / "fails.py").write_text("1 / 0\n")
    nowhere = (f"{folder}/nowhere.py:mcp", "no_such_module:mcp")
    for target in ("served_here", *nowhere, f"{folder}/broken.py:mcp"):
        with pytest.raises(TargetError):
            check(target)
    check(f"{folder}/fails.py:mcp")


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("{}['MISSING_HERE']\n", "KeyError: 'MISSING_HERE'"),
        ("import a_module_that_is_not_installed\n", "No module named 'a_module_that_is_not_installed'"),
        ("from beside_the_served import nothing\n", "cannot import name 'nothing' from 'beside_the_served'"),
        ("from . import beside_the_served\n", "attempted relative import with no known parent package"),
        ("import json\njson.no_such\n", "module 'json' has no attribute 'no_such'"),
        ("open('/nowhere/at/all')\n", "No such file or directory: '/nowhere/at/all'"),
    ],
)
def test_a_mistake_in_the_file_is_told_by_its_own_trace(folder: Path, code: str, last: str) -> None:
    (folder / "mistaken.py").write_text(code)
    (folder / "imports_mistaken.py").write_text("import mistaken\n")
    for name, files in (("mistaken", ["mistaken"]), ("imports_mistaken", ["imports_mistaken", "mistaken"])):
        with pytest.raises(TargetError, match=f"{name}.py:served") as caught:
            load(f"{folder / name}.py:served")
        lines = caught.value.trace.splitlines()
        ran = [line.split('"')[1] for line in lines if line.startswith("  File")]
        assert ran == [f"{folder}/{file}.py" for file in files]
        assert last in lines[-1]


def test_a_relative_import_is_told_the_module_s_name(folder: Path) -> None:
    package = folder / "outer" / "inner"
    package.mkdir(parents=True)
    for part in (package, package.parent):
        (part / "__init__.py").touch()
    (package / "served.py").write_text("from . import other\n")
    with pytest.raises(TargetError, match=r"outer\.inner\.served:mcp"):
        load(f"{package / 'served.py'}:mcp")


FACTORIES = """
from mcp.server.mcpserver import MCPServer

def make():
    return MCPServer("made")

async def make_later():
    return MCPServer("made later")

def fails():
    return 1 / 0

async def fails_later():
    return 1 / 0

def needs(argument): ...

made = make()
"""


def test_a_factory_may_be_asynchronous(folder: Path) -> None:
    (folder / "factories.py").write_text(FACTORIES)
    with asyncio.Runner() as runner:
        names = [
            target_of(created(f"{folder / 'factories.py'}:{name}", runner.run), "/mcp").name
            for name in ("make", "make_later")
        ]
        assert names == ["made", "made later"]
        for name in ("fails", "fails_later"):
            with pytest.raises(TargetError, match="ZeroDivisionError") as caught:
                created(f"{folder / 'factories.py'}:{name}", runner.run)
            assert caught.value.trace.count("File") == 1
        for name, said in (("needs", "'argument'"), ("made", "without --factory")):
            with pytest.raises(TargetError, match=said) as caught:
                created(f"{folder / 'factories.py'}:{name}", runner.run)
            assert not caught.value.trace
    with pytest.raises(TargetError, match="--factory"):
        target_of(load(f"{folder / 'factories.py'}:make"), "/mcp")
    with pytest.raises(TargetError, match=r"is of type module"):
        target_of(json, "/mcp")


def test_serve_and_up_print_the_user_s_trace_and_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "mistaken.py").write_text("import os\nos.environ['MISSING_HERE']\n")
    (folder / "broken.py").write_text("\ndef broken(:\n")
    monkeypatch.setenv("PGMCP_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    ran = CliRunner().invoke(main, ["serve", f"{folder}/mistaken.py:mcp"])
    assert ran.exit_code == 2
    first, file, *_, last, line = ran.stderr.splitlines()
    assert first == "Traceback (most recent call last):"
    assert file == f'  File "{folder}/mistaken.py", line 2, in <module>'
    assert last == "KeyError: 'MISSING_HERE'"
    assert line == f"Error: The target '{folder}/mistaken.py:mcp' cannot be loaded: KeyError: 'MISSING_HERE'."
    for command in (["up"], ["serve", "--workers", "2"]):
        ran = CliRunner().invoke(main, [*command, f"{folder}/broken.py:mcp"])
        assert (ran.exit_code, ran.stderr.count("\n")) == (2, 1)
        assert "invalid syntax" in ran.stderr


def test_nodes_of_up_and_workers_import_nothing_from_the_working_directory_by_chance(folder: Path) -> None:
    (folder / "json.py").write_text("raise RuntimeError('shadowed')\n")
    ran = subprocess.run([*PGMCP, "--version"], cwd=folder, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
