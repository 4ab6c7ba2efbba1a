"""Recipes: how each of the three networks is trained, as frozen dataclasses.

The defaults are what the paper states in "Implementation details". Where the paper is silent and the authors'
release does something of its own, the field exists and its default is the plain choice (no Nesterov, no
per-group learning rates, no resize); the comment beside it says so. A row of a table is a difference from a
recipe: ``recipe.replace(delta=0.55)``.

A `Budget` is a set of recipes for the whole pipeline, with sizes and thresholds.
"""

import dataclasses
import math
import numbers
import os
from dataclasses import dataclass, field, replace
from typing import Any

from drs_lib.arguments import whole
from drs_lib.crf import CRFConfig

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "poly", "onecycle")
PRECISIONS = ("float32", "bfloat16")
IMAGES = ("auto", "files", "memory", "device")
COMPILE = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
BUDGETS = ("ci", "laptop", "paper", "release")
SEGMENTERS = ("largefov", "largefov_resnet", "aspp")  # Table 4's networks, as fields of a Budget
PARAMETER_GROUPS = ("pretrained weights", "pretrained biases", "new weights", "new biases")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the three stages have in common; use ClassifyRecipe, RefineRecipe or SegmentRecipe.

    Raises ValueError when a value makes no sense, naming the field, what it was and what it may be.
    """

    backbone: str = "vgg16"
    # None (random), "pretrained", or what else drs_lib.networks.load_weights takes, a path for one.
    weights: str | None = "pretrained"

    optimizer: str = "sgd"
    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False  # the release uses it to train the classifier
    weight_decay: float = 5e-4
    bias_decay: bool = True  # False: biases and batch norm's scales and shifts are not decayed
    # Factors on lr for PARAMETER_GROUPS. The paper states one rate; the release multiplies by 1, 2, 10, 20.
    lr_multipliers: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)

    # Exactly one of the two is set. An iteration is one step of the optimiser.
    epochs: int | None = 15
    iterations: int | None = None
    schedule: str = "step"
    # In epochs, or in iterations where `iterations` is set. Epochs count from 1, and the milestone is the
    # first epoch at the lower rate: the paper's "at epoch 5 and 10" as the release reads it.
    milestones: tuple[int, ...] = (5, 10)
    gamma: float = 0.1
    power: float = 0.9  # of the poly schedule
    update_every: int = 1  # poly: iterations between two changes of the rate
    warmup: float = 0.3  # onecycle: the fraction of the training in which the rate rises

    batch: int = 5
    accumulate: int = 1  # batches whose gradients are averaged into one step

    # Augmentation, in this order. See drs_lib.data.transforms.training_transform.
    resize: int | None = None  # the release: 384 for the classifier, 320 for the refinement network
    scale: tuple[float, ...] | None = None  # two values: a range; more: a choice
    crop: int | None = 321
    flip: bool = True
    jitter: tuple[float, ...] | None = (0.3, 0.3, 0.3, 0.1)  # the paper gives no strength; the release's

    precision: str = "float32"
    threads: int | None = None  # None: as many as torch has; see drs_lib.runtime.threads
    # How it is computed. These change no result but for rounding, and so are no part of equality and of
    # to_dict(), as the device is none.
    # Where images are read from, see drs_lib.batches: "files", decoded once and kept in "memory" or on the
    # "device", or "auto": the device if it is a GPU, else files.
    images: str = field(default="auto", compare=False)
    # Processes that read and augment images from files, or make localization maps' inputs.
    workers: int = field(default=4, compare=False)
    # torch.compile's mode ("default", "reduce-overhead", ...) for the training step, or None.
    compile: str | None = field(default=None, compare=False)

    def __post_init__(self):
        for name in ("lr", "momentum", "weight_decay", "gamma", "power", "warmup"):
            self._set(name, self._number(name, getattr(self, name)))
        for name in ("lr_multipliers", "scale", "jitter"):
            values = getattr(self, name)
            if values is not None:
                self._set(name, tuple(self._number(name, value) for value in self._sequence(name, values)))
        for name in ("batch", "accumulate", "update_every"):
            self._set(name, self._whole(name, getattr(self, name), least=1))
        self._set("workers", self._whole("workers", self.workers, least=0))
        for name in ("epochs", "iterations", "resize", "crop", "threads"):
            if getattr(self, name) is not None:
                self._set(name, self._whole(name, getattr(self, name), least=1))
        milestones = self._sequence("milestones", self.milestones)
        self._set("milestones", tuple(self._whole("milestones", m, least=1) for m in milestones))

        self._choice("optimizer", OPTIMIZERS)
        self._choice("schedule", SCHEDULES)
        self._choice("precision", PRECISIONS)
        self._choice("images", IMAGES)
        self._choice("compile", COMPILE)
        for name in ("nesterov", "bias_decay", "flip"):
            self._expect(isinstance(getattr(self, name), bool), name, "True or False")
        self._expect(self.lr > 0, "lr", "above 0")
        self._expect(0 <= self.momentum < 1, "momentum", "from 0 up to but not 1")
        self._expect(self.weight_decay >= 0, "weight_decay", "0 or more")
        self._expect(0 < self.gamma <= 1, "gamma", "above 0 and at most 1")
        self._expect(self.power > 0, "power", "above 0")
        self._expect(0 <= self.warmup < 1, "warmup", "from 0 up to but not 1")
        self._expect(
            len(self.lr_multipliers) == 4 and min(self.lr_multipliers) >= 0,
            "lr_multipliers",
            f"four factors of 0 or more, for {', '.join(PARAMETER_GROUPS)}",
        )
        self._expect(
            all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False)),
            "milestones",
            "increasing",
        )
        self._expect(
            self.scale is None or (len(self.scale) >= 2 and min(self.scale) > 0),
            "scale",
            "None, two factors (a range) or more (a choice), all above 0",
        )
        self._expect(
            self.jitter is None
            or (len(self.jitter) == 4 and min(self.jitter) >= 0 and self.jitter[3] <= 0.5),
            "jitter",
            "None or brightness, contrast, saturation (0 or more) and hue (0 to 0.5)",
        )
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError(
                f"{type(self).__name__}: epochs is {self.epochs!r} and iterations is {self.iterations!r}: "
                "set one of them and leave the other None"
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError(
                f"{type(self).__name__}: nesterov needs optimizer 'sgd' with momentum, found optimizer "
                f"{self.optimizer!r} and momentum {self.momentum}"
            )

    def replace(self, **changes):
        """A copy with some fields changed. Raises ValueError for a field that isn't there."""
        unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(self)})
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no {', '.join(unknown)}; its fields are "
                f"{', '.join(f.name for f in dataclasses.fields(self))}"
            )
        return dataclasses.replace(self, **changes)

    def to_dict(self):
        """Plain JSON values of every field that can change the result, for a file or a key."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values):
        """The recipe that `to_dict` wrote."""
        return cls().replace(**values)

    def steps(self, images):
        """(iterations in an epoch, iterations in the training) for a data set of `images` images.

        An incomplete last batch is left out (another one each epoch, as the order is drawn anew): batch norm
        sees batches of one size. A data set smaller than a batch is one batch.
        """
        if images < 1:
            raise ValueError("the data set is empty: there is nothing to train on")
        per_epoch = max(1, images // (self.batch * self.accumulate))
        return per_epoch, self.iterations if self.iterations is not None else self.epochs * per_epoch

    def at_most(self, epochs, images):
        """The recipe cut to `epochs` epochs over `images` images, counted as the recipe counts; a shorter one
        stays as it is."""
        if self.iterations is None:
            return self.replace(epochs=min(epochs, self.epochs))
        return self.replace(iterations=min(epochs * self.steps(images)[0], self.iterations))

    def lr_factor(self, step, per_epoch, total):
        """The factor on the learning rate at iteration `step`, counted from 0, of `total`.

        step: gamma to the number of milestones reached. poly: (1 - step / total) ** power, changed every
        `update_every` iterations. onecycle: a linear rise over the fraction `warmup`, then half a cosine to
        0.
        """
        if self.schedule == "step":
            reached = step if self.iterations is not None else step // per_epoch + 1
            return self.gamma ** sum(milestone <= reached for milestone in self.milestones)
        if self.schedule == "poly":
            return (1 - step // self.update_every * self.update_every / total) ** self.power
        if self.schedule == "onecycle":
            rise = self.warmup * total
            if step < rise:
                return (step + 1) / (rise + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))
        return 1.0

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    def _expect(self, holds, name, expected):
        if not holds:
            raise ValueError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}: expected {expected}")

    def _choice(self, name, choices):
        self._expect(getattr(self, name) in choices, name, "one of " + ", ".join(map(str, choices)))

    def _number(self, name, value):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{type(self).__name__}: {name} holds {value!r}: expected a finite number")
        return float(value)

    def _whole(self, name, value, least):
        return whole(f"{type(self).__name__}: {name}", value, least)

    def _sequence(self, name, value):
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise ValueError(f"{type(self).__name__}: {name} is {value!r}: expected a sequence")
        return value


# What every Critters recipe shares: 128x128 images held in memory, shown as they are but for the flip. One
# thread, see drs_lib.runtime.threads.
_LAPTOP = dict(
    backbone="mini",
    optimizer="adam",
    lr=1e-3,
    weight_decay=0.0,
    lr_multipliers=(1, 1, 10, 10),
    epochs=7,
    iterations=None,
    schedule="onecycle",
    warmup=0.15,
    batch=16,
    accumulate=1,
    resize=None,
    scale=None,
    crop=None,
    flip=True,
    jitter=None,
    threads=1,
    workers=0,
)


@dataclass(frozen=True, kw_only=True)
class ClassifyRecipe(Recipe):
    """The classifier with DRS (Figure 3 (a)): binary cross-entropy, SGD, 15 epochs, batch 5."""

    drs_layers: tuple[int, ...] = (1, 2, 3, 4, 5, 6)  # () is plain CAM
    delta: float | None = None  # None: the learnable controller

    def __post_init__(self):
        super().__post_init__()
        layers = self._sequence("drs_layers", self.drs_layers)
        self._set(
            "drs_layers", tuple(sorted({self._whole("drs_layers", layer, least=1) for layer in layers}))
        )
        self._expect(all(layer <= 6 for layer in self.drs_layers), "drs_layers", "layer numbers from 1 to 6")
        if self.delta is not None:
            self._set("delta", self._number("delta", self.delta))
            self._expect(0 < self.delta <= 1, "delta", "None (learnable), or above 0 and at most 1")

    @classmethod
    def laptop(cls):
        """For Critters on a laptop's CPU."""
        # The multiplier gives the controllers time to leave their start at 0.5.
        return cls(**_LAPTOP | {"epochs": 5, "lr": 2e-3, "lr_multipliers": (1, 1, 5, 5)})

    @classmethod
    def ci(cls):
        """The laptop's recipe cut to one epoch, for tests."""
        return cls.laptop().replace(epochs=1)


@dataclass(frozen=True, kw_only=True)
class RefineRecipe(Recipe):
    """Localization map refinement learning (Figure 3 (b)): mean-squared error, Adam, 15 epochs, batch 5."""

    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0  # the paper names none for this network
    # "map": N and the target M have the network's output size, as in the paper. "image": both at the image's
    # size, as in the release.
    loss_size: str = "map"
    # Whether the loss leaves out the classes that are not in the image. The release doesn't, and the paper's
    # loss is over all of N and M.
    label_mask: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._choice("loss_size", ("map", "image"))
        self._expect(isinstance(self.label_mask, bool), "label_mask", "True or False")

    @classmethod
    def laptop(cls):
        """For Critters on a laptop's CPU."""
        return cls(**_LAPTOP)

    @classmethod
    def ci(cls):
        """The laptop's recipe cut to one epoch, for tests."""
        return cls.laptop().replace(epochs=1)


@dataclass(frozen=True, kw_only=True)
class SegmentRecipe(Recipe):
    """A DeepLab on pseudo labels (Figure 3 (c)). The defaults are Tables 1 to 3's: LargeFOV on VGG-16.

    The paper sends the reader to the two implementations it used; these are their values. The first one's
    other schedule, 6,000 iterations of batch 30, is
    ``SegmentRecipe(iterations=6000, batch=30, schedule="step", milestones=(4000, 5000))``.
    """

    kind: str = "largefov"
    bias_decay: bool = False
    lr_multipliers: tuple[float, ...] = (1.0, 2.0, 10.0, 20.0)
    epochs: int | None = None
    iterations: int | None = 20_000
    schedule: str = "poly"
    batch: int = 10
    scale: tuple[float, ...] | None = (0.5, 1.5)
    jitter: tuple[float, ...] | None = None
    # "logits": the labels are sampled (nearest) at each output's size. "image": the outputs are upsampled.
    loss_size: str = "logits"

    def __post_init__(self):
        super().__post_init__()
        self._choice("kind", ("largefov", "aspp"))
        self._choice("loss_size", ("logits", "image"))

    @classmethod
    def largefov_vgg16(cls):
        """Table 4, first block: DeepLab-LargeFOV with VGG-16."""
        return cls()

    @classmethod
    def largefov_resnet101(cls):
        """Table 4, second block: DeepLab-LargeFOV with ResNet-101.

        The rate is the lower end of those in use, 2.5e-4 to 1e-3. The body has no biases to train (its batch
        norm is frozen), so their multiplier is 1.
        """
        return cls(backbone="resnet101", lr=2.5e-4, bias_decay=True, lr_multipliers=(1, 1, 10, 20))

    @classmethod
    def aspp_resnet101(cls):
        """Table 4, third block: DeepLab-ASPP (DeepLab-v2) with ResNet-101, batches of 10 as two of 5.

        The published number starts from COCO segmentation weights: weights="coco", or the path of a file.
        """
        return cls(
            kind="aspp",
            backbone="resnet101",
            lr=2.5e-4,
            bias_decay=True,
            lr_multipliers=(1, 1, 10, 20),
            update_every=10,
            batch=5,
            accumulate=2,
            scale=(0.5, 0.75, 1.0, 1.25, 1.5),
        )

    @classmethod
    def laptop(cls, kind="largefov", backbone="mini"):
        """For Critters on a laptop's CPU."""
        return cls(**{**_LAPTOP, "kind": kind, "backbone": backbone})

    @classmethod
    def ci(cls, kind="largefov", backbone="mini"):
        """The laptop's recipe cut to one epoch, for tests."""
        return cls.laptop(kind, backbone).replace(epochs=1)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Sizes, recipes and thresholds of a run. Budgets differ in these values, never in code paths.

    train_images, val_images, image_size: for Critters, which is drawn to order; VOC is what it is.
    largefov, largefov_resnet, aspp: recipes of Table 4's three networks; crf_...: the CRF of each.
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

    def __post_init__(self):
        if self.target not in ("maps", "largest"):
            raise ValueError(f"Budget: target is {self.target!r}; expected 'maps' or 'largest'.")

    def segment(self, network: str) -> SegmentRecipe:
        return getattr(self, network)

    def crf(self, network: str) -> CRFConfig:
        return getattr(self, f"crf_{network}")

    def replace(self, **changes: Any) -> "Budget":
        return replace(self, **changes)

    def for_all(self, **changes: Any) -> "Budget":
        """The budget with changes of all five recipes, such as ``precision="float32"``."""
        recipes = ("classify", "refine", *SEGMENTERS)
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
