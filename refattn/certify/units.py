"""Error units: how far a correct implementation may be off, element by element.

Every float output has the tensor `<name>.unit`, what one rounding of an operand or of the result
moves, and `<name>.unit_logit`, what the roundings of the arithmetic move, each counted. Both are
in float64 here; a pack rounds them up. spec/numerics.md derives them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.certify.attention_units import attention_units
from refattn.certify.causal_units import causal_units
from refattn.certify.cells import Tensors
from refattn.certify.errors import CertifyError
from refattn.certify.gated_units import gated_units
from refattn.certify.majorant import Known
from refattn.certify.multihead_units import multihead_units
from refattn.certify.other_units import (
    head_importance_units,
    merge_units,
    score_units,
    tiles_units,
)
from refattn.certify.rope_units import alibi_units, rope_decay_units, rope_units

LARGEST = 2.0**120
"""Units are cut here, so that they stay finite in float32."""

Rule = Callable[
    [Tensors, Mapping[str, Any], Mapping[str, Any]], tuple[dict[str, Known], dict[str, float]]
]


def _none(
    inputs: Tensors, parameters: Mapping[str, Any], conventions: Mapping[str, Any]
) -> tuple[dict[str, Known], dict[str, float]]:
    """Integers and bits are exact: they have no unit."""
    return {}, {}


RULES: dict[str, Rule] = {
    "attention": attention_units,
    "multihead": multihead_units,
    "causal_module": causal_units,
    "gated_cross_attention": gated_units,
    "head_importance": head_importance_units,
    "rope": rope_units,
    "alibi": alibi_units,
    "tiles": tiles_units,
    "merge": merge_units,
    "score": score_units,
    "rope_decay": rope_decay_units,
    "traffic": _none,
    "keep_mask": _none,
}
"""The rule of every operation."""


def units(
    op: str,
    inputs: Mapping[str, NDArray[Any]],
    parameters: Mapping[str, Any],
    conventions: Mapping[str, Any],
) -> tuple[dict[str, NDArray[np.float64]], dict[str, float]]:
    """Return the unit tensors of a case, and the magnitudes that `refattn.bounds` needs.

    Spec: NUM-MODEL1, NUM-LOGIT1, NUM-FORWARD1, NUM-LSE1, NUM-BACKWARD1, NUM-ROPE1, NUM-OTHER1.

    Args:
        op: the operation's name.
        inputs: its input tensors.
        parameters: its parameters.
        conventions: its conventions.

    Returns:
        units: `<name>.unit` for every float output, and `<name>.unit_logit` where it is not 0;
            finite, never negative, of the output's shape.
        magnitudes: finite numbers by name.

    Raises:
        CertifyError: no such operation.
    """
    if op not in RULES:
        raise CertifyError(f"op is {op!r}, but it must be one of {', '.join(RULES)} [units]")
    with np.errstate(all="ignore"):
        found, magnitudes = RULES[op](inputs, parameters, conventions)
    tensors: dict[str, NDArray[np.float64]] = {}
    for name, x in found.items():
        tensors[f"{name}.unit"] = _cut(x.operand)
        if np.any(x.accumulated):
            tensors[f"{name}.unit_logit"] = _cut(x.accumulated)
    return tensors, {name: float(_cut(np.asarray(v))) for name, v in magnitudes.items()}


def _cut(x: NDArray[Any]) -> NDArray[np.float64]:
    return np.minimum(np.nan_to_num(np.asarray(x, np.float64), nan=LARGEST), LARGEST)
