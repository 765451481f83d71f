"""The picture of a run: it says what the table says, and no words lie over others."""

from __future__ import annotations

from typing import Any

import pytest

from optional import require

require("numba")
require("matplotlib")
from matplotlib.text import Text  # noqa: E402

from refattn.bench import figure  # noqa: E402

SUBJECTS = ("numba", "numpy", "torch", "onnxruntime", "openvino", "jax")


def made_up(shapes: int, masks: tuple[str, ...]) -> dict[str, Any]:
    """Return a run of which nothing was measured; the last subject never takes part."""
    rows, fastest = [], []
    for mask in masks:
        for i in range(shapes):
            about = {"shape": f"{i + 1},16,{100 * i + 8}:4096,128", "mask": mask}
            speeds = [400.0 / (i + j + 1) for j in range(len(SUBJECTS) - 1)]
            rows += [
                about | {"subject": name, "gflops": speed}
                for name, speed in zip(SUBJECTS, [*speeds, None], strict=True)
            ]
            fastest.append(about | {"subject": "onnxruntime", "ratio": 12.345})
    return {
        "rows": rows, "fastest": fastest, "subjects": list(SUBJECTS), "backward": False,
        "dtype": "float32", "threads": 2, "processor": "A processor of that name",
        "versions": dict.fromkeys(("refattn", *SUBJECTS), "2026.10.1"),
        "peak_gflops": 450.0, "product_gflops": 400.0,
    }  # fmt: skip


@pytest.mark.parametrize("shapes", [1, 3, 10])
@pytest.mark.parametrize("masks", [("full",), ("full", "causal")])
def test_no_words_lie_over_others_or_outside_the_picture(shapes, masks):
    picture = figure.make_figure(made_up(shapes, masks))
    picture.draw_without_rendering()
    page = picture.bbox
    texts = [text for text in picture.findobj(Text) if text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible()]
    assert len(boxes) > shapes * len(masks) * 2
    for i, (words, box) in enumerate(boxes):
        inside = box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1
        assert inside, words
        for others, other in boxes[:i]:
            assert not box.overlaps(other), (words, others)


def test_every_bar_is_as_long_as_its_speed_and_an_absent_one_says_so():
    data = made_up(3, ("full",))
    axes = figure.make_figure(data).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [
        row["gflops"] for row in data["rows"] if row["gflops"] is not None
    ]
    said = [text.get_text().strip() for text in axes.texts]
    assert said.count("jax: not run") == 3 and said.count("12.35× onnxruntime") == 3


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_run_gives_the_same_bytes(suffix, tmp_path):
    paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        figure.draw_figure(made_up(2, ("full", "causal")), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_looking_whether_a_picture_can_be_written_leaves_what_is_there(tmp_path):
    path = tmp_path / "a.svg"
    figure.check_figure(path)
    assert not path.exists()
    path.write_text("before")
    figure.check_figure(path)
    assert path.read_text() == "before"
