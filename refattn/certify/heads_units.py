"""Error units of many heads whose operands carry errors: what stands between the projections."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.certify.attention_units import backward, forward
from refattn.certify.floor_units import observe
from refattn.certify.head_units import Forward, Head
from refattn.certify.majorant import Array, Known, exact


class Heads(NamedTuple):
    """Operands of all heads of all items, and what they have in common."""

    Q: Known
    K: Known
    V: Known
    allowed: Callable[[int], NDArray[np.bool_]]
    """Cells (n_q, n_k) of a batch item."""
    factor: Array | None
    """keep / keep_probability, (b, h, n_q, n_k)."""
    scale: float
    fill: bool
    """Empty rows are uniform."""


def heads_units(x: Heads, dO: Known | None, track: dict[str, float]) -> tuple[Known, list[Known]]:
    """Run every head forward, and backward where dO is given; stack what they return."""
    batch, heads, n_q, _ = x.Q.value.shape
    n_k = x.K.value.shape[2]
    outputs, gradients = [], []
    for b in range(batch):
        A = x.allowed(b)
        for h in range(heads):
            Q, K, V = (Known(*(part[b, h] for part in t)) for t in (x.Q, x.K, x.V))
            factor = np.ones((n_q, n_k)) if x.factor is None else x.factor[b, h]
            head = Head(Q, K, V, A, None, factor, x.scale, None, False, None, x.fill)
            f: Forward = forward(head)
            outputs.append(f.output)
            cotangent = exact(np.zeros_like(f.output.value))
            if dO is not None:
                cotangent = Known(*(part[b, h] for part in dO))
                gradients.append(backward(head, f, cotangent, np.zeros(n_q)))
            observe(track, f, head, cotangent, np.zeros(1))
    stack = [_stack([getattr(g, n) for g in gradients], batch) for n in ("query", "key", "value")]
    return _stack(outputs, batch), stack if gradients else []


def _stack(parts: list[Known], batch: int) -> Known:
    if not parts:
        return exact(np.zeros(0))
    stacked = (np.stack(part) for part in zip(*parts, strict=True))
    return Known(*(s.reshape(batch, -1, *s.shape[1:]) for s in stacked))
