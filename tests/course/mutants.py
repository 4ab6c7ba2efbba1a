"""Right answers and plausible wrong ones to every check of `drs_course.checks`, written as students would.

`test_checks.py` tries them all.
"""

import inspect
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from drs_course import checks
from drs_course.plots import CHANGES
from drs_course.plots import cue_changes as librarys_changes
from drs_lib.batches import Batch
from drs_lib.drs import DRS, LearnableController, suppress, suppress_plain
from drs_lib.labels import pseudo_labels
from drs_lib.losses import refinement_loss
from drs_lib.maps import keep_largest_class
from drs_lib.metrics import SegmentationScore


@dataclass(frozen=True)
class Mutant:
    """A wrong answer. ``hint``: words that the sentence about it must contain, where a cause is promised."""

    what: str
    answer: object
    hint: str = ""


@dataclass
class Answers:
    """To one check: right answers, and mutants."""

    right: tuple
    wrong: list = field(default_factory=list)

    def rejects(self, rows):
        """Adds a mutant for each row, what :: answer :: hint.

        Its answer is an expression, or an edit of the first right answer's source: a text => another for it.
        """
        self.wrong += [self._mutant(*row.strip().split(" :: ")) for row in rows.splitlines() if row.strip()]

    def _mutant(self, what, answer, hint=""):
        if " =>" not in answer:
            return Mutant(what, eval(answer, globals()), hint)
        right, (text, other), scope = self.right[0], answer.split(" =>"), {}
        source = inspect.getsource(right)
        assert text in source, f"{right.__name__} has no {text!r}"
        exec(source.replace(text, other.strip()), globals(), scope)
        return Mutant(what, scope[right.__name__], hint)


ANSWERS = {}


def accepts(name, *right):
    """Enters the right answers to a check."""
    ANSWERS[name] = Answers(right)
    return ANSWERS[name]


def choices(name, right, options, *others):
    """Answers of one word: the right one in three spellings, the other options, and words that are none."""
    wrong = [Mutant(option, option, "is not it") for option in options if option != right]
    wrong += [Mutant(f"{word!r}", word) for word in ("maybe", "", None, [right], *others)]
    accepts(name, right, right.upper(), f"  {right} ").wrong += wrong


def questions(name, right, options):
    """Answers of one word to each of several questions: a dictionary, a list, other order and case."""
    first, *_, last = right
    wrong = [
        Mutant("only one word", right[first]),
        Mutant("a question is missing", {first: right[first]}, "keys"),
        Mutant("a word that is no choice", {**right, last: "perhaps"}, "none of the choices"),
        Mutant("numbers", dict.fromkeys(right, 1)),
    ]
    wrong += [
        Mutant(f"{question} {option}", {**right, question: option}, f"{question}: ")
        for question in right
        for option in options
        if option != right[question]
    ]
    reverse = {question: right[question].upper() for question in reversed(right)}
    accepts(name, right, list(right.values()), reverse).wrong += wrong


# Words -----------------------------------------------------------------------------------------------------

UP_DOWN = ("up", "down", "same")
choices("max_pooling_map", "sparser", ("sparser", "denser", "same"), 0)
choices("second_map", "stronger", ("stronger", "weaker", "not at all"), -1)
choices("delta_one", "CAM", ("CAM", "learnable", "delta 0.90", "DRS in layer 6"))
choices("delta_near_zero", "flat", ("flat", "empty", "sparse", "unchanged"))
choices("larger_heads", "higher", ("higher", "lower", "the same"), 5)
choices("shuffled_targets", "mean map", ("mean map", "own map", "zero", "noise"))
choices("all_ones_map", "flat", ("flat", "falling", "rising", "peaked"))
questions("minmax_scores", {"recall": "up", "precision": "down"}, UP_DOWN)
questions("soft_properties", {"scaling": "holds", "max pooling": "holds"}, ("holds", "fails"))
questions("ignored_share", {"alpha": "up", "beta": "down"}, UP_DOWN)
questions("without_saliency", {"recall": "up", "precision": "down"}, UP_DOWN)
questions(
    "broken_inputs",
    {"not normalised": "silent", "training mode": "handled", "integers": "loud"},
    ("loud", "handled", "silent"),
)


# 00 --------------------------------------------------------------------------------------------------------


def miou_by_loops(predictions, masks, kinds):
    found, scored = [], masks != 255
    for label in range(kinds):
        said, true = (predictions == label) & scored, (masks == label) & scored
        both, either = (said & true).sum(), (said | true).sum()
        found.append(both / either if either else None)
    found = [iou for iou in found if iou is not None]
    return sum(found) / len(found)


def miou_by_counting(predictions, masks, kinds):
    confusion = np.zeros((kinds, kinds))
    keep = masks < 255
    np.add.at(confusion, (masks[keep], predictions[keep]), 1)
    hits = confusion.diagonal()
    with np.errstate(invalid="ignore"):
        return torch.tensor(np.nanmean(hits / (confusion.sum(0) + confusion.sum(1) - hits)))


accepts(
    "miou",
    miou_by_loops,
    lambda p, m, k: SegmentationScore(k).update(p, m).compute()["miou"],
    miou_by_counting,
).rejects("""
    pixel accuracy :: lambda p, m, k: (p == m)[m < 255].mean() :: pixels are averaged
    pixel accuracy with 255 :: lambda p, m, k: (p == m).mean() :: pixels are averaged
    mean of each image :: lambda p, m, k: np.mean([*map(miou_by_loops, p, m, [k] * len(p))]) :: by itself
    the per-label list :: lambda p, m, k: [1.0] * k :: one number
    an overflowing index :: lambda p, m, k: miou_by_loops(((m * k + p) % 256 % k).astype(np.uint8), m, k)
    255 as background :: found, scored => masks = masks * (masks < 255); found, scored :: 255 are counted
    255 stays in the union :: != 255 => <= 255 :: in the union
    without background :: range(kinds) => range(1, kinds) :: background is left out
    absent labels count 0 :: else None => else 0 :: count as 0
    absent labels count 1 :: else None => else 1 :: count as 1
    absent labels give nan :: else None => else np.nan :: nan
    recall :: both / either if either => both / true.sum() if true.any() :: recall
    precision :: both / either if either => both / said.sum() if said.any() :: precision
    Dice :: both / either => 2 * both / (said.sum() + true.sum()) :: Dice
    the union counts the overlap twice :: both / either => both / (either + both) :: counted twice
    percent :: return sum => return 100 * sum :: percent
    labels added up :: lambda p, m, k: (n := (p == m)[m < 255].sum()) / (2 * (m < 255).sum() - n) :: added up
    only labels with a hit :: if either => if both :: without a hit
""")


accepts(
    "lazy_network", (0.774, 0.774 / 7), torch.tensor([0.78, 0.1114]), {"pixel accuracy": 0.77, "mIoU": 0.11}
).rejects("""
    mIoU of background alone :: (0.774, 0.774) :: background alone
    background left out :: (0.774, 0.0) :: background has one
    divided by six :: (0.774, 0.774 / 6) :: seven labels
    IoU of background taken for 1 :: (0.774, 1 / 7) :: is not 1
    two labels :: (0.774, 0.774 / 2) :: two labels
    exchanged :: (0.774 / 7, 0.774) :: exchanged
    percent :: (77.4, 11.06) :: percent
""")

accepts("shared_stages", 1, 1.0, np.int64(1)).rejects("""
    0 :: 0 :: same δ
    2 :: 2 :: refine
    3 :: 3 :: all that it reads
    4 :: 4 :: keys
    5 :: 5 :: differs
    6 :: 6 :: in all
""")


# 01 --------------------------------------------------------------------------------------------------------


def equation_1(maps):
    M = maps.relu()
    return M / (M.amax((2, 3), keepdim=True) + 1e-5)


def equation_1_by_loops(maps):
    found = torch.zeros_like(maps)
    for one, M in zip(maps.flatten(0, 1), found.flatten(0, 1), strict=True):
        if one.max() > 0:
            M[:] = one.clamp(min=0) / one.max()
    return found


def equation_1_flat(maps):
    flat = F.relu(maps).flatten(2)
    peak = flat.max(-1, keepdim=True).values
    return torch.where(peak > 0, flat / peak, torch.zeros_like(flat)).view_as(maps)


accepts("localization_map", equation_1, equation_1_by_loops, equation_1_flat).rejects("""
    sigmoid :: torch.sigmoid :: sigmoid
    from minimum to maximum :: lambda m: rescaled(m) :: rescaled from
    8-bit maps :: lambda m: (255 * equation_1(m)).byte() :: floating point
    the batch's maximum :: (2, 3) => (0, 2, 3) :: batch
    the image's maximum :: (2, 3) => (1, 2, 3) :: all classes of an image
    one maximum :: M.amax((2, 3), keepdim=True) => maps.max() :: one maximum
    maximum over the classes :: (2, 3) => 1 :: over the classes
    maximum of each row :: (2, 3) => 3 :: row
    no ReLU :: maps.relu() => maps :: ReLU is left out
    nan in an empty map :: + 1e-5 => :: 0 / 0
    no division :: / (M.amax((2, 3), keepdim=True) + 1e-5) => :: division is left out
    absolute values :: relu => abs :: absolute
    sum for maximum :: amax => sum :: sum
    mean for maximum :: amax => mean :: mean
    a large guard :: 1e-5 => 0.1
    maximum of a batch of one :: M.amax((2, 3), keepdim=True) => M[0].amax((1, 2), keepdim=True)
    float32 whatever comes :: maps.relu() => maps.float().relu() :: float64
    in place :: relu() => relu_() :: writes into it
    0 / 0 where the maximum is just 0 :: + 1e-5 => + (maps.amax((2, 3), keepdim=True) < 0)
    0 for maxima below 1 :: M / => M * (M.amax((2, 3), keepdim=True) > 1) /
""")


def enlarge(maps, size, **options):
    return F.interpolate(maps, size=tuple(size), mode="bilinear", **{"align_corners": True} | options)


def grid_sampled(maps, size):
    y, x = (torch.linspace(-1, 1, side, dtype=maps.dtype) for side in size)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).expand(len(maps), -1, -1, -1)
    return equation_1(F.grid_sample(maps, grid, mode="bilinear", align_corners=True))


def map_by_map(maps, size):
    return torch.cat([equation_1_flat(enlarge(maps[:, c : c + 1], size)) for c in range(maps.shape[1])], 1)


def of_image_size(maps, size):
    return equation_1(F.interpolate(maps, tuple(size), mode="bilinear", align_corners=True))


accepts("map_of_image_size", of_image_size, grid_sampled, map_by_map).rejects("""
    divided first :: lambda m, size: enlarge(equation_1(m), size) :: divided first
    the batch's maximum :: lambda m, size: (M := enlarge(m, size).relu()) / M.amax((0, 2, 3), True) :: batch
    not enlarged :: lambda m, size: equation_1(m) :: shape
    ReLU first :: interpolate(maps => interpolate(maps.relu() :: ReLU comes before
    corners :: True => False :: align_corners
    nearest :: , mode="bilinear", align_corners=True => :: nearest
    bicubic :: bilinear => bicubic :: bicubic
    no ReLU :: equation_1( => (lambda M: M / M.amax((2, 3), keepdim=True))( :: ReLU
    height and width exchanged :: tuple(size) => tuple(size[::-1]) :: shape
    square :: tuple(size) => (size[0], size[0]) :: shape
    enlarged only :: equation_1 => F.relu :: division is left out
    a factor for a size :: tuple(size) => scale_factor=3 :: shape
""")


def rescaled(maps):
    low, high = (one[..., None, None] for one in maps.flatten(2).aminmax(dim=2))
    return (maps - low) / (high - low + 1e-6)


def rescaled_in_two_steps(maps):
    maps = maps - maps.amin((2, 3), keepdim=True)
    peak = maps.amax((2, 3), keepdim=True)
    return maps / torch.where(peak == 0, torch.ones_like(peak), peak)


def minmax(maps):
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low + 1e-6)


accepts("minmax_map", minmax, rescaled, rescaled_in_two_steps).rejects("""
    equation 1 :: equation_1 :: equation 1
    ReLU first :: lambda m: rescaled(m.relu()) :: ReLU is still there
    over the batch too :: (2, 3) => (0, 2, 3) :: batch too
    one for an image :: (2, 3) => (1, 2, 3) :: all classes
    one for all :: (2, 3) => (0, 1, 2, 3) :: whole batch
    over the classes :: (2, 3) => 1 :: over the classes
    0 / 0 :: + 1e-6 => :: 0 / 0
    divided by the maximum :: high - low + 1e-6 => high + 1e-5 :: denominator
    not divided :: / (high - low + 1e-6) => :: division
    not shifted :: (maps - low) => maps :: not subtracted
    upside down :: return => return 1 - :: upside down
    to -1..1 :: return => return -1 + 2 * :: -1 to 1
""")


accepts(
    "global_max_pooling",
    lambda m: m.amax((2, 3)),
    lambda m: m.flatten(2).max(dim=2).values,
    lambda m: F.adaptive_max_pool2d(m, 1)[:, :, 0, 0],
    lambda m: F.max_pool2d(m, tuple(m.shape[2:])).squeeze(-1).squeeze(-1),
).rejects("""
    mean :: lambda m: m.mean((2, 3)) :: GAP
    sum :: lambda m: m.sum((2, 3)) :: sum
    ReLU first :: lambda m: m.relu().amax((2, 3)) :: ReLU
    sigmoid :: lambda m: m.amax((2, 3)).sigmoid() :: sigmoid
    absolute :: lambda m: m.abs().amax((2, 3)) :: absolute
    minimum :: lambda m: m.amin((2, 3)) :: minimum
    logsumexp :: lambda m: m.logsumexp((2, 3)) :: logsumexp
    over the batch too :: lambda m: m.amax((0, 2, 3)).expand(len(m), -1) :: batch too
    dimensions kept :: lambda m: m.amax((2, 3), keepdim=True) :: shape
    over the classes :: lambda m: m.amax((1, 2)) :: shape
    the place of the maximum :: lambda m: m.flatten(2).argmax(2) :: floating point
    detached :: lambda m: m.detach().amax((2, 3)) :: gradient
    squeezed :: lambda m: m.amax((2, 3)).squeeze(0) :: shape
    mean of the rows' maxima :: lambda m: m.amax(3).mean(2) :: rows are pooled
    gradient spread :: lambda m: m.mean((2, 3)) + (m.amax((2, 3)) - m.mean((2, 3))).detach() :: gradient
""")


def region_by_where(values, regions):
    rows, columns = np.where(values == values.max())
    return [name for name in regions if regions[name][rows[0], columns[0]]][0]


def region_of_peak(values, regions):
    row, column = np.unravel_index(values.argmax(), values.shape)
    return next(name for name, here in regions.items() if here[row, column])


def region_by(measure):
    return lambda values, regions: max(regions, key=lambda name: measure(values[regions[name]]))


accepts(
    "peak_region", region_of_peak, region_by_where, region_by(lambda own: own.max(initial=-9))
).rejects("""
    highest mean :: region_by(lambda own: own.mean() if own.size else -9) :: mean
    largest sum :: region_by(lambda own: own.sum() if own.size else -9) :: sum
    largest region :: region_by(np.size) :: largest region
    always the head :: lambda v, r: 'head' :: always
    the number :: lambda v, r: int(v.argmax()) :: name of a region
    outside of the map's zeros :: region_by(lambda own: own.max(initial=0))
    'skull' :: lambda v, r: 'skull' :: expected one of
    minimum :: argmax => argmin :: minimum
    absolute :: values.argmax => np.abs(values).argmax :: absolute
    width and height :: values.argmax() => values.T.ravel().argsort()[-1]
""")


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


def scores(values, truth, alpha):
    cue = values > alpha
    hit = (cue & truth).sum()
    return hit / truth.sum(), hit / cue.sum()


accepts("cue_scores", scores, scores_by_regions, scores_by_loops).rejects("""
    the map's mass :: lambda v, t, a: (v[t].sum() / t.sum(), v[t].sum() / v.sum()) :: values are added
    exchanged :: hit / truth.sum(), hit / cue.sum() => hit / cue.sum(), hit / truth.sum() :: comes first
    >= alpha :: > alpha => >= alpha :: >= alpha
    < alpha :: > alpha => < alpha :: < alpha
    of the maximum :: > alpha => > alpha * values.max() :: share of the map's maximum
    percent :: (cue & truth) => 100 * (cue & truth) :: percent
    IoU :: return hit / truth.sum(), hit / cue.sum() => return (hit / (cue | truth).sum(),) * 2 :: IoU
    of all pixels :: .sum(), hit / cue.sum() => .size, hit / cue.size :: all pixels
    counts :: hit / truth.sum(), hit / cue.sum() => hit, hit :: not divided
    false share :: hit / cue.sum() => (cue.sum() - hit) / cue.sum() :: wrong
    precision by the union :: hit / cue.sum() => hit / (cue | truth).sum() :: divided by the union
    one number :: , hit / cue.sum() => :: expected 2
    accuracy for precision :: hit / cue.sum() => (cue == truth).mean()
""")


# 02 --------------------------------------------------------------------------------------------------------


def by_loops(x, delta):
    maps = [one.relu().clamp(max=delta * one.max().clamp(min=0)) for one in x.flatten(0, 1)]
    return torch.stack(maps).view_as(x)


def three_lines(x, delta):
    X = x.relu()
    tau = delta * X.amax((2, 3), keepdim=True)
    return torch.minimum(X, tau)


def minimum_first(x, delta):
    """The ReLU last: where the maximum is positive it is the same, and elsewhere all is 0 anyhow."""
    return torch.minimum(x, delta * F.adaptive_max_pool2d(x, 1)).relu()


def peak_of(x):
    return x.relu().amax((2, 3), keepdim=True)


PEAKS = """
    maximum over the batch too :: (2, 3) => (0, 2, 3) :: batch too
    maximum over channels too :: (2, 3) => (1, 2, 3) :: share one maximum
    maximum over the channels :: (2, 3) => 1 :: over the channels
    maximum of each row :: (2, 3) => 3 :: row
"""
accepts(
    "suppress",
    three_lines,
    suppress,
    suppress_plain,
    by_loops,
    minimum_first,
    lambda x, d: DRS(x.shape[1], delta=d)(x),
).rejects(f"""{PEAKS}
    a batch of one :: lambda x, d: suppress(x.squeeze(0)[None], d)[:1]
    one maximum :: X.amax((2, 3), keepdim=True) => x.max() :: whole batch
    maximum of each column :: (2, 3) => 2 :: column
    maximum over the images :: (2, 3) => 0 :: over the images
    delta times the mean :: amax => mean :: mean
    delta itself :: X.amax((2, 3), keepdim=True) => torch.ones_like(X) :: delta itself
    1 - delta :: delta * => (1 - delta) * :: 1 - delta
    no ReLU :: x.relu() => x :: ReLU is left out
    minimum of x, not of X :: minimum(X => minimum(x :: ReLU is left out
    tau detached :: (X, tau) => (X, tau.detach()) :: constant
    erasing :: torch.minimum(X, tau) => torch.where(X < tau, X, 0) :: erasing
    maximum of X and tau :: minimum => maximum :: maximum of X
    all scaled :: torch.minimum(X, tau) => delta * X :: multiplied by delta
    a ReLU :: torch.minimum(X, tau) => X :: plain ReLU
    divided by the maximum :: (X, tau) => (X, tau) / (tau / delta).clamp(min=1e-9) :: divided
    in place :: relu() => relu_() :: writes into
    in place, behind autograd's back :: x.relu() => x.relu(); x.detach()[:, :, 0] = 0 :: writes into
    no graph :: (X, tau) => (X, tau).detach() :: no gradient
    NumPy :: torch.minimum(X, tau) => torch.from_numpy(torch.minimum(X, tau).detach().numpy()) :: no gradient
    float32 :: x.relu() => x.float().relu() :: float64
""")

OF_A_MODULE = f"""{PEAKS}
    hard suppression :: suppress :: suppress
    mean for maximum :: amax => mean :: mean
    delta itself :: X.amax((2, 3), keepdim=True) => torch.ones_like(X) :: delta itself
"""


def erase(x, delta):
    X = x.relu()
    tau = delta * X.amax((2, 3), keepdim=True)
    return torch.where(X < tau, X, 0.0)


accepts(
    "erasing",
    erase,
    lambda x, d: F.relu(x) * (F.relu(x) < d * F.adaptive_max_pool2d(x, 1)),
    lambda x, d: x.relu().masked_fill(x >= d * x.flatten(2).max(2).values[..., None, None].clamp(min=0), 0),
).rejects(f"""{OF_A_MODULE}
    > for >= :: X < tau => X <= tau :: equal to tau
    the wrong side :: X, 0.0 => 0.0, X :: below tau
    no ReLU :: x.relu() => x :: ReLU
    only the maximum :: delta * => :: only the maximum
    detached :: x.relu() => x.detach().relu() :: gradient
    in place :: relu() => relu_() :: writes into
""")


def soft(x, delta):
    X = x.relu()
    tau = delta * X.amax((2, 3), keepdim=True)
    return tau * torch.tanh(X / tau.clamp(min=1e-9))


def soft_where(x, delta):
    X = x.relu()
    tau = (delta * X.amax((2, 3), keepdim=True)).expand_as(X)
    safe = torch.where(tau > 0, tau, torch.ones_like(tau))
    return torch.where(tau > 0, tau * torch.tanh(X / safe), torch.zeros_like(X))


accepts(
    "soft_suppressor",
    soft,
    soft_where,
    lambda x, d: (d * peak_of(x) * torch.tanh(x.relu() / (d * peak_of(x)))).nan_to_num(),
).rejects(f"""{OF_A_MODULE}
    tau is the maximum :: delta * => :: maximum itself
    tau in front missing :: return tau * => return :: in front
    tau inside missing :: X / tau.clamp(min=1e-9) => X :: inside
    0 / 0 :: .clamp(min=1e-9) => :: 0 / 0
    tau detached :: True) => True).detach() :: constant
    no ReLU :: x.relu() => x :: ReLU
    sigmoid :: tanh => sigmoid :: sigmoid
""")


def by_linear(features, theta):
    pooled = features.mean((2, 3))
    return F.linear(pooled, theta).sigmoid()


def by_einsum(features, theta):
    n, k, h, w = features.shape
    return 1 / (1 + torch.exp(-torch.einsum("kj,njhw->nk", theta, features) / (h * w)))


def by_call(features, theta):
    controller = LearnableController(len(theta)).to(theta.dtype)
    return torch.func.functional_call(controller, {"f.weight": theta}, (features,))


accepts("learnable_controller", by_linear, by_einsum, by_call).rejects("""
    theta not transposed :: pooled, theta => pooled, theta.T :: transposed
    softmax :: sigmoid() => softmax(1) :: softmax
    softmax over images :: sigmoid() => softmax(0) :: softmax
    maximum for mean :: mean => amax :: maximum
    sum for mean :: mean => sum :: sum
    no sigmoid :: .sigmoid() => :: sigmoid is left out
    sigmoid first :: F.linear(pooled, theta).sigmoid() => F.linear(pooled.sigmoid(), theta) :: before f
    no f :: F.linear(pooled, theta) => pooled :: f is left out
    tanh :: sigmoid => tanh :: tanh
    diagonal :: F.linear(pooled, theta) => (pooled * theta.diagonal()) :: diagonal
    mean over the batch :: mean((2, 3)) => mean((0, 2, 3)).expand(len(features), -1) :: batch
    features detached :: features.mean => features.detach().mean :: detached
    theta detached :: pooled, theta => pooled, theta.detach() :: gradient
    theta copied into a module :: pooled, theta => pooled, nn.Parameter(theta.detach()) :: gradient
    four dimensions :: .sigmoid() => .sigmoid()[:, :, None, None] :: shape
    one image :: features.mean => features[:1].mean :: shape
""")


def whole_module(x, theta):
    X = x.relu()
    peak = X.amax((2, 3), keepdim=True)
    G = torch.sigmoid(X.mean((2, 3)) @ theta.T)[:, :, None, None]
    tau = peak * G
    return torch.minimum(X, tau)


accepts(
    "algorithm_1",
    whole_module,
    lambda x, t: suppress(x, by_einsum(x.relu(), t)),
    lambda x, t: x.relu().minimum(peak_of(x) * by_linear(x.relu(), t)[..., None, None]),
    lambda x, t: torch.func.functional_call(DRS(len(t)).to(t.dtype), {"controller.f.weight": t}, (x,)),
).rejects("""
    GAP before the ReLU :: X.mean => x.mean :: before the ReLU
    maximum over the batch too :: amax((2, 3) => amax((0, 2, 3) :: batch too
    one maximum for all channels :: amax((2, 3) => amax((1, 2, 3) :: share one
    theta not transposed :: @ theta.T => @ theta :: transposed
    softmax :: torch.sigmoid(X.mean((2, 3)) @ theta.T) => (X.mean((2, 3)) @ theta.T).softmax(1) :: softmax
    maximum for GAP :: X.mean => X.amax :: maximum instead
    sum for GAP :: X.mean => X.sum :: sum
    controller sees detached features :: X.mean => X.detach().mean :: detached
    control values detached :: peak * G => peak * G.detach() :: detached
    no ReLU in the minimum :: minimum(X => minimum(x :: not of relu
    no maximum :: peak * G => G :: without the maximum
    no sigmoid :: torch.sigmoid => :: sigmoid is left out
    tau detached :: (X, tau) => (X, tau.detach()) :: constant
    all scaled :: torch.minimum(X, tau) => X * G :: all of X is multiplied by G
    1 - G :: peak * G => peak * (1 - G) :: 1 - G
    one maximum :: X.amax((2, 3), keepdim=True) => X.max() :: whole batch
    one maximum, of x :: X.amax((2, 3), keepdim=True) => x.max() :: whole batch
    maximum of each row :: amax((2, 3) => amax(3 :: row
    mean for the maximum :: X.amax => X.mean :: the mean of
    erasing :: torch.minimum(X, tau) => torch.where(X < tau, X, 0) :: erasing
    no ReLU anywhere :: x.relu() => x :: everywhere
    ReLU for the controller alone :: peak * G => x.amax((2, 3), keepdim=True) * G; X = x :: not of relu
    maximum of X and tau :: minimum => maximum :: maximum of X and tau
    a ReLU :: torch.minimum(X, tau) => X :: nothing is suppressed
""")


FIVE = [(1, 3), (2, 2), (2, 3), (2, 4)]
accepts(
    "five_by_five",
    (4.4, FIVE, 1.76),
    {"positions": {*FIVE}, "tau": torch.tensor(4.4), "gradient": 1.76},
    [4.4, np.array(FIVE[::-1]), 0.44 * 4],
    (4.4, torch.isin(torch.arange(25), torch.tensor([8, 12, 13, 14])).view(5, 5), 1.76),
).rejects("""
    tau from the mean :: (0.44 * 51 / 25, FIVE, 1.76) :: not of its mean
    tau is delta :: (0.44, FIVE, 1.76) :: not the share itself
    tau with 1 - delta :: (5.6, FIVE[:1] + FIVE[2:], 1.32) :: 1 - delta
    tau is the maximum :: (10, [(2, 3)], 1) :: maximum
    G of the text :: (6.9, FIVE[:1] + FIVE[2:], 1.76) :: 0.69
    counted from 1 :: (4.4, [(r + 1, c + 1) for r, c in FIVE], 1.76) :: from 1
    columns first :: (4.4, [(c, r) for r, c in FIVE], 1.76) :: exchanged
    without the maximum :: (4.4, [p for p in FIVE if p != (2, 3)], 1.76) :: maximum itself
    without 4.6 :: (4.4, [p for p in FIVE if p != (2, 2)], 1.32) :: sunk since
    with 4.3 :: (4.4, [*FIVE, (1, 4)], 2.2) :: 4.3
    the maximum alone :: (4.4, [(2, 3)], 0.44) :: Not only
    the text's, for delta 0.6 :: (4.4, FIVE, 1.8) :: Here delta is 0.44
    the bound of delta 0.6 :: (6, FIVE[:1] + FIVE[2:], 1.8) :: here delta is 0.44
    gradient 1 :: (4.4, FIVE, 1) :: Without DRS
    gradient 4 :: (4.4, FIVE, 4) :: share
    gradient 0.44 :: (4.4, FIVE, 0.44) :: others
    gradient of the other three :: (4.4, FIVE, 1.32) :: own gradient
    own gradient in full :: (4.4, FIVE, 2.32) :: like the others
    own gradient on top :: (4.4, FIVE, 2.76) :: nothing reaches it
    gradient 0 :: (4.4, FIVE, 0) :: decides tau
    values for positions :: (4.4, [4.6, 7.2, 8.4, 10.0], 1.76) :: pairs
    a count for positions :: (4.4, 4, 1.76) :: pairs
    tau alone :: 4.4 :: expected 3
""")

accepts(
    "two_maps",
    (5.744, 2.443),
    torch.sigmoid(torch.tensor([0.3, 0.45])) * torch.tensor([10.0, 4.0]),
    [5.74, np.float64(2.44)],
).rejects("""
    control values :: (0.574, 0.611) :: control values
    no sigmoid :: (3.0, 1.8) :: sigmoid
    columns of theta :: (7.109, 0.498) :: columns
    diagonal of theta :: (6.9, 2.05) :: diagonal
    times the average :: (1.149, 0.305) :: average
    softmax :: (4.626, 2.15) :: softmax
    f of the maxima :: (5.0, 3.667) :: maxima
    exchanged :: (2.443, 5.744) :: exchanged
    maxima exchanged :: (2.298, 6.106) :: exchanged
    tanh :: (2.913, 1.688) :: tanh
    only the first right :: (5.744, 2.0) :: The other is right
    one number :: 5.744 :: expected 2
""")

accepts("weight_decay", 0.5, torch.tensor(0.5), np.float32(0.5)).rejects("""
    0.9526 :: 0.9526 :: starts
    0.95 :: 0.95 :: starts
    0 :: 0 :: sigmoid
    1 :: 1 :: sigmoid of 0
    3 :: 3 :: bias
    0.55 :: 0.55 :: delta
    percent :: 50 :: percent
""")


# 03 --------------------------------------------------------------------------------------------------------


def by_numpy(values, shares):
    v, s = values.numpy(), shares.numpy()
    return np.corrcoef(v.mean(1), s)[0, 1]


accepts(
    "control_correlation",
    by_numpy,
    lambda v, s: F.cosine_similarity(v.mean(1) - v.mean(), s - s.mean(), dim=0),
    lambda v, s: torch.corrcoef(torch.stack([v.mean(1), s]))[1, 0].item(),
).rejects("""
    [0, 0] :: [0, 1] => [0, 0] :: [0, 0]
    the matrix :: [0, 1] => :: one number
    covariance :: corrcoef => cov :: covariance
    squared :: [0, 1] => [0, 1] ** 2 :: squared
    without its sign :: np.corrcoef(v.mean(1), s)[0, 1] => abs(np.corrcoef(v.mean(1), s)[0, 1]) :: sign
    largest channel :: mean => max :: largest
    first channel :: v.mean(1) => v[:, 0] :: first channel
    mean of the channels' correlations :: (v.mean(1), s)[0, 1] => (v.T, s)[-1, :-1].mean() :: each channel
""")


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


accepts(
    "channel_controller",
    ChannelController,
    OfFourDimensions,
    Shared,
).rejects("""
    equation 2's :: LearnableController :: equation 2
    an instance :: ChannelController(4) :: its class
    a function :: lambda k: torch.sigmoid(torch.zeros(k)) :: nn.Module
    a whole nn.Linear :: zeros(channels) => zeros(channels + 1, channels) :: nn.Linear
    one number for all :: zeros(channels) => zeros(1) :: One number
    no nn.Parameter :: nn.Parameter => :: nn.Parameter
    no sigmoid :: torch.sigmoid => :: without the sigmoid
    softmax :: torch.sigmoid(self.theta) => self.theta.softmax(0) :: softmax
    clamp :: torch.sigmoid(self.theta) => self.theta.clamp(0, 1) :: clamp
    tanh :: torch.sigmoid => torch.tanh :: tanh
    weighs the averages :: self.theta) => self.theta * features.mean((2, 3))) :: other features
    detached :: self.theta) => self.theta.detach()) :: no gradient
    .data :: self.theta) => self.theta.data) :: no gradient
    the wrong way round :: expand(len(features), -1) => expand(len(features), -1).T :: shape
    the features' shape :: .expand(len(features), -1) => [:, None, None].expand_as(features) :: shape
    super().__init__() missing :: super().__init__() => :: raised
""")


class Fixed(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.register_buffer("v", values)

    def forward(self, features):
        return self.v.mean(0)


class PlainFixed(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.mean = torch.stack([channel.sum() / len(channel) for channel in values.T])

    def forward(self, features):
        return self.mean.expand(len(features), -1)


class FixedOfFourDimensions(Fixed):
    def forward(self, features):
        return self.v.mean(0, keepdim=True).repeat(len(features), 1)[:, :, None, None]


accepts("fixed_controller", Fixed, PlainFixed, FixedOfFourDimensions).rejects("""
    trainable :: lambda v: Shared(v.shape[1]) :: trainable
    a tensor :: lambda v: v.mean(0) :: nn.Module
    mean over the channels :: mean(0) => mean(1) :: over the channels
    one mean :: mean(0) => mean().expand(self.v.shape[1]) :: one mean
    a number :: mean(0) => mean().item() :: forward returned
    the median :: mean(0) => median(0).values :: median
    the first image :: self.v.mean(0) => self.v[0] :: first image
    sigmoid once more :: mean(0) => mean(0).sigmoid() :: sigmoid
    all values :: self.v.mean(0) => self.v :: shape
""")


accepts("within_two_sd", [0.5, 0.4], {0.4}, np.array([0.4, 0.5]), (0.5, 0.4)).rejects("""
    sd of the worst :: [0.4, 0.5, 0.55, 0.6] :: largest sd
    with 0.55 :: [0.4, 0.5, 0.55]
    one sd :: [0.5] :: one sd
    none :: [] :: of itself
    percent :: [50, 40] :: not among
    two sd as a share :: [0.5, 0.45] :: not among
""")


# 04 --------------------------------------------------------------------------------------------------------


def field_backwards(layers):
    r = 1
    for k, s, d in reversed(layers):
        r = s * (r - 1) + d * (k - 1) + 1
    return r


def field_by_sum(layers):
    jumps = np.cumprod([1, *(s for _, s, _ in layers)])
    return torch.tensor(1 + sum((k - 1) * d * int(j) for (k, _, d), j in zip(layers, jumps, strict=False)))


def field_forwards(layers):
    r = j = 1
    for k, s, d in layers:
        r += (k - 1) * d * j
        j *= s
    return r


accepts("receptive_field", field_forwards, field_backwards, field_by_sum).rejects("""
    all fields :: lambda x: [field_forwards(x[:i]) for i in range(len(x))] :: one number
    empties the list :: lambda x: [field_forwards(x), x.clear()][0] :: writes into
    no dilation :: * d => :: dilation
    no jump :: * j => :: jump is left out
    jump first :: d * j => d * j * s :: before r
    k for k - 1 :: (k - 1) => k :: k - 1
    d (k) - 1 :: (k - 1) * d => (k * d - 1) :: multiplies k
    from 0 :: r = j = 1 => r, j = 0, 1 :: starts at 0
    the layer's own stride :: d * j => d * s :: own stride
    backwards :: in layers => in layers[::-1] :: last to the first
    one side :: (k - 1) => (k // 2) :: one side
""")


accepts(
    "vgg16_fields", [5, 14, 40, 92, 196], (6, 16, 44, 100, 212), torch.tensor([5, 14, 40, 92, 196])
).rejects("""
    the paper's network :: [5, 14, 40, 92, 204] :: paper's
    jump not doubled :: [5, 10, 18, 26, 34] :: doubled
    poolings left out :: [5, 9, 15, 21, 27] :: Only convolutions
    poolings' kernels left out :: [5, 13, 37, 85, 181] :: own kernel
    one convolution a block :: [3, 8, 18, 38, 78] :: two or three
    sizes of the outputs :: [112, 56, 28, 14, 7] :: sizes
    jumps :: [1, 2, 4, 8, 16] :: jumps
    the last wrong :: [6, 16, 44, 100, 213] :: block 5
    all wrong :: [7, 20, 50, 100, 200] :: block 1
    the last alone :: 212 :: expected 5
    six layers :: [5, 14, 40, 92, 204, 252] :: 6 entries
""")


def square_by_sums(gradient):
    g = gradient.abs()
    h, w = g.shape
    side = 1
    while True:
        rows = slice(max(h // 2 - side // 2, 0), h // 2 + side // 2 + 1)
        columns = slice(max(w // 2 - side // 2, 0), w // 2 + side // 2 + 1)
        if g[rows, columns].sum() >= 0.9 * g.sum() or side > h + w:
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
    return max(np.ptp(axis) for axis in np.nonzero(g.abs().numpy() > threshold * g.abs().max().item())) + 1


accepts("effective_field", square_by_sums, square_by_distance, square_by_rings).rejects("""
    above a tenth :: lambda g: box_of(g, 0.1) :: tenth
    all of it :: lambda g: box_of(g, 0.0) :: theoretical
    the distance :: return side => return side // 2 :: distance
    twice the distance :: return side => return side - 1 :: middle itself
    with signs :: gradient.abs() => gradient :: signs
    squared :: abs => square :: squared
    positive only :: abs => relu :: negative
    10 % :: 0.9 => 0.1 :: 10 %
    99 % :: 0.9 => 0.99 :: 99 %
    95 % :: 0.9 => 0.95 :: 95 %
    the area :: return side => return side**2 :: area
    takes the absolute in place :: abs() => abs_() :: writes into
""")


# 05 --------------------------------------------------------------------------------------------------------

accepts(
    "refinement_mean",
    (0.64, 0.32),
    {"N": 0.64, "N with half of the images taken for another species": 0.32},
    np.array([0.64, 0.32]),
).rejects("""
    the most frequent :: (1, 1) :: most frequent
    the most frequent, halved :: (1, 0.5) :: most frequent
    others taken for 0 :: (0.6, 0.3) :: 0.1, not 0
    mean of 1 and 0.1 :: (0.55, 0.275) :: equally frequent
    not halved :: (0.64, 0.64) :: absent class
    shares exchanged :: (0.46, 0.23) :: exchanged
    0.1 for the absent :: (0.64, 0.37) :: not 0.1
    1 for the absent :: (0.64, 0.82) :: is 0
    percent :: (64, 32) :: percent
    only the first :: 0.64 :: expected 2
    words :: ('0.64', '0.32') :: one number
""")


def changes_by_library(before, after, mask, label):
    return np.bincount(librarys_changes(before, after, mask, label).ravel(), minlength=len(CHANGES))[1:]


def changes_by_loops(before, after, mask, label):
    counts = dict.fromkeys(CHANGES[1:], 0)
    for b, a, m in zip(before.ravel(), after.ravel(), mask.ravel(), strict=True):
        if m != 255 and (b or a):
            change = "recovered" if a else "removed"
            counts["kept" if a and b else f"{change}, {'right' if a == (m == label) else 'wrong'}"] += 1
    return counts


def changes(before, after, mask, label):
    scored, right = mask != 255, mask == label
    kept, new, gone = before & after & scored, after & ~before & scored, before & ~after & scored
    return [int(x.sum()) for x in (kept, new & right, new & ~right, gone & ~right, gone & right)]


accepts("cue_changes", changes, changes_by_library, changes_by_loops).rejects("""
    cues exchanged :: lambda b, a, m, k: changes(a, b, m, k) :: cues are exchanged
    writes the mask :: lambda b, a, m, k: [changes(b, a, m, k), m.fill(0)][0] :: writes into
    removed the other way round :: gone & ~right, gone & => gone & right, gone & ~ :: other way round
    right and wrong exchanged :: == label => != label :: exchanged
    recovered the other way round :: new & right, new & ~ => new & ~right, new & :: recovered
    255 counted :: mask != 255 => mask >= 0 :: 255
    255 counted as the class :: 255, mask == label => 256, np.isin(mask, (label, 255)) :: the class
    label from 0 :: == label => == label - 1 :: too low
    any object :: mask == label => mask > 0 :: any class
    kept in either :: before & after & scored, => (before | after) & scored, :: either
    kept if right :: before & after & scored, => before & after & right, :: right
    kept in neither too :: before & after & scored, => (before == after) & scored, :: neither
    shares of the object :: int(x.sum()) => x.sum() / right.sum() :: divided
    neither in front :: (kept, new & right => (kept & False, kept, new & right :: 6 entries
""")


def four_lines(network, images, target, labels):
    N = network(images)
    M = F.interpolate(target, N.shape[-2:], mode="bilinear", align_corners=True)
    error = ((N - M) ** 2).mean((2, 3))
    y = labels
    loss = (error * y).sum() / y.sum()
    return loss


def by_selection(network, images, target, labels):
    N = network(images)
    M = enlarge(target, N.shape[-2:])
    return F.mse_loss(N[labels > 0], M[labels > 0])


def by_library(network, images, target, labels):
    batch = Batch(torch.arange(len(images)), images, labels, target)
    return refinement_loss(network, batch, label_mask=True).to(images.dtype)


accepts("mse_of_labels", four_lines, by_selection, by_library).rejects("""
    labels unused :: return loss => return error.mean() :: not used
    divided by all :: / y.sum() => / y.numel() :: all classes
    each image first :: return loss => return ((error * y).sum(1) / y.sum(1)).mean() :: by itself first
    summed over positions :: mean => sum :: added up
    absolute error :: ** 2).mean => ).abs().mean :: not squared
    mean before the square :: ((N - M) ** 2).mean((2, 3)) => (N - M).mean((2, 3)) ** 2 :: before squaring
    absent classes :: y = labels => y = 1 - labels :: absent
    divided by images :: / y.sum() => / len(N) :: number of images
    not divided :: / y.sum() => :: not divided
    corners :: True => False :: align_corners
    nearest :: mode="bilinear", align_corners=True => mode="nearest" :: nearest
    at the image's size :: network(images) => enlarge(network(images), target.shape[-2:]) :: enlarged
    clipped :: network(images) => network(images).clamp(0, 1) :: clipped
    root :: return loss => return loss.sqrt() :: root
    detached :: network(images) => network(images).detach() :: gradient
    a float :: return loss => return loss.item() :: tensor
    not reduced :: return loss => return error * y :: shape
""")


accepts(
    "keep_largest",
    keep_largest_class,
    lambda m: m * F.one_hot(m.argmax(0), len(m)).permute(2, 0, 1),
    lambda m: torch.where(m == m.max(dim=0, keepdim=True).values, m, torch.zeros_like(m)),
).rejects("""
    1 for the largest :: lambda m: (m == m.amax(0)).to(m.dtype) :: becomes 1
    each class's peak :: lambda m: m * (m == m.amax((1, 2), keepdim=True)) :: highest pixel
    along the height :: lambda m: m * (m == m.amax(1, keepdim=True)) :: height
    along the width :: lambda m: m * (m == m.amax(2, keepdim=True)) :: width
    the smallest :: lambda m: m * (m == m.amin(0)) :: smallest
    the others :: lambda m: m * (m != m.amax(0)) :: removed
    maximum for all :: lambda m: m.amax(0).expand_as(m) :: all classes
    one class an image :: lambda m: m * (m.sum((1, 2), True) == m.sum((1, 2)).max()) :: whole image
    softmax :: lambda m: m.softmax(0) :: softmax
    divided by the sum :: lambda m: m / m.sum(0).clamp(min=1e-09) :: sum
    nothing :: lambda m: m.clone() :: nothing
    labels :: lambda m: m.argmax(0) :: floating point
    the maximum :: lambda m: m.amax(0) :: shape
    in place :: lambda m: m.masked_fill_(m < m.amax(0), 0) :: writes into
    one value :: lambda m: m * (m == m.max()) :: highest value of all
""")


# 06 --------------------------------------------------------------------------------------------------------

accepts(
    "conflict_pixel",
    (2, 2, 2, 0),
    {"release": 0, "background": 2, "object": 2, "ignore": 2},
    np.array([2, 2, 2, 0], np.uint8),
).rejects("""
    the object always :: (2, 2, 2, 2) :: 'release' is not 2: is 0.10 above 50/255
    ignored always :: (255, 255, 255, 255) :: neither cue
    a conflict :: (0, 2, 255, 0) :: both cues are there
    class 5 :: (5, 5, 5, 0) :: largest wins
    from 0 :: (1, 1, 1, 0) :: from 1
    one too high :: (3, 3, 3, 0) :: from 1
    two maps are none :: (2, 255, 2, 0) :: no reason to ignore
    release ignores :: (2, 2, 2, 255) :: only salient
    release gives class 5 :: (2, 2, 2, 5) :: 50/255
    background always :: (0, 0, 0, 0) :: 'ignore' is not 0: a pixel is background if
    -1 for ignored :: (2, 2, -1, 0) :: 255
    three labels :: (2, 2, 0) :: 3 entries
    the maps :: (0.3, 0.3, 0.25, 0.05) :: labels are 0
""")


def rule_by_where(maps, saliency, alpha, beta, conflict):
    score, best = maps.max(dim=0)
    both = {"background": 0 * best, "object": best + 1, "ignore": 0 * best + 255}[conflict]
    calm = saliency < beta
    return torch.where(score > alpha, torch.where(calm, both, best + 1), torch.where(calm, 0, 255))


def rule_by_loops(maps, saliency, alpha, beta, conflict):
    labels = np.zeros(saliency.shape, np.uint8)
    for place in np.ndindex(*saliency.shape):
        values = maps[(slice(None), *place)].tolist()
        own = values.index(max(values)) + 1 if max(values) > alpha else None
        labels[place] = 255 if own is None else own
        if saliency[place] < beta:
            labels[place] = {"background": 0, "object": own, "ignore": 255}[conflict] if own else 0
    return labels


def rule(maps, saliency, alpha, beta, conflict):
    score, best = maps.max(0)
    mine, calm = score > alpha, saliency < beta
    labels = torch.full(score.shape, 255)
    labels[calm] = 0
    labels = torch.where(mine, best + 1, labels)
    if conflict != "object":
        labels[mine & calm] = 0 if conflict == "background" else 255
    return labels


OTHER_WINNER = {"background": "object", "object": "background", "ignore": "ignore"}
accepts(
    "pseudo_labels",
    rule,
    rule_by_where,
    rule_by_loops,
    lambda m, s, a, b, c: pseudo_labels(m[None], s[None], a, b, conflict=c)[0],
).rejects("""
    one hot :: lambda m, *rest: F.one_hot(m.argmax(0)) :: shape
    >= alpha :: > alpha => >= alpha :: equal to alpha
    <= beta :: < beta => <= beta :: equal to beta
    salient is background :: < beta => > beta :: salient
    labels from 0 :: best + 1 => best :: too low
    background counted twice :: best + 1 => best + 2 :: counted in twice
    neither is background :: shape, 255 => shape, 0 :: neither cue
    background always wins :: conflict != "object" => (conflict := "background") :: background always
    object always wins :: conflict != "object" => False :: object always
    winners exchanged :: lambda m, s, a, b, c: rule(m, s, a, b, OTHER_WINNER[c]) :: winners of a conflict
    conflict always ignored :: conflict != "object" => (conflict := "ignore") :: always ignored
    maps added up :: maps.max(0) => maps.sum(0), maps.argmax(0) :: added
    the smallest map :: maps.max(0) => (1 - maps).max(0) :: smallest
    thresholds exchanged :: score > alpha, saliency < beta => score > beta, saliency < alpha :: exchanged
    the last class above alpha :: best + 1 => len(maps) - (maps > alpha).flip(0).int().argmax(0) :: last class
    the first class above alpha :: best + 1 => (maps > alpha).int().argmax(0) + 1 :: first class above alpha
    ignore forgotten :: conflict != "object" => conflict == "background" :: "ignore" is treated like "object"
    ignore forgotten, background by default :: else 255 => else 0 :: "ignore" is treated like "background"
    the last class above a half :: best + 1 => len(maps) - (maps > 0.5).flip(0).int().argmax(0) :: labels are
    floats :: return labels => return labels.float() :: whole numbers
    -1 for 255 :: return labels => return labels.char()
    maps cut in place :: maps.max(0) => maps.masked_fill_(maps < 0.1, 0).max(0) :: writes into
""")


def release_by_scores(maps, saliency, alpha):
    calm = (saliency <= 50 / 255).to(maps)
    scores = torch.cat([calm[None], torch.where(maps < alpha, 0, maps)])
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


accepts(
    "release_rule",
    release_by_scores,
    release_by_loops,
    lambda m, s, a: pseudo_labels(m[None], s[None], a, rule="release")[0],
).rejects("""
    the paper's rule :: lambda m, s, a: rule(m, s, a, 0.06, 'background') :: paper's rule
    the paper's rule at 50 :: lambda m, s, a: rule(m, s, a, 50 / 255, 'background') :: paper's rule
    > alpha :: maps < alpha => maps <= alpha :: equal to alpha
    maps not cut :: maps < alpha => maps < 0 :: keep their score
    < 50/255 :: <= 50 / 255 => < 50 / 255 :: exactly 50/255
    0.06 :: <= 50 / 255 => < 0.06 :: 0.06
    > 0.2 :: <= 50 / 255 => <= 0.2 :: saliency is compared with 0.2
    >= 0.2 :: <= 50 / 255 => < 0.2 :: saliency = [[0.199]]
    50 of 1 :: 50 / 255 => 50 :: 0..255
    salient is background :: saliency <= => saliency > :: where a pixel is salient
    background's score upside down :: calm[None] => 1 - calm[None] :: where a pixel is salient; it scores
    >= 0.9 :: > 0.9 => >= 0.9 :: 0.9 itself
    crowds allowed :: > 2 => > 99 :: not ignored
    two are a crowd :: > 2 => > 1 :: more than two
    background not counted :: (scores > => (scores[1:] > :: not counted
    no tie :: [calm[None] => [0.999 * calm[None] :: tie
    nothing ignored :: labels = scores => return scores :: nothing is ignored
    no seam :: (labels == 0)] = 255 => (labels == 0)] = 0 :: without a class
    labels from 0 :: labels.byte() => (labels.byte().int() - 1) % 256
""")


accepts(
    "span_of_two",
    lambda a, b: 1 + 2 * a + 2 * b,
    lambda a, b: (2 * a + 1) + (2 * b + 1) - 1,
    lambda a, b: field_forwards([(3, 1, a), (3, 1, b)]),
).rejects("""
    middle twice :: lambda a, b: 2 + 2 * a + 2 * b :: counted twice
    no middle :: lambda a, b: 2 * (a + b) :: not counted
    one side :: lambda a, b: 1 + a + b :: one side
    the sum :: lambda a, b: a + b :: reach to one side
    product :: lambda a, b: (2 * a + 1) * (2 * b + 1) :: multiplied
    dilations multiplied :: lambda a, b: 1 + 2 * a * b :: multiplied
    the wider one :: lambda a, b: 2 * max(a, b) + 1 :: ASPP
    k for k - 1 :: lambda a, b: 1 + 3 * (a + b) :: k - 1
    area :: lambda a, b: (1 + 2 * a + 2 * b) ** 2 :: area
    no dilation :: lambda a, b: 5 :: dilation
    weights :: lambda a, b: 9 :: weights
    the first twice :: lambda a, b: 1 + 4 * a :: first dilation
    one dilation only :: lambda a: 1 + 4 * a :: raised TypeError
""")

accepts(
    "dense_pairs",
    [(1, 1), (1, 2), (1, 3)],
    {(1, 1), (1, 2), (2, 1), (1, 3), (3, 1)},
    np.array([[1, 1], [2, 1], [3, 1]]),
).rejects("""
    (1, 3) missing :: [(1, 1), (1, 2)] :: missing
    with (2, 2) :: [(1, 1), (1, 2), (2, 2), (1, 3)] :: (2, 2) leaves gaps
    with (1, 4) :: [(1, 1), (1, 2), (1, 3), (1, 4)] :: (1, 4) leaves gaps
    with (2, 3) :: [(1, 1), (1, 2), (1, 3), (2, 3)] :: (2, 3) leaves gaps
    equal ones :: [(1, 1), (2, 2), (3, 3)] :: gaps
    none :: [] :: no pair
    without (1, 1) :: [(1, 2), (1, 3)] :: missing
    with 0 :: [(0, 1), (1, 1), (1, 2), (1, 3)] :: at least 1
    numbers :: [1, 2, 3] :: pairs
    a word in a pair :: [(1, 1), (1, '2')] :: a number in the pairs is '2'
    words :: '1 and 2' :: pairs
""")


def verdicts(name):
    """The verdict on every mutant of a check, by the mutant."""
    return [(mutant, getattr(checks, name)(mutant.answer)) for mutant in ANSWERS[name].wrong]
