"""Contracts of the public functions: shapes, dtypes and options, and the form of their errors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from refattn.arrays import FLOATS, Array, dtype_name
from refattn.errors import RefattnError


class ShapeError(RefattnError):
    """Two shapes that do not fit together."""


class DtypeError(RefattnError):
    """A dtype outside the function's contract."""


class OptionError(RefattnError):
    """An option whose value, or whose company, is refused."""


class MemoryLimitError(RefattnError):
    """A matrix that would not fit into the memory that is free."""


def describe(function: str, arrays: Mapping[str, Array | None]) -> str:
    """Return `[function: name (shape), ...]`, the end of every error sentence."""
    shapes = ", ".join(f"{n} {tuple(a.shape)}" for n, a in arrays.items() if a is not None)
    return f"[{function}: {shapes}]" if shapes else f"[{function}]"


def check_shapes(function: str, **contracts: tuple[Array | None, str]) -> dict[str, int]:
    """Bind the letters of shape contracts and return their sizes.

    A contract is `(array, "... n_q d_k")`: trailing axes by letter, a leading `...` for any
    number of further axes, a number for a fixed size. An array that is None is skipped.

    Raises:
        ShapeError: the rank is wrong, or a letter has two sizes.
    """
    arrays = {name: array for name, (array, _) in contracts.items()}
    bound: dict[str, tuple[int, str]] = {}
    for name, (array, contract) in contracts.items():
        if array is None:
            continue
        letters = contract.split()
        free = letters[:1] == ["..."]
        letters = letters[1:] if free else letters
        shape = tuple(array.shape)
        if len(shape) < len(letters) or (not free and len(shape) != len(letters)):
            raise ShapeError(
                f"{name} has {len(shape)} axes, but ({contract.replace(' ', ', ')}) has "
                f"{'at least ' if free else ''}{len(letters)} {describe(function, arrays)}"
            )
        for letter, size in zip(letters, shape[len(shape) - len(letters) :], strict=True):
            expected, owner = bound.setdefault(
                letter, (int(letter), "the contract") if letter.isdigit() else (size, name)
            )
            if size != expected:
                raise ShapeError(
                    f"{name} has {letter}={size}, but {owner} has {letter}={expected}; "
                    f"they must be equal {describe(function, arrays)}"
                )
    return {letter: size for letter, (size, _) in bound.items()}


def check_floats(function: str, **arrays: Array | None) -> None:
    """Check that every array is of one and the same floating dtype.

    Raises:
        DtypeError: a dtype is not floating, or two differ.
    """
    present = {n: dtype_name(a) for n, a in arrays.items() if a is not None}
    first = next(iter(present))
    for name, dtype in present.items():
        if dtype not in FLOATS:
            raise DtypeError(
                f"{name} has dtype {dtype}, but it must be one of {', '.join(FLOATS)} "
                f"{describe(function, arrays)}"
            )
        if dtype != present[first]:
            raise DtypeError(
                f"{name} has dtype {dtype}, but {first} has dtype {present[first]}; "
                f"they must be equal {describe(function, arrays)}"
            )


def check_option(function: str, name: str, value: Any, allowed: Collection[str]) -> None:
    """Check that an option is one of its names.

    Raises:
        OptionError: it is not.
    """
    if value not in allowed:
        raise OptionError(
            f"{name} is {value!r}, but it must be one of {', '.join(allowed)} [{function}]"
        )


def check_positive(function: str, **numbers: float | None) -> None:
    """Check that numbers are finite and above zero; None is skipped.

    Raises:
        OptionError: one is not.
    """
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise OptionError(
                f"{name} is {number}, but it must be finite and above zero [{function}]"
            )


def check_finite(function: str, **numbers: float | None) -> None:
    """Check that numbers are finite; None is skipped.

    Raises:
        OptionError: one is not.
    """
    for name, number in numbers.items():
        if number is not None and not math.isfinite(number):
            raise OptionError(f"{name} is {number}, but it must be finite [{function}]")


def check_counts(function: str, **numbers: int) -> None:
    """Check that numbers are integers of at least 1.

    Raises:
        OptionError: one is not.
    """
    for name, number in numbers.items():
        whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
        if not (whole and number >= 1):
            raise OptionError(
                f"{name} is {number!r}, but it must be an integer of at least 1 [{function}]"
            )
