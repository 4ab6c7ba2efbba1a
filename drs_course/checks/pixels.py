"""Checks of what notebooks 00 and 06 ask to be written: the score of label maps, the rules that make them."""

import numpy as np
import torch

from drs_lib.labels import pseudo_labels as librarys_labels
from drs_lib.metrics import iou_per_class, mean_iou

from .functions import Case, Slip, Task, compare, generator, label_map, one_number
from .verdict import check


def _confusion(predictions, masks, kinds, ignored=255):
    scored = masks != ignored
    pairs = kinds * masks[scored].astype(np.int64) + predictions[scored]
    return np.bincount(pairs, minlength=kinds**2)[: kinds**2].reshape(kinds, kinds)


def _miou(predictions, masks, kinds):
    return mean_iou(_confusion(predictions, masks, kinds))


def _filled(value):
    return lambda predictions, masks, kinds: _miou(predictions, np.where(masks == 255, value, masks), kinds)


def _of_confusion(function):
    def score(predictions, masks, kinds):
        with np.errstate(all="ignore"):
            return float(function(_confusion(predictions, masks, kinds).astype(float)))

    return score


def _union_with_ignored(predictions, masks, kinds):
    found = []
    for k in range(kinds):
        union = ((predictions == k) | (masks == k)).sum()
        if union:
            found.append(((predictions == k) & (masks == k)).sum() / union)
    return float(np.mean(found))


def _of_hits(predictions, masks, kinds):
    iou = iou_per_class(_confusion(predictions, masks, kinds))
    return float(iou[iou > 0].mean())


def _of_each(predictions, masks, kinds):
    return float(np.mean([_miou(p, m, kinds) for p, m in zip(predictions, masks, strict=True)]))


@check("00", "2", "a function f(predictions, masks, kinds), arrays (N, H, W) of labels: a number in [0, 1]")
def miou(answer):
    """Mean IoU of label maps (00, exercise 2).

    The answer is a function f(predictions, masks, kinds): two uint8 arrays (N, H, W) of labels 0..kinds - 1,
    background being 0; a mask may hold 255, and such pixels are left out. It returns one number in [0, 1]:
    for each label

        IoU = |prediction and mask| / |prediction or mask|,

    its pixels counted over all images together, and the mean over the labels that occur in either.
    """
    small = (
        np.array([[[0, 1, 1, 2], [0, 0, 2, 2]]], np.uint8),
        np.array([[[0, 1, 0, 2], [0, 255, 1, 255]]], np.uint8),
    )
    cases = [Case((*small, 4))]
    for seed, kinds, shape in ((60, 7, (3, 9, 14)), (61, 21, (2, 16, 11)), (62, 5, (4, 6, 6))):
        rng = np.random.default_rng(seed)
        masks = rng.integers(0, kinds - 1, shape).astype(np.uint8)  # the last label occurs nowhere
        predictions = np.where(rng.random(shape) < 0.6, masks, rng.integers(0, kinds - 1, shape)).astype(
            np.uint8
        )
        masks[rng.random(shape) < 0.15] = 255
        masks[0][masks[0] < 255] = 0  # an image of background alone
        predictions[0][: shape[1] // 2] = 0
        predictions[(predictions == 1) & (masks == 1)] = 2  # label 1 occurs in both, and never in one place
        cases.append(Case((predictions, masks, kinds)))

    def without_background(c):
        return np.nanmean(iou_per_class(c)[1:])

    def columns(c):
        return np.nanmean(np.diag(c) / c.sum(0))

    slips = (
        Slip(_filled(0), "pixels masked 255 are counted, as background"),
        Slip(_union_with_ignored, "predictions at pixels masked 255 are counted in the union"),
        Slip(
            _of_confusion(lambda c: np.diag(c).sum() / c.sum()),
            "pixels are averaged, not labels: pixel accuracy",
        ),
        Slip(
            lambda p, m, k: float((p == m).mean()),
            "pixels are averaged, not labels, and 255 is counted: pixel accuracy",
        ),
        Slip(_of_confusion(without_background), "background is left out of the mean"),
        Slip(
            _of_confusion(lambda c: np.nan_to_num(iou_per_class(c)).mean()),
            "labels that occur nowhere count as 0",
        ),
        Slip(
            _of_confusion(lambda c: np.nan_to_num(iou_per_class(c), nan=1).mean()),
            "labels that occur nowhere count as 1",
        ),
        Slip(_of_hits, "labels without a hit are left out of the mean; their IoU is 0"),
        Slip(_of_each, "each image is scored by itself and the scores are averaged"),
        Slip(
            _of_confusion(lambda c: np.nanmean(np.diag(c) / c.sum(1))),
            "recall is averaged: the union is not used",
        ),
        Slip(_of_confusion(columns), "precision is averaged: the union is not used"),
        Slip(
            _of_confusion(lambda c: np.nanmean(2 * np.diag(c) / (c.sum(0) + c.sum(1)))),
            "the Dice score is averaged, 2 |and| / (|one| + |other|)",
        ),
        Slip(
            _of_confusion(lambda c: np.nanmean(np.diag(c) / (c.sum(0) + c.sum(1)))),
            "what is in both is counted twice in the union",
        ),
        Slip(_of_confusion(lambda c: 100 * mean_iou(c)), "the score is given in percent"),
        Slip(
            _of_confusion(lambda c: np.diag(c).sum() / (2 * c.sum() - np.diag(c).sum())),
            "intersections and unions of all labels are added up before the division",
        ),
    )
    task = Task(
        ("predictions", "masks", "kinds"), _miou, tuple(cases), slips, read=one_number, result="the mIoU"
    )
    compare(answer, task)


def _distinct(classes, shape, seed, unit):
    """Maps whose classes differ at every pixel, in steps of 1/unit, some equal to a half."""
    own = torch.stack(
        [torch.randperm(8, generator=generator(seed + i))[:classes] for i in range(shape[0] * shape[1])]
    )
    steps = torch.randint(0, unit // 8 - 1, (classes, *shape), generator=generator(seed + 1000)) * 8
    return (steps + own.T.reshape(classes, *shape)).float() / unit


def _rule(maps, saliency, alpha, beta, conflict):
    return librarys_labels(maps[None], saliency[None], alpha, beta, conflict=conflict)[0]


def _plain_rule(objects, background, label, conflict="background"):
    labels = torch.full(label.shape, 255)
    labels[background] = 0
    labels = torch.where(objects, label, labels)
    if conflict != "object":
        labels[objects & background] = 0 if conflict == "background" else 255
    return labels


def _like_rule(is_object=lambda s, a: s > a, is_background=lambda s, b: s < b, label=lambda best: best + 1):
    def labels(maps, saliency, alpha, beta, conflict):
        score, best = maps.max(0)
        return _plain_rule(is_object(score, alpha), is_background(saliency, beta), label(best), conflict)

    return labels


def _always(conflict):
    return lambda maps, saliency, alpha, beta, _: _rule(maps, saliency, alpha, beta, conflict)


def _neither_is_background(maps, saliency, alpha, beta, conflict):
    labels = _rule(maps, saliency, alpha, beta, conflict).clone()
    labels[(maps.amax(0) <= alpha) & (saliency >= beta)] = 0
    return labels


def _added(maps, saliency, alpha, beta, conflict):
    _, best = maps.max(0)
    return _plain_rule(maps.sum(0) > alpha, saliency < beta, best + 1, conflict)


def _like_other(conflict, other):
    """Treats one value of `conflict` like another one."""
    return lambda maps, saliency, alpha, beta, wanted: _rule(
        maps, saliency, alpha, beta, other if wanted == conflict else wanted
    )


def _written_over(classes):
    """The classes one after the other, each written over the one before wherever it is above alpha."""

    def labels(maps, saliency, alpha, beta, conflict):
        label = torch.full(saliency.shape, 255)
        for c in classes(len(maps)):
            label[maps[c] > alpha] = c + 1
        return _plain_rule(label < 255, saliency < beta, label, conflict)

    return labels


def _swapped(maps, saliency, alpha, beta, conflict):
    other = {"background": "object", "object": "background", "ignore": "ignore"}
    return _rule(maps, saliency, alpha, beta, other[conflict])


_CLASSES_OF_FOUR = torch.tensor([[[0.5, 0.5, 0.1, 0.1]], [[0.3, 0.0, 0.15, 0.0]]])


@check("06", "A", "a function f(maps, saliency, alpha, beta, conflict), (C, H, W) and (H, W): labels (H, W)")
def pseudo_labels(answer):
    """The paper's rule for pseudo labels, with all its cases (06, exercise A).

    The answer is a function f(maps, saliency, alpha, beta, conflict): maps a tensor (C, H, W) and saliency
    (H, W), in [0, 1]. It returns integers (H, W): where the largest map > alpha, its class, 1..C; where the
    saliency < beta, 0; where both hold, 0, the class or 255 for conflict "background", "object" or "ignore";
    where neither does, 255.
    """
    cases = [
        Case((_CLASSES_OF_FOUR, torch.tensor([[0.9, 0.01, 0.9, 0.01]]), 0.2, 0.06, conflict))
        for conflict in ("background", "object", "ignore")
    ]
    for seed, classes, shape in ((70, 6, (7, 10)), (71, 3, (12, 5))):
        maps = _distinct(classes, shape, seed, 64)
        saliency = torch.randint(0, 9, shape, generator=generator(seed + 1)).float() / 16
        cases += [
            Case((maps, saliency, 0.5, 0.25, conflict)) for conflict in ("background", "object", "ignore")
        ]
    slips = (
        Slip(
            _like_rule(is_object=lambda s, a: s >= a), "a map equal to alpha is an object; it must be above"
        ),
        Slip(
            _like_rule(is_background=lambda s, b: s <= b),
            "saliency equal to beta is background; it must be below",
        ),
        Slip(
            _like_rule(is_object=lambda s, a: s >= a, is_background=lambda s, b: s <= b),
            "both thresholds count as passed where they are just reached",
        ),
        Slip(_like_rule(is_background=lambda s, b: s > b), "salient pixels are called background"),
        Slip(_like_rule(is_background=lambda s, b: s >= b), "salient pixels are called background"),
        Slip(_like_rule(label=lambda best: best), "labels are one too low: the first class is 1, not 0"),
        Slip(
            _like_rule(label=lambda best: best + 2),
            "labels are one too high: background is counted in twice",
        ),
        Slip(_neither_is_background, "pixels with neither cue are background; nobody knows, they are 255"),
        Slip(_always("background"), "conflict is not looked at: background always wins"),
        Slip(_always("object"), "conflict is not looked at: the object always wins"),
        Slip(_always("ignore"), "conflict is not looked at: pixels with both cues are always ignored"),
        Slip(_swapped, "the two winners of a conflict are exchanged"),
        Slip(
            _like_other("ignore", "object"),
            '"ignore" is treated like "object"; it makes pixels with both cues 255',
        ),
        Slip(
            _like_other("ignore", "background"),
            '"ignore" is treated like "background"; it makes pixels with both cues 255',
        ),
        Slip(
            _written_over(range),
            "the last class above alpha wins, not the largest map: it is written over the others",
        ),
        Slip(
            _written_over(lambda classes: reversed(range(classes))),
            "the first class above alpha wins, not the largest map",
        ),
        Slip(_added, "the maps of all classes are added before they are compared with alpha"),
        Slip(
            lambda m, s, a, b, c: _rule(1 - m, s, a, b, c),
            "the smallest map takes the place of the largest",
        ),
        Slip(lambda m, s, a, b, c: _rule(m, s, b, a, c), "alpha and beta are exchanged"),
    )
    names = ("maps", "saliency", "alpha", "beta", "conflict")
    compare(answer, Task(names, _rule, tuple(cases), slips, read=label_map, result="the labels"))


def _release(maps, saliency, alpha):
    return librarys_labels(maps[None], saliency[None], alpha, rule="release")[0]


def _like_release(
    cut=lambda m, a: m >= a,
    calm=lambda s: s <= 50 / 255,
    crowd=2,
    high=lambda s: s > 0.9,
    uses_background=True,
    seam=255,
):
    def labels(maps, saliency, alpha):
        background = calm(saliency).float()
        scores = torch.cat([background[None], maps * cut(maps, alpha)])
        found = scores.argmax(0)
        found[(background == 0) & (found == 0)] = seam
        if crowd is not None:
            found[high(scores[0 if uses_background else 1 :]).sum(0) > crowd] = 255
        return found

    return labels


def _flipped(maps, saliency, alpha):
    """Background scores 1 where a pixel is salient; which pixels are salient is right."""
    salient = saliency > 50 / 255
    scores = torch.cat([salient[None].float(), maps * (maps >= alpha)])
    found = scores.argmax(0)
    found[salient & (found == 0)] = 255
    found[(scores > 0.9).sum(0) > 2] = 255
    return found


def _background_last(maps, saliency, alpha):
    """Background counted as the last of the scores: a class that reaches 1 wins over it."""
    background = (saliency <= 50 / 255).float()
    kept = maps * (maps >= alpha)
    found = torch.cat([kept, background[None]]).argmax(0) + 1
    found[found == len(maps) + 1] = 0
    found[(background == 0) & (kept.amax(0) == 0)] = 255
    found[(torch.cat([kept, background[None]]) > 0.9).sum(0) > 2] = 255
    return found


# The three maps and the saliency of a pixel, for alpha 0.5: each is one sentence of the rule.
_PIXELS = (
    ((0.8, 0.6, 0.1), 1.0),
    ((0.3, 0.2, 0.1), 1.0),  # no map reaches alpha
    ((0.1, 0.5, 0.2), 1.0),  # alpha itself
    ((0.8, 0.1, 0.0), 0.0),
    ((0.8, 0.1, 0.0), 50 / 255),
    ((0.8, 0.1, 0.0), 0.199),  # above 50/255, below 0.2
    ((0.1, 1.0, 0.2), 0.0),  # as high as background
    ((0.95, 0.92, 0.97), 1.0),  # three scores above 0.9
    ((0.95, 0.92, 0.1), 0.0),  # background is the third
    ((0.95, 0.92, 0.9), 1.0),  # two above 0.9, one not
    ((0.95, 0.9, 0.1), 0.0),
)


@check("06", "B", "a function f(maps, saliency, alpha), (C, H, W) and (H, W): labels (H, W)")
def release_rule(answer):
    """The released code's rule for pseudo labels (06, exercise B).

    The answer is a function f(maps, saliency, alpha): maps a tensor (C, H, W) and saliency (H, W), in [0, 1].
    It returns integers (H, W): a pixel is salient where its saliency > 50/255; background scores 1 where it
    is not and 0 where it is; maps below alpha score 0; the largest score wins, background on a tie; salient
    pixels that come out as background are 255, and so are pixels with more than two scores, background's
    included, above 0.9.
    """
    cases = [
        Case((torch.tensor(values)[:, None, None], torch.tensor([[level]], dtype=torch.float64), 0.5))
        for values, level in _PIXELS
    ]
    for seed, classes, shape in ((80, 5, (9, 12)), (81, 4, (13, 6))):
        maps = _distinct(classes, shape, seed, 64)
        levels = torch.tensor([0, 10, 40, 50, 51, 100, 255])
        saliency = levels[torch.randint(0, 7, shape, generator=generator(seed + 1))].double() / 255
        maps[:3, :2] = torch.tensor([0.95, 0.92, 0.97])[:, None, None]  # three high scores
        maps[:2, 2] = torch.tensor([0.95, 0.92])[:, None]  # two, a third where it isn't salient
        maps[1, 3, ::2] = 1.0
        cases.append(Case((maps, saliency, 0.5)))
    paper = lambda beta: lambda m, s, a: librarys_labels(m[None], s[None], a, beta)[0]  # noqa: E731
    slips = (
        Slip(paper(0.06), "the paper's rule is followed, with beta = 0.06"),
        Slip(paper(50 / 255), "the paper's rule is followed, with beta = 50/255"),
        Slip(_like_release(cut=lambda m, a: m > a), "maps equal to alpha score 0; only those below it do"),
        Slip(_like_release(cut=lambda m, a: m >= 0), "maps below alpha keep their score"),
        Slip(_like_release(calm=lambda s: s < 50 / 255), "saliency of exactly 50/255 counts as salient"),
        Slip(_like_release(calm=lambda s: s <= 0.2), "saliency is compared with 0.2; 50/255 is lower, 0.196"),
        Slip(_like_release(calm=lambda s: s < 0.2), "saliency is compared with 0.2; 50/255 is lower, 0.196"),
        Slip(_like_release(calm=lambda s: s < 0.06), "saliency is compared with 0.06, the paper's beta"),
        Slip(_like_release(calm=lambda s: s <= 50), "saliency is compared with 50, as if it were in 0..255"),
        Slip(_like_release(calm=lambda s: s > 50 / 255), "background scores 1 where a pixel is salient"),
        Slip(_flipped, "background scores 1 where a pixel is salient; it scores 1 where it is not"),
        Slip(_like_release(crowd=None), "pixels with more than two scores above 0.9 are not ignored"),
        Slip(_like_release(crowd=1), "two scores above 0.9 are enough to be ignored; it takes more than two"),
        Slip(_like_release(high=lambda s: s >= 0.9), "a score of 0.9 itself counts as above 0.9"),
        Slip(_like_release(uses_background=False), "background is not counted among the scores above 0.9"),
        Slip(_like_release(seam=0), "salient pixels without a class are background; they are 255"),
        Slip(_background_last, "a class wins a tie against background"),
        Slip(lambda m, s, a: _release(m, s, a) % 255, "nothing is ignored"),
    )
    task = Task(
        ("maps", "saliency", "alpha"), _release, tuple(cases), slips, read=label_map, result="the labels"
    )
    compare(answer, task)
