"""Questions that notebook 07 puts to the method: what does its score owe to the threshold, to saliency, to
the chosen epoch, and is suppressing better than erasing? Scores read masks; the trainings can't.

**Adversarial erasing** is Wei, Feng, Liang, Cheng, Zhao, Yan, "Object Region Mining with Adversarial Erasing:
A Simple Classification to Semantic Segmentation Approach" (CVPR 2017; AE-PSL in Table 4): train a classifier,
paint over what its map found, train another classifier on the painted images, and so on. Whatever any of them
found is object. ACoL (Zhang, Wei, Feng, Yang, Huang, "Adversarial Complementary Learning for Weakly
Supervised Object Localization", CVPR 2018) erases in the features of a second branch instead and trains both
branches at once, merging their maps by the maximum, as is done here. S steps are S trainings and S passes to
make the maps; DRS needs one of each. Nothing but a threshold and S says when to stop. Wei et al.'s threshold
rule, use of saliency and segmentation network are left out, so that all methods differ in maps alone.
"""

import numpy as np
import torch

from drs_course.paper import Configuration
from drs_course.stages import weights_identity
from drs_lib import networks
from drs_lib.data import IMAGENET_MEAN, without_masks
from drs_lib.labels import IGNORED, MAPS_HINT, PAPER_BETA, SALIENCY_HINT, check_unit
from drs_lib.losses import classification_loss
from drs_lib.maps import iterate_maps
from drs_lib.metrics import mean_iou
from drs_lib.runtime import memory_format, pick_device, threads
from drs_lib.train import train_classifier, train_network

# Denser where maps are low: there the curves differ.
ALPHAS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)
# Of a map's maximum: above it lies what the network leans on most. Set once, before any score was seen.
ERASE_ABOVE = 0.5
CAM = Configuration(drs_layers=())


class AlphaScan:
    """Pseudo-label mIoU at many thresholds alpha, with and without saliency, from one look at every map.

    Alpha enters a pixel's label through one question: does its largest class exceed alpha? So pixels are
    counted by (true label, largest class, whether salient, how many alphas the map exceeds), and the
    confusion matrix of every alpha is a sum over these counts.

    With saliency: `drs_lib.labels.pseudo_labels` as the paper has it, ignored pixels scored as background;
    exactly the measure ``label_score`` of `drs_course.stages`. Without: a pixel is its largest class where
    that exceeds alpha, and background elsewhere.

    Args:
        num_classes: C, without background.
        alphas: thresholds, increasing, in [0, 1].
        beta: pixels with saliency below it are not salient.

    Raises:
        ValueError: thresholds that are none; in `update` arrays that do not belong together or out of range.
    """

    def __init__(self, num_classes, alphas=ALPHAS, beta=PAPER_BETA):
        self.alphas = tuple(float(alpha) for alpha in alphas)
        increasing = self.alphas and list(self.alphas) == sorted(set(self.alphas))
        if not increasing or not all(0 <= value <= 1 for value in (*self.alphas, beta)):
            raise ValueError(
                f"alphas {alphas!r} and beta {beta!r}: expected thresholds in [0, 1], alphas increasing, at "
                "least one of them"
            )
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

    def update_all(self, dataset, found):
        """Add images of a data set by what `iterate_maps` yields of them. Returns the scan."""
        for index, _, maps in found:
            self.update(maps, dataset.saliency(index), dataset.mask(index))
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


def scan_alpha(pipeline, configuration, alphas=ALPHAS):
    """The `AlphaScan` of a configuration over the training images; trains what is not in the store."""
    _require_paper_rule(pipeline.budget)
    scan = AlphaScan(pipeline.data.train.num_classes, alphas, pipeline.budget.beta)
    return scan.update_all(pipeline.data.train, pipeline.maps(configuration))


def score_every_epoch(pipeline, configuration, overwrite=False, progress=False):
    """Train a configuration's classifier once more and score its pseudo labels after every epoch.

    The weights are the same as `Pipeline.classifier` trains, epoch by epoch: scoring draws no random number.
    The masks decide nothing here; the list shows what they would have decided.

    overwrite: do it again although the store has it. progress: see `drs_lib.train.fit`.
    Returns a list of dict(epoch, loss, miou), mIoU in percent at the budget's alpha.
    """
    budget, train, reading = pipeline.budget, pipeline.data.train, _reading(pipeline.budget)
    _require_paper_rule(budget)
    recipe = budget.classify.replace(drs_layers=configuration.drs_layers, delta=configuration.delta)

    def make(writer):
        built, scores = [], []

        def build(data):
            kind = recipe.backbone, data.num_classes, recipe.drs_layers, recipe.delta, recipe.weights
            built.append(networks.classifier(*kind))
            return built[0]

        def score(history):
            scan = AlphaScan(train.num_classes, (budget.alpha,), budget.beta)
            scan.update_all(train, iterate_maps(built[0], train, workers=recipe.workers, **reading))
            last = history[-1]
            scores.append({"epoch": last["epoch"], "loss": last["loss"], "miou": float(scan.miou()[0])})

        options = {"seed": pipeline.seed, "device": pipeline.device, "progress": progress, "on_epoch": score}
        train_network(recipe, train, build, classification_loss, title="classify", **options)
        writer.json("scores.json", scores)

    inputs = {"data": train.fingerprint, "weights": weights_identity(recipe.backbone, recipe.weights)}
    rule = {"alpha": budget.alpha, "beta": budget.beta, "seed": pipeline.seed}
    config = recipe.to_dict() | reading | rule
    entry = pipeline.store.get_or_make("epoch_score", config, inputs, make, overwrite=overwrite)
    return entry.json("scores.json")


def _require_paper_rule(budget):
    if budget.rule != "paper" or budget.conflict != "background":
        raise ValueError(
            f"the scan knows rule 'paper' with conflict 'background'; the budget has {budget.rule!r} and "
            f"{budget.conflict!r}"
        )


def _reading(budget):
    """How `iterate_maps` looks at images."""
    return {"scales": budget.scales, "resize": budget.resize}


def discriminative_region(maps, threshold=ERASE_ABOVE):
    """Pixels where some class's map (C, H, W) is above the threshold: bool (H, W)."""
    return (maps > threshold).any(dim=0)


def erase(image, region):
    """A copy of an image, uint8 (3, H, W), with the region, bool (H, W), in ImageNet's mean colour.

    After `drs_lib.data.normalize` that colour is 0: the network sees nothing there.
    """
    colour = torch.tensor(IMAGENET_MEAN).mul(255).round().to(torch.uint8).view(3, 1, 1)
    return torch.where(torch.as_tensor(region), colour, image)


class ErasedImages:
    """A data set whose images have regions painted over; see `drs_lib.data` for the interface.

    dataset: a data set; its masks are out of reach from here. regions: one bool array (H, W) for each image,
    or None for nothing to erase. They are kept as bits.
    """

    def __init__(self, dataset, regions=None):
        self._dataset = without_masks(dataset)
        for name in ("names", "classes", "num_classes", "fingerprint", "split", "saliency", "mask"):
            setattr(self, name, getattr(self._dataset, name))
        self._regions = None
        if regions is not None:
            self._regions = [(np.packbits(np.asarray(region)), tuple(region.shape)) for region in regions]
            if len(self._regions) != len(dataset):
                raise ValueError(f"{len(self._regions)} regions for {len(dataset)} images: expected one each")

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        image, labels = self._dataset[index]
        return (image if self._regions is None else erase(image, self.region(index))), labels

    def region(self, index):
        """What is erased of an image, bool tensor (H, W)."""
        if self._regions is None:
            return torch.zeros(self._dataset[index][0].shape[-2:], dtype=torch.bool)
        bits, shape = self._regions[index]
        return torch.from_numpy(np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool))


class AdversarialErasing:
    """Classifiers trained one after the other, each without what the ones before it found.

    The first is the pipeline's plain CAM classifier; `step` adds one. All have the same recipe, initial
    weights and seed, and are kept in the pipeline's store.

    Args:
        pipeline: a `drs_course.stages.Pipeline`.
        threshold: in (0, 1): what is above it in a map is erased for the next network.
        progress: of the trainings, see `drs_lib.train.fit`.

    ``images[s]`` is the data set that network s is trained on and looks at, from 0.
    """

    def __init__(self, pipeline, threshold=ERASE_ABOVE, progress=False):
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold!r}: expected a number between 0 and 1")
        self.pipeline, self.threshold, self.progress = pipeline, float(threshold), progress
        self.recipe = pipeline.budget.classify.replace(drs_layers=(), delta=None)
        self.networks = [pipeline.classifier(CAM)]
        self.images = [ErasedImages(pipeline.data.train)]
        self.histories = [pipeline.history("classify", CAM)]
        self._keys = [pipeline.stage("classify", CAM).key]

    def __len__(self):
        return len(self.networks)

    def step(self, overwrite=False):
        """Erase what the last network finds, and train the next one on the rest, again with ``overwrite``
        although the store has it; returns its history."""
        pipeline, recipe, seen = self.pipeline, self.recipe, self.images[-1]
        with threads(recipe.threads):
            regions = [
                seen.region(index) | discriminative_region(maps, self.threshold)
                for index, _, maps in self._look(-1)
            ]
        erased, device = ErasedImages(pipeline.data.train, regions), pick_device(pipeline.device)

        def make(writer):
            options = {"seed": pipeline.seed, "device": device, "progress": self.progress}
            model, history = train_classifier(recipe, erased, **options)
            writer.weights("model.safetensors", model)
            writer.json("history.json", history)

        own = {"seed": pipeline.seed, "threshold": self.threshold}
        config = recipe.to_dict() | _reading(pipeline.budget) | own
        weights = weights_identity(recipe.backbone, config.pop("weights"))
        inputs = {"previous": self._keys[-1], "data": erased.fingerprint, "weights": weights}
        entry = pipeline.store.get_or_make("erase", config, inputs, make, overwrite=overwrite)
        model = networks.classifier(recipe.backbone, erased.num_classes, ())
        model.load_state_dict(entry.weights())
        self.networks.append(model.eval().to(device=device, memory_format=memory_format(device)))
        self.images.append(erased)
        self.histories.append(entry.json("history.json"))
        self._keys.append(entry.key)
        return self.histories[-1]

    def maps(self, indices=None):
        """Merged maps of the training images, one image at a time: (index, labels, maps (S, C, H, W)).

        maps[s] is the element-wise maximum of the maps of networks 0 to s, each made of the image as that
        network knows it and divided by its own maximum (equation 1). At any threshold it is the union of what
        these networks found. indices: the images to take; None: all.
        """
        with threads(self.recipe.threads):
            for items in zip(*(self._look(s, indices) for s in range(len(self))), strict=True):
                index, labels, _ = items[0]
                yield index, labels, torch.stack([maps for _, _, maps in items]).cummax(dim=0).values

    def _look(self, number, indices=None):
        options = {"workers": self.recipe.workers, "indices": indices} | _reading(self.pipeline.budget)
        return iterate_maps(self.networks[number], self.images[number], **options)
