"""The kernels as they are called: one machine-code function a computing format."""

from __future__ import annotations

from refattn.cpu import backward as _backward
from refattn.cpu import forward as _forward
from refattn.cpu.compiling import kernel

forward = kernel(_forward.forward)
"""See `refattn.cpu.forward.forward`."""

backward = kernel(_backward.backward)
"""See `refattn.cpu.backward.backward`."""
