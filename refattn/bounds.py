"""Bounds on the error of any correct implementation, in a stated precision.

A bound is a·unit + b·unit_logit + floor: the units belong to the case (`refattn.certify.units`),
the three numbers to the profile. The derivation stands in spec/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from refattn.checks import OptionError, check_option

EXTRA = 8.0
"""Rounding units granted beside every sum (NUM-MODEL1); certify's units count the same."""

INFLATION = 1.0 + 2.0**-18
"""Covers the rounding of the units themselves, which are computed in binary64."""

LARGEST_EXPONENT = 1.0
"""Error of a logit, in nats, beyond which linear terms say less than the hull of the values."""

LARGEST_GROWTH = 40.0
"""Cap on the exponent of the second-order factor: a bound is finite, if empty, beyond it."""

LARGEST_RELATIVE = 0.5
"""Relative error of a variance beyond which nothing is claimed of what it divides."""

LARGEST = {"float16": 65504.0, "float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}
"""Largest number of a computing format: sums beyond it are not asked of an implementation."""

CROSSED = ("multihead", "causal_module", "gated_cross_attention", "score")
"""Operations in whose outputs, as in gradients, errors meet errors."""

SECOND_ORDER = 2.0**-13
"""The u up to which the units themselves cover the product of two errors (NUM-MODEL1)."""


class Profile(NamedTuple):
    """The precision that an implementation declares."""

    name: str
    dtype: str
    """Format of inputs and outputs."""
    computing: str
    """Format of the arithmetic, and of statistics such as the logsumexp."""
    accumulated: float
    """u: largest relative error of one operation of the arithmetic."""
    operand: float
    """v: unit roundoff of the format that weights, logit gradients and results are rounded to."""
    product: float
    """Largest relative error of an operand on its way into a matrix product; 0 if exact."""
    tiny: float
    """Largest error of a result below the normal range, which is flushed to zero at most.

    In fp16_accumulate, where it is below the normal range itself, nothing may be flushed.
    """
    operand_tiny: float
    """Largest absolute error of rounding to the operand format below its normal range."""


PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        Profile("fp64", "float64", "float64", 2.0**-53, 2.0**-53, 0.0, 2.0**-1022, 2.0**-1022),
        Profile("fp32", "float32", "float32", 2.0**-24, 2.0**-24, 0.0, 2.0**-126, 2.0**-126),
        Profile("tf32", "float32", "float32", 2.0**-23, 2.0**-24, 2.0**-10, 2.0**-126, 2.0**-126),
        Profile("bf16", "bfloat16", "float32", 2.0**-23, 2.0**-8, 0.0, 2.0**-126, 2.0**-126),
        Profile("fp16", "float16", "float32", 2.0**-23, 2.0**-11, 0.0, 2.0**-126, 2.0**-25),
        Profile(
            "fp16_accumulate", "float16", "float16", 2.0**-11, 2.0**-11, 0.0, 2.0**-24, 2.0**-25
        ),
    )
}
"""The precisions that an implementation can declare; NUM-MODEL1 tells what each one permits."""

BY_DTYPE = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""The profile that a dtype stands for when none is declared."""

FINE = 2.0**-53
"""u of binary64, in which every profile computes angles and frequencies (NUM-ROPE1)."""


def profile_of(dtype: str) -> str:
    """Return the name of the profile that a dtype stands for.

    Spec: NUM-MODEL1.

    Raises:
        OptionError: attention is not defined on the dtype.
    """
    check_option("profile_of", "dtype", dtype, BY_DTYPE)
    return BY_DTYPE[dtype]


def coefficients(
    op: str, profile: str, magnitudes: Mapping[str, float]
) -> dict[str, tuple[float, float, float]]:
    """Return (a, b, floor) of every float output: a correct result is within a·U₀ + b·U₁ + floor.

    Spec: NUM-MODEL1, NUM-FORWARD1, NUM-LSE1, NUM-BACKWARD1, NUM-ROPE1, NUM-OTHER1.

        a = κ a₀,  b = κ b₀,  κ = exp(2 (b₀ e + a₀ ω + n u))
        a₀ = v + 2p,  b₀ = u + 2p / (d + 8)

    Args:
        op: the operation's name.
        profile: one of `PROFILES`.
        magnitudes: what `refattn.certify.units.units` returned beside the units.

    Returns:
        One triple an output, absolute, the unit roundoffs included, always finite; none at all
        where a sum of magnitudes leaves the range of the arithmetic, or a variance that is divided
        by could vanish in errors.

    Raises:
        OptionError: no such profile, or a magnitude is not finite.
    """
    check_option("coefficients", "profile", profile, PROFILES)
    for name, value in magnitudes.items():
        if not math.isfinite(value):
            raise OptionError(f"magnitude {name} is {value}, but it must be finite [{op}]")
    p = PROFILES[profile]
    if magnitudes.get("peak", 0.0) > LARGEST[p.computing]:
        return {}
    if _error(p, magnitudes, "relative") > LARGEST_RELATIVE:
        return {}
    names = [key.removesuffix(".floor") for key in magnitudes if key.endswith(".floor")]
    return {
        name: _coefficients(p, name, magnitudes, op in CROSSED or name.startswith("d_"))
        for name in names
    }


def _effective(p: Profile, magnitudes: Mapping[str, float]) -> tuple[float, float]:
    """Return a₀ and b₀."""
    product = p.product if "shortest" in magnitudes else 0.0
    b = p.accumulated + 2 * product / (magnitudes.get("shortest", 0.0) + EXTRA)
    return p.operand + 2 * product, b


def _error(p: Profile, magnitudes: Mapping[str, float], of: str) -> float:
    """Return the largest error of what `of` counts: b₀ · of + a₀ · of_operand."""
    a, b = _effective(p, magnitudes)
    return b * magnitudes.get(of, 0.0) + a * magnitudes.get(f"{of}_operand", 0.0)


def _coefficients(
    p: Profile, name: str, magnitudes: Mapping[str, float], crossed: bool
) -> tuple[float, float, float]:
    a, b = _effective(p, magnitudes)
    error = _error(p, magnitudes, "exponent")
    longest = max(magnitudes.get(n, 0.0) for n in ("terms", "rows", "longest", f"{name}.terms"))
    growth = INFLATION * math.exp(min(2 * (error + longest * p.accumulated), LARGEST_GROWTH))
    if crossed:  # errors meet errors
        growth *= max(1.0, b / SECOND_ORDER)
    floor = (
        p.tiny * magnitudes[f"{name}.floor"]
        + p.operand_tiny * magnitudes.get(f"{name}.floor_operand", 0.0)
        + FINE * magnitudes.get(f"{name}.fine", 0.0)
    )
    trivial = magnitudes.get(f"{name}.trivial", 0.0)
    if trivial and error > LARGEST_EXPONENT:
        # within the hull of the values, whatever the weights, but for their sum
        outside = growth_of_sums(longest, magnitudes.get("division", 0.0), p)
        return 0.0, 0.0, INFLATION * (trivial + floor) * (1 + outside)
    if f"{name}.statistic" in magnitudes:
        a = 0.0  # it stays in the computing format
    a += magnitudes.get(f"{name}.roundings", 0.0) * p.accumulated
    if f"{name}.angle" in magnitudes:
        b = FINE  # angles are computed in binary64 in every profile
    return growth * a, growth * b, growth * floor


def growth_of_sums(terms: float, division: float, p: Profile) -> float:
    """Return what rounding can add, relatively, to a mean of `terms` numbers, rounded at last.

    Spec: NUM-FORWARD1.

        e^((2n + g) u) - 1 + v + 2p
    """
    exponent = (2 * terms + division) * p.accumulated
    return math.expm1(min(exponent, LARGEST_GROWTH)) + p.operand + 2 * p.product
