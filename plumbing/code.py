"""Which code is at work: hashes of the stage's file and of the rooms below it, and the commit."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("common.py", "engines", "judges", "plumbing")


def stage_file(options) -> Path | None:
    """The file that defines a stage's options: the stage, or a copy of it under another name."""
    file = getattr(sys.modules.get(type(options).__module__), "__file__", None)
    return Path(file) if file else None


def stage_number(options) -> str | None:
    """The number of a stage, by the first words of its docstring."""
    text = getattr(sys.modules.get(type(options).__module__), "__doc__", None)
    number = re.match(r"Stage (\d\d)", text or "")
    return number[1] if number else None


def hash_of(path: Path) -> str:
    """Hash of a Python file, or of those in a room, 12 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
        digest.update(f"{file.name}\n".encode() * path.is_dir())  # a copied stage is the same stage
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def code_of(options) -> dict:
    """What made a run folder: the name and hash of the stage's file, a hash for each room, the
    commit, and whether the tree was clean."""
    file = stage_file(options)
    code = {"file": file.name if file else None, "stage": hash_of(file) if file else None}
    code |= {room: hash_of(ROOT / room) for room in ROOMS}
    return {**code, **commit()}


def commit() -> dict:
    """The commit of this checkout, and whether every file of it is as it was committed."""
    name = git("rev-parse", "--short", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": name or "unknown", "clean": changes == "" if name else None}


def git(*arguments: str) -> str | None:
    """What git says of this checkout; None where it is no checkout, or git is not there."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
