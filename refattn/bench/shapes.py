"""What is timed: the sizes of an attention, and the work that they mean."""

from __future__ import annotations

from typing import NamedTuple

from refattn.checks import OptionError

FORWARD = (
    "1,16,1024,64",
    "4,12,512,64",
    "1,8,4096,64",
    "1,8,4096,128",
    "1,4,16384,64",
    "1,32,1:4096,128",
    "1,8,8:4096,128",
    "1,8,16:4096,128",
    "1,8,32:4096,128",
    "1,12,128,64",
)
"""Shapes that are timed unless others are asked for."""

BACKWARD = ("1,16,1024,64", "4,12,512,64", "1,8,4096,64", "1,8,4096,128", "1,12,128,64")
"""The same for gradients: decoding has none, and 16384 tokens would take a minute."""


class Shape(NamedTuple):
    """Sizes of one attention."""

    batch: int
    heads: int
    n_q: int
    n_k: int
    d: int

    def __str__(self) -> str:
        n = str(self.n_q) if self.n_q == self.n_k else f"{self.n_q}:{self.n_k}"
        return f"{self.batch},{self.heads},{n},{self.d}"


def read_shape(text: str) -> Shape:
    """Return the shape that `batch,heads,length,features` says; the length may be `n_q:n_k`.

    Raises:
        OptionError: it is not of that form.
    """
    try:
        batch, heads, length, d = text.split(",")
        n_q, _, n_k = length.partition(":")
        shape = Shape(int(batch), int(heads), int(n_q), int(n_k or n_q), int(d))
    except ValueError:
        shape = Shape(0, 0, 0, 0, 0)
    if min(shape) < 1:
        raise OptionError(
            f"shape is {text!r}, but it must be batch,heads,length,features with a length of "
            "n or n_q:n_k, all at least 1 [bench]"
        )
    return shape


def read_todo(shapes: tuple[str, ...], masks: tuple[str, ...]) -> list[tuple[Shape, str]]:
    """Return each shape with each mask, once; one query sees every key under either mask.

    Raises:
        OptionError: a shape is not one, or has queries that a causal mask leaves without a key.
    """
    todo = []
    for shape in dict.fromkeys(read_shape(text) for text in shapes):
        for mask in masks if shape.n_q > 1 else masks[:1]:
            if mask == "causal" and shape.n_q > shape.n_k:
                raise OptionError(
                    f"shape is '{shape}', but a causal mask needs at least as many keys as "
                    f"queries, and this has n_q={shape.n_q}, n_k={shape.n_k} [bench]"
                )
            todo.append((shape, mask))
    return todo


def operations(shape: Shape, causal: bool, backward: bool) -> float:
    """Return the multiplications and additions that an exact attention needs; causal exactly."""
    b, h, n_q, n_k, d = shape
    pairs = n_q * n_k
    if causal:
        pairs = sum(min(n_k, max(0, n_k - n_q + i + 1)) for i in range(n_q))
    return 4.0 * b * h * d * pairs * (3.5 if backward else 1.0)


def result_bytes(shape: Shape, itemsize: int, backward: bool) -> int:
    """Return the bytes of what a call returns: the output, and the three gradients if asked."""
    b, h, n_q, n_k, d = shape
    rows = 2 * (n_q + n_k) if backward else n_q
    return b * h * rows * d * itemsize
