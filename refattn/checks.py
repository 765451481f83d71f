"""Contracts of the public functions: shapes, dtypes and options, and the form of their errors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
from array_api_compat import is_array_api_obj

from refattn.arrays import FLOATS, Array, array_namespace, dtype_name, is_plain
from refattn.errors import RefattnError

LONGEST = 80
"""Characters of a refused value that an error sentence shows."""

OPTIONAL = " or None"
"""The end of a shape contract whose array may be absent."""

UNASKED = 2**28
"""Bytes below which asking the system for its free memory costs more than it can save."""


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


def given(**values: Any) -> dict[str, Any]:
    """Return the values that are not None, by name: optional arguments that were given."""
    return {name: value for name, value in values.items() if value is not None}


def shown(value: Any) -> str:
    """Return a refused value as an error sentence shows it: on one line, and not too long."""
    if isinstance(value, int) and value.bit_length() > LONGEST:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join((str(value) if isinstance(value, Real) else repr(value)).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def is_integer(value: Any) -> bool:
    """Tell whether a value is an integer, NumPy's included, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Tell whether a value is a real number that binary64 can hold, and not a bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer or a fraction beyond the largest float
        return False


def is_array(value: Any) -> bool:
    """Tell whether a value is an array of a library of the array API.

    NumPy's masked arrays and matrices are none: their operators mean something else.
    """
    return is_plain(value) or (
        bool(is_array_api_obj(value)) and not isinstance(value, np.ma.MaskedArray)
    )


def check_arrays(function: str, **arrays: Array) -> None:
    """Check that arguments are arrays, and all of one library.

    Raises:
        DtypeError: one is no array, or two are of different libraries.
    """
    owner, library = "", None
    for name, array in arrays.items():
        if not is_array(array):
            kind = "None" if array is None else type(array).__name__
            article = "" if array is None else "an " if kind[0] in "aeiou" else "a "
            raise DtypeError(f"{name} is {article}{kind}, but it must be an array [{function}]")
        namespace = array_namespace(array)
        if library is None:
            owner, library = name, namespace
        if namespace is not library:
            raise DtypeError(
                f"{name} is an array of {_library(namespace)}, but {owner} is one of "
                f"{_library(library)}; they must be of one library [{function}]"
            )


def _library(namespace: Any) -> str:
    return str(namespace.__name__).removeprefix("array_api_compat.").split(".")[0]


def check_shapes(function: str, **contracts: tuple[Array | None, str]) -> dict[str, int]:
    """Bind the letters of shape contracts and return their sizes.

    A contract is `(array, "... n_q d_k")`: trailing axes by letter, a leading `...` for any
    number of further axes, a number for a fixed size, `or None` at the end for an array that
    may be absent.

    Raises:
        ShapeError: the rank is wrong, or a letter has two sizes.
        DtypeError: an argument is no array, or two are of different libraries.
    """
    arrays: dict[str, Array] = {
        name: array
        for name, (array, contract) in contracts.items()
        if not (array is None and contract.endswith(OPTIONAL))
    }
    check_arrays(function, **arrays)
    bound: dict[str, tuple[int, str]] = {}
    for name, array in arrays.items():
        contract = contracts[name][1].removesuffix(OPTIONAL)
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


def check_floats(function: str, **arrays: Array) -> None:
    """Check that every array is of one and the same floating dtype.

    Raises:
        DtypeError: an argument is no array, a dtype is not floating, or two differ.
    """
    check_arrays(function, **arrays)
    first = next(iter(arrays))
    dtypes = {name: dtype_name(array) for name, array in arrays.items()}
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise DtypeError(
                f"{name} has dtype {dtype}, but it must be one of {', '.join(FLOATS)} "
                f"{describe(function, arrays)}"
            )
        if dtype != dtypes[first]:
            raise DtypeError(
                f"{name} has dtype {dtype}, but {first} has dtype {dtypes[first]}; "
                f"they must be equal {describe(function, arrays)}"
            )


def check_option(function: str, name: str, value: Any, allowed: Collection[str]) -> None:
    """Check that an option is one of its names.

    Raises:
        OptionError: it is not.
    """
    if not (isinstance(value, str) and value in allowed):
        raise OptionError(
            f"{name} is {shown(value)}, but it must be one of {', '.join(allowed)} [{function}]"
        )


def check_flag(function: str, **flags: bool) -> None:
    """Check that options are True or False, Python's or NumPy's.

    Raises:
        OptionError: one is not.
    """
    for name, flag in flags.items():
        if not isinstance(flag, (bool, np.bool_)):
            raise OptionError(f"{name} is {shown(flag)}, but it must be True or False [{function}]")


def check_finite(function: str, **numbers: float) -> None:
    """Check that arguments are finite numbers.

    Raises:
        OptionError: one is not.
    """
    for name, number in numbers.items():
        if not is_finite(number):
            raise OptionError(
                f"{name} is {shown(number)}, but it must be finite, a real number [{function}]"
            )


def check_positive(function: str, **numbers: float) -> None:
    """Check that arguments are finite numbers above zero.

    Raises:
        OptionError: one is not.
    """
    for name, number in numbers.items():
        if not (is_finite(number) and number > 0):
            raise OptionError(
                f"{name} is {shown(number)}, but it must be finite and above zero, a real number "
                f"[{function}]"
            )


def check_computable(function: str, query: Array, **numbers: float) -> None:
    """Check that rounding numbers to query's computing dtype makes none infinite, none zero.

    Spec: OWN-ROUND1.

    Raises:
        OptionError: one overflows, or vanishes though it is not zero.
    """
    dtype = "float64" if dtype_name(query) == "float64" else "float32"
    for name, number in numbers.items():
        with np.errstate(over="ignore", under="ignore"):
            rounded = np.dtype(dtype).type(number)
        if not np.isfinite(rounded) or (rounded == 0 and number != 0):
            raise OptionError(
                f"{name} is {shown(number)}, but query computes in {dtype}, where that is "
                f"{rounded} {describe(function, {'query': query})}"
            )


def check_counts(function: str, *, least: int = 1, **numbers: int) -> list[int]:
    """Return numbers as Python's integers, which no product overflows.

    Raises:
        OptionError: one is no integer of at least `least`.
    """
    for name, number in numbers.items():
        if not (is_integer(number) and number >= least):
            raise OptionError(
                f"{name} is {shown(number)}, but it must be an integer of at least {least} "
                f"[{function}]"
            )
    return [int(number) for number in numbers.values()]


def check_memory(function: str, shape: tuple[int, ...], *, itemsize: int, arrays: int) -> None:
    """Refuse arrays that do not fit into the memory that is free.

    Spec: OWN-MEMORY1.

    Raises:
        MemoryLimitError: they need more bytes than are free.
    """
    # an axis of size 0 counts as 1: the positions along the other axes are written out too
    needed = arrays * itemsize * math.prod(max(size, 1) for size in shape)
    if needed <= UNASKED:
        return
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            f"{arrays} arrays of shape {shape} need {Decimal(needed) / 2**30:.1f} GiB, but "
            f"{free / 2**30:.1f} GiB are free [{function}]"
        )
