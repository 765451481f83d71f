"""Libraries beside ours: each makes a call of a problem, in its own fastest way.

Where a library's causal mask starts at the top left and the lengths differ, it is given the mask as
a matrix, as its users would.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from refattn.bench.machine import cores
from refattn.bench.problem import Call, Problem, Unable, check_matrices, mask_matrix


def _own_mask(p: Problem) -> bool:
    """Return whether a library's own causal mask is the problem's."""
    return p.causal and p.query.shape[-2] == p.key.shape[-2] > 1


def torch(p: Problem) -> Call:
    """Return `torch.nn.functional.scaled_dot_product_attention`, on its flash kernel."""
    import torch

    torch.set_num_threads(p.threads)
    attend = torch.nn.functional.scaled_dot_product_attention
    seen = mask_matrix(p)
    rules: dict[str, Any] = {"is_causal": _own_mask(p)}
    if seen is not None:
        rules = {"attn_mask": torch.from_numpy(seen)}
    tensors = [torch.from_numpy(a) for a in (p.query, p.key, p.value)]
    if p.d_output is None:

        def call() -> Any:
            with torch.no_grad():
                return attend(*tensors, **rules)

        return call
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    cotangent = torch.from_numpy(p.d_output)

    def both() -> Any:
        for leaf in leaves:
            leaf.grad = None
        attend(*leaves, **rules).backward(cotangent)
        return leaves[0].grad

    return both


def onnxruntime(p: Problem) -> Call:
    """Return a session of ONNX's Attention, opset 23."""
    import onnxruntime
    from onnx import TensorProto, helper

    check_matrices(p, 1)
    kinds = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "bool": TensorProto.BOOL}
    arrays = {"q": p.query, "k": p.key, "v": p.value}
    seen = mask_matrix(p)
    if seen is not None:
        arrays["seen"] = seen
    node = helper.make_node("Attention", list(arrays), ["o"], is_causal=int(_own_mask(p)))
    inputs = [
        helper.make_tensor_value_info(name, kinds[a.dtype.name], list(a.shape))
        for name, a in arrays.items()
    ]
    outputs = [helper.make_tensor_value_info("o", kinds[p.query.dtype.name], None)]
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


def openvino(p: Problem) -> Call:
    """Return a compiled model of OpenVINO's ScaledDotProductAttention, opset 13."""
    import openvino
    from openvino import opset13

    if p.query.dtype != np.float32:
        raise Unable("it computes in float32")
    seen = mask_matrix(p)
    arrays = [p.query, p.key, p.value, *([] if seen is None else [seen])]
    types = {"float32": openvino.Type.f32, "bool": openvino.Type.boolean}
    parameters = [opset13.parameter(list(a.shape), types[a.dtype.name]) for a in arrays]
    node = opset13.scaled_dot_product_attention(*parameters, causal=_own_mask(p))
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
    return partial(_infer, request, arrays)


def _infer(request: Any, inputs: Any) -> Any:
    """Run a request; it reads the memory of its inputs, which are held by this call."""
    request.infer()
    return request.get_output_tensor(0).data


def jax(p: Problem) -> Call:
    """Return `jax.nn.dot_product_attention`, compiled for the problem."""
    import jax

    if p.query.dtype != np.float32:
        raise Unable("it computes in float32")
    if p.threads != cores():
        raise Unable(f"it uses all {cores()} cores, but this is for {p.threads}")
    check_matrices(p, 2)
    causal, seen = _own_mask(p), mask_matrix(p)
    arrays = [jax.numpy.asarray(a.swapaxes(1, 2)) for a in (p.query, p.key, p.value)]
    mask = None if seen is None else jax.numpy.asarray(seen[None, None])

    def attend(query: Any, key: Any, value: Any) -> Any:
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)

    compiled = jax.jit(attend).lower(*arrays).compile()
    return lambda: compiled(*arrays).block_until_ready()
