"""The delta lab: what a cap on every feature map does to a localization map and to the object cue."""

from functools import lru_cache

import ipywidgets

from drs_course.labs import networks, pictures
from drs_course.labs.lab import LABEL, Lab, View, picker, show, slider, switch
from drs_course.labs.scenes import score_table
from drs_course.paper import ALL_LAYERS, Configuration
from drs_course.plots import overlay
from drs_course.plots.colors import outlined
from drs_lib.runtime import threads

INFERENCE, TRAINED = "at inference", "trained"
BY_HAND = "by hand"
CAM_CONTROLS = (1.0,) * 6  # a ReLU in every layer: CAM
LAYERS = [f"layer{n}" for n in ALL_LAYERS]


class DeltaLab(Lab):
    """CAM against DRS on one image while delta is dragged.

    "At inference" caps the maps of the plain classifier, which was trained without DRS: one delta for all
    layers, or one for each. "Trained" switches between the classifiers of Table 1 that are in the run store.

    Args:
        pipeline: the `Pipeline`, as `drs_course.notebook.open_course` returns it. Its plain classifier is
            trained if it is not in the store; the others are only read.
        image: index of the validation image to begin with. delta: control value to begin with.
    """

    title = "Delta lab"
    about = (
        "The localization map of one class without DRS (CAM) and with it. Smaller δ suppresses more, δ = 1 "
        "is CAM. Difference: orange where DRS is higher, violet where it is lower. Object cue, map > α: blue "
        "right, orange wrong, yellow missed. Each map is divided by its own maximum."
    )

    def __init__(self, pipeline, image=0, delta=0.55):
        budget, val = pipeline.budget, pipeline.data.val
        super().__init__(pipeline, val)
        self._dial = networks.Dial(pipeline.classifier(networks.PLAIN))
        self._learnable = pipeline.has("classify", networks.LEARNABLE)
        kept = 12 if budget.classify.backbone == "mini" else 1
        self._trained = lru_cache(kept)(lambda configuration: networks.stored(pipeline, configuration))
        self._map = lru_cache(16)(self._make_map)
        deltas = networks.trained_deltas(pipeline)
        trained = [(f"{stored:.2f}", stored) for stored in deltas] or [("none", 0.0)]
        modes = [("suppress at inference: plain classifier", INFERENCE)]
        modes.append(("trained with DRS: Table 1's classifiers", TRAINED))
        self.controls = {
            "mode": picker("mode", modes),
            "image": slider("image", image, 0, len(val) - 1, 1),
            "label": picker("class", self._scene(image).classes),
            "delta": slider("δ", delta, 0.05, 1.0, 0.01, "330px"),
            "trained": ipywidgets.SelectionSlider(
                options=trained,
                value=min((stored for _, stored in trained), key=lambda stored: abs(stored - delta)),
                description="δ in training",
                style=LABEL,
                layout={"width": "330px"},
            ),
            "learnable": switch("learnable controller", disabled=not self._learnable),
            "per_layer": switch("one δ per layer"),
            "preset": picker("DRS in", [BY_HAND, *networks.PRESETS]),
            **{name: slider(f"δ, layer {name[-1]}", delta, 0.05, 1.0, 0.01) for name in LAYERS},
            "alpha": slider("threshold α", budget.alpha, 0.0, 0.95, 0.01),
        }
        switches = ["delta", "trained", "learnable", "per_layer", "preset"]
        self._build(["mode", "image", "label"], switches, LAYERS, ["alpha"])

    def _make_map(self, source, index, label):
        """source: six control values for the plain classifier, or the configuration of a trained one."""
        trained, budget = isinstance(source, Configuration), self.pipeline.budget
        model = self._trained(source) if trained else self._dial.set(source)
        with threads(budget.classify.threads):
            (values,) = networks.class_maps(model, self._scene(index).image, [label], budget.resize)
        return values

    def adjust(self, name):
        at = self.controls
        if name == "per_layer":
            at["preset"].value = next(row for row, layers in networks.PRESETS.items() if layers == ALL_LAYERS)
        if name in ("preset", "per_layer", "delta") and at["preset"].value != BY_HAND:
            for n, layer in enumerate(LAYERS, 1):
                at[layer].value = at["delta"].value if n in networks.PRESETS[at["preset"].value] else 1.0
        if name in LAYERS:
            at["preset"].value = BY_HAND
        trained, each = at["mode"].value == TRAINED, at["per_layer"].value
        at["delta"].disabled = each and at["preset"].value == BY_HAND
        show(at["learnable"], trained)
        show(at["trained"], trained and not at["learnable"].value)
        for control in ("delta", "per_layer"):
            show(at[control], not trained)
        for control in ("preset", *LAYERS):
            show(at[control], each and not trained)

    def _right(self, state):
        """What the right-hand map is of: (its source, see `_make_map`; that in words; in few words)."""
        delta = state["delta"]
        if state["mode"] == INFERENCE and state["per_layer"]:
            deltas = tuple(state[layer] for layer in LAYERS)
            words = "δ at inference, layers 1-6: " + " ".join(f"{d:.2f}" for d in deltas)
            return deltas, words, "δ per layer"
        if state["mode"] == INFERENCE:
            return (delta,) * 6, f"δ = {delta:.2f} at inference", f"δ = {delta:.2f}"
        if state["learnable"] and self._learnable:
            return networks.LEARNABLE, "trained with the learnable controller", "learnable"
        if not state["trained"]:
            return CAM_CONTROLS, "nothing trained", "none trained"
        delta = f"δ = {state['trained']:.2f}"
        return Configuration(delta=state["trained"]), f"trained with {delta}", f"trained, {delta}"

    def describe(self, state):
        what = self._scene(state["image"])
        label = next((name for name, index in what.classes if index == state["label"]), "none")
        _, words, _ = self._right(state)
        return f"validation image {state['image']}, class {label}, {words}, α = {state['alpha']:.2f}"

    def view(self, state):
        index, label, alpha = state["image"], state["label"], state["alpha"]
        what, (source, _, short) = self._scene(index), self._right(state)
        note = self._note(state, source)
        if label is None:
            return View(pictures.sheet({pictures.NO_CLASS: what.picture}), [], note)
        cam, drs = (self._map(one, index, label) for one in (CAM_CONTROLS, source))
        on_object = what.on_object(label)
        cues = [
            pictures.compared_cue(what.picture, values > alpha, on_object, what.unlabelled)
            for values in (cam, drs)
        ]
        picture = pictures.sheet(
            {
                "image, outline of the mask": outlined(what.picture, on_object),
                "CAM": overlay(what.picture, cam),
                f"DRS, {short}": overlay(what.picture, drs),
            },
            {
                "DRS minus CAM": pictures.difference(drs - cam),
                "cue of CAM": cues[0],
                "cue of DRS": cues[1],
            },
        )
        return View(picture, score_table({"CAM": cam, "DRS": drs}, what, label, alpha), note)

    def _note(self, state, source):
        if state["mode"] == INFERENCE:
            return (
                "The plain classifier, trained without DRS; the cap is put on while it looks at this image. "
                "Whether a network learns from the cap is the other mode's question."
            )
        if source is CAM_CONTROLS:
            return (
                "The run store has no classifier of Table 1 yet, so the right-hand map is CAM's. Run "
                "notebook 03, or make course, and then this cell again."
            )
        missing = "" if self._learnable else " The learnable one is not in the run store."
        return (
            "Classifiers that were trained with this controller in all six layers, from the run store. "
            f"Nothing is trained here.{missing}"
        )
