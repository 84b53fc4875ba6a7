"""The wheel that the Dockerfile builds, installed by itself: what users run, not the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.harness.compose import of
from tests.harness.processes import REPOSITORY

UV = Path(sys.executable).parent / "uv"
LEFT_OUT = shutil.ignore_patterns("__pycache__")


def copied() -> list[str]:
    """What the Dockerfile takes from the checkout."""
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", of("Dockerfile").read_text(), re.MULTILINE)
    return [name for line in lines for name in line.split()]


def installed(folder: Path) -> Path:
    """Build the wheel of what the Dockerfile copies, and install it; the folder of its commands.

    The environment sees the packages of the tests' own, so that nothing is downloaded twice.
    """
    source, home = folder / "source", folder / "installed"
    source.mkdir()
    for name in copied():
        at = REPOSITORY / name
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copytree(at, source / name, ignore=LEFT_OUT) if at.is_dir() else shutil.copy(at, source / name)
    _uv("build", "--wheel", "--python", sys.executable, "--out-dir", str(folder / "dist"), str(source))
    [wheel] = (folder / "dist").glob("*.whl")
    venv.create(home, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (packages / "tests-own.pth").write_text(sysconfig.get_path("purelib"))
    _uv("pip", "install", "--python", str(home / "bin" / "python"), "--no-deps", "--offline", str(wheel))
    return home / "bin"


def _uv(*arguments: str) -> None:
    env = {**os.environ, "UV_COMPILE_BYTECODE": "1", "UV_SYSTEM_CERTS": "1"}
    done = subprocess.run([UV, *arguments], capture_output=True, check=False, text=True, env=env, timeout=100)
    assert done.returncode == 0, done.stderr
