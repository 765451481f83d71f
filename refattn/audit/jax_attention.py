"""Adapter of `jax.nn.dot_product_attention`, and of its dialect."""

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.audit.capabilities import Capabilities
from refattn.audit.subject import Arrays, Subject
from refattn.dialects.conventions import Dialect
from refattn.dialects.jax_dpa import dot_product_attention, dot_product_attention_backward
from refattn.errors import RefattnError

CAPABILITIES = Capabilities(
    features=frozenset(
        {"scale", "mask", "bias", "causal", "window", "lengths", "cross_lengths"}
        | {"grouped_heads", "logsumexp", "backward"}
    ),
    dtypes=("float64", "float32", "float16", "bfloat16"),
    conventions={"alignment": "top_left", "head_map": "interleave"},
    layout="bnhd",
)
"""What its documentation promises; its empty rows follow no single convention."""

LEAVES = ("query", "key", "value", "bias")
"""Tensors whose gradient jax returns."""


def subject() -> Subject:
    """Return the subject; jax is imported here, and its float64 is switched on."""
    import jax

    jax.config.update("jax_enable_x64", True)
    return Subject("jax", f"jax {jax.__version__}", CAPABILITIES, run)


def run(inputs: Arrays, options: dict[str, Any]) -> Arrays:
    """Run the function on a case, and its vector-Jacobian product if it has a d_output."""
    import jax

    leaves = {name: jax.numpy.asarray(inputs[name]) for name in LEAVES if name in inputs}
    fixed = _fixed(inputs, options)

    def attend(leaves: dict[str, Any]) -> tuple[Any, Any]:
        return tuple(jax.nn.dot_product_attention(**leaves, **fixed, return_residual=True))

    def with_gradients(leaves: dict[str, Any], d_output: Any) -> tuple[Any, Any, Any]:
        output, pullback, logsumexp = jax.vjp(attend, leaves, has_aux=True)
        return output, logsumexp, pullback(d_output)[0]

    # compiled as one, except in float16, which the function takes on a CPU only uncompiled
    compiled = (lambda f: f) if inputs["query"].dtype == np.float16 else jax.jit
    gradients: dict[str, Any] = {}
    if "d_output" in inputs:
        output, logsumexp, gradients = compiled(with_gradients)(leaves, inputs["d_output"])
    else:
        output, logsumexp = compiled(attend)(leaves)
    return {
        "output": np.asarray(output),
        "logsumexp": np.asarray(logsumexp).swapaxes(1, 2),  # (b, n, h) there, (b, h, n) here
        **{f"d_{name}": np.asarray(gradient) for name, gradient in gradients.items()},
    }


def dialect(told: Dialect) -> Subject:
    """Return the dialect's text."""
    return Subject(told.name, told.version, CAPABILITIES, _run_dialect)


def _run_dialect(inputs: Arrays, options: dict[str, Any]) -> Arrays:
    arguments: dict[str, Any] = {name: inputs[name] for name in LEAVES if name in inputs}
    finite = all(np.isfinite(inputs[name]).all() for name in LEAVES[:3])
    if "d_output" in inputs and not finite:
        raise RefattnError("a gradient by what is not finite is one of its named exceptions")
    arguments |= _fixed(inputs, options)
    output, residual = dot_product_attention(**arguments, return_residual=True)
    outputs = {"output": output, "logsumexp": residual.swapaxes(1, 2)}
    if "d_output" in inputs:
        found = dot_product_attention_backward(inputs["d_output"], **arguments)
        outputs |= {name: g for name, g in found._asdict().items() if g is not None}
    return outputs


def _fixed(inputs: Arrays, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not differentiated."""
    found: dict[str, Any] = {"is_causal": bool(options.get("causal", False))}
    if "mask" in inputs:
        found["mask"] = np.broadcast_to(inputs["mask"], _four(inputs["mask"].shape))
    if "scale" in options:
        found["scale"] = options["scale"]
    if "window" in options:
        beyond = inputs["query"].shape[1] + inputs["key"].shape[1]
        left, right = (beyond if end is None else end for end in options["window"])
        found["local_window_size"] = (left, right)
    for name, theirs in (
        ("query_lengths", "query_seq_lengths"),
        ("key_lengths", "key_value_seq_lengths"),
    ):
        if name in inputs:
            found[theirs] = inputs[name].astype(np.int32)
    return found


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape with leading ones up to four axes."""
    return (1,) * (4 - len(shape)) + shape
