"""A dialect and torch on the same call: results, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from optional import require
from peers.sameness import Results, attempt

torch = require("torch")


def theirs_or_error(run: Callable[[], Any]) -> Any:
    """Return torch's result or its error."""
    errors = (RuntimeError, AssertionError, ValueError, IndexError, TypeError, NotImplementedError)
    return attempt(run, errors)


def tensor(value: Any, gradient: bool = True) -> Any:
    """Return a leaf of torch for an array; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    leaf = torch.from_numpy(value.copy())
    return leaf.requires_grad_(gradient and leaf.is_floating_point())


def array(value: Any) -> Any:
    """Return a NumPy array for a tensor; anything else as it is."""
    return value.detach().numpy().copy() if isinstance(value, torch.Tensor) else value


def gradients(
    results: tuple[Any, ...], cotangents: tuple[Any, ...], leaves: Mapping[str, Any]
) -> Results:
    """Return torch's gradients by name; zeros where the results do not depend on a leaf."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r is not None]
    found = torch.autograd.grad(
        [r for r, _ in pairs],
        list(wanted.values()),
        [torch.from_numpy(c) for _, c in pairs],
        materialize_grads=True,
    )
    return {name: gradient.numpy() for name, gradient in zip(wanted, found, strict=True)}
