"""The cue lab: from a localization map and a saliency map to a pseudo segmentation label."""

from dataclasses import replace

import ipywidgets
import numpy as np

from drs_course.labs import networks, pictures
from drs_course.labs.lab import Lab, View, picker, recent, show, slider, switch
from drs_course.labs.scenes import scene
from drs_course.paper import Configuration
from drs_course.plots import overlay, overlay_labels
from drs_lib.crf import INSTALL_HINT, available, dense_crf
from drs_lib.data import IGNORED, without_masks
from drs_lib.labels import BACKGROUND, CONFLICTS, RELEASE_SALIENCY, pseudo_labels
from drs_lib.maps import iterate_maps
from drs_lib.metrics import iou_per_class

# Of a labelled pixel's probability, what its own label gets: the share in use where CRFs clean up labels.
CONFIDENCE = 0.7
CUE_COLORS = {"object": "#E69F00", "background": "#404040", "both": "#CC79A7", "neither": "#C8C8C8"}
BOTH = ("become background", "become object", "are ignored")
CRF_SLIDERS = {
    "gaussian_sxy": ("smoothness: width (px)", 0.5, 10.0, 0.5),
    "gaussian_weight": ("smoothness: weight", 0.0, 10.0, 0.5),
    "bilateral_sxy": ("appearance: width (px)", 1.0, 160.0, 1.0),
    "bilateral_srgb": ("appearance: colours", 1.0, 40.0, 0.5),
    "bilateral_weight": ("appearance: weight", 0.0, 10.0, 0.5),
}


class CueLab(Lab):
    """Object and background cue, pixels that have both or neither, the pseudo label, and a dense CRF on it.

    The maps are those of training images, made as the budget makes them for pseudo labels, of the classifiers
    and the refinement network that are in the run store.

    Args:
        line: the `Pipeline`; its classifier with learnable DRS is trained if it is not in the store.
        image: index of the training image to begin with. images: how many training images can be chosen; on
            Critters their saliency, a network's, is computed at the start.
    """

    title = "Cue lab"
    about = (
        "A pixel has the object cue where a class's map is above α, the background cue where its saliency is "
        "below β. Cues: orange object, dark background, pink both, grey neither, which is ignored. Against "
        "the mask: blue right, orange wrong, grey ignored."
    )

    def __init__(self, line, image=0, images=100):
        super().__init__(line)
        train, budget = line.data.train, line.budget
        self._weak = without_masks(train)
        refined = Configuration(refine=True)
        self._networks = {"DRS": (line.classifier(networks.LEARNABLE), "classifier")}
        if line.has("classify", networks.PLAIN):
            self._networks["CAM"] = (line.classifier(networks.PLAIN), "classifier")
        if line.has("refine", refined):
            self._networks["DRS†, refined"] = (line.refinement_network(refined), "refined")
        self._scene = recent(lambda index: scene(train, index), 8)
        self._maps = recent(self._make_maps, 8)
        self._crf = budget.crf("largefov")
        count = min(max(images, image + 1), len(train))
        if line.data.name == "critters":
            for index in range(count):
                self._weak.saliency(index)
        self.controls = {
            "maps": picker("maps", list(self._networks)),
            "image": slider("image", image, 0, count - 1, 1, "300px"),
            "alpha": slider("threshold α", budget.alpha, 0.0, 0.95, 0.01, "300px"),
            "beta": slider("threshold β", budget.beta, 0.0, 0.4, 0.01, "300px"),
            "rule": picker("rule", [("the paper's", "paper"), ("the release's", "release")], budget.rule),
            "conflict": picker("both cues", list(zip(BOTH, CONFLICTS, strict=True)), budget.conflict),
            "crf": switch("dense CRF", disabled=not available()),
            **{
                name: slider(text, getattr(self._crf, name), low, high, step, "300px", shown=False)
                for name, (text, low, high, step) in CRF_SLIDERS.items()
            },
        }
        self.adjust("rule")
        at = self.controls
        groups = [
            [at["maps"], at["image"]],
            [at["alpha"], at["beta"], at["rule"], at["conflict"], at["crf"]],
            [at[name] for name in CRF_SLIDERS],
        ]
        if not available():
            groups.append([ipywidgets.HTML(INSTALL_HINT)])
        self._build(*groups)

    def _make_maps(self, kind, index):
        model, how = self._networks[kind]
        budget = self.line.budget
        renormalize = budget.renormalize and how == "refined"
        options = {"scales": budget.scales, "resize": budget.resize, "renormalize": renormalize}
        with networks.on_threads(self.line):
            ((_, _, maps),) = iterate_maps(model, self._weak, kind=how, indices=[index], **options)
        saliency = np.asarray(self._weak.saliency(index))
        return maps, saliency.astype(np.float32) / 255 if saliency.dtype == np.uint8 else saliency

    def adjust(self, name):
        at = self.controls
        if name == "maps":
            refined = self._networks[at["maps"].value][1] == "refined"
            at["alpha"].value = self.line.budget.refined_alpha if refined else self.line.budget.alpha
        release = at["rule"].value == "release"
        at["beta"].disabled = at["conflict"].disabled = release
        for control in CRF_SLIDERS:
            show(at[control], at["crf"].value)

    def describe(self, state):
        paper = state["rule"] == "paper"
        rule = (
            f"β = {state['beta']:.2f}, both cues {dict(zip(CONFLICTS, BOTH, strict=True))[state['conflict']]}"
            if paper
            else "the release's rule"
        )
        crf = ", CRF " + " ".join(f"{state[name]:g}" for name in CRF_SLIDERS) if state["crf"] else ""
        return f"training image {state['image']}, {state['maps']}, α = {state['alpha']:.2f}, {rule}{crf}"

    def view(self, state):
        what = self._scene(state["image"])
        maps, saliency = self._maps(state["maps"], state["image"])
        classes = self.line.data.train.num_classes
        label = _pseudo_label(maps, saliency, state)
        title = "pseudo label"
        if state["crf"]:
            label = self._after_crf(label, what, state)
            title = "pseudo label after CRF"
        largest = maps.max(0).values.numpy()
        picture = pictures.sheet(
            [
                [
                    ("mask", overlay_labels(what.picture, what.mask, classes)),
                    ("largest of the maps", overlay(what.picture, largest)),
                    ("saliency", _grey(saliency)),
                ],
                [
                    ("cues", _cues(largest, saliency, state)),
                    (title, overlay_labels(what.picture, label, classes)),
                    ("against the mask", _verdict(what, label)),
                ],
            ]
        )
        return View(picture, self._numbers(label, what), self._note(state, label))

    def _after_crf(self, label, what, state):
        config = replace(self._crf, **{name: state[name] for name in CRF_SLIDERS})
        found = [BACKGROUND, *(index + 1 for _, index in what.classes)]
        if len(found) == 1:
            return label
        refined = dense_crf(label_probabilities(label, found), what.picture, config)
        return np.array(found, np.uint8)[refined.argmax(0)]

    def _numbers(self, label, what):
        """The confusion matrix of this image, its labels as columns, in percent of the mask's pixels."""
        names = {BACKGROUND: "background"} | {index + 1: name for name, index in what.classes}
        scored = ~what.unlabelled
        counts = confusion(label[scored], what.mask[scored], [*names, IGNORED])
        claimed = counts[:-1, :-1].copy()
        claimed[:, 0] += counts[:-1, -1]  # as in the course's tables: ignored counts as background
        iou = iou_per_class(claimed)
        rows = [["truth → label, %", *names.values(), "ignored", "IoU"]]
        for row, name in enumerate(names.values()):
            total = counts[row].sum()
            shares = counts[row] / total if total else np.full(len(counts), np.nan)
            rows.append([name, *map(float, shares), float(iou[row])])
        return rows

    def _note(self, state, label):
        texts = [f"{100 * (label == IGNORED).mean():.1f} % of the image is ignored."]
        if state["rule"] == "release":
            texts.append(f"The release calls background what has saliency of {RELEASE_SALIENCY}/255 or less.")
        if state["crf"]:
            texts.append(
                f"The CRF starts from the pseudo label: {CONFIDENCE:g} for a pixel's label, all labels alike "
                "where it is ignored. (In Table 4 it starts from a segmentation network.)"
            )
        return " ".join(texts)


def label_probabilities(label, found):
    """Where the CRF starts: float32 (len(found), H, W), `CONFIDENCE` for a pixel's label, the rest shared by
    the other labels; uniform where the label is ignored. found: the labels that may come out."""
    count = len(found)
    probabilities = np.full((count, *label.shape), (1 - CONFIDENCE) / (count - 1), np.float32)
    for row, value in enumerate(found):
        probabilities[row][label == value] = CONFIDENCE
    probabilities[:, ~np.isin(label, found)] = 1 / count
    return probabilities


def confusion(label, truth, values):
    """Counts (V, V) of pixels, rows truth, columns label, for V values; other pixels are left out."""
    place = np.full(256, -1)
    place[values] = range(len(values))
    rows, columns = place[truth], place[label]
    known = (rows >= 0) & (columns >= 0)
    size = len(values)
    return np.bincount(rows[known] * size + columns[known], minlength=size * size).reshape(size, size)


def _pseudo_label(maps, saliency, state):
    options = {"rule": state["rule"]}
    if state["rule"] == "paper":
        options |= {"beta": state["beta"], "conflict": state["conflict"]}
    return pseudo_labels(maps[None], saliency[None], state["alpha"], **options)[0].numpy()


def _cues(largest, saliency, state):
    """The two cues that the rule in use sees, and where they meet, in colours (H, W, 3)."""
    if state["rule"] == "release":
        on_object = (largest >= state["alpha"]) & (largest > 0)
        on_background = 255 * saliency <= RELEASE_SALIENCY
    else:
        on_object, on_background = largest > state["alpha"], saliency < state["beta"]
    kinds = np.where(on_object, np.where(on_background, 2, 0), np.where(on_background, 1, 3))
    return np.array([pictures.rgb(color) for color in CUE_COLORS.values()], np.uint8)[kinds]


def _grey(saliency):
    return np.repeat(np.round(255 * saliency).astype(np.uint8)[..., None], 3, 2)


def _verdict(what, label):
    colors = np.full((*label.shape, 3), 0, np.float32)
    right = label == what.mask
    colors[right] = pictures.rgb(pictures.RIGHT)
    colors[~right] = pictures.rgb(pictures.WRONG)
    colors[label == IGNORED] = (200, 200, 200)
    result = 0.35 * what.picture + 0.65 * colors
    result[what.unlabelled] = what.picture[what.unlabelled]
    return np.round(result).astype(np.uint8)
