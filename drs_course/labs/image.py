"""The lab for an image of one's own: what a classifier sees in it, and where."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import ipywidgets
import numpy as np
import torch

from drs_course.download import COMMAND, weights_file
from drs_course.labs import networks, pictures
from drs_course.labs.lab import Lab, View, picker, show, slider, switch
from drs_course.labs.upload import FORMATS, MOST_BYTES, ImageRefused, read_image
from drs_course.paper import ALL_LAYERS
from drs_course.plots import overlay
from drs_course.stages import STAGE_VERSIONS
from drs_lib.data.voc import VOC_CLASSES
from drs_lib.networks import classifier
from drs_lib.runtime import threads

DRAWN, OWN = "drawn", "own"
PLAIN, DRS = "CAM (plain classifier)", "DRS (learnable)"
AUTHORS = "DRS (learnable), the authors' network"
LONGEST = 500  # pixels: the longer side of VOC's images, to which a photograph is reduced
MAPS = 2  # shown at most
VOC_SIDE = 320  # the release's size of the images from which maps are made
GET = f"'{COMMAND} --only drs' fetches the authors' network, 97 MB, which knows VOC's classes."


class ImageLab(Lab):
    """Localization maps of the classes that are predicted for an uploaded image, or for one of the data set.

    A photograph is given to a VOC classifier: the run's own where it runs on VOC, one that was trained from
    ImageNet weights and lies in the run store, or the authors', if DRS_learnable.pth was downloaded (by
    ``python -m drs_course download --only drs``, to torch hub's folder of checkpoints). Without any of them
    the photograph goes to the Critters classifier, and the lab says what that is worth.

    Args:
        pipeline: the `Pipeline`; its plain classifier is trained if it is not in the store (on VOC not if
            there is the authors').
        image: index of the validation image to begin with. photo: an image file to begin with instead.
    """

    title = "Your own image"
    about = (
        "What a classifier sees in an image, and the localization maps of the classes to which it gives 50 % "
        f"or more, {MAPS} at most; of the likeliest class where it gives none that much. Below, with δ at "
        "inference: the same with every feature map cut at δ times its maximum."
    )

    def __init__(self, pipeline, image=0, photo=None):
        val, self._on_voc = pipeline.data.val, pipeline.data.name == "voc"
        super().__init__(pipeline, val)
        downloaded, own = _downloaded(), _of_pipeline(pipeline)
        if self._on_voc:
            if AUTHORS in downloaded and not pipeline.has("classify", networks.PLAIN):
                del own[PLAIN]  # a day's training, for a lab
            own |= downloaded
        self._photo = own if self._on_voc else _voc_classifiers(pipeline) | downloaded
        # By where the image is from.
        self._models = {DRAWN: own, OWN: self._photo or own}
        self._seen = lru_cache(8)(self._look)
        self._uploaded, self._uploads, self._refused = None, 0, ""
        self.upload = ipywidgets.FileUpload(
            accept=",".join(f"image/{kind.lower()}" for kind in FORMATS),
            description=f"Upload an image (up to {MOST_BYTES // 1_000_000} MB)",
            tooltip="JPEG, PNG, WEBP, GIF or BMP; it stays on the machine that runs this page",
            layout={"width": "auto"},
        )
        self.upload.observe(self._on_upload, "value")
        self.controls = {
            "source": picker("image from", [("the validation set", DRAWN), ("your upload", OWN)]),
            "image": slider("image", image, 0, len(val) - 1, 1),
            "network": picker("maps of", list(own)),
            "cap": switch("δ at inference"),
            "delta": slider("δ", 0.55, 0.05, 1.0, 0.01, "330px"),
        }
        self._build(["source", "image", self.upload], ["network", "cap", "delta"])
        if photo is not None:
            self.receive(Path(photo).expanduser().read_bytes(), Path(photo).name)

    def _on_upload(self, change):
        for file in change["new"]:
            content = bytes(file["content"])
            # The file's bytes are not kept, and the same file can be chosen again.
            self.upload.value = ()
            self.receive(content, file["name"])

    def receive(self, content: bytes, name: str = "upload") -> None:
        """What the upload button does with a file: shows it, or says why not and leaves the picture."""
        with self._lock:
            try:
                side = LONGEST if self._photo else self._scene(0).picture.shape[1]
                self._uploaded, self._refused = read_image(content, side), ""
                self._uploads += 1
                self.controls["source"].value = OWN
            except ImageRefused as refusal:
                self._refused = f"{name}: {refusal}"
            self.drawn = None  # the controls may be as they were, and what is shown is new all the same
            self.request()

    def adjust(self, name):
        at = self.controls
        self._refused = ""
        names = tuple(self._models[at["source"].value])
        if at["network"].options != names:
            at["network"].options = names
        at["image"].disabled = at["source"].value == OWN
        show(at["delta"], at["cap"].value)

    def describe(self, state):
        source = f"validation image {state['image']}" if state["source"] == DRAWN else "uploaded image"
        cap = f", δ = {state['delta']:.2f} at inference" if state["cap"] else ""
        return f"{source}, maps of {state['network']}{cap}"

    def _look(self, source, number, name, delta, classes=None):
        """What a classifier sees in a picture. number: of the image or the upload; delta: None for the
        network as it is; classes: whose maps, None: those that it predicts."""
        model = self._models[source][name]
        picture = self._uploaded if source == OWN else self._scene(number).picture
        image = torch.from_numpy(picture.transpose(2, 0, 1).copy())
        with threads(model.threads):
            network = model.dial.set([delta] * 6)
            probabilities = networks.class_probabilities(network, image, model.resize)
            if classes is None:
                order = probabilities.argsort()[::-1]
                classes = tuple(c for c in order if probabilities[c] >= 0.5)[:MAPS] or (order[0],)
            maps = networks.class_maps(network, image, classes, model.resize)
        captions = [f"{model.classes[c]}, {100 * probabilities[c]:.1f} %" for c in classes]
        return Seen(probabilities, classes, dict(zip(captions, maps, strict=True)))

    def view(self, state):
        own, name = state["source"] == OWN, state["network"]
        if own and self._uploaded is None:
            panel = {"no image yet: use the upload button": pictures.blank(pictures.SIDE, pictures.SIDE)}
            return View(pictures.sheet(panel, columns=MAPS + 1), [], alert=self._refused)
        picture = self._uploaded if own else self._scene(state["image"]).picture
        at = state["source"], self._uploads if own else state["image"], name
        seen = {"image": self._seen(*at, None)}
        if state["cap"]:
            classes = seen["image"].classes
            seen[f"δ = {state['delta']:.2f}"] = self._seen(*at, state["delta"], classes)
        rows = [
            {title: picture} | {caption: overlay(picture, values) for caption, values in one.maps.items()}
            for title, one in seen.items()
        ]
        probabilities, classes = seen["image"].probabilities, self._models[state["source"]][name].classes
        numbers = [["class", "probability, %", *(f"with {title}" for title in [*seen][1:])]]
        for c in probabilities.argsort()[::-1][:6]:
            numbers.append([classes[c], *(float(one.probabilities[c]) for one in seen.values())])
        note = self._note(own, name, state["cap"], probabilities.max() >= 0.5)
        return View(pictures.sheet(*rows, columns=MAPS + 1), numbers, note, self._refused)

    def _note(self, own, name, cap, found):
        texts = [] if found else ["No class reaches 50 %; the map is that of the likeliest."]
        if name == AUTHORS:
            texts.append("The network that the paper's authors trained on PASCAL VOC and published.")
        elif own and not self._photo:
            classes = ", ".join(self._models[OWN][name].classes)
            texts.append(
                "There is no VOC classifier with ImageNet weights in the run store, so this is the Critters "
                f"classifier, which has seen nothing but drawn images of six animals ({classes}): on a "
                "photograph its answer means nothing."
            )
        elif own and not self._on_voc:
            texts.append("The classifier was trained on PASCAL VOC from ImageNet weights.")
        if cap and name in (DRS, AUTHORS):
            texts.append(
                "This δ takes the place of the controllers that the network was trained with: it shows what "
                "suppression does, not what a training with this δ would give."
            )
        elif cap:
            texts.append("The network was trained without suppression.")
        if own and AUTHORS not in self._models[OWN]:
            texts.append(GET)
        return " ".join(texts)


class Seen(NamedTuple):
    """What a classifier sees in an image: probabilities (C,), the classes whose maps are shown, and the maps
    (H, W) by their captions."""

    probabilities: np.ndarray
    classes: tuple
    maps: dict


@dataclass
class Model:
    """A classifier: a function that loads it, its classes, the size of its input, and on how many threads
    it runs."""

    load: Callable
    classes: tuple
    resize: int | None
    threads: int | None = None

    @cached_property
    def dial(self):
        return networks.Dial(self.load())


def _downloaded():
    """The authors' classifier, if it is in the folder of downloaded weights."""
    with suppress(FileNotFoundError):
        load = partial(classifier, "vgg16", len(VOC_CLASSES), weights=weights_file("drs"))
        return {AUTHORS: Model(load, VOC_CLASSES, VOC_SIDE)}
    return {}


def _of_pipeline(pipeline):
    """The run's own classifiers."""
    budget = pipeline.budget
    options = pipeline.data.val.classes, budget.resize, budget.classify.threads
    loads = {PLAIN: partial(pipeline.classifier, networks.PLAIN)}
    if pipeline.has("classify", networks.LEARNABLE):
        loads[DRS] = partial(networks.stored, pipeline, networks.LEARNABLE)
    return {name: Model(load, *options) for name, load in loads.items()}


def _voc_classifiers(pipeline):
    """The newest plain and learnable VOC classifiers in the run store that began from ImageNet weights."""
    found, store = {}, pipeline.store
    for meta in store.metas("classify"):
        config, inputs = meta["config"], meta["inputs"]
        voc = inputs["data"].startswith("voc-") and inputs["weights"].startswith("torchvision vgg16")
        name = {(): PLAIN, ALL_LAYERS: DRS}.get(tuple(config["drs_layers"]))
        if voc and name and config["delta"] is None and meta["version"] == STAGE_VERSIONS["classify"]:
            given = store, config, inputs, len(VOC_CLASSES), pipeline.device
            found[name] = Model(partial(networks.stored_classifier, *given), VOC_CLASSES, VOC_SIDE)
    return found
