"""The paper's Figure 3 as stored stages: image-level labels in, mean IoU out.

    classify -> labels -> segment -> evaluate              without refinement
    classify -> target -> refine -> labels -> segment ...  with it

A stage is a function of a configuration and of the stages before it, kept in the run store under the hash of
both: rows of Tables 1 to 4 that share a stage train it once, and a run that was killed goes on at the stage
it was in. The hashes follow from configurations alone, so a finished run is read without drawing an image or
building a network.

The stages that make labels see the training images through `without_masks`; only scores are given masks.
"""

import hashlib
import io
import math
import multiprocessing
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from drs_course.paper import NETWORKS, Configuration
from drs_course.store import Entry, EntryWriter, RunStore
from drs_lib.crf import ENGINES, CRFConfig
from drs_lib.recipes import ClassifyRecipe, RefineRecipe, SegmentRecipe
from drs_lib.weights import SHIPPED

# Raised when the code of a stage changes what it produces: entries of an older version are then made again.
# What each version produces is in tests/test_stage_values.py.
STAGE_VERSIONS = {
    "classify": 1,
    "accuracy": 1,
    "map_score": 1,
    "target": 1,
    "refine": 1,
    "labels": 1,
    "label_score": 1,
    "segment": 1,
    "evaluate": 1,
    "evaluate_crf": 1,
}
# Pictures that may wait for their compression, or for their turn to be written.
PNGS_AHEAD = 32
BUDGETS = ("ci", "laptop", "paper", "release")
# Rough work in each stage, for the order of the jobs and the progress bar.
STAGE_COST = {"classify": 10, "refine": 10, "segment": 10, "evaluate_crf": 5}
# The stages on which several processes work together.
TRAININGS = ("classify", "refine", "segment")
# What can be measured of a configuration, and the stage that holds it.
MEASURES = {
    "miou": "evaluate",
    "crf": "evaluate_crf",
    "accuracy": "accuracy",
    "labels": "label_score",
    "maps": "map_score",
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Sizes, recipes and thresholds of a run. Budgets differ in these values, never in code paths.

    train_images, val_images, image_size: for Critters, which is drawn to order; VOC is what it is.
    largefov, largefov_resnet, aspp: recipes of Table 4's three networks; crf_...: the CRF of each, and
    crf_engine what computes it, see `drs_lib.crf`.
    scales, resize: of the images from which localization maps are made, see `iterate_maps`; the classifier's
    accuracy is measured at ``resize`` too.
    alpha, beta, rule, conflict: see `pseudo_labels`.
    target: what the refinement network learns, "maps" (the paper's M) or "largest" (the release's: each pixel
    keeps its largest class only). refined_alpha, renormalize: how refined maps are read.
    """

    name: str
    classify: ClassifyRecipe
    refine: RefineRecipe
    largefov: SegmentRecipe
    largefov_resnet: SegmentRecipe
    aspp: SegmentRecipe
    train_images: int | None = None
    val_images: int | None = None
    image_size: int = 128
    scales: tuple[int, ...] | None = None
    resize: int | None = None
    alpha: float = 0.2
    beta: float = 0.06
    rule: str = "paper"
    conflict: str = "background"
    target: str = "maps"
    refined_alpha: float = 0.2
    renormalize: bool = False
    crf_largefov: CRFConfig = CRFConfig.LARGEFOV_VGG16
    crf_largefov_resnet: CRFConfig = CRFConfig.LARGEFOV_RESNET101
    crf_aspp: CRFConfig = CRFConfig.ASPP_RESNET101
    crf_engine: str = "lattice"

    def __post_init__(self):
        if self.target not in ("maps", "largest"):
            raise ValueError(f"Budget: target is {self.target!r}; expected 'maps' or 'largest'.")
        if self.crf_engine not in ENGINES:
            raise ValueError(f"Budget: crf_engine is {self.crf_engine!r}; expected one of {ENGINES}.")

    def segment(self, network: str) -> SegmentRecipe:
        return getattr(self, network)

    def crf(self, network: str) -> CRFConfig:
        return getattr(self, f"crf_{network}")

    def replace(self, **changes: Any) -> "Budget":
        return replace(self, **changes)

    def for_all(self, **changes: Any) -> "Budget":
        """The budget with changes of all five recipes, such as ``precision="float32"``."""
        recipes = ("classify", "refine", *NETWORKS)
        return self.replace(**{name: getattr(self, name).replace(**changes) for name in recipes})


def get_budget(name: str | None = None, data: str = "critters") -> Budget:
    """The budget "ci" (for tests), "laptop", "paper" (the paper's recipes; a GPU) or, on VOC, "release" (what
    the authors' released code does where it differs). None: what the environment variable DRS_BUDGET says,
    else "laptop" on Critters, "paper" on VOC.

    The environment variable DRS_PRECISION ("float32", "bfloat16") takes the place of every recipe's
    precision: "paper" and "release" compute in bfloat16, in which a GPU is several times as fast.

    On VOC, "ci" is a few steps of the full-size networks on tiny crops: it tells that everything runs, and
    its numbers mean nothing. There is no "laptop" for VOC, whose images and networks no laptop trains on.
    """
    budgets = {
        "critters": {"ci": _critters_ci, "laptop": _critters_laptop, "paper": _paper},
        "voc": {"ci": _voc_ci, "paper": _paper, "release": _release},
    }
    if data not in budgets:
        raise ValueError(f"unknown data {data!r}; expected 'critters' or 'voc'.")
    name = name or os.environ.get("DRS_BUDGET") or {"critters": "laptop", "voc": "paper"}[data]
    if name not in budgets[data]:
        raise ValueError(
            f"there is no budget {name!r} for data {data!r}; expected "
            f"{' or '.join(map(repr, budgets[data]))}."
        )
    budget, precision = budgets[data][name](), os.environ.get("DRS_PRECISION")
    return budget.for_all(precision=precision) if precision else budget


def _critters_laptop():
    return Budget(
        name="laptop",
        classify=ClassifyRecipe.laptop(),
        refine=RefineRecipe.laptop(),
        largefov=SegmentRecipe.laptop("largefov", "mini"),
        # Fewer epochs on the dearer backbone, which starts from better weights.
        largefov_resnet=SegmentRecipe.laptop("largefov", "mini_resnet").replace(epochs=5),
        aspp=SegmentRecipe.laptop("aspp", "mini_resnet").replace(epochs=5),
        train_images=1000,
        val_images=300,
        # The squared error pulls the maps' height down, so refined maps are read at a lower threshold.
        refined_alpha=0.05,
        crf_largefov=_at_critters_size(CRFConfig.LARGEFOV_VGG16),
        crf_largefov_resnet=_at_critters_size(CRFConfig.LARGEFOV_RESNET101),
        crf_aspp=_at_critters_size(CRFConfig.ASPP_RESNET101),
    )


def _at_critters_size(crf):
    """VOC's widths are in pixels of images about three times as large."""
    return replace(crf, gaussian_sxy=crf.gaussian_sxy / 3, bilateral_sxy=crf.bilateral_sxy / 3)


def _critters_ci():
    laptop = _critters_laptop()
    return laptop.for_all(epochs=1, batch=8).replace(name="ci", train_images=36, val_images=12, image_size=64)


def _paper():
    return Budget(
        name="paper",
        classify=ClassifyRecipe(),
        refine=RefineRecipe(),
        largefov=SegmentRecipe.largefov_vgg16(),
        largefov_resnet=SegmentRecipe.largefov_resnet101(),
        aspp=SegmentRecipe.aspp_resnet101(),
        train_images=10_582,
        val_images=1_449,
        image_size=376,
        # The paper doesn't state them; these are the release's.
        scales=(256, 320, 384),
        resize=320,
    ).for_all(precision="bfloat16")


def _release():
    """Every choice of the released code, but for one: it keeps the epoch that scores best against masks."""
    paper = _paper()
    return paper.replace(
        name="release",
        classify=paper.classify.replace(
            nesterov=True, lr_multipliers=(1, 2, 10, 20), batch=10, resize=384, crop=320
        ),
        refine=paper.refine.replace(
            epochs=30, milestones=(10, 20), batch=10, resize=320, crop=None, loss_size="image"
        ),
        # COCO's masks; the release has a file of its own, which `--aspp-weights` takes.
        aspp=paper.aspp.replace(weights="coco", bias_decay=False),
        rule="release",
        target="largest",
    )


def _voc_ci():
    # Random weights under frozen batch norm: with the paper's rates the residual networks would diverge.
    short = {
        "weights": None, "epochs": None, "iterations": 2, "schedule": "constant", "lr": 1e-7, "batch": 2,
        "accumulate": 1, "crop": 65, "threads": 1, "workers": 0, "precision": "float32",
    }  # fmt: skip
    return _paper().for_all(**short).replace(name="ci", scales=None, resize=64)


@dataclass(frozen=True, eq=False)
class Splits:
    """Data sets of a run: training images, validation images, and the images whose labels the classifier's
    accuracy is measured on (None: the validation images)."""

    name: str
    train: Any
    val: Any
    accuracy: Any = None

    @property
    def accuracy_images(self) -> Any:
        return self.val if self.accuracy is None else self.accuracy


@lru_cache(maxsize=4)
def open_data(
    data: str, budget: Budget, voc_root: str | None = None, cache_dir: Path | None = None
) -> Splits:
    """The data sets that `data` names; kept, so that a process with several rows draws its images once."""
    if data == "critters":
        from drs_lib.data import Critters

        return Splits(
            data,
            Critters("train", size=budget.image_size, length=budget.train_images),
            Critters("val", size=budget.image_size, length=budget.val_images),
        )
    if data == "voc":
        from drs_lib.data import VOC2012

        if voc_root is None:
            raise ValueError(
                "data 'voc' needs the folder VOC 2012 is in: voc_root (--voc-root DIR, or make course "
                "DATA=voc VOC_ROOT=DIR). 'python -m drs_course download --root DIR' puts it there."
            )
        # The accuracy is measured on VOC's own 1,464 training images, as in the release.
        train, val, accuracy = (
            VOC2012(voc_root, name, cache_dir=cache_dir) for name in ("trainaug", "val", "train")
        )
        train.require_saliency()  # now, and not after the classifiers' trainings
        return Splits(data, train, val, accuracy)
    raise ValueError(f"unknown data {data!r}; expected 'critters', 'voc' or a Splits.")


@dataclass(frozen=True, eq=False)
class Stage:
    """An entry of the store, there or to be made: ``key`` is its place, ``parents`` are what it reads."""

    name: str
    title: str
    config: dict
    inputs: dict[str, str]
    make: Callable[[EntryWriter], None] = field(repr=False)
    parents: tuple["Stage", ...] = field(default=(), repr=False)

    @cached_property
    def key(self) -> str:
        return RunStore.key(self.name, self.config, self.inputs, STAGE_VERSIONS[self.name])

    def chain(self) -> Iterator["Stage"]:
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
        self,
        data: str | Splits = "critters",
        budget: str | Budget | None = None,
        *,
        seed: int = 0,
        voc_root: str | None = None,
        store: RunStore | str | Path | None = None,
        device: str | None = None,
        crf_jobs: int = 1,
        run: str | None = None,
        report: Callable[[str], None] | None = None,
        progress: bool | Callable[..., None] = False,
    ):
        kind = data if isinstance(data, str) else "critters"
        self.budget = budget if isinstance(budget, Budget) else get_budget(budget, kind)
        self.store = store if isinstance(store, RunStore) else RunStore(store)
        if isinstance(data, str):
            root = None if voc_root is None else str(voc_root)
            self.data = open_data(data, self.budget, root, self.store.root / "voc-labels")
        else:
            self.data = data
        self.seed, self.device, self.crf_jobs, self.run = seed, device, crf_jobs, run
        self._report = report or (lambda text: None)
        self._progress = progress
        self._parent = os.getppid() if multiprocessing.parent_process() is not None else None

    def scores(self, configuration: Configuration, measures: Iterable[str] = ("miou",)) -> dict[str, Any]:
        """The measures (keys of MEASURES) of a configuration, made where they are missing: {measure: what its
        stage stored}; ``["miou"]["miou"]`` is a fraction."""
        return {m: self.get(self.stage(MEASURES[m], configuration)).json("scores.json") for m in measures}

    def stored_scores(self, configuration: Configuration, measures: Iterable[str] = ("miou",)) -> dict | None:
        """`scores` if all of them are in the store, else None; makes nothing."""
        found = {}
        for measure in measures:
            stage = self.stage(MEASURES[measure], configuration)
            entry = self._found(stage)
            if entry is None:
                return None
            found[measure] = entry.json("scores.json")
        return found

    def classifier(self, configuration: Configuration, overwrite: bool = False) -> Any:
        """The trained classifier, in evaluation mode on the device. overwrite: train it again."""
        from drs_lib.networks import classifier

        recipe = self._classify_recipe(configuration)
        model = classifier(recipe.backbone, self.data.train.num_classes, recipe.drs_layers, recipe.delta)
        return self._load(model, self._classify(configuration), overwrite)

    def refinement_network(self, configuration: Configuration, overwrite: bool = False) -> Any:
        """The trained refinement network, in evaluation mode on the device. overwrite: train it again."""
        from drs_lib.networks import refinement_network

        model = refinement_network(self.budget.refine.backbone, self.data.train.num_classes)
        return self._load(model, self._refine(configuration), overwrite)

    def segmentation_network(self, configuration: Configuration, overwrite: bool = False) -> Any:
        """The trained DeepLab, in evaluation mode on the device. overwrite: train it again."""
        from drs_lib.networks import deeplab

        recipe = self.budget.segment(configuration.network)
        model = deeplab(recipe.kind, recipe.backbone, self.data.train.num_classes + 1)
        return self._load(model, self._segment(configuration), overwrite)

    def maps(self, configuration: Configuration, dataset: Any = None, indices: Any = None) -> Iterator[tuple]:
        """(index, labels, maps) of images, made as for pseudo labels: the classifier's or, with ``refine``,
        the refinement network's. dataset: None for the training images. indices, and what is yielded: see
        `drs_lib.maps.iterate_maps`."""
        from drs_lib.maps import iterate_maps

        return self._iterate(iterate_maps, configuration, dataset, indices)

    def _iterate(self, iterate, configuration, dataset=None, indices=None):
        from drs_lib.batches import place_of_images
        from drs_lib.data.decoded import decoded

        model = (self.refinement_network if configuration.refine else self.classifier)(configuration)
        recipe = self.budget.refine if configuration.refine else self.budget.classify
        if dataset is None:
            dataset = self._weak_train
            if place_of_images(recipe, self._device) != "files":
                dataset = decoded(dataset, self._image_cache)
        with self._threads(recipe):
            yield from iterate(
                model,
                dataset,
                kind="refined" if configuration.refine else "classifier",
                workers=recipe.workers,
                precision=recipe.precision,
                indices=indices,
                **self._map_config(configuration),
            )

    def _present_maps(self, configuration):
        from drs_lib.maps import iterate_present_maps

        return self._iterate(iterate_present_maps, configuration)

    def labels(self, configuration: Configuration) -> Sequence:
        """The pseudo labels of the training images: a sequence of uint8 (H, W)."""
        return LabelArchive(self.get(self._labels(configuration)).file("labels.zip"))

    def history(self, stage: str, configuration: Configuration) -> list[dict]:
        """dict(epoch, loss, lr, seconds) of each epoch of "classify", "refine" or "segment"."""
        return self.get(self.stage(stage, configuration)).json("history.json")

    def stage(self, name: str, configuration: Configuration) -> Stage:
        """The stage of that name for this configuration. Raises ValueError where it has none."""
        if name not in STAGE_VERSIONS:
            raise ValueError(f"unknown stage {name!r}; expected one of {', '.join(STAGE_VERSIONS)}.")
        if configuration.supervised and name not in ("segment", "evaluate", "evaluate_crf"):
            raise ValueError(f"a fully supervised configuration has no stage {name!r}.")
        if name in ("target", "refine") and not configuration.refine:
            raise ValueError(f"{configuration} has no stage {name!r}: its refine is False.")
        return getattr(self, f"_{name}")(configuration)

    def stages(self, configuration: Configuration, measures: Iterable[str] = ("miou",)) -> list[Stage]:
        """All stages that these measures need, in an order in which they can be made, each once."""
        found = {}
        for measure in measures:
            for stage in self.stage(MEASURES[measure], configuration).chain():
                found.setdefault((stage.name, stage.key), stage)
        return list(found.values())

    def has(self, name: str, configuration: Configuration) -> bool:
        """Whether this configuration's stage of that name is in the store, unverified; makes nothing."""
        stage = self.stage(name, configuration)
        return self.store.has(stage.name, stage.key, self.run)

    def get(self, stage: Stage, overwrite: bool = False) -> Entry:
        """The stage's entry, made if it is not in the store. overwrite: made again, from the stored stages
        that it reads."""
        _expect_a_main_guard()
        if overwrite or not self.store.has(stage.name, stage.key, self.run):
            for parent in stage.parents:
                self.get(parent)

        finished = []

        def make(writer):
            self._stop_if_orphaned()
            self._report(stage.title)
            if overwrite:
                self._checkpoint(stage).remove()
            stage.make(writer)
            writer.note(device=str(self._device))
            finished.append(stage)

        entry = self.store.get_or_make(
            stage.name,
            stage.config,
            stage.inputs,
            make,
            version=STAGE_VERSIONS[stage.name],
            overwrite=overwrite,
            run=self.run,
        )
        if finished:
            self._checkpoint(stage).remove()  # only now that the entry is published
        return entry

    def _found(self, stage):
        version = STAGE_VERSIONS[stage.name]
        return self.store.get(stage.name, stage.config, stage.inputs, version, self.run)

    def _classify(self, configuration):
        recipe = self._classify_recipe(configuration)

        def make(writer):
            from drs_lib.train import train_classifier

            model, history = train_classifier(recipe, self._weak_train, **self._training(stage))
            writer.weights("model.safetensors", model)
            writer.json("history.json", history)

        return (stage := self._trained("classify", configuration, recipe, make))

    def _accuracy(self, configuration):
        classify = self._classify(configuration)
        images = self.data.accuracy_images

        def make(writer):
            from drs_lib.train import evaluate_classifier

            with self._threads(self.budget.classify):
                accuracy = evaluate_classifier(
                    self.classifier(configuration), images, resize=self.budget.resize
                )
            writer.json("scores.json", {"accuracy": accuracy})

        config = {"resize": self.budget.resize}
        return self._derived(
            "accuracy", configuration, config, {"classify": classify}, make, images=_content(images)
        )

    def _map_score(self, configuration):
        source = self._map_source(configuration)
        train = self.data.train

        def make(writer):
            from drs_lib.metrics import MapScore

            score = MapScore(self._alpha(configuration))
            for index, labels, maps in self.maps(configuration):
                score.update(maps[None], train.mask(index)[None], labels[None])
            scores = score.compute()
            per_class = {k: _by_class(train.classes, v) for k, v in scores.pop("per_class").items()}
            writer.json("scores.json", {**{k: _number(v) for k, v in scores.items()}, "per_class": per_class})

        config = self._map_config(configuration) | {"alpha": self._alpha(configuration)}
        return self._derived("map_score", configuration, config, source, make, data=_content(train))

    def _target(self, configuration):
        """What the refinement network learns: the classifier's maps, see `Budget`, in 8 bits."""
        plain = replace(configuration, refine=False)

        def make(writer):
            with writer.open("maps.zip") as file:
                names, largest = self.data.train.names, self.budget.target == "largest"
                classes = write_targets(file, self._present_maps(plain), names, largest)
            writer.json("classes.json", classes)

        config = self._map_config(plain) | {"target": self.budget.target}
        source = self._map_source(plain)
        return self._derived("target", plain, config, source, make, data=_content(self.data.train))

    def _refine(self, configuration):
        target = self._target(configuration)
        recipe = self.budget.refine

        def make(writer):
            from drs_lib.train import train_refinement

            entry = self.get(target)
            targets = TargetMaps(
                entry.file("maps.zip"), entry.json("classes.json"), self.data.train.num_classes
            )
            model, history = train_refinement(recipe, self._weak_train, targets, **self._training(stage))
            writer.weights("model.safetensors", model)
            writer.json("history.json", history)

        return (stage := self._trained("refine", configuration, recipe, make, {"target": target}))

    def _labels(self, configuration):
        budget = self.budget
        rule = {
            "alpha": self._alpha(configuration),
            "beta": budget.beta,
            "rule": budget.rule,
            "conflict": budget.conflict,
        }

        def make(writer):
            with writer.open("labels.zip") as file:
                write_labels(file, self._present_maps(configuration), self._weak_train, **rule)

        config, source = self._map_config(configuration) | rule, self._map_source(configuration)
        return self._derived("labels", configuration, config, source, make, data=self.data.train.fingerprint)

    def _label_score(self, configuration):
        labels = self._labels(configuration)
        train = self.data.train

        def make(writer):
            from drs_lib.metrics import SegmentationScore, mean_iou

            archive = self.labels(configuration)
            score = SegmentationScore(train.num_classes + 1, ignored_prediction="background")
            for index, prediction in enumerate(archive):
                score.update(prediction, train.mask(index))
            # Over the pixels that were given a label; there may be none.
            miou_claimed = mean_iou(score.claimed) if score.claimed.any() else None
            scores = _segmentation_scores(score.compute(), train)
            writer.json("scores.json", scores | {"miou_claimed": miou_claimed})

        return self._derived("label_score", configuration, {}, {"labels": labels}, make, data=_content(train))

    def _segment(self, configuration):
        recipe = self.budget.segment(configuration.network)
        parents = {} if configuration.supervised else {"labels": self._labels(configuration)}

        def make(writer):
            from drs_lib.train import train_segmentation

            # The upper bound, and nothing else, is handed the masks: here, in the open.
            labels = TrueMasks(self.data.train) if configuration.supervised else self.labels(configuration)
            model, history = train_segmentation(recipe, self._weak_train, labels, **self._training(stage))
            writer.weights("model.safetensors", model)
            writer.json("history.json", history)

        extra = {"labels": "masks"} if configuration.supervised else {}
        return (stage := self._trained("segment", configuration, recipe, make, parents, **extra))

    def _evaluate(self, configuration):
        def make(writer):
            writer.json(
                "scores.json", _segmentation_scores(self._segmentation_result(configuration), self.data.val)
            )

        parents = {"segment": self._segment(configuration)}
        return self._derived("evaluate", configuration, {}, parents, make, data=_content(self.data.val))

    def _evaluate_crf(self, configuration):
        crf, engine = self.budget.crf(configuration.network), self.budget.crf_engine

        def make(writer):
            result = self._segmentation_result(configuration, crf=crf, engine=engine, jobs=self.crf_jobs)
            scores = {key: result[f"{key}_crf"] for key in ("miou", "iou")}
            writer.json("scores.json", _segmentation_scores(scores, self.data.val))

        config, parents = asdict(crf) | {"engine": engine}, {"segment": self._segment(configuration)}
        return self._derived(
            "evaluate_crf", configuration, config, parents, make, data=_content(self.data.val)
        )

    def _trained(self, name, configuration, recipe, make, parents=None, **inputs):
        config = recipe.to_dict()
        inputs |= {
            "data": _content(self.data.train),
            "weights": weights_identity(recipe.backbone, config.pop("weights")),
        }
        return self._derived(name, configuration, config | {"seed": self.seed}, parents or {}, make, **inputs)

    def _derived(self, name, configuration, config, parents, make, **inputs):
        inputs |= {role: parent.key for role, parent in parents.items()}
        seed = f", seed {self.seed}" if self.seed else ""
        title = f"{configuration}{seed}: {name.replace('_', ' ')}"
        return Stage(name, title, config, inputs, make, tuple(parents.values()))

    def _classify_recipe(self, configuration):
        return self.budget.classify.replace(drs_layers=configuration.drs_layers, delta=configuration.delta)

    def _map_source(self, configuration):
        if configuration.refine:
            return {"refine": self._refine(configuration)}
        return {"classify": self._classify(configuration)}

    def _map_config(self, configuration):
        config = {"scales": self.budget.scales, "resize": self.budget.resize}
        return config | ({"renormalize": self.budget.renormalize} if configuration.refine else {})

    def _alpha(self, configuration):
        return self.budget.refined_alpha if configuration.refine else self.budget.alpha

    def _segmentation_result(self, configuration, **options):
        from drs_lib.train import evaluate_segmentation

        with self._threads(self.budget.segment(configuration.network)):
            return evaluate_segmentation(self.segmentation_network(configuration), self.data.val, **options)

    def _load(self, model, stage, overwrite=False):
        from drs_lib.runtime import memory_format

        model.load_state_dict(self.get(stage, overwrite).weights())
        return model.eval().to(device=self._device, memory_format=memory_format(self._device))

    def _training(self, stage):
        def on_epoch(history):
            self._stop_if_orphaned()
            last = history[-1]
            self._report(f"{stage.title}, epoch {last['epoch']}, loss {last['loss']:.3f}")

        return {
            "seed": self.seed,
            "device": self._device,
            "progress": self._progress,
            "on_epoch": on_epoch,
            "checkpoint": self._checkpoint(stage),
            "image_cache": self._image_cache,
        }

    def _checkpoint(self, stage):
        from drs_course.checkpoint import Checkpoint

        return Checkpoint(self.store.root / "checkpoints" / f"{stage.name}-{stage.key}.pt", self.run)

    @property
    def _image_cache(self):
        return self.store.root / "decoded"

    @cached_property
    def _device(self):
        from drs_lib.runtime import pick_device

        return pick_device(self.device)

    @cached_property
    def _weak_train(self):
        from drs_lib.data import without_masks

        return without_masks(self.data.train)

    @staticmethod
    def _threads(recipe):
        from drs_lib.runtime import threads

        return threads(recipe.threads)

    @property
    def orphaned(self) -> bool:
        """Whether this is a worker process whose run was killed. (Windows doesn't tell.)"""
        return self._parent is not None and os.getppid() != self._parent

    def _stop_if_orphaned(self):
        # It would otherwise train on, unseen, until its row is finished.
        if self.orphaned:
            raise RuntimeError("the run that this worker process belongs to has ended; stopping.")


def _expect_a_main_guard():
    # Python's own check of the same comes too late: this process would wait for the one that started it.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "this program is run again by each process that reads its images. Put what trains under "
            "'if __name__ == \"__main__\":'."
        )


class TrueMasks(Sequence):
    """A data set's masks as training labels, for the fully supervised upper bound."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.dataset.mask(index)


class LabelArchive(Sequence):
    """Label maps uint8 (H, W) by index, from a zip file of indexed PNGs in VOC's colours, one per image."""

    def __init__(self, path):
        self.path, self._archive, self._process = Path(path), None, None
        with zipfile.ZipFile(self.path) as archive:
            self.names = archive.namelist()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        import numpy as np
        from PIL import Image

        if not 0 <= index < len(self):
            raise IndexError(index)
        return np.array(Image.open(io.BytesIO(self._opened().read(self.names[index]))))

    def _opened(self):
        # A forked process would share the parent's file position.
        process = os.getpid()
        if self._process != process:
            self._archive, self._process = zipfile.ZipFile(self.path), process
        return self._archive

    def __getstate__(self):
        return self.__dict__ | {"_archive": None, "_process": None}


class TargetMaps(LabelArchive):
    """Localization maps by index, float32 (C, H, W) in [0, 1], from 8-bit maps of the present classes, one
    above the other in one greyscale PNG per image."""

    def __init__(self, path, classes, num_classes):
        super().__init__(path)
        self.classes, self.num_classes = classes, num_classes

    def __getitem__(self, index):
        import numpy as np

        present, stack = self.stack(index)
        maps = np.zeros((self.num_classes, *stack.shape[1:]), np.float32)
        maps[present] = stack * np.float32(1 / 255)
        return maps

    def stack(self, index):
        """(classes, their maps as uint8 (n, H, W)); for no class, a map of zeros of the first."""
        classes, stack = self.classes[index] or [0], super().__getitem__(index)
        return classes, stack.reshape(len(classes), -1, stack.shape[1])


def write_targets(file, found, names, largest=False):
    """Targets of the refinement network as a zip file of PNGs, for `TargetMaps`: in 8 bits, an image's maps
    one above the other; of no class, one map of zeros, which remembers the image's size.

    found: what `drs_lib.maps.iterate_present_maps` yields. names: the images'. largest: each pixel
    keeps its largest class only. Returns the classes of each image.
    """
    from drs_lib.maps import keep_largest_class

    classes = []

    def pictures():
        for index, labels, maps in found:
            classes.append(labels.nonzero().flatten().tolist())
            maps = keep_largest_class(maps) if largest else maps
            yield names[index], (maps * 255).round().byte().flatten(0, 1).cpu().numpy()

    write_pngs(file, pictures())
    return classes


def write_labels(file, found, dataset, **rule):
    """Pseudo labels as a zip file of PNGs, for `LabelArchive`.

    found: what `drs_lib.maps.iterate_present_maps` yields. dataset: for saliency and names. rule: of
    `drs_lib.labels.pseudo_labels`.
    """
    from drs_lib.labels import of_classes, pseudo_labels

    def pictures():
        for index, present, maps in found:
            labels = pseudo_labels(maps[None], dataset.saliency(index)[None], **rule)
            classes = present.nonzero().flatten().tolist()
            yield dataset.names[index], of_classes(labels, classes)[0].cpu().numpy()

    write_pngs(file, pictures(), indexed=True)


def write_pngs(file, pictures, indexed=False):
    """A zip file of PNGs, from (name, uint8 (H, W)) in order; indexed: in VOC's colours.

    Compressed by a pool of threads, a few pictures ahead of the one that is being written.
    """
    encode = partial(_png, indexed=indexed)
    with zipfile.ZipFile(file, "w") as archive, ThreadPoolExecutor() as pool:
        waiting = deque()
        for name, pixels in pictures:
            waiting.append((name, pool.submit(encode, pixels)))
            if len(waiting) > PNGS_AHEAD:
                _store(archive, *waiting.popleft())
        while waiting:
            _store(archive, *waiting.popleft())


def _store(archive, name, png):
    # A fixed date, so that the same labels are the same file.
    archive.writestr(zipfile.ZipInfo(f"{name}.png", (1980, 1, 1, 0, 0, 0)), png.result())


def _png(pixels, indexed):
    from PIL import Image

    image = Image.fromarray(pixels)
    if indexed:
        image.putpalette(_palette())
    buffer = io.BytesIO()
    # The fastest setting: it costs a few per cent in size, and training waits for these files.
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@lru_cache
def _palette():
    from drs_lib.data import voc_palette

    return voc_palette().tobytes()


def _content(dataset):
    """What identifies a data set for a stage that looks at no saliency map (only "labels" does)."""
    return getattr(dataset, "fingerprint_without_saliency", dataset.fingerprint)


def weights_identity(backbone: str, weights: str | None) -> str:
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
