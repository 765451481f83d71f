"""Cases as ONNX node tests: the operators Attention and RotaryEmbedding of opset 23."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refattn.masks import allowed_pairs, position_offset
from refattn.vectors.canonical import canonical_json
from refattn.vectors.export import NotExpressible
from refattn.vectors.pack import Case, unbounded

OPSET = 23
"""The first operator set with both operators."""

IR_VERSION = 11
"""The intermediate representation of that time, which older runtimes read too."""

TENSORS_WITHOUT_PLACE = {"sinks": "sinks", "keep": "dropout by a given mask"}
"""Inputs of attention for which the operator has no input."""


class NodeTest(NamedTuple):
    """One node: operator, attributes, its inputs and outputs in float32, and the tolerance."""

    operator: str
    attributes: dict[str, Any]
    inputs: dict[str, np.ndarray[Any, Any]]
    outputs: dict[str, np.ndarray[Any, Any]]
    tolerance: float


def node_test(case: Case) -> NodeTest:
    """Return a case as a node test; of a case with gradients, its forward part.

    Raises:
        NotExpressible: the operator cannot be told what the case asks for.
    """
    if case.op == "attention":
        return _attention(case)
    if case.op == "rope":
        return _rope(case)
    raise NotExpressible(f"opset {OPSET} has no operator for {case.op}")


def tolerance(case: Case, output: str) -> float:
    """Return the largest derived bound of an output in float32: absolute, for all elements.

    Raises:
        NotExpressible: the case has no bounds in float32.
    """
    if why := unbounded(case, "fp32"):
        raise NotExpressible(why)
    a, b, floor = case.bounds["fp32"][output]
    unit = case.units[f"{output}.unit"].astype(np.float64)
    logit = case.units.get(f"{output}.unit_logit", np.zeros(())).astype(np.float64)
    return float(np.max(a * unit + b * logit + floor))


def _attention(case: Case) -> NodeTest:
    _refuse(case)
    query, key, value = (case.inputs[n] for n in ("query", "key", "value"))
    attributes = {
        n: float(case.parameters[n]) for n in ("scale", "softcap") if n in case.parameters
    }
    inputs = {"Q": query, "K": key, "V": value}
    only_causal = not {"mask", "bias", "slopes", "key_lengths", "query_lengths"} & set(case.inputs)
    top_left = case.conventions["alignment"] == "top_left" or query.shape[2] == key.shape[2]
    if only_causal and "window" not in case.parameters and top_left:
        attributes |= {"is_causal": 1} if case.parameters.get("causal") else {}
    else:
        inputs["attn_mask"] = _mask(case)
    outputs = {"Y": case.outputs["output"].astype(np.float32)}
    return NodeTest("Attention", attributes, inputs, outputs, tolerance(case, "output"))


def _refuse(case: Case) -> None:
    """Refuse what the operator has no input, attribute or convention for."""
    for name, what in TENSORS_WITHOUT_PLACE.items():
        if name in case.inputs:
            raise NotExpressible(f"Attention has no input for {what}")
    if not all(np.isfinite(case.inputs[n]).all() for n in ("query", "key", "value")):
        raise NotExpressible("Attention adds its mask, so non-finite masked cells reach the output")
    if case.parameters.get("scale", 1.0) < 0:
        raise NotExpressible("Attention multiplies both operands by the root of the scale")
    grouped = case.inputs["query"].shape[1] != case.inputs["key"].shape[1]
    if grouped and case.conventions["head_map"] == "tile":
        raise NotExpressible("Attention maps grouped heads by interleaving only")
    biased = "bias" in case.inputs or "slopes" in case.inputs
    if (
        "softcap" in case.parameters
        and biased
        and case.conventions["softcap_order"] != "before_bias"
    ):
        raise NotExpressible("Attention caps the logits before the bias only")
    if case.conventions["empty_row"] != "zero" and not _allowed(case).any(axis=-1).all():
        raise NotExpressible("Attention gives zeros for a row without a key")


def _positions(case: Case) -> Any:
    n_q, n_k = case.inputs["query"].shape[2], case.inputs["key"].shape[2]
    return position_offset(
        "export",
        n_q,
        n_k,
        alignment=case.conventions["alignment"],
        query_lengths=case.inputs.get("query_lengths"),
        key_lengths=case.inputs.get("key_lengths"),
    )


def _allowed(case: Case) -> np.ndarray[Any, Any]:
    """Return every rule of the case that forbids a pair as one mask."""
    tensors = ("mask", "bias", "query_lengths", "key_lengths")
    allowed: np.ndarray[Any, Any] = allowed_pairs(
        case.inputs["query"].shape[2],
        case.inputs["key"].shape[2],
        causal=case.parameters.get("causal", False),
        window=case.parameters.get("window"),
        offset=_positions(case),
        **{n: case.inputs[n] for n in tensors if n in case.inputs},
    )
    return allowed


def _mask(case: Case) -> np.ndarray[Any, Any]:
    """Return all masks of the case as bool, or with its biases as float32.

    Raises:
        NotExpressible: the sum of the biases is not exact in float32.
    """
    allowed = _allowed(case)
    if "bias" not in case.inputs and "slopes" not in case.inputs:
        return allowed
    bias = case.inputs.get("bias", np.zeros(())).astype(np.float64) + _linear_bias(case)
    with np.errstate(invalid="ignore"):
        if not np.array_equal(bias.astype(np.float32).astype(np.float64), bias):
            raise NotExpressible("the linear bias is not exact in float32")
    return np.where(allowed, bias, -np.inf).astype(np.float32)


def _linear_bias(case: Case) -> np.ndarray[Any, Any]:
    """Return the bias of the slopes in float64, exactly; zero without slopes."""
    if "slopes" not in case.inputs:
        return np.zeros(())
    from refattn.alibi import distances

    D = distances(
        case.inputs["query"].shape[2],
        case.inputs["key"].shape[2],
        offset=_positions(case),
        distance=case.conventions["distance"],
    )
    m = case.inputs["slopes"].astype(np.float64)[:, None, None]
    product: np.ndarray[Any, Any] = m * D
    return product


def _rope(case: Case) -> NodeTest:
    x = case.inputs["x"]
    tables = [case.outputs[n].astype(np.float32)[None] for n in ("cosine", "sine")]
    if x.shape[0] != 1:
        raise NotExpressible("tables of several batch items are not given here")
    attributes: dict[str, Any] = {"interleaved": int(case.conventions["pairing"] == "interleaved")}
    if case.parameters["rotary_dim"] != x.shape[3]:
        attributes["rotary_embedding_dim"] = case.parameters["rotary_dim"]
    inputs = {"X": x, "cos_cache": tables[0], "sin_cache": tables[1]}
    outputs = {"Y": case.outputs["output"].astype(np.float32)}
    return NodeTest("RotaryEmbedding", attributes, inputs, outputs, tolerance(case, "output"))


def model_of(test: NodeTest, name: str) -> Any:
    """Return the ONNX model of a node test."""
    from onnx import checker, helper

    def info(tensors: dict[str, np.ndarray[Any, Any]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in tensors.items()
        ]

    names = list(test.inputs)
    node = helper.make_node(test.operator, names, list(test.outputs), **test.attributes)
    graph = helper.make_graph([node], name, info(test.inputs), info(test.outputs))
    model = helper.make_model(
        graph,
        producer_name="refattn",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    checker.check_model(model, full_check=True)
    return model


def write_node_test(test: NodeTest, folder: Path) -> None:
    """Write one node test; `data.json` holds the derived absolute tolerance."""
    from onnx import numpy_helper

    data = folder / "test_data_set_0"
    data.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model_of(test, folder.name).SerializeToString())
    for group, tensors in (("input", test.inputs), ("output", test.outputs)):
        for index, (name, x) in enumerate(tensors.items()):
            proto = numpy_helper.from_array(np.asarray(x, order="C"), name)
            (data / f"{group}_{index}.pb").write_bytes(proto.SerializeToString())
    limits = {"model_name": folder.name, "rtol": 0.0, "atol": test.tolerance}
    (folder / "data.json").write_bytes(canonical_json(limits))
