"""Packages that a test may do without, unless `REFATTN_REQUIRE` names them."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import pytest


def required() -> tuple[str, ...]:
    """Return the import names in the environment variable `REFATTN_REQUIRE`."""
    return tuple(n.strip() for n in os.environ.get("REFATTN_REQUIRE", "").split(",") if n.strip())


def require(name: str) -> ModuleType:
    """Import a package; where it is absent, skip, or fail if `REFATTN_REQUIRE` names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a package says while it loads is its own affair
            return importlib.import_module(name)
    except ImportError as absent:
        if name.partition(".")[0] in required():
            pytest.fail(f"{name} is required by REFATTN_REQUIRE, but: {absent}", pytrace=False)
        pytest.skip(f"{name} is absent: {absent}", allow_module_level=True)
