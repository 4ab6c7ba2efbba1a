"""Right answers and plausible wrong ones to every check of `drs_course.checks`, written as students would.

`test_checks.py` tries them all. As a program, it prints how many of the wrong ones each check rejects:

    python tests/mutants.py
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from drs_course import checks
from drs_course.plots import CHANGES
from drs_course.plots import cue_changes as librarys_changes
from drs_lib.drs import DRS, LearnableController, suppress, suppress_plain
from drs_lib.labels import pseudo_labels
from drs_lib.maps import keep_largest_class
from drs_lib.metrics import SegmentationScore
from drs_lib.train import Batch, refinement_loss


@dataclass(frozen=True)
class Mutant:
    """A wrong answer. ``hint``: words that the sentence about it must contain, where a cause is promised."""

    what: str
    answer: object
    hint: str = ""


@dataclass
class Answers:
    """To one check: the solution and other right answers, and the mutants."""

    right: list = field(default_factory=list)
    wrong: list = field(default_factory=list)


def choices(right, options, *others):
    """Answers of one word: the right one in three spellings, the other options, and words that are none."""
    wrong = [Mutant(option, option, "is not it") for option in options if option != right]
    wrong += [Mutant(f"{word!r}", word) for word in ("maybe", "", None, [right], *others)]
    return Answers([right, right.upper(), f"  {right} "], wrong)


def questions(right, options):
    """Answers of one word to each of several questions: a dictionary, a list, other order and case."""
    names = list(right)
    answers = Answers(
        [right, list(right.values()), {name: right[name].upper() for name in reversed(names)}],
        [
            Mutant("only one word", right[names[0]]),
            Mutant("a question is missing", {names[0]: right[names[0]]}, "keys"),
            Mutant("a word that is no choice", {**right, names[-1]: "perhaps"}, "none of the choices"),
            Mutant("numbers", dict.fromkeys(names, 1)),
        ],
    )
    for name in names:
        for option in options:
            if option != right[name]:
                answers.wrong.append(Mutant(f"{name} {option}", {**right, name: option}, f"{name}: "))
    return answers


def numpy_of(function):
    """A function of NumPy arrays as one of tensors: no gradient gets through."""
    return lambda *args: torch.from_numpy(
        function(*(a.detach().numpy() if torch.is_tensor(a) else a for a in args))
    )


# 00 --------------------------------------------------------------------------------------------------------


def miou_by_loops(predictions, masks, kinds):
    found = []
    for label in range(kinds):
        scored = masks != 255
        said, true = (predictions == label) & scored, (masks == label) & scored
        if (said | true).any():
            found.append((said & true).sum() / (said | true).sum())
    return sum(found) / len(found)


def miou_by_counting(predictions, masks, kinds):
    confusion = np.zeros((kinds, kinds))
    keep = masks < 255
    np.add.at(confusion, (masks[keep], predictions[keep]), 1)
    hits = confusion.diagonal()
    with np.errstate(invalid="ignore"):
        return torch.tensor(np.nanmean(hits / (confusion.sum(0) + confusion.sum(1) - hits)))


def miou_mutant(scored=lambda m: m < 255, count=None, mean=np.nanmean, first=0):
    def score(predictions, masks, kinds):
        values = []
        for label in range(first, kinds):
            keep = scored(masks)
            said, true = (predictions == label) & keep, (masks == label) & keep
            with np.errstate(invalid="ignore", divide="ignore"):
                values.append(
                    count(said, true) if count else np.float64((said & true).sum()) / (said | true).sum()
                )
        return float(mean(np.array(values, float)))

    return score


def ignored_as_background(predictions, masks, kinds):
    return miou_by_loops(predictions, np.where(masks == 255, 0, masks), kinds)


MIOU = Answers(
    [
        lambda p, m, k: SegmentationScore(k).update(p, m).compute()["miou"],
        miou_by_loops,
        miou_by_counting,
    ],
    [
        Mutant("255 counted as background", ignored_as_background, "255 are counted"),
        Mutant("255 stays in the union", miou_mutant(scored=lambda m: m <= 255), "in the union"),
        Mutant("pixel accuracy", lambda p, m, k: (p == m)[m < 255].mean(), "pixels are averaged"),
        Mutant("pixel accuracy with 255", lambda p, m, k: (p == m).mean(), "pixels are averaged"),
        Mutant("without background", miou_mutant(first=1), "background is left out"),
        Mutant("absent labels count 0", miou_mutant(mean=lambda v: np.nan_to_num(v).mean()), "count as 0"),
        Mutant(
            "absent labels count 1", miou_mutant(mean=lambda v: np.nan_to_num(v, nan=1).mean()), "count as 1"
        ),
        Mutant("absent labels give nan", miou_mutant(mean=np.mean), "nan"),
        Mutant(
            "mean of each image's score",
            lambda p, m, k: np.mean([miou_by_loops(a, b, k) for a, b in zip(p, m, strict=True)]),
            "by itself",
        ),
        Mutant("recall", miou_mutant(count=lambda s, t: np.float64((s & t).sum()) / t.sum()), "recall"),
        Mutant("precision", miou_mutant(count=lambda s, t: np.float64((s & t).sum()) / s.sum()), "precision"),
        Mutant(
            "Dice",
            miou_mutant(count=lambda s, t: 2 * np.float64((s & t).sum()) / (s.sum() + t.sum())),
            "Dice",
        ),
        Mutant(
            "the union counts the overlap twice",
            miou_mutant(count=lambda s, t: np.float64((s & t).sum()) / (s.sum() + t.sum())),
            "counted twice",
        ),
        Mutant("percent", lambda p, m, k: 100 * miou_by_loops(p, m, k), "percent"),
        Mutant("only labels with a hit", miou_mutant(mean=lambda v: v[v > 0].mean()), "without a hit"),
        Mutant("the per-label list", lambda p, m, k: [1.0] * k, "one number"),
        Mutant(
            "an overflowing index",
            lambda p, m, k: (
                SegmentationScore(k).update(((m * k + p) % 256 % k).astype(np.uint8), m).compute()["miou"]
            ),
        ),
        Mutant(
            "255 in the prediction's place", lambda p, m, k: miou_by_loops(p, np.where(m == 255, p, m), k)
        ),
    ],
)

LAZY = Answers(
    [(0.774, 0.774 / 7), torch.tensor([0.78, 0.1114]), {"pixel accuracy": 0.77, "mIoU": 0.11}],
    [
        Mutant("mIoU of background alone", (0.774, 0.774), "background alone"),
        Mutant("background left out", (0.774, 0.0), "background has one"),
        Mutant("divided by six", (0.774, 0.774 / 6), "seven labels"),
        Mutant("IoU of background taken for 1", (0.774, 1 / 7), "is not 1"),
        Mutant("two labels", (0.774, 0.774 / 2), "two labels"),
        Mutant("exchanged", (0.774 / 7, 0.774), "exchanged"),
        Mutant("percent", (77.4, 11.06), "percent"),
        Mutant("accuracy of one in seven", (1 / 7, 1 / 49)),
        Mutant("the animals' share", (0.226, 0.226 / 7)),
        Mutant("one number", 0.774),
    ],
)

STAGES = Answers(
    [1, 1.0, np.int64(1)],
    [
        Mutant(str(count), count, hint)
        for count, hint in (
            (0, "same δ"),
            (2, "refine"),
            (3, "all that it reads"),
            (4, "keys"),
            (5, "differs"),
            (6, "in all"),
        )
    ]
    + [Mutant("a list", ["classify"]), Mutant("a word", "one"), Mutant("a bool", True)],
)


# 01 --------------------------------------------------------------------------------------------------------


def equation_1(maps):
    maps = maps.relu()
    return maps / (maps.amax((2, 3), keepdim=True) + 1e-5)


def equation_1_by_loops(maps):
    found = torch.zeros_like(maps)
    for n in range(len(maps)):
        for c in range(maps.shape[1]):
            if maps[n, c].max() > 0:
                found[n, c] = maps[n, c].clamp(min=0) / maps[n, c].max()
    return found


def equation_1_flat(maps):
    flat = F.relu(maps).flatten(2)
    peak = flat.max(-1, keepdim=True).values
    return torch.where(peak > 0, flat / peak, torch.zeros_like(flat)).view_as(maps)


def divided(maps, dims, guard=1e-5):
    maps = maps.relu()
    return maps / (maps.amax(dims, keepdim=True) + guard)


def in_place_equation(maps):
    maps.relu_()
    return maps / (maps.amax((2, 3), keepdim=True) + 1e-5)


EQUATION_1 = Answers(
    [equation_1, equation_1_by_loops, equation_1_flat],
    [
        Mutant("the batch's maximum", lambda m: divided(m, (0, 2, 3)), "batch"),
        Mutant("the image's maximum", lambda m: divided(m, (1, 2, 3)), "all classes of an image"),
        Mutant("one maximum", lambda m: m.relu() / m.max(), "one maximum"),
        Mutant("maximum over the classes", lambda m: divided(m, 1), "over the classes"),
        Mutant("maximum of each row", lambda m: divided(m, 3), "row"),
        Mutant("no ReLU", lambda m: m / (m.amax((2, 3), keepdim=True) + 1e-5), "ReLU is left out"),
        Mutant("nan in an empty map", lambda m: divided(m, (2, 3), guard=0), "0 / 0"),
        Mutant("no division", lambda m: m.relu(), "division is left out"),
        Mutant("absolute values", lambda m: m.abs() / m.abs().amax((2, 3), keepdim=True), "absolute"),
        Mutant("sigmoid", torch.sigmoid, "sigmoid"),
        Mutant("softmax over the classes", lambda m: m.softmax(1)),
        Mutant(
            "sum for maximum", lambda m: m.relu() / m.relu().sum((2, 3), keepdim=True).clamp(min=1e-5), "sum"
        ),
        Mutant(
            "mean for maximum",
            lambda m: m.relu() / m.relu().mean((2, 3), keepdim=True).clamp(min=1e-5),
            "mean",
        ),
        Mutant("a large guard", lambda m: divided(m, (2, 3), guard=0.1)),
        Mutant(
            "maximum of a batch of one", lambda m: m.relu() / m[0].amax((1, 2), keepdim=True).clamp(min=1e-5)
        ),
        Mutant("float32 whatever comes", lambda m: equation_1(m.float()), "float64"),
        Mutant("8-bit maps", lambda m: (255 * equation_1(m)).byte(), "floating point"),
        Mutant("in place", in_place_equation, "writes into it"),
        Mutant("clipped to 1", lambda m: m.clamp(0, 1)),
        Mutant(
            "0 for maxima below 1",
            lambda m: torch.where(m.amax((2, 3), keepdim=True) > 1, equation_1(m), torch.zeros_like(m)),
        ),
        Mutant(
            "0 / 0 where the maximum is just 0",
            lambda m: (
                m.relu()
                / m.amax((2, 3), keepdim=True).where(m.amax((2, 3), keepdim=True) >= 0, torch.tensor(1.0))
            ),
        ),
    ],
)


def enlarge(maps, size, **options):
    return F.interpolate(maps, size=tuple(size), mode="bilinear", **{"align_corners": True} | options)


def grid_sampled(maps, size):
    y, x = (torch.linspace(-1, 1, side, dtype=maps.dtype) for side in size)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(len(maps), -1, -1, -1)
    return equation_1(F.grid_sample(maps, grid, mode="bilinear", align_corners=True))


def map_by_map(maps, size):
    return torch.cat([equation_1_flat(enlarge(maps[:, c : c + 1], size)) for c in range(maps.shape[1])], 1)


OF_IMAGE_SIZE = Answers(
    [lambda m, size: equation_1(enlarge(m, size)), grid_sampled, map_by_map],
    [
        Mutant("divided first", lambda m, size: enlarge(equation_1(m), size), "divided first"),
        Mutant("ReLU first", lambda m, size: equation_1(enlarge(m.relu(), size)), "ReLU comes before"),
        Mutant("corners", lambda m, size: equation_1(enlarge(m, size, align_corners=False)), "align_corners"),
        Mutant("nearest", lambda m, size: equation_1(F.interpolate(m, size)), "nearest"),
        Mutant(
            "bicubic",
            lambda m, size: equation_1(F.interpolate(m, size, mode="bicubic", align_corners=True)),
            "bicubic",
        ),
        Mutant(
            "no ReLU", lambda m, size: enlarge(m, size) / enlarge(m, size).amax((2, 3), keepdim=True), "ReLU"
        ),
        Mutant("the batch's maximum", lambda m, size: divided(enlarge(m, size), (0, 2, 3)), "batch"),
        Mutant("height and width exchanged", lambda m, size: equation_1(enlarge(m, size[::-1])), "shape"),
        Mutant("square", lambda m, size: equation_1(enlarge(m, (size[0], size[0]))), "shape"),
        Mutant("not enlarged", lambda m, size: equation_1(m), "shape"),
        Mutant("enlarged only", lambda m, size: enlarge(m, size).relu(), "division is left out"),
        Mutant("a factor for a size", lambda m, size: equation_1(F.interpolate(m, scale_factor=3)), "shape"),
    ],
)


def rescaled(maps):
    flat = maps.flatten(2)
    low, high = flat.min(2).values[..., None, None], flat.max(2).values[..., None, None]
    return (maps - low) / (high - low + 1e-6)


def rescaled_in_two_steps(maps):
    maps = maps - maps.amin((2, 3), keepdim=True)
    peak = maps.amax((2, 3), keepdim=True)
    return maps / torch.where(peak == 0, torch.ones_like(peak), peak)


def minmax_of(dims):
    def function(maps):
        low, high = maps.amin(dims, keepdim=True), maps.amax(dims, keepdim=True)
        return (maps - low) / (high - low + 1e-6)

    return function


def halves(maps):
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return low, high


MINMAX = Answers(
    [minmax_of((2, 3)), rescaled, rescaled_in_two_steps],
    [
        Mutant("over the batch too", minmax_of((0, 2, 3)), "batch too"),
        Mutant("one for an image", minmax_of((1, 2, 3)), "all classes"),
        Mutant("one for all", lambda m: (m - m.min()) / (m.max() - m.min()), "whole batch"),
        Mutant("over the classes", minmax_of(1), "over the classes"),
        Mutant("equation 1", equation_1, "equation 1"),
        Mutant("ReLU first", lambda m: rescaled(m.relu()), "ReLU is still there"),
        Mutant("0 / 0", lambda m: (m - halves(m)[0]) / (halves(m)[1] - halves(m)[0]), "0 / 0"),
        Mutant("divided by the maximum", lambda m: (m - halves(m)[0]) / (halves(m)[1] + 1e-5), "denominator"),
        Mutant("not divided", lambda m: m - halves(m)[0], "division"),
        Mutant("not shifted", lambda m: m / (halves(m)[1] - halves(m)[0] + 1e-6), "not subtracted"),
        Mutant("upside down", lambda m: (halves(m)[1] - m) / (halves(m)[1] - halves(m)[0] + 1e-6)),
        Mutant("to -1..1", lambda m: 2 * rescaled(m) - 1, "-1 to 1"),
        Mutant(
            "standardised",
            lambda m: (m - m.mean((2, 3), keepdim=True)) / (m.std((2, 3), keepdim=True) + 1e-6),
        ),
    ],
)

MAX_POOLING = Answers(
    [
        lambda m: m.amax((2, 3)),
        lambda m: m.flatten(2).max(dim=2).values,
        lambda m: F.adaptive_max_pool2d(m, 1)[:, :, 0, 0],
        lambda m: F.max_pool2d(m, tuple(m.shape[2:])).squeeze(-1).squeeze(-1),
    ],
    [
        Mutant("mean", lambda m: m.mean((2, 3)), "GAP"),
        Mutant("sum", lambda m: m.sum((2, 3)), "sum"),
        Mutant("ReLU first", lambda m: m.relu().amax((2, 3)), "ReLU"),
        Mutant("sigmoid", lambda m: m.amax((2, 3)).sigmoid(), "sigmoid"),
        Mutant("absolute", lambda m: m.abs().amax((2, 3)), "absolute"),
        Mutant("minimum", lambda m: m.amin((2, 3)), "minimum"),
        Mutant("logsumexp", lambda m: m.logsumexp((2, 3)), "logsumexp"),
        Mutant("over the batch too", lambda m: m.amax((0, 2, 3)).expand(len(m), -1), "batch too"),
        Mutant("dimensions kept", lambda m: m.amax((2, 3), keepdim=True), "shape"),
        Mutant("over the classes", lambda m: m.amax((1, 2)), "shape"),
        Mutant("the place of the maximum", lambda m: m.flatten(2).argmax(2), "floating point"),
        Mutant("detached", lambda m: m.detach().amax((2, 3)), "gradient"),
        Mutant("squeezed", lambda m: m.amax((2, 3)).squeeze(0), "shape"),
        Mutant("mean of the rows' maxima", lambda m: m.amax(3).mean(2), "rows are pooled"),
        Mutant(
            "gradient spread",
            lambda m: m.mean((2, 3)) + (m.amax((2, 3)) - m.mean((2, 3))).detach(),
            "gradient",
        ),
    ],
)


def region_by_where(values, regions):
    rows, columns = np.where(values == values.max())
    for name in regions:
        if regions[name][rows[0], columns[0]]:
            return name


def region_at(place):
    def function(values, regions):
        row, column = place(values)
        return next(name for name, here in regions.items() if here[row, column])

    return function


PEAK = Answers(
    [
        region_at(lambda v: divmod(int(v.argmax()), v.shape[1])),
        region_by_where,
        lambda v, regions: max(regions, key=lambda name: np.where(regions[name], v, -np.inf).max()),
    ],
    [
        Mutant("minimum", region_at(lambda v: np.unravel_index(v.argmin(), v.shape)), "minimum"),
        Mutant("absolute", region_at(lambda v: np.unravel_index(np.abs(v).argmax(), v.shape)), "absolute"),
        Mutant(
            "highest mean", lambda v, r: max(r, key=lambda k: v[r[k]].mean() if r[k].any() else -9), "mean"
        ),
        Mutant("largest sum", lambda v, r: max(r, key=lambda k: v[r[k]].sum() if r[k].any() else -9), "sum"),
        Mutant("largest region", lambda v, r: max(r, key=lambda k: r[k].sum()), "largest region"),
        Mutant("always the head", lambda v, r: "head", "always"),
        Mutant("width and height", region_at(lambda v: divmod(int(v.argmax()), v.shape[0]))),
        Mutant("the number", lambda v, r: int(v.argmax()), "name of a region"),
        Mutant("outside of the map's zeros", lambda v, r: max(r, key=lambda k: np.where(r[k], v, 0).max())),
        Mutant("most above a half", lambda v, r: max(r, key=lambda k: (v[r[k]] > 0.5 * v.max()).sum())),
        Mutant("'skull'", lambda v, r: "skull", "expected one of"),
    ],
)


def scores_by_regions(values, truth, alpha):
    inside, outside = values[truth], values[~truth]
    hits = np.count_nonzero(inside > alpha)
    return {"recall": hits / inside.size, "precision": hits / (hits + np.count_nonzero(outside > alpha))}


def scores_by_loops(values, truth, alpha):
    hits = claimed = 0
    for value, right in zip(values.ravel(), truth.ravel(), strict=True):
        claimed += value > alpha
        hits += value > alpha and right
    return torch.tensor([hits / truth.sum(), hits / claimed])


def cue_mutant(function, above=lambda v, a: v > a):
    def scores(values, truth, alpha):
        cue = above(values, alpha)
        return function((cue & truth).sum(), cue.sum(), truth.sum(), (cue | truth).sum(), truth.size)

    return scores


def usual(hit, cue, true, union, pixels):
    return hit / true, hit / cue


CUE_SCORES = Answers(
    [cue_mutant(usual), scores_by_regions, scores_by_loops],
    [
        Mutant("exchanged", cue_mutant(lambda h, c, t, u, n: (h / c, h / t)), "comes first"),
        Mutant(">= alpha", cue_mutant(usual, lambda v, a: v >= a), ">= alpha"),
        Mutant("< alpha", cue_mutant(usual, lambda v, a: v < a), "< alpha"),
        Mutant(
            "of the maximum", cue_mutant(usual, lambda v, a: v > a * v.max()), "share of the map's maximum"
        ),
        Mutant("percent", cue_mutant(lambda h, c, t, u, n: (100 * h / t, 100 * h / c)), "percent"),
        Mutant("IoU", cue_mutant(lambda h, c, t, u, n: (h / u, h / u)), "IoU"),
        Mutant("of all pixels", cue_mutant(lambda h, c, t, u, n: (h / n, h / n)), "all pixels"),
        Mutant("counts", cue_mutant(lambda h, c, t, u, n: (h, h)), "not divided"),
        Mutant("false share", cue_mutant(lambda h, c, t, u, n: (h / t, (c - h) / c)), "wrong"),
        Mutant(
            "the map's mass", lambda v, t, a: (v[t].sum() / t.sum(), v[t].sum() / v.sum()), "values are added"
        ),
        Mutant("one number", cue_mutant(lambda h, c, t, u, n: h / t), "expected 2"),
        Mutant("alpha fixed at 0.2", lambda v, t, a: cue_mutant(usual)(v, t, 0.2)),
        Mutant("accuracy for precision", cue_mutant(lambda h, c, t, u, n: (h / t, (n - c - t + 2 * h) / n))),
        Mutant(
            "rescaled first", lambda v, t, a: cue_mutant(usual)((v - v.min()) / (v.max() - v.min()), t, a)
        ),
    ],
)


# 02 --------------------------------------------------------------------------------------------------------


def by_loops(x, delta):
    maps = [one.relu().clamp(max=delta * one.max().clamp(min=0)) for one in x.flatten(0, 1)]
    return torch.stack(maps).view_as(x)


def three_lines(x, delta):
    features = x.relu()
    tau = delta * features.flatten(2).max(-1).values
    return torch.minimum(features, tau[:, :, None, None])


def minimum_first(x, delta):
    """The ReLU last: where the maximum is positive it is the same, and elsewhere all is 0 anyhow."""
    return torch.minimum(x, delta * F.adaptive_max_pool2d(x, 1)).relu()


def peak_over(dims, keep=True):
    return lambda x, delta: torch.minimum(x.relu(), delta * x.relu().amax(dims, keepdim=keep))


def peak_of(x):
    return x.relu().amax((2, 3), keepdim=True)


def in_place(x, delta):
    x.clamp_(min=0)
    return torch.minimum(x, delta * x.amax((2, 3), keepdim=True))


def quietly_in_place(x, delta):
    result = suppress_plain(x, delta)
    x.detach()[:, :, 0] = 0
    return result


def first_image(x, delta):
    return torch.stack([one.relu().clamp(max=(delta * one.amax()).item()) for one in x[0]])[None].expand_as(x)


def without_graph(x, delta):
    with torch.no_grad():
        return suppress_plain(x, delta)


SUPPRESS = Answers(
    [
        suppress,
        suppress_plain,
        three_lines,
        by_loops,
        minimum_first,
        lambda x, d: DRS(x.shape[1], delta=d)(x),
    ],
    [
        Mutant("maximum over the batch too", peak_over((0, 2, 3)), "batch too"),
        Mutant("maximum over channels too", peak_over((1, 2, 3)), "share one maximum"),
        Mutant("one maximum", lambda x, d: torch.minimum(x.relu(), d * x.max()), "whole batch"),
        Mutant("maximum over the channels", peak_over(1), "over the channels"),
        Mutant("maximum of each row", peak_over(3), "row"),
        Mutant("maximum of each column", peak_over(2), "column"),
        Mutant("maximum over the images", peak_over(0), "over the images"),
        Mutant(
            "delta times the mean",
            lambda x, d: torch.minimum(x.relu(), d * x.relu().mean((2, 3), True)),
            "mean",
        ),
        Mutant("delta itself", lambda x, d: x.relu().clamp(max=d), "delta itself"),
        Mutant("1 - delta", lambda x, d: torch.minimum(x.relu(), (1 - d) * peak_of(x)), "1 - delta"),
        Mutant(
            "no ReLU", lambda x, d: torch.minimum(x, d * x.amax((2, 3), keepdim=True)), "ReLU is left out"
        ),
        Mutant("minimum of x, not of X", lambda x, d: torch.minimum(x, d * peak_of(x)), "ReLU is left out"),
        Mutant("tau detached", lambda x, d: torch.minimum(x.relu(), d * peak_of(x).detach()), "constant"),
        Mutant("erasing", lambda x, d: torch.where(x.relu() < d * peak_of(x), x.relu(), 0), "erasing"),
        Mutant("maximum of X and tau", lambda x, d: torch.maximum(x.relu(), d * peak_of(x)), "maximum of X"),
        Mutant("all scaled", lambda x, d: d * x.relu(), "multiplied by delta"),
        Mutant("a ReLU", lambda x, d: x.relu(), "plain ReLU"),
        Mutant("divided by the maximum", lambda x, d: suppress(x, d) / peak_of(x).clamp(min=1e-9), "divided"),
        Mutant("in place", in_place, "writes into"),
        Mutant("in place, behind autograd's back", quietly_in_place, "writes into"),
        Mutant("the first image only", first_image),
        Mutant("no dimensions kept", peak_over((2, 3), keep=False)),
        Mutant("no graph", without_graph, "no gradient"),
        Mutant(
            "NumPy",
            numpy_of(lambda x, d: np.minimum(np.maximum(x, 0), d * x.max((2, 3), keepdims=True).clip(0))),
            "no gradient",
        ),
        Mutant("float32", lambda x, d: suppress(x.float(), d), "float64"),
        Mutant("an absolute value for the ReLU", lambda x, d: suppress(x.abs(), d)),
        Mutant("a batch of one", lambda x, d: suppress(x.squeeze(0)[None], d)[:1]),
        Mutant("random", lambda x, d: suppress(x + 0.1 * torch.randn(x.shape, dtype=x.dtype), d)),
    ],
)


def soft_or_hard(form):
    """What the modules of 02 have in common: their mutants by the peak. form(X, tau)."""

    def of(peak, detach=False, relu=True):
        def module(x, delta):
            X = x.relu() if relu else x
            tau = delta * peak(x)
            return form(X, tau.detach() if detach else tau)

        return module

    return of, [
        Mutant(
            "maximum over the batch too", of(lambda x: x.relu().amax((0, 2, 3), keepdim=True)), "batch too"
        ),
        Mutant(
            "maximum over channels too", of(lambda x: x.relu().amax((1, 2, 3), keepdim=True)), "share one"
        ),
        Mutant(
            "maximum over the channels", of(lambda x: x.relu().amax(1, keepdim=True)), "over the channels"
        ),
        Mutant("maximum of each row", of(lambda x: x.relu().amax(3, keepdim=True)), "row"),
        Mutant("mean for maximum", of(lambda x: x.relu().mean((2, 3), keepdim=True)), "mean"),
        Mutant("delta itself", of(lambda x: torch.ones(1, 1, 1, 1, dtype=x.dtype)), "delta itself"),
        Mutant("hard suppression", suppress, "suppress"),
        Mutant("a ReLU", lambda x, d: x.relu()),
    ]


ERASE, erase_mutants = soft_or_hard(lambda X, tau: torch.where(X < tau, X, 0.0))
ERASING = Answers(
    [
        ERASE(peak_of),
        lambda x, d: F.relu(x) * (F.relu(x) < d * F.adaptive_max_pool2d(x, 1)),
        lambda x, d: x.relu().masked_fill(
            x >= d * x.flatten(2).max(2).values[..., None, None].clamp(min=0), 0
        ),
    ],
    [
        *erase_mutants,
        Mutant("> for >=", lambda x, d: torch.where(x.relu() > d * peak_of(x), 0, x.relu()), "equal to tau"),
        Mutant(
            "the wrong side", lambda x, d: torch.where(x.relu() < d * peak_of(x), 0, x.relu()), "below tau"
        ),
        Mutant("no ReLU", lambda x, d: torch.where(x < d * peak_of(x), x, 0), "ReLU"),
        Mutant(
            "only the maximum",
            lambda x, d: torch.where(x.relu() < peak_of(x), x.relu(), 0),
            "only the maximum",
        ),
        Mutant("1 where it is erased", lambda x, d: torch.where(x.relu() < d * peak_of(x), x.relu(), 1.0)),
        Mutant("detached", lambda x, d: ERASE(peak_of)(x.detach(), d), "gradient"),
        Mutant("in place", lambda x, d: x.relu_().masked_fill_(x >= d * peak_of(x), 0), "writes into"),
    ],
)

SOFT, soft_mutants = soft_or_hard(lambda X, tau: tau * torch.tanh(X / tau.clamp(min=1e-9)))


def soft_where(x, delta):
    X = x.relu()
    tau = (delta * X.amax((2, 3), keepdim=True)).expand_as(X)
    safe = torch.where(tau > 0, tau, torch.ones_like(tau))
    return torch.where(tau > 0, tau * torch.tanh(X / safe), torch.zeros_like(X))


def soft_by_exponentials(x, delta):
    X = F.relu(x)
    tau = delta * F.adaptive_max_pool2d(X, 1) + 1e-9
    e = torch.exp(-2 * X / tau)
    return tau * (1 - e) / (1 + e)


SOFT_SUPPRESSOR = Answers(
    [
        SOFT(peak_of),
        soft_where,
        soft_by_exponentials,
        lambda x, d: (d * peak_of(x) * torch.tanh(x.relu() / (d * peak_of(x)))).nan_to_num(),
    ],
    [
        *soft_mutants,
        Mutant(
            "tau in front missing", lambda x, d: torch.tanh(x.relu() / (d * peak_of(x) + 1e-9)), "in front"
        ),
        Mutant("tau inside missing", lambda x, d: d * peak_of(x) * torch.tanh(x.relu()), "inside"),
        Mutant("0 / 0", lambda x, d: d * peak_of(x) * torch.tanh(x.relu() / (d * peak_of(x))), "0 / 0"),
        Mutant("tau detached", SOFT(peak_of, detach=True), "constant"),
        Mutant("no ReLU", SOFT(peak_of, relu=False), "ReLU"),
        Mutant(
            "sigmoid",
            lambda x, d: d * peak_of(x) * torch.sigmoid(x.relu() / (d * peak_of(x) + 1e-9)),
            "sigmoid",
        ),
        Mutant("tanh of the maximum", lambda x, d: torch.minimum(x.relu(), torch.tanh(d * peak_of(x)))),
        Mutant("softsign", lambda x, d: x.relu() / (1 + x.relu() / (d * peak_of(x) + 1e-9))),
    ],
)


def with_weight(module, theta):
    module.f.weight.data = theta.detach().clone()
    return module


def by_linear(features, theta):
    return F.linear(features.flatten(2).mean(2), theta).sigmoid()


def by_einsum(features, theta):
    n, k, h, w = features.shape
    return 1 / (1 + torch.exp(-torch.einsum("kj,njhw->nk", theta, features) / (h * w)))


def by_call(features, theta):
    controller = LearnableController(len(theta)).to(theta.dtype)
    return torch.func.functional_call(controller, {"f.weight": theta}, (features,))


CONTROLLER = Answers(
    [by_linear, by_einsum, by_call],
    [
        Mutant("theta not transposed", lambda X, t: (X.mean((2, 3)) @ t).sigmoid(), "transposed"),
        Mutant("softmax", lambda X, t: (X.mean((2, 3)) @ t.T).softmax(1), "softmax"),
        Mutant("softmax over images", lambda X, t: (X.mean((2, 3)) @ t.T).softmax(0), "softmax"),
        Mutant("maximum for mean", lambda X, t: (X.amax((2, 3)) @ t.T).sigmoid(), "maximum"),
        Mutant("sum for mean", lambda X, t: (X.sum((2, 3)) @ t.T).sigmoid(), "sum"),
        Mutant("no sigmoid", lambda X, t: X.mean((2, 3)) @ t.T, "sigmoid is left out"),
        Mutant("sigmoid first", lambda X, t: X.mean((2, 3)).sigmoid() @ t.T, "before f"),
        Mutant("no f", lambda X, t: X.mean((2, 3)).sigmoid(), "f is left out"),
        Mutant("tanh", lambda X, t: torch.tanh(X.mean((2, 3)) @ t.T), "tanh"),
        Mutant("diagonal", lambda X, t: (X.mean((2, 3)) * t.diagonal()).sigmoid(), "diagonal"),
        Mutant(
            "mean over the batch",
            lambda X, t: (X.mean((0, 2, 3)) @ t.T).sigmoid().expand(len(X), -1),
            "batch",
        ),
        Mutant("features detached", lambda X, t: by_linear(X.detach(), t), "detached"),
        Mutant("theta detached", lambda X, t: by_linear(X, t.detach()), "gradient"),
        Mutant(
            "theta copied into a module",
            lambda X, t: with_weight(LearnableController(len(t)), t.float())(X.float()).to(X.dtype),
            "gradient",
        ),
        Mutant("mean over rows only", lambda X, t: (X.mean(2).mean(1) @ t.T[: X.shape[3]]).sigmoid()),
        Mutant("four dimensions", lambda X, t: by_linear(X, t)[:, :, None, None], "shape"),
        Mutant("one image", lambda X, t: by_linear(X[:1], t), "shape"),
    ],
)


def whole_module(x, theta):
    X = x.relu()
    tau = X.amax((2, 3)) * torch.sigmoid(X.mean((2, 3)) @ theta.T)
    return torch.minimum(X, tau[:, :, None, None])


def raw_peak(x):
    return x.amax((2, 3), keepdim=True)


def suppressed_by(X, peak, control, theta):
    return X.minimum(peak * control(X, theta)[..., None, None])


def module_mutant(control=by_linear, peak=peak_of, X=torch.relu, seen=torch.relu):
    return lambda x, t: torch.minimum(X(x), peak(x) * control(seen(x), t)[:, :, None, None])


ALGORITHM = Answers(
    [
        whole_module,
        lambda x, t: suppress(x, by_einsum(x.relu(), t)),
        module_mutant(),
        lambda x, t: torch.func.functional_call(DRS(len(t)).to(t.dtype), {"controller.f.weight": t}, (x,)),
    ],
    [
        Mutant("GAP before the ReLU", module_mutant(seen=lambda x: x), "before the ReLU"),
        Mutant(
            "maximum over the batch too",
            module_mutant(peak=lambda x: x.relu().amax((0, 2, 3), True)),
            "batch too",
        ),
        Mutant(
            "one maximum for all channels",
            module_mutant(peak=lambda x: x.relu().amax((1, 2, 3), True)),
            "share one",
        ),
        Mutant(
            "theta not transposed", module_mutant(lambda X, t: (X.mean((2, 3)) @ t).sigmoid()), "transposed"
        ),
        Mutant("softmax", module_mutant(lambda X, t: (X.mean((2, 3)) @ t.T).softmax(1)), "softmax"),
        Mutant(
            "maximum for GAP", module_mutant(lambda X, t: (X.amax((2, 3)) @ t.T).sigmoid()), "maximum instead"
        ),
        Mutant("sum for GAP", module_mutant(lambda X, t: (X.sum((2, 3)) @ t.T).sigmoid()), "sum"),
        Mutant(
            "controller sees detached features",
            module_mutant(lambda X, t: by_linear(X.detach(), t)),
            "detached",
        ),
        Mutant("control values detached", module_mutant(lambda X, t: by_linear(X, t).detach()), "detached"),
        Mutant("no ReLU in the minimum", module_mutant(X=lambda x: x), "not of relu"),
        Mutant(
            "no maximum",
            module_mutant(peak=lambda x: torch.ones(1, 1, 1, 1, dtype=x.dtype)),
            "without the maximum",
        ),
        Mutant("no sigmoid", module_mutant(lambda X, t: X.mean((2, 3)) @ t.T), "sigmoid is left out"),
        Mutant(
            "tau detached",
            lambda x, t: torch.minimum(
                x.relu(), (x.relu() - x.relu() + whole_module(x, t).amax((2, 3), keepdim=True)).detach()
            ),
            "constant",
        ),
        Mutant(
            "all scaled",
            lambda x, t: by_linear(x.relu(), t)[:, :, None, None] * x.relu(),
            "all of X is multiplied by G",
        ),
        Mutant("1 - G", module_mutant(lambda X, t: 1 - by_linear(X, t)), "1 - G"),
        Mutant("one maximum", module_mutant(peak=lambda x: x.relu().max()), "whole batch"),
        Mutant(
            "one maximum, of x", lambda x, t: suppressed_by(x.relu(), x.max(), by_linear, t), "whole batch"
        ),
        Mutant("maximum of each row", module_mutant(peak=lambda x: x.relu().amax(3, True)), "row"),
        Mutant(
            "mean for the maximum", module_mutant(peak=lambda x: x.relu().mean((2, 3), True)), "the mean of"
        ),
        Mutant(
            "erasing",
            lambda x, t: torch.where(whole_module(x, t) < x.relu(), 0, x.relu()),
            "erasing",
        ),
        Mutant("no ReLU anywhere", lambda x, t: suppressed_by(x, raw_peak(x), by_linear, t), "everywhere"),
        Mutant(
            "ReLU for the controller alone",
            lambda x, t: torch.minimum(x, by_linear(x.relu(), t)[..., None, None] * raw_peak(x)),
            "not of relu",
        ),
        Mutant(
            "maximum of X and tau",
            lambda x, t: torch.maximum(x.relu(), by_linear(x.relu(), t)[..., None, None] * peak_of(x)),
            "maximum of X and tau",
        ),
        Mutant("a ReLU", lambda x, t: F.relu(x), "nothing is suppressed"),
    ],
)

FIVE = [(1, 3), (2, 2), (2, 3), (2, 4)]
FIVE_BY_FIVE = Answers(
    [
        (4.4, FIVE, 1.76),
        {"positions": {*FIVE}, "tau": torch.tensor(4.4), "gradient": 1.76},
        [4.4, np.array(FIVE[::-1]), 0.44 * 4],
        (
            4.4,
            torch.zeros(5, 5).index_put(
                (torch.tensor([1, 2, 2, 2]), torch.tensor([3, 2, 3, 4])), torch.ones(4)
            )
            > 0,
            1.76,
        ),
    ],
    [
        Mutant("tau from the mean", (0.44 * 51 / 25, FIVE, 1.76), "not of its mean"),
        Mutant("tau is delta", (0.44, FIVE, 1.76), "not the share itself"),
        Mutant("tau with 1 - delta", (5.6, FIVE[:1] + FIVE[2:], 1.32), "1 - delta"),
        Mutant("tau is the maximum", (10, [(2, 3)], 1), "maximum"),
        Mutant("G of the text", (6.9, FIVE[:1] + FIVE[2:], 1.76), "0.69"),
        Mutant("counted from 1", (4.4, [(r + 1, c + 1) for r, c in FIVE], 1.76), "from 1"),
        Mutant("columns first", (4.4, [(c, r) for r, c in FIVE], 1.76), "exchanged"),
        Mutant("without the maximum", (4.4, [p for p in FIVE if p != (2, 3)], 1.76), "maximum itself"),
        Mutant("without 4.6", (4.4, [p for p in FIVE if p != (2, 2)], 1.32), "sunk since"),
        Mutant("with 4.3", (4.4, [*FIVE, (1, 4)], 2.2), "4.3"),
        Mutant("the maximum alone", (4.4, [(2, 3)], 0.44), "Not only"),
        Mutant("the text's, for delta 0.6", (4.4, FIVE, 1.8), "Here delta is 0.44"),
        Mutant("the bound of delta 0.6", (6, FIVE[:1] + FIVE[2:], 1.8), "here delta is 0.44"),
        Mutant("gradient 1", (4.4, FIVE, 1), "Without DRS"),
        Mutant("gradient 4", (4.4, FIVE, 4), "share"),
        Mutant("gradient 0.44", (4.4, FIVE, 0.44), "others"),
        Mutant("gradient of the other three", (4.4, FIVE, 1.32), "own gradient"),
        Mutant("own gradient in full", (4.4, FIVE, 2.32), "like the others"),
        Mutant("own gradient on top", (4.4, FIVE, 2.76), "nothing reaches it"),
        Mutant("gradient 0", (4.4, FIVE, 0), "decides tau"),
        Mutant("values for positions", (4.4, [4.6, 7.2, 8.4, 10.0], 1.76), "pairs"),
        Mutant("a count for positions", (4.4, 4, 1.76), "pairs"),
        Mutant("tau alone", 4.4, "expected 3"),
    ],
)

TWO_MAPS = Answers(
    [
        (5.744, 2.443),
        torch.sigmoid(torch.tensor([0.3, 0.45])) * torch.tensor([10.0, 4.0]),
        [5.74, np.float64(2.44)],
    ],
    [
        Mutant("control values", (0.574, 0.611), "control values"),
        Mutant("no sigmoid", (3.0, 1.8), "sigmoid"),
        Mutant("columns of theta", (7.109, 0.498), "columns"),
        Mutant("diagonal of theta", (6.900, 2.050), "diagonal"),
        Mutant("times the average", (1.149, 0.305), "average"),
        Mutant("softmax", (4.626, 2.150), "softmax"),
        Mutant("f of the maxima", (5.0, 3.667), "maxima"),
        Mutant("exchanged", (2.443, 5.744), "exchanged"),
        Mutant("maxima exchanged", (2.298, 6.106), "exchanged"),
        Mutant("tanh", (2.913, 1.688), "tanh"),
        Mutant("only the first right", (5.744, 2.0), "The other is right"),
        Mutant("one number", 5.744, "expected 2"),
    ],
)

DECAY = Answers(
    [0.5, torch.tensor(0.5), np.float32(0.5)],
    [
        Mutant(str(value), value, hint)
        for value, hint in (
            (0.9526, "starts"),
            (0.95, "starts"),
            (0, "sigmoid"),
            (1, "sigmoid of 0"),
            (3, "bias"),
            (0.55, "delta"),
        )
    ]
    + [Mutant("a word", "0.5"), Mutant("percent", 50, "percent")],
)


# 03 --------------------------------------------------------------------------------------------------------


def by_formula(values, shares):
    a, b = values.mean(1) - values.mean(), shares - shares.mean()
    return (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()


def correlation_mutant(function):
    return lambda values, shares: function(values.numpy(), shares.numpy())


CORRELATION = Answers(
    [
        correlation_mutant(lambda v, s: np.corrcoef(v.mean(1), s)[0, 1]),
        by_formula,
        lambda v, s: torch.corrcoef(torch.stack([v.mean(1), s]))[1, 0].item(),
    ],
    [
        Mutant("[0, 0]", correlation_mutant(lambda v, s: np.corrcoef(v.mean(1), s)[0, 0]), "[0, 0]"),
        Mutant("the matrix", correlation_mutant(lambda v, s: np.corrcoef(v.mean(1), s)), "one number"),
        Mutant("covariance", correlation_mutant(lambda v, s: np.cov(v.mean(1), s)[0, 1]), "covariance"),
        Mutant("squared", correlation_mutant(lambda v, s: np.corrcoef(v.mean(1), s)[0, 1] ** 2), "squared"),
        Mutant(
            "without its sign", correlation_mutant(lambda v, s: abs(np.corrcoef(v.mean(1), s)[0, 1])), "sign"
        ),
        Mutant("largest channel", correlation_mutant(lambda v, s: np.corrcoef(v.max(1), s)[0, 1]), "largest"),
        Mutant(
            "first channel", correlation_mutant(lambda v, s: np.corrcoef(v[:, 0], s)[0, 1]), "first channel"
        ),
        Mutant("mean over the images", correlation_mutant(lambda v, s: np.corrcoef(v.mean(0), s)[0, 1])),
        Mutant(
            "mean of the channels' correlations",
            correlation_mutant(lambda v, s: np.mean([np.corrcoef(c, s)[0, 1] for c in v.T])),
            "each channel",
        ),
        Mutant(
            "ranks",
            correlation_mutant(
                lambda v, s: np.corrcoef(v.mean(1).argsort().argsort(), s.argsort().argsort())[0, 1]
            ),
        ),
        Mutant(
            "of the logits", correlation_mutant(lambda v, s: np.corrcoef(v.sum(1), np.log(s / (1 - s)))[0, 1])
        ),
    ],
)


class ChannelController(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(channels))

    def forward(self, features):
        return torch.sigmoid(self.theta).expand(len(features), -1)


class OfFourDimensions(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(1, channels, 1, 1))

    def forward(self, features):
        return self.theta.sigmoid().repeat(features.shape[0], 1, 1, 1)


class Shared(OfFourDimensions):
    def forward(self, features):
        return 1 / (1 + torch.exp(-self.theta[0, :, 0, 0]))


def controller_class(forward, size=lambda k: (k,), parameter=nn.Parameter):
    class Controller(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.theta = parameter(torch.zeros(size(channels)))

        def forward(self, features):
            return forward(self.theta, features)

    return Controller


CHANNEL = Answers(
    [ChannelController, OfFourDimensions, Shared, lambda k: ChannelController(k)],
    [
        Mutant("equation 2's", LearnableController, "equation 2"),
        Mutant("a whole nn.Linear", controller_class(lambda t, x: t[0], lambda k: (k + 1, k)), "nn.Linear"),
        Mutant(
            "one number for all",
            controller_class(lambda t, x: t.sigmoid().expand(x.shape[:2]), lambda k: (1,)),
            "One number",
        ),
        Mutant(
            "no nn.Parameter",
            controller_class(lambda t, x: t.sigmoid().expand(len(x), -1), parameter=lambda t: t),
            "nn.Parameter",
        ),
        Mutant("no sigmoid", controller_class(lambda t, x: t.expand(len(x), -1)), "without the sigmoid"),
        Mutant("softmax", controller_class(lambda t, x: t.softmax(0).expand(len(x), -1)), "softmax"),
        Mutant("clamp", controller_class(lambda t, x: t.clamp(0, 1).expand(len(x), -1)), "clamp"),
        Mutant("tanh", controller_class(lambda t, x: t.tanh().expand(len(x), -1)), "tanh"),
        Mutant(
            "weighs the averages",
            controller_class(lambda t, x: (t * x.mean((2, 3))).sigmoid()),
            "other features",
        ),
        Mutant(
            "detached", controller_class(lambda t, x: t.detach().sigmoid().expand(len(x), -1)), "no gradient"
        ),
        Mutant(".data", controller_class(lambda t, x: t.data.sigmoid().expand(len(x), -1)), "no gradient"),
        Mutant(
            "the wrong way round",
            controller_class(lambda t, x: t.sigmoid()[:, None].expand(-1, len(x))),
            "shape",
        ),
        Mutant(
            "the features' shape",
            controller_class(lambda t, x: t.sigmoid()[:, None, None].expand_as(x)),
            "shape",
        ),
        Mutant("an instance", ChannelController(4), "its class"),
        Mutant("a function", lambda k: torch.sigmoid(torch.zeros(k)), "nn.Module"),
        Mutant("sigmoid twice", controller_class(lambda t, x: t.sigmoid().sigmoid().expand(len(x), -1))),
        Mutant(
            "super().__init__() missing",
            type(
                "C",
                (nn.Module,),
                {"__init__": lambda self, k: setattr(self, "theta", nn.Parameter(torch.zeros(k)))},
            ),
            "raised",
        ),
    ],
)


class Fixed(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.register_buffer("G", values.mean(0))

    def forward(self, features):
        return self.G


class PlainFixed(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.mean = torch.stack([channel.sum() / len(channel) for channel in values.T])

    def forward(self, features):
        return self.mean.expand(len(features), -1)


def fixed(of):
    class Module(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, features):
            return of(self.values, features)

    return Module


FIXED = Answers(
    [Fixed, PlainFixed, fixed(lambda v, x: v.mean(0, keepdim=True).repeat(len(x), 1)[:, :, None, None])],
    [
        Mutant("mean over the channels", fixed(lambda v, x: v.mean(1)), "over the channels"),
        Mutant("one mean", fixed(lambda v, x: v.mean().expand(v.shape[1])), "one mean"),
        Mutant("a number", fixed(lambda v, x: v.mean().item()), "forward returned"),
        Mutant("the median", fixed(lambda v, x: v.median(0).values), "median"),
        Mutant("the first image", fixed(lambda v, x: v[0]), "first image"),
        Mutant("sigmoid once more", fixed(lambda v, x: v.mean(0).sigmoid()), "sigmoid"),
        Mutant("all values", fixed(lambda v, x: v), "shape"),
        Mutant("trainable", lambda v: Shared(v.shape[1]), "trainable"),
        Mutant("a tensor", lambda v: v.mean(0), "nn.Module"),
        Mutant("the module itself", Fixed(torch.rand(3, 4))),
        Mutant("of the features", fixed(lambda v, x: x.mean((0, 2, 3)))),
    ],
)

DELTAS = Answers(
    [[0.5, 0.4], {0.4}, np.array([0.4, 0.5]), (0.5, 0.4)],
    [
        Mutant("sd of the worst", [0.4, 0.5, 0.55, 0.6], "largest sd"),
        Mutant("with 0.55", [0.4, 0.5, 0.55]),
        Mutant("one sd", [0.5], "one sd"),
        Mutant("none", [], "of itself"),
        Mutant("all", [0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.4]),
        Mutant("the paper's", [0.55]),
        Mutant("the wrong end", [0.9, 0.8]),
        Mutant("percent", [50, 40], "not among"),
        Mutant("a number", 0.4),
        Mutant("two sd as a share", [0.5, 0.45], "not among"),
    ],
)


# 04 --------------------------------------------------------------------------------------------------------


def field_backwards(layers):
    r = 1
    for k, s, d in reversed(layers):
        r = s * (r - 1) + d * (k - 1) + 1
    return r


def field_by_sum(layers):
    return torch.tensor(
        1
        + sum(
            (k - 1) * d * int(np.prod([s for _, s, _ in layers[:i]], initial=1))
            for i, (k, _, d) in enumerate(layers)
        )
    )


def field_forwards(
    layers, grow=lambda k, s, d, j: (k - 1) * d * j, r=1, early=False, jump=lambda j, s: j * s
):
    j = 1
    for k, s, d in layers:
        if early:
            j = jump(j, s)
        r += grow(k, s, d, j)
        if not early:
            j = jump(j, s)
    return r


FIELD = Answers(
    [field_forwards, field_backwards, field_by_sum],
    [
        Mutant("no dilation", lambda x: field_forwards(x, lambda k, s, d, j: (k - 1) * j), "dilation"),
        Mutant("no jump", lambda x: field_forwards(x, lambda k, s, d, j: (k - 1) * d), "jump is left out"),
        Mutant("jump first", lambda x: field_forwards(x, early=True), "before r"),
        Mutant("k for k - 1", lambda x: field_forwards(x, lambda k, s, d, j: k * d * j), "k - 1"),
        Mutant("d (k) - 1", lambda x: field_forwards(x, lambda k, s, d, j: (k * d - 1) * j), "multiplies k"),
        Mutant("from 0", lambda x: field_forwards(x, r=0), "starts at 0"),
        Mutant(
            "the layer's own stride",
            lambda x: field_forwards(x, lambda k, s, d, j: (k - 1) * d * s),
            "own stride",
        ),
        Mutant("backwards", lambda x: field_forwards(x[::-1]), "last to the first"),
        Mutant("one side", lambda x: field_forwards(x, lambda k, s, d, j: k // 2 * d * j), "one side"),
        Mutant("jumps added", lambda x: field_forwards(x, jump=lambda j, s: j + s)),
        Mutant("jumps added from 0", lambda x: field_forwards(x, jump=lambda j, s: j + s - 1)),
        Mutant("without poolings", lambda x: field_forwards([layer for layer in x if layer[0] != 2])),
        Mutant("the jump", lambda x: int(np.prod([s for _, s, _ in x]))),
        Mutant("all fields", lambda x: [field_forwards(x[:i]) for i in range(len(x))], "one number"),
        Mutant("empties the list", lambda x: [field_forwards(x), x.clear()][0], "writes into"),
    ],
)

VGG = Answers(
    [[5, 14, 40, 92, 196], (6, 16, 44, 100, 212), torch.tensor([5, 14, 40, 92, 196])],
    [
        Mutant("the paper's network", [5, 14, 40, 92, 204], "paper's"),
        Mutant("jump not doubled", [5, 10, 18, 26, 34], "doubled"),
        Mutant("poolings left out", [5, 9, 15, 21, 27], "Only convolutions"),
        Mutant("poolings' kernels left out", [5, 13, 37, 85, 181], "own kernel"),
        Mutant("one convolution a block", [3, 8, 18, 38, 78], "two or three"),
        Mutant("sizes of the outputs", [112, 56, 28, 14, 7], "sizes"),
        Mutant("jumps", [1, 2, 4, 8, 16], "jumps"),
        Mutant("the last wrong", [6, 16, 44, 100, 213], "block 5"),
        Mutant("all wrong", [7, 20, 50, 100, 200], "block 1"),
        Mutant("the last alone", 212, "expected 5"),
        Mutant("six layers", [5, 14, 40, 92, 204, 252], "6 entries"),
    ],
)


def square_by_sums(g, share=0.9, change=torch.abs):
    g = change(g)
    h, w = g.shape
    side = 1
    while True:
        rows = slice(max(h // 2 - side // 2, 0), h // 2 + side // 2 + 1)
        columns = slice(max(w // 2 - side // 2, 0), w // 2 + side // 2 + 1)
        if g[rows, columns].sum() >= share * g.sum() or side > h + w:
            return side
        side += 2


def square_by_distance(g):
    h, w = g.shape
    y, x = (torch.arange(side) - side // 2 for side in (h, w))
    distance = torch.maximum(y.abs()[:, None].expand(h, w), x.abs()[None].expand(h, w))
    held = torch.bincount(distance.flatten(), g.abs().flatten()).cumsum(0)
    return 2 * torch.searchsorted(held, 0.9 * held[-1]) + 1


def square_by_rings(g):
    g, half = g.abs().double().numpy(), 0
    padded = np.pad(g, max(g.shape))
    y, x = padded.shape[0] // 2, padded.shape[1] // 2
    while padded[y - half : y + half + 1, x - half : x + half + 1].sum() < 0.9 * g.sum():
        half += 1
    return half * 2 + 1


def box_of(g, threshold):
    rows, columns = (g.abs() > threshold * g.abs().max()).nonzero(as_tuple=True)
    return max(int(rows.max() - rows.min()), int(columns.max() - columns.min())) + 1


EFFECTIVE = Answers(
    [square_by_sums, square_by_distance, square_by_rings],
    [
        Mutant("the distance", lambda g: square_by_sums(g) // 2, "distance"),
        Mutant("twice the distance", lambda g: square_by_sums(g) - 1, "middle itself"),
        Mutant("with signs", lambda g: square_by_sums(g, change=lambda v: v), "signs"),
        Mutant("squared", lambda g: square_by_sums(g, change=torch.square), "squared"),
        Mutant("positive only", lambda g: square_by_sums(g, change=torch.relu), "negative"),
        Mutant("10 %", lambda g: square_by_sums(g, 0.1), "10 %"),
        Mutant("99 %", lambda g: square_by_sums(g, 0.99), "99 %"),
        Mutant("95 %", lambda g: square_by_sums(g, 0.95), "95 %"),
        Mutant("above a tenth", lambda g: box_of(g, 0.1), "tenth"),
        Mutant("all of it", lambda g: box_of(g, 0.0), "theoretical"),
        Mutant("the area", lambda g: square_by_sums(g) ** 2, "area"),
        Mutant("two too many", lambda g: square_by_sums(g) + 2),
        Mutant(
            "the count of positions",
            lambda g: (
                int((g.abs().flatten().sort(descending=True).values.cumsum(0) < 0.9 * g.abs().sum()).sum())
                + 1
            ),
        ),
        Mutant("around the maximum", lambda g: square_by_sums(torch.roll(g, (g.shape[0] // 2, 0), (0, 1)))),
        Mutant("takes the absolute in place", lambda g: square_by_sums(g.abs_()), "writes into"),
    ],
)


# 05 --------------------------------------------------------------------------------------------------------

REFINEMENT = Answers(
    [
        (0.64, 0.32),
        {"N": 0.64, "N with half of the images taken for another species": 0.32},
        np.array([0.64, 0.32]),
    ],
    [
        Mutant("the most frequent", (1, 1), "most frequent"),
        Mutant("the most frequent, halved", (1, 0.5), "most frequent"),
        Mutant("others taken for 0", (0.6, 0.3), "0.1, not 0"),
        Mutant("mean of 1 and 0.1", (0.55, 0.275), "equally frequent"),
        Mutant("not halved", (0.64, 0.64), "absent class"),
        Mutant("shares exchanged", (0.46, 0.23), "exchanged"),
        Mutant("0.1 for the absent", (0.64, 0.37), "not 0.1"),
        Mutant("1 for the absent", (0.64, 0.82), "is 0"),
        Mutant("percent", (64, 32), "percent"),
        Mutant("only the first", 0.64, "expected 2"),
        Mutant("words", ("0.64", "0.32"), "one number"),
    ],
)


def changes_by_library(before, after, mask, label):
    return np.bincount(librarys_changes(before, after, mask, label).ravel(), minlength=len(CHANGES))[1:]


def changes_by_loops(before, after, mask, label):
    counts = dict.fromkeys(CHANGES[1:], 0)
    for b, a, m in zip(before.ravel(), after.ravel(), mask.ravel(), strict=True):
        if m != 255 and (b or a):
            right = m == label
            counts[
                ("recovered, right" if right else "recovered, wrong")
                if not b
                else ("removed, wrong" if right else "removed, right")
                if not a
                else "kept"
            ] += 1
    return counts


def changes(before, after, mask, label, scored=lambda m: m != 255, right=lambda m, k: m == k):
    keep, on = scored(mask), right(mask, label)
    new, gone = after & ~before & keep, before & ~after & keep
    return [int(x.sum()) for x in (before & after & keep, new & on, new & ~on, gone & ~on, gone & on)]


def reordered(*order):
    return lambda *args: [changes(*args)[k] for k in order]


CUE_CHANGES = Answers(
    [changes, changes_by_library, changes_by_loops],
    [
        Mutant("removed the other way round", reordered(0, 1, 2, 4, 3), "other way round"),
        Mutant("right and wrong exchanged", reordered(0, 2, 1, 4, 3), "exchanged"),
        Mutant("recovered the other way round", reordered(0, 2, 1, 3, 4), "recovered"),
        Mutant("cues exchanged", lambda b, a, m, k: changes(a, b, m, k), "cues are exchanged"),
        Mutant("255 counted", lambda *args: changes(*args, scored=lambda m: m >= 0), "255"),
        Mutant(
            "255 counted as the class",
            lambda b, a, m, k: changes(b, a, np.where(m == 255, k, m), k),
            "the class",
        ),
        Mutant("label from 0", lambda b, a, m, k: changes(b, a, m, k - 1), "too low"),
        Mutant(
            "any object", lambda *args: changes(*args, right=lambda m, k: (m > 0) & (m < 255)), "any class"
        ),
        Mutant(
            "kept in either",
            lambda b, a, m, k: [int(((b | a) & (m != 255)).sum()), *changes(b, a, m, k)[1:]],
            "either",
        ),
        Mutant(
            "kept if right",
            lambda b, a, m, k: [int((b & a & (m == k)).sum()), *changes(b, a, m, k)[1:]],
            "right",
        ),
        Mutant(
            "kept in neither too",
            lambda b, a, m, k: [int(((b == a) & (m != 255)).sum()), *changes(b, a, m, k)[1:]],
            "neither",
        ),
        Mutant(
            "shares of the object",
            lambda b, a, m, k: [x / (m == k).sum() for x in changes(b, a, m, k)],
            "divided",
        ),
        Mutant("neither in front", lambda b, a, m, k: [0, *changes(b, a, m, k)], "6 entries"),
        Mutant(
            "new counted as all of the new cue",
            lambda b, a, m, k: changes(np.zeros_like(b), a, m, k)[:3] + changes(b, a, m, k)[3:],
        ),
        Mutant("writes the mask", lambda b, a, m, k: [changes(b, a, m, k), m.fill(0)][0], "writes into"),
    ],
)


def four_lines(network, images, target, labels):
    N = network(images)
    M = enlarge(target, N.shape[-2:])
    return (((N - M) ** 2).mean((2, 3)) * labels).sum() / labels.sum()


def by_selection(network, images, target, labels):
    N = network(images)
    M = enlarge(target, N.shape[-2:])
    return F.mse_loss(N[labels > 0], M[labels > 0])


def by_library(network, images, target, labels):
    return refinement_loss(
        network, Batch(torch.arange(len(images)), images, labels, target), label_mask=True
    ) + 0 * (images.sum() * 0)


def loss_mutant(compute, **options):
    def loss(network, images, target, labels):
        N = network(images)
        return compute(N, enlarge(target, N.shape[-2:], **options), labels)

    return loss


def of_classes(N, M, y):
    return ((N - M).square().mean((2, 3)) * y).sum() / y.sum()


def of_each_image(N, M, y):
    return (((N - M).square().mean((2, 3)) * y).sum(1) / y.sum(1)).mean()


def at_image_size(network, images, target, labels):
    return of_classes(enlarge(network(images), target.shape[-2:]), target, labels)


def times_labels(N, M, y):
    y = y[:, :, None, None]
    return F.mse_loss(N * y, M * y)


def nearest(network, images, target, labels):
    N = network(images)
    return of_classes(N, F.interpolate(target, N.shape[-2:]), labels)


MSE = Answers(
    [four_lines, by_selection, lambda *args: by_library(*args).to(args[1].dtype)],
    [
        Mutant("labels unused", loss_mutant(lambda N, M, y: F.mse_loss(N, M)), "not used"),
        Mutant("divided by all", loss_mutant(times_labels), "all classes"),
        Mutant("each image first", loss_mutant(of_each_image), "by itself first"),
        Mutant(
            "summed over positions",
            loss_mutant(lambda N, M, y: ((N - M).square().sum((2, 3)) * y).sum() / y.sum()),
            "added up",
        ),
        Mutant(
            "absolute error",
            loss_mutant(lambda N, M, y: ((N - M).abs().mean((2, 3)) * y).sum() / y.sum()),
            "not squared",
        ),
        Mutant(
            "mean before the square",
            loss_mutant(lambda N, M, y: ((N - M).mean((2, 3)).square() * y).sum() / y.sum()),
            "before squaring",
        ),
        Mutant("absent classes", loss_mutant(lambda N, M, y: of_classes(N, M, 1 - y)), "absent"),
        Mutant(
            "divided by images",
            loss_mutant(lambda N, M, y: of_classes(N, M, y) * y.sum() / len(N)),
            "number of images",
        ),
        Mutant("not divided", loss_mutant(lambda N, M, y: of_classes(N, M, y) * y.sum()), "not divided"),
        Mutant("corners", loss_mutant(of_classes, align_corners=False), "align_corners"),
        Mutant("nearest", nearest, "nearest"),
        Mutant("at the image's size", at_image_size, "enlarged"),
        Mutant("clipped", loss_mutant(lambda N, M, y: of_classes(N.clamp(0, 1), M, y)), "clipped"),
        Mutant("root", loss_mutant(lambda N, M, y: of_classes(N, M, y).sqrt()), "root"),
        Mutant("labels on N only", loss_mutant(lambda N, M, y: F.mse_loss(N * y[:, :, None, None], M))),
        Mutant("detached", loss_mutant(lambda N, M, y: of_classes(N.detach(), M, y)), "gradient"),
        Mutant("a float", lambda *args: four_lines(*args).item(), "tensor"),
        Mutant("not reduced", loss_mutant(lambda N, M, y: (N - M).square().mean((2, 3)) * y), "shape"),
        Mutant(
            "the classes of the first image",
            loss_mutant(lambda N, M, y: of_classes(N, M, y[:1].expand_as(y))),
        ),
    ],
)


def largest_by_one_hot(maps):
    winner = F.one_hot(maps.argmax(0), len(maps)).permute(2, 0, 1)
    return maps * winner


def largest_by_where(maps):
    return torch.where(maps == maps.max(dim=0, keepdim=True).values, maps, torch.zeros_like(maps))


def largest_in_place(maps):
    maps[maps < maps.amax(0)] = 0
    return maps


LARGEST = Answers(
    [keep_largest_class, largest_by_one_hot, largest_by_where],
    [
        Mutant("1 for the largest", lambda m: (m == m.amax(0)).to(m.dtype), "becomes 1"),
        Mutant("one hot", lambda m: F.one_hot(m.argmax(0), len(m)).permute(2, 0, 1).to(m.dtype)),
        Mutant("each class's peak", lambda m: m * (m == m.amax((1, 2), keepdim=True)), "highest pixel"),
        Mutant("along the height", lambda m: m * (m == m.amax(1, keepdim=True)), "height"),
        Mutant("along the width", lambda m: m * (m == m.amax(2, keepdim=True)), "width"),
        Mutant("the smallest", lambda m: m * (m == m.amin(0)), "smallest"),
        Mutant("the others", lambda m: m * (m != m.amax(0)), "removed"),
        Mutant("maximum for all", lambda m: m.amax(0).expand_as(m), "all classes"),
        Mutant(
            "one class an image",
            lambda m: m * (m.sum((1, 2)) == m.sum((1, 2)).max())[:, None, None],
            "whole image",
        ),
        Mutant("softmax", lambda m: m.softmax(0), "softmax"),
        Mutant("divided by the sum", lambda m: m / m.sum(0).clamp(min=1e-9), "sum"),
        Mutant("nothing", lambda m: m.clone(), "nothing"),
        Mutant("labels", lambda m: m.argmax(0), "floating point"),
        Mutant("the maximum", lambda m: m.amax(0), "shape"),
        Mutant("in place", largest_in_place, "writes into"),
        Mutant("one value", lambda m: m * (m == m.max()), "highest value of all"),
    ],
)


# 06 --------------------------------------------------------------------------------------------------------

PIXEL = Answers(
    [
        (2, 2, 2, 0),
        {"release": 0, "background": 2, "object": 2, "ignore": 2},
        np.array([2, 2, 2, 0], np.uint8),
    ],
    [
        Mutant("the object always", (2, 2, 2, 2), "'release' is not 2: is 0.10 above 50/255"),
        Mutant("ignored always", (255, 255, 255, 255), "neither cue"),
        Mutant("a conflict", (0, 2, 255, 0), "both cues are there"),
        Mutant("class 5", (5, 5, 5, 0), "largest wins"),
        Mutant("from 0", (1, 1, 1, 0), "from 1"),
        Mutant("one too high", (3, 3, 3, 0), "from 1"),
        Mutant("two maps are none", (2, 255, 2, 0), "no reason to ignore"),
        Mutant("release ignores", (2, 2, 2, 255), "only salient"),
        Mutant("release gives class 5", (2, 2, 2, 5), "50/255"),
        Mutant("background always", (0, 0, 0, 0), "'ignore' is not 0: a pixel is background if"),
        Mutant("-1 for ignored", (2, 2, -1, 0), "255"),
        Mutant("three labels", (2, 2, 0), "3 entries"),
        Mutant("the maps", (0.30, 0.30, 0.25, 0.05), "labels are 0"),
    ],
)


def rule_by_where(maps, saliency, alpha, beta, conflict):
    score, best = maps.max(dim=0)
    both = {"background": torch.zeros_like(best), "object": best + 1, "ignore": torch.full_like(best, 255)}[
        conflict
    ]
    calm = saliency < beta
    return torch.where(score > alpha, torch.where(calm, both, best + 1), torch.where(calm, 0, 255))


def rule_by_loops(maps, saliency, alpha, beta, conflict):
    labels = np.zeros(saliency.shape, np.uint8)
    for place in np.ndindex(*saliency.shape):
        values = maps[(slice(None), *place)].tolist()
        own = values.index(max(values)) + 1 if max(values) > alpha else None
        if saliency[place] < beta:
            labels[place] = 0 if own is None else {"background": 0, "object": own, "ignore": 255}[conflict]
        else:
            labels[place] = 255 if own is None else own
    return labels


def rule_mutant(
    is_object=lambda s, a: s > a,
    calm=lambda s, b: s < b,
    label=lambda best: best + 1,
    neither=255,
    score=lambda m: m.max(0),
    conflict=None,
):
    def labels(maps, saliency, alpha, beta, wanted):
        values, best = score(maps)
        mine, empty = is_object(values, alpha), calm(saliency, beta)
        found = torch.full(values.shape, neither)
        found[empty] = 0
        found = torch.where(mine, label(best), found)
        winner = conflict or wanted
        if winner != "object":
            found[mine & empty] = 0 if winner == "background" else 255
        return found

    return labels


def background_in_front(maps, saliency, alpha, beta, conflict):
    """Background put before the maps, and 1 added to the index all the same."""
    return rule_mutant(label=lambda best: best + 2)(maps, saliency, alpha, beta, conflict)


def rule_written_over(backwards=False):
    """Each class written over those before it."""

    def labels(maps, saliency, alpha, beta, conflict):
        found = torch.full(saliency.shape, 255)
        found[saliency < beta] = 0
        numbered = list(enumerate(maps, start=1))
        for number, own in reversed(numbered) if backwards else numbered:
            found[own > alpha] = number
        if conflict != "object":
            found[(maps > alpha).any(0) & (saliency < beta)] = 0 if conflict == "background" else 255
        return found

    return labels


def rule_of_two_winners(maps, saliency, alpha, beta, conflict, default=True):
    """Looks at one value of `conflict` and lets the other two be."""
    found = rule_mutant(conflict="object" if default else "background")(maps, saliency, alpha, beta, None)
    if conflict == ("background" if default else "object"):
        found = rule_mutant(conflict=conflict)(maps, saliency, alpha, beta, None)
    return found


RULE = Answers(
    [
        lambda m, s, a, b, c: pseudo_labels(m[None], s[None], a, b, conflict=c)[0],
        rule_by_where,
        rule_by_loops,
        rule_mutant(),
    ],
    [
        Mutant(">= alpha", rule_mutant(is_object=lambda s, a: s >= a), "equal to alpha"),
        Mutant("<= beta", rule_mutant(calm=lambda s, b: s <= b), "equal to beta"),
        Mutant("salient is background", rule_mutant(calm=lambda s, b: s > b), "salient"),
        Mutant("labels from 0", rule_mutant(label=lambda best: best), "too low"),
        Mutant("background counted twice", background_in_front, "counted in twice"),
        Mutant("neither is background", rule_mutant(neither=0), "neither cue"),
        Mutant("background always wins", rule_mutant(conflict="background"), "background always"),
        Mutant("object always wins", rule_mutant(conflict="object"), "object always"),
        Mutant("conflict always ignored", rule_mutant(conflict="ignore"), "always ignored"),
        Mutant("maps added up", rule_mutant(score=lambda m: (m.sum(0), m.argmax(0))), "added"),
        Mutant("the smallest map", lambda m, *rest: rule_mutant()(1 - m, *rest), "smallest"),
        Mutant("thresholds exchanged", lambda m, s, a, b, c: rule_mutant()(m, s, b, a, c), "exchanged"),
        Mutant("the mean map", rule_mutant(score=lambda m: (m.mean(0), m.argmax(0)))),
        Mutant("the last class above alpha", rule_written_over(), "last class above alpha"),
        Mutant("the first class above alpha", rule_written_over(backwards=True), "first class above alpha"),
        Mutant("ignore forgotten", rule_of_two_winners, '"ignore" is treated like "object"'),
        Mutant(
            "ignore forgotten, background by default",
            lambda *args: rule_of_two_winners(*args, default=False),
            '"ignore" is treated like "background"',
        ),
        Mutant(
            "the last class above a half",
            rule_mutant(score=lambda m: (m.amax(0), len(m) - 1 - (m > 0.5).flip(0).int().argmax(0))),
            "the labels are",
        ),
        Mutant("floats", lambda *args: rule_mutant()(*args).float(), "whole numbers"),
        Mutant("-1 for 255", lambda *args: rule_mutant()(*args).char()),
        Mutant("one hot", lambda m, *rest: F.one_hot(m.argmax(0)), "shape"),
        Mutant(
            "maps cut in place",
            lambda m, *rest: rule_mutant()(m.masked_fill_(m < 0.1, 0), *rest),
            "writes into",
        ),
    ],
)


def release_by_scores(maps, saliency, alpha):
    calm = (saliency <= 50 / 255).to(maps)
    scores = torch.cat([calm[None], torch.where(maps < alpha, torch.zeros_like(maps), maps)])
    labels = scores.argmax(0)
    labels[(calm == 0) & (labels == 0)] = 255
    labels[(scores > 0.9).sum(0) > 2] = 255
    return labels.byte()


def release_by_loops(maps, saliency, alpha):
    labels = np.zeros(saliency.shape, int)
    for place in np.ndindex(*saliency.shape):
        salient = saliency[place].item() * 255 > 50.001
        scores = [0.0 if salient else 1.0]
        scores += [value if value >= alpha else 0.0 for value in maps[(slice(None), *place)].tolist()]
        label = scores.index(max(scores))
        crowded = sum(value > 0.9 for value in scores) > 2
        labels[place] = 255 if crowded or (salient and label == 0) else label
    return labels


def release_mutant(
    cut=lambda m, a: m >= a,
    calm=lambda s: s <= 50 / 255,
    crowd=2,
    first=0,
    seam=255,
    high=lambda s: s > 0.9,
):
    def labels(maps, saliency, alpha):
        background = calm(saliency).to(maps)
        scores = torch.cat([background[None], maps * cut(maps, alpha)])
        found = scores.argmax(0)
        found[(background == 0) & (found == 0)] = seam
        found[high(scores[first:]).sum(0) > crowd] = 255
        return found

    return labels


def release_upside_down(maps, saliency, alpha):
    salient = saliency > 50 / 255
    scores = torch.cat([salient[None].to(maps), maps.where(maps >= alpha, torch.zeros(()))])
    found = scores.argmax(0).masked_fill(salient & (scores.argmax(0) == 0), 255)
    return found.masked_fill((scores > 0.9).sum(0) > 2, 255)


RELEASE = Answers(
    [
        lambda m, s, a: pseudo_labels(m[None], s[None], a, rule="release")[0],
        release_by_scores,
        release_by_loops,
    ],
    [
        Mutant(
            "the paper's rule", lambda m, s, a: rule_mutant()(m, s, a, 0.06, "background"), "paper's rule"
        ),
        Mutant(
            "the paper's rule at 50",
            lambda m, s, a: rule_mutant()(m, s, a, 50 / 255, "background"),
            "paper's rule",
        ),
        Mutant("> alpha", release_mutant(cut=lambda m, a: m > a), "equal to alpha"),
        Mutant("maps not cut", release_mutant(cut=lambda m, a: m >= 0), "keep their score"),
        Mutant("< 50/255", release_mutant(calm=lambda s: s < 50 / 255), "exactly 50/255"),
        Mutant("0.06", release_mutant(calm=lambda s: s < 0.06), "0.06"),
        Mutant("> 0.2", release_mutant(calm=lambda s: ~(s > 0.2)), "saliency is compared with 0.2"),
        Mutant(">= 0.2", release_mutant(calm=lambda s: ~(s >= 0.2)), "saliency = [[0.199]]"),
        Mutant("50 of 1", release_mutant(calm=lambda s: s <= 50), "0..255"),
        Mutant(
            "salient is background", release_mutant(calm=lambda s: s > 50 / 255), "where a pixel is salient"
        ),
        Mutant("background's score upside down", release_upside_down, "where a pixel is salient; it scores"),
        Mutant(">= 0.9", release_mutant(high=lambda s: s >= 0.9), "0.9 itself"),
        Mutant("crowds allowed", release_mutant(crowd=99), "not ignored"),
        Mutant("two are a crowd", release_mutant(crowd=1), "more than two"),
        Mutant("background not counted", release_mutant(first=1), "not counted"),
        Mutant("no seam", release_mutant(seam=0), "without a class"),
        Mutant("nothing ignored", lambda m, s, a: release_mutant(crowd=99, seam=0)(m, s, a)),
        Mutant(
            "background half as strong",
            lambda m, s, a: release_mutant(calm=lambda s: 0.5 * (s <= 50 / 255))(m, s, a),
        ),
        Mutant("labels from 0", lambda m, s, a: (release_by_scores(m, s, a).int() - 1) % 256),
    ],
)

SPAN = Answers(
    [
        lambda a, b: 1 + 2 * a + 2 * b,
        lambda a, b: (2 * a + 1) + (2 * b + 1) - 1,
        lambda a, b: field_forwards([(3, 1, a), (3, 1, b)]),
    ],
    [
        Mutant("middle twice", lambda a, b: 2 + 2 * a + 2 * b, "counted twice"),
        Mutant("no middle", lambda a, b: 2 * (a + b), "not counted"),
        Mutant("one side", lambda a, b: 1 + a + b, "one side"),
        Mutant("the sum", lambda a, b: a + b, "reach to one side"),
        Mutant("product", lambda a, b: (2 * a + 1) * (2 * b + 1), "multiplied"),
        Mutant("dilations multiplied", lambda a, b: 1 + 2 * a * b, "multiplied"),
        Mutant("the wider one", lambda a, b: 2 * max(a, b) + 1, "ASPP"),
        Mutant("k for k - 1", lambda a, b: 1 + 3 * (a + b), "k - 1"),
        Mutant("area", lambda a, b: (1 + 2 * a + 2 * b) ** 2, "area"),
        Mutant("no dilation", lambda a, b: 5, "dilation"),
        Mutant("weights", lambda a, b: 9, "weights"),
        Mutant("the first twice", lambda a, b: 1 + 4 * a, "first dilation"),
        Mutant("one dilation only", lambda a: 1 + 4 * a, "raised TypeError"),
        Mutant("one off the second", lambda a, b: 2 * a + 2 * b + 1 - (b > 1)),
    ],
)

PAIRS = Answers(
    [[(1, 1), (1, 2), (1, 3)], {(1, 1), (1, 2), (2, 1), (1, 3), (3, 1)}, np.array([[1, 1], [2, 1], [3, 1]])],
    [
        Mutant("(1, 3) missing", [(1, 1), (1, 2)], "missing"),
        Mutant("with (2, 2)", [(1, 1), (1, 2), (2, 2), (1, 3)], "(2, 2) leaves gaps"),
        Mutant("with (1, 4)", [(1, 1), (1, 2), (1, 3), (1, 4)], "(1, 4) leaves gaps"),
        Mutant("with (2, 3)", [(1, 1), (1, 2), (1, 3), (2, 3)], "(2, 3) leaves gaps"),
        Mutant("equal ones", [(1, 1), (2, 2), (3, 3)], "gaps"),
        Mutant("none", [], "no pair"),
        Mutant("without (1, 1)", [(1, 2), (1, 3)], "missing"),
        Mutant("with 0", [(0, 1), (1, 1), (1, 2), (1, 3)], "at least 1"),
        Mutant("numbers", [1, 2, 3], "pairs"),
        Mutant("a word in a pair", [(1, 1), (1, "2")], "a number in the pairs is '2'"),
        Mutant("words", "1 and 2", "pairs"),
    ],
)

UP_DOWN = ("up", "down", "same")
ANSWERS = {
    "lazy_network": LAZY,
    "miou": MIOU,
    "shared_stages": STAGES,
    "localization_map": EQUATION_1,
    "map_of_image_size": OF_IMAGE_SIZE,
    "peak_region": PEAK,
    "minmax_map": MINMAX,
    "minmax_scores": questions({"recall": "up", "precision": "down"}, UP_DOWN),
    "cue_scores": CUE_SCORES,
    "global_max_pooling": MAX_POOLING,
    "max_pooling_map": choices("sparser", ("sparser", "denser", "same"), 0),
    "broken_inputs": questions(
        {"not normalised": "silent", "training mode": "handled", "integers": "loud"},
        ("loud", "handled", "silent"),
    ),
    "five_by_five": FIVE_BY_FIVE,
    "two_maps": TWO_MAPS,
    "second_map": choices("stronger", ("stronger", "weaker", "not at all"), -1),
    "erasing": ERASING,
    "soft_suppressor": SOFT_SUPPRESSOR,
    "soft_properties": questions({"scaling": "holds", "max pooling": "holds"}, ("holds", "fails")),
    "weight_decay": DECAY,
    "suppress": SUPPRESS,
    "algorithm_1": ALGORITHM,
    "delta_one": choices("CAM", ("CAM", "learnable", "delta 0.90", "DRS in layer 6")),
    "delta_near_zero": choices("flat", ("flat", "empty", "sparse", "unchanged")),
    "within_two_sd": DELTAS,
    "control_correlation": CORRELATION,
    "channel_controller": CHANNEL,
    "fixed_controller": FIXED,
    "learnable_controller": CONTROLLER,
    "larger_heads": choices("higher", ("higher", "lower", "the same"), 5),
    "receptive_field": FIELD,
    "vgg16_fields": VGG,
    "effective_field": EFFECTIVE,
    "refinement_mean": REFINEMENT,
    "cue_changes": CUE_CHANGES,
    "mse_of_labels": MSE,
    "keep_largest": LARGEST,
    "shuffled_targets": choices("mean map", ("mean map", "own map", "zero", "noise")),
    "conflict_pixel": PIXEL,
    "ignored_share": questions({"alpha": "up", "beta": "down"}, UP_DOWN),
    "span_of_two": SPAN,
    "dense_pairs": PAIRS,
    "pseudo_labels": RULE,
    "release_rule": RELEASE,
    "all_ones_map": choices("flat", ("flat", "falling", "rising", "peaked")),
    "without_saliency": questions({"recall": "up", "precision": "down"}, UP_DOWN),
}


def verdicts(name):
    """The verdict on every mutant of a check, by the mutant."""
    return [(mutant, getattr(checks, name)(mutant.answer)) for mutant in ANSWERS[name].wrong]


def rejection_table():
    """Lines (check, mutants rejected, mutants tried, right answers accepted, right answers tried)."""
    table = []
    for name, answers in ANSWERS.items():
        accepted = sum(getattr(checks, name)(answer).ok for answer in answers.right)
        rejected = sum(not verdict.ok for _, verdict in verdicts(name))
        table.append((name, rejected, len(answers.wrong), accepted, len(answers.right)))
    return table


def main():
    table = rejection_table()
    print(f"{'check':22} mutants rejected   right answers accepted")
    for name, rejected, tried, accepted, right in table:
        print(f"{name:22} {rejected:7} of {tried:3} {accepted:18} of {right:2}")
    rejected, tried, accepted, right = (
        sum(column) for column in zip(*(row[1:] for row in table), strict=True)
    )
    print(
        f"{len(table)} checks: {rejected} of {tried} mutants rejected ({100 * rejected / tried:.1f} %), ",
        end="",
    )
    print(f"{accepted} of {right} right answers accepted.")


if __name__ == "__main__":
    main()
