"""Questions put to the method: what does its score owe to the threshold, to saliency, to the chosen epoch?

    AlphaScan           pseudo-label mIoU at many thresholds alpha, with and without saliency, in one pass
    scan_alpha          the same for a configuration of a pipeline
    score_every_epoch   pseudo-label mIoU after every epoch: what choosing a checkpoint by masks would gain

Everything here reads masks, to score. Notebook 07 uses it.
"""

import numpy as np
import torch

from drs_course.stages import weights_identity
from drs_lib import networks
from drs_lib.data import IGNORED
from drs_lib.labels import MAPS_HINT, PAPER_BETA, SALIENCY_HINT, check_unit
from drs_lib.maps import iterate_maps
from drs_lib.metrics import mean_iou
from drs_lib.runtime import pick_device
from drs_lib.train import classification_loss, train_network

__all__ = ["ALPHAS", "AlphaScan", "scan_alpha", "score_every_epoch"]

# Denser where maps are low: there the curves differ.
ALPHAS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)


class AlphaScan:
    """Pseudo-label mIoU at many thresholds alpha, with and without saliency, from one look at every map.

    Alpha enters a pixel's label through one question: does its largest class exceed alpha? So pixels are
    counted by (true label, largest class, whether salient, how many alphas the map exceeds), and the
    confusion matrix of every alpha is a sum over these counts.

    With saliency: `drs_lib.labels.pseudo_labels` as the paper has it, background where both cues are there,
    ignored pixels scored as background; exactly the measure ``label_score`` of `drs_course.stages`. Without:
    a pixel is its largest class where that exceeds alpha, and background elsewhere.

    Args:
        num_classes: C, without background.
        alphas: thresholds, increasing, in [0, 1].
        beta: pixels with saliency below it are not salient.

    Raises ValueError for thresholds that are none, and in `update` for arrays that do not belong together or
    have values out of range, NaN among them.
    """

    def __init__(self, num_classes, alphas=ALPHAS, beta=PAPER_BETA):
        self.alphas = tuple(float(alpha) for alpha in alphas)
        if not self.alphas or list(self.alphas) != sorted(set(self.alphas)):
            raise ValueError(f"alphas is {alphas!r}; expected increasing thresholds, at least one")
        if not (0 <= self.alphas[0] and self.alphas[-1] <= 1 and 0 <= beta <= 1):
            raise ValueError(f"alphas {alphas!r} and beta {beta!r} are thresholds and must lie in [0, 1]")
        self.num_classes, self.beta = num_classes, beta
        # Compared in the maps' own type, as `pseudo_labels` does.
        self._steps = torch.tensor(self.alphas, dtype=torch.float32)
        self._counts = np.zeros((num_classes + 1, num_classes, 2, len(self.alphas) + 1), np.int64)

    def update(self, maps, saliency, mask):
        """Add one image: maps float32 (C, H, W) in [0, 1], 0 for classes that it does not show; saliency
        (H, W), uint8 or floats in [0, 1]; mask uint8 (H, W), 255 left out. Returns the scan."""
        maps, saliency, mask = torch.as_tensor(maps), np.asarray(saliency), np.asarray(mask)
        if maps.shape != (self.num_classes, *mask.shape) or saliency.shape != mask.shape:
            raise ValueError(
                f"maps {tuple(maps.shape)}, saliency {saliency.shape} and mask {mask.shape} do not belong "
                f"together: expected ({self.num_classes}, H, W), (H, W) and (H, W)"
            )
        check_unit(maps, "maps", MAPS_HINT)
        if saliency.dtype != np.uint8:
            check_unit(torch.tensor(saliency), "saliency", SALIENCY_HINT)
        score, best = maps.float().max(dim=0)
        exceeded = torch.bucketize(score, self._steps).numpy()
        level = saliency.astype(np.float32) / 255 if saliency.dtype == np.uint8 else saliency
        place = (mask, best.numpy(), (level >= np.float32(self.beta)).astype(np.int64), exceeded)
        scored = mask != IGNORED
        flat = np.ravel_multi_index([part[scored] for part in place], self._counts.shape)
        self._counts += np.bincount(flat, minlength=self._counts.size).reshape(self._counts.shape)
        return self

    def confusion(self, saliency=True):
        """Confusion matrices int64 (A, K, K), one for each alpha: rows truth, columns pseudo label."""
        # above[a] counts pixels whose map exceeds alpha number a: those in the bins after it.
        above = self._counts[..., ::-1].cumsum(-1)[..., -2::-1]
        above = above[:, :, 1] if saliency else above.sum(2)
        objects = above.transpose(2, 0, 1)
        background = self._counts.sum((1, 2, 3)) - objects.sum(2)
        return np.concatenate([background[..., None], objects], axis=2)

    def miou(self, saliency=True):
        """Mean IoU in percent at each alpha, float (A,)."""
        return np.array([100 * mean_iou(confusion) for confusion in self.confusion(saliency)])

    def best(self, saliency=True):
        """(alpha, mIoU in percent) of the best alpha: a choice that only masks allow."""
        scores = self.miou(saliency)
        index = int(scores.argmax())
        return self.alphas[index], float(scores[index])

    def spread(self, low, high, saliency=True):
        """Points of mIoU between the best and the worst alpha from ``low`` to ``high``."""
        inside = [low <= alpha <= high for alpha in self.alphas]
        if not any(inside):
            raise ValueError(f"no alpha of the scan lies in [{low}, {high}]; it has {self.alphas}")
        return float(np.ptp(self.miou(saliency)[inside]))


def scan_alpha(line, configuration, alphas=ALPHAS):
    """The `AlphaScan` of a configuration over the training images; trains what is not in the store."""
    _require_paper_rule(line.budget)
    train = line.data.train
    scan = AlphaScan(train.num_classes, alphas, line.budget.beta)
    for index, _, maps in line.maps(configuration):
        scan.update(maps, train.saliency(index), train.mask(index))
    return scan


def score_every_epoch(line, configuration, overwrite=False, progress=False):
    """Train a configuration's classifier once more and score its pseudo labels after every epoch.

    The weights are the same as `Pipeline.classifier` trains, epoch by epoch: scoring draws no random number.
    The masks decide nothing here; the list shows what they would have decided.

    overwrite: do it again although the store has it. progress: see `drs_lib.train.fit`.
    Returns a list of dict(epoch, loss, miou), mIoU in percent at the budget's alpha.
    """
    _require_paper_rule(line.budget)
    budget, train = line.budget, line.data.train
    recipe = budget.classify.replace(drs_layers=configuration.drs_layers, delta=configuration.delta)

    def make(writer):
        built, scores = [], []

        def build(data):
            built.append(
                networks.classifier(
                    recipe.backbone, data.num_classes, recipe.drs_layers, recipe.delta, recipe.weights
                )
            )
            return built[0]

        def score(history):
            scan = AlphaScan(train.num_classes, (budget.alpha,), budget.beta)
            options = {"scales": budget.scales, "resize": budget.resize, "workers": recipe.workers}
            for index, _, maps in iterate_maps(built[0], train, **options):
                scan.update(maps, train.saliency(index), train.mask(index))
            last = history[-1]
            scores.append({"epoch": last["epoch"], "loss": last["loss"], "miou": float(scan.miou()[0])})

        train_network(
            recipe,
            train,
            build,
            classification_loss,
            seed=line.seed,
            device=pick_device(line.device),
            progress=progress,
            on_epoch=score,
            title="classify",
        )
        writer.json("scores.json", scores)

    rule = {"alpha": budget.alpha, "beta": budget.beta, "scales": budget.scales, "resize": budget.resize}
    inputs = {"data": train.fingerprint, "weights": weights_identity(recipe.backbone, recipe.weights)}
    config = recipe.to_dict() | rule | {"seed": line.seed}
    entry = line.store.get_or_make("epoch_score", config, inputs, make, overwrite=overwrite)
    return entry.json("scores.json")


def _require_paper_rule(budget):
    if budget.rule != "paper" or budget.conflict != "background":
        raise ValueError(
            f"the scan knows rule 'paper' with conflict 'background'; the budget has {budget.rule!r} and "
            f"{budget.conflict!r}"
        )
