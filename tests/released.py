"""Files of weights made elsewhere, small and random: those of the authors' release, and of the Caffe-style
ResNet-101 and the DeepLab-v2 that start from COCO. And the thin networks that they fit."""

import torch
import torchvision
from torchvision.models.resnet import Bottleneck

from drs_lib import networks

THIN_BLOCKS = (2, 2, 2, 2)
THIN_VGG16 = ((4, 2), (8, 2), (16, 3), (32, 3), (32, 3), (32, 3))


def thin_resnet101(put=setattr):
    """ResNet-101 with two blocks in each layer and an eighth of the width inside of them. put: `setattr`, or
    a test's."""

    def build(**options):
        return torchvision.models.ResNet(Bottleneck, list(THIN_BLOCKS), width_per_group=8, **options)

    put(torchvision.models, "resnet101", build)


def thin_vgg16(put=setattr):
    """VGG-16 with a sixteenth of the channels."""
    put(networks, "VGG16", THIN_VGG16)


def vgg16_features():
    """What torchvision's `vgg16().features` is, of the thin one."""
    cfg = [width for channels, depth in THIN_VGG16[:5] for width in [channels] * depth + ["M"]]
    return torchvision.models.vgg.make_layers(cfg)


def caffe_shapes(blocks=THIN_BLOCKS, width=8):
    """{name in the file: shape} of the body."""
    shapes = {"layer1.conv1.conv.weight": (64, 3, 7, 7), "layer1.conv1.bn": 64}
    inputs = 64
    for number, depth in enumerate(blocks, 2):
        inner, outputs = width * 2 ** (number - 2), 256 * 2 ** (number - 2)
        for block in range(1, depth + 1):
            name = f"layer{number}.block{block}"
            shapes[f"{name}.reduce.conv.weight"] = (inner, inputs, 1, 1)
            shapes[f"{name}.conv3x3.conv.weight"] = (inner, inner, 3, 3)
            shapes[f"{name}.increase.conv.weight"] = (outputs, inner, 1, 1)
            shapes |= {
                f"{name}.reduce.bn": inner,
                f"{name}.conv3x3.bn": inner,
                f"{name}.increase.bn": outputs,
            }
            if block == 1:
                shapes[f"{name}.shortcut.conv.weight"] = (outputs, inputs, 1, 1)
                shapes[f"{name}.shortcut.bn"] = outputs
            inputs = outputs
    entries = ("weight", "bias", "running_mean", "running_var")
    norms = {f"{k}.{e}": (v,) for k, v in shapes.items() if k.endswith("bn") for e in entries}
    return {k: v for k, v in shapes.items() if not k.endswith("bn")} | norms


def caffe_state(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in caffe_shapes(**options).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 4:
            values *= (2 / values[0].numel()) ** 0.5 / (60 if shape[1] == 3 else 1)
        elif name.endswith(("bn.weight", "running_var")):
            values = 1 + 0.3 * values.tanh()
        state[name] = values
    return state


def aspp_state(classes, seed=5):
    """The head of a DeepLab-v2, by the names of deeplab-pytorch."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        f"aspp.c{i}.{e}": s
        for i in range(4)
        for e, s in (("weight", (classes, 2048, 3, 3)), ("bias", (classes,)))
    }
    return {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def release_state(controllers, classes=3):
    """A checkpoint's model by the names of the release; controllers: DRS_learnable.pth's, or none."""
    generator = torch.Generator().manual_seed(0)
    state, inputs, number = {}, 3, 0
    for layer, (channels, depth) in enumerate(THIN_VGG16, 1):
        block = "extra" if layer == 6 else f"layer{layer}"
        for j in range(1, depth + 1):
            weight = torch.randn(channels, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
            names = [f"{block}_conv{j}"] + [f"features.{number}"] * (layer < 6)
            for name in names:
                state |= {f"{name}.weight": weight, f"{name}.bias": torch.full((channels,), 0.01)}
            if controllers:
                state[f"{block}_relu{j}.fc.0.weight"] = torch.randn(channels, channels, generator=generator)
            inputs, number = channels, number + 2
        number += 1
    assert "features.28.weight" in state and "features.30.weight" not in state
    state["extra_conv4.weight"] = torch.randn(classes, inputs, 1, 1, generator=generator)
    state["extra_conv4.bias"] = torch.randn(classes, generator=generator)
    return state
