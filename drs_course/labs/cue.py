"""The cue lab: from a localization map and a saliency map to a pseudo segmentation label."""

from functools import lru_cache

import ipywidgets
import numpy as np

from drs_course.labs import networks, pictures
from drs_course.labs.lab import Lab, View, picker, slider, switch
from drs_course.paper import Configuration
from drs_course.plots import overlay, overlay_labels
from drs_course.plots.colors import painted, rgb
from drs_lib.crf import INSTALL_HINT, available, dense_crf
from drs_lib.data import IGNORED, without_masks
from drs_lib.labels import BACKGROUND, CONFLICTS, RELEASE_SALIENCY, pseudo_labels
from drs_lib.maps import iterate_maps
from drs_lib.method import label_rule, map_options
from drs_lib.metrics import iou_per_class
from drs_lib.networks import RefinementNetwork
from drs_lib.runtime import threads

# Of a labelled pixel's probability, what its own label gets: the share in use where CRFs clean up labels.
CONFIDENCE = 0.7
CUE_COLORS = {"neither": "#C8C8C8", "object": "#E69F00", "background": "#404040", "both": "#CC79A7"}
BOTH = dict(zip(CONFLICTS, ("become background", "become object", "are ignored"), strict=True))


class CueLab(Lab):
    """Object and background cue, pixels that have both or neither, the pseudo label, and a dense CRF on it.

    The maps are those of training images, made as the budget makes them for pseudo labels, of the classifiers
    and the refinement network that are in the run store.

    Args:
        pipeline: the `Pipeline`; its classifier with learnable DRS is trained if it is not in the store.
        image: index of the training image to begin with. images: how many training images can be chosen; on
            Critters their saliency, a network's, is computed at the start.
    """

    title = "Cue lab"
    about = (
        "A pixel has the object cue where a class's map is above α, the background cue where its saliency is "
        "below β. Cues: orange object, dark background, pink both, grey neither, which is ignored. Against "
        "the mask: blue right, orange wrong, grey ignored."
    )

    def __init__(self, pipeline, image=0, images=100):
        train, budget = pipeline.data.train, pipeline.budget
        super().__init__(pipeline, train)
        self._weak = without_masks(train)
        refined = Configuration(refine=True)
        self._networks = {"DRS": pipeline.classifier(networks.LEARNABLE)}
        if pipeline.has("classify", networks.PLAIN):
            self._networks["CAM"] = pipeline.classifier(networks.PLAIN)
        if pipeline.has("refine", refined):
            self._networks["DRS†, refined"] = pipeline.refinement_network(refined)
        self._maps = lru_cache(8)(self._make_maps)
        self._crf = budget.crf("largefov")
        count = min(max(images, image + 1), len(train))
        if pipeline.data.name == "critters":
            for index in range(count):
                self._weak.saliency(index)
        rules = [("the paper's", "paper"), ("the release's", "release")]
        self.controls = {
            "maps": picker("maps", list(self._networks)),
            "image": slider("image", image, 0, count - 1, 1),
            "alpha": slider("threshold α", budget.alpha, 0.0, 0.95, 0.01),
            "beta": slider("threshold β", budget.beta, 0.0, 0.4, 0.01),
            "rule": picker("rule", rules, value=budget.rule),
            "conflict": picker("both cues", [(BOTH[c], c) for c in CONFLICTS], value=budget.conflict),
            "crf": switch("dense CRF", disabled=not available()),
        }
        hint = [] if available() else [[ipywidgets.HTML(INSTALL_HINT)]]
        self._build(["maps", "image"], ["alpha", "beta", "rule", "conflict", "crf"], *hint)

    def _is_refined(self, name):
        return isinstance(self._networks[name], RefinementNetwork)

    def _make_maps(self, name, index):
        """Maps (C, H, W) and saliency (H, W), floats in [0, 1], of an image."""
        budget = self.pipeline.budget
        options = map_options(budget, self._is_refined(name))
        with threads(budget.classify.threads):
            ((_, _, maps),) = iterate_maps(self._networks[name], self._weak, indices=[index], **options)
        saliency = np.asarray(self._weak.saliency(index))
        return maps, saliency.astype(np.float32) / 255 if saliency.dtype == np.uint8 else saliency

    def adjust(self, name):
        at = self.controls
        if name == "maps":
            at["alpha"].value = label_rule(self.pipeline.budget, self._is_refined(at["maps"].value))["alpha"]
        at["beta"].disabled = at["conflict"].disabled = at["rule"].value == "release"

    def describe(self, state):
        rule = "the release's rule"
        if state["rule"] == "paper":
            rule = f"β = {state['beta']:.2f}, both cues {BOTH[state['conflict']]}"
        crf = ", CRF" if state["crf"] else ""
        return f"training image {state['image']}, {state['maps']}, α = {state['alpha']:.2f}, {rule}{crf}"

    def view(self, state):
        what = self._scene(state["image"])
        maps, saliency = self._maps(state["maps"], state["image"])
        classes = self.pipeline.data.train.num_classes
        # The release's rule has neither of the paper's choices.
        rule = {name: state[name] for name in ("beta", "conflict")} if state["rule"] == "paper" else {}
        rule["rule"] = state["rule"]
        label = pseudo_labels(maps[None], saliency[None], state["alpha"], **rule)[0].numpy()
        title = "pseudo label"
        if state["crf"]:
            label, title = self._after_crf(label, what), "pseudo label after CRF"
        largest = maps.max(0).values.numpy()
        grey = np.round(255 * saliency).astype(np.uint8)[..., None].repeat(3, 2)
        picture = pictures.sheet(
            {
                "mask": overlay_labels(what.picture, what.mask, classes),
                "largest of the maps": overlay(what.picture, largest),
                "saliency": grey,
            },
            {
                "cues": _cues(largest, saliency, state),
                title: overlay_labels(what.picture, label, classes),
                "against the mask": _verdict(what, label),
            },
        )
        return View(picture, _numbers(label, what), _note(state, label))

    def _after_crf(self, label, what):
        found = np.array([BACKGROUND, *(index + 1 for _, index in what.classes)], np.uint8)
        if len(found) == 1:
            return label
        own = label == found[:, None, None]
        start = np.where(own, CONFIDENCE, (1 - CONFIDENCE) / (len(found) - 1))
        start[:, ~own.any(0)] = 1 / len(found)  # all labels alike where it is ignored
        return found[dense_crf(start.astype(np.float32), what.picture, self._crf).argmax(0)]


def _numbers(label, what):
    """The confusion matrix of this image, its labels as columns, in percent of the mask's pixels."""
    names = {BACKGROUND: "background"} | {index + 1: name for name, index in what.classes}
    found = [*names, IGNORED]
    counts = np.array([np.bincount(label[what.mask == value], minlength=256)[found] for value in names])
    claimed = counts[:, :-1].copy()
    claimed[:, 0] += counts[:, -1]  # as in the course's tables: ignored counts as background
    rows = [["truth → label, %", *names.values(), "ignored", "IoU"]]
    for name, of_truth, iou in zip(names.values(), counts, iou_per_class(claimed), strict=True):
        shares = of_truth / of_truth.sum() if of_truth.any() else np.full(len(found), np.nan)
        rows.append([name, *map(float, shares), float(iou)])
    return rows


def _note(state, label):
    texts = [f"{100 * (label == IGNORED).mean():.1f} % of the image is ignored."]
    if state["rule"] == "release":
        texts.append(f"The release calls background what has saliency of {RELEASE_SALIENCY}/255 or less.")
    if state["crf"]:
        texts.append(
            f"The CRF starts from the pseudo label: {CONFIDENCE:g} for a pixel's label, all labels alike "
            "where it is ignored. (In Table 4 it starts from a segmentation network.)"
        )
    return " ".join(texts)


def _cues(largest, saliency, state):
    """The two cues that the rule in use sees, and where they meet, in colours (H, W, 3)."""
    if state["rule"] == "release":
        on_object = (largest >= state["alpha"]) & (largest > 0)
        on_background = 255 * saliency <= RELEASE_SALIENCY
    else:
        on_object, on_background = largest > state["alpha"], saliency < state["beta"]
    return rgb(*CUE_COLORS.values())[on_object + 2 * on_background]


def _verdict(what, label):
    """A label against the mask, over the image; what the mask leaves open stays as it is."""
    kinds = np.select([what.unlabelled, label == IGNORED, label == what.mask], [0, 3, 1], 2)
    return painted(what.picture, kinds, rgb("black", pictures.RIGHT, pictures.WRONG, "#C8C8C8"), 0.65)
