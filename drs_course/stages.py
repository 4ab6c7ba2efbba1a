"""The paper's Figure 3 as stored stages: image-level labels in, mean IoU out.

    classify -> labels -> segment -> evaluate              without refinement
    classify -> target -> refine -> labels -> segment ...  with it

A stage is kept in the run store under the hash of its configuration and of the stages before it: rows of
Tables 1 to 4 that share a stage train it once, and a run that was killed goes on at the stage it was in. The
hashes follow from configurations alone, so a finished run is read without drawing an image or building a
network. What a stage computes is `drs_lib.method`'s; here stands from what, and where it is kept.

The stages that make labels see the training images through `without_masks`; only scores are given masks.
"""

import hashlib
import math
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from drs_course.checkpoint import Checkpoint
from drs_course.paper import Configuration
from drs_course.store import RunStore
from drs_lib.archives import LabelArchive, MapArchive
from drs_lib.data import VOC2012, Critters, without_masks
from drs_lib.method import label_rule, localization_maps_of, map_options, maps_of, pseudo_labels_of
from drs_lib.metrics import MapScore, SegmentationScore, mean_iou
from drs_lib.networks import classifier, deeplab, refinement_network
from drs_lib.recipes import Budget, get_budget
from drs_lib.runtime import memory_format, pick_device, threads
from drs_lib.train import (
    evaluate_classifier,
    evaluate_segmentation,
    train_classifier,
    train_refinement,
    train_segmentation,
)
from drs_lib.weights import SHIPPED

# Raised when the code of a stage changes what it produces: entries of an older version are then made again.
# What each version produces is in tests/course/test_stage_values.py.
STAGE_VERSIONS = dict(
    classify=1, accuracy=1, map_score=1, target=1, refine=1, labels=1, label_score=1, segment=1, evaluate=1,
    evaluate_crf=1,
)  # fmt: skip
# Rough work in each stage, for the order of the jobs and the progress bar.
STAGE_COST = {"classify": 10, "refine": 10, "segment": 10, "evaluate_crf": 5}
TRAININGS = ("classify", "refine", "segment")
# What can be measured of a configuration, and the stage that holds it.
MEASURES = dict(
    miou="evaluate", crf="evaluate_crf", accuracy="accuracy", labels="label_score", maps="map_score"
)


@dataclass(frozen=True, eq=False)
class Splits:
    """Data sets of a run: training images, validation images, and the images whose labels the classifier's
    accuracy is measured on (None: the validation images)."""

    name: str
    train: Any
    val: Any
    accuracy: Any = None

    @property
    def accuracy_images(self):
        return self.val if self.accuracy is None else self.accuracy


@lru_cache(maxsize=4)
def open_data(data, budget, voc_root=None):
    """The data sets that `data` names; kept, so that a process with several rows draws its images once."""
    if data == "critters":
        lengths = {"train": budget.train_images, "val": budget.val_images}
        return Splits(data, *(Critters(s, size=budget.image_size, length=n) for s, n in lengths.items()))
    if data == "voc":
        if voc_root is None:
            raise ValueError(
                "data 'voc' needs the folder VOC 2012 is in: voc_root (--voc-root DIR, or make course "
                "DATA=voc VOC_ROOT=DIR). 'python -m drs_course download --root DIR' puts it there."
            )
        # The accuracy is measured on VOC's own 1,464 training images, as in the release.
        train, val, accuracy = (VOC2012(voc_root, name) for name in ("trainaug", "val", "train"))
        train.require_saliency()  # now, and not after the classifiers' trainings
        return Splits(data, train, val, accuracy)
    raise ValueError(f"unknown data {data!r}; expected 'critters', 'voc' or a Splits.")


@dataclass(frozen=True, eq=False)
class Stage:
    """An entry of the store, there or to be made: ``key`` is its place, ``parents`` are what it reads."""

    name: str
    configuration: Configuration
    title: str
    config: dict
    inputs: dict[str, str]
    parents: tuple["Stage", ...] = ()

    @cached_property
    def key(self):
        return RunStore.key(self.name, self.config, self.inputs, STAGE_VERSIONS[self.name])

    def chain(self):
        """This stage and all before it, first to last."""
        for parent in self.parents:
            yield from parent.chain()
        yield self


class Pipeline:
    """One seed's road from images to scores under a budget; everything on it goes through the store.

    Args:
        data: "critters", "voc" (with ``voc_root``), or a `Splits` of your own.
        budget: a `Budget` or the name of one.
        seed: of the three trainings. The data are the same for all seeds.
        store: a `RunStore`, or its folder.
        device: None for the best there is.
        crf_jobs: processes for the CRF.
        run: the name of a run that overwrites: entries that it did not make are made again.
        report: called with a line of text whenever there is something new to say about a stage in progress.
        progress: of the trainings, see `drs_lib.train.fit`.
    """

    def __init__(
        self, data="critters", budget=None, *, seed=0, voc_root=None, store=None, device=None, crf_jobs=1,
        run=None, report=None, progress=False,
    ):  # fmt: skip
        kind = data if isinstance(data, str) else "critters"
        self.budget = budget if isinstance(budget, Budget) else get_budget(budget, kind)
        self.store = store if isinstance(store, RunStore) else RunStore(store)
        if isinstance(data, str):
            root = None if voc_root is None else str(voc_root)
            self.data = open_data(data, self.budget, root)
        else:
            self.data = data
        self.seed, self.crf_jobs, self.run, self.progress = seed, crf_jobs, run, progress
        self.report = report or (lambda text: None)
        self._device = device
        self._parent = os.getppid() if multiprocessing.parent_process() is not None else None

    @cached_property
    def device(self):
        """The torch.device of the trainings."""
        return pick_device(self._device)

    @cached_property
    def weak_train(self):
        """The training images, without their masks."""
        return without_masks(self.data.train)

    def scores(self, configuration, measures=("miou",)):
        """The measures (keys of MEASURES) of a configuration, made where they are missing: {measure: what its
        stage stored}; ``["miou"]["miou"]`` is a fraction."""
        return {m: self.get(self.stage(MEASURES[m], configuration)).json("scores.json") for m in measures}

    def stored_scores(self, configuration, measures=("miou",)):
        """`scores` if all of them are in the store, else None; makes nothing."""
        found = {}
        for measure in measures:
            stage = self.stage(MEASURES[measure], configuration)
            version = STAGE_VERSIONS[stage.name]
            entry = self.store.get(stage.name, stage.config, stage.inputs, version, self.run)
            if entry is None:
                return None
            found[measure] = entry.json("scores.json")
        return found

    def classifier(self, configuration, overwrite=False):
        """The trained classifier, in evaluation mode on the device. overwrite: train it again."""
        recipe = classify_recipe(self.budget, configuration)
        model = classifier(recipe.backbone, self.data.train.num_classes, recipe.drs_layers, recipe.delta)
        return self._load(model, "classify", configuration, overwrite)

    def refinement_network(self, configuration, overwrite=False):
        """The trained refinement network, in evaluation mode on the device. overwrite: train it again."""
        model = refinement_network(self.budget.refine.backbone, self.data.train.num_classes)
        return self._load(model, "refine", configuration, overwrite)

    def segmentation_network(self, configuration, overwrite=False):
        """The trained DeepLab, in evaluation mode on the device. overwrite: train it again."""
        recipe = self.budget.segment(configuration.network)
        model = deeplab(recipe.kind, recipe.backbone, self.data.train.num_classes + 1)
        return self._load(model, "segment", configuration, overwrite)

    def map_network(self, configuration):
        """The network that maps come from: the refinement network with ``refine``, else the classifier."""
        return (self.refinement_network if configuration.refine else self.classifier)(configuration)

    def maps(self, configuration, dataset=None, indices=None):
        """(index, labels, maps) of images, made as for pseudo labels: the classifier's or, with ``refine``,
        the refinement network's. dataset: None for the training images. indices, and what is yielded: see
        `drs_lib.maps.iterate_maps`."""
        if dataset is None:
            dataset = self.weak_train
        return maps_of(self.map_network(configuration), dataset, self.budget, indices=indices)

    def labels(self, configuration):
        """The pseudo labels of the training images: a sequence of uint8 (H, W)."""
        return LabelArchive(self.get(self.stage("labels", configuration)).file("labels.zip"))

    def history(self, stage, configuration):
        """dict(epoch, loss, lr, seconds) of each epoch of "classify", "refine" or "segment"."""
        return self.get(self.stage(stage, configuration)).json("history.json")

    def stage(self, name, configuration):
        """The stage of that name for this configuration. Raises ValueError where it has none."""
        if name not in STAGE_VERSIONS:
            raise ValueError(f"unknown stage {name!r}; expected one of {', '.join(STAGE_VERSIONS)}.")
        if configuration.supervised and name not in ("segment", "evaluate", "evaluate_crf"):
            raise ValueError(f"a fully supervised configuration has no stage {name!r}.")
        if name in ("target", "refine") and not configuration.refine:
            raise ValueError(f"{configuration} has no stage {name!r}: its refine is False.")
        plan, _ = STAGES[name]
        return plan(self, configuration)

    def stages(self, configuration, measures=("miou",)):
        """All stages that these measures need, in an order in which they can be made, each once."""
        found = {}
        for measure in measures:
            for stage in self.stage(MEASURES[measure], configuration).chain():
                found.setdefault((stage.name, stage.key), stage)
        return list(found.values())

    def has(self, name, configuration):
        """Whether this configuration's stage of that name is in the store, unverified; makes nothing."""
        stage = self.stage(name, configuration)
        return self.store.has(stage.name, stage.key, self.run)

    def get(self, stage, overwrite=False):
        """The stage's entry, made if it is not in the store. overwrite: made again, from the stored stages
        that it reads."""
        _expect_a_main_guard()
        if overwrite or not self.store.has(stage.name, stage.key, self.run):
            for parent in stage.parents:
                self.get(parent)
        finished = []

        def make(writer):
            self.stop_if_orphaned()
            self.report(stage.title)
            if overwrite:
                self.checkpoint(stage).remove()
            _, make_it = STAGES[stage.name]
            make_it(self, stage, writer)
            writer.note(device=str(self.device))
            finished.append(stage)

        version = STAGE_VERSIONS[stage.name]
        entry = self.store.get_or_make(
            stage.name, stage.config, stage.inputs, make, version=version, overwrite=overwrite, run=self.run
        )
        if finished:
            self.checkpoint(stage).remove()  # only now that the entry is published
        return entry

    def _load(self, model, name, configuration, overwrite):
        model.load_state_dict(self.get(self.stage(name, configuration), overwrite).weights())
        return model.eval().to(device=self.device, memory_format=memory_format(self.device))

    def checkpoint(self, stage):
        """Where the stage's training keeps what it needs to go on after an interruption."""
        return Checkpoint(self.store.root / "checkpoints" / f"{stage.name}-{stage.key}.pt", self.run)

    @property
    def orphaned(self):
        """Whether this is a worker process whose run was killed. (Windows doesn't tell.)"""
        return self._parent is not None and os.getppid() != self._parent

    def stop_if_orphaned(self):
        """Raises RuntimeError: it would otherwise train on, unseen, until its row is finished."""
        if self.orphaned:
            raise RuntimeError("the run that this worker process belongs to has ended; stopping.")


def _expect_a_main_guard():
    # Python's own check of the same comes too late: this process would wait for the one that started it.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "this program is run again by each process that reads its images. Put what trains under "
            "'if __name__ == \"__main__\":'."
        )


# ---- what each stage is made from, and how it is made


def classify_recipe(budget, configuration):
    """The budget's recipe with the configuration's layers and controller."""
    return budget.classify.replace(drs_layers=configuration.drs_layers, delta=configuration.delta)


def _planned(pipeline, name, configuration, config, parents=(), **inputs):
    """A `Stage` that reads, besides its inputs, the configuration's stages of the parents' names."""
    read = tuple(pipeline.stage(parent, configuration) for parent in parents)
    inputs |= {parent.name: parent.key for parent in read}
    seed = f", seed {pipeline.seed}" if pipeline.seed else ""
    title = f"{configuration}{seed}: {name.replace('_', ' ')}"
    return Stage(name, configuration, title, config, inputs, read)


def _training(pipeline, name, configuration, recipe, parents=(), **inputs):
    config = recipe.to_dict()
    inputs["weights"] = weights_identity(recipe.backbone, config.pop("weights"))
    inputs["data"] = _content(pipeline.data.train)
    return _planned(pipeline, name, configuration, config | {"seed": pipeline.seed}, parents, **inputs)


def _train(pipeline, stage, writer, train, recipe, *data):
    def on_epoch(history):
        pipeline.stop_if_orphaned()
        last = history[-1]
        pipeline.report(f"{stage.title}, epoch {last['epoch']}, loss {last['loss']:.3f}")

    options = {"seed": pipeline.seed, "device": pipeline.device, "progress": pipeline.progress}
    options["checkpoint"] = pipeline.checkpoint(stage)
    model, history = train(recipe, pipeline.weak_train, *data, on_epoch=on_epoch, **options)
    writer.weights("model.safetensors", model)
    writer.json("history.json", history)


def _map_source(configuration):
    return ["refine" if configuration.refine else "classify"]


def plan_classify(pipeline, configuration):
    return _training(pipeline, "classify", configuration, classify_recipe(pipeline.budget, configuration))


def make_classify(pipeline, stage, writer):
    recipe = classify_recipe(pipeline.budget, stage.configuration)
    _train(pipeline, stage, writer, train_classifier, recipe)


def plan_accuracy(pipeline, configuration):
    config, images = {"resize": pipeline.budget.resize}, _content(pipeline.data.accuracy_images)
    return _planned(pipeline, "accuracy", configuration, config, ["classify"], images=images)


def make_accuracy(pipeline, stage, writer):
    budget, images = pipeline.budget, pipeline.data.accuracy_images
    with threads(budget.classify.threads):
        model = pipeline.classifier(stage.configuration)
        accuracy = evaluate_classifier(model, images, resize=budget.resize)
    writer.json("scores.json", {"accuracy": accuracy})


def plan_map_score(pipeline, configuration):
    rule = label_rule(pipeline.budget, configuration.refine)
    config = map_options(pipeline.budget, configuration.refine) | {"alpha": rule["alpha"]}
    parents, data = _map_source(configuration), _content(pipeline.data.train)
    return _planned(pipeline, "map_score", configuration, config, parents, data=data)


def make_map_score(pipeline, stage, writer):
    score, train = MapScore(stage.config["alpha"]), pipeline.data.train
    for index, labels, maps in pipeline.maps(stage.configuration):
        score.update(maps[None], train.mask(index)[None], labels[None])
    scores = score.compute()
    per_class = {k: _by_class(train.classes, v) for k, v in scores.pop("per_class").items()}
    writer.json("scores.json", {**{k: _number(v) for k, v in scores.items()}, "per_class": per_class})


def plan_target(pipeline, configuration):
    """What the refinement network learns: the classifier's maps, see `Budget`, in 8 bits."""
    plain = replace(configuration, refine=False)
    config = map_options(pipeline.budget, False) | {"target": pipeline.budget.target}
    data = _content(pipeline.data.train)
    return _planned(pipeline, "target", plain, config, _map_source(plain), data=data)


def make_target(pipeline, stage, writer):
    model = pipeline.classifier(stage.configuration)
    maps = localization_maps_of(model, pipeline.weak_train, pipeline.budget, writer.path / "maps.zip")
    writer.json("classes.json", maps.classes)


def plan_refine(pipeline, configuration):
    return _training(pipeline, "refine", configuration, pipeline.budget.refine, ["target"])


def make_refine(pipeline, stage, writer):
    entry, classes = pipeline.get(stage.parents[0]), pipeline.data.train.num_classes
    maps = MapArchive(entry.file("maps.zip"), entry.json("classes.json"), classes)
    _train(pipeline, stage, writer, train_refinement, pipeline.budget.refine, maps)


def plan_labels(pipeline, configuration):
    budget, refined = pipeline.budget, configuration.refine
    config = map_options(budget, refined) | label_rule(budget, refined)
    parents, data = _map_source(configuration), pipeline.data.train.fingerprint
    return _planned(pipeline, "labels", configuration, config, parents, data=data)


def make_labels(pipeline, stage, writer):
    model = pipeline.map_network(stage.configuration)
    pseudo_labels_of(model, pipeline.weak_train, pipeline.budget, writer.path / "labels.zip")


def plan_label_score(pipeline, configuration):
    data = _content(pipeline.data.train)
    return _planned(pipeline, "label_score", configuration, {}, ["labels"], data=data)


def make_label_score(pipeline, stage, writer):
    train = pipeline.data.train
    score = SegmentationScore(train.num_classes + 1, ignored_prediction="background")
    for index, prediction in enumerate(pipeline.labels(stage.configuration)):
        score.update(prediction, train.mask(index))
    # Over the pixels that were given a label; there may be none.
    miou_claimed = mean_iou(score.claimed) if score.claimed.any() else None
    writer.json("scores.json", _segmentation_scores(score.compute(), train) | {"miou_claimed": miou_claimed})


def plan_segment(pipeline, configuration):
    recipe = pipeline.budget.segment(configuration.network)
    if configuration.supervised:
        return _training(pipeline, "segment", configuration, recipe, labels="masks")
    return _training(pipeline, "segment", configuration, recipe, ["labels"])


class TrueMasks(Sequence):
    """A data set's masks as training labels, for the fully supervised upper bound."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset.mask(range(len(self))[index])


def make_segment(pipeline, stage, writer):
    supervised = stage.configuration.supervised
    # The upper bound, and nothing else, is handed the masks: here, in the open.
    labels = TrueMasks(pipeline.data.train) if supervised else pipeline.labels(stage.configuration)
    recipe = pipeline.budget.segment(stage.configuration.network)
    _train(pipeline, stage, writer, train_segmentation, recipe, labels)


def plan_evaluate(pipeline, configuration):
    data = _content(pipeline.data.val)
    return _planned(pipeline, "evaluate", configuration, {}, ["segment"], data=data)


def make_evaluate(pipeline, stage, writer):
    result = _segmentation_result(pipeline, stage.configuration)
    writer.json("scores.json", _segmentation_scores(result, pipeline.data.val))


def plan_evaluate_crf(pipeline, configuration):
    data, crf = _content(pipeline.data.val), pipeline.budget.crf(configuration.network)
    config = asdict(crf) | {"engine": "lattice"}  # so that the key of what stores hold stays the same
    return _planned(pipeline, "evaluate_crf", configuration, config, ["segment"], data=data)


def make_evaluate_crf(pipeline, stage, writer):
    configuration, budget = stage.configuration, pipeline.budget
    options = {"crf": budget.crf(configuration.network), "jobs": pipeline.crf_jobs}
    result = _segmentation_result(pipeline, configuration, **options)
    scores = {key: result[f"{key}_crf"] for key in ("miou", "iou")}
    writer.json("scores.json", _segmentation_scores(scores, pipeline.data.val))


def _segmentation_result(pipeline, configuration, **options):
    model = pipeline.segmentation_network(configuration)
    with threads(pipeline.budget.segment(configuration.network).threads):
        return evaluate_segmentation(model, pipeline.data.val, **options)


# Of each stage: what it is made from, as a `Stage`, and how.
STAGES = {
    "classify": (plan_classify, make_classify),
    "accuracy": (plan_accuracy, make_accuracy),
    "map_score": (plan_map_score, make_map_score),
    "target": (plan_target, make_target),
    "refine": (plan_refine, make_refine),
    "labels": (plan_labels, make_labels),
    "label_score": (plan_label_score, make_label_score),
    "segment": (plan_segment, make_segment),
    "evaluate": (plan_evaluate, make_evaluate),
    "evaluate_crf": (plan_evaluate_crf, make_evaluate_crf),
}


def _content(dataset):
    """What identifies a data set for a stage that looks at no saliency map (only "labels" does)."""
    return getattr(dataset, "fingerprint_without_saliency", dataset.fingerprint)


def weights_identity(backbone, weights):
    """What initial weights a recipe's ``weights`` means, as an input of a stage: the content of a file, or
    the name of torchvision's. Raises FileNotFoundError."""
    if weights is None:
        return "random"
    if weights == "coco" or (weights == "pretrained" and not backbone.startswith("mini")):
        return f"torchvision {backbone} {weights}"
    return _file_digest(SHIPPED / f"{backbone}.safetensors" if weights == "pretrained" else Path(weights))


def _file_digest(path):
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no weights file {path}: a recipe's weights (--aspp-weights for Table 4's ASPP) are "
            "'pretrained', 'coco' or the path of a file. 'python -m drs_course pretrain' makes the shipped "
            "ones."
        ) from None
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _digest_of(path, size, modified):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _segmentation_scores(result, dataset):
    classes = ("background", *dataset.classes)
    return {"miou": _number(result["miou"]), "iou": _by_class(classes, result["iou"])}


def _by_class(classes, values):
    return {name: _number(value) for name, value in zip(classes, values, strict=True)}


def _number(value):
    """JSON has no NaN: a class that occurs nowhere has no score."""
    return None if math.isnan(value) else float(value)
