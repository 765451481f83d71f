"""Compiled code on disk, named by a digest of all that it was made of, safe among processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).with_name("sources")
"""Every text that is compiled."""

SEAL = 32
"""Bytes of the digest that a file ends with: what was cut short is made again."""


@cache
def folder() -> Path:
    """Return where compiled code is kept: in REFATTN_CACHE_DIR or the user's cache, or anew."""
    given = os.environ.get("REFATTN_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    place = (Path(given) if given else Path.home() / ".cache") / "refattn" / "cuda"
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(place, os.W_OK):
            return place
    return Path(tempfile.mkdtemp(prefix="refattn-"))


def digest_of(texts: Iterable[str | bytes]) -> str:
    """Return a digest of texts; the borders between them count."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def kept(name: str, make: Callable[[], bytes]) -> bytes:
    """Return what was made once under a name.

    Two processes may make it at the same time: each writes a file of its own and moves it to its
    place whole, so that none reads half of one.
    """
    path = folder() / name
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if _seal(data[:-SEAL]) == data[-SEAL:]:
            return data[:-SEAL]
    data = make()
    with contextlib.suppress(OSError):  # a full disk costs time, not the result
        place(path, data + _seal(data))
    return data


def place(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def _seal(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
