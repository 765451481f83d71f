"""Judging outputs against a certified vector: form first, then non-finite values, then error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from refattn.arrays import numpy_dtype
from refattn.bounds import PROFILES
from refattn.checks import check_option

KINDS = {"b": "bool", "i": "integer", "u": "integer", "f": "float"}
"""Dtype kinds by NumPy's letters; ml_dtypes' formats count as float."""

STATISTICS = frozenset(
    {"logsumexp", "row_max", "row_sum", "frequencies", "attention_factor", "cosine", "sine"}
)
"""Outputs in the computing format of a profile; all others are in its format of results."""

NULLS = ("zeros", "mean_value", "uniform_weights", "first_value", "ones")
"""Answers that take no attention to give, and that every vector must reject."""


class Judged(Protocol):
    """What a case must have to be judged: part of `refattn.vectors.pack.Case`."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def op(self) -> str: ...  # noqa: D102
    @property
    def dtypes(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def inputs(self) -> Mapping[str, NDArray[Any]]: ...  # noqa: D102
    @property
    def outputs(self) -> Mapping[str, NDArray[Any]]: ...  # noqa: D102
    @property
    def units(self) -> Mapping[str, NDArray[Any]]: ...  # noqa: D102
    @property
    def bounds(self) -> Mapping[str, Mapping[str, tuple[float, float, float]]]: ...  # noqa: D102


class OutputVerdict(NamedTuple):
    """The verdict on one output: its worst element, and the reason if it fails."""

    name: str
    ok: bool
    ratio: float
    """Worst |actual - expected| / bound; infinite where the form or a kind is wrong."""
    index: tuple[int, ...] | None  # type: ignore[assignment]  # hides tuple.index
    actual: float | None
    expected: float | None
    bound: float | None
    reason: str


class Verdict(NamedTuple):
    """The verdict on all outputs of a case."""

    case_id: str
    profile: str
    outputs: tuple[OutputVerdict, ...]
    ok: bool
    ratio: float


def judge(case: Judged, outputs: Mapping[str, Any], profile: str) -> Verdict:
    """Compare outputs with a vector, in the precision that the implementation declares.

    Spec: NUM-MODEL1, OWN-EXACT1.

        pass ⟺ |actual - expected| ≤ a·unit + b·unit_logit + floor in every element

    Only the outputs that the case has are compared, and each must be there.

    Args:
        case: a vector.
        outputs: what the implementation returned, by the names of the op.
        profile: one of `refattn.bounds.PROFILES`.

    Returns:
        A verdict an output, in the case's order, and one on the whole.

    Raises:
        OptionError: no such profile, or the case has no bound for it.
    """
    check_option("judge", "profile", profile, case.bounds if case.bounds else PROFILES)
    verdicts = tuple(_judge_output(case, name, outputs.get(name), profile) for name in case.outputs)
    return Verdict(
        case.id,
        profile,
        verdicts,
        all(v.ok for v in verdicts),
        max((v.ratio for v in verdicts), default=0.0),
    )


def bound_of(case: Judged, name: str, profile: str) -> NDArray[np.float64]:
    """Return the bound on every element of one output.

    Spec: NUM-MODEL1.

        a·unit + b·unit_logit + floor
    """
    a, b, floor = case.bounds[profile][name]
    shape = case.outputs[name].shape
    bound = np.full(shape, floor, np.float64)
    for factor, unit in ((a, f"{name}.unit"), (b, f"{name}.unit_logit")):
        if factor and unit in case.units:
            bound = bound + factor * case.units[unit].astype(np.float64)
    return bound


def _judge_output(case: Judged, name: str, actual: Any, profile: str) -> OutputVerdict:
    expected = case.outputs[name]
    fault = _form_fault(name, actual, expected)
    if fault:
        return OutputVerdict(name, False, np.inf, None, None, None, None, fault)
    found = np.asarray(actual)
    if expected.dtype.kind != "f":
        return _judge_exact(name, found, expected)
    wanted = expected.astype(np.float64)
    got = found.astype(np.float64)
    narrowed = _narrowed(name, wanted, profile)
    # a value beyond the range of the format is infinite, or kept in a wider array
    wrong = (_kinds(got) != _kinds(narrowed)) & (_kinds(got) != _kinds(wanted))
    if wrong.any():
        return _misplaced(name, got, narrowed, wrong, profile)
    bound = bound_of(case, name, profile)
    ratios = _ratios(got, wanted, bound, np.isfinite(got))
    at = _worst(ratios)
    if at is None:
        return OutputVerdict(name, True, 0.0, None, None, None, None, "")
    ratio = float(ratios[at])
    values = float(got[at]), float(wanted[at]), float(bound[at])
    reason = "" if ratio <= 1 else _too_far(name, at, *values, profile)
    return OutputVerdict(name, ratio <= 1, ratio, at, *values, reason)


def _form_fault(name: str, actual: Any, expected: NDArray[Any]) -> str:
    """Return what is wrong with an output before its values are read, or nothing."""
    if actual is None:
        return f"{name} is missing, but should have shape {expected.shape}"
    found = np.asarray(actual)
    if found.shape != expected.shape:
        return f"{name} has shape {found.shape}, but should have {expected.shape}"
    kinds = [_kind(x.dtype) for x in (found, expected)]
    if kinds[0] != kinds[1]:
        return f"{name} has dtype {found.dtype}, but should be of kind {kinds[1]}"
    return ""


def _kind(dtype: np.dtype[Any]) -> str:
    # ml_dtypes registers its formats under NumPy's letter V
    return "float" if dtype.name in ("bfloat16",) else KINDS.get(dtype.kind, dtype.name)


def _judge_exact(name: str, found: NDArray[Any], expected: NDArray[Any]) -> OutputVerdict:
    """Compare integers or bits: equal, or wrong."""
    wrong = np.argwhere(found != expected)
    if not len(wrong):
        return OutputVerdict(name, True, 0.0, None, None, None, None, "")
    at = tuple(int(i) for i in wrong[0])
    reason = (
        f"{_place(name, at)}={found[at]}, but should be {expected[at]} "
        f"({len(wrong)} of {expected.size} differ, exact)"
    )
    return OutputVerdict(
        name, False, np.inf, at, float(found[at]), float(expected[at]), 0.0, reason
    )


def _narrowed(name: str, expected: NDArray[np.float64], profile: str) -> NDArray[np.float64]:
    """Round expected values to the format they are returned in, where they may overflow."""
    p = PROFILES[profile]
    dtype = numpy_dtype(p.computing if name in STATISTICS else p.dtype)
    with np.errstate(all="ignore"):
        return expected.astype(dtype).astype(np.float64)


def _kinds(x: NDArray[np.float64]) -> NDArray[np.int8]:
    """Return 0 for a finite number, 1 and -1 for the infinities, 2 for NaN."""
    kinds = np.zeros(x.shape, np.int8)
    kinds[np.isposinf(x)], kinds[np.isneginf(x)], kinds[np.isnan(x)] = 1, -1, 2
    return kinds


def _misplaced(
    name: str,
    got: NDArray[np.float64],
    wanted: NDArray[np.float64],
    wrong: NDArray[np.bool_],
    profile: str,
) -> OutputVerdict:
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    reason = (
        f"{_place(name, at)}={got[at]:.6g}, but should be {wanted[at]:.6g} "
        f"({int(wrong.sum())} of {wrong.size} differ in kind, {profile})"
    )
    return OutputVerdict(name, False, np.inf, at, float(got[at]), float(wanted[at]), None, reason)


def _ratios(
    got: NDArray[np.float64],
    wanted: NDArray[np.float64],
    bound: NDArray[np.float64],
    finite: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Return |got - wanted| / bound; 0 where both are 0, and where the value is not finite."""
    with np.errstate(all="ignore"):
        difference = np.where(finite, np.abs(got - wanted), 0.0)
        ratios = np.where(difference == 0, 0.0, difference / bound)
    return np.where(np.isnan(ratios), np.inf, ratios)


def _worst(ratios: NDArray[np.float64]) -> tuple[int, ...] | None:
    if not ratios.size:
        return None
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(ratios)), ratios.shape))


def _too_far(
    name: str, at: tuple[int, ...], got: float, wanted: float, bound: float, profile: str
) -> str:
    return (
        f"{_place(name, at)}={got:.9g}, but should be {wanted:.9g} "
        f"(|diff|={abs(got - wanted):.1e}, bound {bound:.1e}, {profile})"
    )


def _place(name: str, at: tuple[int, ...]) -> str:
    return f"{name}[{','.join(str(i) for i in at)}]" if at else name


def vacuous(case: Judged, profile: str = "fp64") -> list[str]:
    """Return the null answers that a vector's bounds would accept; it should be none.

    Spec: NUM-MODEL1.

    Args:
        case: a vector.
        profile: the precision whose bounds are asked.

    Returns:
        `output:null answer` for every float output that does not reject it: zeros for every op,
        for `attention` also the mean of all values, uniform weights over its keys, the first
        value, and ones. An output that is a null answer, correctly, is not listed.
    """
    accepted = []
    for name, expected in case.outputs.items():
        if expected.dtype.kind != "f":
            continue
        for null, answer in _null_answers(case, name, expected).items():
            with np.errstate(all="ignore"):
                same = np.array_equal(answer, expected.astype(np.float64), equal_nan=True)
            if not same and _judge_output(case, name, answer, profile).ok:
                accepted.append(f"{name}:{null}")
    return accepted


def proves_nothing(case: Judged, profile: str) -> bool:
    """Return whether zeros in every float output would pass, although they are wrong.

    Spec: NUM-MODEL1.

    Such a vector is not asked in that profile; generation leaves its bounds out.
    """
    floats = [name for name, x in case.outputs.items() if x.dtype.kind == "f"]
    accepted = vacuous(case, profile)
    return bool(floats) and all(f"{name}:zeros" in accepted for name in floats)


def _null_answers(
    case: Judged, name: str, expected: NDArray[Any]
) -> dict[str, NDArray[np.float64]]:
    """Return null answers to one output, each with the case's own non-finite values."""
    nulls = {"zeros": np.zeros(expected.shape)}
    if case.op == "attention" and name == "output":
        V = case.inputs["value"].astype(np.float64)
        group = expected.shape[1] // V.shape[1]
        V = np.repeat(np.where(np.isfinite(V), V, 0.0), group, axis=1)
        nulls["ones"] = np.ones(expected.shape)
        nulls["mean_value"] = np.full(expected.shape, V.mean())
        nulls["uniform_weights"] = np.broadcast_to(V.mean(2, keepdims=True), expected.shape)
        nulls["first_value"] = np.broadcast_to(V[:, :, :1], expected.shape)
    finite = np.isfinite(expected)
    return {null: np.where(finite, answer, expected) for null, answer in nulls.items()}
