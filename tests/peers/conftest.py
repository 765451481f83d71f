"""Peers: other people's attention, called beside ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import pytest

import optional

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def require() -> Callable[[str], ModuleType]:
    """Return `require(name)`: the package, or a skip, or a failure if it is required."""
    return optional.require
