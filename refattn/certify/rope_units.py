"""Error units of rotations, of ALiBi and of the decay bound (NUM-ROPE1, NUM-OTHER1)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from refattn.certify.attention_units import exact_finite
from refattn.certify.cells import Tensors, distance_of
from refattn.certify.majorant import EXTRA, Array, Known

TABLE = 8.0
"""Rounding units granted to an entry of a table, absolute, times the attention factor."""

SLOPE = 16.0
"""Rounding units granted to a slope, relative, beside one a head for a repeated product."""

RAMPS = frozenset({"dynamic", "yarn", "llama3"})
"""Variants whose frequencies take more than a division."""

Sizes = dict[str, float]


def frequency_bound(d: int, base: float, variant: Mapping[str, Any]) -> Array:
    """Return an upper bound of every frequency: the paper's, over the smallest factor used."""
    theta = np.exp(-2.0 * np.arange(d // 2) / d * math.log(base))
    kind = variant.get("kind", "default")
    if kind == "linear":
        return theta / float(variant["factor"])
    if kind == "longrope":
        factors = [np.asarray(variant[n], np.float64) for n in ("short_factor", "long_factor")]
        return theta / np.minimum(*factors)
    if kind == "proportional":
        return theta / min(1.0, float(variant.get("factor", 1.0)))
    return theta / min(1.0, float(variant.get("factor", 1.0)))


def attention_factor_bound(variant: Mapping[str, Any]) -> float:
    """Return an upper bound of the attention factor: 1 but for yarn and longrope."""
    kind = variant.get("kind", "default")
    if variant.get("attention_factor") is not None:
        return float(variant["attention_factor"])
    factor = float(variant.get("factor") or 1.0)
    if kind == "yarn":
        weight = max(1.0, float(variant.get("mscale") or 1.0))
        return 1.0 + 0.1 * weight * max(0.0, math.log(factor))
    if kind == "longrope" and factor > 1:
        return math.sqrt(1.0 + math.log(factor) / math.log(float(variant["original_length"])))
    return 1.0


def angle_counts(d: int, base: float, variant: Mapping[str, Any]) -> Array:
    """Return the roundings of binary64 granted to each frequency and to the angle it gives."""
    kind = variant.get("kind", "default")
    powers = 2.0 * np.arange(d // 2) / d * abs(math.log(base))
    return np.asarray(EXTRA + 2.0 * powers + (32.0 if kind in RAMPS else 4.0))


def rope_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> tuple[dict[str, Known], Sizes]:
    """Return the majorants of every output of `rope`; the second unit counts binary64's."""
    x = exact_finite(inputs["x"]).value
    d = int(parameters.get("rotary_dim") or x.shape[-1])
    base = float(parameters.get("base", 10000.0))
    variant = parameters.get("variant") or {}
    theta, a = frequency_bound(d, base, variant), attention_factor_bound(variant)
    counts = angle_counts(d, base, variant)
    angle = np.abs(np.asarray(inputs["positions"], np.float64))[..., None] * theta * counts
    by_head = angle if angle.ndim == 2 else angle[..., None, :, :]  # positions a batch item
    table = Known(angle, a * angle, np.full_like(angle, a))
    found = {
        "frequencies": Known(theta, theta * counts, theta),
        "attention_factor": Known(np.asarray(a), np.zeros(()), np.asarray(a)),
        "cosine": table,
        "sine": table,
        "output": _rotated(x, d, a, by_head, conventions),
    }
    if "d_output" in inputs:
        dx = exact_finite(inputs["d_output"]).value
        found["d_x"] = _rotated(dx, d, a, by_head, conventions)
    roundings = {"frequencies": 4.0, "attention_factor": SLOPE, "cosine": TABLE, "sine": TABLE}
    sizes: Sizes = {}
    for name in found:
        sizes[f"{name}.floor"] = 4.0 * (1.0 + a)
        sizes[f"{name}.floor_operand"] = 1.0
        sizes[f"{name}.angle"] = 1.0
        if name in roundings:
            sizes[f"{name}.statistic"] = 1.0
        sizes[f"{name}.roundings"] = roundings.get(name, TABLE + 4.0)
    return found, sizes


def _rotated(x: Array, d: int, a: float, angle: Array, conventions: Mapping[str, Any]) -> Known:
    """Return the units of rotated features: both members of a pair have |x₁| + |x₂|."""
    size = np.zeros_like(x)
    angles = np.zeros_like(x)
    half = conventions.get("pairing", "interleaved") == "half_split"
    first = slice(0, d // 2) if half else slice(0, d, 2)
    second = slice(d // 2, d) if half else slice(1, d, 2)
    both = a * (np.abs(x[..., first]) + np.abs(x[..., second]))
    for part in (first, second):
        size[..., part] = both
        angles[..., part] = both * angle
    return Known(size, angles, size)


def alibi_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> tuple[dict[str, Known], Sizes]:
    """Return the majorants of slopes and bias: relative errors."""
    heads, n_q, n_k = (int(parameters[n]) for n in ("heads", "n_q", "n_k"))
    alignment = conventions.get("alignment", "top_left")
    offset = {"top_left": 0, "bottom_right": n_k - n_q}.get(alignment, alignment)
    steps = distance_of(int(offset), n_q, n_k, conventions.get("distance", "absolute"))
    m = slopes_of(heads, conventions.get("slope_rule", "authors"))
    bias = np.abs(m[:, None, None] * steps)
    found = {
        "slopes": Known(m, np.zeros_like(m), m),
        "bias": Known(bias, np.zeros_like(bias), bias),
    }
    sizes = {"slopes.roundings": SLOPE + heads, "bias.roundings": SLOPE + heads + 4.0}
    for name in found:
        sizes[f"{name}.floor"], sizes[f"{name}.floor_operand"] = 2.0, 2.0
    return found, sizes


def slopes_of(heads: int, rule: str) -> Array:
    """Return the slopes of the heads in float64."""
    power = 2 ** (heads.bit_length() - 1)
    if rule == "geometric" or power == heads:
        return np.asarray(2.0 ** (-8.0 * np.arange(1, heads + 1) / heads))
    rest = 2.0 ** (-4.0 * np.arange(1, 2 * (heads - power), 2) / power)
    return np.concatenate([2.0 ** (-8.0 * np.arange(1, power + 1) / power), rest])


def rope_decay_units(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> tuple[dict[str, Known], Sizes]:
    """Return the majorants of the mean length of the partial sums S_i."""
    d, base = int(parameters["d"]), float(parameters.get("base", 10000.0))
    theta = frequency_bound(d, base, {})
    s = np.asarray(inputs["distances"], np.float64)[:, None]
    S_abs = np.abs(np.cumsum(np.exp(1j * s * theta), axis=1))
    i = np.arange(1, d // 2 + 1, dtype=np.float64)
    decay = S_abs.mean(axis=1)
    accumulated = np.mean(1.5 * TABLE * i + 1.5 * i**2 + 4 * S_abs, axis=1)
    accumulated = accumulated + (d / 2 + EXTRA) * decay
    turns = np.cumsum(np.abs(s) * theta * angle_counts(d, base, {}), axis=1)
    sizes = {
        "decay.fine": float(np.max(turns.mean(axis=1), initial=0.0)),
        "decay.floor": 4.0 * d,
        "decay.floor_operand": 1.0,
    }
    return {"decay": Known(decay, accumulated, decay)}, sizes
