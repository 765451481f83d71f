"""Rotary embedding in the second engine: complex numbers turned by e^{i m θ}."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from mpmath import mp, mpc, mpf

from refattn.certify.mpmath_engine.numbers import Array, number, total


def plain(base: Any, d: int) -> list[Any]:
    """θ_k = base^(-2k/d)."""
    return [mp.power(base, mpf(-2 * k) / d) for k in range(d // 2)]


def yarn_range(v: Mapping[str, Any], base: Any, d: int) -> tuple[Any, Any]:
    """Return the features between which the ramp of YaRN runs."""

    def feature(rotations: Any) -> Any:
        wavelength = number(v["original_length"]) / rotations
        return mpf(d) / 2 * mp.log(wavelength / (2 * mp.pi), base)

    low = feature(number(v.get("beta_fast") or 32))
    high = feature(number(v.get("beta_slow") or 1))
    if v.get("truncate", True):
        low, high = mp.floor(low), mp.ceil(high)
    return max(low, mpf(0)), min(high, mpf(d - 1))


def yarn(v: Mapping[str, Any], base: Any, d: int) -> tuple[list[Any], Any]:
    """Mix interpolated and unchanged frequencies."""
    s = number(v["factor"])
    low, high = yarn_range(v, base, d)
    if low == high:
        high += number(0.001)
    thetas = []
    for k, theta in enumerate(plain(base, d)):
        gamma = 1 - min(max((k - low) / (high - low), mpf(0)), mpf(1))
        thetas.append((1 - gamma) * theta / s + gamma * theta)
    if v.get("attention_factor") is not None:
        return thetas, number(v["attention_factor"])

    def magnitude(m: Any) -> Any:
        return mpf(1) if s <= 1 else m * mp.log(s) / 10 + 1

    if v.get("mscale") and v.get("mscale_all_dim"):
        return thetas, magnitude(number(v["mscale"])) / magnitude(number(v["mscale_all_dim"]))
    return thetas, magnitude(mpf(1))


def llama3(v: Mapping[str, Any], base: Any, d: int) -> list[Any]:
    """Treat each wave by its length."""
    s, context = number(v["factor"]), number(v["original_length"])
    low, high = number(v["low_freq_factor"]), number(v["high_freq_factor"])
    thetas = []
    for theta in plain(base, d):
        wavelength = 2 * mp.pi / theta
        if wavelength < context / high:
            thetas.append(theta)
        elif wavelength > context / low:
            thetas.append(theta / s)
        else:
            smooth = (context / wavelength - low) / (high - low)
            thetas.append((1 - smooth) * theta / s + smooth * theta)
    return thetas


def frequencies(v: Mapping[str, Any], base: Any, d: int) -> tuple[list[Any], Any]:
    """Return the frequencies and the attention factor of a variant."""
    kind = v.get("kind", "default")
    if kind == "yarn":
        return yarn(v, base, d)
    if kind == "llama3":
        return llama3(v, base, d), mpf(1)
    if kind == "linear":
        return [theta / number(v["factor"]) for theta in plain(base, d)], mpf(1)
    if kind == "dynamic":
        s, L0 = number(v["factor"]), number(v["original_length"])
        length = number(v["length"]) if v.get("length") is not None else L0
        ratio = s * max(length, L0) / L0 - s + 1
        return plain(base * mp.power(ratio, mpf(d) / (d - 2)), d), mpf(1)
    if kind == "proportional":
        width = int(v.get("head_dim", d))
        turning = int(v.get("partial_rotary_factor", 1) * width // 2)  # in binary64: OWN-ROPE4
        s = number(v.get("factor", 1))
        return [
            mp.power(base, mpf(-2 * k) / width) / s if k < turning else mpf(0)
            for k in range(d // 2)
        ], mpf(1)
    if kind == "longrope":
        L0 = number(v["original_length"])
        past = v.get("length") is not None and number(v["length"]) > L0
        factors = v["long_factor" if past else "short_factor"]
        thetas = [x / number(f) for x, f in zip(plain(base, d), factors, strict=True)]
        if v.get("attention_factor") is not None:
            return thetas, number(v["attention_factor"])
        s = number(v["factor"])
        return thetas, mpf(1) if s <= 1 else mp.sqrt(1 + mp.log(s, L0))
    return plain(base, d), mpf(1)


def evaluator(t: Mapping[str, Array], p: Mapping[str, Any], c: Mapping[str, Any]) -> Any:
    """Return a function from output name and index to its value at the present precision."""
    d = int(p.get("rotary_dim") or t["x"].shape[-1])
    thetas, factor = frequencies(
        p.get("variant") or {"kind": "default"}, number(p.get("base", 10000.0)), d
    )
    interleaved = c.get("pairing", "interleaved") == "interleaved"

    @cache
    def turn(m: int, k: int) -> Any:
        return factor * mp.expj(thetas[k] * m)

    def rotated(x: Array, index: tuple[int, ...], sign: int) -> Any:
        *place, n, e = index
        vector = x[(*place, n)]
        if e >= d:
            return number(vector[e])
        k, second = (e // 2, e % 2) if interleaved else (e % (d // 2), e // (d // 2))
        a, b = (2 * k, 2 * k + 1) if interleaved else (k, k + d // 2)
        z = turn(int(t["positions"][n]), k)
        z = mp.conj(z) if sign < 0 else z
        product = mpc(number(vector[a]), number(vector[b])) * z
        return product.imag if second else product.real

    def value(name: str, index: tuple[int, ...]) -> Any:
        if name == "frequencies":
            return thetas[index[0]]
        if name == "attention_factor":
            return factor
        if name in ("cosine", "sine"):
            z = turn(int(t["positions"][index[0]]), index[1])
            return z.real if name == "cosine" else z.imag
        if name == "d_x":
            return rotated(t["d_output"], index, -1)
        return rotated(t["x"], index, 1)

    return value


def decay_evaluator(t: Mapping[str, Array], p: Mapping[str, Any], c: Mapping[str, Any]) -> Any:
    """Return the mean absolute partial sum of e^{i s θ_j}."""
    half = int(p["d"]) // 2
    thetas = plain(number(p.get("base", 10000.0)), 2 * half)

    def value(name: str, index: tuple[int, ...]) -> Any:
        s = int(t["distances"][index[0]])
        z = [mp.expj(s * theta) for theta in thetas]
        return total([abs(mp.fsum(z[:k])) for k in range(1, half + 1)]) / half

    return value
