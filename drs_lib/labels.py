"""Pseudo segmentation labels: object cues from localization maps, background cues from saliency.

The paper (section "Weakly-Supervised Semantic Segmentation") takes pixels whose map is higher than alpha as
the object, pixels whose saliency is lower than beta as background, and ignores pixels that belong to neither.
What a pixel with *both* cues becomes it does not say; ``conflict`` decides. The authors' released code
follows another rule, kept here as ``rule="release"``.
"""

from __future__ import annotations

import torch

from drs_lib.data import IGNORED
from drs_lib.data.transforms import as_tensor
from drs_lib.runtime import move

BACKGROUND = 0
RULES = ("paper", "release")
CONFLICTS = ("background", "object", "ignore")
PAPER_BETA = 0.06
RELEASE_SALIENCY = 50  # of 255: the released code binarises its 8-bit saliency maps with "> 50"
RELEASE_CONFIDENT = 0.9
MAPS_HINT = (
    "localization_maps() and refined_maps() give such maps; raw network outputs are not. "
    "Divide 8-bit maps by 255."
)
SALIENCY_HINT = "Pass 0..255 as uint8, not as floats."


def pseudo_labels(maps, saliency, alpha=0.2, beta=PAPER_BETA, rule="paper", conflict="background"):
    """Pseudo segmentation labels from localization maps and saliency.

    ``rule="paper"``, with the largest class of a pixel winning among objects (the first of equal ones):

    ============================ ========================= ==========================
    ..                           saliency < beta           saliency >= beta
    ============================ ========================= ==========================
    some map > alpha             ``conflict`` decides      its class, 1..C
    no map > alpha               0, background             255, ignored
    ============================ ========================= ==========================

    ``conflict`` is ``"background"`` (default), ``"object"`` or ``"ignore"``. The paper leaves the case open.
    Background is the default because the released code does the same, and DRS needs it: its dense maps
    spread beyond the object, and saliency is what cuts them off again.

    ``rule="release"`` is the released code's: saliency is binarised at 50/255; background scores 1 where a
    pixel is not salient and 0 where it is; maps below alpha score 0; the largest score wins, background on a
    tie; salient pixels that come out as background are ignored, and so are pixels where more than two scores
    exceed 0.9. It has neither a ``beta`` nor a ``conflict`` to choose.

    Args:
        maps: floats in [0, 1], (N, C, H, W), tensor or array; classes that an image does not show must be 0.
        saliency: (N, H, W), floats in [0, 1], or uint8 with 255 for 1.
        alpha, beta: thresholds in [0, 1].

    Returns:
        uint8 tensor (N, H, W) on the maps' device: 0 background, 1..C classes, 255 ignored.

    Raises:
        ValueError: values out of range or NaN, shapes that do not belong together, an unknown rule.
    """
    _check_options(alpha, beta, rule, conflict)
    maps = as_tensor(maps)
    saliency = as_tensor(saliency).to(maps.device)
    _check_pictures(maps, saliency)
    score, best = maps.max(dim=1)
    label = (best + 1).to(torch.uint8)
    if rule == "release":
        return _release_rule(maps, score, label, saliency, alpha)

    objects = score > alpha
    background = (saliency.float() / 255 if saliency.dtype == torch.uint8 else saliency) < beta
    labels = torch.full_like(label, IGNORED).masked_fill_(background, BACKGROUND)
    labels = torch.where(objects, label, labels)
    if conflict != "object":
        labels.masked_fill_(objects & background, BACKGROUND if conflict == "background" else IGNORED)
    return labels


def of_classes(labels, classes):
    """Labels from the maps of some classes alone, 1..n, as labels of all: `classes`, counted from 0, tells
    which the maps were, in order. 0 and 255 stay."""
    values = torch.arange(256, dtype=torch.uint8)
    values[1 : len(classes) + 1] = torch.tensor(classes, dtype=torch.uint8) + 1
    return move(values, labels.device)[labels.int()]


def _release_rule(maps, score, label, saliency, alpha):
    limit = RELEASE_SALIENCY if saliency.dtype == torch.uint8 else RELEASE_SALIENCY / 255
    salient = saliency > limit
    objects = (score >= alpha) & (score > 0)
    # Maps end at 1, so where background scores 1 no class can beat it, and a tie is background's.
    labels = torch.full_like(label, IGNORED).masked_fill_(~salient, BACKGROUND)
    labels = torch.where(objects & salient, label, labels)
    # The released code counts after it has set maps below alpha to 0, and background is one of the scores.
    confident = ((maps > RELEASE_CONFIDENT) & (maps >= alpha)).sum(dim=1) + (~salient)
    return labels.masked_fill_(confident > 2, IGNORED)


def check_unit(values, name, hint):
    """Raises ValueError, with the hint, if a tensor does not hold floats in [0, 1]; NaN is none of them."""
    if not values.is_floating_point():
        raise ValueError(f"{name} must be floats in [0, 1]; got {values.dtype}. {hint}")
    if values.numel():
        low, high = (value.item() for value in torch.aminmax(values))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{name} must lie in [0, 1]; got {low:.4g} to {high:.4g}. {hint}")


def _check_options(alpha, beta, rule, conflict):
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a threshold and must lie in [0, 1]; got {value!r}.")
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; the rules are {', '.join(map(repr, RULES))}.")
    if conflict not in CONFLICTS:
        raise ValueError(f"unknown conflict {conflict!r}; choose one of {', '.join(map(repr, CONFLICTS))}.")
    if rule == "release" and (beta != PAPER_BETA or conflict != "background"):
        raise ValueError(
            f"rule='release' binarises saliency at {RELEASE_SALIENCY}/255 and lets background win: it takes "
            f"no beta and no conflict (got beta={beta!r}, conflict={conflict!r}). Leave them out, or use "
            "rule='paper'."
        )


def _check_pictures(maps, saliency):
    if maps.ndim != 4 or maps.shape[1] == 0:
        raise ValueError(
            f"maps must be (N, C, H, W) with at least one class; got shape {tuple(maps.shape)}. "
            "For one image pass maps[None] and saliency[None]."
        )
    if maps.shape[1] >= IGNORED:
        raise ValueError(
            f"labels are 8-bit and 255 means ignored, so at most 254 classes fit; got {maps.shape[1]}."
        )
    check_unit(maps, "maps", MAPS_HINT)
    expected = (maps.shape[0], *maps.shape[2:])
    if tuple(saliency.shape) != expected:
        raise ValueError(
            f"saliency must match the maps: expected shape {expected} for maps {tuple(maps.shape)}, "
            f"got {tuple(saliency.shape)}. Make the maps at the image's own size."
        )
    if saliency.dtype != torch.uint8:
        check_unit(saliency, "saliency", SALIENCY_HINT)
