"""The second engine: mpmath, from formulas of its own, over a sample or all of the results."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from mpmath import mp

from refattn.certify.errors import CertifyError, Disagreement
from refattn.certify.mpmath_engine import attention, modules, multihead, other, rope
from refattn.certify.mpmath_engine.compare import LEVELS, agrees

EVALUATORS: dict[str, Callable[..., Any]] = {
    "attention": attention.evaluator,
    "multihead": multihead.evaluator,
    "causal_module": modules.evaluator_of(modules.causal),
    "gated_cross_attention": modules.evaluator_of(modules.gated),
    "head_importance": other.importance_evaluator,
    "rope": rope.evaluator,
    "rope_decay": rope.decay_evaluator,
    "alibi": other.alibi_evaluator,
    "tiles": other.tiles_evaluator,
    "merge": other.merge_evaluator,
    "score": other.score_evaluator,
    "keep_mask": other.keep_evaluator,
    "traffic": other.traffic_evaluator,
}
"""What builds the evaluation of each operation at the present precision."""

Place = tuple[str, tuple[int, ...]]
"""An output and an index into it."""


def sampled(size: int, sample: int | None) -> Iterator[int]:
    """Choose indices deterministically: all, or `sample` of them spread over the whole."""
    if sample is None or sample >= size:
        yield from range(size)
        return
    step = max(1, int(size * 0x9E3779B1 >> 32)) | 1
    while np.gcd(step, size) != 1:
        step += 2
    for k in range(sample):
        yield (k * step + size // 3) % size


def _places(outputs: Mapping[str, Any], sample: int | None) -> list[Place]:
    places: list[Place] = []
    for name, x in outputs.items():
        shape = np.asarray(x).shape
        for k in sampled(int(np.asarray(x).size), sample):
            index = np.unravel_index(k, shape) if shape else ()
            places.append((name, tuple(int(i) for i in index)))
    return places


def recertify(
    op: str,
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    conventions: Mapping[str, Any],
    outputs: Mapping[str, Any],
    sample: int | None = None,
) -> int:
    """Prove outputs again with the second engine and return how many elements were compared.

    Spec: OWN-EXACT1, NUM-MODEL1.

        stored = rnd64(value),  value computed at two precisions

    Args:
        op: name of the operation.
        inputs: arrays by name.
        parameters: numbers by name.
        conventions: choices by name.
        outputs: what is to be proven: arrays by name.
        sample: number of elements of each output; None compares all.

    Returns:
        The number of elements compared.

    Raises:
        Disagreement: naming output, index and both values.
        CertifyError: the operation is not defined.
    """
    if op not in EVALUATORS:
        raise CertifyError(f"operation is {op!r}, but there are {sorted(EVALUATORS)}")
    tensors = {
        name: np.asarray(x) if np.asarray(x).dtype.kind in "biu" else np.asarray(x, np.float64)
        for name, x in inputs.items()
    }
    places = _places(outputs, sample)
    open_, rough = places, {}
    with mp.workprec(LEVELS[0]):
        value = EVALUATORS[op](tensors, parameters, conventions)
        rough = {place: value(*place) for place in open_}
    for bits in LEVELS[1:]:
        with mp.workprec(bits):
            value = EVALUATORS[op](tensors, parameters, conventions)
            fine = {place: value(*place) for place in open_}
            wrong = [
                (name, index)
                for name, index in open_
                if not agrees(
                    float(np.asarray(outputs[name])[index]),
                    rough[name, index],
                    fine[name, index],
                    bits,
                )
            ]
        if not wrong:
            return len(places)
        open_, rough = wrong, fine
    name, index = open_[0]
    stored = float(np.asarray(outputs[name])[index])
    raise Disagreement(
        f"{name}{list(index)} is {stored!r}, but the second engine computes "
        f"{mp.nstr(rough[name, index], 20)}"
    )
