"""The figures: colours by formula, layout by geometry, files by their bytes."""

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from tiny import TinyDataset

from drs_course import plots
from drs_course.paper import Configuration
from drs_course.plots import colors as plot_colors
from drs_course.plots import layout
from drs_course.stages import Pipeline, Splits
from drs_course.store import RunStore
from drs_course.tables import run_tables
from drs_lib.data import MaskAccessError, without_masks
from drs_lib.data.voc import voc_palette
from drs_lib.drs import suppress
from drs_lib.recipes import get_budget

CLASSES = ("ant", "bee", "cow")
RNG = np.random.default_rng(0)
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def image(height=40, width=56):
    return RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)


def heat(height=40, width=56):
    return RNG.random((height, width)).astype(np.float32)


def label_map(height=40, width=56, classes=3):
    return RNG.choice([*range(classes + 1), 255], (height, width)).astype(np.uint8)


def renderer_of(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def assert_apart(boxes, figure):
    """All within the figure, and none over another, but for one pixel: text has side bearings."""
    width, height = figure.canvas.get_width_height()
    for i, box in enumerate(boxes):
        assert box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5
        for other in boxes[i + 1 :]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 1 or down <= 1, (box, other)


def assert_nothing_is_cut_or_covered(figure):
    renderer = renderer_of(figure)
    legends = [legend.get_window_extent(renderer) for legend in figure.legends]
    assert_apart([ax.get_tightbbox(renderer) for ax in figure.axes] + legends, figure)


def as_a_deuteranope_sees(linear):
    """Colours (N, 3) in linear RGB, after Viénot, Brettel and Mollon (1999)."""
    return linear @ np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]).T


def nearest(colors):
    return (np.abs(colors[:, None] - colors[None]).max(-1) + np.eye(len(colors))).min()


def test_colors_of_labels_and_of_maps():
    few, voc = plots.label_colors(6), plots.label_colors(20)
    assert few.shape == voc.shape == (256, 3) and few.dtype == voc.dtype == np.uint8
    np.testing.assert_array_equal(voc, voc_palette())
    np.testing.assert_array_equal(few[1], (0xE6, 0x9F, 0x00))
    assert nearest(as_a_deuteranope_sees((few[[0, 1, 2, 3, 4, 5, 6, 255]] / 255) ** 2.2)) > 0.05
    lightness = (plot_colors.colored(np.linspace(0, 1, 256)) / 255) ** 2.2 @ LUMINANCE
    assert (np.diff(lightness) > -1e-3).all() and lightness[-1] - lightness[0] > 0.8, "a map's is monotone"


def test_overlay_blends_by_the_formula():
    picture, values = image(3, 5), heat(3, 5) * 1.4 - 0.2
    colors = matplotlib.colormaps["inferno"](values.clip(0, 1).astype(np.float64), bytes=False)[..., :3]
    expected = 0.4 * picture + 0.6 * 255 * colors
    # Both tables have 256 entries; a value between two may go to either.
    assert np.abs(plots.overlay(picture, values) - expected).max() < 4
    of_tensors = plots.overlay(torch.from_numpy(picture).permute(2, 0, 1), torch.from_numpy(values))
    np.testing.assert_array_equal(of_tensors, plots.overlay(picture, values))


def test_overlay_labels_leaves_the_background_alone():
    picture, labels = image(), label_map()
    result = plots.overlay_labels(picture, labels, 3)
    np.testing.assert_array_equal(result[labels == 0], picture[labels == 0])
    expected = 0.35 * picture + 0.65 * plots.label_colors(3)[labels]
    np.testing.assert_allclose(result[labels > 0], expected[labels > 0], atol=0.6)


def test_cue_changes_pixel_by_pixel():
    before = np.array([[0, 1, 0, 0, 1, 1, 1, 0]], bool)
    after = np.array([[0, 1, 1, 1, 0, 0, 0, 1]], bool)
    mask = np.array([[2, 2, 2, 0, 0, 2, 1, 255]], np.uint8)
    changes = plots.cue_changes(torch.from_numpy(before), after, torch.from_numpy(mask), 2)
    assert changes.dtype == np.uint8
    names = ("recovered, right", "recovered, wrong", "removed, right", "removed, wrong")
    assert plots.CHANGES[2:] == names
    np.testing.assert_array_equal(changes[0], [0, 1, 2, 3, 4, 5, 4, 0])
    swapped = plots.cue_changes(after, before, mask, 2)
    np.testing.assert_array_equal(swapped[0], [0, 1, 5, 4, 3, 2, 3, 0])


def test_change_colors_stay_apart_for_the_colour_blind():
    linear = np.array([matplotlib.colors.to_rgb(color) for color in plot_colors.CHANGE_COLORS]) ** 2.2
    assert nearest(linear) > 0.09 and nearest(as_a_deuteranope_sees(linear)) > 0.09
    # The colour says right or wrong (blue or not), its lightness recovered or removed.
    lightness = dict(zip(plots.CHANGES, linear @ LUMINANCE, strict=True))
    for verdict in ("right", "wrong"):
        assert lightness[f"removed, {verdict}"] > lightness[f"recovered, {verdict}"] + 0.2


def test_overlay_changes_outlines_the_object():
    picture, on_object = image(6, 7), np.zeros((6, 7), bool)
    on_object[1:5, 2:6] = True
    changes = np.zeros((6, 7), np.uint8)
    changes[0, 0] = 2
    result = plots.overlay_changes(picture, changes, on_object)
    blue = np.array([0x00, 0x72, 0xB2])
    np.testing.assert_allclose(result[0, 0], 0.25 * picture[0, 0] + 0.75 * blue, atol=0.6)
    rim = plots.outline(on_object)
    assert rim.sum() == 12 and (result[rim] == 0).all()
    untouched = ~rim & (changes == 0)
    np.testing.assert_array_equal(result[untouched], picture[untouched])


def test_an_outline_is_the_region_s_rim():
    region = np.zeros((7, 8), bool)
    region[2:6, 3:7] = True
    rim = region.copy()
    rim[3:5, 4:6] = False
    np.testing.assert_array_equal(plots.outline(region), rim)
    # A hole has a rim too, and corners alone do not make neighbours.
    region[4, 4] = False
    assert plots.outline(region)[[3, 5, 4, 4], [4, 4, 3, 5]].all() and not plots.outline(region)[4, 4]
    # An object that the image's border cuts has no outline there.
    half = np.zeros((4, 6), bool)
    half[:, :3] = True
    np.testing.assert_array_equal(plots.outline(half), np.arange(6)[None].repeat(4, 0) == 2)


def test_panels_take_pictures_maps_and_labels():
    labels = label_map(classes=3)
    row = {"image": image(), "map": heat(), "label": labels}
    figure = plots.panels([row, {**row, "label": None}], CLASSES, cmap="gray")
    shown = [ax.images[0].get_array() for ax in figure.axes]
    assert len(shown) == 5
    np.testing.assert_array_equal(shown[2], plots.label_colors(3)[labels])
    assert [ax.get_title() for ax in figure.axes] == ["image", "map", "label", "", ""]
    (legend,) = figure.legends
    assert {t.get_text() for t in legend.get_texts()} == {"background", *CLASSES, "ignored"}
    assert not plots.panels([{"map": heat(), "image": image()}]).legends
    assert_nothing_is_cut_or_covered(figure)


@pytest.mark.parametrize(
    "curves", [{"M": [50.0, 60.0, 55.0], "N": [55.0, 58.0, 54.9]}, {"CAM": [1.0, 1.0, 1.0]}]
)
def test_threshold_curves(curves):
    alphas = (0.02, 0.2, 0.5)
    figure = plots.threshold_curves(alphas, curves, {next(iter(curves)): 0.2})
    (ax,) = figure.axes
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 3]
    for line, scores in zip(lines, curves.values(), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), alphas)
        np.testing.assert_array_equal(line.get_ydata(), scores)
    (ring,) = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (0.2, next(iter(curves.values()))[1])
    assert {t.get_text() for t in ax.texts} == set(curves)
    assert_nothing_is_cut_or_covered(figure)


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
        (lambda: plots.overlay_labels(image(4, 4), np.full((4, 4), 9, np.uint8), 3), "1..3"),
        (lambda: plots.overlay_labels(image(4, 4), np.zeros((4, 4)), 3), "uint8"),
        (lambda: plots.layer_mean(np.zeros((3, 3))), "channels"),
        (lambda: plots.layer_mean(np.full((2, 3, 3), np.inf)), "diverged"),
        (lambda: plots.figure5(image(), [heat()[None]], []), "same layers"),
        (lambda: plots.figure1([], [], [], []), "nothing to draw"),
        (lambda: plots.figure2(np.ones((7, 3, 3)), 0.5), "1 to 6 maps"),
        (lambda: plots.figure2(np.ones((2, 3, 3)), np.array([0.5, 1.5])), "between 0 and 1"),
        (lambda: plots.figure2(np.ones((2, 3, 3)), np.full(3, 0.5)), "2 maps need"),
        (lambda: plots.profile(np.ones((2, 3, 3)), 0.5), "one channel"),
        (lambda: plots.profile(np.full((3, 3), np.nan), 0.5), "finite"),
        (lambda: plots.profile(heat(), float("nan")), "between 0 and 1"),
        (lambda: plots.cue_changes(heat() > 0.5, heat(), label_map(), 1), "cues are bool"),
        (lambda: plots.cue_changes(heat() > 0.5, heat() > 0.5, label_map(4, 4), 1), "4, 4"),
        (lambda: plots.threshold_curves((0.1, 0.2), {"M": [50.0]}), "2 scores"),
        (lambda: plots.loss_curve([]), "no epoch"),
        (lambda: plots.show_samples(None, []), "no index was given"),
        (lambda: plots.table1_curve(pd.DataFrame({"configuration": []})), "not Table 1"),
    ],
)
def test_bad_input_is_refused_in_words(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_show_samples_on_a_data_set(tiny_dataset):
    figure = plots.show_samples(tiny_dataset, [0, 3, 5])
    assert len(figure.axes) == 9
    assert {"image", "saliency", "truth", "background"} <= {t.get_text() for t in figure.findobj(Text)}
    truth = figure.axes[7].images[0].get_array()
    np.testing.assert_array_equal(truth, plots.label_colors(3)[tiny_dataset.mask(3)])
    assert_nothing_is_cut_or_covered(figure)
    hidden = without_masks(tiny_dataset)
    with pytest.raises(MaskAccessError):
        plots.show_samples(hidden, [0])
    assert len(plots.show_samples(hidden, [0, 1], masks=False).axes) == 4


SIZES = [(40, 56), (61, 37), (33, 33)]
IMAGES, HEATS, LABELS = ([make(*size) for size in SIZES] for make in (image, heat, label_map))
CUES = [values > 0.5 for values in HEATS]
FEATURES = [RNG.random((3, side, side + 1)) for side in (40, 20, 11, 5, 2, 1)]
CONTROLLERS = {f"δ = {delta:.2f}": HEATS[1] for delta in np.linspace(0.4, 0.9, 8)}
VOC = [f"pottedplant{i:02d}" for i in range(20)], [label_map(*size, classes=20) for size in SIZES]
GRIDS = {
    "figure1": (plots.figure1, (IMAGES, HEATS, HEATS, HEATS, ["diningtable", "ant", "pottedplant"]), 12),
    "figure4": (plots.figure4, (IMAGES[1], CONTROLLERS), 9),
    "figure5": (plots.figure5, (image(), FEATURES, FEATURES), 13),
    "figure6": (plots.figure6, (IMAGES, LABELS, LABELS, LABELS, CLASSES), 12),
    "figure6-voc": (plots.figure6, (IMAGES, VOC[1], VOC[1], VOC[1], VOC[0]), 12),
    "cues": (plots.cue_figure, (IMAGES, CUES, CUES, LABELS, [1, 2, 3]), 12),
    "panels-6": (plots.panels, ([{str(i): HEATS[1] for i in range(6)}],), 6),
    "panels-2": (plots.panels, ([{"a": image(), "b": label_map()}] * 2, CLASSES), 4),
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_show_every_panel_and_cut_nothing(name):
    draw, arguments, panels = GRIDS[name]
    figure = draw(*arguments)
    with_picture = [ax for ax in figure.axes if ax.images]
    assert len(with_picture) == panels
    for ax in with_picture:
        height, width = ax.images[0].get_array().shape[:2]
        box = ax.get_position(original=True)  # the place that the picture has to fit into, whole
        across, down = box.width * figure.get_figwidth(), box.height * figure.get_figheight()
        assert down > 0.999 * across * height / width
    assert figure.get_figwidth() <= plots.WIDTH + 1e-6
    assert_nothing_is_cut_or_covered(figure)


def test_figure1_puts_the_maps_in_the_papers_order():
    pictures = [image(), image()]
    cam, drs, refined = ([heat(), heat()] for _ in range(3))
    figure = plots.figure1(pictures, cam, drs, refined, ["ant", "bee"])
    panels = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "CAM", "DRS", "DRS†"]
    expected = []
    for picture, *maps in zip(pictures, cam, drs, refined, strict=True):
        expected += [picture, *(plots.overlay(picture, values) for values in maps)]
    np.testing.assert_array_equal(panels, expected)


@pytest.mark.parametrize(
    ("shape", "control"),
    [((5, 16, 16), np.array([0.2, 0.4, 0.55, 0.7, 1.0])), ((1, 9, 14), 0.0), ((6, 14, 9), 0.55)],
    ids=str,
)
def test_figure2_is_algorithm_1(shape, control):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    figure = plots.figure2(features, control)
    maps = [picture.get_array() for picture in figure.axes[0].images]
    values = torch.as_tensor(control, dtype=torch.double).expand(shape[0])
    expected = suppress(features[None].double(), values)[0]
    np.testing.assert_allclose(maps[: shape[0]], features.relu(), rtol=1e-6)
    np.testing.assert_allclose(maps[shape[0] :], expected, atol=1e-7)
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    peak = features.relu().amax((1, 2))
    words = {f"{value:.2f}" for value in (*peak, *(peak * torch.as_tensor(control)))}
    words |= {"max-element\nextractor", "suppression\ncontroller"}
    assert words <= {text.get_text() for text in texts}
    renderer = renderer_of(figure)
    assert_apart([text.get_window_extent(renderer) for text in texts], figure)


def test_figure2_points_at_the_maxima():
    features = np.zeros((2, 4, 8))
    features[0, 0, 1] = features[1, 3, 6] = 2
    figure = plots.figure2(features, 0.5)
    points = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    for point, picture, (row, column) in zip(points, figure.axes[0].images, ((0, 1), (3, 6)), strict=False):
        left, right, bottom, top = picture.get_extent()
        assert (right - left) / (top - bottom) == pytest.approx(2)
        assert point.get_xdata()[0] == pytest.approx(left + (right - left) * (column + 0.5) / 8)
        assert point.get_ydata()[0] == pytest.approx(top - (top - bottom) * (row + 0.5) / 4)
    layout.png(plots.figure2(np.zeros((3, 4, 4)), 0.5), 50)  # dead maps


def test_profile_cuts_through_the_maximum():
    features = torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    figure = plots.profile(features, 0.4, "layer 6")
    row, _ = divmod(int(features.argmax()), 12)
    values = features[row].relu().numpy()
    left, ax = figure.axes
    np.testing.assert_allclose(left.images[0].get_array(), features.relu())
    assert left.get_title() == "layer 6" and left.get_yticks().tolist() == [row]
    kept, above, whole = (patch.get_data() for patch in ax.patches)
    np.testing.assert_allclose(kept.values, np.minimum(values, 0.4 * values.max()), rtol=1e-6)
    np.testing.assert_allclose(above.baseline, kept.values)
    np.testing.assert_allclose(above.values, values)
    np.testing.assert_allclose(whole.values, values)
    levels = [line.get_ydata()[0] for line in ax.get_lines()]
    np.testing.assert_allclose(levels, (values.max(), 0.4 * values.max()), rtol=1e-6)
    assert_nothing_is_cut_or_covered(figure)
    layout.png(plots.profile(np.zeros((3, 4)), 0.5), 50)  # a dead map


def test_suppression_shows_the_map_and_what_is_left_of_it_on_one_scale():
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    picture = image(60, 80)
    figure = plots.suppression(picture, features, 0.5)
    first, before, after, cut = figure.axes
    np.testing.assert_array_equal(first.images[0].get_array(), picture)
    large, small = (ax.images[0].get_array().astype(int) for ax in (before, after))
    assert large.shape == small.shape == (60, 80, 3)
    row, column = divmod(int(features.argmax()), 8)
    peak = np.s_[10 * row + 5, 10 * column + 5]
    assert (large[peak] - small[peak]).max() > 20, "the maximum comes down"
    low = (features[row] < 0.4 * features.max()).nonzero().flatten()
    assert len(low) and before.get_lines()[0].get_ydata()[0] == 10 * row + 5
    kept, *_ = (patch.get_data() for patch in cut.patches)
    assert kept.values.max() == pytest.approx(0.5 * float(features.max()))
    assert_nothing_is_cut_or_covered(figure)
    layout.png(plots.suppression(image(), np.zeros((3, 4)), 0.5), 50)  # a dead map


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
    titles = ("measured (Critters)", "the paper (VOC)")
    words = [f"{title}: {kind}" for title in titles for kind in ("constant δ", "learnable")]
    assert sorted(t.get_text() for t in labels) == words
    boxes = sorted((t.get_window_extent(renderer) for t in labels), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:], strict=False))
    assert all(box.x0 > ax.get_window_extent().x1 for box in boxes)  # beside the data, not over them
    assert_nothing_is_cut_or_covered(figure)
    figure = plots.table1_curve(table1(sd=np.nan))  # of one seed: without bars
    assert not [c for c in figure.axes[0].collections if len(c.get_paths())]


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.0])
def test_labelled_scatter_keeps_names_and_points_apart(spread):
    names = ["learnable", *(f"δ=0.{tens}0" for tens in range(2, 10))]
    places = spread * np.random.default_rng(1).random((9, 2))
    frame = pd.DataFrame({"recall (%)": places[:, 0], "accuracy (%)": places[:, 1], "name": names})
    figure = plots.labelled_scatter(frame, "recall (%)", "accuracy (%)", "name", highlight=["learnable"])
    renderer = renderer_of(figure)
    [ax] = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("recall (%)", "accuracy (%)")
    assert [text.get_text() for text in ax.texts] == names
    boxes = [Text.get_window_extent(text, renderer) for text in ax.texts]
    assert_apart(boxes, figure)
    assert not any(box.contains(*point) for box in boxes for point in ax.transData.transform(places))
    assert [text.get_color() == "#D55E00" for text in ax.texts] == [True] + [False] * 8


def test_labelled_scatter_leaves_out_what_has_no_number():
    frame = pd.DataFrame({"x": [1.0, np.nan], "y": [2.0, 3.0], "name": ["here", "nowhere"]})
    [ax] = plots.labelled_scatter(frame, "x", "y", "name").axes
    assert [text.get_text() for text in ax.texts] == ["here"]
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.labelled_scatter(frame.iloc[1:], "x", "y", "name")


def test_save_figure_is_reproducible_small_and_atomic(tmp_path, monkeypatch):
    picture, values = image(200, 200), heat(200, 200)

    def figure():
        return plots.figure4(picture, {"learnable": values})

    path = plots.save_figure(figure(), tmp_path / "new" / "a.png", 60)
    assert path.read_bytes() == plots.save_figure(figure(), tmp_path / "b.png", 60).read_bytes()
    plain = len(path.read_bytes())
    small = plots.save_figure(figure(), tmp_path / "c.png", 60, max_bytes=plain // 4)
    assert small.stat().st_size <= plain // 4
    assert Image.open(small).size[0] > 100

    def fails(self, data):
        raise OSError("disk full")

    monkeypatch.setattr(layout.Path, "write_bytes", fails)
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        plots.save_figure(figure(), path, 60)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


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


FIGURES = ("samples", "suppression", "figure1", "figure4", "figure5", "figure6", "table1")


def test_make_figures_draws_what_is_in_the_store_and_trains_nothing(run, tmp_path, capsys):
    store, data, budget = run
    before = entries(store)
    paths = plots.make_figures(tmp_path / "figures", store=store, data=data, budget=budget)
    assert [path.stem for path in paths] == list(FIGURES)
    assert all(path.stat().st_size <= 300_000 and Image.open(path).size[0] >= 400 for path in paths)
    assert capsys.readouterr().out == "" and entries(store) == before
    paths = plots.make_figures(tmp_path, store=store, data=data, budget=budget, seed=5)
    said = capsys.readouterr().out
    assert [path.name for path in paths] == ["samples.png"] and "with seed 5" in said
    assert all(f"{name} is left out" in said for name in FIGURES[1:])


def test_notebooks_show_our_own_picture_of_a_figure(monkeypatch):
    from IPython.core.formatters import DisplayFormatter

    figure, shown = plots.panels([{"grey": np.full((40, 40, 3), 128, np.uint8)}]), []
    formatter = DisplayFormatter()
    # What "%matplotlib inline" does, and importing pyplot in a notebook.
    formatter.formatters["image/png"].for_type(type(figure).__mro__[1], lambda figure: b"pyplot's")
    monkeypatch.setattr(layout, "display", lambda data, raw: shown.append(data))
    assert formatter.format(figure) == ({}, {})
    assert [data["image/png"] for data in shown] == [figure._repr_png_()]
    assert not matplotlib.pyplot.get_fignums()


def test_large_pictures_of_a_notebook_are_stored_in_256_colours():
    small = plots.panels([{"grey": np.full((40, 40, 3), 128, np.uint8)}])._repr_png_()
    assert Image.open(io.BytesIO(small)).mode != "P"
    large = plots.panels([{str(k): image(220, 220) for k in range(4)}])
    stored, plain = (
        Image.open(io.BytesIO(data)) for data in (large._repr_png_(), layout.png(large, layout.NOTEBOOK_DPI))
    )
    assert stored.mode == "P"
    pixels, full = (np.asarray(picture.convert("RGB"), float) for picture in (stored, plain))
    assert np.abs(pixels - full).mean() < 30
