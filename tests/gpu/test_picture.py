"""The picture of the tiles shows the kernels that there are."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from refattn_gpu import picture
from refattn_gpu.numba_cuda.shapes import tile_shape

GPU = Path(__file__).parents[2] / "gpu"


def test_the_picture_is_fresh() -> None:
    stored = (GPU / "tiles.svg").read_text("utf-8")
    assert stored == picture.picture(), "stale: run python -m refattn_gpu.picture gpu/tiles.svg"


def test_the_readme_shows_it() -> None:
    assert "(tiles.svg)" in (GPU / "README.md").read_text("utf-8")


def test_everything_is_drawn_within_the_picture() -> None:
    root = ElementTree.fromstring(picture.picture())
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    boxes = [box.attrib for box in root if box.tag.endswith("rect")]
    assert len(boxes) == 1 + 2 * 10
    for box in boxes:
        assert 0 <= float(box.get("x", 0)) <= float(box.get("x", 0)) + float(box["width"]) <= width
        assert (
            0 <= float(box.get("y", 0)) <= float(box.get("y", 0)) + float(box["height"]) <= height
        )
    for text in (node for node in root if node.tag.endswith("text")):
        assert float(text.attrib["y"]) < height
        assert float(text.attrib["x"]) + 5.6 * len(text.text or "") < width


def test_a_change_of_the_tiles_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = picture.picture()
    other = tile_shape(32, "float32")
    monkeypatch.setattr(picture, "tile_shape", lambda features, dtype: other)
    assert picture.picture() != before
