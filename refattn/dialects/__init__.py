"""Other systems' attention by name and version, each stated in a few lines over the clauses."""

from __future__ import annotations

from refattn.checks import OptionError, shown
from refattn.dialects import (
    jax_dpa,
    keras2_mha,
    keras3_gqa,
    keras3_mha,
    onnx_attention,
    onnx_releases,
    torch_mha,
    torch_sdpa,
)
from refattn.dialects.conventions import Dialect

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        torch_sdpa.DIALECT,
        torch_mha.DIALECT,
        jax_dpa.DIALECT,
        *onnx_attention.DIALECTS,
        *onnx_releases.DIALECTS,
        keras3_mha.DIALECT,
        keras3_gqa.DIALECT,
        keras2_mha.DIALECT,
    )
}
"""Every dialect by its full name; its alias names it, too."""


def find(name: str) -> Dialect:
    """Return the dialect of a name or an alias.

    Raises:
        OptionError: there is none.
    """
    by_alias = {dialect.alias: dialect for dialect in DIALECTS.values()}
    found = DIALECTS.get(name) or by_alias.get(name)
    if found is None:
        raise OptionError(
            f"dialect is {shown(name)}, but it must be one of "
            f"{', '.join([*DIALECTS, *by_alias])} [dialects]"
        )
    return found
