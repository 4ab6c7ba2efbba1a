"""Recipes: how each of the three networks is trained; a `Budget` is a set of them with sizes and thresholds.

The defaults are what the paper states in "Implementation details". Where the paper is silent and the authors'
release does something of its own, there is a field for it, and a comment beside it. It is off by default (no
Nesterov, one learning rate for all, no resize). The strength of the colour jitter and the sizes from which
maps are made, for which the paper gives no number, are the release's. A row of a table is a change of a
recipe: ``recipe.replace(delta=0.55)``.
"""

import dataclasses
import math
import numbers
import os
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin

from drs_lib.arguments import whole
from drs_lib.crf import CRFConfig

PRECISIONS = ("float32", "bfloat16")
BUDGETS = ("ci", "laptop", "paper", "release")
SEGMENTERS = ("largefov", "largefov_resnet", "aspp")  # Table 4's networks, as fields of a `Budget`
PARAMETER_GROUPS = ("pretrained weights", "pretrained biases", "new weights", "new biases")


def _one_of(*choices):
    return lambda value: value in choices, "one of " + ", ".join(map(str, choices))


# {field: (what holds, in words)}, beyond what the fields' types say.
CHECKS = {
    "optimizer": _one_of("sgd", "adam"),
    "schedule": _one_of("constant", "step", "poly", "onecycle"),
    "precision": _one_of(*PRECISIONS),
    "images": _one_of("auto", "files", "memory"),
    "lr": (lambda lr: lr > 0, "above 0"),
    "momentum": (lambda momentum: 0 <= momentum < 1, "from 0 up to but not 1"),
    "weight_decay": (lambda decay: decay >= 0, "0 or more"),
    "gamma": (lambda gamma: 0 < gamma <= 1, "above 0 and at most 1"),
    "power": (lambda power: power > 0, "above 0"),
    "warmup": (lambda warmup: 0 <= warmup < 1, "from 0 up to but not 1"),
    "lr_multipliers": (
        lambda factors: len(factors) == 4 and min(factors) >= 0,
        f"four factors of 0 or more, for {', '.join(PARAMETER_GROUPS)}",
    ),
    "milestones": (lambda milestones: list(milestones) == sorted(set(milestones)), "increasing"),
    "scale": (
        lambda scale: scale is None or (len(scale) >= 2 and min(scale) > 0),
        "None, two factors (a range) or more (a choice), all above 0",
    ),
    "jitter": (
        lambda jitter: jitter is None or (len(jitter) == 4 and min(jitter) >= 0 and jitter[3] <= 0.5),
        "None or brightness, contrast, saturation (0 or more) and hue (0 to 0.5)",
    ),
}


def _converted(what, kind, value, least):
    """The value as its annotation says: float, bool, int of `least` or more, a tuple of such, or None."""
    if get_origin(kind) is UnionType:
        return None if value is None else _converted(what, get_args(kind)[0], value, least)
    if get_origin(kind) is tuple:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
            raise ValueError(f"{what} is {value!r}: expected a sequence")
        return tuple(_converted(what, get_args(kind)[0], one, least) for one in value)
    if kind is int:
        return whole(what, value, least)
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"{what} holds {value!r}: expected a finite number")
        return float(value)
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{what} is {value!r}: expected True or False")
    return value


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the three stages have in common. A value that makes no sense raises ValueError, naming the field,
    what it was and what it may be."""

    checks: ClassVar[dict] = CHECKS

    backbone: str = "vgg16"
    # None (random), "pretrained", or what else drs_lib.weights.load_weights takes, a path for one.
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
    # The rest changes results by rounding at most, as the device does: equality and to_dict() leave it out.
    # Where images are read from, see drs_lib.batches: "files", "memory", or "auto": memory for a CUDA GPU,
    # else files.
    images: str = field(default="auto", compare=False)
    # Processes that read and augment images from files, or make localization maps' inputs.
    workers: int = field(default=4, compare=False, metadata={"least": 0})

    def __post_init__(self):
        me = type(self).__name__
        for one in dataclasses.fields(self):
            value, least = getattr(self, one.name), one.metadata.get("least", 1)
            object.__setattr__(self, one.name, _converted(f"{me}: {one.name}", one.type, value, least))
        for name, (holds, expected) in self.checks.items():
            if not holds(getattr(self, name)):
                raise ValueError(f"{me}: {name} is {getattr(self, name)!r}: expected {expected}")
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError(
                f"{me}: epochs is {self.epochs!r} and iterations is {self.iterations!r}: set one of them and "
                "leave the other None"
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError(
                f"{me}: nesterov needs optimizer 'sgd' with momentum, found optimizer {self.optimizer!r} and "
                f"momentum {self.momentum}"
            )

    def replace(self, **changes):
        """A copy with some fields changed. Raises ValueError for a field that isn't there."""
        names = [one.name for one in dataclasses.fields(self)]
        if unknown := sorted(set(changes) - set(names)):
            raise ValueError(
                f"{type(self).__name__} has no {', '.join(unknown)}; its fields are {', '.join(names)}"
            )
        return replace(self, **changes)

    def to_dict(self):
        """Plain JSON values of every field that can change the result, for a file or a key."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.compare}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

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
        """The factor on the learning rate at iteration `step`, counted from 0, of `total`. onecycle: a linear
        rise over the fraction `warmup`, then half a cosine to 0."""
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

    @classmethod
    def laptop(cls, **changes):
        """For Critters on a laptop's CPU."""
        return cls(**LAPTOP | changes)


# What every Critters recipe shares: 128x128 images held in memory, shown as they are but for the flip. One
# thread, see drs_lib.runtime.threads.
LAPTOP = dict(
    backbone="mini", optimizer="adam", lr=1e-3, weight_decay=0.0, lr_multipliers=(1, 1, 10, 10), epochs=7,
    iterations=None, schedule="onecycle", warmup=0.15, batch=16, accumulate=1, scale=None, crop=None,
    jitter=None, threads=1, workers=0,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClassifyRecipe(Recipe):
    """The classifier with DRS (Figure 3 (a)): binary cross-entropy, SGD, 15 epochs, batch 5."""

    checks: ClassVar[dict] = CHECKS | {
        "drs_layers": (lambda layers: max(layers, default=1) <= 6, "layer numbers from 1 to 6"),
        "delta": (
            lambda delta: delta is None or 0 < delta <= 1,
            "None (learnable), or above 0 and at most 1",
        ),
    }

    drs_layers: tuple[int, ...] = (1, 2, 3, 4, 5, 6)  # () is plain CAM
    delta: float | None = None  # None: the learnable controller

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "drs_layers", tuple(sorted(set(self.drs_layers))))

    @classmethod
    def laptop(cls, **changes):
        """For Critters on a laptop's CPU."""
        # The multiplier gives the controllers time to leave their start at 0.5.
        return super().laptop(**dict(epochs=5, lr=2e-3, lr_multipliers=(1, 1, 5, 5)) | changes)


@dataclass(frozen=True, kw_only=True)
class RefineRecipe(Recipe):
    """Localization map refinement learning (Figure 3 (b)): mean-squared error, Adam, 15 epochs, batch 5."""

    checks: ClassVar[dict] = CHECKS | {"loss_size": _one_of("map", "image")}

    optimizer: str = "adam"
    lr: float = 1e-4
    weight_decay: float = 0.0  # the paper names none for this network
    # "map": N and the target M have the network's output size, as in the paper. "image": both at the image's
    # size, as in the release.
    loss_size: str = "map"
    # Whether the loss leaves out the classes that are not in the image. The release doesn't, and the paper's
    # loss is over all of N and M.
    label_mask: bool = False


@dataclass(frozen=True, kw_only=True)
class SegmentRecipe(Recipe):
    """A DeepLab on pseudo labels (Figure 3 (c)). The defaults are Tables 1 to 3's: LargeFOV on VGG-16.

    The paper sends the reader to the two implementations it used; these are their values. The first one has
    another schedule too: ``iterations=6000, batch=30, schedule="step", milestones=(4000, 5000)``.
    """

    checks: ClassVar[dict] = CHECKS | {
        "kind": _one_of("largefov", "aspp"),
        "loss_size": _one_of("logits", "image"),
    }

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

    @classmethod
    def largefov_resnet101(cls, **changes):
        """Table 4, second block: DeepLab-LargeFOV with ResNet-101."""
        # The rate is the lower end of those in use, 2.5e-4 to 1e-3. The body has no biases to train (its
        # batch norm is frozen), so their multiplier is 1.
        own = dict(backbone="resnet101", lr=2.5e-4, bias_decay=True, lr_multipliers=(1, 1, 10, 20))
        return cls(**own | changes)

    @classmethod
    def aspp_resnet101(cls):
        """Table 4, third block: DeepLab-ASPP (DeepLab-v2) with ResNet-101, batches of 10 as two of 5.

        The published number starts from COCO segmentation weights: weights="coco", or the path of a file.
        """
        return cls.largefov_resnet101(
            kind="aspp", update_every=10, batch=5, accumulate=2, scale=(0.5, 0.75, 1.0, 1.25, 1.5)
        )

    @classmethod
    def laptop(cls, kind="largefov", backbone="mini", **changes):
        """For Critters on a laptop's CPU."""
        return super().laptop(kind=kind, backbone=backbone, **changes)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Sizes, recipes and thresholds of a run. All budgets run the same program, with these values.

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
        return dict(zip(SEGMENTERS, (self.largefov, self.largefov_resnet, self.aspp), strict=True))[network]

    def crf(self, network: str) -> CRFConfig:
        crfs = (self.crf_largefov, self.crf_largefov_resnet, self.crf_aspp)
        return dict(zip(SEGMENTERS, crfs, strict=True))[network]

    def replace(self, **changes: Any) -> "Budget":
        return replace(self, **changes)

    def for_all(self, **changes: Any) -> "Budget":
        """The budget with changes of all five recipes, such as ``precision="bfloat16"``."""
        recipes = {name: value for name, value in vars(self).items() if isinstance(value, Recipe)}
        return self.replace(**{name: recipe.replace(**changes) for name, recipe in recipes.items()})


def get_budget(name: str | None = None, data: str = "critters") -> Budget:
    """The budget "ci" (for tests), "laptop", "paper" (the paper's recipes; a GPU) or, on VOC, "release" (what
    the authors' released code does where it differs). None: what the environment variable DRS_BUDGET says,
    else "laptop" on Critters, "paper" on VOC.

    The environment variable DRS_PRECISION takes the place of every recipe's precision: "float32", as in the
    paper, or "bfloat16", in which a GPU is faster.

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
        largefov=SegmentRecipe.laptop(),
        # Fewer epochs on the dearer backbone, which starts from better weights.
        largefov_resnet=SegmentRecipe.laptop("largefov", "mini_resnet", epochs=5),
        aspp=SegmentRecipe.laptop("aspp", "mini_resnet", epochs=5),
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
        largefov=SegmentRecipe(),
        largefov_resnet=SegmentRecipe.largefov_resnet101(),
        aspp=SegmentRecipe.aspp_resnet101(),
        train_images=10_582,
        val_images=1_449,
        image_size=376,
        # The paper doesn't state them; these are the release's.
        scales=(256, 320, 384),
        resize=320,
    )


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
        "accumulate": 1, "crop": 65, "threads": 1, "workers": 0,
    }  # fmt: skip
    return _paper().for_all(**short).replace(name="ci", scales=None, resize=64)
