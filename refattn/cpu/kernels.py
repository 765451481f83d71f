"""The kernels as they are called: one machine-code function a computing format."""

from __future__ import annotations

from refattn.cpu import backward as _backward
from refattn.cpu import decode as _decode
from refattn.cpu import forward as _forward
from refattn.cpu.alibi import bias_rows as _bias_rows
from refattn.cpu.compiling import kernel
from refattn.cpu.rotation import rotate_rows as _rotate_rows

forward = kernel(_forward.forward)
"""See `refattn.cpu.forward.forward`."""

backward = kernel(_backward.backward)
"""See `refattn.cpu.backward.backward`."""

decode = kernel(_decode.decode)
"""See `refattn.cpu.decode.decode`."""

merge_all = kernel(_decode.merge_all)
"""See `refattn.cpu.decode.merge_all`."""

rotate_rows = kernel(_rotate_rows)
"""See `refattn.cpu.rotation.rotate_rows`."""

bias_rows = kernel(_bias_rows)
"""See `refattn.cpu.alibi.bias_rows`."""
