"""The reference for attention: every equation numbered, every value proven.

The names below are the public functions, flat. Three of them (`attention`, `merge`, `rope`) are
called as their modules are; `from refattn.attention import ...` still reaches the module.
"""

from refattn.alibi import alibi_bias, alibi_bias_backward, alibi_slopes
from refattn.attention import (
    AttentionResult,
    attention,
    attention_weights,
    scaled_dot_product_attention,
)
from refattn.attention_backward import AttentionGradients, attention_backward
from refattn.cache import Cache, cached_attention
from refattn.causal_module import causal_self_attention
from refattn.causal_module_backward import causal_self_attention_backward
from refattn.dropout import keep_mask
from refattn.errors import RefattnError
from refattn.flash import block_sizes, flash_attention, flash_attention_forward, tile_states
from refattn.flash_backward import flash_attention_backward
from refattn.gated import GatedParameters, gated_cross_attention
from refattn.gated_backward import gated_cross_attention_backward
from refattn.heads import head_importance
from refattn.masks import causal_mask
from refattn.merge import merge, merge_states
from refattn.multihead import multihead_attention
from refattn.multihead_backward import multihead_attention_backward
from refattn.options import AttentionOptions
from refattn.projections import merge_heads, split_heads
from refattn.pruning import prune_heads, pruning_order
from refattn.rope import rope, rope_backward
from refattn.rope_decay import rope_decay
from refattn.rope_tables import rope_tables
from refattn.scores import score
from refattn.scores_backward import score_backward
from refattn.standard import standard_attention, standard_attention_backward
from refattn.traffic import hbm_traffic

__all__ = [
    "AttentionGradients",
    "AttentionOptions",
    "AttentionResult",
    "Cache",
    "GatedParameters",
    "RefattnError",
    "alibi_bias",
    "alibi_bias_backward",
    "alibi_slopes",
    "attention",
    "attention_backward",
    "attention_weights",
    "block_sizes",
    "cached_attention",
    "causal_mask",
    "causal_self_attention",
    "causal_self_attention_backward",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_forward",
    "gated_cross_attention",
    "gated_cross_attention_backward",
    "hbm_traffic",
    "head_importance",
    "keep_mask",
    "merge",
    "merge_heads",
    "merge_states",
    "multihead_attention",
    "multihead_attention_backward",
    "prune_heads",
    "pruning_order",
    "rope",
    "rope_backward",
    "rope_decay",
    "rope_tables",
    "scaled_dot_product_attention",
    "score",
    "score_backward",
    "split_heads",
    "standard_attention",
    "standard_attention_backward",
    "tile_states",
]
