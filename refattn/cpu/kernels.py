"""The kernels as they are called: one machine-code function a computing format."""

from __future__ import annotations

from refattn.cpu import backward as _backward
from refattn.cpu import decode as _decode
from refattn.cpu import forward as _forward
from refattn.cpu.compiling import kernel

forward = kernel(_forward.forward)
"""See `refattn.cpu.forward.forward`."""

backward = kernel(_backward.backward)
"""See `refattn.cpu.backward.backward`."""

decode = kernel(_decode.decode)
"""See `refattn.cpu.decode.decode`."""

merge_all = kernel(_decode.merge_all)
"""See `refattn.cpu.decode.merge_all`."""
