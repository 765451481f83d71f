"""A picture of a run: the speed of every subject on every shape, below the machine's peak."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from refattn.bench.subjects import OURS
from refattn.checks import OptionError

SUFFIXES = (".svg", ".png")
"""Kinds of picture."""

COLOURS = {
    OURS: "#0b4f8a",
    "torch": "#e69f00",
    "onnxruntime": "#56b4a0",
    "openvino": "#b07cc6",
    "jax": "#c9706b",
    "numpy": "#a8a8a8",
}
"""Ours stands out; the others can be told apart in grey, too, by their order."""

BAR = 0.145
"""Height of a bar, inches: a line of its small print fits."""

SIDE, DIGIT, MARGIN = 3.4, 0.075, 1.6
"""Widths, inches: of a panel, of a digit of the shapes' names at its left, and of the ratios at its
right."""

HEAD, LINE, FOOT = 1.05, 0.19, 0.5
"""Heights, inches: of the title and a panel's, of a line of the legend, and below the bars."""


def check_figure(path: Path) -> None:
    """Refuse, before anything is timed, a picture that could not be drawn at the end.

    Raises:
        OptionError: its name ends in no kind of picture, or it cannot be written.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise OptionError(f"plot is {path.name}, but its name must end in .svg or .png [bench]")
    importlib.import_module("matplotlib")
    new = not path.exists()
    try:
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise OptionError(
            f"plot is {path}, but that cannot be written: {error.strerror} [bench]"
        ) from error


def draw_figure(data: dict[str, Any], path: Path) -> None:
    """Write the picture of a run."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "refattn"}):  # the same bytes for the same run
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        make_figure(data).savefig(path, dpi=150, metadata=metadata)


def make_figure(data: dict[str, Any]) -> Any:
    """Return the picture of a run: a panel a mask, a group of bars a shape."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    masks = list(dict.fromkeys(row["mask"] for row in data["rows"]))
    groups = [_groups(data, mask) for mask in masks]
    pitch = _pitch(data) * BAR
    columns = 2 * len(masks)
    head = HEAD + LINE * math.ceil((len(data["subjects"]) + 2) / columns)
    names = 0.2 + DIGIT * max(len(row["shape"]) for row in data["rows"])
    share = names + SIDE + MARGIN
    width = len(masks) * share
    height = head + max(map(len, groups)) * pitch + FOOT
    with mpl.rc_context({"font.size": 8.5}):
        figure = Figure(figsize=(width, height))
        for i, (mask, rows) in enumerate(zip(masks, groups, strict=True)):
            left, tall = i * share + names, len(rows) * pitch
            place = (left / width, (height - head - tall) / height, SIDE / width, tall / height)
            _draw_panel(figure.add_axes(place), mask, rows, data)
        _draw_head(figure, data, columns)
    return figure


def _pitch(data: dict[str, Any]) -> float:
    """Return the height of a shape's bars and of the space below them, in bars."""
    return len(data["subjects"]) + 1.5


def _groups(data: dict[str, Any], mask: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of a mask by their shape."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if row["mask"] == mask:
            found.setdefault(row["shape"], []).append(row)
    return found


def _draw_panel(axes: Any, mask: str, groups: dict[str, Any], data: dict[str, Any]) -> None:
    """Draw the bars of one mask, and beside each shape how much longer the fastest peer takes."""
    pitch = _pitch(data)
    beside = {row["shape"]: row for row in data["fastest"] if row["mask"] == mask}
    for i, (shape, rows) in enumerate(groups.items()):
        for j, row in enumerate(rows):
            _draw_bar(axes, i * pitch + j, row)
        middle = i * pitch + (len(rows) - 1) / 2
        axes.text(-0.02, middle, shape, transform=_sideways(axes), ha="right", va="center")
        if shape in beside:
            words = f"{beside[shape]['ratio']:.2f}× {beside[shape]['subject']}"
            axes.text(1.02, middle, words, transform=_sideways(axes), va="center", weight="bold")
    axes.axvline(data["peak_gflops"], color="black", lw=1.2, ls="--", zorder=3)
    if data["product_gflops"] is not None:
        axes.axvline(data["product_gflops"], color="black", lw=1.2, ls=":", zorder=3)
    speeds = [row["gflops"] or 0 for rows in groups.values() for row in rows]
    axes.set_xlim(0, 1.03 * max(data["peak_gflops"], *speeds))
    axes.set_ylim(len(groups) * pitch - 1.25, -1.25)
    axes.set_yticks([])
    axes.set_xlabel("GFLOP/s")
    axes.grid(axis="x", color="#e4e4e4", zorder=0)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_title(mask, weight="bold", fontsize=10)
    axes.text(1.02, -1.25, "fastest peer's\ntime / ours", transform=_sideways(axes),
              va="bottom", fontsize=7.5, color="#444444")  # fmt: skip


def _draw_bar(axes: Any, place: float, row: dict[str, Any]) -> None:
    """Draw the bar of one subject, or say that it was not run."""
    if row["gflops"] is None:
        words = f" {row['subject']}: not run"
        axes.text(0, place, words, va="center", fontsize=6, color="#777777", zorder=4)
        return
    axes.barh(place, row["gflops"], height=0.9, color=COLOURS[row["subject"]], zorder=2)


def _sideways(axes: Any) -> Any:
    """Return coordinates with x in shares of the panel's width and y in bars."""
    return axes.get_yaxis_transform()


def _draw_head(figure: Any, data: dict[str, Any], columns: int) -> None:
    """Draw the title, the machine and the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    left = 0.12 / width
    work = "forward and backward" if data["backward"] else "forward"
    title = f"Attention, {work}, {data['dtype']}, {data['threads']} threads"
    figure.text(left, 1 - 0.12 / height, title, va="top", fontsize=12, weight="bold")
    machine = f"{data['processor']}; shapes are batch,heads,length,features"
    figure.text(left, 1 - 0.36 / height, machine, va="top", color="#444444")
    names = {name: f"{name} {data['versions'][name]}" for name in data["subjects"]}
    names[OURS] = f"refattn {data['versions']['refattn']} ({OURS})"
    handles: list[Any] = [Patch(color=COLOURS[name], label=names[name]) for name in names]
    peak = f"peak of multiply-adds ({data['peak_gflops']:.0f})"
    handles.append(Line2D([], [], color="black", lw=1.2, ls="--", label=peak))
    if data["product_gflops"] is not None:
        product = f"NumPy's matrix product ({data['product_gflops']:.0f})"
        handles.append(Line2D([], [], color="black", lw=1.2, ls=":", label=product))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 1 - 0.52 / height), frameon=False,
        ncols=columns, fontsize=8,
    )  # fmt: skip
