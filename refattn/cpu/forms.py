"""What calls of one form share is decided once: their contract, and their plan but for addresses.

Both depend on how query, key, value, mask, bias and keep are laid out, never on the numbers in
them, and on the values of the other options. A call is of a known form if all these are the same;
whatever else is asked about takes the whole way, which also finds the sentence for what is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.cpu.plan import (
    ADDRESSES,
    PLAN,
    REALS,
    RULES,
    TABLE,
    NDArray,
    Numbers,
    Plan,
    Rules,
    flatten,
)

KEPT = 512
"""Forms that are remembered; when there are more, all are forgotten and begin anew."""

VALUES = frozenset({type(None), bool, int, float, str, np.bool_, np.int64, np.float32, np.float64})
"""Types of options that are equal only if they mean the same."""

LOGITS = ("mask", "bias", "keep")
"""Options of which only the layout matters, as of query, key and value."""

FLAT = TABLE + 8
"""Place of the flat plan in a job."""


class Form(NamedTuple):
    """What calls of one form share."""

    plan: Plan
    """Its addresses are of no array: 1 where there will be one, else 0."""
    numbers: Numbers
    rules: Rules
    dtype: np.dtype[Any]
    """The computing format."""
    shape: tuple[int, ...]
    """Of the output."""
    job: NDArray
    """What the kernels are told, but for the addresses of this call."""
    reals: NDArray


class Job(NamedTuple):
    """An attention ready for the kernels; the arrays behind its addresses are kept alive."""

    plan: Plan
    """See `Form`; the addresses are in `record`."""
    numbers: Numbers
    rules: Rules
    dtype: np.dtype[Any]
    arrays: tuple[Any, ...]
    output: NDArray
    logsumexp: NDArray
    record: NDArray
    """What the kernels are told; see `plan.TABLE`."""
    address: int
    """Of the record."""
    reals: NDArray


_forms: dict[Any, Form] = {}


def key_of(query: Any, key: Any, value: Any, options: Any) -> Any:
    """Return what tells the form of a call from others, or None if only its contract can."""
    if not type(query) is type(key) is type(value) is np.ndarray:
        return None
    words: list[Any] = [layout(query), layout(key), layout(value)]
    for name, option in options.items():
        kind = type(option)
        if kind in VALUES:
            words.append((name, kind, option))
        elif kind is np.ndarray and name in LOGITS:
            words.append((name, kind, layout(option)))
        elif kind in (list, tuple) and all(type(entry) in VALUES for entry in option):
            words.append((name, kind, *((type(entry), entry) for entry in option)))
        else:
            return None
    return tuple(words)


def layout(array: NDArray) -> tuple[Any, ...]:
    """Return how an array lies in memory."""
    return array.shape, array.strides, array.dtype, array.flags.aligned


def known(key: Any) -> Form | None:
    """Return the form that was kept under a key."""
    return _forms.get(key)


def keep(key: Any, form: Form) -> None:
    """Remember a form; some of several threads at once may do so in vain."""
    if len(_forms) >= KEPT:
        _forms.clear()
    _forms[key] = form


def form_of(plan: Plan, numbers: Numbers, rules: Rules, dtype: Any, shape: tuple[int, ...]) -> Form:
    """Return the form of a call's plan."""
    flat, reals = flatten(plan), np.array(numbers, dtype)
    job = np.zeros(FLAT + len(flat), np.int64)
    job[TABLE + REALS] = reals.ctypes.data
    job[TABLE + RULES : TABLE + RULES + len(rules)] = [rule.ctypes.data for rule in rules]
    job[FLAT:] = flat
    return Form(plan, numbers, rules, dtype, shape, job, reals)


def place(form: Form, arrays: tuple[NDArray | None, ...]) -> Job:
    """Return the job of one call: its form at the addresses of its arrays.

    Args:
        form: of the call.
        arrays: query, key, value, mask, bias and keep.
    """
    output, logsumexp = np.empty(form.shape, form.dtype), np.empty(form.shape[:-1], form.dtype)
    record = form.job.copy()
    address = record.ctypes.data
    record[TABLE + PLAN] = address + FLAT * record.itemsize
    for at, array in zip(ADDRESSES, (*arrays, output, logsumexp), strict=True):
        if array is not None:
            record[FLAT + at] = array.ctypes.data
    return Job(
        form.plan, form.numbers, form.rules, form.dtype, arrays, output, logsumexp, record,
        address, form.reals,
    )  # fmt: skip
