"""torch's own sample inputs for scaled_dot_product_attention, all of them, in float64.

Half of the samples ask for dropout. torch draws its keep mask from its generator, so the same seed
draws it again: a run with the identity as value shows which weights were kept, and the reference
is given that mask.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from optional import require
from peers.agreement import allowances, assert_agree, run_ours

torch = require("torch")
require("expecttest")  # torch's test utilities import it
methods = require("torch.testing._internal.common_methods_invocations")

COUNT = 25
"""Samples in torch 2.13."""

WITH_DROPOUT = 12
"""Of them, with dropout_p=0.5."""


def _samples() -> list[Any]:
    (entry,) = (
        op for op in methods.op_db if op.name == "nn.functional.scaled_dot_product_attention"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(entry.sample_inputs("cpu", torch.float64, requires_grad=True))


SAMPLES = _samples()


def _attend(sample: Any, value: Any) -> Any:
    torch.manual_seed(7)
    return torch.nn.functional.scaled_dot_product_attention(
        sample.input, sample.args[0], value, *sample.args[2:], **sample.kwargs
    )


def _keep(sample: Any) -> np.ndarray:
    """Return the keep mask of torch's generator: dropped weights are zero in P·I."""
    keys = sample.args[0].shape[-2]
    identity = torch.eye(keys, dtype=torch.float64).expand(*sample.args[1].shape[:-1], keys)
    return _attend(sample, identity).detach().numpy() != 0


def _sum_to(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum a gradient over the batch axes that torch broadcast."""
    extra = gradient.ndim - len(shape)
    return gradient.sum(axis=tuple(range(extra))) if extra else gradient


def test_every_sample_was_collected() -> None:
    dropped = sum(sample.kwargs["dropout_p"] > 0 for sample in SAMPLES)
    if torch.__version__.startswith("2.13."):
        assert (len(SAMPLES), dropped) == (COUNT, WITH_DROPOUT)
    else:
        assert len(SAMPLES) >= COUNT and dropped >= WITH_DROPOUT, torch.__version__


@pytest.mark.clause("VAS-EQ1", "OWN-CAUSAL1", "OWN-BIAS1", "OWN-DROPOUT1", "OWN-BACKWARD1")
@pytest.mark.parametrize("sample", SAMPLES, ids=[str(i) for i in range(len(SAMPLES))])
def test_output_and_gradients_agree_with_torch(sample: Any) -> None:
    options = dict(sample.kwargs)
    leaves = {"query": sample.input, "key": sample.args[0], "value": sample.args[1]}
    if (bias := options.pop("attn_mask", None)) is not None:
        leaves["bias"] = bias
    output = _attend(sample, sample.args[1])
    d_output = torch.randn(output.shape, dtype=torch.float64, generator=torch.manual_seed(5))
    gradients = torch.autograd.grad(output, list(leaves.values()), d_output)
    theirs = {"output": output.detach().numpy()}
    theirs |= {f"d_{n}": g.numpy() for n, g in zip(leaves, gradients, strict=True)}

    arrays = {name: leaf.detach().numpy() for name, leaf in leaves.items()}
    batch = np.broadcast_shapes(arrays["query"].shape[:-2], arrays["key"].shape[:-2])
    for name in ("query", "key", "value"):  # torch broadcasts batch axes, the reference does not
        arrays[name] = np.broadcast_to(arrays[name], (*batch, *arrays[name].shape[-2:]))
    asked = {"causal": options.pop("is_causal")}
    if dropout := options.pop("dropout_p"):
        asked |= {"keep": _keep(sample), "keep_probability": 1 - dropout}
        # the mask is not idle: without it the output is another one
        without = run_ours(arrays, d_output.numpy(), causal=asked["causal"])["output"]
        assert np.abs(without - theirs["output"]).max() > 0.01
    assert not options
    ours = run_ours(arrays, d_output.numpy(), **asked)
    ours = {n: a if n == "output" else _sum_to(a, theirs[n].shape) for n, a in ours.items()}
    allowed = allowances(arrays, d_output.numpy(), **asked)
    # the sum over the axes that torch broadcast is rounded too, which doubling covers
    allowed = {
        n: a if n == "output" else 2 * _sum_to(a, theirs[n].shape) for n, a in allowed.items()
    }
    assert_agree(ours, theirs, allowed)
