"""Rotation angles a token: the frequencies of the paper, and the ways found to stretch them.

The paper fixes one geometric sequence of frequencies; later variants rescale it, entry by entry,
so that a model trained on short texts reads long ones. All are computed in decimal arithmetic, so
that no rounding of a frequency is multiplied by a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from refattn.checks import OptionError, check_finite, check_positive
from refattn.rope_variants import Numbers, check_rotary_dim, check_variant, exact

DIGITS = 100
"""Decimal digits of every frequency; a position of 2^32 costs ten of them."""

PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510"
    "58209749445923078164062862089986280348253421170679821480865132823"
)
"""π to more than `DIGITS` digits."""

LARGEST_FREQUENCY = Decimal("1e30")
"""Radians a token; beyond it `DIGITS` would not fix the last bits of an angle."""

YARN_BETA_FAST = Decimal(32)
"""Turns within the trained length above which yarn keeps a frequency."""

YARN_BETA_SLOW = Decimal(1)
"""Turns within the trained length below which yarn divides a frequency by the factor."""

YARN_WIDTH = Decimal.from_float(0.001)
"""Width of yarn's ramp, in pairs, where its two ends fall together: the binary64 0.001."""

YARN_LOGARITHM = Decimal("0.1")
"""How much yarn's attention factor grows with the logarithm of the factor."""

Variant: TypeAlias = Mapping[str, Any]
"""`{"kind": one of the variants, ...its numbers}`."""


class RopeFrequencies(NamedTuple):
    """Frequencies in radians a token, and the factor on cosine and sine."""

    theta: tuple[Decimal, ...]
    attention_factor: Decimal


def rope_frequencies(
    rotary_dim: int, *, base: float = 10000.0, variant: Variant | None = None
) -> RopeFrequencies:
    """Return the angle that each pair of features turns by, a token.

    Spec: ROPE-EQ15, OWN-ROPE2, OWN-ROPE4, OWN-ROPE5.

        θ_i = base^(-2(i-1)/d),  i = 1 ... d/2,  then rescaled by the variant

    Args:
        rotary_dim: d, the number of rotated features, even.
        base: 10000 in the paper, above zero; the real number that the float is.
        variant: None or `{"kind": "default"}` for the paper's; or another kind and its numbers.

    Returns:
        theta: d/2 frequencies, radians a token, to `DIGITS` digits.
        attention_factor: what multiplies cosine and sine; 1 but for yarn and longrope.

    Raises:
        OptionError: rotary_dim is odd or not positive, base is not finite and above zero, or the
            variant is unknown, lacks a number, has an unknown one, or one out of its range.
    """
    name = "rope_frequencies"
    check_rotary_dim(name, rotary_dim)
    check_positive(name, base=base)
    kind, numbers = check_variant(name, rotary_dim, variant)
    with localcontext(Context(prec=DIGITS)):
        theta = RULES[kind](exact(base), int(rotary_dim), numbers)
        factor = attention_factor(kind, numbers)
    return RopeFrequencies(tuple(_limited(theta)), factor)


def one_frequency(frequency: float) -> RopeFrequencies:
    """Return a single given frequency, the real number that the float is.

    Spec: ROPE-EQ12, OWN-ROPE5.

    Raises:
        OptionError: it is not finite, or beyond `LARGEST_FREQUENCY`.
    """
    check_finite("one_frequency", frequency=frequency)
    return RopeFrequencies(tuple(_limited([exact(frequency)])), Decimal(1))


def _limited(theta: list[Decimal]) -> list[Decimal]:
    """Return frequencies, unless one is beyond `LARGEST_FREQUENCY`."""
    largest = max(map(abs, theta))
    if largest > LARGEST_FREQUENCY:
        raise OptionError(
            f"the largest frequency is {largest:.3e} radians a token, but it must be at most "
            f"{LARGEST_FREQUENCY:.0e} [rope_frequencies]"
        )
    return theta


def geometric(base: Decimal, d: int, numbers: Numbers) -> list[Decimal]:
    """Return the paper's frequencies.

    Spec: ROPE-EQ15.

        θ_i = base^(-2(i-1)/d)
    """
    return list(_powers(base, d))


@lru_cache(maxsize=64)  # every call of rope asks for the same few, which take a millisecond
def _powers(base: Decimal, d: int) -> tuple[Decimal, ...]:
    """Return base^(-2i/d) for i below d/2, to `DIGITS` digits."""
    with localcontext(Context(prec=DIGITS)):
        step = -2 * base.ln() / d
        return tuple((step * i).exp() for i in range(d // 2))


def linear(base: Decimal, d: int, numbers: Numbers) -> list[Decimal]:
    """Return frequencies of positions divided by the factor.

    Spec: OWN-ROPE4.

        θ_i / f
    """
    return [theta / numbers["factor"] for theta in geometric(base, d, numbers)]


def dynamic(base: Decimal, d: int, numbers: Numbers) -> list[Decimal]:
    """Return frequencies of a base that grows with the current length.

    Spec: OWN-ROPE4.

        base' = base · (f·L/L₀ - (f - 1))^(d/(d-2)),  L = max(length, L₀)
    """
    f, L_0 = numbers["factor"], numbers["original_length"]
    L = max(numbers.get("length", L_0), L_0)
    stretch = f * L / L_0 - (f - 1)
    return geometric(base * stretch ** (Decimal(d) / (d - 2)), d, numbers)


def yarn(base: Decimal, d: int, numbers: Numbers) -> list[Decimal]:
    """Return frequencies divided by the factor where they turn slowly, kept where fast.

    Spec: OWN-ROPE4.

        i(β) = d ln(L₀/(2πβ)) / (2 ln base);  low = i(β_fast), high = i(β_slow)
        γ_i = clamp((i - low)/(high - low), 0, 1);  θ_i (1 - γ_i) + (θ_i/f) γ_i
    """
    if base <= 1:
        raise OptionError(f"base is {base}, but yarn needs one above 1 [rope_frequencies]")
    low = _turning_pair(numbers.get("beta_fast", YARN_BETA_FAST), base, d, numbers)
    high = _turning_pair(numbers.get("beta_slow", YARN_BETA_SLOW), base, d, numbers)
    if numbers.get("truncate", True):
        low, high = low.to_integral_value(ROUND_FLOOR), high.to_integral_value(ROUND_CEILING)
    low, high = max(low, Decimal(0)), min(high, Decimal(d - 1))
    if low > high:
        raise OptionError(
            f"yarn's ramp starts at pair {low:.4g}, but ends at pair {high:.4g}; original_length "
            f"{numbers['original_length']} does not suit base {base:.6g} [rope_frequencies]"
        )
    width = high - low or YARN_WIDTH
    ramp = [min(max((i - low) / width, Decimal(0)), Decimal(1)) for i in range(d // 2)]
    return [
        theta * (1 - gamma) + theta / numbers["factor"] * gamma
        for theta, gamma in zip(geometric(base, d, numbers), ramp, strict=True)
    ]


def _turning_pair(beta: Decimal, base: Decimal, d: int, numbers: Numbers) -> Decimal:
    """Return the pair, as a real number, that turns `beta` times within the trained length."""
    L_0: Decimal = numbers["original_length"]
    return d * (L_0 / (2 * PI * beta)).ln() / (2 * base.ln())


def longrope(base: Decimal, d: int, numbers: Numbers) -> list[Decimal]:
    """Return frequencies divided by factors given pair by pair, for short or for long texts.

    Spec: OWN-ROPE4.

        θ_i / λ_i,  λ = long_factor if length > L₀ else short_factor
    """
    L_0 = numbers["original_length"]
    long = numbers.get("length", L_0) > L_0
    factors = numbers["long_factor" if long else "short_factor"]
    return [t / f for t, f in zip(geometric(base, d, numbers), factors, strict=True)]


def llama3(base: Decimal, d: int, numbers: Numbers) -> list[Decimal]:
    """Return frequencies divided by the factor if their wave is long, kept if it is short.

    Spec: OWN-ROPE4.

        s = clamp((L₀θ_i/(2π) - low)/(high - low), 0, 1);  (1 - s) θ_i/f + s θ_i
    """
    f, L_0 = numbers["factor"], numbers["original_length"]
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    rescaled = []
    for theta in geometric(base, d, numbers):
        smooth = (L_0 * theta / (2 * PI) - low) / (high - low)
        smooth = min(max(smooth, Decimal(0)), Decimal(1))
        rescaled.append((1 - smooth) * theta / f + smooth * theta)
    return rescaled


def proportional(base: Decimal, d: int, numbers: Numbers) -> list[Decimal]:
    """Return frequencies that vanish beyond a share of the pairs.

    Spec: OWN-ROPE2, OWN-ROPE4.

        θ_i / f for i ≤ ⌊p·d/2⌋, else 0
    """
    # The product p·d is binary64, as in the library that the variant comes from: 0.7·20 is 14.
    count = int(float(numbers.get("partial_rotary_factor", Decimal(1))) * d // 2)
    theta = geometric(base, d, numbers)[:count] + [Decimal(0)] * (d // 2 - count)
    return [t / numbers.get("factor", Decimal(1)) for t in theta]


RULES: Mapping[str, Callable[[Decimal, int, Numbers], list[Decimal]]] = {
    "default": geometric,
    "linear": linear,
    "dynamic": dynamic,
    "yarn": yarn,
    "longrope": longrope,
    "llama3": llama3,
    "proportional": proportional,
}
"""The rule of each variant: base, d and its numbers to d/2 frequencies."""


def attention_factor(kind: str, numbers: Numbers) -> Decimal:
    """Return what multiplies cosine and sine, and so, squared, the logits.

    Spec: OWN-ROPE4.

        yarn: μ(f, 1), or μ(f, mscale)/μ(f, mscale_all_dim);  μ(f, m) = 1 + m ln(f)/10 if f > 1
        longrope: √(1 + ln f / ln L₀) if f > 1
    """
    if "attention_factor" in numbers:
        return Decimal(numbers["attention_factor"])
    f: Decimal = numbers.get("factor", Decimal(1))
    if f <= 1 or kind not in ("yarn", "longrope"):
        return Decimal(1)
    if kind == "longrope":
        L_0: Decimal = numbers["original_length"]
        return (1 + f.ln() / L_0.ln()).sqrt()
    mscale: Decimal = numbers.get("mscale", Decimal(0))
    mscale_all_dim: Decimal = numbers.get("mscale_all_dim", Decimal(0))
    growth = YARN_LOGARITHM * f.ln()
    if mscale and mscale_all_dim:
        return (1 + mscale * growth) / (1 + mscale_all_dim * growth)
    return 1 + growth
