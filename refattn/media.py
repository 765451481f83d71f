"""Which media a token of text may attend to: positions of media in a text, and the mask of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from refattn.arrays import Array, array_namespace, dtype_name
from refattn.checks import (
    DtypeError,
    ShapeError,
    check_arrays,
    check_flag,
    check_option,
    check_shapes,
    describe,
)

ATTENDS = ("immediate", "preceding")
"""Whether a token sees the last medium before it, or all media before it."""

BEFORE_MEDIA = ("zero", "uniform", "everything")
"""What a token before any medium reads (OWN-MEDIA1); the last two leak media that come later."""


class MediaMask(NamedTuple):
    """Cells that may be attended, and the rows of the text that no medium precedes."""

    allowed: Array
    """(b, 1, n, m·n_m), bool."""
    before: Array
    """(b, n), bool."""


def text_time(media_locations: Array, rows: int, *, cached_media: bool = False) -> Array:
    """Return how many media stand in the text up to each token, its own position included.

    Spec: FLA-S23, OWN-MEDIA2.

        φ(l) = Σ_{l' ≤ l} marker(l'),   or with cached media  φ(l) = Σ_l' marker(l')

    Args:
        media_locations: (b, n) bool, True where a medium stands; with cached media (b, any).
        rows: n, tokens of the text.
        cached_media: the media stand in an earlier part of the text, which markers describe.

    Returns:
        φ (b, n), integers, media.
    """
    xp = array_namespace(media_locations)
    markers = xp.astype(media_locations, xp.int64)
    if cached_media:
        total = xp.sum(markers, axis=-1, keepdims=True)
        return xp.broadcast_to(total, (media_locations.shape[0], rows))
    return xp.cumulative_sum(markers, axis=-1)


def media_mask(
    function: str,
    query_input: Array,
    media: Array,
    media_locations: Array | None,
    *,
    attend: str,
    before_media: str,
    cached_media: bool,
) -> MediaMask:
    """Return which tokens of which media each token of the text may attend to.

    Spec: FLA-S23, OWN-MEDIA1, OWN-MEDIA2.

        immediate: φ(l) = t    preceding: φ(l) ≥ t,    t = 1..m the media in order

    Args:
        function: whose arguments these are.
        query_input: (b, n, e), the text.
        media: (b, m, n_m, e_m).
        media_locations: (b, n) bool; None lets every token see every medium.
        attend: one of `ATTENDS`.
        before_media: one of `BEFORE_MEDIA`.
        cached_media: see `text_time`.

    Returns:
        allowed (b, 1, n, m·n_m) and before (b, n).

    Raises:
        ShapeError: shapes do not fit, or an item marks more media than it has.
        DtypeError: media_locations is not bool.
        OptionError: a name is unknown.
    """
    check_option(function, "attend", attend, ATTENDS)
    check_option(function, "before_media", before_media, BEFORE_MEDIA)
    check_flag(function, cached_media=cached_media)
    xp = array_namespace(query_input)
    b, n, _ = query_input.shape
    m, n_m = media.shape[1:3]
    if media_locations is None:
        allowed = xp.ones((b, 1, n, m * n_m), dtype=xp.bool)
        return MediaMask(allowed, xp.zeros((b, n), dtype=xp.bool))
    _check_locations(function, query_input, media, media_locations, cached_media)
    phi = text_time(media_locations, n, cached_media=cached_media)
    order = xp.arange(1, m + 1)
    seen = phi[:, :, None] == order if attend == "immediate" else phi[:, :, None] >= order
    before = phi == 0
    if before_media == "everything":
        seen = seen | before[:, :, None]
    # the tokens of one medium stand side by side: (b, n, m) -> (b, n, m, n_m) -> (b, 1, n, m·n_m)
    allowed = xp.reshape(xp.broadcast_to(seen[..., None], (b, n, m, n_m)), (b, 1, n, m * n_m))
    return MediaMask(allowed, before)


def _check_locations(
    function: str, query_input: Array, media: Array, media_locations: Array, cached_media: bool
) -> None:
    check_arrays(function, query_input=query_input, media_locations=media_locations)
    arrays: dict[str, Any] = {"query_input": query_input, "media": media}
    arrays["media_locations"] = media_locations
    if dtype_name(media_locations) not in ("bool", "bool_"):
        raise DtypeError(
            f"media_locations has dtype {media_locations.dtype}, but it must be bool, True = a "
            f"medium stands here {describe(function, arrays)}"
        )
    check_shapes(
        function,
        query_input=(query_input, "b n e"),
        media_locations=(media_locations, "b n_marks" if cached_media else "b n"),
    )
    xp = array_namespace(media_locations)
    marked = xp.sum(xp.astype(media_locations, xp.int64), axis=-1)
    most = int(xp.max(marked)) if marked.shape[0] else 0
    if most > media.shape[1]:
        raise ShapeError(
            f"media_locations marks {most} media in one item, but media has {media.shape[1]}; the "
            f"first must be at most the second {describe(function, arrays)}"
        )
