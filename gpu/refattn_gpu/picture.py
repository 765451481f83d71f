"""The picture of the tiles in gpu/README.md, drawn from the shapes that the kernels are made with.

python -m refattn_gpu.picture FILE.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from refattn_gpu.numba_cuda.shapes import RowShape, TileShape, row_shape, tile_shape

FEATURES, DTYPE, ITEMSIZE = 64, "float32", 4
"""The kernels that are drawn."""

CELL = 3.0
"""Points of a cell."""

GAP = 26.0
"""Points between two matrices."""

THREAD = 19
"""The thread that is shown, of its block."""

INK, PALE, OURS, MINE, READ = "#333333", "#f2f2f2", "#b9d4ee", "#d9622b", "#f3c9b0"
"""Lines and words; tiles that are read, and computed; what a thread computes, and reads for it."""


class Box(NamedTuple):
    """A rectangle, in points."""

    x: float
    y: float
    width: float
    height: float


def picture() -> str:
    """Return the picture as SVG: one thread a query row above, register tiles below."""
    rows, tiles = row_shape(FEATURES, ITEMSIZE), tile_shape(FEATURES, DTYPE)
    if tiles is None:
        raise ValueError(f"there are no register tiles of {DTYPE} for {FEATURES} features")
    upper = _panel(
        30.0,
        (rows.rows, rows.cols),
        f"rows: one thread a query row, {rows.rows} threads a block",
        _row_parts(rows),
        (
            f"thread {THREAD} computes its row, dark, from what is light: a row of Q_i, and all",
            "of K_j and V_j, which lie in shared memory; the rest is its own",
        ),
    )
    lower = _panel(
        30.0 + _height((rows.rows, rows.cols)),
        (tiles.rows, tiles.cols),
        f"tiles: {tiles.rows_each} x {tiles.cols_each} cells of S_ij and {tiles.rows_each} x "
        f"{tiles.features_each} of O_i a thread, {tiles.threads} threads a block",
        _tile_parts(tiles),
        (
            f"thread {THREAD} computes the dark cells, in registers, from the light ones;",
            f"Q_i, K_j, V_j are shared; the {tiles.lanes} threads of a row share its maximum too",
        ),
    )
    height = 30.0 + _height((rows.rows, rows.cols)) + _height((tiles.rows, tiles.cols))
    width = 2 * FEATURES * CELL + 5 * GAP + max(rows.cols, tiles.cols) * CELL
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="sans-serif" font-size="10" fill="{INK}">'
    )
    ground = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    return "\n".join([head, ground, *upper, *lower, "</svg>"]) + "\n"


def _height(tile: tuple[int, int]) -> float:
    """Return the points that a panel takes from top to bottom."""
    return FEATURES * CELL + tile[0] * CELL + 4 * GAP + 20


def _row_parts(shape: RowShape) -> dict[str, Box]:
    """Return what a thread has of S_ij and O_i, and what it reads, in cells."""
    row, d, B_c = float(THREAD), shape.features, shape.cols
    own = {"S_ij": Box(0, row, B_c, 1), "O_i": Box(0, row, d, 1), "Q_i": Box(0, row, d, 1)}
    return own | {"K_j": Box(0, 0, B_c, d), "V_j": Box(0, 0, d, B_c)}


def _tile_parts(shape: TileShape) -> dict[str, Box]:
    lane, row = THREAD % shape.lanes, float(THREAD // shape.lanes * shape.rows_each)
    d, rows, cols, wide = shape.features, shape.rows_each, shape.cols_each, shape.features_each
    own = {"S_ij": Box(lane * cols, row, cols, rows), "O_i": Box(lane * wide, row, wide, rows)}
    return own | {
        "Q_i": Box(0, row, d, rows),
        "K_j": Box(lane * cols, 0, cols, d),
        "V_j": Box(lane * wide, 0, wide, shape.cols),
    }


def _panel(
    top: float,
    tile: tuple[int, int],
    title: str,
    parts: dict[str, Box],
    below: tuple[str, str],
) -> list[str]:
    """Return one form: Q_i beside S_ij and O_i, K_j above S_ij, V_j above O_i."""
    B_r, B_c = tile
    d, left = FEATURES * CELL, GAP
    middle, right = left + d + GAP, left + d + 2 * GAP + B_c * CELL
    line = top + d + 2 * GAP  # where Q_i, S_ij and O_i begin
    Q_i = Box(left, line, d, B_r * CELL)
    K_j = Box(middle, top + GAP, B_c * CELL, d)
    S_ij = Box(middle, line, B_c * CELL, B_r * CELL)
    V_j = Box(right, top + GAP + d - B_c * CELL, d, B_c * CELL)
    O_i = Box(right, line, d, B_r * CELL)
    drawn = [_words(left, top + 4, title, bold=True)]
    for name, box, size in (
        ("Q_i", Q_i, f"{B_r} x {FEATURES}"),
        ("K_j", K_j, f"transposed, {FEATURES} x {B_c}"),
        ("S_ij", S_ij, f"{B_r} x {B_c}"),
        ("V_j", V_j, f"{B_c} x {FEATURES}"),
        ("O_i", O_i, f"{B_r} x {FEATURES}"),
    ):
        computed = name in ("S_ij", "O_i")
        drawn += [
            _rect(box, OURS if computed else PALE),
            _words(box.x, box.y - 4, f"{name}  {size}"),
        ]
        drawn.append(_rect(_inside(box, parts[name]), MINE if computed else READ))
    drawn.append(_arrow(right, K_j.y + 14, d / 2))
    drawn.append(_words(right, K_j.y + 8, "line 5: the next K_j and V_j"))
    bottom = line + B_r * CELL + 14
    return drawn + [_words(left, bottom + 12 * i, text) for i, text in enumerate(below)]


def _inside(box: Box, part: Box) -> Box:
    """Return a part, in cells, as points within the box of its matrix."""
    return Box(box.x + part.x * CELL, box.y + part.y * CELL, part.width * CELL, part.height * CELL)


def _rect(box: Box, fill: str) -> str:
    x, y, width, height = box
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
        f'stroke="{INK}" stroke-width="0.5"/>'
    )


def _words(x: float, y: float, text: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}"{weight}>{text}</text>'


def _arrow(x: float, y: float, length: float) -> str:
    end = x + length
    return (
        f'<path d="M {x:g} {y:g} H {end:g} m -5 -3 l 5 3 l -5 3" fill="none" stroke="{INK}" '
        f'stroke-width="1"/>'
    )


def main(words: list[str] | None = None) -> int:
    """Write the picture to a file."""
    parser = argparse.ArgumentParser(prog="python -m refattn_gpu.picture")
    parser.add_argument("file", type=Path)
    parser.parse_args(words).file.write_text(picture(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
