"""The labs: a state gives a picture, its numbers are the library's, a burst of changes is one drawing."""

import ast
import asyncio
import gc
import io
import logging
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from ipywidgets.widgets import widget as ipywidgets_widget
from jupyter_client.manager import run_kernel
from PIL import Image
from torch import nn

from drs_course.labs import CueLab, DeltaLab, FeatureMapLab, ImageLab, LayerLab, pictures
from drs_course.labs import cue as cue_module
from drs_course.labs import delta as delta_module
from drs_course.labs import lab as lab_module
from drs_course.labs.lab import Lab, View, slider, table
from drs_course.paper import ALL_LAYERS, Configuration, table_rows
from drs_course.plots import layer_mean
from drs_course.stages import Pipeline
from drs_lib.crf import available, dense_crf
from drs_lib.data import normalize, without_masks
from drs_lib.drs import DRS, suppress_plain
from drs_lib.drs import suppress as drs_suppress
from drs_lib.labels import pseudo_labels
from drs_lib.maps import iterate_maps, localization_maps
from drs_lib.metrics import MapScore, SegmentationScore
from drs_lib.networks import classifier
from drs_lib.recipes import get_budget

ROOT = Path(__file__).parents[2]
PLAIN, LEARNABLE, REFINED = Configuration(drs_layers=()), Configuration(), Configuration(refine=True)
LABS = [DeltaLab, FeatureMapLab, LayerLab, CueLab, ImageLab]


def seeing_budget():
    """The ci budget, but trained until the classifiers see something: after one epoch their maps are 0."""
    ci = get_budget("ci")
    return ci.replace(classify=ci.classify.replace(epochs=10))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Three trained classifiers, the learnable one and a refinement network, in a store of their own."""
    pipeline = Pipeline("critters", seeing_budget(), store=tmp_path_factory.mktemp("runs"))
    for configuration in (PLAIN, LEARNABLE, Configuration(delta=0.55), Configuration(delta=0.4)):
        pipeline.classifier(configuration)
    pipeline.refinement_network(REFINED)
    return pipeline


@pytest.fixture(scope="module")
def seen(pipeline):
    """The validation image and class that CAM and DRS find best: a map of zeros would prove nothing."""
    models = pipeline.classifier(PLAIN), with_plain_weights(pipeline, ALL_LAYERS, 0.6)

    def found(index, label):
        maps = (maps_of(model, pipeline, index) for model in models)
        return min(quality(one, pipeline, index, label, 0.2)[2] for one in maps)

    pairs = [(i, c) for i in range(12) for c in pipeline.data.val[i][1].nonzero().flatten().tolist()]
    best = max(pairs, key=lambda pair: found(*pair))
    assert found(*best) > 0.05
    return dict(zip(("image", "label"), best, strict=True))


@pytest.fixture
def make(pipeline):
    """Makes labs, and closes them when the test is over."""
    labs = []

    def make_lab(kind, *arguments, **options):
        labs.append(kind(*(arguments or (pipeline,)), **options))
        return labs[-1]

    yield make_lab
    for lab in labs:
        lab.close()


def decoded(data):
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG"
    return np.asarray(image)


def column(lab, name):
    """The scores in one column of a lab's table."""
    head, *rows = lab.shown.numbers
    rows = [row for row in rows if row[0] != "mean change of the map"]
    return [row[head.index(name)] for row in rows if len(row) == len(head)]


def images_with_classes(dataset, count):
    return [i for i in range(len(dataset)) if dataset[i][1].sum() >= count]


def maps_of(model, pipeline, index):
    image, labels = pipeline.data.val[index]
    return localization_maps(model, normalize(image[None]), labels[None])[0]


def quality(maps, pipeline, index, label, alpha):
    """[recall, precision, IoU] of a class, from maps (C, H, W)."""
    labels = pipeline.data.val[index][1]
    score = MapScore(alpha).update(maps[None], pipeline.data.val.mask(index)[None], labels[None])
    return [float(score.compute()["per_class"][key][label]) for key in ("recall", "precision", "iou")]


def agrees(lab, model, name="DRS", maps=None, atol=1e-3):
    """A column of a lab's numbers is what the library says of a network's map in the lab's state."""
    pipeline, index, label = lab.pipeline, lab.state["image"], lab.state["label"]
    maps = maps_of(model, pipeline, index) if maps is None else maps
    expected = quality(maps, pipeline, index, label, lab.state.get("alpha", pipeline.budget.alpha))
    np.testing.assert_allclose(column(lab, name), expected, atol=atol)


def with_plain_weights(pipeline, layers, delta):
    plain = pipeline.classifier(PLAIN)
    model = classifier(plain.backbone, plain.num_classes, layers, delta)
    model.load_state_dict(plain.state_dict())
    return model.eval()


def activations(layer):
    return [module for module in layer.modules() if isinstance(module, (nn.ReLU, DRS))]


# Of each lab: states one after the other, each of which looks different.
STATES = {
    DeltaLab: [
        {"image": 1, "label": 1, "delta": 0.8},
        {"label": 4},
        {"alpha": 0.4},
        {"delta": 1.0, "alpha": 0.95},
        {"per_layer": True, "layer3": 0.8, "alpha": 0.2},
        {"image": 11},
        {"mode": "trained", "trained": 0.4},
        {"mode": "trained", "learnable": True},
    ],
    FeatureMapLab: [
        {"delta": 1.0},
        {"image": 11, "channel": 3},
        {"place": "layer 1", "channel": 15},
        {"place": "layer 5, first"},
    ],
    LayerLab: [
        {"delta": 0.05},
        {"layer2": True},
        {"image": 11, **{f"layer{n}": False for n in range(1, 7)}},
        {"preset": "DRS in layers 1-6"},
        {"network": "learnable", "layer4": True},
    ],
    CueLab: [
        {"alpha": 0.0, "beta": 0.0},
        {"alpha": 0.95, "beta": 1.0, "image": 35},
        {"rule": "release", "alpha": 0.2},
        {"maps": "CAM", "conflict": "ignore"},
        {"maps": "DRS†, refined", "conflict": "object"},
    ],
    ImageLab: [{"image": 11}, {"network": "DRS (learnable)"}, {"source": "drawn", "image": 4}],
}


@pytest.mark.parametrize("kind", LABS)
def test_every_state_is_a_jpeg_of_one_size(make, kind):
    lab = make(kind)
    first, pictures_seen = lab.state, [bytes(lab.picture.value)]
    shape = decoded(pictures_seen[0]).shape
    assert shape == lab.shown.picture.shape
    for state in STATES[kind]:
        lab.set(**state)
        view = lab.view(lab.state)
        assert view.picture.dtype == np.uint8 and view.picture.shape == shape, state
        np.testing.assert_array_equal(view.picture, lab.shown.picture)
        # The bytes are a picture of what was drawn.
        assert decoded(lab.picture.value).shape == shape
        assert np.abs(decoded(lab.picture.value).astype(int) - view.picture).mean() < 6
        assert lab.drawn == lab.state
        pictures_seen.append(bytes(lab.picture.value))
    assert len(set(pictures_seen)) == len(pictures_seen), "every state looks different"
    fresh = make(kind).set(**lab.state)
    assert fresh.state == lab.state, "a picture is a function of the state alone"
    for part in ("picture", "numbers", "note"):
        assert getattr(fresh, part).value == getattr(lab, part).value
    assert bytes(lab.set(**first).set(**first).picture.value) == pictures_seen[0], "there and back"


@pytest.mark.parametrize("kind", LABS)
def test_the_stored_picture_shows_the_state(make, kind):
    lab = make(kind)
    bundle = lab._repr_mimebundle_()
    view = bundle["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == lab.widget.model_id
    assert lab.title in bundle["text/plain"] and lab.describe(lab.state) in bundle["text/plain"]
    image = Image.open(io.BytesIO(bundle["image/png"]))
    image.load()
    assert image.format == "PNG" and len(bundle["image/png"]) < 150_000
    assert image.size[0] >= lab.shown.picture.shape[1] and image.size[1] > lab.shown.picture.shape[0]
    again = lab.set(**STATES[kind][0])._repr_mimebundle_()
    assert again["image/png"] != bundle["image/png"] and again["text/plain"] != bundle["text/plain"]
    assert again["image/png"] == lab.snapshot()


@pytest.fixture
def recorded(monkeypatch):
    """``recorded(module, name)``: the second arguments that a drawing function was given, or the only one."""

    def record(module, name):
        drawn, draw = [], getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: drawn.append(args[name != "heat"]) or draw(*args))
        return drawn

    return record


@pytest.mark.parametrize("delta", [0.05, 0.6, 1.0])
def test_delta_lab_agrees_with_the_library(make, pipeline, seen, recorded, delta):
    drawn = recorded(delta_module, "overlay")
    lab = make(DeltaLab, delta=delta)
    models = {"CAM": pipeline.classifier(PLAIN), "DRS": with_plain_weights(pipeline, ALL_LAYERS, delta)}
    several = images_with_classes(pipeline.data.val, 2)[0]
    pairs = [(several, c) for c in pipeline.data.val[several][1].nonzero().flatten().tolist()]
    for index, label in [*pairs, tuple(seen.values())]:
        for alpha in (0.0, 0.9, 0.2):
            drawn.clear()
            lab.set(image=index, label=label, alpha=alpha)
            for name, model in models.items():
                agrees(lab, model, name)
            for value in column(lab, "DRS"):
                assert f">{100 * value:.1f}<" in lab.numbers.value or np.isnan(value)
    assert min(column(lab, "CAM")) > 0
    assert (column(lab, "CAM") == column(lab, "DRS")) == (delta == 1.0)
    for values, model in zip(drawn, models.values(), strict=True):
        np.testing.assert_allclose(values, maps_of(model, pipeline, seen["image"])[seen["label"]], atol=1e-4)
    assert (np.abs(drawn[0] - drawn[1]).max() > 0.05) == (delta < 1)


@pytest.mark.parametrize("row", table_rows(2), ids=lambda row: row.label)
def test_presets_are_the_rows_of_table_2(make, pipeline, seen, row):
    layers = row.configuration.drs_layers
    model = with_plain_weights(pipeline, layers, 0.7 if layers else None)
    lab = make(DeltaLab, delta=0.7).set(**seen, per_layer=True, preset=row.label)
    assert [lab.state[f"layer{n}"] for n in range(1, 7)] == [0.7 if n in layers else 1 for n in range(1, 7)]
    agrees(lab, model)
    plugged = make(LayerLab, delta=0.7).set(**seen).set(preset=row.label)
    assert [n for n in range(1, 7) if plugged.state[f"layer{n}"]] == list(layers)
    agrees(plugged, model)
    agrees(plugged, pipeline.classifier(PLAIN), "no DRS")
    assert (column(plugged, "DRS") == column(plugged, "no DRS")) == (not layers)


def test_one_delta_for_each_layer(make, pipeline, seen):
    deltas = [0.9, 0.7, 0.8, 1.0, 0.6, 0.95]
    lab = make(DeltaLab).set(per_layer=True, **{f"layer{n}": d for n, d in enumerate(deltas, 1)}, **seen)
    model = pipeline.classifier(PLAIN)
    for layer, delta in zip(model.layers, deltas, strict=True):
        for module in activations(layer):
            module.register_forward_pre_hook(lambda _, inputs, delta=delta: suppress_plain(*inputs, delta))
    agrees(lab, model)
    assert column(lab, "DRS") != column(lab, "CAM")
    assert lab.state["preset"] == "by hand" and "0.90 0.70 0.80 1.00 0.60 0.95" in lab.describe(lab.state)


def test_moving_one_layer_leaves_the_preset(make):
    lab = make(DeltaLab).set(per_layer=True, preset="DRS in layers 5-6")
    assert lab.set(layer5=0.3).state["preset"] == "by hand"
    lab = make(LayerLab).set(preset="DRS in layers 5-6")
    assert lab.set(layer4=True).state["preset"] == "DRS in layers 4-6"
    assert lab.set(layer5=False).state["preset"] == "by hand"
    assert [n for n in range(1, 7) if lab.state[f"layer{n}"]] == [4, 6]


@pytest.mark.parametrize(
    "state, delta", [({"trained": 0.4}, 0.4), ({"trained": 0.55}, 0.55), ({"learnable": True}, None)]
)
def test_trained_mode_shows_the_trained_classifier(make, pipeline, seen, state, delta):
    lab = make(DeltaLab).set(**seen, mode="trained", **state)
    agrees(lab, pipeline.classifier(Configuration(delta=delta)))
    assert ("learnable" if delta is None else f"{delta:.2f}") in lab.describe(lab.state)


def test_each_mode_shows_its_own_controls(make):
    lab = make(DeltaLab)

    def visible(**state):
        lab.set(**state)
        return {name for name, control in lab.controls.items() if control.layout.display != "none"}

    always = {"mode", "image", "label", "alpha"}
    per_layer = always | {"delta", "per_layer", "preset"} | {f"layer{n}" for n in range(1, 7)}
    assert visible() == always | {"delta", "per_layer"}
    inference = lab.note.value
    assert visible(per_layer=True) == per_layer
    assert visible(mode="trained") == always | {"trained", "learnable"}
    assert lab.note.value != inference and not lab.controls["learnable"].disabled
    assert [value for _, value in lab.controls["trained"].options] == [0.4, 0.55]
    assert visible(learnable=True) == always | {"learnable"}
    assert visible(mode="at inference") == per_layer
    assert lab.note.value == inference


def test_disabled_controls_are_those_without_effect(make, pipeline):
    for kind, without, others, moved in (
        (LayerLab, {"network": "learnable"}, {"network": "plain"}, {"delta": 0.1}),
        (CueLab, {"rule": "release"}, {"rule": "paper"}, {"beta": 0.9, "conflict": "object"}),
    ):
        lab = make(kind)
        first = lab.set(**without).picture.value
        assert all(lab.controls[name].disabled for name in moved)
        assert lab.set(**moved).picture.value == first
        lab.set(**others)
        assert not any(lab.controls[name].disabled for name in moved)
    budget = pipeline.budget.replace(rule="release")  # a budget with that rule begins with it
    cues = make(CueLab, Pipeline("critters", budget, store=pipeline.store), images=2)
    assert cues.state["rule"] == "release" and cues.controls["beta"].disabled


@pytest.mark.parametrize("kind", [DeltaLab, LayerLab])
def test_the_classes_follow_the_image(make, pipeline, kind):
    lab, val = make(kind), pipeline.data.val
    for index in range(len(val)):
        lab.controls["image"].value = index
        present = val[index][1].nonzero().flatten().tolist()
        assert list(lab.controls["label"].options) == [(val.classes[c], c) for c in present]
        assert lab.state["label"] in present and lab.drawn == lab.state


@pytest.mark.parametrize("kind", LABS)
def test_an_image_without_classes(make, pipeline, kind, monkeypatch):
    whole = type(pipeline.data.val).__getitem__

    def without(self, index):
        image, labels = whole(self, index)
        return image, (labels * 0 if index == 2 and self.split == "val" else labels)

    monkeypatch.setattr(type(pipeline.data.val), "__getitem__", without)
    lab = make(kind, image=2)
    first = lab.picture.value
    assert Image.open(io.BytesIO(lab.snapshot())).format == "PNG"
    assert "alert" not in lab.busy.value and lab.drawn == lab.state
    lab.set(image=3)
    assert lab.picture.value != first
    assert lab.set(image=2).picture.value == first


@pytest.mark.parametrize("delta", [0.05, 0.55, 1.0])
def test_feature_map_lab_is_algorithm_1(make, pipeline, recorded, delta):
    drawn = recorded(pictures, "heat")
    lab = make(FeatureMapLab, image=1, delta=delta)
    model, features = pipeline.classifier(PLAIN), []  # after each activation, by layer and place
    for module in (module for layer in model.layers for module in activations(layer)):
        module.register_forward_hook(lambda m, inputs, output: features.append(output.clone()))
    with torch.no_grad():
        model(normalize(pipeline.data.val[1][0][None]))
    for place, x in zip(lab.controls["place"].options, features, strict=True):
        lab.set(place=place, channel=0)
        assert lab.controls["channel"].max == x.shape[1] - 1
        channel = int(x[0].amax((1, 2)).argmax())
        drawn.clear()
        lab.set(channel=channel)
        values, kept = (one[0, channel].numpy() for one in (x, drs_suppress(x, delta)))
        np.testing.assert_allclose(drawn, [values, kept], rtol=1e-4, atol=1e-5)
        (_, peak), (_, tau), (_, above), (_, cut) = lab.shown.numbers[1:]
        assert float(peak) == pytest.approx(values.max(), abs=1e-3)
        assert float(tau) == pytest.approx(kept.max(), abs=1e-3)
        assert above == pytest.approx((kept < values).mean(), abs=1 / values.size)
        assert cut == pytest.approx(1 - kept.sum() / values.sum(), abs=1e-4)


def test_a_channel_that_is_zero_everywhere(make):
    lab = make(FeatureMapLab)
    lab._features(0)["layer 1"][3] = 0
    lab.set(place="layer 1", channel=3)
    assert "0 everywhere" in lab.note.value and "–" in lab.numbers.value
    assert "alert" not in lab.busy.value
    assert lab.set(channel=4).note.value == ""


@pytest.mark.parametrize(
    "kind, state",
    [
        (FeatureMapLab, {"channel": 50, "place": "layer 6, first"}),
        (DeltaLab, {"layer5": 0.3, "per_layer": True}),
        (DeltaLab, {"label": 4, "image": 11}),
        (CueLab, {"alpha": 0.33, "maps": "DRS†, refined"}),
    ],
)
def test_set_takes_its_values_in_any_order(make, kind, state):
    lab = make(kind)
    if kind is FeatureMapLab:
        lab.set(channel=60)
        lab.set(place="layer 1")  # a smaller place keeps the channel within
        assert lab.state["channel"] == lab.controls["channel"].max == 15
    lab.set(**state)
    assert {name: lab.state[name] for name in state} == state and lab.drawn == lab.state


@pytest.mark.parametrize("ticked", [(), (5, 6), (1, 2, 3, 4, 5, 6)])
def test_layer_lab_takes_learned_modules_out(make, pipeline, seen, recorded, ticked):
    drawn = recorded(pictures, "heat")
    lab = make(LayerLab, layers=ticked).set(**seen)
    drawn.clear()
    lab.set(network="learnable")
    model, features = pipeline.classifier(LEARNABLE), []
    for number, layer in enumerate(model.layers, 1):
        for module in activations(layer) if number not in ticked else ():
            module.register_forward_hook(lambda m, inputs, output: inputs[0].relu())
        layer.register_forward_hook(lambda m, inputs, output: features.append(output[0].numpy()))
    agrees(lab, model)
    assert len(drawn) == 12
    for values, layer in zip(drawn[6:], features, strict=True):
        np.testing.assert_allclose(values, layer_mean(layer), atol=1e-4)


def cue_inputs(pipeline, kind, index):
    """Maps and saliency of a training image, and its mask."""
    train, budget = pipeline.data.train, pipeline.budget
    options = {"scales": budget.scales, "resize": budget.resize, "indices": [index]}
    model = {"DRS": LEARNABLE, "CAM": PLAIN}.get(kind)
    model = pipeline.refinement_network(REFINED) if model is None else pipeline.classifier(model)
    ((_, _, maps),) = iterate_maps(model, without_masks(train), **options)
    return maps, train.saliency(index), train.mask(index)


def scores_the_label(lab, label, mask):
    """A cue lab's IoUs are the library's; the label's classes."""
    train = lab.pipeline.data.train
    iou = SegmentationScore(train.num_classes + 1).update(label, mask).compute()["iou"]
    present = [0, *(train[lab.state["image"]][1].nonzero().flatten() + 1).tolist()]
    np.testing.assert_allclose(column(lab, "IoU")[: len(present)], iou[present], equal_nan=True)
    return present


@pytest.mark.parametrize(
    "state",
    [
        {"maps": "DRS", "alpha": 0.2, "beta": 0.06, "conflict": "background"},
        {"maps": "CAM", "alpha": 0.0, "beta": 0.3, "conflict": "object"},
        {"maps": "DRS†, refined", "alpha": 0.05, "beta": 0.4, "conflict": "ignore"},
        {"maps": "DRS", "alpha": 0.3, "rule": "release"},
        {"maps": "CAM", "alpha": 0.0, "rule": "release"},
    ],
)
def test_cue_lab_s_label_is_the_library_s(make, pipeline, recorded, state):
    labels_drawn = recorded(cue_module, "overlay_labels")
    lab = make(CueLab)
    for index in images_with_classes(pipeline.data.train, 2)[:2]:
        labels_drawn.clear()
        lab.set(image=index, **state)
        maps, saliency, mask = cue_inputs(pipeline, state["maps"], index)
        rule = {name: value for name, value in state.items() if name in ("beta", "rule", "conflict")}
        label = pseudo_labels(maps[None], saliency[None], state["alpha"], **rule)[0].numpy()
        np.testing.assert_array_equal(labels_drawn[0], mask)
        np.testing.assert_array_equal(labels_drawn[-1], label)
        present = scores_the_label(lab, label, mask)
        rows = lab.shown.numbers[1 : len(present) + 1]
        for row, truth in zip(rows, present, strict=True):
            shares = [(label[mask == truth] == value).mean() for value in [*present, 255]]
            np.testing.assert_allclose(row[1:-1], shares, atol=1e-12)
        assert f"{100 * (label == 255).mean():.1f} % of the image is ignored" in lab.note.value


def test_the_cues_drawn_are_those_of_the_rule(make, pipeline):
    lab = make(CueLab)
    colors = {name: pictures.rgb(color)[0] for name, color in cue_module.CUE_COLORS.items()}
    index = images_with_classes(pipeline.data.train, 2)[0]
    maps, saliency, _ = cue_inputs(pipeline, "DRS", index)
    largest = maps.amax(0).numpy()
    for rule, alpha in (("paper", 0.2), ("release", 0.2), ("release", 0.0)):
        state = lab.set(image=index, rule=rule, alpha=alpha, beta=0.3).state
        picture = cue_module._cues(largest, saliency.astype(np.float32) / 255, state)
        rules = {"rule": rule} if rule == "release" else {"beta": 0.3, "conflict": "object"}
        label = pseudo_labels(maps[None], saliency[None], alpha, **rules)[0].numpy()
        painted = {name: (picture == color).all(-1) for name, color in colors.items()}
        objects, background = (painted[name] | painted["both"] for name in ("object", "background"))
        assert (largest[objects] > 0).all()
        if rule == "paper":
            np.testing.assert_array_equal(objects, (label > 0) & (label < 255))
            np.testing.assert_array_equal(painted["neither"], label == 255)
        else:  # what has both cues is the background's; very sure maps of several classes are ignored
            assert ((label == 0) <= background).all()
            assert np.isin(label[background], (0, 255)).all()
            assert not (painted["object"] & (label == 0)).any()
            assert (painted["neither"] <= (label == 255)).all()


def test_the_maps_bring_their_own_threshold(make, pipeline):
    lab = make(CueLab).set(maps="DRS†, refined")
    assert lab.state["alpha"] == pipeline.budget.refined_alpha != pipeline.budget.alpha
    assert lab.set(maps="CAM").state["alpha"] == pipeline.budget.alpha


@pytest.mark.skipif(not available(), reason="pydensecrf is not installed")
def test_cue_lab_s_crf_is_the_library_s(make, pipeline, recorded):
    labels_drawn = recorded(cue_module, "overlay_labels")
    lab = make(CueLab)
    index = images_with_classes(pipeline.data.train, 2)[0]
    lab.set(image=index, crf=True)
    maps, saliency, mask = cue_inputs(pipeline, "DRS", index)
    budget = pipeline.budget
    label = pseudo_labels(maps[None], saliency[None], budget.alpha, budget.beta)[0].numpy()
    present = np.array([0, *(pipeline.data.train[index][1].nonzero().flatten() + 1).tolist()])
    start = np.full((len(present), *label.shape), 1 / len(present), np.float32)
    for row, value in enumerate(present):
        start[:, label == value] = 0.3 / (len(present) - 1)
        start[row, label == value] = 0.7
    picture = pipeline.data.train[index][0].permute(1, 2, 0).contiguous().numpy()
    expected = present[dense_crf(start, picture, budget.crf("largefov")).argmax(0)]
    np.testing.assert_array_equal(labels_drawn[-1], expected)
    assert (expected != label).any() and not (labels_drawn[-1] == 255).any()
    scores_the_label(lab, expected, mask)


def test_without_the_crf_the_cue_lab_says_how_to_get_it(make, monkeypatch):
    monkeypatch.setattr(cue_module, "available", lambda: False)
    lab = make(CueLab, images=2)
    assert lab.controls["crf"].disabled
    inner = [child for row in lab.widget.children for child in getattr(row, "children", ())]
    assert any("pydensecrf" in str(getattr(child, "value", "")) for child in inner)


def test_a_store_without_table_1_says_so(make, tmp_path):
    pipeline = Pipeline("critters", "ci", store=tmp_path)
    pipeline.classifier(PLAIN)
    lab = make(DeltaLab, pipeline, image=1).set(mode="trained")
    assert "no classifier" in lab.note.value and "notebook 03" in lab.note.value
    np.testing.assert_array_equal(column(lab, "DRS"), column(lab, "CAM"))
    assert lab.controls["learnable"].disabled
    assert lab.set(learnable=True).describe(lab.state) == lab.set(learnable=False).describe(lab.state)
    assert len(pipeline.store.metas("classify")) == 1
    assert [value for _, value in make(LayerLab, pipeline).controls["network"].options] == ["plain"]
    assert len(make(ImageLab, pipeline).controls["network"].options) == 1
    # With the learnable classifier alone, CAM is not passed off as DRS.
    model = pipeline.classifier(LEARNABLE)
    lab = make(DeltaLab, pipeline, image=1).set(mode="trained")
    assert "no classifier" in lab.note.value
    agrees(lab.set(learnable=True), model)
    assert "no classifier" not in lab.note.value


def test_a_damaged_classifier_is_said_and_not_trained_in_a_callback(make, tmp_path, monkeypatch):
    pipeline = Pipeline("critters", "ci", store=tmp_path)
    for configuration in (PLAIN, Configuration(delta=0.4), Configuration(delta=0.6)):
        pipeline.classifier(configuration)
    stage = pipeline.stage("classify", Configuration(delta=0.4))
    path = pipeline.store.folder("classify", stage.key) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    lab = make(DeltaLab, pipeline, image=1)
    monkeypatch.setattr("drs_course.stages.train_classifier", lambda *a, **k: pytest.fail("was trained"))
    lab.set(mode="trained", trained=0.4)
    assert path.read_bytes() == whole[:-9]
    assert "alert" in lab.busy.value and "damaged" in lab.busy.value and lab.numbers.value == ""
    lab.set(trained=0.6)
    assert "alert" not in lab.busy.value and "IoU" in lab.numbers.value
    path.write_bytes(whole)
    assert "IoU" in lab.set(trained=0.4).numbers.value


class Plate(Lab):
    """A lab without networks: a square whose shade is the slider."""

    title, about = "Plate", "A square."

    def __init__(self, pause):
        super().__init__(None)
        self.pause = pause
        self.controls = {"shade": slider("shade", 0, 0, 255, 1), "other": slider("other", 0, 0, 255, 1)}
        self._build(list(self.controls.values()))

    def adjust(self, name):
        self.describe(self.state)

    def describe(self, state):
        if state["other"] == 99:
            raise OSError("no other 99")
        return f"shade {state['shade']}"

    def view(self, state):
        if state["shade"] == 13:
            raise ArithmeticError("13 is <unlucky>")
        self.describe(state)
        time.sleep(self.pause)
        picture = np.full((24, 32, 3), state["shade"], np.uint8)
        return View(picture, [["shade", ""], ["value", str(state["shade"])]], f"note {state['shade']}")


@pytest.fixture
def plate(make):
    return make(Plate, 0.0)


async def settled(lab, timeout=30):
    """Waits until the lab shows its controls' values, and a little longer."""
    deadline = time.monotonic() + timeout
    while lab.drawn != lab.state:
        assert time.monotonic() < deadline, "the lab does not draw"
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("in_one_message", [True, False])
def test_a_burst_is_drawn_once_with_its_last_values(plate, monkeypatch, in_one_message):
    monkeypatch.setattr(lab_module, "LONGEST_WAIT", 20.0)  # a busy machine may take long between two of them

    async def drag():
        for value in range(1, 31):
            plate.controls["shade"].value = value
            if not in_one_message:
                await asyncio.sleep(0)
        assert not in_one_message or plate.drawn["shade"] == 0, "not drawn inside its own message"
        await settled(plate)

    before = plate.drawings
    asyncio.run(drag())
    assert before + 1 <= plate.drawings <= before + (1 if in_one_message else 2)
    assert plate.drawn["shade"] == 30
    assert decoded(plate.picture.value)[0, 0, 0] == 30 and "30" in plate.numbers.value


def test_a_steady_stream_is_not_put_off(plate, monkeypatch):
    monkeypatch.setattr(lab_module, "QUIET", 0.04)  # so that the stream is never quiet
    shown, ends = set(), time.monotonic() + 1.0

    async def drag():
        while time.monotonic() < ends:
            plate.controls["shade"].value = plate.controls["shade"].value % 250 + 14
            await asyncio.sleep(0.002)
            shown.add(plate.drawings)
        await settled(plate)

    asyncio.run(drag())
    assert len(shown) > 3 and plate.drawn == plate.state


def test_a_slow_lab_waits_for_the_hand_and_says_that_it_computes(make, monkeypatch):
    monkeypatch.setattr(lab_module, "SLOW", 0.05)
    monkeypatch.setattr(lab_module, "SETTLED", 0.5)
    lab = make(Plate, 0.1)
    assert not lab.slow  # one slow drawing is a cold start
    lab.draw()

    async def drag():
        before = lab.drawings
        for value in range(14, 44):
            lab.controls["shade"].value = value
            await asyncio.sleep(0.02)
            assert "Computing" in lab.busy.value and 'role="status"' in lab.busy.value
        during = lab.drawings - before
        await settled(lab)
        return during, lab.drawings - before

    assert asyncio.run(drag()) == (0, 1)
    assert lab.drawn["shade"] == 43 and lab.busy.value == ""


def test_set_draws_at_once_and_what_waited_is_not_drawn_again(plate):
    async def moves():
        plate.controls["shade"].value = 5
        plate.set(shade=6)
        assert plate.drawn["shade"] == 6
        now = plate.drawings
        await asyncio.sleep(0.15)
        return plate.drawings - now

    assert asyncio.run(moves()) == 0
    with pytest.raises(KeyError, match="no control 'depth'; there are shade, other"):
        plate.set(depth=3)
    plate.controls["shade"].value = 77  # without a loop
    assert plate.drawn["shade"] == 77 and "77" in plate.note.value


def test_the_stored_picture_is_never_behind(plate):
    async def moves():
        first = plate.snapshot()
        plate.controls["shade"].value = 200
        assert plate.snapshot() != first and plate.drawn["shade"] == 200
        assert (plate.shown.picture == 200).all()

    asyncio.run(moves())


@pytest.mark.parametrize(
    "name, value, says", [("shade", 13, "13 is &lt;unlucky&gt;"), ("other", 99, "no other 99")]
)
def test_an_error_is_shown_in_the_picture_s_place_and_the_next_state_recovers(
    plate, name, value, says, caplog
):
    good = plate.set(shade=200).picture.value
    with caplog.at_level(logging.CRITICAL):
        plate.controls[name].value = value
        assert "alert" in plate.busy.value and says in plate.busy.value
        assert plate.picture.value != good and plate.numbers.value == "" and plate.note.value == ""
        assert len(np.unique(decoded(plate.picture.value))) == 1 and plate.drawn is None
        bundle = plate._repr_mimebundle_()
    assert Image.open(io.BytesIO(bundle["image/png"])).format == "PNG" and "Plate" in bundle["text/plain"]
    plate.controls["other"].value = 0
    plate.controls["shade"].value = 200
    assert plate.picture.value == good and plate.busy.value == "" and plate.drawn == plate.state


def test_a_value_that_set_cannot_take_leaves_no_stale_picture(make):
    lab = make(DeltaLab)
    with pytest.raises(Exception, match="(?i)selection|label"):
        lab.set(image=3, label=77)
    assert lab.drawn == lab.state


def test_labs_do_not_disturb_each_other(make, seen):
    one, two = (make(DeltaLab, delta=delta).set(**seen) for delta in (0.9, 0.6))
    still = {lab: lab.picture.value for lab in (two, make(LayerLab).set(**seen), make(CueLab))}
    counts = [lab.drawings for lab in still]
    for value in (0.8, 0.7, 0.6):
        one.set(delta=value)
    assert [lab.drawings for lab in still] == counts
    assert one.picture.value == still[two], "both are now in the same state"
    for lab, picture in still.items():
        control, former = ("alpha" if "alpha" in lab.state else "delta"), lab.state
        assert lab.set(**{control: 0.9}).set(**{control: former[control]}).picture.value == picture


def live_widgets():
    return set(ipywidgets_widget._instances)


@pytest.mark.parametrize("kind", LABS)
def test_a_closed_lab_leaves_nothing_behind(pipeline, kind):
    before = live_widgets()
    lab = kind(pipeline)
    assert len(live_widgets() - before) > 10
    lab.close()
    assert live_widgets() <= before


def test_closing_a_lab_that_waits_to_draw(plate):
    async def moves():
        plate.controls["shade"].value = 3
        plate.close()
        await asyncio.sleep(0.2)

    before = plate.drawings
    asyncio.run(moves())
    assert plate.drawings == before


def test_many_moves_leave_nothing_behind(make):
    labs = [make(DeltaLab), make(FeatureMapLab)]

    def move(count, seed):
        rng = np.random.default_rng(seed)
        for _ in range(count):
            for lab in labs:
                lab.set(image=int(rng.integers(10)), delta=float(rng.choice([0.05, 0.3, 0.5, 0.8, 1.0])))
        gc.collect()
        return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        objects, memory = move(40, seed=0)  # which fills the caches
        widgets = live_widgets()
        more_objects, more_memory = move(60, seed=1)
    finally:
        tracemalloc.stop()
    assert live_widgets() == widgets
    # A picture is 1.3 MB, a JPEG 50 kB.
    assert more_objects < objects + 1500 and more_memory < memory + 2_500_000
    for lab in labs:
        caches = [value.cache_info() for value in vars(lab).values() if hasattr(value, "cache_info")]
        assert caches and all(found.maxsize and found.currsize <= found.maxsize for found in caches)


def test_tables_are_escaped_and_shares_are_percent():
    text = table([["<b>", "x"], ["a & b", 0.1234], ["nan", float("nan")], ["", 1.0]])
    assert all(part in text for part in ("&lt;b&gt;", "a &amp; b", ">12.3<", ">–<", ">100.0<"))
    assert "<b>" not in text and table([]) == ""


@pytest.fixture(scope="module")
def voc_pipeline(voc_tree, tmp_path_factory):
    return Pipeline("voc", "ci", voc_root=voc_tree, store=tmp_path_factory.mktemp("voc-runs"))


def test_voc_images_of_other_sizes(make, voc_pipeline):
    lab = make(DeltaLab, voc_pipeline, delta=0.3)
    drs = with_plain_weights(voc_pipeline, ALL_LAYERS, 0.3)
    val, sizes = voc_pipeline.data.val, set()
    for index in range(len(val)):
        lab.set(image=index)
        picture = decoded(lab.picture.value)
        assert picture.shape == lab.shown.picture.shape and picture.shape[1] == 780
        sizes.add(tuple(val[index][0].shape[1:]))
        ((_, _, maps),) = iterate_maps(drs, val, resize=voc_pipeline.budget.resize, indices=[index])
        agrees(lab, drs, maps=maps, atol=5e-3)
    assert len(sizes) == 3 and all(height != width for height, width in sizes)


@pytest.mark.parametrize("kind", [FeatureMapLab, LayerLab, CueLab, ImageLab])
def test_every_lab_opens_on_voc(make, voc_pipeline, kind):
    lab = make(kind, voc_pipeline).set(image=2)
    assert "alert" not in lab.busy.value and lab.drawn["image"] == 2


def test_in_a_real_kernel_thirty_queued_messages_become_one_drawing(pipeline):
    setup = f"""
from drs_course.stages import Pipeline
from drs_lib.recipes import get_budget
from drs_course.labs import DeltaLab
ci = get_budget("ci")
budget = ci.replace(classify=ci.classify.replace(epochs=10))
lab = DeltaLab(Pipeline("critters", budget, store={str(pipeline.store.root)!r}), image=1, delta=0.9)
lab.set(delta=0.8).set(delta=0.7)"""
    asked = "[lab.controls['delta'].comm.comm_id, lab.drawings, lab.drawn['delta']]"
    with run_kernel(startup_timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}) as client:

        def ask():
            reply = client.execute("", user_expressions={"x": asked}, reply=True, timeout=120)
            return ast.literal_eval(reply["content"]["user_expressions"]["x"]["data"]["text/plain"])

        reply = client.execute(setup, reply=True, timeout=240)
        assert reply["content"]["status"] == "ok", reply["content"]
        handle, before, drawn = ask()
        assert drawn == 0.7
        for value in range(30):
            content = {"method": "update", "state": {"value": 0.1 + value / 100}, "buffer_paths": []}
            client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": handle, "data": content}))
        deadline = time.monotonic() + 60
        while (state := ask())[2] != pytest.approx(0.39):
            assert time.monotonic() < deadline, f"still shows {state}"
        time.sleep(0.3)
        _, after, drawn = ask()
        # One, unless the sender was interrupted for longer than a lab waits.
        assert drawn == pytest.approx(0.39) and 1 <= after - before <= 5
