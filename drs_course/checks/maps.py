"""Checks of what notebooks 01 and 05 ask to be written: localization maps, cues, the refinement's loss."""

from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import conv2d, interpolate

from drs_course.checks.functions import Case, called, compare, generator, randn, some_numbers
from drs_course.checks.verdict import Wrong, check, found

_SMALL = torch.tensor([[[[-1.0, 0.0, 2.0], [-2.0, 4.0, 8.0]], [[-3.0, -1.0, -2.0], [-0.5, -4.0, -1.5]]]])


def _class_maps(n, c, h, w, seed, dtype=torch.float32):
    """Random class maps of different size, the first without a positive value."""
    F = randn(n, c, h, w, seed=seed, dtype=dtype) * torch.linspace(1, 6, n * c, dtype=dtype).view(n, c, 1, 1)
    F[0, 0] = -F[0, 0].abs() - 1
    return F


def _same(x):
    return x


def _guarded(peak):
    return peak.clamp(min=1e-5)


def _rescaled(F, dims=(2, 3), lowest=_same, peak=lambda low, high: _guarded(high - low)):
    """Maps rescaled from their minimum to their maximum."""
    low, high = F.amin(dims, keepdim=True), F.amax(dims, keepdim=True)
    return (F - lowest(low)) / peak(low, high)


def _equation_1(F, dims=(2, 3), X=torch.relu, of=torch.relu, by=torch.amax, guard=_guarded):
    """Equation 1: X(F) divided by the largest value of of(F) over some dimensions."""
    return X(F) / guard(by(of(F), dims, keepdim=True))


_MAP_SLIPS = {
    "each map is divided by the batch's maximum": {"dims": (0, 2, 3)},
    "all classes of an image are divided by one maximum": {"dims": (1, 2, 3)},
    "all maps are divided by one maximum, that of the batch": {"dims": (0, 1, 2, 3)},
    "the maximum is taken over the classes, at every position": {"dims": 1},
    "every row has its own maximum": {"dims": 3},
    "the ReLU is left out": (
        {"X": _same},
        {"X": _same, "of": _same, "guard": lambda peak: peak + 1e-5},
        {"X": _same, "of": _same, "guard": _same},
    ),
    "nothing guards against 0 / 0 in a map of zeros": {"guard": _same},
    "the division is left out": {"guard": torch.ones_like},
    "the absolute value takes the place of the ReLU": {"X": torch.abs, "of": torch.abs},
    "the sigmoid takes the place of equation 1": {"X": torch.sigmoid, "guard": torch.ones_like},
    "each map is rescaled from its minimum to its maximum, without the ReLU": {
        "X": _rescaled,
        "guard": torch.ones_like,
    },
    "maps are divided by their sum": {"by": torch.sum},
    "maps are divided by their mean": {"by": torch.mean},
}


@check("01", "A", "a function f(F), F (N, C, h, w): tensor like F")
def localization_map(answer):
    """Equation 1: from class maps to localization maps (01, exercise A).

    The class maps F are floating-point, with negative values. The tensor's values are in [0, 1],

        M = relu(F) / max F    (the maximum of each map),

    and 0, not nan, for a map without a positive value. A guard of up to 1e-5 in the denominator is fine.
    """
    low = 0.05 * _class_maps(2, 3, 4, 5, seed=29)  # maxima below 1, and in one map just 0
    low[1, 2] = -low[1, 2].abs()
    low[1, 2, 3, 1] = 0.0
    cases = (
        (_SMALL,),
        (_class_maps(3, 4, 5, 7, seed=20),),
        (low,),
        (_class_maps(2, 3, 8, 6, seed=21, dtype=torch.float64),),
        (_class_maps(1, 2, 3, 4, seed=22).roll(1, 1),),
    )
    compare(answer, _equation_1, cases, _MAP_SLIPS)


def _enlarged(F, size, mode="bilinear", align_corners=True):
    return interpolate(F, tuple(size), mode=mode, align_corners=align_corners)


def _of_size(F, size, before=_same, mode="bilinear", align_corners=True, **parts):
    return _equation_1(_enlarged(before(F), size, mode, align_corners), **parts)


@check("01", "A", "a function f(F, size), F (N, C, h, w): tensor (N, C, H, W)")
def map_of_image_size(answer):
    """Localization maps as large as their image, enlarged first and divided after that (01, exercise A).

    size is a pair (H, W). The class maps F are enlarged to it (bilinear, align_corners=True), then comes
    equation 1, so that the largest value of a map is 1 at the image's size.
    """
    cases = (
        (_class_maps(2, 3, 4, 5, seed=23), (13, 22)),
        (_class_maps(3, 2, 5, 3, seed=24, dtype=torch.float64), (16, 12)),
    )
    slips = {
        "maps are divided first and enlarged after that": lambda F, size: _enlarged(_equation_1(F), size),
        "the ReLU comes before enlarging": {"before": torch.relu},
        "align_corners=True is left out": {"align_corners": False},
        "mode is left out or 'nearest'": {"mode": "nearest", "align_corners": None},
        "mode is 'bicubic'": {"mode": "bicubic"},
        **_MAP_SLIPS,
    }
    compare(answer, _of_size, cases, slips, ("F", "size"))


@check("01", "3", "a function f(F), F (N, C, h, w): tensor like F")
def minmax_map(answer):
    """Class maps rescaled from their minimum to their maximum, without a ReLU (01, exercise 3).

    Each map's minimum becomes 0 and its maximum 1, (F - min F) / (max F - min F). A constant map becomes 0,
    not nan.
    """
    flat = _class_maps(2, 3, 4, 6, seed=25)
    flat[1, 1] = 0.0
    cases = ((_SMALL,), (flat,), (_class_maps(3, 2, 7, 5, seed=26, dtype=torch.float64),))
    slips = {
        "minimum and maximum are taken over the batch too": {"dims": (0, 2, 3)},
        "all classes of an image share one minimum and maximum": {"dims": (1, 2, 3)},
        "there is one minimum and maximum for the whole batch": {"dims": (0, 1, 2, 3)},
        "minimum and maximum are taken over the classes, at every position": {"dims": 1},
        "the ReLU is still there: that is equation 1": _equation_1,
        "nothing guards against 0 / 0 in a constant map": {"peak": lambda low, high: high - low},
        "the minimum is subtracted above, but not in the denominator": (
            {"peak": lambda low, high: high},
            {"peak": lambda low, high: high + 1e-5},
        ),
        "the division is left out": {"peak": lambda low, high: 1},
        "the minimum is not subtracted": {"lowest": torch.zeros_like},
        "maps are rescaled to -1 to 1": lambda F: 2 * _rescaled(F) - 1,
        "maps are upside down": lambda F: 1 - _rescaled(F),
    }
    compare(answer, _rescaled, cases, slips)


@check("01", "4", "a function f(F), F (N, C, h, w): tensor (N, C)")
def global_max_pooling(answer):
    """Scores by global max pooling in place of GAP (01, exercise 4).

    They are the scores before the sigmoid: the maximum of each map. F must receive the gradient, which
    reaches the maximum alone.
    """
    cases = (
        (_SMALL,),
        (_class_maps(3, 4, 5, 7, seed=27),),
        (_class_maps(2, 3, 6, 4, seed=28, dtype=torch.float64),),
    )
    slips = {
        "the mean is taken: that is GAP": lambda F: F.mean((2, 3)),
        "the sum is taken": lambda F: F.sum((2, 3)),
        "the ReLU comes first: a score could then never be negative": lambda F: F.relu().amax((2, 3)),
        "the sigmoid is taken already; the loss expects scores without": lambda F: F.amax((2, 3)).sigmoid(),
        "the largest absolute value is taken": lambda F: F.abs().amax((2, 3)),
        "the minimum is taken": lambda F: F.amin((2, 3)),
        "a smooth maximum, logsumexp, is taken": lambda F: F.logsumexp((2, 3)),
        "the maximum is taken over the batch too": lambda F: F.amax((0, 2, 3)).expand(len(F), -1),
        "rows are pooled by maximum and columns by mean": lambda F: F.amax(3).mean(2),
    }
    compare(answer, lambda F: F.amax((2, 3)), cases, slips, wrt=("F",))


_REGIONS = ("head", "body", "elsewhere")


def _region(result, wanted):
    """Reads the name of a region, as its number."""
    if not isinstance(result, str):
        raise Wrong(f"the result is {found(result)}; expected the name of a region")
    if result not in _REGIONS:
        raise Wrong(f"the result is {result!r}; expected one of {', '.join(map(repr, _REGIONS))}")
    return torch.tensor(float(_REGIONS.index(result)), dtype=torch.float64)


def _regions(parts):
    return {name: parts == number for number, name in enumerate(_REGIONS)}


def _region_at(values, regions, place=np.argmax):
    """The name of the region at place(values), a flat position."""
    return next(name for name, here in regions.items() if here.flat[place(values)])


def _region_by(measure):
    """The name of the region with the largest measure(values, region)."""
    return lambda v, r: max(r, key=lambda name: measure(v, r[name]) if r[name].any() else -np.inf)


@check("01", "2", "a function f(values, regions), (H, W) and name -> bool (H, W): a name")
def peak_region(answer):
    """In which region the maximum of a map lies (01, exercise 2).

    values is a map, an array; regions a dictionary from names ("head", "body", "elsewhere") to arrays that
    share the positions out. The name is that of the region that holds the maximum.
    """
    cases = []
    for seed in range(24):
        h, w = ((4, 9), (7, 5), (6, 6))[seed % 3]
        values = np.random.default_rng(100 + seed).normal(-0.2, 1, (h, w))
        regions = _regions(np.random.default_rng(seed).integers(0, 3, (h, w)))
        cases.append(Case((values, regions), f"map and regions of {h}x{w}, number {seed + 1}"))
    regions = _regions(np.array([[2, 2, 2, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    lone = np.full((3, 5), -2.0)
    lone[0, 3], lone[1, 0], lone[2, 4] = 0.9, -3.0, 0.5
    cases.append(Case((lone, regions), "a map whose maximum is in its first row, on a small head"))
    below = np.random.default_rng(99).uniform(-3, -2, (3, 5))
    below[2, 1] = -0.5
    cases.append(Case((below, regions), "a map without a positive value, whose maximum is on the body"))
    slips = {
        "the minimum is looked for": {"place": np.argmin},
        "the largest absolute value is looked for": {"place": lambda values: abs(values).argmax()},
        "the region with the highest mean is named": _region_by(lambda values, here: values[here].mean()),
        "the region with the largest sum is named": _region_by(lambda values, here: values[here].sum()),
        "the largest region is named": _region_by(lambda values, here: here.sum()),
        **{f"the answer is always {name!r}": lambda v, r, name=name: name for name in _REGIONS},
    }
    numbered = ", ".join(f"{k} {name}" for k, name in enumerate(_REGIONS))
    result = f"the number of the region ({numbered})"
    compare(answer, _region_at, cases, slips, read=_region, result=result)


def _shares(values, truth, alpha, of=lambda n: (n.hit / n.true, n.hit / n.cue), cue=np.greater):
    """Recall and precision of the numbers of pixels n; cue(values, alpha)."""
    on = cue(values, alpha)
    n = {"hit": on & truth, "cue": on, "true": truth, "union": on | truth}
    return of(SimpleNamespace(pixels=truth.size, **{name: which.sum() for name, which in n.items()}))


@check("01", "3", "a function f(values, truth, alpha), (H, W) arrays: (recall, precision)")
def cue_scores(answer):
    """Recall and precision of the object cue (01, *Does another threshold help?* and exercise 3).

    values is a map, not always in [0, 1]; truth holds bools; alpha is a number. The cue is values > alpha.

        recall = |cue and truth| / |truth|,    precision = |cue and truth| / |cue|.
    """
    small = np.array([[0.1, 0.25, 0.5, 0.75], [0.25, 0.9, 0.3, 0.0]])
    cases = [(small, np.array([[False, True, True, False]] * 2), 0.25)]
    for seed, (h, w), alpha, unit in ((0, (6, 9), 0.5, 16), (1, (8, 5), 0.25, 8)):
        rng = np.random.default_rng(seed)
        truth = rng.random((h, w)) < 0.4
        values = (rng.integers(0, 13, (h, w)) + 3 * truth) / unit  # so that some are equal to alpha
        cases.append((values, truth, alpha))
    slips = {
        "precision comes first and recall second": {"of": lambda n: (n.hit / n.cue, n.hit / n.true)},
        "the cue is values >= alpha: values equal to alpha are no cue": {"cue": np.greater_equal},
        "the cue is values < alpha": {"cue": np.less},
        "alpha is taken as a share of the map's maximum": {"cue": lambda v, alpha: v > alpha * v.max()},
        "shares are given in percent": {"of": lambda n: (100 * n.hit / n.true, 100 * n.hit / n.cue)},
        "the IoU is computed": {"of": lambda n: (n.hit / n.union, n.hit / n.union)},
        "precision is divided by the union": {"of": lambda n: (n.hit / n.true, n.hit / n.union)},
        "both are divided by all pixels": {"of": lambda n: (n.hit / n.pixels, n.hit / n.pixels)},
        "pixels are counted and not divided": {"of": lambda n: (n.hit, n.hit)},
        "the map's values are added up, without a threshold": lambda values, truth, alpha: (
            values[truth].sum() / truth.sum(),
            values[truth].sum() / values.sum(),
        ),
        "the share of the cue that is wrong takes the place of precision": {
            "of": lambda n: (n.hit / n.true, (n.cue - n.hit) / n.cue)
        },
    }
    compare(answer, _shares, cases, slips, read=some_numbers("recall", "precision"))


_CHANGES = ("kept", "recovered, right", "recovered, wrong", "removed, right", "removed, wrong")


def _changes(before, after, mask, label, seen=lambda m, k: m, kept=lambda b, a, right: b & a, order=range(5)):
    """The five counts; seen(mask, label): what is read of the mask, kept(before, after, right)."""
    mask = seen(mask, label)
    scored, right = mask != 255, mask == label
    new, gone = after & ~before, before & ~after
    parts = (kept(before, after, right), new & right, new & ~right, gone & ~right, gone & right)
    return [int((parts[k] & scored).sum()) for k in order]


@check("05", "2", "a function f(before, after, mask, label), (H, W) arrays: five counts")
def cue_changes(answer):
    """What changes when a cue takes another's place (05, *Recovered and removed* and exercise 2).

    before and after are the two cues, bools; mask is uint8, and label the class that the cues are of, 1..C.
    The five numbers of pixels, without those whose mask is 255, are: kept (in both cues); recovered (new) and
    right, the mask being the class; recovered and wrong; removed and right, the mask not being the class;
    removed and wrong.
    """
    cases = []
    for seed, (h, w), label in ((0, (2, 8), 1), (1, (9, 7), 3), (2, (6, 11), 2)):
        rng = np.random.default_rng(seed)
        mask = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (h, w), p=[0.35, 0.2, 0.15, 0.2, 0.1])
        before, after = rng.random((h, w)) < 0.6, rng.random((h, w)) < 0.45
        mask.flat[:3], before.flat[:3], after.flat[:3] = 255, [True, True, False], [True, False, True]
        cases.append((before, after, mask, label))
    exchanged = "removed pixels are right where the mask is the class; it is the other way round"
    slips = {
        exchanged: {"order": (0, 1, 2, 4, 3)},
        "right and wrong are exchanged": {"order": (0, 2, 1, 4, 3)},
        "a recovered pixel is right where the mask is not the class": {"order": (0, 2, 1, 3, 4)},
        "the two cues are exchanged": lambda before, after, *rest: _changes(after, before, *rest),
        "pixels masked 255 are counted as if they were background": {"seen": lambda m, k: m * (m < 255)},
        "pixels masked 255 are counted as if they were the class": {
            "seen": lambda m, k: np.where(m < 255, m, k)
        },
        "the label is one too low: classes count from 1 in a mask": lambda b, a, m, k: _changes(
            b, a, m, k - 1
        ),
        "an object of any class counts as the class": {"seen": lambda m, k: np.where(m % 255, k, m)},
        "what is in either cue counts as kept": {"kept": lambda b, a, right: b | a},
        "only right pixels count as kept": {"kept": lambda b, a, right: b & a & right},
        "what is in neither cue counts as kept, too": {"kept": lambda b, a, right: b == a},
        "counts are divided by the pixels of the class": lambda b, a, m, k: [
            part / (m == k).sum() for part in _changes(b, a, m, k)
        ],
    }
    result = f"the list ({'; '.join(_CHANGES)})"
    compare(answer, _changes, cases, slips, read=some_numbers(*_CHANGES), result=result)


def _highest(*dims):
    return lambda maps: maps == maps.amax(dims, keepdim=True)


def _kept(maps, keep=lambda maps: maps == maps.amax(0)):
    return maps * keep(maps)


@check("05", "A", "a function f(maps), maps (C, H, W): tensor like maps")
def keep_largest(answer):
    """The released code's target: every pixel keeps its largest class (05, *The target*, exercise A).

    maps is floating-point, with values in [0, 1]. What comes back is at each pixel the largest class as it
    was, and 0 for the others.
    """
    maps = torch.rand(5, 6, 9, generator=generator(30))
    maps[2] = 0.0
    maps[:, 0, :4] = 0.0
    single = torch.tensor([[[0.2, 0.9, 0.0], [0.5, 0.1, 0.3]], [[0.7, 0.4, 0.0], [0.6, 0.0, 0.2]]])
    cases = ((single,), (maps,), (torch.rand(3, 7, 4, generator=generator(31), dtype=torch.float64),))
    slips = {
        "the largest class becomes 1 instead of keeping its value": (
            lambda maps: (maps == maps.amax(0)).to(maps),
            lambda maps: ((maps == maps.amax(0)) & (maps > 0)).to(maps),
        ),
        "each class keeps only its own highest pixel": {"keep": _highest(1, 2)},
        "the largest is looked for along the height, not the classes": {"keep": _highest(1)},
        "the largest is looked for along the width, not the classes": {"keep": _highest(2)},
        "the smallest class is kept": {"keep": lambda maps: maps == maps.amin(0)},
        "the largest class is removed and the others kept": {"keep": lambda maps: maps != maps.amax(0)},
        "all classes get the largest value": lambda maps: maps.amax(0).expand_as(maps),
        "one class is kept for the whole image": (
            {"keep": lambda maps: maps.sum((1, 2), keepdim=True) == maps.sum((1, 2)).max()},
            {"keep": lambda maps: maps.amax((1, 2), keepdim=True) == maps.max()},
        ),
        "softmax over the classes is taken": lambda maps: maps.softmax(0),
        "classes are divided by their sum": lambda maps: maps / maps.sum(0).clamp(min=1e-5),
        "only the highest value of all is kept": {"keep": _highest(0, 1, 2)},
        "nothing is changed": _same,
    }
    compare(answer, _kept, cases, slips)


def _loss(
    weight,
    images,
    target,
    labels,
    error=torch.square,
    pool=torch.mean,
    total=lambda e, y: (e * y).sum() / y.sum(),
    seen=_same,
    **mode,
):
    """The loss of N = seen(a convolution): total(pool(error(N - M)), labels); mode of the target's resize."""
    N = seen(conv2d(images, weight, stride=8))
    return total(pool(error(N - _enlarged(target, N.shape[-2:], **mode)), (2, 3)), labels)


@check("05", "3", "a function f(network, images, target, labels): the loss, a tensor of one number")
def mse_of_labels(answer):
    """The mean squared error over the classes that an image shows (05, exercise 3).

    network gives N (n, C, h, w) for images (n, 3, H, W); target (n, C, H, W) is brought to N's size
    (bilinear, align_corners=True); labels (n, C) are 0 or 1. The loss is

        sum over (image, class) of label * mean over positions of (N - M)^2,   divided by the sum of labels,

    through which the network's weights must receive their gradient.
    """
    called(answer, "the function f(network, images, target, labels), not called")
    cases = []
    for seed, classes, dtype in ((40, 4, torch.float32), (41, 3, torch.float64), (42, 6, torch.float32)):
        images = randn(3, 3, 24, 40, seed=seed, dtype=dtype)
        target = torch.rand(3, classes, 24, 40, generator=generator(seed), dtype=dtype)
        weight = 0.05 * randn(classes, 3, 8, 8, seed=seed + 10, dtype=dtype)
        labels = torch.zeros(3, classes, dtype=dtype)
        labels[0, 0] = labels[1, 1] = labels[1, 2] = labels[2, 2] = 1
        labels[2, : classes - 2] = 1  # images with different numbers of classes
        network = f"a network with output (3, {classes}, 3, 5)"
        about = f"images (3, 3, 24, 40), {network}, labels {labels.int().tolist()}"
        cases.append(Case((weight, images, target, labels), about))
    first = "each image is averaged by itself first: images with few classes then count more"
    slips = {
        "labels are not used: absent classes enter the mean": {"total": lambda e, y: e.mean()},
        "the sum is divided by all classes, not by the number of labels": {
            "total": lambda e, y: (e * y).mean()
        },
        first: {"total": lambda e, y: ((e * y).sum(1) / y.sum(1)).mean()},
        "positions are added up, not averaged": {"pool": torch.sum},
        "the error is not squared": {"error": torch.abs},
        "the mean over positions is taken before squaring": {
            "error": _same,
            "pool": lambda e, dims: e.mean(dims).square(),
        },
        "absent classes are averaged instead of present ones": (
            {"total": lambda e, y: (e * (1 - y)).sum() / y.sum()},
            {"total": lambda e, y: (e * (1 - y)).sum() / (1 - y).sum()},
        ),
        "the sum is divided by the number of images": {"total": lambda e, y: (e * y).sum() / len(e)},
        "the sum is not divided by that of labels": {"total": lambda e, y: (e * y).sum()},
        "align_corners=True is left out": {"align_corners": False},
        "the target is sampled by 'nearest'": {"mode": "nearest", "align_corners": None},
        "N is enlarged instead of the target being made smaller": {"seen": lambda N: _enlarged(N, (24, 40))},
        "N is clipped to [0, 1]": {"seen": lambda N: N.clamp(0, 1)},
        "the square root is taken": {"total": lambda e, y: ((e * y).sum() / y.sum()).sqrt()},
    }
    names = ("the network's weight", "images", "target", "labels")

    def with_weight(weight, *rest):
        return answer(lambda images: conv2d(images, weight, stride=8), *rest)

    compare(with_weight, _loss, cases, slips, names, wrt=names[:1], result="the loss")
