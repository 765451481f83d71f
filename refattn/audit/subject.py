"""Subjects: what is judged, however it is called."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from refattn.audit.capabilities import ANY, CONVENTIONS, SHOWN_BY, Capabilities
from refattn.errors import RefattnError

Arrays = dict[str, np.ndarray[Any, Any]]

BUNDLED = {
    "torch-sdpa": "torch_sdpa",
    "onnxruntime": "onnx_attention",
    "jax": "jax_attention",
    "keras": "keras_attention",
}
"""Subjects that come with an adapter, and its module."""

DECLARATION = "refattn_capabilities"
"""Name of a function's attribute, or of its module's variable, that declares capabilities."""

WORDS = "a list of words"
"""What most keys of a declaration hold."""

FIELDS = {
    "features": WORDS,
    "dtypes": WORDS,
    "conventions": "a dict of words",
    "layout": "a word",
    "ops": WORDS,
}
"""Keys of a declaration, and what each holds."""


class Subject(NamedTuple):
    """An implementation under audit.

    `run` takes a case's tensors in one dtype and its options, and returns tensors by the names of
    the operation's table: output, logsumexp where offered, gradients where offered.
    """

    name: str
    version: str
    capabilities: Capabilities
    run: Callable[[Arrays, dict[str, Any]], Arrays]


def load_subject(
    text: str,
    *,
    capabilities: tuple[str, ...] = (),
    conventions: Mapping[str, str] | None = None,
    layout: str | None = None,
    dtypes: tuple[str, ...] = (),
) -> Subject:
    """Return a bundled subject by its name, or a Python callable by `module:function`.

    Args:
        text: one of `BUNDLED`, or `module:function`; the current folder is searched too.
        capabilities: further features that the subject has.
        conventions: choices of the subject that differ from its declaration.
        layout: order of the axes, one of `LAYOUTS`.
        dtypes: the dtypes to put to it instead of the declared ones.

    Raises:
        RefattnError: there is no such subject, or a word of the declaration is unknown.
    """
    if text in BUNDLED:
        subject: Subject = importlib.import_module(f"refattn.audit.{BUNDLED[text]}").subject()
    elif ".py" in text or os.sep in text:
        raise RefattnError(
            f"subject is {text}, but a module is named, not a file: module:function, with the "
            "module in the current folder"
        )
    elif ":" in text:
        subject = from_callable(_resolve(text), text)
    else:
        raise RefattnError(
            f"subject is {text}, but it must be module:function or one of {', '.join(BUNDLED)}"
        )
    declared = subject.capabilities
    changed = replace(
        declared,
        features=declared.features | set(capabilities),
        conventions={**declared.conventions, **(conventions or {})},
        layout=layout or declared.layout,
        dtypes=dtypes or declared.dtypes,
    )
    return subject._replace(capabilities=changed)


def from_callable(function: Callable[..., Any], name: str) -> Subject:
    """Return the subject of a Python callable on NumPy arrays.

    The callable is `f(query, key, value, **options)`, where the options are those of
    `refattn.attention` that a case needs, by the same names. It returns the output, or (output,
    logsumexp), or a dict by names. With the feature `backward` it is also given `d_output` and
    returns a dict that holds d_query, d_key and d_value, too.

    What it can do is taken from its `refattn_capabilities`, or from the variable of that name in
    its module: a dict with any of `FIELDS`. Without one, an option or convention is offered when
    the signature names it, and every other axis is judged by the specification's default.
    """
    declared = getattr(function, DECLARATION, None)
    if declared is None:
        declared = getattr(sys.modules.get(getattr(function, "__module__", "")), DECLARATION, None)
    offered = inferred(function) if declared is None else declaration(declared, name)
    if "attention" in offered.ops:
        _check_callable(function, name)
    version = str(getattr(sys.modules.get(name.split(":")[0]), "__version__", ""))

    def run(inputs: Arrays, options: dict[str, Any]) -> Arrays:
        return named(function(**inputs, **options))

    return Subject(name, version, offered, run)


def _check_callable(function: Callable[..., Any], name: str) -> None:
    """Refuse what cannot be called with query, key and value alone, by these names.

    Raises:
        RefattnError: it is a class, or its signature does not fit.
    """
    if inspect.isclass(function):
        raise RefattnError(f"{name} is a class, but it must be a function or an object to call")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # compiled code may not tell its signature
    try:
        signature.bind(query=None, key=None, value=None)
    except TypeError as error:
        raise RefattnError(
            f"{name} takes {signature}, but it is called with query, key and value by name: {error}"
        ) from error


def inferred(function: Callable[..., Any]) -> Capabilities:
    """Return the capabilities that a signature's keyword names show."""
    try:
        names = set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = set()
    features = {feature for name, feature in SHOWN_BY.items() if name in names}
    defaults = {axis: choices[0] for axis, choices in CONVENTIONS.items()}
    taken = {axis: ANY for axis in CONVENTIONS if axis in names}
    return Capabilities(
        features=frozenset({"cross_lengths", *features}), conventions={**defaults, **taken}
    )


def declaration(declared: Any, name: str) -> Capabilities:
    """Return the capabilities of a declaration.

    Raises:
        RefattnError: it is no dict, or has a value of another form or a word that is unknown.
    """
    if not isinstance(declared, Mapping):
        raise RefattnError(f"{DECLARATION} of {name} is {declared!r}, but it must be a dict")
    for key in declared:
        if key not in FIELDS:
            raise RefattnError(
                f"{DECLARATION} of {name} has {key}, but its keys are {', '.join(FIELDS)}"
            )
        if not _holds(FIELDS[key], declared[key]):
            raise RefattnError(
                f"{DECLARATION} of {name} has {key}={declared[key]!r}, but it must be {FIELDS[key]}"
            )
    base = Capabilities()
    return Capabilities(
        features=frozenset(declared.get("features", ())),
        dtypes=tuple(declared.get("dtypes", base.dtypes)),
        conventions={**base.conventions, **declared.get("conventions", {})},
        layout=declared.get("layout", base.layout),
        ops=tuple(declared.get("ops", base.ops)),
    )


def _holds(what: str, value: Any) -> bool:
    """Return whether the value of a declaration's key has its form."""
    if what == "a word":
        return isinstance(value, str)
    if what == "a dict of words":
        return isinstance(value, Mapping) and all(
            isinstance(word, str) for pair in value.items() for word in pair
        )
    return isinstance(value, (list, tuple, set, frozenset)) and all(
        isinstance(word, str) for word in value
    )


def named(returned: Any) -> Arrays:
    """Return what a callable returned as arrays by name."""
    if hasattr(returned, "_asdict"):
        returned = returned._asdict()
    if returned is None:
        return {}
    if isinstance(returned, Mapping):
        return {str(k): np.asarray(v) for k, v in returned.items() if v is not None}
    if isinstance(returned, (tuple, list)):
        return {
            name: np.asarray(array)
            for name, array in zip(("output", "logsumexp"), returned, strict=False)
            if array is not None
        }
    return {"output": np.asarray(returned)}


def _resolve(text: str) -> Callable[..., Any]:
    """Import the callable of `module:function`."""
    module_name, _, path = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with redirect_stdout(sys.stderr):
            found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise RefattnError(f"module {module_name} does not import: {kind}: {error}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise RefattnError(f"module {module_name} has no {path}")
        found = getattr(found, name)
    if not callable(found):
        raise RefattnError(f"{text} is {type(found).__name__}, but it must be callable")
    return found  # type: ignore[no-any-return]
