"""Logits of one head, kept exact up to one irrational scale and the hyperbolic tangent.

S = scale·raw, capped, plus bias, in the order the conventions say. Two logits are equal if and
only if their exact identities are (OWN-EXACT1).
"""

from collections.abc import Hashable
from math import isqrt
from typing import Any, NamedTuple

from flint import arb, fmpq

from refattn.certify.exact import power, rational


class Scale(NamedTuple):
    """The scale of the logits: a rational number, or 1/√d for a d that is no square."""

    exact: fmpq | None
    d: int

    def ball(self) -> arb:
        """Enclose the scale at the present precision."""
        return arb(self.exact) if self.exact is not None else arb(self.d).rsqrt()


class Logits(NamedTuple):
    """The exact ingredients of the logits of one head: raw·2^raw_e and bias·2^bias_e."""

    raw: list[list[Any]]
    raw_e: int
    bias: list[list[int]] | None
    bias_e: int
    scale: Scale
    softcap: float | None
    bias_first: bool
    """The cap comes after the bias."""
    sink: float | None
    """The logit of the column behind the last key."""


def scale_of(parameters: dict[str, Any], d: int) -> Scale:
    """Return the given scale, or 1/√d_k as a real number."""
    if parameters.get("scale") is not None:
        return Scale(rational(parameters["scale"]), d)
    root = isqrt(d)
    return Scale(fmpq(1, root) if root * root == d else None, d)


def _bias(x: Logits, i: int, j: int) -> fmpq:
    return fmpq(x.bias[i][j]) * power(x.bias_e) if x.bias is not None else fmpq(0)


def _sum_identity(x: Logits, i: int, j: int) -> Hashable:
    """Identify scale·raw + bias: one rational, or the pair (raw, bias) beside an irrational."""
    bias = _bias(x, i, j)
    raw = fmpq(x.raw[i][j]) * power(x.raw_e)
    if x.scale.exact is not None:
        return (fmpq(0), raw * x.scale.exact + bias)
    return (raw, bias)


def identity(x: Logits, i: int, j: int) -> Hashable:
    """Return the exact identity of logit (i, j); column n_k is the sink."""
    if j == len(x.raw[i]):
        return (fmpq(0), rational(x.sink or 0.0))
    if x.softcap is None:
        return _sum_identity(x, i, j)
    if x.bias_first:
        inner = _sum_identity(x, i, j)
        # a capped sum is zero only where the sum is; else it is never rational
        return inner if inner == (fmpq(0), fmpq(0)) else ("capped", inner)
    return (fmpq(x.raw[i][j]) * power(x.raw_e), _bias(x, i, j))


def exact_logit(x: Logits, i: int, j: int) -> fmpq | None:
    """Return logit (i, j) where it is rational by structure."""
    if j == len(x.raw[i]):
        return rational(x.sink or 0.0)
    raw, bias = fmpq(x.raw[i][j]) * power(x.raw_e), _bias(x, i, j)
    if x.softcap is not None and x.bias_first:
        return fmpq(0) if _sum_identity(x, i, j) == (fmpq(0), fmpq(0)) else None
    if raw == 0:
        return bias
    if x.softcap is None and x.scale.exact is not None:
        return raw * x.scale.exact + bias
    return None


def _inner(x: Logits, i: int, j: int, scale: arb) -> arb:
    """Enclose what the cap is applied to."""
    if x.scale.exact is not None:
        inner = fmpq(x.raw[i][j]) * power(x.raw_e) * x.scale.exact
        return arb(inner + _bias(x, i, j) if x.bias_first else inner)
    inner_ball = arb(x.raw[i][j]) * arb((1, x.raw_e)) * scale
    return inner_ball + arb(_bias(x, i, j)) if x.bias_first else inner_ball


def logit(x: Logits, i: int, j: int, scale: arb) -> arb:
    """Enclose logit (i, j) at the present precision; `scale` is the ball of the scale."""
    if j == len(x.raw[i]):
        return arb(rational(x.sink or 0.0))
    if x.softcap is not None:
        cap = arb(rational(x.softcap))
        capped = cap * (_inner(x, i, j, scale) / cap).tanh()
        return capped if x.bias_first else capped + arb(_bias(x, i, j))
    exact = exact_logit(x, i, j)
    if exact is not None:
        return arb(exact)
    return _inner(x, i, j, scale) + arb(_bias(x, i, j))


def cap_slope(x: Logits, i: int, j: int, scale: arb) -> arb | fmpq:
    """Return the derivative of the cap at (i, j): 1 - tanh²(x/cap), exactly 1 at zero.

    Written as 1/cosh²(x/cap), which keeps its relative precision where the cap saturates.
    """
    inner = identity(x, i, j)
    raw_zero = x.raw[i][j] == 0 if not x.bias_first else inner == (fmpq(0), fmpq(0))
    if raw_zero:
        return fmpq(1)
    return (_inner(x, i, j, scale) / arb(rational(x.softcap or 1.0))).cosh() ** -2
