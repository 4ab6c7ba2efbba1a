"""The layer lab: DRS plugged into layers and out of them, and what every layer then sees."""

from functools import lru_cache

import numpy as np

from drs_course.labs import networks, pictures
from drs_course.labs.lab import Lab, View, picker, slider, switch
from drs_course.labs.scenes import score_table
from drs_course.paper import ALL_LAYERS
from drs_course.plots import layer_mean, overlay
from drs_course.plots.colors import outlined
from drs_lib.runtime import threads

PLAIN, LEARNED = "plain", "learnable"


class LayerLab(Lab):
    """Six check boxes plug DRS in and out; below, the layers' mean features as in Figure 5.

    Plugged into the plain classifier, DRS suppresses at inference, with one delta. With the classifier that
    was trained with learnable DRS in all layers, a check box takes a layer's trained modules out. (Table 2
    trains a network for each choice of layers; the lab does not.)

    Args:
        pipeline: the `Pipeline`; its plain classifier is trained if it is not in the store, the learnable one
            is offered if it is there.
        image: index of the validation image to begin with. layers: the boxes ticked. delta: control value.
    """

    title = "Layer lab"
    about = (
        "Mean features of the six layers, each scaled to its own range, and the localization map: above "
        "without DRS, below with DRS in the layers that are ticked. Each map is divided by its own maximum."
    )

    def __init__(self, pipeline, image=0, layers=(5, 6), delta=0.55):
        val = pipeline.data.val
        super().__init__(pipeline, val)
        self._dials = {PLAIN: networks.Dial(pipeline.classifier(networks.PLAIN))}
        on_offer = [("plain, DRS at inference", PLAIN)]
        if pipeline.has("classify", networks.LEARNABLE):
            self._dials[LEARNED] = networks.Dial(pipeline.classifier(networks.LEARNABLE))
            on_offer.append(("trained with learnable DRS", LEARNED))
        self._without = lru_cache(8)(lambda *key: self._look(*key, (1.0,) * 6))
        boxes = {f"layer{n}": switch(f"layer {n}", n in layers) for n in ALL_LAYERS}
        self.controls = {
            "network": picker("classifier", on_offer),
            "image": slider("image", image, 0, len(val) - 1, 1),
            "label": picker("class", self._scene(image).classes),
            **boxes,
            "preset": picker("Table 2", ["by hand", *networks.PRESETS]),
            "delta": slider("δ", delta, 0.05, 1.0, 0.01, "330px"),
        }
        self._build(["network", "image", "label"], [*boxes, "preset"], ["delta"])

    def _look(self, network, index, label, controls):
        """The class's map and every layer's mean features."""
        model, image, resize = self._dials[network], self._scene(index).image, self.pipeline.budget.resize
        model = model.set(controls)
        (values,) = networks.class_maps(model, image, [label], resize)
        return values, [layer_mean(layer) for layer in networks.layer_features(model, image, resize)]

    def adjust(self, name):
        at = self.controls
        if name == "preset" and at["preset"].value in networks.PRESETS:
            for n in ALL_LAYERS:
                at[f"layer{n}"].value = n in networks.PRESETS[at["preset"].value]
        if not name or name.startswith("layer"):
            rows = {layers: row for row, layers in networks.PRESETS.items()}
            at["preset"].value = rows.get(_ticked(self.state), "by hand")
        at["delta"].disabled = at["network"].value == LEARNED

    def describe(self, state):
        ticked = ", ".join(map(str, _ticked(state)))
        control = f", δ = {state['delta']:.2f}" if state["network"] == PLAIN else ""
        kind = "plain classifier" if state["network"] == PLAIN else "classifier trained with learnable DRS"
        where = f"DRS in layers {ticked}" if ticked else "DRS in no layer"
        return f"validation image {state['image']}, {kind}, {where}{control}"

    def view(self, state):
        network, index, label, ticked = state["network"], state["image"], state["label"], _ticked(state)
        what, budget = self._scene(index), self.pipeline.budget
        if label is None:
            return View(pictures.sheet({pictures.NO_CLASS: what.picture}), [])
        control = state["delta"] if network == PLAIN else None
        controls = [control if n in ticked else 1.0 for n in ALL_LAYERS]
        with threads(budget.classify.threads):
            before, means_before = self._without(network, index, label)
            after, means_after = self._look(network, index, label, controls)
        large = {
            "no DRS: map": overlay(what.picture, before),
            "DRS: map": overlay(what.picture, after),
            "image, outline of the mask": outlined(what.picture, what.on_object(label)),
        }
        names = {n: f"layer {n}, DRS" if n in ticked else f"layer {n}" for n in ALL_LAYERS}
        small = (
            {f"layer {n}": pictures.heat(mean) for n, mean in enumerate(means_before, 1)},
            {names[n]: pictures.heat(mean) for n, mean in enumerate(means_after, 1)},
        )
        above = pictures.sheet(large)
        below = pictures.sheet(*small, side=(above.shape[1] - 5 * pictures.GAP) // 6)
        below = np.pad(below, ((0, 0), (0, above.shape[1] - below.shape[1]), (0, 0)), constant_values=255)
        numbers = score_table({"no DRS": before, "DRS": after}, what, label, budget.alpha)
        numbers.append(["mean change of the map", "", float(np.abs(after - before).mean())])
        note = f"Scores of the object cue, map > {budget.alpha:g}. {_row(network, ticked)}"
        return View(np.concatenate([above, below]), numbers, note)


def _ticked(state):
    return tuple(n for n in ALL_LAYERS if state[f"layer{n}"])


def _row(network, ticked):
    if network == LEARNED and ticked == ALL_LAYERS:
        return "This is the network of Table 2's row 1-6, as it was trained."
    if ticked in networks.PRESETS.values():
        return "A row of Table 2, where a network is trained for it; here DRS is only plugged in or out."
    return "No row of Table 2 has these layers."
