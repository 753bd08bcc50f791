"""Storage of uploaded files under safe names, which cannot act as a path or an option."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path

JOBS = ".jobs"
"""folder, in the folder of runs, of jobs and of the files uploaded for them"""
LONGEST_NAME, LONGEST_SUFFIX = 80, 16


def store_upload(root: Path, name: str, data: bytes) -> Path:
    """Store an uploaded file under its content's hash and a safe name.

    Its ending is kept, because it decides how the file is read.
    """
    target = root.resolve() / JOBS / "uploads" / hashlib.sha256(data).hexdigest()[:16] / safe_name(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{secrets.token_hex(8)}.part")
    part.write_bytes(data)
    return part.replace(target)


def safe_name(name: str) -> str:
    """A file name of at most 80 letters, digits, `.`, `_` and `-`: neither a path nor an option.

    It never begins with `-` or `.`.
    """
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", re.split(r"[/\\]", name)[-1])
    stem, dot, suffix = plain.rpartition(".")
    if not dot or not suffix or len(suffix) > LONGEST_SUFFIX:
        stem, suffix = plain.replace(".", "_"), ""
    ending = f".{suffix}" if suffix else ""
    return (stem.lstrip("-.")[: LONGEST_NAME - len(ending)].rstrip(".") or "data") + ending
