"""Checks of what notebooks 01 and 05 ask to be written: localization maps, cues, the refinement's loss."""

import numpy as np
import torch
from torch.nn.functional import conv2d, interpolate

from .functions import Case, Slip, Task, compare, generator, randn, some_numbers
from .verdict import Wrong, check, found

_SMALL = torch.tensor([[[[-1.0, 0.0, 2.0], [-2.0, 4.0, 8.0]], [[-3.0, -1.0, -2.0], [-0.5, -4.0, -1.5]]]])


def _class_maps(n, c, h, w, seed, dtype=torch.float32):
    """Random class maps of different size, the first without a positive value."""
    F = randn(n, c, h, w, seed=seed, dtype=dtype) * torch.linspace(1, 6, n * c, dtype=dtype).view(n, c, 1, 1)
    F[0, 0] = -F[0, 0].abs() - 1
    return F


def _equation_1(F):
    F = F.relu()
    return F / F.amax((2, 3), keepdim=True).clamp(min=1e-5)


def _over(F, peak):
    return F / (peak + 1e-5 * (peak == 0))


_MAP_SLIPS = (
    Slip(
        lambda F: _over(F.relu(), F.relu().amax((0, 2, 3), keepdim=True)),
        "each map is divided by the batch's maximum",
    ),
    Slip(
        lambda F: _over(F.relu(), F.relu().amax((1, 2, 3), keepdim=True)),
        "all classes of an image are divided by one maximum",
    ),
    Slip(lambda F: _over(F.relu(), F.relu().max()), "all maps are divided by one maximum, that of the batch"),
    Slip(
        lambda F: _over(F.relu(), F.relu().amax(1, keepdim=True)),
        "the maximum is taken over the classes, at every position",
    ),
    Slip(lambda F: _over(F.relu(), F.relu().amax(3, keepdim=True)), "every row has its own maximum"),
    Slip(lambda F: _over(F, F.relu().amax((2, 3), keepdim=True)), "the ReLU is left out"),
    Slip(lambda F: F / (F.amax((2, 3), keepdim=True) + 1e-5), "the ReLU is left out"),
    Slip(lambda F: F / F.amax((2, 3), keepdim=True), "the ReLU is left out"),
    Slip(
        lambda F: F.relu() / F.relu().amax((2, 3), keepdim=True),
        "nothing guards against 0 / 0 in a map of zeros",
    ),
    Slip(lambda F: F.relu(), "the division is left out"),
    Slip(
        lambda F: F.abs() / F.abs().amax((2, 3), keepdim=True),
        "the absolute value takes the place of the ReLU",
    ),
    Slip(lambda F: torch.sigmoid(F), "the sigmoid takes the place of equation 1"),
    Slip(lambda F: _rescaled(F), "each map is rescaled from its minimum to its maximum, without the ReLU"),
    Slip(lambda F: _over(F.relu(), F.relu().sum((2, 3), keepdim=True)), "maps are divided by their sum"),
    Slip(lambda F: _over(F.relu(), F.relu().mean((2, 3), keepdim=True)), "maps are divided by their mean"),
)


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
        Case((_SMALL,)),
        Case((_class_maps(3, 4, 5, 7, seed=20),)),
        Case((low,)),
        Case((_class_maps(2, 3, 8, 6, seed=21, dtype=torch.float64),)),
        Case((_class_maps(1, 2, 3, 4, seed=22).roll(1, 1),)),
    )
    compare(answer, Task(("F",), _equation_1, cases, _MAP_SLIPS))


def _upsampled(F, size):
    return interpolate(F, size, mode="bilinear", align_corners=True)


@check("01", "A", "a function f(F, size), F (N, C, h, w): tensor (N, C, *size)")
def map_of_image_size(answer):
    """Localization maps as large as their image, enlarged first and divided after that (01, exercise A).

    The answer is a function f(F, size), F class maps (N, C, h, w), size a pair (H, W). It returns a tensor
    (N, C, H, W): F enlarged to size (bilinear, align_corners=True), then equation 1, so that the largest
    value of a map is 1 at the image's size.
    """
    cases = (
        Case((_class_maps(2, 3, 4, 5, seed=23), (13, 22))),
        Case((_class_maps(3, 2, 5, 3, seed=24, dtype=torch.float64), (16, 12))),
    )

    def resized(**options):
        return lambda F, size: _equation_1(interpolate(F, size, **options))

    slips = (
        Slip(
            lambda F, size: _upsampled(_equation_1(F), size), "maps are divided first and enlarged after that"
        ),
        Slip(lambda F, size: _equation_1(_upsampled(F.relu(), size)), "the ReLU comes before enlarging"),
        Slip(resized(mode="bilinear", align_corners=False), "align_corners=True is left out"),
        Slip(resized(mode="nearest"), "mode is left out or 'nearest'"),
        Slip(resized(mode="bicubic", align_corners=True), "mode is 'bicubic'"),
        *(Slip(lambda F, size, of=s.function: of(_upsampled(F, size)), s.sentence) for s in _MAP_SLIPS),
    )
    right = lambda F, size: _equation_1(_upsampled(F, size))  # noqa: E731
    compare(answer, Task(("F", "size"), right, cases, slips))


def _rescaled(F):
    low, high = F.amin((2, 3), keepdim=True), F.amax((2, 3), keepdim=True)
    return (F - low) / (high - low).clamp(min=1e-5)


@check("01", "3", "a function f(F), F (N, C, h, w): tensor like F")
def minmax_map(answer):
    """Class maps rescaled from their minimum to their maximum, without a ReLU (01, exercise 3).

    The answer is a function f(F), F class maps (N, C, h, w), that returns a tensor like F: each map's minimum
    becomes 0 and its maximum 1, (F - min F) / (max F - min F). A constant map becomes 0, not nan.
    """
    flat = _class_maps(2, 3, 4, 6, seed=25)
    flat[1, 1] = 0.0
    cases = (Case((_SMALL,)), Case((flat,)), Case((_class_maps(3, 2, 7, 5, seed=26, dtype=torch.float64),)))

    def of(dims):
        low, high = lambda F: F.amin(dims, keepdim=True), lambda F: F.amax(dims, keepdim=True)
        return lambda F: (F - low(F)) / (high(F) - low(F)).clamp(min=1e-5)

    low, high = lambda F: F.amin((2, 3), keepdim=True), lambda F: F.amax((2, 3), keepdim=True)
    slips = (
        Slip(of((0, 2, 3)), "minimum and maximum are taken over the batch too"),
        Slip(of((1, 2, 3)), "all classes of an image share one minimum and maximum"),
        Slip(of((0, 1, 2, 3)), "there is one minimum and maximum for the whole batch"),
        Slip(of((1,)), "minimum and maximum are taken over the classes, at every position"),
        Slip(_equation_1, "the ReLU is still there: that is equation 1"),
        Slip(lambda F: _rescaled(F.relu()), "the ReLU is still there, before rescaling"),
        Slip(lambda F: (F - low(F)) / (high(F) - low(F)), "nothing guards against 0 / 0 in a constant map"),
        Slip(lambda F: (F - low(F)) / high(F), "the minimum is subtracted above, but not in the denominator"),
        Slip(
            lambda F: (F - low(F)) / (high(F) + 1e-5),
            "the minimum is subtracted above, but not in the denominator",
        ),
        Slip(lambda F: F - low(F), "the division is left out"),
        Slip(lambda F: F / (high(F) - low(F)).clamp(min=1e-5), "the minimum is not subtracted"),
        Slip(lambda F: 2 * _rescaled(F) - 1, "maps are rescaled to -1 to 1"),
        Slip(lambda F: 1 - _rescaled(F), "maps are upside down"),
    )
    compare(answer, Task(("F",), _rescaled, cases, slips))


def _pooled(F):
    return F.amax((2, 3))


@check("01", "4", "a function f(F), F (N, C, h, w): tensor (N, C)")
def global_max_pooling(answer):
    """Scores by global max pooling in place of GAP (01, exercise 4).

    The answer is a function f(F), F class maps (N, C, h, w), that returns the scores before the sigmoid,
    (N, C): the maximum of each map. F must receive the gradient, which reaches the maximum alone.
    """
    cases = (
        Case((_SMALL,)),
        Case((_class_maps(3, 4, 5, 7, seed=27),)),
        Case((_class_maps(2, 3, 6, 4, seed=28, dtype=torch.float64),)),
    )
    slips = (
        Slip(lambda F: F.mean((2, 3)), "the mean is taken: that is GAP"),
        Slip(lambda F: F.sum((2, 3)), "the sum is taken"),
        Slip(lambda F: F.relu().amax((2, 3)), "the ReLU comes first: a score could then never be negative"),
        Slip(
            lambda F: torch.sigmoid(F.amax((2, 3))),
            "the sigmoid is taken already; the loss expects scores without",
        ),
        Slip(lambda F: F.abs().amax((2, 3)), "the largest absolute value is taken"),
        Slip(lambda F: F.amin((2, 3)), "the minimum is taken"),
        Slip(lambda F: F.logsumexp((2, 3)), "a smooth maximum, logsumexp, is taken"),
        Slip(lambda F: F.amax((0, 2, 3)).expand(len(F), -1), "the maximum is taken over the batch too"),
        Slip(
            lambda F: F.flatten(2).topk(2, dim=2).values.mean(2), "the mean of several large values is taken"
        ),
        Slip(lambda F: F.amax(3).mean(2), "rows are pooled by maximum and columns by mean"),
    )
    compare(answer, Task(("F",), _pooled, cases, slips, wrt=("F",)))


def _region_of_peak(values, regions):
    row, column = np.unravel_index(values.argmax(), values.shape)
    return next(name for name, here in regions.items() if here[row, column])


def _regions(shape, seed):
    parts = np.random.default_rng(seed).integers(0, 3, shape)
    return {name: parts == k for k, name in enumerate(("head", "body", "elsewhere"))}


def _names(*names):
    """Reads a result that is one of the names, as its number."""

    def read(result, wanted):
        if not isinstance(result, str):
            raise Wrong(f"the result is {found(result)}; expected the name of a region")
        if result not in names:
            raise Wrong(f"the result is {result!r}; expected one of {', '.join(map(repr, names))}")
        return torch.tensor(float(names.index(result)), dtype=torch.float64)

    return read


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
        cases.append(Case((values, _regions((h, w), seed)), f"map and regions of {h}x{w}, number {seed + 1}"))
    h, w = 3, 5
    lone = np.full((h, w), -2.0)
    lone[0, 3], lone[1, 0], lone[2, 4] = 0.9, -3.0, 0.5
    regions = {"head": np.zeros((h, w), bool), "body": np.zeros((h, w), bool)}
    regions["head"][0, 3:] = regions["body"][1:, :] = True
    regions["elsewhere"] = ~regions["head"] & ~regions["body"]
    cases.append(Case((lone, regions), "a map whose maximum is in its first row, on a small head"))
    below = np.random.default_rng(99).uniform(-3, -2, (h, w))
    below[2, 1] = -0.5
    cases.append(Case((below, regions), "a map without a positive value, whose maximum is on the body"))

    def at(place):
        return lambda v, r: next(name for name, here in r.items() if here[place(v)])

    def by(measure):
        return lambda v, r: max(r, key=lambda name: measure(v, r[name]) if r[name].any() else -np.inf)

    names = ("head", "body", "elsewhere")
    slips = (
        Slip(at(lambda v: np.unravel_index(v.argmin(), v.shape)), "the minimum is looked for"),
        Slip(
            at(lambda v: np.unravel_index(abs(v).argmax(), v.shape)),
            "the largest absolute value is looked for",
        ),
        Slip(by(lambda v, here: v[here].mean()), "the region with the highest mean is named"),
        Slip(by(lambda v, here: v[here].sum()), "the region with the largest sum is named"),
        Slip(by(lambda v, here: here.sum()), "the largest region is named"),
        *(Slip(lambda v, r, name=name: name, f"the answer is always {name!r}") for name in names),
    )
    task = Task(("values", "regions"), _region_of_peak, tuple(cases), slips, read=_names(*names),
                result=f"the number of the region (0 {names[0]}, 1 {names[1]}, 2 {names[2]})")  # fmt: skip
    compare(answer, task)


def _cue_scores(values, truth, alpha):
    cue = values > alpha
    return (cue & truth).sum() / truth.sum(), (cue & truth).sum() / cue.sum()


@check("01", "3", "a function f(values, truth, alpha), (H, W) arrays: (recall, precision)")
def cue_scores(answer):
    """Recall and precision of the object cue (01, *Does another threshold help?* and exercise 3).

    The answer is a function f(values, truth, alpha): values a map, array (H, W), not always in [0, 1]; truth
    a bool array (H, W); alpha a number. The cue is values > alpha. It returns two shares,

        recall = |cue and truth| / |truth|,    precision = |cue and truth| / |cue|.
    """
    small = np.array([[0.1, 0.25, 0.5, 0.75], [0.25, 0.9, 0.3, 0.0]])
    inside = np.array([[False, True, True, False], [False, True, True, False]])
    cases = [Case((small, inside, 0.25))]
    for seed, (h, w), alpha, unit in ((0, (6, 9), 0.5, 16), (1, (8, 5), 0.25, 8)):
        rng = np.random.default_rng(seed)
        truth = rng.random((h, w)) < 0.4
        values = (rng.integers(0, 13, (h, w)) + 3 * truth) / unit  # so that some are equal to alpha
        cases.append(Case((values, truth, alpha)))

    def scores(cue_of, swap=False):
        def function(values, truth, alpha):
            found = _cue_scores(cue_of(values, alpha), truth, 0.5)
            return found[::-1] if swap else found

        return function

    def above(values, alpha):
        return (values > alpha).astype(float)

    def parts(values, truth, alpha):
        cue = values > alpha
        return (cue & truth).sum(), cue.sum(), truth.sum(), (cue | truth).sum(), truth.size

    def formula(function):
        return lambda values, truth, alpha: function(*parts(values, truth, alpha))

    slips = (
        Slip(scores(above, swap=True), "precision comes first and recall second"),
        Slip(
            scores(lambda v, a: (v >= a).astype(float)),
            "the cue is values >= alpha: values equal to alpha are no cue",
        ),
        Slip(scores(lambda v, a: (v < a).astype(float)), "the cue is values < alpha"),
        Slip(
            scores(lambda v, a: (v > a * v.max()).astype(float)),
            "alpha is taken as a share of the map's maximum",
        ),
        Slip(
            formula(lambda hit, cue, true, union, all_: (100 * hit / true, 100 * hit / cue)),
            "shares are given in percent",
        ),
        Slip(formula(lambda hit, cue, true, union, all_: (hit / union, hit / union)), "the IoU is computed"),
        Slip(
            formula(lambda hit, cue, true, union, all_: (hit / true, hit / union)),
            "precision is divided by the union",
        ),
        Slip(
            formula(lambda hit, cue, true, union, all_: (hit / all_, hit / all_)),
            "both are divided by all pixels",
        ),
        Slip(
            formula(lambda hit, cue, true, union, all_: (hit / all_, hit / cue)),
            "recall is divided by all pixels",
        ),
        Slip(formula(lambda hit, cue, true, union, all_: (hit, hit)), "pixels are counted and not divided"),
        Slip(
            lambda v, t, a: (v[t].sum() / t.sum(), v[t].sum() / v.sum()),
            "the map's values are added up, without a threshold",
        ),
        Slip(
            formula(lambda hit, cue, true, union, all_: (hit / true, (cue - hit) / cue)),
            "the share of the cue that is wrong takes the place of precision",
        ),
    )
    compare(
        answer,
        Task(
            ("values", "truth", "alpha"),
            _cue_scores,
            tuple(cases),
            slips,
            read=some_numbers("recall", "precision"),
        ),
    )


_CHANGES = ("kept", "recovered, right", "recovered, wrong", "removed, right", "removed, wrong")


def _changes(before, after, mask, label):
    scored, right = mask != 255, mask == label
    new, gone = after & ~before & scored, before & ~after & scored
    return [
        int(part.sum())
        for part in (before & after & scored, new & right, new & ~right, gone & ~right, gone & right)
    ]


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
        cases.append(Case((before, after, mask, label)))

    def picked(order):
        return lambda *args: [_changes(*args)[k] for k in order]

    def masked(change):
        return lambda before, after, mask, label: _changes(before, after, change(mask, label), label)

    slips = (
        Slip(
            picked((0, 1, 2, 4, 3)),
            "removed pixels are right where the mask is the class; it is the other way round",
        ),
        Slip(picked((0, 2, 1, 4, 3)), "right and wrong are exchanged"),
        Slip(picked((0, 2, 1, 3, 4)), "a recovered pixel is right where the mask is not the class"),
        Slip(lambda b, a, m, k: _changes(a, b, m, k), "the two cues are exchanged"),
        Slip(
            masked(lambda m, k: np.where(m == 255, 0, m)),
            "pixels masked 255 are counted as if they were background",
        ),
        Slip(
            masked(lambda m, k: np.where(m == 255, k, m)),
            "pixels masked 255 are counted as if they were the class",
        ),
        Slip(
            lambda b, a, m, k: _changes(b, a, m, k - 1),
            "the label is one too low: classes count from 1 in a mask",
        ),
        Slip(lambda b, a, m, k: _changes(b, a, m, k + 1), "the label is one too high"),
        Slip(
            masked(lambda m, k: np.where((m > 0) & (m < 255), k, m)),
            "an object of any class counts as the class",
        ),
        Slip(
            lambda b, a, m, k: [int(((b | a) & (m != 255)).sum()), *_changes(b, a, m, k)[1:]],
            "what is in either cue counts as kept",
        ),
        Slip(
            lambda b, a, m, k: [int((b & a & (m == k)).sum()), *_changes(b, a, m, k)[1:]],
            "only right pixels count as kept",
        ),
        Slip(
            lambda b, a, m, k: [int(((b == a) & (m != 255)).sum()), *_changes(b, a, m, k)[1:]],
            "what is in neither cue counts as kept, too",
        ),
        Slip(
            lambda b, a, m, k: [part / (m == k).sum() for part in _changes(b, a, m, k)],
            "counts are divided by the pixels of the class",
        ),
    )
    task = Task(("before", "after", "mask", "label"), _changes, tuple(cases), slips,
                read=some_numbers(*_CHANGES), result=f"the list ({'; '.join(_CHANGES)})")  # fmt: skip
    compare(answer, task)


def _largest(maps):
    largest, index = maps.max(0, keepdim=True)
    return torch.zeros_like(maps).scatter_(0, index, largest)


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
    double = torch.rand(3, 7, 4, generator=generator(31), dtype=torch.float64)
    cases = (Case((single,)), Case((maps,)), Case((double,)))

    def masked(by):
        return lambda maps: maps * (maps == by(maps))

    slips = (
        Slip(
            lambda m: (m == m.amax(0, keepdim=True)).to(m),
            "the largest class becomes 1 instead of keeping its value",
        ),
        Slip(
            lambda m: ((m == m.amax(0, keepdim=True)) & (m > 0)).to(m),
            "the largest class becomes 1 instead of keeping its value",
        ),
        Slip(masked(lambda m: m.amax((1, 2), keepdim=True)), "each class keeps only its own highest pixel"),
        Slip(
            masked(lambda m: m.amax(1, keepdim=True)),
            "the largest is looked for along the height, not the classes",
        ),
        Slip(
            masked(lambda m: m.amax(2, keepdim=True)),
            "the largest is looked for along the width, not the classes",
        ),
        Slip(masked(lambda m: m.amin(0, keepdim=True)), "the smallest class is kept"),
        Slip(
            lambda m: m * (m != m.amax(0, keepdim=True)), "the largest class is removed and the others kept"
        ),
        Slip(lambda m: m.amax(0, keepdim=True).expand_as(m), "all classes get the largest value"),
        Slip(
            lambda m: m * (m.sum((1, 2), keepdim=True) == m.sum((1, 2)).max()),
            "one class is kept for the whole image",
        ),
        Slip(
            lambda m: m * (m.amax((1, 2), keepdim=True) == m.amax((1, 2)).max()),
            "one class is kept for the whole image",
        ),
        Slip(lambda m: torch.softmax(m, 0), "softmax over the classes is taken"),
        Slip(lambda m: m / m.sum(0, keepdim=True).clamp(min=1e-5), "classes are divided by their sum"),
        Slip(masked(lambda m: m.max()), "only the highest value of all is kept"),
        Slip(lambda m: m, "nothing is changed"),
    )
    compare(answer, Task(("maps",), _largest, cases, slips))


def _masked_error(N, M, labels):
    error = (N - M).square().mean((2, 3))
    return (error * labels).sum() / labels.sum()


@check("05", "3", "a function f(network, images, target, labels): the loss, a tensor of one number")
def mse_of_labels(answer):
    """The mean squared error over the classes that an image shows (05, exercise 3).

    The answer is a function f(network, images, target, labels): network gives N (n, C, h, w) for images
    (n, 3, H, W); target (n, C, H, W) is brought to N's size (bilinear, align_corners=True); labels (n, C) are
    0 or 1. It returns

        sum over (image, class) of label * mean over positions of (N - M)^2,   divided by the sum of labels,

    through which the network's weights must receive their gradient.
    """
    cases = []
    for seed, classes, dtype in ((40, 4, torch.float32), (41, 3, torch.float64), (42, 6, torch.float32)):
        images = randn(3, 3, 24, 40, seed=seed, dtype=dtype)
        target = torch.rand(3, classes, 24, 40, generator=generator(seed), dtype=dtype)
        weight = 0.05 * randn(classes, 3, 8, 8, seed=seed + 10, dtype=dtype)
        labels = torch.zeros(3, classes, dtype=dtype)
        labels[0, 0] = labels[1, 1] = labels[1, 2] = labels[2, 2] = 1
        labels[2, : classes - 2] = 1  # images with different numbers of classes
        about = (
            f"images (3, 3, 24, 40), a network with output (3, {classes}, 3, 5), labels "
            f"{labels.int().tolist()}"
        )
        cases.append(Case((weight, images, target, labels), about))

    def with_network(loss):
        return lambda weight, *rest: loss(lambda images: conv2d(images, weight, stride=8), *rest)

    def of(compute, **options):
        def loss(network, images, target, labels):
            N = network(images)
            resize = {"mode": "bilinear", "align_corners": True} | options
            if resize["mode"] == "nearest":
                resize.pop("align_corners")
            return compute(N, interpolate(target, N.shape[-2:], **resize), labels)

        return with_network(loss)

    def upsampled(network, images, target, labels):
        return _masked_error(_upsampled(network(images), target.shape[-2:]), target, labels)

    def per_image(N, M, labels):
        error = (N - M).square().mean((2, 3)) * labels
        return (error.sum(1) / labels.sum(1)).mean()

    def masked(N, M, labels):
        return labels[:, :, None, None] * N, labels[:, :, None, None] * M

    slips = (
        Slip(
            of(lambda N, M, y: (N - M).square().mean()), "labels are not used: absent classes enter the mean"
        ),
        Slip(
            of(lambda N, M, y: ((N - M).square().mean((2, 3)) * y).mean()),
            "the sum is divided by all classes, not by the number of labels",
        ),
        Slip(
            of(per_image), "each image is averaged by itself first: images with few classes then count more"
        ),
        Slip(
            of(lambda N, M, y: (N - M).square().sum((2, 3)).mul(y).sum() / y.sum()),
            "positions are added up, not averaged",
        ),
        Slip(
            of(lambda N, M, y: (N - M).abs().mean((2, 3)).mul(y).sum() / y.sum()), "the error is not squared"
        ),
        Slip(
            of(lambda N, M, y: (N - M).mean((2, 3)).square().mul(y).sum() / y.sum()),
            "the mean over positions is taken before squaring",
        ),
        Slip(
            of(lambda N, M, y: (N - M).square().mean((2, 3)).mul(1 - y).sum() / y.sum()),
            "absent classes are averaged instead of present ones",
        ),
        Slip(
            of(lambda N, M, y: (N - M).square().mean((2, 3)).mul(1 - y).sum() / (1 - y).sum()),
            "absent classes are averaged instead of present ones",
        ),
        Slip(
            of(lambda N, M, y: (N - M).square().mean((2, 3)).mul(y).sum() / len(N)),
            "the sum is divided by the number of images",
        ),
        Slip(
            of(lambda N, M, y: (N - M).square().mean((2, 3)).mul(y).sum()),
            "the sum is not divided by that of labels",
        ),
        Slip(of(_masked_error, align_corners=False), "align_corners=True is left out"),
        Slip(of(_masked_error, mode="nearest"), "the target is sampled by 'nearest'"),
        Slip(with_network(upsampled), "N is enlarged instead of the target being made smaller"),
        Slip(of(lambda N, M, y: _masked_error(N.clamp(0, 1), M, y)), "N is clipped to [0, 1]"),
        Slip(of(lambda N, M, y: _masked_error(N, masked(N, M, y)[1], y).sqrt()), "the square root is taken"),
    )
    if not callable(answer):
        raise Wrong(
            f"the answer is {found(answer)}; hand in the function f(network, images, target, "
            "labels), not called"
        )
    names = ("the network's weight", "images", "target", "labels")
    compare(
        with_network(answer),
        Task(names, of(_masked_error), tuple(cases), slips, wrt=names[:1], result="the loss"),
    )
