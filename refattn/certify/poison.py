"""Where NaN goes: an element is NaN if an operand that is NaN reaches it.

Under `masked: select` a disallowed cell is never read. Under `masked: add` every cell is read: its
logit gets -∞ added, and its value is multiplied by a weight of zero. An empty row has weights and
gradients of its policy, whatever its logits, and these too meet all that is read.
Infinite operands are refused where they would be read, except where only a zero meets them under
`add`: 0·∞ = NaN.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from refattn.certify.errors import CertifyError
from refattn.certify.exact import Array
from refattn.certify.setting import Setting


class Reach(NamedTuple):
    """For each output, the elements that are NaN."""

    output: Array
    logsumexp: Array
    d_logits: Array
    """bool (b, h, n_q, n_k + 1): gradients of logits; the last column is the sink."""
    d_query: Array
    d_key: Array
    """bool (b, h, n_k, d_k), by query head as d_value."""
    d_value: Array


def clean(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Replace every non-finite float by zero; `reach` says where it would have been felt."""
    return {
        name: np.where(np.isfinite(x), x, 0).astype(np.float64)
        if np.asarray(x).dtype.kind not in "biu"
        else np.asarray(x)
        for name, x in inputs.items()
    }


def _any(test: Array) -> Array:
    return np.asarray(np.asarray(test).any(axis=-1))


def _refuse_infinite(inputs: Mapping[str, Array], s: Setting, logit_read: Array) -> None:
    """Refuse infinite operands where they are read."""
    K_inf = _any(np.isinf(inputs["key"]))[:, s.kv_head]
    V_inf = _any(np.isinf(inputs["value"]))[:, s.kv_head]
    read = (logit_read & K_inf[:, :, None, :]).any()
    read |= (s.allowed & V_inf[:, :, None, :]).any()
    read |= bool(np.isinf(inputs["query"]).any())
    if s.choice["empty_row"] == "uniform":
        read |= (s.empty[..., None] & V_inf[:, :, None, :]).any()
    if "bias" in inputs:
        read |= (logit_read & np.broadcast_to(np.isposinf(inputs["bias"]), s.allowed.shape)).any()
    for name in ("slopes", "sinks", "d_output", "d_logsumexp"):
        read |= name in inputs and bool(np.isinf(inputs[name]).any())
    if read:
        raise CertifyError("an infinite operand is read; certification defines NaN only")


def _bad_rows(inputs: Mapping[str, Array], s: Setting, logit_read: Array) -> Array:
    """Mark the rows that read a NaN logit."""
    K_nan = _any(np.isnan(inputs["key"]))[:, s.kv_head]
    Q_nan = _any(np.isnan(inputs["query"]))
    logit_nan = Q_nan[..., None] | K_nan[:, :, None, :]
    if "bias" in inputs:
        logit_nan = logit_nan | np.broadcast_to(np.isnan(inputs["bias"]), s.allowed.shape)
    if "slopes" in inputs:
        logit_nan = logit_nan | np.isnan(inputs["slopes"])[None, :, None, None]
    bad = np.asarray((logit_read & logit_nan).any(axis=-1))
    if "sinks" in inputs:
        bad = bad | np.isnan(inputs["sinks"])[None, :, None]
    return np.asarray(bad)


def _met_by_zeros(inputs: Mapping[str, Array], s: Setting, dO_nan: Array) -> tuple[Array, ...]:
    """Find what the zeros of empty rows make NaN under `add`, in d_query, d_key and d_value."""
    zeros = s.empty[..., None] & (s.choice["masked"] == "add")
    K_bad = ~np.isfinite(inputs["key"])[:, s.kv_head]
    return (
        zeros & K_bad.any(axis=2, keepdims=True),
        (zeros & ~np.isfinite(inputs["query"])).any(axis=2, keepdims=True),
        (zeros & dO_nan).any(axis=2, keepdims=True),
    )


def reach(inputs: Mapping[str, Array], s: Setting) -> Reach:
    """Find the elements of every output that a NaN reaches."""
    adds = s.choice["masked"] == "add"
    policy = s.choice["empty_row"]
    full = ~s.empty[..., None] & np.ones_like(s.allowed)
    logit_read = full if adds else s.allowed
    _refuse_infinite(inputs, s, logit_read)
    bad = _bad_rows(inputs, s, logit_read)
    by_policy = s.empty & (policy == "nan")
    value_read = logit_read | (s.empty[..., None] & (adds or policy != "zero"))
    V_bad = ~np.isfinite(inputs["value"])[:, s.kv_head]
    through_value = np.einsum("bhij,bhjc->bhic", value_read, V_bad)
    touched = logit_read | by_policy[..., None]
    dO_nan = np.isnan(inputs.get("d_output", np.zeros((*s.empty.shape, 1))))
    dL_nan = np.isnan(inputs.get("d_logsumexp", np.zeros(s.empty.shape)))
    value_felt = (logit_read & _any(V_bad)[:, :, None, :]).any(axis=-1)
    dS_row: Array = bad | by_policy | (~s.empty & (value_felt | dO_nan.any(axis=-1) | dL_nan))
    uniform = s.empty[..., None] & (policy == "uniform")
    dS = dS_row[..., None] & touched
    dV_source = (bad | by_policy)[..., None] | dO_nan
    d_value = np.einsum("bhij,bhic->bhjc", touched | uniform, dV_source)
    met_d_query, met_d_key, met_d_value = _met_by_zeros(inputs, s, dO_nan)
    return Reach(
        (bad | by_policy)[..., None] | through_value,
        bad,
        np.concatenate([dS, dS_row[..., None]], axis=-1),
        dS.any(axis=-1)[..., None] | met_d_query,
        dS.any(axis=2)[..., None] | met_d_key,
        d_value | met_d_value,
    )
