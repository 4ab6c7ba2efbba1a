"""What the labs ask of networks: DRS turned up and down in a trained classifier, maps and features."""

from contextlib import contextmanager

import torch
from torch import nn

from drs_course.paper import ALL_LAYERS, Configuration, table_rows
from drs_course.stages import STAGE_VERSIONS
from drs_lib.data import normalize, resize_square
from drs_lib.drs import DRS, ConstantController
from drs_lib.maps import localization_maps
from drs_lib.networks import Classifier, classifier
from drs_lib.runtime import evaluating, memory_format, threads

PLAIN = Configuration(drs_layers=())
LEARNABLE = Configuration()


class Dial:
    """A classifier with DRS modules in all six layers, whose control values can be set layer by layer.

    model: as from `drs_lib.networks.classifier`. One without DRS is copied with a DRS module, open (delta 1,
    a ReLU), in the place of every ReLU: turning it down is suppression at inference, of a network that was
    trained without. One with DRS in all layers is used as it is.
    """

    def __init__(self, model: Classifier):
        modules = _drs_modules(model)
        if not any(modules):
            model = _with_open_drs(model)
            modules = _drs_modules(model)
        if not all(modules):
            raise ValueError("a Dial takes a classifier with DRS in no layer or in all six.")
        self.model = model
        self._modules = [[(drs, drs.controller) for drs in layer] for layer in modules]

    def set(self, controls):
        """controls: for each of the six layers a constant control value in (0, 1], 1 being a plain ReLU, or
        None for the controllers it was made with. Returns the network. Raises ValueError."""
        if len(controls) != len(self._modules):
            raise ValueError(f"there are {len(self._modules)} layers; got {len(controls)} control values.")
        for modules, control in zip(self._modules, controls, strict=True):
            for drs, own in modules:
                drs.controller = own if control is None else ConstantController(control)
        return self.model


def _drs_modules(model):
    return [[module for module in layer.modules() if isinstance(module, DRS)] for layer in model.layers]


def _with_open_drs(plain):
    model = classifier(plain.backbone, plain.num_classes, ALL_LAYERS, delta=1.0)
    # A constant controller has no parameters, so the two networks have the same names for the same weights.
    model.load_state_dict(plain.state_dict())
    device = next(plain.parameters()).device
    return model.eval().to(device=device, memory_format=memory_format(device))


def prepared(image, resize=None, device="cpu"):
    """An image uint8 (3, H, W) as the network's input (1, 3, H, W), resized to a square where the budget
    says so."""
    return normalize(resize_square(image[None].to(device), resize))


def class_map(model, image, label, resize=None):
    """The localization map of one class, float32 (H, W) at the image's size, on the CPU; from one scale."""
    return class_maps(model, image, [label], resize)[0]


def class_maps(model, image, classes, resize=None):
    """`class_map` of several classes, from one pass: a list."""
    device = next(model.parameters()).device
    labels = torch.zeros(1, model.num_classes)
    labels[0, list(classes)] = 1
    maps = localization_maps(model, prepared(image, resize, device), labels, size=tuple(image.shape[-2:]))
    return [maps[0, label].cpu().numpy() for label in classes]


def class_probabilities(model, image, resize=None):
    """The sigmoid of a classifier's logits for one image: float32 array (C,)."""
    with evaluating(model):
        logits = model(prepared(image, resize, next(model.parameters()).device))
    return torch.sigmoid(logits.float())[0].cpu().numpy()


def layer_features(model, image, resize=None):
    """Each layer's output for one image, float32 (K, h, w), as `drs_course.plots.layer_mean` takes it."""
    images = prepared(image, resize, next(model.parameters()).device)
    with evaluating(model):
        return [features[0].cpu().numpy() for features in model.layer_outputs(images)]


def before_activations(model, image, resize=None):
    """What reaches every activation of a plain classifier: {"layer 5, second": float32 (K, h, w)}.

    Their ReLU is the X of Algorithm 1, at each place where a DRS module can stand.
    """
    found = {}
    with _listening(model, found), evaluating(model):
        model.layer_outputs(prepared(image, resize, next(model.parameters()).device))
    return found


@contextmanager
def _listening(model, found):
    hooks = []
    for number, layer in enumerate(model.layers, 1):
        activations = [module for module in layer.modules() if isinstance(module, (nn.ReLU, DRS))]
        for place, module in enumerate(activations):
            name = f"layer {number}"
            if len(activations) > 1:
                name += f", {('first', 'second', 'third')[place]}"

            def keep(module, inputs, name=name):
                # A copy: the activation may work in place.
                found[name] = inputs[0][0].detach().cpu().numpy().copy()

            hooks.append(module.register_forward_pre_hook(keep))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def on_threads(line):
    """The context in which a lab computes: as many threads as the budget trains with."""
    return threads(line.budget.classify.threads)


def stored_classifier(line, configuration):
    """The trained classifier from the run store. Raises FileNotFoundError: it is damaged or gone; a callback
    must not train for minutes."""
    stage = line.stage("classify", configuration)
    version = STAGE_VERSIONS[stage.name]
    if line.store.get(stage.name, stage.config, stage.inputs, version) is None:
        folder = line.store.folder(stage.name, stage.key)
        raise FileNotFoundError(f"the classifier in {folder} is damaged or gone; run make course.")
    return line.classifier(configuration)


def trained_deltas(line):
    """Table 1's constant controllers whose classifiers are in the store: their deltas, ascending."""
    configurations = [row.configuration for row in table_rows(1)]
    return sorted(c.delta for c in configurations if c.delta is not None and line.has("classify", c))


def layer_presets():
    """Table 2's rows by name: the layers that have DRS."""
    return {row.label: row.configuration.drs_layers for row in table_rows(2)}
