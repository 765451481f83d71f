"""Rotary position embedding in ball arithmetic: frequencies of every variant, and the rotation.

Frequencies are real numbers, not their float32 roundings: angles are as exact as the positions.
Where a variant compares or truncates (bands, correction range), the comparison is decided in
ball arithmetic; if it cannot be, the precision is raised.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flint import arb, fmpq

from refattn.certify.errors import CertifyError, Undecided
from refattn.certify.exact import (
    ZERO,
    Array,
    Cells,
    Value,
    add,
    enclosed,
    multiply,
    rational,
)
from refattn.certify.setting import choose, expect

KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_length", "length"}),
    "yarn": frozenset(
        [
            *"factor original_length beta_fast beta_slow truncate".split(),
            *"attention_factor mscale mscale_all_dim".split(),
        ]
    ),
    "longrope": frozenset(
        "factor original_length length short_factor long_factor attention_factor".split()
    ),
    "llama3": frozenset("factor original_length low_freq_factor high_freq_factor".split()),
    "proportional": frozenset({"factor", "head_dim", "partial_rotary_factor"}),
}
"""The numbers that each kind of variant takes."""


class Tables(NamedTuple):
    """Frequencies θ_i in radians a token, and the factor on cosine and sine."""

    frequencies: list[Value]
    attention_factor: Value


def number(x: Any) -> fmpq:
    """Convert a parameter to the rational number that it is."""
    return fmpq(x) if isinstance(x, int) else rational(x)


def less(a: Value, b: Value) -> bool:
    """Decide a < b between values, or raise Undecided."""
    if isinstance(a, fmpq) and isinstance(b, fmpq):
        return bool(a < b)
    difference = enclosed(b) - enclosed(a)
    if difference > 0:
        return True
    if difference < 0:
        return False
    raise Undecided


def powers(base: Value, count: int, denominator: int) -> list[Value]:
    """Return base^(-2i/denominator) for i = 0 .. count-1; the first is exactly 1."""
    logarithm = enclosed(base).log()
    return [fmpq(1)] + [(logarithm * fmpq(-2 * i, denominator)).exp() for i in range(1, count)]


def floor(x: arb) -> fmpq:
    """Return the floor of a ball, or raise Undecided."""
    whole = x.floor().unique_fmpz()
    if whole is None:
        raise Undecided
    return fmpq(whole)


def _yarn(v: Mapping[str, Any], base: fmpq, d: int) -> Tables:
    """YaRN: a ramp between interpolated and unchanged frequencies, by rotations in L0 tokens."""
    factor, L0 = number(v["factor"]), number(v["original_length"])
    fast, slow = number(v.get("beta_fast") or 32), number(v.get("beta_slow") or 1)
    denominator = 2 * arb(base).log()
    low: Value = d * (arb(L0 / fast) / (2 * arb.pi())).log() / denominator
    high: Value = d * (arb(L0 / slow) / (2 * arb.pi())).log() / denominator
    if v.get("truncate", True):
        low, high = floor(low), -floor(-high)
    low = ZERO if less(low, ZERO) else low
    high = fmpq(d - 1) if less(fmpq(d - 1), high) else high
    if isinstance(low, fmpq) and isinstance(high, fmpq) and low == high:
        high = high + rational(0.001)
    frequencies: list[Value] = []
    for i, theta in enumerate(powers(base, d // 2, d)):
        # high may lie below low, where the base is small or the original length large
        ramp = _ratio(add(fmpq(i), multiply(low, fmpq(-1))), add(high, multiply(low, fmpq(-1))))
        if less(ramp, ZERO):
            ramp = ZERO
        elif less(fmpq(1), ramp):
            ramp = fmpq(1)
        mix = add(multiply(ramp, 1 / factor - 1), fmpq(1))
        frequencies.append(multiply(theta, mix))
    return Tables(frequencies, _yarn_attention(v, factor))


def _ratio(a: Value, b: Value) -> Value:
    if isinstance(a, fmpq) and a == 0:
        return ZERO
    if isinstance(a, fmpq) and isinstance(b, fmpq):
        return a / b
    return enclosed(a) / enclosed(b)


def _magnitude(factor: fmpq, weight: fmpq) -> Value:
    """Return 0.1·weight·ln factor + 1 for a factor above 1, else 1."""
    if factor <= 1:
        return fmpq(1)
    return arb(factor).log() * weight / 10 + 1


def _yarn_attention(v: Mapping[str, Any], factor: fmpq) -> Value:
    if v.get("attention_factor") is not None:
        return number(v["attention_factor"])
    if v.get("mscale") and v.get("mscale_all_dim"):
        return _ratio(
            _magnitude(factor, number(v["mscale"])), _magnitude(factor, number(v["mscale_all_dim"]))
        )
    return _magnitude(factor, fmpq(1))


def _longrope(v: Mapping[str, Any], base: fmpq, d: int) -> Tables:
    """LongRoPE: a factor for each frequency, of two lists chosen by the present length."""
    factor, L0 = number(v["factor"]), number(v["original_length"])
    is_long = v.get("length") is not None and number(v["length"]) > L0
    factors = v["long_factor"] if is_long else v["short_factor"]
    if len(factors) != d // 2:
        raise CertifyError(f"longrope has {len(factors)} factors, but there are {d // 2} pairs")
    frequencies = [
        multiply(theta, 1 / number(f))
        for theta, f in zip(powers(base, d // 2, d), factors, strict=True)
    ]
    if v.get("attention_factor") is not None:
        return Tables(frequencies, number(v["attention_factor"]))
    if factor <= 1:
        return Tables(frequencies, fmpq(1))
    return Tables(frequencies, (1 + arb(factor).log() / arb(L0).log()).sqrt())


def _llama3(v: Mapping[str, Any], base: fmpq, d: int) -> Tables:
    """Llama 3: long waves divided by the factor, short ones kept, a smooth step between."""
    factor, L0 = number(v["factor"]), number(v["original_length"])
    low, high = number(v["low_freq_factor"]), number(v["high_freq_factor"])
    frequencies: list[Value] = []
    for theta in powers(base, d // 2, d):
        turns = enclosed(theta) * L0 / (2 * arb.pi())
        if less(turns, low):
            frequencies.append(multiply(theta, 1 / factor))
        elif less(high, turns):
            frequencies.append(theta)
        else:
            smooth = (turns - low) / (high - low)
            frequencies.append(multiply(theta, (1 - smooth) / factor + smooth))
    return Tables(frequencies, fmpq(1))


def _dynamic(v: Mapping[str, Any], base: fmpq, d: int) -> Tables:
    """Dynamic NTK: the base grows with the length beyond the original one."""
    factor, L0 = number(v["factor"]), number(v["original_length"])
    length = max(number(v["length"]), L0) if v.get("length") is not None else L0
    stretch = factor * length / L0 - (factor - 1)
    if stretch == 1:
        return Tables(powers(base, d // 2, d), fmpq(1))
    grown = arb(base) * (arb(stretch).log() * fmpq(d, d - 2)).exp()
    return Tables(powers(grown, d // 2, d), fmpq(1))


def _proportional(v: Mapping[str, Any], base: fmpq, d: int) -> Tables:
    """Proportional: exponents over the whole head, zero frequencies behind the rotated part."""
    head_dim = int(v.get("head_dim", d))
    turning = int(v.get("partial_rotary_factor", 1) * head_dim // 2)  # in binary64: OWN-ROPE4
    factor = number(v.get("factor", 1))
    thetas = [multiply(x, 1 / factor) for x in powers(base, turning, head_dim)[:turning]]
    return Tables(thetas + [ZERO] * (d // 2 - turning), fmpq(1))


def tables(variant: Mapping[str, Any], base: fmpq, d: int) -> Tables:
    """Return the frequencies of a variant for d rotated features."""
    kind = variant.get("kind", "default")
    if kind not in KEYS:
        raise CertifyError(f"variant kind is {kind!r}, but certification defines {sorted(KEYS)}")
    expect(variant, KEYS[kind] | {"kind"}, "variant number")
    if kind == "default":
        return Tables(powers(base, d // 2, d), fmpq(1))
    if kind == "linear":
        inverse = 1 / number(variant["factor"])
        return Tables([multiply(x, inverse) for x in powers(base, d // 2, d)], fmpq(1))
    rules = {
        "dynamic": _dynamic,
        "yarn": _yarn,
        "longrope": _longrope,
        "llama3": _llama3,
        "proportional": _proportional,
    }
    return rules[kind](variant, base, d)


def turn(angle: Value, factor: Value) -> tuple[Value, Value]:
    """Return factor·cos and factor·sin of an angle; the angle 0 is exact."""
    if isinstance(angle, fmpq) and angle == 0:
        return factor, ZERO
    sine, cosine = enclosed(angle).sin_cos()
    return multiply(cosine, factor), multiply(sine, factor)


def rotate(x: list[fmpq], cosine: list[Value], sine: list[Value], interleaved: bool) -> list[Value]:
    """Rotate the pairs of one vector; the features behind the pairs pass through."""
    pairs = len(cosine)
    result: list[Value] = list(x)
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        result[a] = add(multiply(x[a], cosine[i]), multiply(-x[b], sine[i]))
        result[b] = add(multiply(x[a], sine[i]), multiply(x[b], cosine[i]))
    return result


def _rotated(x: Array, cosine: list[list[Value]], sine: list[list[Value]], inter: bool) -> Cells:
    values: list[Value] = []
    for block in np.asarray(x).reshape(-1, *x.shape[-2:]):
        for m, vector in enumerate(block.tolist()):
            values += rotate([rational(t) for t in vector], cosine[m], sine[m], inter)
    return Cells(x.shape, values)


def prepare(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write a rotation exactly; return what evaluates it at the present precision."""
    expect(inputs, frozenset({"x", "positions", "d_output"}), "input")
    expect(parameters, frozenset({"base", "rotary_dim", "variant"}), "parameter")
    choice = choose(conventions, {"pairing": ("interleaved", "half_split")})
    expect(conventions, frozenset({"pairing"}), "convention")
    x, inter = inputs["x"], choice["pairing"] == "interleaved"
    d = int(parameters.get("rotary_dim") or x.shape[-1])
    base = number(parameters.get("base", 10000.0))
    variant = parameters.get("variant") or {"kind": "default"}
    positions = [int(m) for m in inputs["positions"]]

    def evaluate() -> dict[str, Cells]:
        theta, factor = tables(variant, base, d)
        turns = [[turn(multiply(t, fmpq(m)), factor) for t in theta] for m in positions]
        cosine = [[pair[0] for pair in row] for row in turns]
        sine = [[pair[1] for pair in row] for row in turns]
        cells = {
            "frequencies": Cells((d // 2,), theta),
            "attention_factor": Cells((), [factor]),
            "cosine": Cells((len(positions), d // 2), [c for row in cosine for c in row]),
            "sine": Cells((len(positions), d // 2), [s for row in sine for s in row]),
            "output": _rotated(x, cosine, sine, inter),
        }
        if "d_output" in inputs:
            back = [[multiply(s, fmpq(-1)) for s in row] for row in sine]
            cells["d_x"] = _rotated(inputs["d_output"], cosine, back, inter)
        return cells

    return evaluate


def prepare_decay(
    inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> Callable[[], dict[str, Cells]]:
    """Write the mean partial sum of the long-term decay bound.

    (1/(d/2)) Σ_{i=1}^{d/2} |S_i|,  S_i = Σ_{j<i} e^{i s θ_j}.
    """
    expect(inputs, frozenset({"distances"}), "input")
    expect(parameters, frozenset({"d", "base"}), "parameter")
    expect(conventions, frozenset(), "convention")
    half = int(parameters["d"]) // 2
    base = number(parameters.get("base", 10000.0))
    distances = [int(s) for s in inputs["distances"]]

    def decay(s: int, theta: list[Value]) -> Value:
        if s == 0:
            # |S_i| = i: the mean of 1 .. d/2
            return fmpq(half + 1, 2)
        real, imaginary, total = arb(0), arb(0), arb(0)
        for t in theta:
            sine, cosine = (enclosed(t) * s).sin_cos()
            real, imaginary = real + cosine, imaginary + sine
            total += (real * real + imaginary * imaginary).sqrt()
        return total / half

    def evaluate() -> dict[str, Cells]:
        theta = powers(base, half, 2 * half)
        return {"decay": Cells((len(distances),), [decay(s, theta) for s in distances])}

    return evaluate
