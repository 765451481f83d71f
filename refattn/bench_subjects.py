"""Libraries that attention is timed on: each becomes a call without arguments."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""A tensor of (b, h, n, d)."""

Call = Callable[[], Any]
"""One timed call; its result becomes an array by `Subject.array`."""


class Problem(NamedTuple):
    """What is to be computed, on given arrays."""

    query: Array
    key: Array
    value: Array
    d_output: Array | None
    """None = the forward pass alone."""
    causal: bool
    """The last query sees the last key."""
    threads: int


class Subject(NamedTuple):
    """A library: its import name, its call and how to read the result."""

    module: str
    prepare: Callable[[Problem], Call]
    array: Callable[[Any], Array]
    backward: bool = False
    """Whether it can be asked for gradients."""


class Unable(ValueError):  # noqa: N818 - a state of the subject
    """A problem that a subject does not take."""


def _numpy(p: Problem) -> Call:
    from refattn.masks import causal_mask

    scale = np.dtype(p.query.dtype).type(p.query.shape[-1] ** -0.5)
    n_q, n_k = p.query.shape[-2], p.key.shape[-2]
    if p.query.shape[1] * n_q * n_k > 2**28:
        raise Unable("its matrix of weights would take gigabytes")
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

    options: Any = {"causal": p.causal, "alignment": "bottom_right"}

    def call() -> Array:
        return cpu.attention(p.query, p.key, p.value, threads=p.threads, **options).output  # type: ignore[no-any-return]

    d_output = p.query if p.d_output is None else p.d_output

    def both() -> Array:
        forward = cpu.attention(p.query, p.key, p.value, threads=p.threads, **options)
        cpu.attention_backward(
            d_output, p.query, p.key, p.value, forward=forward, threads=p.threads, **options
        )
        return forward.output  # type: ignore[no-any-return]

    return call if p.d_output is None else both


def _torch(p: Problem) -> Call:
    import torch

    torch.set_num_threads(p.threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    causal = p.causal and p.query.shape[-2] > 1
    if causal and p.query.shape[-2] != p.key.shape[-2]:
        raise Unable("its causal mask starts at the top left")
    tensors = [torch.from_numpy(a) for a in (p.query, p.key, p.value)]
    if p.d_output is None:

        def call() -> Any:
            with torch.no_grad():
                return attend(*tensors, is_causal=causal)

        return call
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    cotangent = torch.from_numpy(p.d_output)

    def both() -> Any:
        for leaf in leaves:
            leaf.grad = None
        output = attend(*leaves, is_causal=causal)
        output.backward(cotangent)
        return output.detach()

    return both


def _onnxruntime(p: Problem) -> Call:
    import onnxruntime
    from onnx import TensorProto, helper

    n_q, n_k = p.query.shape[-2], p.key.shape[-2]
    if p.causal and 1 < n_q != n_k:
        raise Unable("its causal mask starts at the top left")
    if p.query.shape[0] * p.query.shape[1] * n_q * n_k > 2**30:
        raise Unable("its matrix of weights would take gigabytes")
    kinds = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
    kind = kinds[p.query.dtype.name]
    arrays = {"q": p.query, "k": p.key, "v": p.value}
    node = helper.make_node("Attention", list(arrays), ["o"], is_causal=int(p.causal and n_q > 1))
    inputs = [helper.make_tensor_value_info(n, kind, list(a.shape)) for n, a in arrays.items()]
    outputs = [helper.make_tensor_value_info("o", kind, None)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = p.threads, 3
    # threads that wait by spinning would slow the subject that is timed next
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, arrays)[0]


def _openvino(p: Problem) -> Call:
    import openvino
    from openvino import opset13

    if p.causal and 1 < p.query.shape[-2] != p.key.shape[-2]:
        raise Unable("its causal mask starts at the top left")
    if p.query.dtype != np.float32:
        raise Unable("it computes in float32")
    arrays = (p.query, p.key, p.value)
    parameters = [opset13.parameter(list(a.shape), openvino.Type.f32) for a in arrays]
    causal = bool(p.causal and p.query.shape[-2] > 1)
    node = opset13.scaled_dot_product_attention(*parameters, causal=causal)
    settings = {
        "INFERENCE_NUM_THREADS": p.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    compiled = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", settings)
    request = compiled.create_infer_request()
    for i, a in enumerate(arrays):
        request.set_input_tensor(i, openvino.Tensor(a, shared_memory=True))

    def call() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    return call


def _jax(p: Problem) -> Call:
    import jax

    if p.query.dtype != np.float32:
        raise Unable("it computes in float32")
    if p.causal and 1 < p.query.shape[-2] != p.key.shape[-2]:
        raise Unable("its causal mask starts at the top left")
    if p.query.shape[0] * p.query.shape[1] * p.query.shape[-2] * p.key.shape[-2] > 2**30:
        raise Unable("its matrix of weights would take gigabytes")
    causal = p.causal and p.query.shape[-2] > 1
    arrays = [jax.numpy.asarray(a.swapaxes(1, 2)) for a in (p.query, p.key, p.value)]
    attend = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal))
    return lambda: attend(*arrays).block_until_ready()


SUBJECTS = {
    "numba": Subject("numba", _numba, np.asarray, backward=True),
    "numpy": Subject("numpy", _numpy, np.asarray),
    "torch": Subject("torch", _torch, lambda tensor: np.asarray(tensor.numpy()), backward=True),
    "onnxruntime": Subject("onnxruntime", _onnxruntime, np.asarray),
    "openvino": Subject("openvino", _openvino, np.asarray),
    "jax": Subject("jax", _jax, lambda array: np.asarray(array).swapaxes(1, 2)),
}
"""Subjects by name; `numba` is our own kernel, `numpy` the plain formula in matrices."""


def installed(name: str) -> bool:
    """Return whether a subject's library is here."""
    return importlib.util.find_spec(SUBJECTS[name].module) is not None


def limit_threads(threads: int) -> None:
    """Set the thread counts that libraries read when they are imported."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, str(threads))
