"""The shipped weights of Critters, which ``python -m drs_course pretrain`` trains again.

Three networks are trained on the twelve species that the course does not use: the bodies of "mini" and
"mini_resnet" as plain image classifiers, without DRS, in the place of ImageNet's weights; and the saliency
network with class-agnostic masks (animals and props), in the place of PoolNet. The masks of these other
species are the only pixel labels from which any weakly supervised network of the course comes.
"""

import json
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from drs_lib.batches import LabelMaps
from drs_lib.data import Critters, normalize
from drs_lib.data.critters import draw
from drs_lib.data.saliency import SaliencyNetwork
from drs_lib.files import atomic_path
from drs_lib.losses import classification_loss
from drs_lib.networks import Classifier, classifier, gaussian, mini_resnet_layers
from drs_lib.recipes import ClassifyRecipe
from drs_lib.train import evaluate_classifier, train_network
from drs_lib.weights import body_state_dict

CLASSIFY = ClassifyRecipe.laptop().replace(
    weights=None, drs_layers=(), epochs=12, batch=32, lr=4e-3, lr_multipliers=(1, 1, 1, 1), warmup=0.3
)
SALIENCY = CLASSIFY.replace(lr=5e-3, epochs=4)
SALIENCY_IMAGES = 1500


class _Detector(SaliencyNetwork):
    def new_modules(self):
        """What `train_network` asks for; with one learning rate for all it does not matter."""
        return [self.head]


def _trained(recipe, train, build, loss, name, progress, **options):
    options |= {"title": f"pretrain {name}", "progress": progress}
    return train_network(recipe, train, lambda data: build(), loss, **options)


def pretraining_classifier(backbone, num_classes):
    """The plain image classifier as which "mini" or "mini_resnet" is pretrained: images -> logits."""
    if backbone == "mini":
        return classifier(backbone, num_classes, drs_layers=())
    layers, channels = mini_resnet_layers()
    head = gaussian(nn.Conv2d(channels, num_classes, 1))
    return Classifier(backbone, num_classes, layers, head, pretrained_layers=len(layers))


def pretrain_backbone(backbone, progress=True):
    """Train "mini" or "mini_resnet" on the other species; returns (state dict of its body, facts)."""
    train, held_out = Critters("pretrain"), Critters("pretrain_val")
    build = partial(pretraining_classifier, backbone, train.num_classes)
    model, history = _trained(CLASSIFY, train, build, classification_loss, backbone, progress)
    accuracy = evaluate_classifier(model, held_out)
    return body_state_dict(model), {"exact-match accuracy, held out": accuracy, "loss": history[-1]["loss"]}


def pretrain_saliency(progress=True):
    """Train the saliency network on masks of the other species, class-agnostic; (state dict, facts)."""
    train, held_out = Critters("pretrain", length=SALIENCY_IMAGES), Critters("pretrain_val")

    def loss(model, batch):
        return F.binary_cross_entropy_with_logits(model(batch.images), batch.extra.float())

    salient = [draw("pretrain", i).salient.astype(np.uint8) for i in range(len(train))]
    extra = LabelMaps(salient, train)
    model, history = _trained(SALIENCY, train, _Detector, loss, "saliency", progress, extra=extra)
    model.cpu()  # where the held-out images are
    overlap = union = 0
    with torch.inference_mode():
        for i in range(len(held_out)):
            found = model(normalize(held_out[i][0][None]))[0] > 0
            truth = torch.from_numpy(draw("pretrain_val", i).salient)
            overlap, union = overlap + int((found & truth).sum()), union + int((found | truth).sum())
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    return state, {"IoU at 0.5, held out": overlap / union, "loss": history[-1]["loss"]}


NETWORKS = {name: partial(pretrain_backbone, name) for name in ("mini", "mini_resnet")}
NETWORKS["saliency"] = pretrain_saliency


def pretrain(names, out):
    """Train some of `NETWORKS` and write their weights to the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        start = time.perf_counter()
        state, facts = NETWORKS[name]()
        path = out / f"{name}.safetensors"
        with atomic_path(path) as temporary:
            save_file(state, temporary, metadata={"facts": json.dumps(facts)})
            temporary.chmod(0o644)  # safetensors makes a file that only its owner can read
        shown = ", ".join(f"{k} {v:.4f}" for k, v in facts.items())
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB, {shown}, {time.perf_counter() - start:.0f} s")
