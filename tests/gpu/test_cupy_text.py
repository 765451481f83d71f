"""The text that runs on CuPy's arrays, here on a library that is as strict about host memory."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import array_api_strict
import numpy as np
import pytest

from optional import require, require_device
from refattn.arrays import FLOATS
from refattn.backends import CLAIMS, BackendAbsent, Unsupported, load, stated
from refattn.bounds import profile_of
from refattn.check import jobs
from refattn.check import run as run_job
from refattn.judge import judge
from refattn.vectors import core_pack
from refattn_gpu import cupy_text
from refattn_gpu.cupy_text import Library, run_on

CASES = {case.id: case for case in core_pack().cases if case.op in CLAIMS["cupy"]}

STRICT = Library(
    "array_api_strict",
    lambda array: array_api_strict.asarray(np.array(array)),  # a pack's arrays are read-only
    lambda array: np.from_dlpack(array),
)


@pytest.fixture
def distant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no float leave the library by itself: CuPy's arrays do not become NumPy's unasked."""
    into_numpy = array_api_strict._array_object.Array.__array__

    def refuse(self: Any, *args: Any, **options: Any) -> Any:
        if "float" in str(self.dtype) or "complex" in str(self.dtype):
            raise TypeError("implicit conversion to a NumPy array is not allowed")
        return into_numpy(self, *args, **options)

    monkeypatch.setattr(array_api_strict._array_object.Array, "__array__", refuse)


@pytest.mark.usefixtures("distant")
@pytest.mark.parametrize("name", CASES)
def test_the_text_agrees_with_the_certified_values_on_another_library(name: str) -> None:
    case, failures, ran = CASES[name], [], []
    for dtype in case.dtypes:
        if profile_of(dtype) not in case.bounds:
            continue
        try:
            outputs = run_on(STRICT, case.op, case.inputs, _options(case), dtype)
        except Unsupported as declined:
            assert "rounds the weights" in str(declined)
            continue
        verdict = judge(case, outputs, profile_of(dtype))
        failures += [f"{dtype}: {v.reason}" for v in verdict.outputs if not v.ok]
        ran.append(dtype)
    assert not failures, "\n".join(failures)
    assert ran


def test_the_device_agrees_with_every_certified_value() -> None:
    require_device("cupy", cupy_text.absent())
    backend, results = load("cupy"), []
    for job in jobs(CASES.values(), [backend]):
        results.append(run_job(job))
    assert [r for r in results if r.verdict == "failed"] == []
    assert sum(r.verdict == "ok" for r in results) > len(CASES)


@pytest.mark.usefixtures("distant")
def test_flushing_what_is_below_the_normal_range_stays_within_the_bounds() -> None:
    # CuPy compiles its kernels so; torch lets this thread's arithmetic do the same
    torch = require("torch")
    cases = [case for case in CASES.values() if "fp32" in case.bounds]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        assert np.float32(1e-38) / np.float32(10.0) == 0.0
        outputs = {
            c.id: run_on(STRICT, c.op, c.inputs, _options(c), "float32")
            for c in cases
            if "float32" in c.dtypes
        }
    finally:
        torch.set_flush_denormal(False)
    verdicts = [judge(c, outputs[c.id], "fp32") for c in cases if c.id in outputs]
    assert len(verdicts) > len(CASES) // 2
    assert [(v.case_id, o.reason) for v in verdicts for o in v.outputs if not o.ok] == []


def _options(case: Any) -> dict[str, Any]:
    return {**case.parameters, **case.conventions}


def _problem() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    shapes = {"query": (1, 2, 7, 5), "key": (1, 2, 11, 5), "value": (1, 2, 11, 3)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


@pytest.mark.usefixtures("distant")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sixteen_bit_case_is_rounded_on_its_way_in_and_out(dtype: str) -> None:
    ours = run_on(STRICT, "attention", _problem(), {"causal": True}, dtype)
    reference = load("numpy").run("attention", _problem(), {"causal": True}, {}, dtype)
    for name, array in reference.items():
        assert ours[name].dtype == array.dtype, name
        assert np.allclose(ours[name].astype(np.float64), array.astype(np.float64), rtol=1e-6), name


def test_what_is_not_claimed_is_refused() -> None:
    with pytest.raises(Unsupported, match="op is traffic, but backend cupy claims attention"):
        run_on(STRICT, "traffic", {}, {}, "float64")
    with pytest.raises(Unsupported, match="dtype is int8, but backend cupy claims float64"):
        run_on(STRICT, "attention", {}, {}, "int8")
    with pytest.raises(Unsupported, match="the case rounds the weights to float16, but"):
        run_on(STRICT, "attention", _problem(), {"round_weights": True}, "float16")


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    _find(monkeypatch, None)
    with pytest.raises(
        BackendAbsent, match=r'backend cupy is absent: cupy is not .* "refattn\[cuda13\]"'
    ):
        load("cupy")


def _find(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    """Let cupy, and nothing else, be found or not."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: spec if name == "cupy" else find(name)
    )


def _pretend(monkeypatch: pytest.MonkeyPatch, count: Any) -> None:
    """Put a module named cupy in place whose driver counts devices in this way."""
    runtime = SimpleNamespace(getDeviceCount=count)
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(runtime=runtime), asarray=np.asarray, asnumpy=np.asarray
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)  # type: ignore[arg-type]
    _find(monkeypatch, object())


def test_a_missing_driver_or_device_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> int:
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    _pretend(monkeypatch, no_driver)
    with pytest.raises(BackendAbsent, match="finds no CUDA device: cudaErrorInsufficientDriver"):
        load("cupy")
    _pretend(monkeypatch, lambda: 0)
    with pytest.raises(BackendAbsent, match="the driver shows no CUDA device"):
        load("cupy")


def test_a_device_makes_the_backend_load(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, lambda: 1)
    backend = load("cupy")
    assert (backend.name, backend.dtypes) == ("cupy", FLOATS)
    outputs = backend.run("attention", _problem(), {}, {}, "float64")
    assert outputs["output"].shape == (1, 2, 7, 3)


def test_tables_and_slopes_of_the_host_prove_nothing_of_the_device() -> None:
    assert stated("cupy", "rope", ("ROPE-EQ34", "OWN-ROPE5")) == ("ROPE-EQ34",)
    assert stated("cupy", "alibi", ("ALIBI-S3a", "ALIBI-S3c")) == ("ALIBI-S3a",)
    assert stated("cupy", "traffic", ("FA1-THM2",)) == ()
