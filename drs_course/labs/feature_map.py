"""The feature-map lab: Algorithm 1 on one channel of a real feature map."""

from functools import lru_cache

import numpy as np

from drs_course.labs import networks, pictures
from drs_course.labs.lab import Lab, View, picker, slider
from drs_lib.runtime import threads


class FeatureMapLab(Lab):
    """One channel X of a trained plain classifier before and after min(X, δ · X_max), and a cut through its
    maximum.

    Args:
        pipeline: the `Pipeline`; its plain classifier is trained if it is not in the store.
        image: index of the validation image to begin with; it begins with the last activation and there with
            the channel that has the highest maximum. delta: control value.
    """

    title = "Feature-map lab"
    about = (
        "Algorithm 1 on one channel of a feature map of the plain classifier: everything above τ = δ · X_max "
        "is cut off. The map is cut along the row of its maximum."
    )

    def __init__(self, pipeline, image=0, delta=0.55):
        val = pipeline.data.val
        super().__init__(pipeline, val)
        self._model = pipeline.classifier(networks.PLAIN)
        self._features = lru_cache(8)(self._make_features)
        features = self._features(image)
        *_, (place, last) = features.items()
        self.controls = {
            "image": slider("image", image, 0, len(val) - 1, 1),
            "place": picker("activation of", list(features), value=place),
            "channel": slider("channel", int(last.max((1, 2)).argmax()), 0, len(last) - 1, 1),
            "delta": slider("δ", delta, 0.05, 1.0, 0.01, "330px"),
        }
        self._build(["image", "place", "channel"], ["delta"])

    def _make_features(self, index):
        budget = self.pipeline.budget
        with threads(budget.classify.threads):
            return networks.relu_outputs(self._model, self._scene(index).image, budget.resize)

    def adjust(self, name):
        if name == "place":
            at = self.controls
            last = len(self._features(at["image"].value)[at["place"].value]) - 1
            at["channel"].value = min(at["channel"].value, last)
            at["channel"].max = last

    def describe(self, state):
        where = f"{state['place']}, channel {state['channel']}"
        return f"validation image {state['image']}, {where}, δ = {state['delta']:.2f}"

    def view(self, state):
        values = self._features(state["image"])[state["place"]][state["channel"]]
        peak, total = float(values.max()), float(values.sum())
        tau = state["delta"] * peak
        kept = np.minimum(values, tau)
        row = int(values.argmax()) // values.shape[1]
        cut = pictures.heat(values, peak).repeat(8, 0).repeat(8, 1)
        cut[8 * row + 3 : 8 * row + 5] = 255
        panels = {
            "image": self._scene(state["image"]).picture,
            "X, cut along the white row": cut,
            f"min(X, τ), δ = {state['delta']:.2f}": pictures.heat(kept, peak),
        }
        above = pictures.sheet(panels)
        below = pictures.profile_picture(values[row], state["delta"], above.shape[1])
        numbers = [
            ["this channel", ""],
            ["X_max", f"{peak:.3f}"],
            ["τ = δ · X_max", f"{tau:.3f}"],
            ["positions above τ, %", float((values > tau).mean()) if peak > 0 else float("nan")],
            ["of the map's sum cut off, %", 1 - float(kept.sum()) / total if total else float("nan")],
        ]
        note = "" if peak > 0 else "This channel is 0 everywhere on this image: there is nothing to suppress."
        return View(np.concatenate([above, below]), numbers, note)
