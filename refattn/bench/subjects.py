"""What attention is timed on: our kernels, the formula in NumPy, and the libraries beside them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refattn.bench import peers
from refattn.bench.machine import BLAS_THREADS
from refattn.bench.problem import Array, Call, Problem, Unable, check_matrices

OURS = "numba"
"""The subject that the others are compared with."""


class Subject(NamedTuple):
    """A library: its import name, its call and how to read the result."""

    module: str
    prepare: Callable[[Problem], Call]
    array: Callable[[Any], Array]
    backward: bool = False
    """Whether it can be asked for gradients."""


def _numpy(p: Problem) -> Call:
    from refattn.masks import causal_mask

    check_matrices(p, 1)
    if p.threads != BLAS_THREADS:
        raise Unable(
            f"its products were given {BLAS_THREADS} threads when it was loaded "
            f"(OPENBLAS_NUM_THREADS), but this is for {p.threads}"
        )
    scale = np.dtype(p.query.dtype).type(p.query.shape[-1] ** -0.5)
    n_q, n_k = p.query.shape[-2], p.key.shape[-2]
    barred = ~causal_mask(n_q, n_k, alignment="bottom_right") if p.causal else None

    def call() -> Array:
        S = p.query @ p.key.swapaxes(-1, -2)
        S *= scale
        if barred is not None:
            S[..., barred] = -np.inf
        S -= S.max(-1, keepdims=True)
        np.exp(S, out=S)
        S /= S.sum(-1, keepdims=True)
        result: Array = S @ p.value
        return result

    return call


def _numba(p: Problem) -> Call:
    from refattn import cpu

    options: Any = {"causal": p.causal, "alignment": "bottom_right", "threads": p.threads}
    tensors = (p.query, p.key, p.value)
    d_output = p.d_output
    if d_output is None:
        return lambda: cpu.attention(*tensors, **options).output

    def both() -> Array:
        forward = cpu.attention(*tensors, **options)
        gradients = cpu.attention_backward(d_output, *tensors, forward=forward, **options)
        d_query: Array = gradients.d_query
        return d_query

    return both


SUBJECTS = {
    OURS: Subject("numba", _numba, np.asarray, backward=True),
    "numpy": Subject("numpy", _numpy, np.asarray),
    "torch": Subject("torch", peers.torch, lambda x: np.asarray(x.numpy()), backward=True),
    "onnxruntime": Subject("onnxruntime", peers.onnxruntime, np.asarray),
    "openvino": Subject("openvino", peers.openvino, np.asarray),
    "jax": Subject("jax", peers.jax, lambda x: np.asarray(x).swapaxes(1, 2)),
}
"""Subjects by name; `numba` is our own kernel, `numpy` the plain formula in matrices."""


def installed(name: str) -> bool:
    """Return whether a subject's library is here."""
    return importlib.util.find_spec(SUBJECTS[name].module) is not None


def prepare(name: str, problem: Problem) -> Call:
    """Return a subject's call.

    Raises:
        Unable: it does not take the problem.
    """
    subject = SUBJECTS[name]
    if problem.d_output is not None and not subject.backward:
        raise Unable("its gradients are not timed")
    return subject.prepare(problem)
