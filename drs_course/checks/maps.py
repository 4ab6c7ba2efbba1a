"""Checks of what notebooks 01 and 05 ask to be written: localization maps, cues, the refinement's loss."""

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
    return peak + 1e-5 * (peak == 0)


def _added(peak):
    return peak + 1e-5


def _divided(*dims, X=torch.relu, of=torch.relu, by=torch.amax, guard=_guarded):
    """Equation 1 with parts of one's own: X(F) by the largest value of of(F) over some dimensions."""
    return lambda F: X(F) / guard(by(of(F), dims or (2, 3), keepdim=True))


def _minmax(
    *dims, numerator=lambda F, low, high: F - low, denominator=lambda low, high: (high - low).clamp(1e-5)
):
    """Maps rescaled from their minimum to their maximum, with parts of one's own."""

    def function(F):
        low, high = (by(F, dims or (2, 3), keepdim=True) for by in (torch.amin, torch.amax))
        return numerator(F, low, high) / denominator(low, high)

    return function


_equation_1 = _divided(guard=lambda peak: peak.clamp(min=1e-5))
_rescaled = _minmax()

_MAP_SLIPS = {
    "each map is divided by the batch's maximum": _divided(0, 2, 3),
    "all classes of an image are divided by one maximum": _divided(1, 2, 3),
    "all maps are divided by one maximum, that of the batch": _divided(0, 1, 2, 3),
    "the maximum is taken over the classes, at every position": _divided(1),
    "every row has its own maximum": _divided(3),
    "the ReLU is left out": (
        _divided(X=_same),
        _divided(X=_same, of=_same, guard=_added),
        _divided(X=_same, of=_same, guard=_same),
    ),
    "nothing guards against 0 / 0 in a map of zeros": _divided(guard=_same),
    "the division is left out": torch.relu,
    "the absolute value takes the place of the ReLU": _divided(X=torch.abs, of=torch.abs),
    "the sigmoid takes the place of equation 1": torch.sigmoid,
    "each map is rescaled from its minimum to its maximum, without the ReLU": _rescaled,
    "maps are divided by their sum": _divided(by=torch.sum),
    "maps are divided by their mean": _divided(by=torch.mean),
}


@check("01", "A", "a function f(F), F (N, C, h, w): tensor like F")
def localization_map(answer):
    """Equation 1: from class maps to localization maps (01, exercise A).

    The answer is a function f(F), F the class maps, a floating-point tensor (N, C, h, w) with negative
    values. It returns a tensor like F with values in [0, 1],

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


def _enlarge(F, size, **options):
    return interpolate(F, tuple(size), **(options or {"mode": "bilinear", "align_corners": True}))


def _resized(function, before=_same, **options):
    """function of the class maps enlarged, as f(F, size)."""
    return lambda F, size: function(_enlarge(before(F), size, **options))


def _resized_slip(functions):
    return tuple(map(_resized, functions)) if isinstance(functions, tuple) else _resized(functions)


@check("01", "A", "a function f(F, size), F (N, C, h, w): tensor (N, C, *size)")
def map_of_image_size(answer):
    """Localization maps as large as their image, enlarged first and divided after that (01, exercise A).

    The answer is a function f(F, size), F class maps (N, C, h, w), size a pair (H, W). It returns a tensor
    (N, C, H, W): F enlarged to size (bilinear, align_corners=True), then equation 1, so that the largest
    value of a map is 1 at the image's size.
    """
    cases = (
        (_class_maps(2, 3, 4, 5, seed=23), (13, 22)),
        (_class_maps(3, 2, 5, 3, seed=24, dtype=torch.float64), (16, 12)),
    )
    slips = {
        "maps are divided first and enlarged after that": _resized(_same, before=_equation_1),
        "the ReLU comes before enlarging": _resized(_equation_1, before=torch.relu),
        "align_corners=True is left out": _resized(_equation_1, mode="bilinear", align_corners=False),
        "mode is left out or 'nearest'": _resized(_equation_1, mode="nearest"),
        "mode is 'bicubic'": _resized(_equation_1, mode="bicubic", align_corners=True),
        **{sentence: _resized_slip(functions) for sentence, functions in _MAP_SLIPS.items()},
    }
    compare(answer, _resized(_equation_1), cases, slips)


@check("01", "3", "a function f(F), F (N, C, h, w): tensor like F")
def minmax_map(answer):
    """Class maps rescaled from their minimum to their maximum, without a ReLU (01, exercise 3).

    The answer is a function f(F), F class maps (N, C, h, w), that returns a tensor like F: each map's minimum
    becomes 0 and its maximum 1, (F - min F) / (max F - min F). A constant map becomes 0, not nan.
    """
    flat = _class_maps(2, 3, 4, 6, seed=25)
    flat[1, 1] = 0.0
    cases = ((_SMALL,), (flat,), (_class_maps(3, 2, 7, 5, seed=26, dtype=torch.float64),))
    slips = {
        "minimum and maximum are taken over the batch too": _minmax(0, 2, 3),
        "all classes of an image share one minimum and maximum": _minmax(1, 2, 3),
        "there is one minimum and maximum for the whole batch": _minmax(0, 1, 2, 3),
        "minimum and maximum are taken over the classes, at every position": _minmax(1),
        "the ReLU is still there: that is equation 1": _equation_1,
        "the ReLU is still there, before rescaling": lambda F: _rescaled(F.relu()),
        "nothing guards against 0 / 0 in a constant map": _minmax(denominator=lambda low, high: high - low),
        "the minimum is subtracted above, but not in the denominator": (
            _minmax(denominator=lambda low, high: high),
            _minmax(denominator=lambda low, high: high + 1e-5),
        ),
        "the division is left out": _minmax(denominator=lambda low, high: 1),
        "the minimum is not subtracted": _minmax(numerator=lambda F, low, high: F),
        "maps are rescaled to -1 to 1": lambda F: 2 * _rescaled(F) - 1,
        "maps are upside down": lambda F: 1 - _rescaled(F),
    }
    compare(answer, _rescaled, cases, slips)


@check("01", "4", "a function f(F), F (N, C, h, w): tensor (N, C)")
def global_max_pooling(answer):
    """Scores by global max pooling in place of GAP (01, exercise 4).

    The answer is a function f(F), F class maps (N, C, h, w), that returns the scores before the sigmoid,
    (N, C): the maximum of each map. F must receive the gradient, which reaches the maximum alone.
    """
    cases = (
        (_SMALL,),
        (_class_maps(3, 4, 5, 7, seed=27),),
        (_class_maps(2, 3, 6, 4, seed=28, dtype=torch.float64),),
    )

    def pooled(F):
        return F.amax((2, 3))

    slips = {
        "the mean is taken: that is GAP": lambda F: F.mean((2, 3)),
        "the sum is taken": lambda F: F.sum((2, 3)),
        "the ReLU comes first: a score could then never be negative": lambda F: pooled(F.relu()),
        "the sigmoid is taken already; the loss expects scores without": lambda F: pooled(F).sigmoid(),
        "the largest absolute value is taken": lambda F: pooled(F.abs()),
        "the minimum is taken": lambda F: F.amin((2, 3)),
        "a smooth maximum, logsumexp, is taken": lambda F: F.logsumexp((2, 3)),
        "the maximum is taken over the batch too": lambda F: F.amax((0, 2, 3)).expand(len(F), -1),
        "the mean of several large values is taken": lambda F: F.flatten(2).topk(2).values.mean(2),
        "rows are pooled by maximum and columns by mean": lambda F: F.amax(3).mean(2),
    }
    compare(answer, pooled, cases, slips, wrt=("F",))


_REGIONS = ("head", "body", "elsewhere")


def _region(result, wanted):
    """Reads the name of a region, as its number."""
    if not isinstance(result, str):
        raise Wrong(f"the result is {found(result)}; expected the name of a region")
    if result not in _REGIONS:
        raise Wrong(f"the result is {result!r}; expected one of {', '.join(map(repr, _REGIONS))}")
    return torch.tensor(float(_REGIONS.index(result)), dtype=torch.float64)


def _at(place):
    """The name of the region at place(values), a flat position."""
    return lambda values, regions: next(n for n, here in regions.items() if here.flat[place(values)])


def _by(measure):
    """The name of the region with the largest measure(values, region)."""
    return lambda v, r: max(r, key=lambda name: measure(v, r[name]) if r[name].any() else -np.inf)


@check("01", "2", "a function f(values, regions), (H, W) and name -> bool (H, W): a name")
def peak_region(answer):
    """In which region the maximum of a map lies (01, exercise 2).

    The answer is a function f(values, regions): values a map, array (H, W); regions a dictionary from names
    ("head", "body", "elsewhere") to bool arrays (H, W) that share the positions out. It returns the name of
    the region that holds the maximum.
    """
    cases = []
    for seed in range(24):
        h, w = ((4, 9), (7, 5), (6, 6))[seed % 3]
        values = np.random.default_rng(100 + seed).normal(-0.2, 1, (h, w))
        parts = np.random.default_rng(seed).integers(0, 3, (h, w))
        regions = {name: parts == k for k, name in enumerate(_REGIONS)}
        cases.append(Case((values, regions), f"map and regions of {h}x{w}, number {seed + 1}"))
    parts = np.array([[2, 2, 2, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    regions = {name: parts == k for k, name in enumerate(_REGIONS)}
    lone = np.full(parts.shape, -2.0)
    lone[0, 3], lone[1, 0], lone[2, 4] = 0.9, -3.0, 0.5
    cases.append(Case((lone, regions), "a map whose maximum is in its first row, on a small head"))
    below = np.random.default_rng(99).uniform(-3, -2, parts.shape)
    below[2, 1] = -0.5
    cases.append(Case((below, regions), "a map without a positive value, whose maximum is on the body"))
    slips = {
        "the minimum is looked for": _at(np.argmin),
        "the largest absolute value is looked for": _at(lambda values: abs(values).argmax()),
        "the region with the highest mean is named": _by(lambda values, here: values[here].mean()),
        "the region with the largest sum is named": _by(lambda values, here: values[here].sum()),
        "the largest region is named": _by(lambda values, here: here.sum()),
        **{f"the answer is always {name!r}": lambda v, r, name=name: name for name in _REGIONS},
    }
    numbered = ", ".join(f"{k} {name}" for k, name in enumerate(_REGIONS))
    compare(
        answer, _at(np.argmax), cases, slips, read=_region, result=f"the number of the region ({numbered})"
    )


def _shares(of=lambda hit, cue, true, union, pixels: (hit / true, hit / cue), cue=np.greater):
    """Recall and precision with parts of one's own: of(numbers of pixels), cue(values, alpha)."""

    def function(values, truth, alpha):
        on = cue(values, alpha)
        return of((on & truth).sum(), on.sum(), truth.sum(), (on | truth).sum(), truth.size)

    return function


@check("01", "3", "a function f(values, truth, alpha), (H, W) arrays: (recall, precision)")
def cue_scores(answer):
    """Recall and precision of the object cue (01, *Does another threshold help?* and exercise 3).

    The answer is a function f(values, truth, alpha): values a map, array (H, W), not always in [0, 1]; truth
    a bool array (H, W); alpha a number. The cue is values > alpha. It returns two shares,

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
        "precision comes first and recall second": _shares(
            lambda hit, cue, true, *_: (hit / cue, hit / true)
        ),
        "the cue is values >= alpha: values equal to alpha are no cue": _shares(cue=np.greater_equal),
        "the cue is values < alpha": _shares(cue=np.less),
        "alpha is taken as a share of the map's maximum": _shares(cue=lambda v, alpha: v > alpha * v.max()),
        "shares are given in percent": _shares(
            lambda hit, cue, true, *_: (100 * hit / true, 100 * hit / cue)
        ),
        "the IoU is computed": _shares(lambda hit, cue, true, union, _: (hit / union, hit / union)),
        "precision is divided by the union": _shares(
            lambda hit, cue, true, union, _: (hit / true, hit / union)
        ),
        "both are divided by all pixels": _shares(lambda hit, c, t, u, pixels: (hit / pixels,) * 2),
        "recall is divided by all pixels": _shares(lambda hit, cue, _, __, pixels: (hit / pixels, hit / cue)),
        "pixels are counted and not divided": _shares(lambda hit, *_: (hit, hit)),
        "the map's values are added up, without a threshold": lambda values, truth, alpha: (
            values[truth].sum() / truth.sum(),
            values[truth].sum() / values.sum(),
        ),
        "the share of the cue that is wrong takes the place of precision": _shares(
            lambda hit, cue, true, *_: (hit / true, (cue - hit) / cue)
        ),
    }
    compare(answer, _shares(), cases, slips, read=some_numbers("recall", "precision"))


_CHANGES = ("kept", "recovered, right", "recovered, wrong", "removed, right", "removed, wrong")


def _changes(before, after, mask, label):
    scored, right = mask != 255, mask == label
    new, gone = after & ~before & scored, before & ~after & scored
    parts = (before & after & scored, new & right, new & ~right, gone & ~right, gone & right)
    return [int(part.sum()) for part in parts]


def _picked(*order):
    return lambda *given: [_changes(*given)[k] for k in order]


def _masked(change):
    return lambda before, after, mask, label: _changes(before, after, change(mask, label), label)


def _kept(keep):
    return lambda b, a, mask, k: [int(keep(b, a, mask, k).sum()), *_changes(b, a, mask, k)[1:]]


@check("05", "2", "a function f(before, after, mask, label), (H, W) arrays: five counts")
def cue_changes(answer):
    """What changes when a cue takes another's place (05, *Recovered and removed* and exercise 2).

    The answer is a function f(before, after, mask, label): the two cues, bool arrays (H, W), the mask, uint8
    (H, W), and the class that the cues are of, 1..C. It returns five numbers of pixels, without those whose
    mask is 255: kept (in both cues); recovered (new) and right, the mask being the class; recovered and
    wrong; removed and right, the mask not being the class; removed and wrong.
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
        exchanged: _picked(0, 1, 2, 4, 3),
        "right and wrong are exchanged": _picked(0, 2, 1, 4, 3),
        "a recovered pixel is right where the mask is not the class": _picked(0, 2, 1, 3, 4),
        "the two cues are exchanged": lambda before, after, *rest: _changes(after, before, *rest),
        "pixels masked 255 are counted as if they were background": _masked(lambda m, k: m * (m < 255)),
        "pixels masked 255 are counted as if they were the class": _masked(
            lambda m, k: np.where(m < 255, m, k)
        ),
        "the label is one too low: classes count from 1 in a mask": lambda b, a, m, k: _changes(
            b, a, m, k - 1
        ),
        "the label is one too high": lambda b, a, m, k: _changes(b, a, m, k + 1),
        "an object of any class counts as the class": _masked(lambda m, k: np.where(m % 255, k, m)),
        "what is in either cue counts as kept": _kept(lambda b, a, m, k: (b | a) & (m < 255)),
        "only right pixels count as kept": _kept(lambda b, a, m, k: b & a & (m == k)),
        "what is in neither cue counts as kept, too": _kept(lambda b, a, m, k: (b == a) & (m < 255)),
        "counts are divided by the pixels of the class": lambda b, a, m, k: [
            part / (m == k).sum() for part in _changes(b, a, m, k)
        ],
    }
    five = {"read": some_numbers(*_CHANGES), "result": f"the list ({'; '.join(_CHANGES)})"}
    compare(answer, _changes, cases, slips, **five)


def _kept_where(keep):
    return lambda maps: maps * keep(maps)


def _highest(*dims):
    """Whether a value is the highest over some dimensions."""
    return _kept_where(lambda maps: maps == maps.amax(dims, keepdim=True))


@check("05", "A", "a function f(maps), maps (C, H, W): tensor like maps")
def keep_largest(answer):
    """The released code's target: every pixel keeps its largest class (05, *The target*, exercise A).

    The answer is a function f(maps), maps a floating-point tensor (C, H, W) with values in [0, 1], that
    returns a tensor like it: at each pixel the largest class as it was, 0 for the others.
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
        "each class keeps only its own highest pixel": _highest(1, 2),
        "the largest is looked for along the height, not the classes": _highest(1),
        "the largest is looked for along the width, not the classes": _highest(2),
        "the smallest class is kept": _kept_where(lambda maps: maps == maps.amin(0)),
        "the largest class is removed and the others kept": _kept_where(lambda maps: maps != maps.amax(0)),
        "all classes get the largest value": lambda maps: maps.amax(0).expand_as(maps),
        "one class is kept for the whole image": (
            _kept_where(lambda maps: maps.sum((1, 2), keepdim=True) == maps.sum((1, 2)).max()),
            _kept_where(lambda maps: maps.amax((1, 2), keepdim=True) == maps.max()),
        ),
        "softmax over the classes is taken": lambda maps: maps.softmax(0),
        "classes are divided by their sum": lambda maps: maps / maps.sum(0).clamp(min=1e-5),
        "only the highest value of all is kept": _highest(0, 1, 2),
        "nothing is changed": _same,
    }
    compare(answer, lambda maps: _highest(0)(maps), cases, slips)


def _loss(
    error=torch.square, pool=torch.mean, total=lambda e, y: (e * y).sum() / y.sum(), N=_same, **options
):
    """The loss with parts of one's own: total(pool(error(N - M)), labels); options resize the target."""

    def loss(weight, images, target, labels):
        found = N(conv2d(images, weight, stride=8))
        return total(pool(error(found - _enlarge(target, found.shape[-2:], **options)), (2, 3)), labels)

    return loss


@check("05", "3", "a function f(network, images, target, labels): the loss, a tensor of one number")
def mse_of_labels(answer):
    """The mean squared error over the classes that an image shows (05, exercise 3).

    The answer is a function f(network, images, target, labels): network gives N (n, C, h, w) for images
    (n, 3, H, W); target (n, C, H, W) is brought to N's size (bilinear, align_corners=True); labels (n, C) are
    0 or 1. It returns

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

    slips = {
        "labels are not used: absent classes enter the mean": _loss(total=lambda e, y: e.mean()),
        "the sum is divided by all classes, not by the number of labels": _loss(
            total=lambda e, y: (e * y).mean()
        ),
        "each image is averaged by itself first: images with few classes then count more": _loss(
            total=lambda e, y: ((e * y).sum(1) / y.sum(1)).mean()
        ),
        "positions are added up, not averaged": _loss(pool=torch.sum),
        "the error is not squared": _loss(torch.abs),
        "the mean over positions is taken before squaring": _loss(
            _same, lambda e, dims: e.mean(dims).square()
        ),
        "absent classes are averaged instead of present ones": (
            _loss(total=lambda e, y: (e * (1 - y)).sum() / y.sum()),
            _loss(total=lambda e, y: (e * (1 - y)).sum() / (1 - y).sum()),
        ),
        "the sum is divided by the number of images": _loss(total=lambda e, y: (e * y).sum() / len(e)),
        "the sum is not divided by that of labels": _loss(total=lambda e, y: (e * y).sum()),
        "align_corners=True is left out": _loss(mode="bilinear", align_corners=False),
        "the target is sampled by 'nearest'": _loss(mode="nearest"),
        "N is enlarged instead of the target being made smaller": _loss(N=lambda N: _enlarge(N, (24, 40))),
        "N is clipped to [0, 1]": _loss(N=lambda N: N.clamp(0, 1)),
        "the square root is taken": _loss(total=lambda e, y: ((e * y).sum() / y.sum()).sqrt()),
    }
    names = ("the network's weight", "images", "target", "labels")

    def with_weight(weight, *rest):
        return answer(lambda images: conv2d(images, weight, stride=8), *rest)

    compare(with_weight, _loss(), cases, slips, names, wrt=names[:1], result="the loss")
