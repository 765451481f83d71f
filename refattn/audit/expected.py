"""A dialect as the expected behaviour: what its text says of a case, in place of the default.

Where the text agrees with a case's certified values, those are expected. Where it does not, some
convention tells the two apart: the values of the reference under that convention are expected then,
with which the text agrees, within bounds derived anew. Nothing expected comes from the subject.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from refattn.audit.calls import call
from refattn.audit.capabilities import CONVENTIONS, conventions, missing
from refattn.audit.subject import Arrays, Subject
from refattn.backends import load
from refattn.bounds import coefficients, profile_of
from refattn.certify.units import units
from refattn.dialects import find
from refattn.errors import RefattnError
from refattn.judge import judge
from refattn.options import DEFAULTS
from refattn.vectors.pack import Case, unbounded

ADAPTERS = {
    "torch_sdpa_2_13": "torch_sdpa",
    "torch_mha_2_13": "torch_mha",
    "jax_dpa_0_10": "jax_attention",
    "onnx_attention_23": "onnx_attention",
    "onnx_attention_24": "onnx_attention",
    "onnx_attention_25": "onnx_attention",
    "onnx_attention_23_1_18": "onnx_attention",
    "onnx_attention_23_1_20": "onnx_attention",
    "onnx_attention_23_1_22": "onnx_attention",
    "keras_mha_3_15": "keras_layers",
    "keras_gqa_3_15": "keras_layers",
    "keras_mha_2_21": "keras_layers",
}
"""Dialects that answer a case of attention, and the module whose `dialect` calls their text."""

STATISTIC = "logsumexp"
"""What a text may define as it likes where its weights are agreed on."""

EXACT = "float64"
"""The dtype in which the reference is asked."""


class Expected(NamedTuple):
    """What a dialect expects of a case; `case` is None where it says nothing of it."""

    case: Case | None
    departure: str
    """How it departs from the case: `empty_row nan, not zero`; empty where it does not."""
    reason: str = ""
    """Why it says nothing."""
    statistic: str = ""
    """How its logsumexp departs, for those who return one."""

    def departures(self, judged: Case) -> str:
        """Return how it departs from a case in what is judged of it."""
        own = self.statistic if STATISTIC in judged.outputs else ""
        return ", ".join(part for part in (self.departure, own) if part)


def load_text(name: str) -> Subject:
    """Return a dialect's text as something that answers cases.

    Args:
        name: a dialect by its name or alias.

    Raises:
        RefattnError: there is none, or it has no form for query, key and value alone.
    """
    dialect = find(name)
    if dialect.name not in ADAPTERS:
        raise RefattnError(
            f"dialect is {dialect.name}, but an audit takes one that answers query, key and value "
            f"alone: {', '.join(ADAPTERS)}"
        )
    module = importlib.import_module(f"refattn.audit.{ADAPTERS[dialect.name]}")
    text: Subject = module.dialect(dialect)
    return text


def expect(case: Case, text: Subject) -> Expected:
    """Return what a dialect expects of a case of attention.

    Args:
        case: a vector.
        text: the dialect, from `load_text`.
    """
    finest = text.capabilities.dtypes[0]
    if why := missing(case, finest, text.capabilities):
        return Expected(None, "", f"dialect {text.name}: {why.partition(':')[0]}")
    try:
        answer = call(text, case, finest)
    except RefattnError as error:
        return Expected(None, "", f"dialect {text.name}: {error}")
    profile = profile_of(finest)
    if why := unbounded(case, profile):
        return Expected(None, "", why)
    if _agrees(case, answer, profile):
        return _with_statistic(case, answer, "", profile)
    wanted = conventions(case)
    for axis, choice in wanted.items():
        if choice != DEFAULTS[axis]:
            return Expected(
                None, "", f"the case asks for {axis} {choice}, but dialect {text.name} does not"
            )
    for chosen in _others(wanted):
        other = _under(case, chosen)
        if profile in other.bounds and _agrees(other, answer, profile):
            departure = ", ".join(
                f"{axis} {chosen[axis]}, not {choice}"
                for axis, choice in wanted.items()
                if chosen[axis] != choice
            )
            said = {name: array for name, array in other.outputs.items() if name in answer}
            return _with_statistic(replace(other, outputs=said), answer, departure, profile)
    return Expected(None, "", f"no named convention says how dialect {text.name} departs here")


def _with_statistic(case: Case, answer: Arrays, departure: str, profile: str) -> Expected:
    """Return what is expected, with the text's logsumexp where it is another than the case's."""
    own = answer.get(STATISTIC)
    if own is None or STATISTIC not in case.outputs:
        return Expected(case, departure)
    only = replace(case, outputs={STATISTIC: case.outputs[STATISTIC]})
    if judge(only, answer, profile).ok:
        return Expected(case, departure)
    outputs = {**case.outputs, STATISTIC: own}
    return Expected(replace(case, outputs=outputs), departure, "", f"its own {STATISTIC}")


def _agrees(case: Case, answer: Arrays, profile: str) -> bool:
    """Return whether a text's answer is that of a case, in what both have but the statistic."""
    said = set(answer) - {STATISTIC}
    shared = {name: array for name, array in case.outputs.items() if name in said}
    return judge(replace(case, outputs=shared), answer, profile).ok


def _others(wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every other choice on the axes that decide a case."""
    for made in product(*(CONVENTIONS[axis] for axis in wanted)):
        chosen = dict(zip(wanted, made, strict=True))
        if chosen != wanted:
            yield chosen


def _under(case: Case, chosen: Mapping[str, Any]) -> Case:
    """Return a case under other conventions by the reference, with bounds where there are any."""
    made = {**case.conventions, **chosen}
    outputs = load("numpy").run(case.op, case.inputs, case.parameters, made, EXACT)
    found, magnitudes = units(case.op, case.inputs, case.parameters, made)
    bounds = {profile: coefficients(case.op, profile, magnitudes) for profile in case.bounds}
    bounds = {profile: triples for profile, triples in bounds.items() if triples}
    bounded = {name for triples in bounds.values() for name in triples}
    kept = {name: outputs[name] for name in case.outputs if name in bounded}
    return replace(case, conventions=made, outputs=kept, units=found, bounds=bounds)
