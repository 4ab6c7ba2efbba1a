"""The figures: colours by formula, layout by geometry, files by their bytes."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from conftest import TinyDataset
from drs_lib import plots
from drs_lib.data import MaskAccessError, without_masks
from drs_lib.data.voc import voc_palette
from drs_lib.experiments import run_tables
from drs_lib.paper import Configuration
from drs_lib.pipeline import Pipeline, Splits, get_budget
from drs_lib.store import RunStore

CLASSES = ("ant", "bee", "cow")
RNG = np.random.default_rng(0)


def image(height=40, width=56):
    return RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)


def heat(height=40, width=56):
    return RNG.random((height, width)).astype(np.float32)


def label_map(height=40, width=56, classes=3):
    return RNG.choice([*range(classes + 1), 255], (height, width)).astype(np.uint8)


def drawn(figure):
    """The figure as (H, W, 3) pixels."""
    return np.asarray(Image.open(io.BytesIO(plots._png(figure, 100))).convert("RGB"))


def visible_text(figure):
    return {t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text") and a.get_visible())} - {""}


def renderer_of(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def assert_nothing_is_cut_or_covered(figure):
    renderer = renderer_of(figure)
    width, height = figure.canvas.get_width_height()
    boxes = [ax.get_tightbbox(renderer) for ax in figure.axes]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    for box in boxes:
        assert box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            # One pixel: labels of a colour bar and titles are measured with their side bearings.
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 1 or down <= 1, (box, other)


def test_label_colors():
    few, voc = plots.label_colors(6), plots.label_colors(20)
    assert few.shape == voc.shape == (256, 3) and few.dtype == voc.dtype == np.uint8
    np.testing.assert_array_equal(voc, voc_palette())
    used = few[[0, 1, 2, 3, 4, 5, 6, 255]].astype(int)
    assert len(np.unique(used, axis=0)) == 8
    np.testing.assert_array_equal(few[1], (0xE6, 0x9F, 0x00))
    # As a deuteranope sees them (Viénot, Brettel and Mollon 1999, linear RGB), they still differ.
    linear = (used / 255) ** 2.2
    seen = linear @ np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]).T
    distances = np.abs(seen[:, None] - seen[None]).max(-1) + np.eye(8)
    assert distances.min() > 0.05


def test_overlay_blends_by_the_formula():
    picture, values = image(3, 5), heat(3, 5) * 1.4 - 0.2
    colors = plots.matplotlib.colormaps["inferno"](values.clip(0, 1).astype(np.float64), bytes=False)[..., :3]
    expected = 0.3 * picture + 0.7 * 255 * colors
    # Both tables have 256 entries; a value between two may go to either.
    assert np.abs(plots.overlay(picture, values, 0.7) - expected).max() < 4
    np.testing.assert_array_equal(plots.overlay(picture, values, 0), picture)
    channels_first = torch.from_numpy(picture).permute(2, 0, 1)
    np.testing.assert_array_equal(
        plots.overlay(channels_first, torch.from_numpy(values)), plots.overlay(picture, values)
    )


def test_map_colors_are_monotone_in_lightness():
    lut = plots._colored(np.linspace(0, 1, 256))
    lightness = (lut / 255) ** 2.2 @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) > -1e-3).all() and lightness[-1] - lightness[0] > 0.8


def test_overlay_labels_leaves_the_background_alone():
    picture, labels = image(), label_map()
    result = plots.overlay_labels(picture, labels, 3, strength=1)
    np.testing.assert_array_equal(result[labels == 0], picture[labels == 0])
    np.testing.assert_array_equal(result[labels > 0], plots.label_colors(3)[labels[labels > 0]])


def test_layer_mean_is_figure_5s_scaling():
    features = RNG.normal(size=(7, 5, 6))
    mean = features.mean(0)
    expected = (mean - mean.min()) / (mean.max() - mean.min())
    np.testing.assert_allclose(plots.layer_mean(torch.from_numpy(features)), expected, rtol=1e-12)
    np.testing.assert_array_equal(plots.layer_mean(np.ones((2, 3, 3))), np.zeros((3, 3)))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: plots.overlay(image(4, 4), heat(4, 5)), "4x5 and its image 4x4"),
        (lambda: plots.overlay(image(4, 4), np.full((4, 4), np.nan)), "diverged"),
        (lambda: plots.overlay(image(4, 4) / 255, heat(4, 4)), "uint8"),
        (lambda: plots.overlay(image(4, 4), heat(4, 4)[None]), "one class of one image"),
        (lambda: plots.overlay(image(4, 4), heat(4, 4), 1.5), "between 0"),
        (lambda: plots.overlay_labels(image(4, 4), np.full((4, 4), 9, np.uint8), 3), "1..3"),
        (lambda: plots.overlay_labels(image(4, 4), np.zeros((4, 4)), 3), "uint8"),
        (lambda: plots.layer_mean(np.zeros((3, 3))), "channels"),
        (lambda: plots.layer_mean(np.full((2, 3, 3), np.inf)), "diverged"),
        (lambda: plots.figure5(image(), [heat()[None]], []), "same layers"),
        (lambda: plots.figure1([], [], [], []), "nothing to draw"),
        (lambda: plots.table1_curve(pd.DataFrame({"configuration": []})), "not Table 1"),
    ],
)
def test_bad_input_is_refused_in_words(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_show_samples_on_a_data_set(tiny_dataset):
    figure = plots.show_samples(tiny_dataset, [0, 3, 5])
    assert len(figure.axes) == 9
    text = visible_text(figure)
    assert {"image", "saliency", "truth", "background"} <= text
    np.testing.assert_array_equal(
        figure.axes[7].images[0].get_array(), plots.label_colors(3)[tiny_dataset.mask(3)]
    )
    assert_nothing_is_cut_or_covered(figure)
    hidden = without_masks(tiny_dataset)
    with pytest.raises(MaskAccessError):
        plots.show_samples(hidden, [0])
    assert len(plots.show_samples(hidden, [0, 1], masks=False).axes) == 4


SIZES = [(40, 56), (61, 37), (33, 33)]


@pytest.mark.parametrize(
    ("figure", "panels"),
    [
        (
            lambda: plots.figure1(
                [image(*s) for s in SIZES],
                *[[heat(*s) for s in SIZES]] * 3,
                ["diningtable", "ant", "pottedplant"],
            ),
            12,
        ),
        (
            lambda: plots.figure4(
                image(61, 37), {f"δ = {d:.2f}": heat(61, 37) for d in np.linspace(0.4, 0.9, 8)}
            ),
            9,
        ),
        (
            lambda: plots.figure5(
                image(), *[[RNG.random((3, s, s + 1)) for s in (40, 20, 11, 5, 2, 1)] for _ in range(2)]
            ),
            13,
        ),
        (
            lambda: plots.figure6([image(*s) for s in SIZES], *[[label_map(*s) for s in SIZES]] * 3, CLASSES),
            12,
        ),
        (
            lambda: plots.figure6(
                [image(*s) for s in SIZES],
                *[[label_map(*s, classes=20) for s in SIZES]] * 3,
                [f"pottedplant{i:02d}" for i in range(20)],
            ),
            12,
        ),
    ],
    ids=["figure1", "figure4", "figure5", "figure6", "figure6-voc"],
)
def test_grids_show_every_panel_and_cut_nothing(figure, panels):
    figure = figure()
    with_picture = [ax for ax in figure.axes if ax.images]
    assert len(with_picture) == panels
    for ax in with_picture:
        height, width = ax.images[0].get_array().shape[:2]
        box = ax.get_position(original=True)  # the place that the picture has to fit into, whole
        assert (
            box.height * figure.get_figheight() > 0.999 * box.width * figure.get_figwidth() * height / width
        )
    assert figure.get_figwidth() <= plots.WIDTH + 1e-6
    assert_nothing_is_cut_or_covered(figure)


def test_figure1_puts_the_maps_in_the_papers_order():
    pictures = [image(), image()]
    cam, drs, refined = ([heat(), heat()] for _ in range(3))
    figure = plots.figure1(pictures, cam, drs, refined, ["ant", "bee"])
    panels = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "CAM", "DRS", "DRS†"]
    for row in range(2):
        np.testing.assert_array_equal(panels[4 * row], pictures[row])
        for column, maps in enumerate((cam, drs, refined), 1):
            np.testing.assert_array_equal(panels[4 * row + column], plots.overlay(pictures[row], maps[row]))


def table1(sd=0.8, shift=2.0):
    deltas = [np.nan, 0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4]
    paper = [62.9, 51.9, 56.0, 58.7, 62.3, 62.8, 62.3, 59.6]
    table = pd.DataFrame({"delta": deltas, "paper": paper, "measured": np.add(paper, shift), "sd": sd})
    table.attrs["data"] = "critters"
    return table


@pytest.mark.parametrize("shift", [2.0, 0.05, -20.0])
def test_table1_curve(shift):
    figure = plots.table1_curve(table1(shift=shift))
    (ax,) = figure.axes
    curves = [line for line in ax.get_lines() if line.get_marker() in ("o", "s")]
    for curve, column in zip(curves, ("paper", "measured"), strict=True):
        expected = table1(shift=shift).dropna(subset="delta").sort_values("delta")
        np.testing.assert_allclose(curve.get_xdata(orig=False), expected["delta"])
        np.testing.assert_allclose(curve.get_ydata(orig=False), expected[column])
    renderer = renderer_of(figure)
    labels = [t for t in ax.texts if t.get_text()]
    assert sorted(t.get_text() for t in labels) == [
        "measured (Critters): constant δ",
        "measured (Critters): learnable",
        "the paper (VOC): constant δ",
        "the paper (VOC): learnable",
    ]
    boxes = sorted((t.get_window_extent(renderer) for t in labels), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    assert all(box.x0 > ax.get_window_extent().x1 for box in boxes)  # beside the data, not over them
    assert_nothing_is_cut_or_covered(figure)


def test_table1_curve_of_one_seed_has_no_bars():
    figure = plots.table1_curve(table1(sd=np.nan))
    assert not [c for c in figure.axes[0].collections if len(c.get_paths())]


def test_save_figure_is_reproducible_small_and_atomic(tmp_path, monkeypatch):
    def figure():
        rng = np.random.default_rng(1)
        return plots.figure4(
            rng.integers(0, 256, (200, 200, 3)).astype(np.uint8), {"learnable": rng.random((200, 200))}
        )

    path = plots.save_figure(figure(), tmp_path / "new" / "a.png", 60)
    assert path.read_bytes() == plots.save_figure(figure(), tmp_path / "b.png", 60).read_bytes()
    plain = len(path.read_bytes())
    small = plots.save_figure(figure(), tmp_path / "c.png", 60, max_bytes=plain // 4)
    assert small.stat().st_size <= plain // 4
    assert Image.open(small).size[0] > 100

    def fails(self, data):
        raise OSError("disk full")

    monkeypatch.setattr(plots.Path, "write_bytes", fails)
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        plots.save_figure(figure(), path, 60)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_notebooks_show_a_figure_once():
    figure = plots.figure4(image(), {"learnable": heat()})
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert not plots.matplotlib.pyplot.get_fignums()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Tables 1 and 3 and the plain CAM classifier, tiny, in a store: (store, data, budget)."""
    store = RunStore(tmp_path_factory.mktemp("runs"))
    data = Splits("tiny", TinyDataset(8, 32), TinyDataset(4, 32, seed=1))
    ci = get_budget("ci")
    names = ("classify", "refine", "largefov")
    budget = ci.replace(**{name: getattr(ci, name).replace(weights=None, batch=4) for name in names})
    run_tables((1, 3), data, budget, store=store, jobs=1, progress=False)
    Pipeline(data, budget, store=store).classifier(Configuration(drs_layers=()))
    return store, data, budget


def entries(store):
    return {path.parent: path.stat().st_mtime_ns for path in store.root.glob("*/*/meta.json")}


def test_make_figures_draws_them_all_and_trains_nothing(run, tmp_path, capsys):
    store, data, budget = run
    before = entries(store)
    paths = plots.make_figures(tmp_path / "figures", store=store, data=data, budget=budget)
    names = ["samples", "figure1", "figure4", "figure5", "figure6", "table1"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    for path in paths:
        assert path.stat().st_size <= 300_000
        assert Image.open(path).size[0] >= 400
    assert capsys.readouterr().out == ""
    assert entries(store) == before


def test_make_figures_names_what_is_not_in_the_store(run, tmp_path, capsys):
    store, data, budget = run
    paths = plots.make_figures(tmp_path, store=store, data=data, budget=budget, seed=5)
    assert [path.name for path in paths] == ["samples.png"]
    said = capsys.readouterr().out
    for name in ("figure1", "figure4", "figure5", "figure6", "table1"):
        assert f"{name} is left out" in said
    assert "with seed 5" in said
