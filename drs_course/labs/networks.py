"""What the labs ask of networks: DRS turned up and down in a trained classifier, maps and features."""

from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from drs_course.paper import ALL_LAYERS, Configuration, table_rows
from drs_course.stages import STAGE_VERSIONS
from drs_lib.data import normalize, resize_square
from drs_lib.drs import DRS, ConstantController
from drs_lib.maps import localization_maps
from drs_lib.networks import Classifier, classifier
from drs_lib.runtime import evaluating, memory_format

PLAIN = Configuration(drs_layers=())
LEARNABLE = Configuration()
# Table 2's rows: the layers that have DRS, by the row's name.
PRESETS = {row.label: row.configuration.drs_layers for row in table_rows(2)}


class Dial:
    """A classifier with DRS modules in all six layers, whose control values can be set layer by layer.

    model: as from `drs_lib.networks.classifier`, with DRS in no layer or in all six. One without DRS is
    copied with a DRS module, open (delta 1, a ReLU), in the place of every ReLU: turning it down is
    suppression at inference, of a network that was trained without. One with DRS is used as it is.
    """

    def __init__(self, model: Classifier):
        if not any(isinstance(module, DRS) for module in model.modules()):
            plain, device = model, next(model.parameters()).device
            model = classifier(plain.backbone, plain.num_classes, ALL_LAYERS, delta=1.0)
            # A constant controller has no parameters, so the names of the weights are the same.
            model.load_state_dict(plain.state_dict())
            model.eval().to(device=device, memory_format=memory_format(device))
        self.model = model
        self._modules = [
            [(module, module.controller) for module in layer.modules() if isinstance(module, DRS)]
            for layer in model.layers
        ]

    def set(self, controls):
        """controls: for each of the six layers a constant control value in (0, 1], 1 being a plain ReLU, or
        None for the controllers it was made with. Returns the network. Raises ValueError."""
        for modules, control in zip(self._modules, controls, strict=True):
            for drs, own in modules:
                drs.controller = own if control is None else ConstantController(control)
        return self.model


def _prepared(model, image, resize):
    """An image uint8 (3, H, W) as the network's input (1, 3, h, w), on its device."""
    return normalize(resize_square(image[None].to(next(model.parameters()).device), resize))


def class_maps(model, image, classes, resize=None):
    """The localization maps of classes, each float32 (H, W) at the image's size, on the CPU: a list."""
    labels = torch.zeros(1, model.num_classes)
    labels[0, list(classes)] = 1
    maps = localization_maps(model, _prepared(model, image, resize), labels, size=tuple(image.shape[-2:]))
    return [maps[0, label].cpu().numpy() for label in classes]


def class_probabilities(model, image, resize=None):
    """The sigmoid of a classifier's logits for one image: float32 array (C,)."""
    with evaluating(model):
        logits = model(_prepared(model, image, resize))
    return torch.sigmoid(logits.float())[0].cpu().numpy()


def layer_features(model, image, resize=None):
    """Each layer's output for one image, float32 (K, h, w), as `drs_course.plots.layer_mean` takes it."""
    with evaluating(model):
        outputs = model.layer_outputs(_prepared(model, image, resize))
    return [features[0].cpu().numpy() for features in outputs]


def relu_outputs(model, image, resize=None):
    """What every ReLU of a plain classifier gives: {"layer 5, second": float32 (K, h, w)}.

    It is the X of Algorithm 1, at each place where a DRS module can stand.
    """
    found = {}

    def keep(name, module, inputs, output):
        found[name] = output[0].cpu().numpy().copy()

    with ExitStack() as hooks:
        for number, layer in enumerate(model.layers, 1):
            relus = [module for module in layer.modules() if isinstance(module, nn.ReLU)]
            for place, relu in zip(("first", "second", "third"), relus, strict=False):
                name = f"layer {number}, {place}" if len(relus) > 1 else f"layer {number}"
                hooks.callback(relu.register_forward_hook(partial(keep, name)).remove)
        layer_features(model, image, resize)
    return found


def stored_classifier(store, config, inputs, num_classes, device):
    """A trained classifier of a run store, by its stage's configuration and inputs. Raises FileNotFoundError
    where it is damaged or gone: a callback must not train for minutes."""
    version = STAGE_VERSIONS["classify"]
    entry = store.get("classify", config, inputs, version)
    if entry is None:
        folder = store.folder("classify", store.key("classify", config, inputs, version))
        raise FileNotFoundError(f"the classifier in {folder} is damaged or gone; run make course.")
    model = classifier(config["backbone"], num_classes, config["drs_layers"], config["delta"])
    model.load_state_dict(entry.weights())
    return model.eval().to(device=device, memory_format=memory_format(device))


def stored(pipeline, configuration):
    """`stored_classifier` of a run's configuration."""
    stage = pipeline.stage("classify", configuration)
    num_classes = pipeline.data.train.num_classes
    return stored_classifier(pipeline.store, stage.config, stage.inputs, num_classes, pipeline.device)


def trained_deltas(pipeline):
    """Table 1's constant controllers whose classifiers are in the store: their deltas, ascending."""
    configurations = [row.configuration for row in table_rows(1)]
    return sorted(c.delta for c in configurations if c.delta and pipeline.has("classify", c))
