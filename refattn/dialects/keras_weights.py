"""The weights of Keras's attention layers: their names, order and shapes, in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np

from refattn.arrays import Array
from refattn.checks import OptionError, check_floats, check_shapes


class Form(NamedTuple):
    """What fixes the shapes of a layer's weights, but for the features of its inputs."""

    function: str
    """The name in error sentences."""
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    output_shape: tuple[int, ...] | None
    """Trailing axes of the output; the features of query if None."""
    use_bias: bool
    use_gate: bool


@dataclass(frozen=True)
class Layer:
    """What Keras's layers share beside their calls: weights that come and go in Keras's order."""

    weights: Mapping[str, Array] = field(default_factory=dict, repr=False, kw_only=True)

    @property
    def form(self) -> Form:
        """What fixes the shapes of the weights."""
        raise NotImplementedError

    def weight_shapes(
        self,
        query_shape: Sequence[int],
        value_shape: Sequence[int],
        key_shape: Sequence[int] | None = None,
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight, by Keras's name and in Keras's order."""
        features = (query_shape, value_shape if key_shape is None else key_shape, value_shape)
        sizes = {n: s[-1] for n, s in zip(("e_q", "e_k", "e_v"), features, strict=True)}
        return {
            name: tuple(int(sizes.get(letter, letter)) for letter in contract.split())
            for name, contract in contracts(self.form).items()
        }

    def set_weights(self, weights: Sequence[Any]) -> Self:
        """Return the layer with weights in Keras's order.

        Raises:
            OptionError, ShapeError, DtypeError: number, a shape or a dtype is another one.
        """
        return replace(self, weights=named(self.form, weights))

    def get_weights(self) -> list[Array]:
        """Return copies of the weights in Keras's order."""
        return [weight.copy() for weight in self.weights.values()]


def contracts(form: Form) -> dict[str, str]:
    """Return the shape contract of every weight by Keras's name for it, in Keras's order.

    Spec: VAS-S322b.
    """
    h, h_k, d_k, d_v = form.heads, form.key_heads, form.key_dim, form.value_dim
    out = "e_q" if form.output_shape is None else " ".join(map(str, form.output_shape))
    parts = {"query": f"{h} {d_k}", "key": f"{h_k} {d_k}", "gate": f"{h} {d_v}"}
    parts |= {"value": f"{h_k} {d_v}", "attention_output": out}
    features = {"query": "e_q", "key": "e_k", "gate": "e_q", "value": "e_v"}
    found = {}
    for part, shape in parts.items():
        if part == "gate" and not form.use_gate:
            continue
        found[f"{part}/kernel"] = f"{features.get(part, f'{h} {d_v}')} {shape}"
        if form.use_bias:
            found[f"{part}/bias"] = shape
    return found


def named(form: Form, weights: Sequence[Any]) -> dict[str, Array]:
    """Return copies of a layer's weights, which come in Keras's order, by name.

    Raises:
        OptionError: there are more or fewer than the layer has.
        ShapeError, DtypeError: a shape is another one, or the dtypes are not one float.
    """
    expected = contracts(form)
    if len(weights) != len(expected):
        raise OptionError(
            f"weights holds {len(weights)} arrays, but the layer has {', '.join(expected)} "
            f"[{form.function}]"
        )
    arrays = {name: np.array(w) for name, w in zip(expected, weights, strict=True)}
    check_shapes(form.function, **{name: (arrays[name], expected[name]) for name in expected})
    check_floats(form.function, **arrays)
    return arrays
