"""Adversarial erasing: the rival of suppression in the paper's introduction and Table 4.

The idea is Wei, Feng, Liang, Cheng, Zhao, Yan, "Object Region Mining with Adversarial Erasing: A Simple
Classification to Semantic Segmentation Approach" (CVPR 2017; AE-PSL in Table 4): train a classifier, paint
over what its map found, train another classifier on the painted images, and so on. Whatever any of them found
is object. ACoL (Zhang, Wei, Feng, Yang, Huang, "Adversarial Complementary Learning for Weakly Supervised
Object Localization", CVPR 2018) erases in the features of a second branch instead and trains both branches at
once, merging their maps by the maximum, as is done here.

What it costs: S steps are S trainings one after the other, S - 1 passes over the training images in between,
S networks to keep, and S passes to make the maps. DRS needs one of each. Nothing here but a threshold and S
says when to stop; the training images' masks are out of reach.

Of Wei et al. only the mining is here. Their threshold rule, their use of saliency and their segmentation
network are left out, so that every method in notebook 07 differs in its maps alone.
"""

import numpy as np
import torch

from drs_course.paper import Configuration
from drs_course.stages import weights_identity
from drs_lib import networks
from drs_lib.data import IMAGENET_MEAN, without_masks
from drs_lib.maps import iterate_maps
from drs_lib.runtime import memory_format, pick_device, threads
from drs_lib.train import train_classifier

__all__ = ["THRESHOLD", "AdversarialErasing", "ErasedImages", "discriminative_region", "erase"]

# Of a map's maximum: above it lies what the network leans on most. Set once, before any score was seen.
THRESHOLD = 0.5
CAM = Configuration(drs_layers=())


def discriminative_region(maps, threshold=THRESHOLD):
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
        for name in ("names", "classes", "num_classes", "fingerprint", "split"):
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

    def saliency(self, index):
        return self._dataset.saliency(index)

    def mask(self, index):
        return self._dataset.mask(index)


class AdversarialErasing:
    """Classifiers trained one after the other, each without what the ones before it found.

    The first is the pipeline's plain CAM classifier; `step` adds one. All are trained by the same recipe,
    from the same weights and with the same seed, and kept in the pipeline's store.

    Args:
        line: a `drs_course.stages.Pipeline`.
        threshold: in (0, 1): what is above it in a map is erased for the next network.
        progress: of the trainings, see `drs_lib.train.fit`.

    ``images[s]`` is the data set that network s is trained on and looks at, from 0.
    """

    def __init__(self, line, threshold=THRESHOLD, progress=False):
        if not 0 < threshold < 1:
            raise ValueError(f"threshold is {threshold!r}: expected a number between 0 and 1")
        self.line, self.threshold, self.progress = line, float(threshold), progress
        self.recipe = line.budget.classify.replace(drs_layers=(), delta=None)
        self.networks = [line.classifier(CAM)]
        self.images = [ErasedImages(line.data.train)]
        self.histories = [line.history("classify", CAM)]
        self._keys = [line.stage("classify", CAM).key]

    def __len__(self):
        return len(self.networks)

    def step(self, overwrite=False):
        """Erase what the last network finds, and train the next one on the rest; returns its history.

        overwrite: train it again although the store has it.
        """
        line, recipe = self.line, self.recipe
        erased, device = self._erase_more(), pick_device(line.device)

        def make(writer):
            model, history = train_classifier(
                recipe, erased, seed=line.seed, device=device, progress=self.progress
            )
            writer.weights("model.safetensors", model)
            writer.json("history.json", history)

        config = recipe.to_dict() | self._map_options() | {"seed": line.seed, "threshold": self.threshold}
        inputs = {
            "previous": self._keys[-1],
            "data": erased.fingerprint,
            "weights": weights_identity(recipe.backbone, config.pop("weights")),
        }
        entry = line.store.get_or_make("erase", config, inputs, make, overwrite=overwrite)
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
            passes = zip(*(self._look(s, indices) for s in range(len(self))), strict=True)
            for items in passes:
                index, labels, _ = items[0]
                yield index, labels, torch.stack([maps for _, _, maps in items]).cummax(dim=0).values

    def _erase_more(self):
        last = len(self) - 1
        with threads(self.recipe.threads):
            regions = [
                self.images[last].region(index) | discriminative_region(maps, self.threshold)
                for index, _, maps in self._look(last)
            ]
        return ErasedImages(self.line.data.train, regions)

    def _look(self, number, indices=None):
        return iterate_maps(
            self.networks[number],
            self.images[number],
            workers=self.recipe.workers,
            indices=indices,
            **self._map_options(),
        )

    def _map_options(self):
        return {"scales": self.line.budget.scales, "resize": self.line.budget.resize}
