"""What kernels claim of the reference's options: everything else they refuse, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refattn.backends import Options, Unsupported


def check_claimed(
    function: str, kernels: str, query: Any, options: Options, claimed: Mapping[str, Any]
) -> None:
    """Refuse what the reference takes and some kernels do not.

    Args:
        function: as errors name it.
        kernels: likewise, as "the CPU kernels".
        query: Q, whose axes are counted.
        options: every option of the call.
        claimed: the one value that the kernels support of some options.

    Raises:
        Unsupported: an option, or the number of axes.
    """
    for name, value in claimed.items():
        if options[name] != value:
            raise Unsupported(
                f"{name} is {options[name]!r}, but {kernels} support {value!r} [{function}]"
            )
    if query.ndim > 4:
        raise Unsupported(
            f"query has {query.ndim} axes, but {kernels} support at most 4 [{function}]"
        )
