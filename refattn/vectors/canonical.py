"""JSON in one form only: written the same everywhere, and read without leniency."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from refattn.errors import RefattnError


class PackError(RefattnError):
    """A pack, or a file of one, that strict reading refuses."""


def canonical_json(value: Any) -> bytes:
    """Return sorted keys, one space of indent, shortest decimals, a trailing newline."""
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PackError(f"has the key {key!r} twice")
        found[key] = value
    return found


def _refuse(literal: str) -> Any:
    raise PackError(f"has the number {literal}, which JSON has not")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise PackError(f"has the number {text[:40]}, which float64 cannot hold")
    return number


def _integer(text: str) -> int:
    _finite(text)  # float64 holds its magnitude; int() refuses thousands of digits in other words
    return int(text)


def read_json(data: bytes, name: str) -> Any:
    """Parse JSON strictly: no key twice, no NaN or Infinity, no number beyond float64.

    Raises:
        PackError: one sentence that starts with `name`.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_integer,
        )
    except PackError as error:
        raise PackError(f"{name} {error}") from None
    except (ValueError, RecursionError) as error:
        raise PackError(f"{name} is not JSON: {error}") from None


def read_canonical(data: bytes, name: str) -> Any:
    """Parse JSON strictly, and refuse any other form than `canonical_json` writes.

    Raises:
        PackError: one sentence that starts with `name`.
    """
    value = read_json(data, name)
    if canonical_json(value) != data:
        raise PackError(f"{name} is not in canonical form: a byte was added, lost or changed")
    return value
