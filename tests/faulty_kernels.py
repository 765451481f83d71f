"""Kernels with one planted fault: the real sources with one line replaced."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

FOLDER = "refattn_gpu.numba_cuda"

LIBRARIES = ("loading", "bound")
"""Modules whose functions kernels call, in the order in which they import each other."""


class Fault(NamedTuple):
    """One line of one module, and what stands in its place."""

    module: str
    line: str
    instead: str


def faulty_modules(fault: Fault, kernels: str) -> Mapping[str, Any]:
    """Return the names of a module of kernels as they are with a fault in it or below it.

    Args:
        fault: to plant; the line must be there once, so that no fault is planted in vain.
        kernels: the module of kernels.
    """
    changed: dict[str, ModuleType] = {}
    for name in (*LIBRARIES, kernels):
        real = importlib.import_module(f"{FOLDER}.{name}")
        source = inspect.getsource(real)
        if name == fault.module:
            assert source.count(fault.line) == 1, (fault, source.count(fault.line))
            source = source.replace(fault.line, fault.instead)
        module = ModuleType(f"faulty_{name}")
        exec(compile(source, real.__file__ or name, "exec"), module.__dict__)
        for library in changed.values():  # what was imported is the faulty one
            for word, thing in vars(library).items():
                if word in vars(module) and getattr(thing, "__module__", "") == library.__name__:
                    setattr(module, word, thing)
        changed[name] = module
    return vars(changed[kernels])
