"""What the constructors and calls of Keras's layers refuse in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from refattn.arrays import Array
from refattn.checks import (
    OptionError,
    check_counts,
    check_finite,
    check_flag,
    given,
    is_integer,
    shown,
)


def attended_axes(function: str, axes: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Return attention_axes of inputs of `ndim` axes, counted from the front.

    Raises:
        OptionError: one is not between batch and features, or named twice.
    """
    if axes is None:
        return tuple(range(1, ndim - 1))
    named_axes = (axes,) if is_integer(axes) else axes
    if not isinstance(named_axes, (tuple, list)) or not all(map(is_integer, named_axes)):
        raise OptionError(
            f"attention_axes is {shown(axes)}, but it must be an integer or a tuple of them "
            f"[{function}]"
        )
    found = tuple(int(a) if a >= 0 else ndim + int(a) for a in named_axes)
    if not found or len(set(found)) < len(found) or not all(1 <= a < ndim - 1 for a in found):
        raise OptionError(
            f"attention_axes is {shown(axes)}, but of {ndim} axes it must name one or more between "
            f"the first and the last, none twice [{function}]"
        )
    return found


def output_axes(function: str, output_shape: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Return output_shape as a tuple; None, or what Keras takes for it: 0 or nothing.

    Raises:
        OptionError: it is no integer of at least 1, and no sequence of such.
    """
    if output_shape is None or output_shape == 0:
        return None
    sizes = (output_shape,) if is_integer(output_shape) else output_shape
    if not isinstance(sizes, (tuple, list)):
        raise OptionError(
            f"output_shape is {shown(output_shape)}, but it must be an integer or a tuple of them "
            f"[{function}]"
        )
    counts = {f"output_shape[{i}]": size for i, size in enumerate(sizes)}
    return tuple(check_counts(function, **counts)) or None


def check_dropout(function: str, dropout: float, flash_attention: bool | None) -> None:
    """Check a layer's dropout, and that flash attention has none.

    Raises:
        OptionError: it is not from 0 to 1, or flash_attention is True beside it.
    """
    check_finite(function, dropout=dropout)
    check_flag(function, **given(flash_attention=flash_attention))
    if not 0 <= dropout <= 1:
        raise OptionError(f"dropout is {shown(dropout)}, but it must be from 0 to 1 [{function}]")
    if flash_attention and dropout > 0:
        raise OptionError(
            f"dropout is {shown(dropout)}, but flash_attention takes none [{function}]"
        )


def check_call(
    function: str,
    weights: Mapping[str, Array],
    return_scores: bool,
    training: bool | None,
    causal: bool,
    flash_attention: bool | None = None,
) -> None:
    """Check the flags of a call, and that the layer has its weights.

    Raises:
        OptionError: it has not, or a flag is refused.
    """
    if not weights:
        raise OptionError(f"the layer has no weights, but set_weights gives them [{function}]")
    flags = {"return_attention_scores": return_scores, "use_causal_mask": causal}
    check_flag(function, **flags, **given(training=training))
    if flash_attention and return_scores:
        raise OptionError(
            f"return_attention_scores is True, but flash_attention returns none [{function}]"
        )
