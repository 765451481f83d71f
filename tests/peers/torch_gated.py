"""Gated cross-attention in torch, a text of our own: one token and one head after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from optional import require

torch = require("torch")
functional = torch.nn.functional


def media_of(marks: np.ndarray, row: int, count: int, attend: str, cached: bool) -> list[int]:
    """Return which media, counted from 0, stand where a row of the text may see them."""
    passed = int(marks.sum() if cached else marks[: row + 1].sum())
    return [m for m in range(count) if (m + 1 == passed if attend == "immediate" else m < passed)]


def run_block(
    text: Any,
    media: Any,
    p: dict[str, Any],
    *,
    media_locations: np.ndarray,
    attend: str = "immediate",
    before_media: str = "zero",
    cached_media: bool = False,
    activation: str = "squared_relu",
    norm_epsilon: float = 1e-5,
) -> Any:
    """Return the block's output for tensors; every parameter under our name and in our shape."""

    def norm(x: Any, name: str) -> Any:
        weight, bias = p[f"{name}_weight"], p[f"{name}_bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias, norm_epsilon)

    if "media_norm_weight" in p:
        media = norm(media, "media_norm")
    normed, items = norm(text, "norm"), []
    for b, marks in enumerate(media_locations):
        rows = []
        for i in range(text.shape[1]):
            seen = media_of(marks, i, media.shape[1], attend, cached_media)
            passed = marks.sum() if cached_media else marks[: i + 1].sum()
            row = attend_row(normed[b, i], media[b], p, seen, before_media)
            row = text[b, i] + torch.tanh(p["attention_gate"]) * row
            fed = norm(row, "feed_forward_norm") @ p["w_up"]
            fed = functional.gelu(fed) if activation == "gelu" else functional.relu(fed).square()
            open_ = not (before_media == "everything" and passed == 0)
            rows.append(row + open_ * torch.tanh(p["feed_forward_gate"]) * (fed @ p["w_down"]))
        items.append(torch.stack(rows))
    return torch.stack(items)


def attend_row(row: Any, media: Any, p: dict[str, Any], seen: list[int], before_media: str) -> Any:
    """Return what one token of the text reads of the media of its item."""
    if not seen and before_media == "zero":
        return torch.zeros_like(row)
    whole = range(media.shape[0])
    tokens = torch.cat([media[m] for m in (seen or whole)])
    total = torch.zeros_like(row)
    for w_q, w_k, w_v, w_o in zip(*(p[f"w_{n}"] for n in WEIGHTS), strict=True):
        scores = (tokens @ w_k) @ (row @ w_q) / w_q.shape[-1] ** 0.5
        if not seen and before_media == "uniform":
            scores = torch.zeros_like(scores)
        total = total + torch.softmax(scores, dim=0) @ (tokens @ w_v) @ w_o
    return total


WEIGHTS = ("query", "key", "value", "output")
