"""The feature-map lab: Algorithm 1 on one channel of a real feature map."""

import numpy as np

from drs_course.labs import networks, pictures
from drs_course.labs.lab import Lab, View, picker, recent, slider
from drs_course.labs.scenes import scene


class FeatureMapLab(Lab):
    """One channel X of a trained plain classifier before and after min(X, δ · X_max), and a cut through its
    maximum.

    Args:
        line: the `Pipeline`; its plain classifier is trained if it is not in the store.
        image: index of the validation image to begin with. place: the activation, such as "layer 5, second";
        None: the last one. channel: None: the one with the highest maximum. delta: control value.
    """

    title = "Feature-map lab"
    about = (
        "Algorithm 1 on one channel of a feature map of the plain classifier: everything above τ = δ · X_max "
        "is cut off. The map is cut along the row of its maximum."
    )

    def __init__(self, line, image=0, place=None, channel=None, delta=0.55):
        super().__init__(line)
        val = line.data.val
        self._model = line.classifier(networks.PLAIN)
        self._scene = recent(lambda index: scene(val, index), 8)
        self._features = recent(self._make_features, 8)
        features = self._features(image)
        place = place or list(features)[-1]
        if place not in features:
            raise ValueError(f"place is {place!r}; expected one of {', '.join(map(repr, features))}.")
        if channel is None:
            channel = int(features[place].max((1, 2)).argmax())
        self.controls = {
            "image": slider("image", image, 0, len(val) - 1, 1, "300px"),
            "place": picker("activation of", list(features), place),
            "channel": slider("channel", channel, 0, len(features[place]) - 1, 1, "300px"),
            "delta": slider("δ", delta, 0.05, 1.0, 0.01),
        }
        self._build([self.controls[name] for name in ("image", "place", "channel")], [self.controls["delta"]])

    def _make_features(self, index):
        with networks.on_threads(self.line):
            found = networks.before_activations(
                self._model, self._scene(index).image, self.line.budget.resize
            )
        return {place: features.clip(0) for place, features in found.items()}

    def adjust(self, name):
        if name == "place":
            at = self.controls
            last = len(self._features(at["image"].value)[at["place"].value]) - 1
            at["channel"].value = min(at["channel"].value, last)
            at["channel"].max = last

    def describe(self, state):
        return (
            f"validation image {state['image']}, {state['place']}, channel {state['channel']}, "
            f"δ = {state['delta']:.2f}"
        )

    def view(self, state):
        values = self._features(state["image"])[state["place"]][state["channel"]]
        peak = float(values.max())
        tau = state["delta"] * peak
        kept = np.minimum(values, tau)
        row = int(values.argmax()) // values.shape[1]
        marked = pictures.heat(values, peak)
        cut = np.repeat(marked, 8, 0).repeat(8, 1)
        cut[8 * row + 3 : 8 * row + 5] = 255
        picture = np.concatenate(
            [
                pictures.sheet(
                    [
                        [
                            ("image", self._scene(state["image"]).picture),
                            ("X, cut along the white row", cut),
                            (f"min(X, τ), δ = {state['delta']:.2f}", pictures.heat(kept, peak)),
                        ]
                    ]
                ),
                pictures.profile_picture(values[row], state["delta"], 3 * pictures.SIDE + 2 * pictures.GAP),
            ]
        )
        total = float(values.sum())
        numbers = [
            ["this channel", ""],
            ["X_max", f"{peak:.3f}"],
            ["τ = δ · X_max", f"{tau:.3f}"],
            ["positions above τ, %", float((values > tau).mean()) if peak > 0 else float("nan")],
            ["of the map's sum cut off, %", 1 - float(kept.sum()) / total if total else float("nan")],
        ]
        note = "" if peak > 0 else "This channel is 0 everywhere on this image: there is nothing to suppress."
        return View(picture, numbers, note)
