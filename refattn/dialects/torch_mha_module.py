"""PyTorch's nn.MultiheadAttention: a record of its weights, and its two ways of running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from refattn.arrays import Array
from refattn.checks import (
    OptionError,
    ShapeError,
    check_arrays,
    check_counts,
    check_finite,
    check_flag,
    check_floats,
    given,
    shown,
)
from refattn.dialects.torch_mha import forward
from refattn.dialects.torch_mha_backward import multi_head_attention_backward
from refattn.dialects.torch_mha_call import Call, check_mask_dtype

FUNCTION = "MultiheadAttention"
"""The name in error sentences."""


class ModuleGradients(NamedTuple):
    """Gradients of the inputs, of float masks, and of every parameter by its name."""

    d_query: Array
    d_key: Array
    d_value: Array
    d_attn_mask: Array | None
    d_key_padding_mask: Array | None
    d_parameters: dict[str, Array]


@dataclass(frozen=True)
class MultiheadAttention:
    """torch.nn.MultiheadAttention with torch's constructor; weights come by `load_state_dict`.

    Spec: VAS-S322a, VAS-S322b.

    Args:
        embed_dim: e, features of query and of the output.
        num_heads: h, a divisor of e.
        dropout: chance that a weight is dropped while training.
        bias: whether the projections have one.
        add_bias_kv: whether a learned row is appended to the projected keys and values.
        add_zero_attn: whether a row of zeros is appended to them.
        kdim: features of key; e if None.
        vdim: features of value; e if None.
        batch_first: whether arrays are (b, n, e), else (n, b, e).
        training: torch's mode, True after construction as there; see `eval`.
        parameters: the state dict.

    Raises:
        OptionError, ShapeError: an argument is refused.
    """

    embed_dim: int
    num_heads: int
    dropout: float = 0.0
    bias: bool = True
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    kdim: int | None = None
    vdim: int | None = None
    batch_first: bool = False
    training: bool = True
    parameters: Mapping[str, Array] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_counts(FUNCTION, embed_dim=self.embed_dim, num_heads=self.num_heads)
        check_counts(FUNCTION, least=0, **given(kdim=self.kdim, vdim=self.vdim))
        check_finite(FUNCTION, dropout=self.dropout)
        names = ("bias", "add_bias_kv", "add_zero_attn", "batch_first", "training")
        check_flag(FUNCTION, **{name: getattr(self, name) for name in names})
        if self.embed_dim % self.num_heads:
            raise ShapeError(
                f"embed_dim is {self.embed_dim}, but num_heads is {self.num_heads}; the first must "
                f"be a multiple of the second [{FUNCTION}]"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter, by torch's name and in torch's order."""
        e = self.embed_dim
        if self._is_packed():
            found: dict[str, tuple[int, ...]] = {"in_proj_weight": (3 * e, e)}
        else:
            kdim, vdim = (e if d is None else d for d in (self.kdim, self.vdim))
            found = {
                "q_proj_weight": (e, e),
                "k_proj_weight": (e, kdim),
                "v_proj_weight": (e, vdim),
            }
        if self.bias:
            found["in_proj_bias"] = (3 * e,)
        if self.add_bias_kv:
            found |= {"bias_k": (1, 1, e), "bias_v": (1, 1, e)}
        found["out_proj.weight"] = (e, e)
        if self.bias:
            found["out_proj.bias"] = (e,)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> MultiheadAttention:
        """Return the module with the parameters of a state dict, torch's included.

        Raises:
            OptionError: a parameter is missing, or none of this module.
            ShapeError, DtypeError: its shape is another one, or the dtypes are not one float.
        """
        arrays = {name: np.asarray(parameter) for name, parameter in state.items()}
        shapes = self.shapes()
        missing, surplus = sorted(set(shapes) - set(arrays)), sorted(set(arrays) - set(shapes))
        if missing or surplus:
            raise OptionError(
                f"state holds {shown(sorted(arrays))}, but the module has {', '.join(shapes)} "
                f"[{FUNCTION}]"
            )
        for name, shape in shapes.items():
            if arrays[name].shape != shape:
                raise ShapeError(
                    f"{name} has shape {arrays[name].shape}, but the module's has {shape}; they "
                    f"must be equal [{FUNCTION}]"
                )
        check_floats(FUNCTION, **{name: arrays[name] for name in shapes})
        return replace(self, parameters={name: arrays[name].copy() for name in shapes})

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the parameters by torch's names."""
        return {name: array.copy() for name, array in self.parameters.items()}

    def train(self, mode: bool = True) -> MultiheadAttention:
        """Return the module in training mode, where dropout acts."""
        return replace(self, training=mode)

    def eval(self) -> MultiheadAttention:
        """Return the module in evaluation mode."""
        return self.train(False)

    def forward(
        self,
        query: Array,
        key: Array,
        value: Array,
        key_padding_mask: Array | None = None,
        need_weights: bool = True,
        attn_mask: Array | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        keep: Array | None = None,
        inference: bool = False,
    ) -> tuple[Array, Array | None]:
        """Return the output, and the weights if they are needed.

        Spec: VAS-S322a, VAS-S323a, OWN-MASK1, OWN-EMPTY1, OWN-DROPOUT1.

        Args:
            query: (n_q, b, e), or (b, n_q, e) if batch_first, or (n_q, e).
            key: likewise, n_k rows of kdim features.
            value: likewise, n_k rows of vdim features.
            key_padding_mask: (b, n_k), bool, True = ignore, or float, added.
            need_weights: whether weights are returned; a row without a key is then NaN, else 0.
            attn_mask: (n_q, n_k) or (b·h, n_q, n_k), bool, True = ignore, or float, added.
            average_attn_weights: whether weights are averaged over the heads.
            is_causal: a hint that attn_mask is causal; see `multi_head_attention_forward`.
            keep: bool, (b, h, n_q, keys): the weights that dropout keeps.
            inference: whether torch runs without gradients, as under `torch.no_grad`: where
                `is_fast` holds, rows without a key are then NaN and is_causal is not looked at.

        Returns:
            output: shape of query.
            weights: (b, n_q, keys) or (b, h, n_q, keys), without b where there is none; or None.

        Raises:
            ShapeError, DtypeError, OptionError: where torch errs, and for the named exceptions.
        """
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        for name, mask in given(**masks).items():
            check_arrays(FUNCTION, **{name: mask})
            check_mask_dtype(name, mask)
        arrays = (query, key, value)
        if inference and self.is_fast(*arrays, attn_mask, key_padding_mask):
            call = self._call(arrays, masks, True, average_attn_weights, False, None)
            output, weights = forward(call)
            if not need_weights or query.size == 0:
                weights = None
        else:
            call = self._call(arrays, masks, need_weights, average_attn_weights, is_causal, keep)
            output, weights = forward(call)
        return self._turned(output), weights

    __call__ = forward

    def backward(
        self,
        d_output: Array,
        query: Array,
        key: Array,
        value: Array,
        key_padding_mask: Array | None = None,
        need_weights: bool = True,
        attn_mask: Array | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        keep: Array | None = None,
        d_weights: Array | None = None,
    ) -> ModuleGradients:
        """Return the gradients of the inputs and of every parameter.

        Spec: OWN-BACKWARD1, VAS-S322a.

        Args:
            d_output: dO, shape of the output.
            query: as in the forward call, and so on.
            key: as in the forward call.
            value: as in the forward call.
            key_padding_mask: as in the forward call.
            need_weights: as in the forward call.
            attn_mask: as in the forward call.
            average_attn_weights: as in the forward call.
            is_causal: as in the forward call.
            keep: as in the forward call.
            d_weights: gradient of the loss by the returned weights; None = not read.

        Returns:
            The gradients, each with the shape and dtype of what it belongs to.

        Raises:
            ShapeError, DtypeError, OptionError: as the forward call, or a cotangent does not fit.
        """
        masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        arrays = (query, key, value)
        call = self._call(arrays, masks, need_weights, average_attn_weights, is_causal, keep)
        found = multi_head_attention_backward(self._turned(d_output), call, d_weights=d_weights)
        by_name = found._asdict()
        names = {name: f"d_{name.replace('.', '_')}" for name in self.parameters}
        return ModuleGradients(
            self._turned(found.d_query),
            self._turned(found.d_key),
            self._turned(found.d_value),
            found.d_attn_mask,
            found.d_key_padding_mask,
            {name: by_name[gradient] for name, gradient in names.items()},
        )

    def is_fast(
        self,
        query: Array,
        key: Array,
        value: Array,
        attn_mask: Array | None = None,
        key_padding_mask: Array | None = None,
    ) -> bool:
        """Tell whether torch runs its inference path on these arguments.

        It does in evaluation mode, for self-attention by one and the same array with a batch
        first, an even number of heads, biases, packed weights, no appended rows and bool masks.
        """
        plain = self._is_packed() and self.bias and not (self.add_bias_kv or self.add_zero_attn)
        masks = given(attn_mask=attn_mask, key_padding_mask=key_padding_mask)
        return (
            plain
            and not self.training
            and self.batch_first
            and self.num_heads % 2 == 0
            and query is key is value
            and query.ndim == 3
            and all(mask.dtype == bool for mask in masks.values())
        )

    def _is_packed(self) -> bool:
        return all(d in (None, self.embed_dim) for d in (self.kdim, self.vdim))

    def _turned(self, array: Array) -> Array:
        """Return an array with length and batch swapped where the batch comes first."""
        return np.swapaxes(array, 0, 1) if self.batch_first and np.ndim(array) == 3 else array

    def _call(
        self,
        arrays: tuple[Array, Array, Array],
        masks: dict[str, Array | None],
        need_weights: bool,
        average_attn_weights: bool,
        is_causal: bool,
        keep: Array | None,
    ) -> Call:
        """Return the arguments of the functional form.

        Raises:
            OptionError: the module has no weights yet.
        """
        if not self.parameters:
            raise OptionError(
                f"the module has no weights, but load_state_dict gives them [{FUNCTION}]"
            )
        check_arrays(FUNCTION, **dict(zip(("query", "key", "value"), arrays, strict=True)))
        own = self.parameters.get
        query, key, value = (self._turned(a) if arrays[0].ndim == 3 else a for a in arrays)
        return Call(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            own("in_proj_weight"),
            own("in_proj_bias"),
            own("bias_k"),
            own("bias_v"),
            self.add_zero_attn,
            self.dropout,
            self.parameters["out_proj.weight"],
            own("out_proj.bias"),
            self.training,
            masks["key_padding_mask"],
            need_weights,
            masks["attn_mask"],
            not self._is_packed(),
            own("q_proj_weight"),
            own("k_proj_weight"),
            own("v_proj_weight"),
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            keep=keep,
        )
