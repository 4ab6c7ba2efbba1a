"""Checks of what notebooks 00 and 06 ask to be written: the score of label maps, the rules that make them."""

import numpy as np
import torch

from drs_course.checks.functions import compare, generator, label_map, one_number
from drs_course.checks.verdict import check
from drs_lib.metrics import iou_per_class, mean_iou


def _score(predictions, masks, kinds, of=mean_iou):
    """A score of the confusion matrix."""
    scored = masks != 255
    pairs = kinds * masks[scored].astype(np.int64) + predictions[scored]
    confusion = np.bincount(pairs, minlength=kinds**2)[: kinds**2].reshape(kinds, kinds)
    with np.errstate(all="ignore"):
        return float(of(confusion.astype(float)))


def _mean(of):
    """The mean over labels of of(hits, pixels of the prediction, of the mask)."""
    return {"of": lambda c: np.nanmean(of(np.diag(c), c.sum(0), c.sum(1)))}


def _image_by_image(predictions, masks, kinds):
    return np.mean([_score(*pair, kinds) for pair in zip(predictions, masks, strict=True)])


def _with_a_hit(c):
    iou = iou_per_class(c)
    return iou[iou > 0].mean()


def _union_with_ignored(predictions, masks, kinds):
    pairs = [(predictions == k, masks == k) for k in range(kinds)]
    return np.mean([(p & m).sum() / (p | m).sum() for p, m in pairs if (p | m).any()])


_MIOU_SLIPS = {
    "pixels masked 255 are counted, as background": lambda p, m, k: _score(p, np.where(m == 255, 0, m), k),
    "predictions at pixels masked 255 are counted in the union": _union_with_ignored,
    "pixels are averaged, not labels: pixel accuracy": {"of": lambda c: np.diag(c).sum() / c.sum()},
    "pixels are averaged, not labels, and 255 is counted: pixel accuracy": lambda p, m, k: (p == m).mean(),
    "background is left out of the mean": {"of": lambda c: np.nanmean(iou_per_class(c)[1:])},
    "labels that occur nowhere count as 0": {"of": lambda c: np.nan_to_num(iou_per_class(c)).mean()},
    "labels that occur nowhere count as 1": {"of": lambda c: np.nan_to_num(iou_per_class(c), nan=1).mean()},
    "labels without a hit are left out of the mean; their IoU is 0": {"of": _with_a_hit},
    "each image is scored by itself and the scores are averaged": _image_by_image,
    "recall is averaged: the union is not used": _mean(lambda both, said, true: both / true),
    "precision is averaged: the union is not used": _mean(lambda both, said, true: both / said),
    "the Dice score is averaged, 2 |and| / (|one| + |other|)": _mean(lambda b, s, t: 2 * b / (s + t)),
    "what is in both is counted twice in the union": _mean(lambda both, said, true: both / (said + true)),
    "the score is given in percent": {"of": lambda c: 100 * mean_iou(c)},
    "intersections and unions of all labels are added up before the division": {
        "of": lambda c: np.diag(c).sum() / (2 * c.sum() - np.diag(c).sum())
    },
}


@check("00", "2", "a function f(predictions, masks, kinds), arrays (N, H, W) of labels: a number in [0, 1]")
def miou(answer):
    """Mean IoU of label maps (00, exercise 2).

    The arrays are uint8, of labels 0..kinds - 1, background being 0; a mask may hold 255, and such pixels are
    left out. For each label

        IoU = |prediction and mask| / |prediction or mask|,

    its pixels counted over all images together, and the number is the mean over the labels that occur in
    either.
    """
    small = [[[0, 1, 1, 2], [0, 0, 2, 2]]], [[[0, 1, 0, 2], [0, 255, 1, 255]]]
    cases = [(*(np.array(labels, np.uint8) for labels in small), 4)]
    for seed, kinds, shape in ((60, 7, (3, 9, 14)), (61, 21, (2, 16, 11)), (62, 5, (4, 6, 6))):
        rng = np.random.default_rng(seed)
        masks = rng.integers(0, kinds - 1, shape)  # the last label occurs nowhere
        predictions = np.where(rng.random(shape) < 0.6, masks, rng.integers(0, kinds - 1, shape))
        masks[rng.random(shape) < 0.15] = 255
        masks[0][masks[0] < 255] = 0  # an image of background alone
        predictions[0][: shape[1] // 2] = 0
        predictions[(predictions == 1) & (masks == 1)] = 2  # label 1 occurs in both, and never in one place
        cases.append((predictions.astype(np.uint8), masks.astype(np.uint8), kinds))
    compare(answer, _score, cases, _MIOU_SLIPS, read=one_number, result="the mIoU")


def _distinct(classes, shape, seed):
    """Maps whose classes differ at every pixel, in steps of 1/64, some equal to a half."""
    pixels = range(shape[0] * shape[1])
    own = torch.stack([torch.randperm(8, generator=generator(seed + i))[:classes] for i in pixels])
    steps = torch.randint(0, 7, (classes, *shape), generator=generator(seed + 1000)) * 8
    return (steps + own.T.reshape(classes, *shape)).float() / 64


def _paper(
    maps,
    saliency,
    alpha,
    beta,
    conflict,
    score=lambda maps: maps.amax(0),
    above=torch.gt,
    below=torch.lt,
    label=lambda maps, alpha: maps.argmax(0) + 1,
    meant=lambda conflict: conflict,
    neither=255,
):
    """The paper's rule; meant(conflict): what is read as its value."""
    found = torch.full(saliency.shape, neither)
    is_object, is_background = above(score(maps), alpha), below(saliency, beta)
    found[is_background] = 0
    found = torch.where(is_object, label(maps, alpha), found)
    if meant(conflict) != "object":
        found[is_object & is_background] = 0 if meant(conflict) == "background" else 255
    return found


def _last(maps, alpha):
    """The last class above alpha, counted from 1."""
    return len(maps) - (maps > alpha).flip(0).int().argmax(0)


_PAPER_SLIPS = {
    "a map equal to alpha is an object; it must be above": {"above": torch.ge},
    "saliency equal to beta is background; it must be below": {"below": torch.le},
    "salient pixels are called background": ({"below": torch.gt}, {"below": torch.ge}),
    "labels are one too low: the first class is 1, not 0": {"label": lambda m, alpha: m.argmax(0)},
    "labels are one too high: background is counted in twice": {"label": lambda m, alpha: m.argmax(0) + 2},
    "pixels with neither cue are background; nobody knows, they are 255": {"neither": 0},
    "conflict is not looked at: background always wins": {"meant": lambda _: "background"},
    "conflict is not looked at: the object always wins": {"meant": lambda _: "object"},
    "conflict is not looked at: pixels with both cues are always ignored": {"meant": lambda _: "ignore"},
    "the two winners of a conflict are exchanged": {
        "meant": {"background": "object", "object": "background", "ignore": "ignore"}.get
    },
    '"ignore" is treated like "object"; it makes pixels with both cues 255': {
        "meant": lambda conflict: conflict.replace("ignore", "object")
    },
    '"ignore" is treated like "background"; it makes pixels with both cues 255': {
        "meant": lambda conflict: conflict.replace("ignore", "background")
    },
    "the last class above alpha wins, not the largest map: it is written over the others": {"label": _last},
    "the first class above alpha wins, not the largest map": {
        "label": lambda maps, alpha: (maps > alpha).int().argmax(0) + 1
    },
    "the maps of all classes are added before they are compared with alpha": {
        "score": lambda maps: maps.sum(0)
    },
    "the smallest map takes the place of the largest": lambda m, *rest: _paper(1 - m, *rest),
    "alpha and beta are exchanged": lambda m, s, a, b, c: _paper(m, s, b, a, c),
}


@check("06", "A", "a function f(maps, saliency, alpha, beta, conflict), (C, H, W) and (H, W): labels (H, W)")
def pseudo_labels(answer):
    """The paper's rule for pseudo labels, with all its cases (06, exercise A).

    maps and saliency are tensors, in [0, 1]. The labels are integers: where the largest map > alpha, its
    class, 1..C; where the saliency < beta, 0; where both hold, 0, the class or 255 for conflict "background",
    "object" or "ignore"; where neither does, 255.
    """
    maps = torch.tensor([[[0.5, 0.5, 0.1, 0.1]], [[0.3, 0.0, 0.15, 0.0]]])
    conflicts = ("background", "object", "ignore")
    cases = [(maps, torch.tensor([[0.9, 0.01, 0.9, 0.01]]), 0.2, 0.06, conflict) for conflict in conflicts]
    for seed, classes, shape in ((70, 6, (7, 10)), (71, 3, (12, 5))):
        maps = _distinct(classes, shape, seed)
        saliency = torch.randint(0, 9, shape, generator=generator(seed + 1)).float() / 16
        cases += [(maps, saliency, 0.5, 0.25, conflict) for conflict in conflicts]
    compare(answer, _paper, cases, _PAPER_SLIPS, read=label_map, result="the labels")


def _release(
    maps,
    saliency,
    alpha,
    cut=torch.ge,
    calm=lambda saliency: saliency <= 50 / 255,
    score=lambda calm: calm,
    seam=255,
    high=lambda scores: scores > 0.9,
    counted=0,
    crowd=2,
):
    """The release's rule. counted: the first score that may be one of a crowd."""
    scores = torch.cat([score(calm(saliency)).float()[None], maps * cut(maps, alpha)])
    found = scores.argmax(0)
    found[~calm(saliency) & (found == 0)] = seam
    found[high(scores[counted:]).sum(0) > crowd] = 255
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


_RELEASE_SLIPS = {
    "the paper's rule is followed, with beta = 0.06": lambda *given: _paper(*given, 0.06, "background"),
    "the paper's rule is followed, with beta = 50/255": lambda *given: _paper(*given, 50 / 255, "background"),
    "maps equal to alpha score 0; only those below it do": {"cut": torch.gt},
    "maps below alpha keep their score": {"cut": lambda maps, alpha: maps >= 0},
    "saliency of exactly 50/255 counts as salient": {"calm": lambda s: s < 50 / 255},
    "saliency is compared with 0.2; 50/255 is lower, 0.196": (
        {"calm": lambda s: s <= 0.2},
        {"calm": lambda s: s < 0.2},
    ),
    "saliency is compared with 0.06, the paper's beta": {"calm": lambda s: s < 0.06},
    "saliency is compared with 50, as if it were in 0..255": {"calm": lambda s: s <= 50},
    "background scores 1 where a pixel is salient": {"calm": lambda s: s > 50 / 255},
    "background scores 1 where a pixel is salient; it scores 1 where it is not": {"score": torch.logical_not},
    "pixels with more than two scores above 0.9 are not ignored": {"crowd": 99},
    "two scores above 0.9 are enough to be ignored; it takes more than two": {"crowd": 1},
    "a score of 0.9 itself counts as above 0.9": {"high": lambda scores: scores >= 0.9},
    "background is not counted among the scores above 0.9": {"counted": 1},
    "salient pixels without a class are background; they are 255": {"seam": 0},
    "a class wins a tie against background": {"score": lambda calm: 0.999 * calm},
    "nothing is ignored": {"seam": 0, "crowd": 99},
}


@check("06", "B", "a function f(maps, saliency, alpha), (C, H, W) and (H, W): labels (H, W)")
def release_rule(answer):
    """The released code's rule for pseudo labels (06, exercise B).

    maps and saliency are tensors, in [0, 1]. A pixel is salient where its saliency > 50/255; background
    scores 1 where it is not and 0 where it is; maps below alpha score 0; the largest score wins, background
    on a tie; salient pixels that come out as background are 255, and so are pixels with more than two scores,
    background's included, above 0.9. The labels are integers.
    """
    cases = [
        (torch.tensor(values)[:, None, None], torch.tensor([[level]], dtype=torch.float64), 0.5)
        for values, level in _PIXELS
    ]
    for seed, classes, shape in ((80, 5, (9, 12)), (81, 4, (13, 6))):
        maps = _distinct(classes, shape, seed)
        levels = torch.tensor([0, 10, 40, 50, 51, 100, 255])
        saliency = levels[torch.randint(0, 7, shape, generator=generator(seed + 1))].double() / 255
        maps[:3, :2] = torch.tensor([0.95, 0.92, 0.97])[:, None, None]  # three high scores
        maps[:2, 2] = torch.tensor([0.95, 0.92])[:, None]  # two, a third where it isn't salient
        maps[1, 3, ::2] = 1.0
        cases.append((maps, saliency, 0.5))
    compare(answer, _release, cases, _RELEASE_SLIPS, read=label_map, result="the labels")
