"""The lab for an image of one's own: what the classifier sees in it, and where."""

from typing import NamedTuple

import ipywidgets
import numpy as np
import torch

from drs_lib.data.voc import VOC_CLASSES
from drs_lib.networks import classifier
from drs_lib.paper import ALL_LAYERS
from drs_lib.pipeline import STAGE_VERSIONS
from drs_lib.plots import overlay
from drs_lib.widgets import networks, pictures
from drs_lib.widgets.lab import Lab, View, picker, recent, slider
from drs_lib.widgets.upload import FORMATS, MOST_BYTES, ImageRefused, read_image

DRAWN, OWN = "drawn", "own"
PLAIN, DRS = "CAM (plain classifier)", "DRS (learnable)"
LONGEST = 500  # pixels: the longer side of VOC's images, to which a photograph is reduced
MAPS = 2  # shown at most
VOC_SIDE = 320  # the release's size of the images from which maps are made


class ImageLab(Lab):
    """Localization maps of the classes that are predicted for an uploaded image, or for one of the data set.

    A photograph is given to a VOC classifier: the run's own where it runs on VOC, else one that was trained
    from ImageNet weights and lies in the run store. Without one it goes to the Critters classifier, and the
    lab says what that is worth.

    Args:
        line: the `Pipeline`; its plain classifier is trained if it is not in the store.
        image: index of the validation image to begin with.
    """

    title = "Your own image"
    about = (
        "What a classifier sees in an image, and the localization maps of the classes to which it gives 50 % "
        f"or more, {MAPS} at most; of the likeliest class where it gives none that much."
    )

    def __init__(self, line, image=0):
        super().__init__(line)
        val = line.data.val
        self._own = _of_line(line)
        self._voc = self._own if line.data.name == "voc" else _voc_classifiers(line.store)
        self._image = recent(lambda index: val[index][0].permute(1, 2, 0).contiguous().numpy(), 8)
        self._uploaded, self._refused = None, ""
        self.upload = ipywidgets.FileUpload(
            accept=",".join(f"image/{kind.lower()}" for kind in FORMATS),
            multiple=False,
            description=f"Upload an image (up to {MOST_BYTES // 1_000_000} MB)",
            tooltip="JPEG, PNG, WEBP, GIF or BMP; it stays on the machine that runs this page",
            layout={"width": "auto"},
        )
        self.upload.observe(self._on_upload, "value")
        self.controls = {
            "source": picker("image from", [("the validation set", DRAWN), ("your upload", OWN)]),
            "image": slider("image", image, 0, len(val) - 1, 1, "300px"),
            "network": picker("maps of", list(self._own.models)),
        }
        at = self.controls
        self._build([at["source"], at["image"], self.upload, at["network"]])

    def _on_upload(self, change):
        if not change["new"]:
            return
        content = bytes(change["new"][0]["content"])
        name = str(change["new"][0]["name"])
        # The file's bytes are not kept, and the same file can be chosen again.
        self.upload.value = ()
        self.receive(content, name)

    def receive(self, content: bytes, name: str = "upload") -> None:
        """What the upload button does with a file: shows it, or says why not and leaves the picture."""
        with self._lock:
            try:
                side = LONGEST if self._voc else self._image(0).shape[1]
                self._uploaded, self._refused = read_image(content, side), ""
                self.controls["source"].value = OWN
            except ImageRefused as refusal:
                self._refused = f"{name}: {refusal}"
            self.drawn = None  # the controls may be as they were, and what is shown is new all the same
            self.request()

    def adjust(self, name):
        at = self.controls
        self._refused = ""
        models = (self._voc or self._own) if at["source"].value == OWN else self._own
        if tuple(at["network"].options) != tuple(models.models):
            at["network"].options = list(models.models)
        at["image"].disabled = at["source"].value == OWN

    def describe(self, state):
        source = f"validation image {state['image']}" if state["source"] == DRAWN else "uploaded image"
        return f"{source}, maps of {state['network']}"

    def view(self, state):
        own = state["source"] == OWN
        if own and self._uploaded is None:
            blank = np.full((pictures.SIDE, pictures.SIDE, 3), 235, np.uint8)
            return View(
                pictures.sheet([[("no image yet: use the upload button", blank)]], columns=3),
                [],
                "",
                self._refused,
            )
        picture = self._uploaded if own else self._image(state["image"])
        models = (self._voc or self._own) if own else self._own
        image = torch.from_numpy(picture.transpose(2, 0, 1).copy())
        with networks.on_threads(self.line):
            model = models.models[state["network"]]()
            probabilities = networks.class_probabilities(model, image, models.resize)
            order = probabilities.argsort()[::-1]
            predicted = [c for c in order if probabilities[c] >= 0.5][:MAPS] or [order[0]]
            maps = [networks.class_map(model, image, c, models.resize) for c in predicted]
        panels = [("image", picture)]
        for c, values in zip(predicted, maps, strict=True):
            panels.append((f"{models.classes[c]}, {100 * probabilities[c]:.1f} %", overlay(picture, values)))
        numbers = [["class", "probability, %"]]
        numbers += [[models.classes[c], float(probabilities[c])] for c in order[:6]]
        return View(
            pictures.sheet([panels], columns=MAPS + 1),
            numbers, self._note(own, probabilities.max() >= 0.5), self._refused,
        )  # fmt: skip

    def _note(self, own, found):
        texts = []
        if not found:
            texts.append("No class reaches 50 %; the map is that of the likeliest.")
        if own and self._voc is None:
            classes = ", ".join(self._own.classes)
            texts.append(
                "There is no VOC classifier with ImageNet weights in the run store, so this is the Critters "
                f"classifier, which has seen nothing but drawn images of six animals ({classes}): on a "
                "photograph its answer means nothing."
            )
        elif own and self._voc is not self._own:
            texts.append("The classifier was trained on PASCAL VOC from ImageNet weights.")
        return " ".join(texts)


class _Models(NamedTuple):
    """Classifiers of one data set: functions that load them, by name; their classes; their input's size."""

    models: dict
    classes: tuple
    resize: int | None


def _of_line(line):
    models = {PLAIN: recent(lambda: line.classifier(networks.PLAIN), 1)}
    if line.has("classify", networks.LEARNABLE):
        models[DRS] = recent(lambda: networks.stored_classifier(line, networks.LEARNABLE), 1)
    return _Models(models, line.data.val.classes, line.budget.resize)


def _voc_classifiers(store):
    """The newest plain and learnable VOC classifiers in a store that began from ImageNet weights, or None."""
    found = {}
    for meta in store.metas("classify"):
        config = meta["config"]
        inputs = meta["inputs"]
        voc = inputs["data"].startswith("voc-") and inputs["weights"].startswith("torchvision vgg16")
        if voc and meta["version"] == STAGE_VERSIONS["classify"] and config["delta"] is None:
            name = {(): PLAIN, ALL_LAYERS: DRS}.get(tuple(config["drs_layers"]))
            if name:
                found[name] = recent(_loader(store, meta), 1)
    return _Models(found, VOC_CLASSES, VOC_SIDE) if found else None


def _loader(store, meta):
    def load():
        config = meta["config"]
        entry = store.get("classify", config, meta["inputs"], meta["version"])
        if entry is None:
            raise FileNotFoundError(
                f"the VOC classifier in {store.folder('classify', meta['key'])} is damaged or gone."
            )
        model = classifier(config["backbone"], len(VOC_CLASSES), config["drs_layers"], config["delta"])
        model.load_state_dict(entry.weights())
        return model.eval()

    return load
