"""The dialect of torch's scaled_dot_product_attention beside torch: its samples, then draws."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optional import require
from peers.sameness import TOLERANCE, assert_same, ours_or_error
from peers.torch_dialect import array, gradients, tensor, theirs_or_error
from refattn.arrays import numpy_dtype
from refattn.dialects.torch_sdpa import (
    DIALECT,
    scaled_dot_product_attention,
    scaled_dot_product_attention_backward,
)

torch = require("torch")
require("expecttest")  # torch's test utilities import it
methods = require("torch.testing._internal.common_methods_invocations")

pytestmark = pytest.mark.peer("torch")

FUNCTION = torch.nn.functional.scaled_dot_product_attention

OPERANDS = ("query", "key", "value")

COUNT = 25
"""Samples in torch 2.13."""


def _samples() -> list[Any]:
    name = "nn.functional.scaled_dot_product_attention"
    (entry,) = (op for op in methods.op_db if op.name == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        return list(entry.sample_inputs("cpu", torch.float64))


SAMPLES = _samples()


def compare(call: dict[str, Any], seed: int = 7) -> bool:
    """Compare a call, forward and backward; return whether torch errs (and we, too)."""
    leaves = {name: tensor(call[name]) for name in OPERANDS}
    mask = tensor(call.get("attn_mask"))
    # a mask that requires a gradient changes which calls torch refuses: a named exception
    constant = tensor(call.get("attn_mask"), gradient=False)

    def run(**changed: Any) -> Any:
        torch.manual_seed(seed)
        return FUNCTION(**(call | leaves | {"attn_mask": constant} | changed))

    theirs = theirs_or_error(run)
    keep = None
    something = call["query"].shape[-2] and call["value"].size
    if something and 0 < call.get("dropout_p", 0) < 1 and not isinstance(theirs, Exception):
        keep = _keep(call, leaves["value"], run)
    ours = ours_or_error(lambda: scaled_dot_product_attention(**call, keep=keep))
    assert isinstance(theirs, Exception) == isinstance(ours, Exception), (theirs, ours)
    if isinstance(theirs, Exception):
        return True
    assert_same({"output": ours}, {"output": array(theirs)})
    again = theirs_or_error(lambda: run(attn_mask=mask))
    if isinstance(again, Exception):
        return False
    d_output = np.random.default_rng(5).normal(size=ours.shape).astype(ours.dtype)
    if mask is not None and mask.requires_grad:
        leaves["attn_mask"] = mask
    expected = gradients((again,), (d_output,), leaves)
    found = scaled_dot_product_attention_backward(d_output, **call, keep=keep)
    by_name = {n.removeprefix("d_"): g for n, g in found._asdict().items() if g is not None}
    assert_same(by_name, expected)
    return False


def _keep(call: dict[str, Any], value: Any, run: Any) -> np.ndarray:
    """Return the keep mask of torch's generator: dropped weights are zero in P·I."""
    n_k = value.shape[-2]
    identity = torch.eye(n_k, dtype=value.dtype).expand(*value.shape[:-2], n_k, n_k)
    kept = array(run(value=identity)) != 0
    # axes that only the value has are none of the logits': any of its items shows the mask
    heads = call["query"].shape[-3:-2] if call.get("enable_gqa") else call["key"].shape[-3:-2]
    logits = np.broadcast_shapes(call["query"].shape[:-2], (*call["key"].shape[:-3], *heads))
    kept = kept[(0,) * (kept.ndim - 2 - len(logits))]
    return kept[tuple(slice(None if n > 1 else 1) for n in logits)]


def test_every_sample_was_collected() -> None:
    if torch.__version__.startswith("2.13."):
        assert len(SAMPLES) == COUNT
    else:
        assert len(SAMPLES) >= COUNT, torch.__version__


@pytest.mark.clause("VAS-EQ1", "OWN-CAUSAL1", "OWN-BIAS1", "OWN-DROPOUT1", "OWN-BACKWARD1")
@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_the_dialect_agrees_on_torchs_own_samples(index: int) -> None:
    sample = SAMPLES[index]
    positional = dict(zip(OPERANDS, (sample.input, *sample.args), strict=True))
    call = {name: array(value) for name, value in (positional | sample.kwargs).items()}
    torch_errs = compare(call)
    assert not torch_errs


def _lead(draw: Any, full: tuple[int, ...], wrong: bool) -> tuple[int, ...]:
    """Return leading axes that broadcast to the full ones, or just miss them."""
    kept = tuple(n if draw(st.integers(0, 3)) else 1 for n in full)
    kept = kept[draw(st.integers(0, 3)) == 0 and len(kept) > 0 :]
    return tuple(n + 1 for n in kept) if wrong else kept


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Draw a call: any combination of arguments, broadcast or plain, a few of them wrong."""
    whole, flag = st.integers, st.booleans()
    full = tuple(draw(st.lists(whole(1, 3), max_size=3)))
    plain = draw(flag)  # torch's kernel by tiles takes only operands of 4 axes that are equal
    if plain:
        full = (draw(whole(0, 2)), draw(whole(1, 4)))
    n_q, n_k = draw(whole(0, 5)), draw(st.sampled_from([0, 1, 2, 3, 4, 5]))
    d_k, d_v = draw(st.sampled_from([(1, 2), (3, 5), (4, 4), (3, 3), (0, 2), (2, 0)]))
    wrong = draw(st.sampled_from([""] * 14 + ["batch", "length", "features", "mask", "dtype"]))
    random = np.random.default_rng(draw(whole(0, 2**32)))
    leads = [full if plain else _lead(draw, full, wrong == "batch" and i == 1) for i in range(3)]
    call: dict[str, Any] = {}
    gqa = draw(whole(0, 4)) == 0
    if gqa and all(leads):
        heads = draw(st.sampled_from([(4, 2, 2), (6, 2, 3), (3, 1, 1), (4, 3, 3), (4, 4, 4)]))
        leads = [(*lead[:-1], h) for lead, h in zip(leads, heads, strict=True)]
        full = (*full[:-1], heads[0])
    if gqa:
        call["enable_gqa"] = True
    # a value that is shorter than the key is read beyond its end by torch: a named exception
    short = wrong == "length" and not plain
    sizes = ((n_q, d_k), (n_k, d_k + (wrong == "features")), (n_k + short, d_v))
    dtype = draw(st.sampled_from(["float64", "float64", "float64", "float32"]))
    for name, lead, (n, d) in zip(OPERANDS, leads, sizes, strict=True):
        call[name] = random.normal(size=(*lead, n, d)).astype(dtype)
    if wrong == "dtype":
        call["key"] = call["key"].astype("float32" if dtype == "float64" else "float64")
    lengths = (n_q + (wrong == "mask"), n_k)
    four = (*full, *lengths) if len(full) == 2 else lengths
    shape = draw(st.sampled_from([lengths, (1, n_k), (n_q, 1), (n_k,), (*full, *lengths), four]))
    kind = draw(st.sampled_from(["none", "none", "bool", "float", "float", "float32", "int"]))
    forbidden = random.random(shape) < draw(st.sampled_from([0.2, 0.9]))
    masks = {
        "none": None,
        "bool": ~forbidden,
        "int": forbidden.astype(np.int64),
        "float": np.where(forbidden, -np.inf, random.normal(size=shape)),
    }
    masks["float32"] = masks["float"].astype(np.float32)
    call["attn_mask"] = masks[kind]
    call["dropout_p"] = draw(st.sampled_from([0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.5, -0.5]))
    call["is_causal"] = draw(flag)
    scales = [None, None, 0.3, 2.0] if call["is_causal"] else [None, 0.3, -1.5, 0.0]
    return call | {"scale": draw(st.sampled_from(scales))}


@pytest.mark.clause(
    "VAS-EQ1", "OWN-SCALE1", "OWN-MASK1", "OWN-EMPTY1", "OWN-GQA1", "OWN-DROPOUT1", "OWN-BACKWARD1"
)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(calls())
def test_the_dialect_agrees_on_any_drawn_call(call: dict[str, Any]) -> None:
    compare(call)


HARD = (
    ("1-D mask beside 4 axes", {"attn_mask": np.ones(5, bool)}, (2, 2)),
    ("1-D mask beside 3 axes", {"attn_mask": np.ones(5, bool)}, (2,)),
    ("no axis", {"attn_mask": np.array(True)}, (2,)),
    ("mask by more items", {"attn_mask": np.ones((3, 2, 2, 3, 5), bool)}, (2, 2)),
    ("mask and causal, tiles", {"attn_mask": np.ones((3, 5), bool), "is_causal": True}, (2, 2)),
    ("mask and causal, matrix", {"attn_mask": np.ones((3, 5), bool), "is_causal": True}, (2,)),
    ("negative dropout, tiles", {"dropout_p": -0.5}, (2, 2)),
    ("negative dropout, matrix", {"dropout_p": -0.5}, (2,)),
    ("grouped heads without heads", {"enable_gqa": True}, ()),
    ("flag as integer", {"is_causal": 1}, (2,)),
    ("half mask", {"attn_mask": np.zeros((3, 5), np.float16)}, (2,)),
    ("scale 0 and causal, matrix", {"is_causal": True, "scale": 0.0}, (2,)),
)
"""Calls at the edges of torch's two kernels."""


@pytest.mark.parametrize(("options", "lead"), [h[1:] for h in HARD], ids=[h[0] for h in HARD])
def test_the_edges_of_torchs_kernels_are_ours(options: dict[str, Any], lead: Any) -> None:
    random = np.random.default_rng(2)
    sizes = ((3, 4), (5, 4), (5, 4))
    call = {n: random.normal(size=(*lead, *s)) for n, s in zip(OPERANDS, sizes, strict=True)}
    compare(call | options)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_format_agrees_with_torch(dtype: str) -> None:
    random = np.random.default_rng(2)
    sizes = ((3, 4), (5, 4), (5, 6))
    drawn = [torch.from_numpy(random.normal(size=(2, *s))).to(getattr(torch, dtype)) for s in sizes]
    theirs = FUNCTION(*drawn, attn_mask=torch.zeros(3, 5), is_causal=False)
    exact = [t.double().numpy().astype(numpy_dtype(dtype)) for t in drawn]
    ours = scaled_dot_product_attention(*exact, np.zeros((3, 5), np.float32))
    assert ours.dtype == numpy_dtype(dtype)
    difference = np.abs(ours.astype(np.float64) - theirs.double().numpy()).max()
    assert difference <= TOLERANCE[dtype]


def test_the_signature_is_torchs_own() -> None:
    """It is written in C++, but its documentation opens with it."""
    opening = FUNCTION.__doc__.strip().split("->")[0]
    found = re.findall(r"[(\s](\w+)(?:=([\w.]+))?[,)]", opening)
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    ours = [(n, "" if p.default is p.empty else repr(p.default)) for n, p in parameters.items()]
    assert ours[:-1] == found
    assert ours[-1][0] == "keep"


@pytest.mark.clause("OWN-EMPTY1", "OWN-POISON1")
@pytest.mark.parametrize("math", [False, True])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_an_empty_row_reads_every_value_as_in_torch(poison: float, math: bool) -> None:
    random = np.random.default_rng(3)
    operands = [random.normal(size=(1, 1, n, 4)) for n in (3, 5, 5)]
    mask = np.arange(3)[:, None] != np.ones(5)  # row 1 may see no key
    operands[2][..., 2, 3] = poison
    kernels = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel(kernels.MATH if math else kernels.FLASH_ATTENTION):
        theirs = FUNCTION(*map(torch.from_numpy, operands), torch.from_numpy(mask)).numpy()
    ours = scaled_dot_product_attention(*operands, mask)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert np.isnan(ours[..., 1, 3]).all() and not ours[..., 1, :3].any()


@pytest.mark.clause("OWN-EMPTY1", "OWN-POISON1")
def test_a_nan_that_the_keys_of_an_empty_row_hold_is_a_named_exception() -> None:
    random = np.random.default_rng(4)
    operands = [random.normal(size=(1, 1, n, 4)) for n in (3, 5, 5)]
    mask = np.arange(3)[:, None] != np.ones(5)
    operands[1][..., 2, 3] = np.nan
    theirs = FUNCTION(*map(torch.from_numpy, operands), torch.from_numpy(mask))
    ours = scaled_dot_product_attention(*operands, mask)
    assert torch.isnan(theirs).all() and not ours[..., 1, :].any()
    assert any(text.startswith("NaN beside a row") for text in DIALECT.exceptions)


def test_causal_attention_of_negative_scale_is_a_named_exception() -> None:
    random = np.random.default_rng(2)
    operands = [random.normal(size=(1, 1, 3, 4)) for _ in range(3)]
    theirs = FUNCTION(*map(torch.from_numpy, operands), is_causal=True, scale=-1.0)
    ours = scaled_dot_product_attention(*operands, is_causal=True, scale=-1.0)
    assert torch.isnan(theirs).any() and np.isfinite(ours).all()
    assert any("scale ≤ 0" in exception for exception in DIALECT.exceptions)
