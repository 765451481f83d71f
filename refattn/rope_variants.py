"""The numbers that each variant of the rotation frequencies takes, and what they may be.

Names are those of Hugging Face transformers, without their prefixes and suffixes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Integral
from typing import Any, TypeAlias

from refattn.checks import OptionError, check_option, is_finite, is_integer, shown

Numbers: TypeAlias = dict[str, Any]
"""A variant's numbers by name: Decimal, a list of them, or bool for truncate."""

VARIANTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor", "original_length"), ("length",)),
    "yarn": (
        ("factor", "original_length"),
        ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_length"),
        ("length", "factor", "attention_factor"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_length"), ()),
    "proportional": ((), ("partial_rotary_factor", "factor")),
}
"""The numbers that each variant needs, and those that it may be given."""

Test: TypeAlias = tuple[str, Callable[[Any], bool]]
"""What a number must be, in words and as a test."""

POSITIVE: Test = ("finite and above zero", lambda v: is_finite(v) and v > 0)
"""The rule of every number without one of its own."""

TESTS: Mapping[str, Test] = {
    "original_length": ("an integer above zero", lambda v: is_integer(v) and v > 0),
    "length": ("an integer above zero", lambda v: is_integer(v) and v > 0),
    "truncate": ("true or false", lambda v: isinstance(v, bool)),
    "mscale": ("finite and not negative", lambda v: is_finite(v) and v >= 0),
    "mscale_all_dim": ("finite and not negative", lambda v: is_finite(v) and v >= 0),
    "partial_rotary_factor": ("from 0 to 1", lambda v: is_finite(v) and 0 <= v <= 1),
}
"""The numbers with a rule of their own."""

LISTS = ("short_factor", "long_factor")
"""The numbers given pair by pair."""


def check_rotary_dim(function: str, rotary_dim: int) -> None:
    """Check the number of rotated features.

    Raises:
        OptionError: it is no integer, odd, or below 2.
    """
    if not is_integer(rotary_dim) or rotary_dim < 2 or rotary_dim % 2:
        raise OptionError(
            f"rotary_dim is {shown(rotary_dim)}, but it must be even and at least 2 [{function}]"
        )


def check_variant(
    function: str, rotary_dim: int, variant: Mapping[str, Any] | None
) -> tuple[str, Numbers]:
    """Return a variant's kind and its numbers, exactly as decimals.

    Raises:
        OptionError: the kind is unknown, or a number is missing, unknown, or out of its range.
    """
    if variant is not None and not isinstance(variant, Mapping):
        raise OptionError(
            f'variant is {shown(variant)}, but it must be an object {{"kind": ...}} [{function}]'
        )
    given = dict(variant or {"kind": "default"})
    kind = given.pop("kind", None)
    check_option(function, "variant's kind", kind, VARIANTS)
    needed, optional = VARIANTS[str(kind)]
    for number in needed:
        if number not in given:
            raise OptionError(f"variant {kind} lacks {number}, but it needs {needed} [{function}]")
    for number in given:
        if number not in needed + optional:
            raise OptionError(
                f"variant {kind} has {number}, but it takes only "
                f"{', '.join(needed + optional) or 'no numbers'} [{function}]"
            )
    numbers = {n: _exact(function, kind, n, v, rotary_dim) for n, v in given.items()}
    _check_company(function, str(kind), numbers, rotary_dim)
    return str(kind), numbers


def _exact(function: str, kind: str, name: str, value: Any, rotary_dim: int) -> Any:
    """Return one number as a decimal, one list as decimals, or truncate as it is."""
    if name in LISTS:
        if not isinstance(value, Sequence) or len(value) != rotary_dim // 2:
            size = len(value) if isinstance(value, Sequence) else "no"
            raise OptionError(
                f"variant {kind} has {name} of {size} entries, but rotary_dim {rotary_dim} needs "
                f"{rotary_dim // 2} [{function}]"
            )
        return [_exact(function, kind, "entry of " + name, v, rotary_dim) for v in value]
    words, test = TESTS.get(name, POSITIVE)
    if not test(value):
        raise OptionError(
            f"variant {kind} has {name} {shown(value)}, but it must be {words} [{function}]"
        )
    if isinstance(value, bool):
        return value
    return exact(value)


def exact(number: Any) -> Decimal:
    """Return the real number that an integer or a float is."""
    return Decimal(int(number) if isinstance(number, Integral) else float(number))


def _check_company(function: str, kind: str, numbers: Numbers, rotary_dim: int) -> None:
    """Check what the numbers of one variant must be to each other.

    Raises:
        OptionError: two do not go together.
    """
    problem = None
    if kind == "dynamic" and rotary_dim == 2:
        problem = "rotary_dim is 2, but variant dynamic needs at least 4"
    if kind == "yarn" and numbers.get("beta_fast", 32) < numbers.get("beta_slow", 1):
        problem = (
            f"variant yarn has beta_fast {numbers.get('beta_fast', 32)}, but beta_slow "
            f"{numbers.get('beta_slow', 1)}; the first must not be below the second"
        )
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        problem = (
            f"variant llama3 has low_freq_factor {numbers['low_freq_factor']}, but "
            f"high_freq_factor {numbers['high_freq_factor']}; the first must be below the second"
        )
    if kind == "longrope" and not {"factor", "attention_factor"} & numbers.keys():
        problem = "variant longrope has neither factor nor attention_factor, but it needs one"
    if kind == "longrope" and numbers["original_length"] == 1 and "factor" in numbers:
        problem = "variant longrope has original_length 1, but its logarithm must not be zero"
    if problem:
        raise OptionError(f"{problem} [{function}]")
