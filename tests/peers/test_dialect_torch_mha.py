"""nn.MultiheadAttention and its functional form beside torch: torch's own samples, then draws.

torch draws the keep mask of dropout from its generator. The form with weights shows it: the same
seed draws it again, and a weight that is 0 was dropped. The form without weights draws on another
shape, and shows nothing; its samples with dropout are compared through the form with weights.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optional import require
from peers.sameness import assert_same, ours_or_error
from peers.torch_dialect import array, gradients, tensor, theirs_or_error
from refattn.dialects.torch_mha import multi_head_attention_forward
from refattn.dialects.torch_mha_backward import multi_head_attention_backward
from refattn.dialects.torch_mha_call import ARRAYS, MASKS, Call
from refattn.dialects.torch_mha_module import MultiheadAttention

torch = require("torch")
require("expecttest")  # torch's test utilities import it
methods = require("torch.testing._internal.common_methods_invocations")
modules = require("torch.testing._internal.common_modules")

pytestmark = pytest.mark.peer("torch")

FUNCTION = torch.nn.functional.multi_head_attention_forward

NO_KEYS = "the unspecified dimension size -1 can be any value and is ambiguous"
"""torch's error on a mask by item over no keys or items, one of the dialect's named exceptions."""

SAMPLES, MODULE_SAMPLES = 192, 64
"""Samples of torch 2.13: of the function, and of the module in each of its two modes."""


def _samples() -> list[Any]:
    name = "nn.functional.multi_head_attention_forward"
    (entry,) = (op for op in methods.op_db if op.name == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        return list(entry.sample_inputs("cpu", torch.float64))


def _module_samples(training: bool) -> list[Any]:
    (entry,) = (m for m in modules.module_db if m.name == "nn.MultiheadAttention")
    torch.manual_seed(4)
    return list(entry.module_inputs_func(entry, "cpu", torch.float64, True, training))


FUNCTION_SAMPLES = _samples()


def compare(arguments: dict[str, Any], seed: int = 7) -> bool:
    """Compare a functional call, forward and backward; return whether torch errs (we, too)."""
    leaves = {n: tensor(arguments[n]) for n in ARRAYS if n in arguments}
    # a mask that requires a gradient changes which calls torch refuses: a named exception
    constants = {n: tensor(arguments[n], gradient=n not in MASKS) for n in leaves}

    def run(tensors: Any) -> Any:
        torch.manual_seed(seed)
        return FUNCTION(**(arguments | tensors))

    theirs = theirs_or_error(lambda: run(constants))
    keep = None
    if arguments.get("training", True) and 0 < arguments["dropout_p"] < 1:
        assert arguments.get("need_weights", True)
        if not isinstance(theirs, Exception):
            each_head = constants | {"average_attn_weights": False}
            keep = array(theirs_or_error(lambda: run(each_head))[1]) != 0
    if NO_KEYS in str(theirs):
        return True
    ours = ours_or_error(lambda: multi_head_attention_forward(**arguments, keep=keep))
    assert isinstance(theirs, Exception) == isinstance(ours, Exception), (theirs, ours)
    if isinstance(theirs, Exception):
        return True
    names = ("output", "weights")
    assert_same(
        dict(zip(names, ours, strict=True)), dict(zip(names, map(array, theirs), strict=True))
    )
    again = theirs_or_error(lambda: run(leaves))
    if not isinstance(again, Exception):
        _compare_gradients(arguments | {"keep": keep}, ours, again, leaves)
    return False


def _compare_gradients(arguments: Any, ours: Any, theirs: Any, leaves: Any) -> None:
    draw = np.random.default_rng(5).normal
    cotangents = tuple(None if r is None else draw(size=r.shape) for r in ours)
    expected = gradients(theirs, cotangents, {n: t for n, t in leaves.items() if t is not None})
    d_output, d_weights = cotangents
    call = Call(**arguments)
    found = ours_or_error(
        lambda: multi_head_attention_backward(d_output, call, d_weights=d_weights)
    )
    by_name = {n.removeprefix("d_"): g for n, g in found._asdict().items() if g is not None}
    assert_same(by_name, expected)


def test_every_sample_was_collected() -> None:
    counts = (len(FUNCTION_SAMPLES), len(_module_samples(True)), len(_module_samples(False)))
    if torch.__version__.startswith("2.13."):
        assert counts == (SAMPLES, MODULE_SAMPLES, MODULE_SAMPLES)
    else:
        assert min(counts) >= MODULE_SAMPLES, torch.__version__


@pytest.mark.clause("VAS-S322a", "VAS-S322b", "OWN-BIAS1", "OWN-DROPOUT1", "OWN-BACKWARD1")
@pytest.mark.parametrize(
    "sample", FUNCTION_SAMPLES, ids=[str(i) for i in range(len(FUNCTION_SAMPLES))]
)
def test_the_function_agrees_on_torchs_own_samples(sample: Any) -> None:
    names = list(inspect.signature(FUNCTION).parameters)
    given = dict(zip(names, (sample.input, *sample.args), strict=False)) | sample.kwargs
    arguments = {n: array(value) for n, value in given.items()}
    torch_errs = compare(arguments)
    assert not torch_errs


@pytest.mark.clause("VAS-S322a", "VAS-S322b", "OWN-MASK1", "OWN-EMPTY1", "OWN-BACKWARD1")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("index", range(MODULE_SAMPLES))
def test_the_module_agrees_on_torchs_own_samples(index: int, training: bool) -> None:
    sample = _module_samples(training)[index]
    named = dict(sample.constructor_input.kwargs)
    inputs = [array(value) for value in sample.forward_input.args]
    masks = {name: array(value) for name, value in sample.forward_input.kwargs.items()}
    compare_modules(named, training, inputs, masks)


def compare_modules(
    named: dict[str, Any],
    training: bool,
    inputs: list[np.ndarray],
    options: dict[str, Any],
    *,
    inference: bool = False,
    seed: int = 7,
) -> bool:
    """Compare a module on a call, forward and backward; return whether torch errs (we, too)."""
    torch.manual_seed(seed)
    theirs = torch.nn.MultiheadAttention(**named).double().train(training)
    for parameter in theirs.parameters():  # biases start at 0, where a wrong one would not show
        parameter.data.normal_()
    ours = MultiheadAttention(**named, training=training).load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    # one array three times stays one tensor three times: torch looks at that
    tensors = {id(a): tensor(a) for a in inputs}
    leaves = [tensors[id(a)] for a in inputs]
    given_masks = {name: tensor(value) for name, value in options.items()}

    def run(**changed: Any) -> Any:
        torch.manual_seed(seed)
        with torch.set_grad_enabled(not inference):
            return theirs(*leaves, **(given_masks | changed))

    result = theirs_or_error(run)
    if NO_KEYS in str(result):
        return True
    keep = None
    if training and 0 < named.get("dropout", 0) < 1 and not isinstance(result, Exception):
        each_head = theirs_or_error(lambda: run(average_attn_weights=False))
        keep = array(each_head[1]) != 0
    found = ours_or_error(lambda: ours(*inputs, **options, keep=keep, inference=inference))
    assert isinstance(result, Exception) == isinstance(found, Exception), (result, found)
    if isinstance(result, Exception):
        return True
    names = ("output", "weights")
    expected = dict(zip(names, map(array, result), strict=True))
    assert_same(dict(zip(names, found, strict=True)), expected)
    if not inference:
        _compare_module_gradients(
            ours, theirs, (leaves, inputs, given_masks, options), found, result, keep
        )
    return False


def _compare_module_gradients(
    ours: MultiheadAttention, theirs: Any, call: Any, found: Any, result: Any, keep: Any
) -> None:
    leaves, inputs, given_masks, options = call
    draw = np.random.default_rng(6).normal
    cotangents = tuple(None if r is None else draw(size=r.shape) for r in found)
    inputs_by_name = dict(zip(("query", "key", "value"), leaves, strict=True))
    masks = {n: m for n, m in given_masks.items() if isinstance(m, torch.Tensor)}
    expected = gradients(
        result, cotangents, {**inputs_by_name, **masks, **dict(theirs.named_parameters())}
    )
    d_output, d_weights = cotangents
    given_too = options | {"keep": keep, "d_weights": d_weights}
    parts = ours_or_error(lambda: ours.backward(d_output, *inputs, **given_too))
    named = {n.removeprefix("d_"): g for n, g in parts._asdict().items() if n != "d_parameters"}
    if inputs[0] is inputs[1]:  # torch's gradient of a leaf used three times is their sum
        total = named["query"] + named["key"] + named["value"]
        named |= {"query": total, "key": total, "value": total}
    present = {n: g for n, g in named.items() if g is not None}
    assert_same(present | parts.d_parameters, expected)


def _mask(draw: Any, kind: str, shape: tuple[int, ...], random: Any) -> np.ndarray | None:
    """Return a mask of a kind, with rows that forbid everything now and then."""
    if kind == "none":
        return None
    forbidden = random.random(shape) < draw(st.sampled_from([0.2, 0.9]))
    if kind == "bool":
        return forbidden
    if kind == "int":
        return forbidden.astype(np.int64)
    floats = np.where(forbidden, -np.inf, random.normal(size=shape))
    return floats.astype(np.float32) if kind == "float32" else floats


KINDS = st.sampled_from(["none", "bool", "float"] * 4 + ["float32", "int"])
"""Kinds of masks: two of them are refused, here and there."""


@st.composite
def functional_calls(draw: Any) -> dict[str, Any]:
    """Draw a call of the function: any combination of arguments, a few of them wrong."""
    whole = st.integers
    b, h, d, n_q, n_k = (draw(whole(lo, hi)) for lo, hi in [(1, 3), (1, 3), (1, 3), (1, 4), (0, 5)])
    random = np.random.default_rng(draw(whole(0, 2**32)))
    has_batch, separate, flag = draw(st.booleans()), draw(st.booleans()), st.booleans()
    b = b if has_batch else 1
    e = h * d
    e_k, e_v = (draw(whole(1, 5)), draw(whole(1, 5))) if separate else (e, e)
    normal = random.normal
    wrong = draw(
        st.sampled_from(
            ["nothing"] * 12 + ["heads", "length", "mask", "padding", "static", "embed", "features"]
        )
    )
    rows = [
        normal(size=(n, b, f)) for n, f in ((n_q, e), (n_k, e_k), (n_k + (wrong == "length"), e_v))
    ]
    call: dict[str, Any] = dict(
        zip(("query", "key", "value"), rows if has_batch else [r[:, 0] for r in rows], strict=True)
    )
    call |= {"embed_dim_to_check": e + (wrong == "embed"), "num_heads": h + (wrong == "heads")}
    packed = None if separate else normal(size=(3 * e, e + (wrong == "features")))
    call |= {
        "in_proj_weight": packed,
        "in_proj_bias": draw(st.sampled_from([None, normal(size=3 * e)])),
    }
    learned = draw(flag)
    for name in ("bias_k", "bias_v"):
        call[name] = normal(size=(1, 1, e)) if learned else None
    call["add_zero_attn"] = draw(flag)
    need_weights = draw(flag)
    call["dropout_p"] = draw(
        st.sampled_from(
            [0.0, 0.0, 0.5, 0.5, 1.0, 1.5] if need_weights else [0.0, 0.0, 1.0, 1.5, -0.5]
        )
    )
    call |= {"out_proj_weight": normal(size=(draw(whole(1, 5)), e)), "training": draw(flag)}
    call["out_proj_bias"] = normal(size=len(call["out_proj_weight"])) if draw(flag) else None
    call |= {
        "need_weights": need_weights,
        "average_attn_weights": draw(flag),
        "is_causal": draw(st.sampled_from([False, False, True])),
    }
    if separate:
        call |= {"use_separate_proj_weight": True, "q_proj_weight": normal(size=(e, e))}
        call |= {"k_proj_weight": normal(size=(e, e_k)), "v_proj_weight": normal(size=(e, e_v))}
    shape = (n_q + (wrong == "mask"), n_k)
    call["attn_mask"] = _mask(
        draw, draw(KINDS), draw(st.sampled_from([shape, (b * h, *shape)])), random
    )
    padding = (b, n_k + (wrong == "padding")) if has_batch else (n_k + (wrong == "padding"),)
    call["key_padding_mask"] = _mask(draw, draw(KINDS), padding, random)
    if draw(whole(0, 5)) == 0:
        for name in ("static_k", "static_v"):
            call[name] = normal(size=(b * h + (wrong == "static"), n_k, d))
    return call


@pytest.mark.clause(
    "VAS-S322a", "VAS-S323a", "OWN-MASK1", "OWN-EMPTY1", "OWN-DROPOUT1", "OWN-BACKWARD1"
)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(functional_calls())
def test_the_function_agrees_on_any_drawn_call(call: dict[str, Any]) -> None:
    compare(call)


@st.composite
def module_calls(draw: Any) -> tuple[dict[str, Any], bool, list[np.ndarray], dict[str, Any], bool]:
    """Draw a module, its mode and a call of it."""
    whole, flag = st.integers, st.booleans()
    b, h, d, n_q, n_k = (draw(whole(lo, hi)) for lo, hi in [(0, 3), (1, 4), (1, 3), (0, 4), (1, 5)])
    random = np.random.default_rng(draw(whole(0, 2**32)))
    plain = draw(flag)  # half of the modules are such that the inference path may open
    named: dict[str, Any] = {"embed_dim": h * d, "num_heads": h, "batch_first": plain or draw(flag)}
    kdim, vdim = h * d, h * d
    if not plain:
        named |= {name: draw(flag) for name in ("bias", "add_bias_kv", "add_zero_attn")}
        if draw(flag):
            kdim, vdim = named["kdim"], named["vdim"] = draw(whole(0, 5)), draw(whole(1, 5))
    training = draw(flag) and not plain
    need_weights, has_batch = draw(flag), plain or draw(flag)
    if need_weights:
        named["dropout"] = draw(st.sampled_from([0.0, 0.5, 1.0]))
    b = b if has_batch else 1
    if plain and draw(flag):
        inputs, n_k = [random.normal(size=(b, n_q, h * d))] * 3, n_q
    else:
        sizes = ((n_q, h * d), (n_k, kdim), (n_k, vdim))
        lead = [(b, n) if named["batch_first"] else (n, b) for n, _ in sizes]
        inputs = [random.normal(size=(*ab, f)) for ab, (_, f) in zip(lead, sizes, strict=True)]
        if not has_batch:
            inputs = [x.reshape(n, f) for x, (n, f) in zip(inputs, sizes, strict=True)]
    options: dict[str, Any] = {
        "need_weights": need_weights,
        "average_attn_weights": draw(flag),
        "is_causal": draw(st.sampled_from([False, False, True])),
    }
    wrong = n_q and draw(st.sampled_from([0] * 9 + [1]))
    shape = draw(st.sampled_from([(n_q + wrong, n_k), (b * h, n_q + wrong, n_k)]))
    options["attn_mask"] = _mask(draw, draw(KINDS), shape, random)
    padding = (b, n_k) if has_batch else (n_k,)
    options["key_padding_mask"] = _mask(draw, draw(KINDS), padding, random)
    return named, training, inputs, options, draw(flag)


@pytest.mark.clause(
    "VAS-S322a", "VAS-S323a", "OWN-MASK1", "OWN-EMPTY1", "OWN-DROPOUT1", "OWN-BACKWARD1"
)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(module_calls())
def test_the_module_agrees_on_any_drawn_call(
    call: tuple[dict[str, Any], bool, list[np.ndarray], dict[str, Any], bool],
) -> None:
    named, training, inputs, options, inference = call
    compare_modules(named, training, inputs, options, inference=inference)


@pytest.mark.parametrize(
    "named",
    [
        {"embed_dim": 0, "num_heads": 1},
        {"embed_dim": 4, "num_heads": 0},
        {"embed_dim": 4, "num_heads": 3},
        {"embed_dim": -4, "num_heads": -2},
        {"embed_dim": 4, "num_heads": 2, "kdim": -1},
        {"embed_dim": 4, "num_heads": 2, "kdim": 0, "vdim": 3},
        {"embed_dim": 4, "num_heads": 2, "kdim": 4, "vdim": 4, "add_bias_kv": True},
        {"embed_dim": 4, "num_heads": 2, "bias": False, "add_zero_attn": True},
    ],
)
def test_the_module_has_torchs_parameters_or_is_refused_as_there(named: dict[str, Any]) -> None:
    theirs = theirs_or_error(lambda: torch.nn.MultiheadAttention(**named))
    ours = ours_or_error(lambda: MultiheadAttention(**named))
    assert isinstance(theirs, Exception) == isinstance(ours, Exception), (theirs, ours)
    if not isinstance(theirs, Exception):
        shapes = {name: tuple(parameter.shape) for name, parameter in theirs.state_dict().items()}
        assert list(ours.shapes().items()) == list(shapes.items())


def test_the_signatures_are_torchs_own() -> None:
    """Ours add the keep mask of dropout, and the mode that torch keeps outside of the call."""
    added = {"keep", "inference"}
    pairs = (
        (FUNCTION, multi_head_attention_forward),
        (torch.nn.MultiheadAttention.forward, MultiheadAttention.forward),
    )
    for theirs, ours in pairs:
        expected = {n: p.default for n, p in inspect.signature(theirs).parameters.items()}
        actual = {n: p.default for n, p in inspect.signature(ours).parameters.items()}
        assert {n: d for n, d in actual.items() if n not in added} == expected
    expected = list(inspect.signature(torch.nn.MultiheadAttention).parameters)
    actual = list(inspect.signature(MultiheadAttention).parameters)
    assert [n for n in actual if n not in ("training", "parameters")] == expected[:-2]
    assert expected[-2:] == ["device", "dtype"]
