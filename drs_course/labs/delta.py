"""The delta lab: what a cap on every feature map does to a localization map and to the object cue."""

import ipywidgets

from drs_course.labs import networks, pictures
from drs_course.labs.lab import Lab, View, picker, recent, show, slider, switch
from drs_course.labs.scenes import cue_scores, offer_classes, scene, score_table
from drs_course.paper import ALL_LAYERS, Configuration
from drs_course.plots import overlay

INFERENCE, TRAINED = "at inference", "trained"
BY_HAND = "by hand"
CAM_CONTROLS = (1.0,) * 6  # a ReLU in every layer: CAM


class DeltaLab(Lab):
    """CAM against DRS on one image while delta is dragged.

    "At inference" caps the maps of the plain classifier, which was trained without DRS: one delta for all
    layers, or one for each. "Trained" switches between the classifiers of Table 1 that are in the run store.

    Args:
        line: the `Pipeline`, as `drs_course.notebook.open_course` returns it. Its plain classifier is trained
            if it is not in the store; the others are only read.
        image: index of the validation image to begin with.
        delta: control value to begin with.
    """

    title = "Delta lab"
    about = (
        "The localization map of one class without DRS (CAM) and with it. Smaller δ suppresses more, δ = 1 "
        "is CAM. Difference: orange where DRS is higher, violet where it is lower. Object cue, map > α: blue "
        "right, orange wrong, yellow missed. Each map is divided by its own maximum."
    )

    def __init__(self, line, image=0, delta=0.55):
        super().__init__(line)
        budget, val = line.budget, line.data.val
        self._dial = networks.Dial(line.classifier(networks.PLAIN))
        self._deltas = networks.trained_deltas(line)
        self._learnable = line.has("classify", networks.LEARNABLE)
        mini = budget.classify.backbone == "mini"
        self._trained = recent(lambda what: networks.stored_classifier(line, what), 12 if mini else 1)
        self._scene = recent(lambda index: scene(val, index), 8)
        self._map = recent(self._make_map, 16)
        nearest = {"value": min(self._deltas, key=lambda stored: abs(stored - delta))} if self._deltas else {}
        modes = [("suppress at inference: plain classifier", INFERENCE)]
        modes.append(("trained with DRS: Table 1's classifiers", TRAINED))
        self.controls = {
            "mode": picker("mode", modes),
            "image": slider("image", image, 0, len(val) - 1, 1, "300px"),
            "label": picker("class", self._scene(image).classes),
            "delta": slider("δ", delta, 0.05, 1.0, 0.01),
            "trained": ipywidgets.SelectionSlider(
                options=[(f"{stored:.2f}", stored) for stored in self._deltas] or [("none", 0.0)],
                **nearest,
                description="δ in training",
                style={"description_width": "initial"},
                layout={"width": "330px", "display": "none"},
            ),
            "learnable": switch("learnable controller", disabled=not self._learnable, shown=False),
            "per_layer": switch("one δ per layer"),
            "preset": picker("DRS in", [BY_HAND, *networks.layer_presets()], shown=False),
            **{
                f"layer{n}": slider(f"δ, layer {n}", delta, 0.05, 1.0, 0.01, "300px", shown=False)
                for n in range(1, 7)
            },
            "alpha": slider("threshold α", budget.alpha, 0.0, 0.95, 0.01, "300px"),
        }
        at = self.controls
        layers = [at[f"layer{n}"] for n in range(1, 7)]
        self._build(
            [at["mode"], at["image"], at["label"]],
            [at["delta"], at["trained"], at["learnable"], at["per_layer"], at["preset"]],
            layers,
            [at["alpha"]],
        )

    def _make_map(self, source, index, label):
        """source: six control values for the plain classifier, or the configuration of a trained one."""
        trained = isinstance(source, Configuration)
        model = self._trained(source) if trained else self._dial.set(source)
        with networks.on_threads(self.line):
            return networks.class_map(model, self._scene(index).image, label, self.line.budget.resize)

    def adjust(self, name):
        at = self.controls
        if name == "image":
            offer_classes(at["label"], self._scene(at["image"].value))
        layers = [at[f"layer{n}"] for n in range(1, 7)]
        if name == "per_layer":
            at["preset"].value = next(
                label for label, plugged in networks.layer_presets().items() if plugged == ALL_LAYERS
            )
        if name in ("preset", "per_layer", "delta") and at["preset"].value != BY_HAND:
            plugged = networks.layer_presets()[at["preset"].value]
            for n, control in enumerate(layers, 1):
                control.value = at["delta"].value if n in plugged else 1.0
        if name.startswith("layer"):
            at["preset"].value = BY_HAND
        trained, each = at["mode"].value == TRAINED, at["per_layer"].value
        at["delta"].disabled = each and at["preset"].value == BY_HAND
        show(at["learnable"], trained)
        show(at["delta"], not trained)
        show(at["trained"], trained and not at["learnable"].value)
        show(at["per_layer"], not trained)
        for control in (at["preset"], *layers):
            show(control, not trained and each)

    def describe(self, state):
        what = self._scene(state["image"])
        label = next((name for name, index in what.classes if index == state["label"]), "none")
        control, alpha = self._control(state), state["alpha"]
        return f"validation image {state['image']}, class {label}, {control}, α = {alpha:.2f}"

    def _control(self, state):
        if state["mode"] == TRAINED:
            if state["learnable"] and self._learnable:
                return "trained with the learnable controller"
            return "nothing trained" if not state["trained"] else f"trained with δ = {state['trained']:.2f}"
        if not state["per_layer"]:
            return f"δ = {state['delta']:.2f} at inference"
        return "δ at inference, layers 1-6: " + " ".join(f"{d:.2f}" for d in _deltas(state))

    def _source(self, state):
        """What the right-hand map is of, see `_make_map`; the plain classifier's where nothing is trained."""
        if state["mode"] == INFERENCE:
            return _deltas(state)
        if state["learnable"] and self._learnable:
            return networks.LEARNABLE
        return CAM_CONTROLS if not state["trained"] else Configuration(delta=state["trained"])

    def view(self, state):
        index, label, alpha = state["image"], state["label"], state["alpha"]
        what = self._scene(index)
        note = self._note(state)
        if label is None:
            return View(pictures.sheet([[("image: it shows none of the classes", what.picture)]]), [], note)
        cam, drs = (self._map(source, index, label) for source in (CAM_CONTROLS, self._source(state)))
        on_object = what.on_object(label)
        cues = [
            pictures.compared_cue(what.picture, values > alpha, on_object, what.unlabelled)
            for values in (cam, drs)
        ]
        picture = pictures.sheet(
            [
                [
                    ("image, outline of the mask", pictures.outlined(what.picture, on_object)),
                    ("CAM", overlay(what.picture, cam)),
                    (f"DRS, {self._short(state)}", overlay(what.picture, drs)),
                ],
                [
                    ("DRS minus CAM", pictures.difference(drs - cam)),
                    ("cue of CAM", cues[0]),
                    ("cue of DRS", cues[1]),
                ],
            ]
        )
        scores = {
            name: cue_scores(values, what, label, alpha) for name, values in (("CAM", cam), ("DRS", drs))
        }
        return View(picture, score_table(scores), note)

    def _note(self, state):
        if state["mode"] == INFERENCE:
            return (
                "The plain classifier, trained without DRS; the cap is put on while it looks at this image. "
                "Whether a network learns from the cap is the other mode's question."
            )
        if self._source(state) is CAM_CONTROLS:
            return (
                "The run store has no classifier of Table 1 yet, so the right-hand map is CAM's. Run "
                "notebook 03, or make course, and then this cell again."
            )
        missing = "" if self._learnable else " The learnable one is not in the run store."
        return (
            "Classifiers that were trained with this controller in all six layers, from the run store. "
            f"Nothing is trained here.{missing}"
        )

    def _short(self, state):
        if state["mode"] == TRAINED:
            if state["learnable"] and self._learnable:
                return "learnable"
            return "none trained" if not state["trained"] else f"trained, δ = {state['trained']:.2f}"
        return "δ per layer" if state["per_layer"] else f"δ = {state['delta']:.2f}"


def _deltas(state):
    if state["per_layer"]:
        return tuple(state[f"layer{n}"] for n in range(1, 7))
    return (state["delta"],) * 6
