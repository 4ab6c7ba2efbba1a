"""The layer lab: DRS plugged into layers and out of them, and what every layer then sees."""

import numpy as np

from drs_course.labs import networks, pictures
from drs_course.labs.lab import Lab, View, picker, recent, slider, switch
from drs_course.labs.scenes import cue_scores, offer_classes, scene, score_table
from drs_course.paper import ALL_LAYERS
from drs_course.plots import layer_mean, overlay

PLAIN, LEARNED = "plain", "learnable"


class LayerLab(Lab):
    """Six check boxes plug DRS in and out; below, the layers' mean features as in Figure 5.

    Plugged into the plain classifier, DRS suppresses at inference, with one delta. With the classifier that
    was trained with learnable DRS in all layers, a check box takes a layer's trained modules out. (Table 2
    trains a network for each choice of layers; the lab does not.)

    Args:
        line: the `Pipeline`; its plain classifier is trained if it is not in the store, the learnable one is
            offered if it is there.
        image: index of the validation image to begin with. layers: the boxes ticked. delta: control value.
    """

    title = "Layer lab"
    about = (
        "Mean features of the six layers, each scaled to its own range, and the localization map: above "
        "without DRS, below with DRS in the layers that are ticked. Each map is divided by its own maximum."
    )

    def __init__(self, line, image=0, layers=(5, 6), delta=0.55):
        super().__init__(line)
        val = line.data.val
        self._dials = {PLAIN: networks.Dial(line.classifier(networks.PLAIN))}
        networks_on_offer = [("plain, DRS at inference", PLAIN)]
        if line.has("classify", networks.LEARNABLE):
            self._dials[LEARNED] = networks.Dial(line.classifier(networks.LEARNABLE))
            networks_on_offer.append(("trained with learnable DRS", LEARNED))
        self._scene = recent(lambda index: scene(val, index), 8)
        self._without = recent(lambda *key: self._look(*key, (1.0,) * 6), 8)
        self.controls = {
            "network": picker("classifier", networks_on_offer),
            "image": slider("image", image, 0, len(val) - 1, 1, "300px"),
            "label": picker("class", self._scene(image).classes),
            **{f"layer{n}": switch(f"layer {n}", n in layers) for n in range(1, 7)},
            "preset": picker("Table 2", ["by hand", *networks.layer_presets()]),
            "delta": slider("δ", delta, 0.05, 1.0, 0.01),
        }
        at = self.controls
        boxes = [at[f"layer{n}"] for n in range(1, 7)]
        self._name_preset()
        self._build([at["network"], at["image"], at["label"]], [*boxes, at["preset"]], [at["delta"]])

    def _look(self, network, index, label, controls):
        """The class's map and every layer's mean features."""
        model, what = self._dials[network].set(controls), self._scene(index)
        features = networks.layer_features(model, what.image, self.line.budget.resize)
        values = networks.class_map(model, what.image, label, self.line.budget.resize)
        return values, [layer_mean(layer) for layer in features]

    def _ticked(self):
        return tuple(n for n in range(1, 7) if self.controls[f"layer{n}"].value)

    def _name_preset(self):
        rows = {layers: label for label, layers in networks.layer_presets().items()}
        self.controls["preset"].value = rows.get(self._ticked(), "by hand")

    def adjust(self, name):
        at = self.controls
        if name == "image":
            offer_classes(at["label"], self._scene(at["image"].value))
        if name == "preset" and at["preset"].value in networks.layer_presets():
            for n in range(1, 7):
                at[f"layer{n}"].value = n in networks.layer_presets()[at["preset"].value]
        if name.startswith("layer"):
            self._name_preset()
        at["delta"].disabled = at["network"].value == LEARNED

    def describe(self, state):
        ticked = [str(n) for n in range(1, 7) if state[f"layer{n}"]]
        control = f", δ = {state['delta']:.2f}" if state["network"] == PLAIN else ""
        kind = "plain classifier" if state["network"] == PLAIN else "classifier trained with learnable DRS"
        where = f"DRS in layers {', '.join(ticked)}" if ticked else "DRS in no layer"
        return f"validation image {state['image']}, {kind}, {where}{control}"

    def view(self, state):
        index, label = state["image"], state["label"]
        what = self._scene(index)
        if label is None:
            return View(pictures.sheet([[("image: it shows none of the classes", what.picture)]]), [])
        ticked = [n for n in range(1, 7) if state[f"layer{n}"]]
        control = state["delta"] if state["network"] == PLAIN else None
        controls = tuple(control if n in ticked else 1.0 for n in range(1, 7))
        with networks.on_threads(self.line):
            without = self._without(state["network"], index, label)
            drs = self._look(state["network"], index, label, controls)
        rows = []
        for name, (values, means) in (("no DRS", without), ("DRS", drs)):
            row = [(f"{name}: map", overlay(what.picture, values))]
            for n, mean in enumerate(means, 1):
                on = n in ticked and name == "DRS"
                row.append((f"layer {n}{', DRS' if on else ''}", pictures.heat(mean)))
            rows.append(row)
        rows = [rows[0][:1] + rows[1][:1] + [_image(what, label)], rows[0][1:], rows[1][1:]]
        big = pictures.sheet(rows[:1])
        small = pictures.sheet(rows[1:], side=(big.shape[1] - 5 * pictures.GAP) // 6, columns=6)
        short = big.shape[1] - small.shape[1]
        small = np.pad(small, ((0, 0), (0, short), (0, 0)), constant_values=255)
        alpha = self.line.budget.alpha
        scores = {
            name: cue_scores(values, what, label, alpha)
            for name, values in (("no DRS", without[0]), ("DRS", drs[0]))
        }
        change = float(np.abs(drs[0] - without[0]).mean())
        rows = [*score_table(scores), ["mean change of the map", "", change]]
        note = f"Scores of the object cue, map > {alpha:g}. {self._row(state['network'], tuple(ticked))}"
        return View(np.concatenate([big, small]), rows, note)

    def _row(self, network, ticked):
        if network == LEARNED and ticked == ALL_LAYERS:
            return "This is the network of Table 2's row 1-6, as it was trained."
        if ticked in networks.layer_presets().values():
            return "A row of Table 2, where a network is trained for it; here DRS is only plugged in or out."
        return "No row of Table 2 has these layers."


def _image(what, label):
    return "image, outline of the mask", pictures.outlined(what.picture, what.on_object(label))
