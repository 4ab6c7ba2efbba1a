"""Tables 1 to 4 of the paper as data: what each row is, and the number printed there.

Source: B. Kim, S. Han, J. Kim, "Discriminative Region Suppression for Weakly-Supervised Semantic
Segmentation", AAAI 2021, pages 1754-1761. Numbers are percent: mean IoU on VOC 2012 val, for Table 4 also on
test; the two classification accuracies stand in the text beside Table 1.
"""

from dataclasses import dataclass
from typing import Any

SOURCE = "Kim, Han, Kim (AAAI 2021), who do not say which numbers are after CRF"
# Of one row of Table 4 it is known from elsewhere.
AFTER_CRF = (
    "paper, DeepLab-ASPP, learnable: 70.4 is after CRF, 69.4 without, by the README of the authors' release"
)
TITLES = {
    1: "Effect of the two types of controllers and of delta",
    2: "Effect of DRS in each layer",
    3: "Effect of localization map refinement learning",
    4: "Comparison of weakly-supervised semantic segmentation methods",
}
ALL_LAYERS = (1, 2, 3, 4, 5, 6)
BEST_DELTA = 0.55
# The three segmentation networks of Table 4, and what the paper calls them. Tables 1 to 3 use the first.
NETWORKS = {
    "largefov": "DeepLab-Large-FOV (VGG-16)",
    "largefov_resnet": "DeepLab-Large-FOV (ResNet-101)",
    "aspp": "DeepLab-ASPP (ResNet-101)",
}
LEARNABLE, CONSTANT = "learnable", "non-learnable"


@dataclass(frozen=True)
class Configuration:
    """What distinguishes one row from another; everything else is the budget's.

    drs_layers: layers with DRS, () for plain CAM. delta: None for the learnable controller, else the constant
    one's. refine: with localization map refinement learning. network: a key of NETWORKS. supervised: the
    segmentation network is trained on the true masks, without any of the above: the upper bound.
    """

    drs_layers: tuple[int, ...] = ALL_LAYERS
    delta: float | None = None
    refine: bool = False
    network: str = "largefov"
    supervised: bool = False

    def __post_init__(self):
        if self.network not in NETWORKS:
            raise ValueError(f"network is {self.network!r}; expected one of {', '.join(NETWORKS)}.")
        # One row, one configuration, or the run would train the same thing twice.
        if self.supervised and (self.drs_layers != ALL_LAYERS or self.delta is not None or self.refine):
            raise ValueError(
                "supervised=True trains on masks: it takes neither drs_layers nor delta nor refine."
            )
        if not self.drs_layers and self.delta is not None:
            raise ValueError(f"delta is {self.delta!r} but drs_layers is (): plain CAM has no controller.")

    def __str__(self) -> str:
        if self.supervised:
            return f"fully supervised, {self.network}"
        name = "learnable" if self.delta is None else f"delta {self.delta:.2f}"
        if self.drs_layers != ALL_LAYERS:
            name = f"{name} in layers {_span(self.drs_layers)}" if self.drs_layers else "CAM"
        name += ", refined" if self.refine else ""
        return name if self.network == "largefov" else f"{name}, {self.network}"


@dataclass(frozen=True)
class Row:
    """One row of a table: its name there, the paper's mIoU in percent, and the configuration that measures it
    (None for a number quoted from another method). ``columns`` are the table's own further columns."""

    label: str
    paper: float | None
    configuration: Configuration | None
    columns: tuple[tuple[str, Any], ...] = ()


def table_rows(number: int) -> tuple[Row, ...]:
    """The rows of Table 1, 2, 3 or 4, in the paper's order."""
    try:
        return _TABLES[number]
    except (KeyError, TypeError):
        raise ValueError(
            f"there is no Table {number!r}: the paper's results are in Tables 1, 2, 3 and 4."
        ) from None


def _span(layers):
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def _table1():
    yield Row(LEARNABLE, 62.9, Configuration(), (("delta", None), ("paper accuracy", 72.6)))
    scores = {0.90: 51.9, 0.80: 56.0, 0.70: 58.7, 0.60: 62.3, BEST_DELTA: 62.8, 0.50: 62.3, 0.40: 59.6}
    for delta, miou in scores.items():
        columns = (("delta", delta), ("paper accuracy", 68.7 if delta == BEST_DELTA else None))
        yield Row(f"{CONSTANT} with δ={delta:.2f}", miou, Configuration(delta=delta), columns)


def _table2():
    deeper = {(): 50.1, (6,): 60.8, (5, 6): 62.2, (4, 5, 6): 62.8, (3, 4, 5, 6): 62.9, (2, 3, 4, 5, 6): 62.7}
    shallower = {ALL_LAYERS: 62.9, (1, 2, 3, 4, 5): 58.2, (1, 2, 3, 4): 53.6}
    for layers, miou in (deeper | shallower).items():
        label = f"DRS in layer{'s' if len(layers) > 1 else ''} {_span(layers)}" if layers else "no DRS (CAM)"
        marks = tuple((f"layer{layer}", layer in layers) for layer in ALL_LAYERS)
        yield Row(label, miou, Configuration(drs_layers=layers), marks)


def _table3():
    for name, delta, scores in (
        (LEARNABLE, None, (62.9, 63.5)),
        (f"{CONSTANT} (δ={BEST_DELTA:.2f})", BEST_DELTA, (62.8, 63.6)),
    ):
        for refine, miou in zip((False, True), scores, strict=True):
            label = f"{name}, {'with' if refine else 'without'} refine"
            columns = (("suppression controller", name), ("refine", refine))
            yield Row(label, miou, Configuration(delta=delta, refine=refine), columns)


# Method, saliency as extra guidance (the column S), val, test.
_QUOTED = {
    "largefov": (
        ("AE-PSL (Wei et al. 2017)", True, 55.0, 55.7),
        ("GAIN (Li et al. 2018)", True, 55.3, 56.8),
        ("MCOF (Wang et al. 2018)", True, 56.2, 57.6),
        ("AffinityNet (Ahn and Kwak 2018)", False, 58.4, 60.5),
        ("SeeNet (Hou et al. 2018)", True, 61.1, 60.7),
        ("MDC (Wei et al. 2018)", True, 60.4, 60.8),
        ("RRM (Zhang et al. 2020)", False, 60.7, 61.0),
        ("FickleNet (Lee et al. 2019)", True, 61.2, 61.8),
        ("OAA (Jiang et al. 2019)", True, 63.1, 62.8),
        ("ICD (Fan et al. 2020)", True, 64.0, 63.9),
        ("BES (Chen et al. 2020)", False, 60.1, 61.1),
    ),
    "largefov_resnet": (
        ("MCOF (Wang et al. 2018)", True, 60.3, 61.2),
        ("SeeNet (Hou et al. 2018)", True, 63.1, 62.8),
        ("AffinityNet (Ahn and Kwak 2018)", False, 61.7, 63.7),
        ("FickleNet (Lee et al. 2019)", True, 64.9, 65.3),
        ("RRM (Zhang et al. 2020)", False, 66.3, 65.5),
        ("OAA (Jiang et al. 2019)", True, 65.2, 66.4),
        ("ICD (Fan et al. 2020)", True, 67.8, 68.0),
    ),
    "aspp": (
        ("DSRG (Huang et al. 2018)", True, 61.4, 63.2),
        ("BES (Chen et al. 2020)", False, 65.7, 66.6),
        ("SGAN (Yao and Gong 2020)", True, 67.1, 67.2),
    ),
}
# Learnable val and test, then non-learnable val and test.
_OURS = {
    "largefov": ((63.5, 64.5), (63.6, 64.4)),
    "largefov_resnet": ((66.5, 67.5), (66.8, 67.4)),
    "aspp": ((70.4, 70.7), (71.2, 71.4)),
}


def _table4():
    for network, title in NETWORKS.items():
        shared = ("network", title)
        for method, saliency, val, test in _QUOTED[network]:
            yield Row(method, val, None, (shared, ("S", saliency), ("paper test", test)))
        for name, delta, (val, test) in zip(
            (LEARNABLE, CONSTANT), (None, BEST_DELTA), _OURS[network], strict=True
        ):
            configuration = Configuration(delta=delta, refine=True, network=network)
            yield Row(f"Ours ({name})", val, configuration, (shared, ("S", True), ("paper test", test)))
        # The two bounds are the course's: the lower one is the first row of Table 2, and nothing is printed
        # for the upper one.
        if network == "largefov":
            cam, columns = Configuration(drs_layers=()), (shared, ("S", True), ("paper test", None))
            yield Row("lower bound: CAM, not refined", 50.1, cam, columns)
        supervised = Configuration(network=network, supervised=True)
        columns = (shared, ("S", False), ("paper test", None))
        yield Row("upper bound: fully supervised", None, supervised, columns)


_TABLES = {1: tuple(_table1()), 2: tuple(_table2()), 3: tuple(_table3()), 4: tuple(_table4())}
