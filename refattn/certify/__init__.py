"""Certified values: an oracle that imports nothing of the reference.

`certify` encloses every result of an operation in a ball, raises the precision until each
stored float64 is proven correctly rounded, and reports how. `recertify` proves a sample again
with a second engine that shares no formula with the first.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refattn.certify.engine import Certificate, solve
from refattn.certify.errors import Ambiguous, CertifyError, Disagreement, Midpoint
from refattn.certify.exact import Array, widened
from refattn.certify.flint_attention import prepare as prepare_attention
from refattn.certify.flint_causal import prepare as prepare_causal
from refattn.certify.flint_gated import prepare as prepare_gated
from refattn.certify.flint_multihead import prepare as prepare_multihead
from refattn.certify.flint_other import prepare_alibi, prepare_importance, prepare_score
from refattn.certify.flint_rope import prepare as prepare_rope
from refattn.certify.flint_rope import prepare_decay
from refattn.certify.flint_states import prepare_merge, prepare_tiles
from refattn.certify.mpmath_engine import recertify
from refattn.certify.philox import keep_mask
from refattn.certify.traffic import traffic

Prepare = Callable[
    [Mapping[str, Array], Mapping[str, Any], Mapping[str, Any]], Callable[[], Mapping[str, Any]]
]
"""What writes a problem exactly and returns its evaluation at the present precision."""

ENCLOSED: dict[str, Prepare] = {
    "attention": prepare_attention,
    "multihead": prepare_multihead,
    "causal_module": prepare_causal,
    "gated_cross_attention": prepare_gated,
    "head_importance": prepare_importance,
    "rope": prepare_rope,
    "rope_decay": prepare_decay,
    "alibi": prepare_alibi,
    "tiles": prepare_tiles,
    "merge": prepare_merge,
    "score": prepare_score,
}
"""Operations with real results."""

COUNTED: dict[str, Callable[..., dict[str, Array]]] = {"traffic": traffic, "keep_mask": keep_mask}
"""Operations with integer results."""


def round_up(x: Array) -> Array:
    """Round non-negative float64 values up to float32."""
    near = np.asarray(x, dtype=np.float64).astype(np.float32)
    low = near.astype(np.float64) < x
    return np.where(low, np.nextafter(near, np.float32(np.inf)), near).astype(np.float32)


def _units(
    op: str, inputs: Mapping[str, Array], parameters: Mapping[str, Any], conventions: Any
) -> tuple[dict[str, Array], dict[str, float]]:
    from refattn.certify.units import units

    tensors, magnitudes = units(op, inputs, parameters, conventions)
    with np.errstate(over="ignore"):
        return {name: round_up(x) for name, x in tensors.items()}, dict(magnitudes)


def certify(
    op: str,
    inputs: Mapping[str, Array],
    parameters: Mapping[str, Any],
    conventions: Mapping[str, Any],
    *,
    midpoints: str = "refuse",
) -> Certificate:
    """Compute the outputs of an operation and prove every float of them.

    Spec: OWN-EXACT1, NUM-MODEL1.

        stored = rnd64(exact);  rnd_f(stored) = rnd_f(exact) for f = float32, float16, bfloat16

    Args:
        op: name of the operation.
        inputs: arrays by name; floats are taken as the exact numbers they are.
        parameters: numbers by name; floats are taken as binary64.
        conventions: choices by name; absent ones take their default.
        midpoints: "refuse" an element whose float64 is a midpoint of a narrower format that the
            element itself is not, or "record" its place under `midpoints` in the record.

    Returns:
        Outputs (float64, or int64 and bool), units, magnitudes, and the record of the proof.

    Raises:
        Ambiguous: an element is undecided at 4096 bits, or no one float64 serves it.
        CertifyError: the operation, an option or a non-finite operand is not defined here.
    """
    arrays = {name: widened(x) for name, x in inputs.items()}
    for name, x in arrays.items():
        if x.size == 0:
            raise CertifyError(f"{name} has shape {x.shape}, but certification needs elements")
    try:
        if op in COUNTED:
            outputs = COUNTED[op](arrays, parameters, conventions)
            count = sum(int(x.size) for x in outputs.values())
            record = {
                "engine": "integers",
                "version": "1",
                "precision_bits": 0,
                "largest_radius": 0.0,
                "elements": count,
                "exact_elements": count,
                "ambiguous": 0,
            }
        elif op in ENCLOSED:
            outputs, record = solve(ENCLOSED[op](arrays, parameters, conventions), midpoints)
        else:
            raise CertifyError(f"operation is {op!r}, but there are {sorted(ENCLOSED | COUNTED)}")
    except KeyError as error:
        raise CertifyError(f"{op} needs {error.args[0]}, which is not given") from None
    tensors, magnitudes = _units(op, arrays, parameters, conventions)
    return Certificate(outputs, tensors, magnitudes, record)


__all__ = [
    "Ambiguous",
    "Certificate",
    "CertifyError",
    "Disagreement",
    "Midpoint",
    "certify",
    "recertify",
]
