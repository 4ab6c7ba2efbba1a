"""The networks of Figure 3: a body of layers under a head that scores every position for every class.

::

    (a) classifier             image (N, 3, H, W)
                                 |
        layer1 ... layer5        VGG-16's five blocks       every ReLU of a layer in `drs_layers`
        layer6                   three 3x3 convolutions     is a DRS module instead
        head                     1x1 convolution to C channels
                                 |
                               class maps F (N, C, h, w)    -> localization maps, equation (1)
                                 |  global average pooling
                               logits (N, C)                -> P = sigmoid(logits)

    (b) refinement network     the same body with plain ReLUs; N (N, C, h, w), linear, has F's shape

    (c) DeepLab                layer1 ... layer5 or a ResNet, under a head of dilated convolutions:
        largefov                 3x3 with one wide dilation -> 1x1 -> 1x1 to the classes
        aspp                     four 3x3 with different dilations to the classes, summed;
                                 three image scales, fused by their maximum

Every network comes in the paper's size (`vgg16`, `resnet101`) and in one that a laptop trains in minutes
(`mini`, `mini_resnet`, with batch normalisation). All take normalised float images and have output stride 8,
rounded up: 321 pixels become 41 positions, 320 become 40 (41 under DeepLab-v2's stem, aspp on resnet101).

A layer begins with the pooling that separates it from the layer below, so that its output is what its last
DRS or ReLU returns.
"""

from collections import OrderedDict
from functools import partial, reduce

import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from drs_lib.arguments import whole
from drs_lib.drs import DRS
from drs_lib.weights import CAFFE_STYLE, load_weights

# (channels, convolutions, the first one's stride, whether a 2x2 max pooling follows), layer 1 to 6.
# Table 2 shows something only if the receptive field outgrows an animal's head in the highest layers alone,
# as in VGG-16 on VOC: hence the late second pooling, and two convolutions in each of the last two layers.
MINI = (
    (16, 1, 2, False), (16, 1, 1, True), (32, 1, 1, False), (48, 1, 1, True), (64, 2, 1, False),
    (64, 2, 1, False),
)  # fmt: skip
# The stem's channels (stride 2), then (channels, stride, dilation) of each residual block.
MINI_RESNET = (16, ((32, 2, 1), (48, 2, 1), (48, 1, 1), (96, 1, 2)))
# (channels, convolutions), layer 1 to 6: VGG's configuration D, then the paper's three extra convolutions.
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3), (512, 3))

LARGEFOV = {
    **dict.fromkeys(("mini", "mini_resnet"), {"width": 96, "dilation": 6, "dropout": 0.1}),
    **dict.fromkeys(("vgg16", "resnet101"), {"width": 1024, "dilation": 12, "dropout": 0.5}),
}
ASPP_RATES = {"mini": (1, 2, 4, 6), "mini_resnet": (1, 2, 4, 6), "resnet101": (6, 12, 18, 24)}
ASPP_SCALES = (1.0, 0.75, 0.5)


class Network(nn.Module):
    """A body of `layers` under a `head`; what the three networks of Figure 3 have in common.

    `pretrained_layers` says how many of the layers a pretrained body provides; the others, the head and the
    DRS controllers are new. That division is the architecture's: it holds whatever `weights` were given.
    """

    def __init__(self, backbone, num_classes, layers, head, pretrained_layers):
        super().__init__()
        self.backbone, self.num_classes, self.pretrained_layers = backbone, num_classes, pretrained_layers
        self.layers, self.head = layers, head

    @property
    def body(self):
        """The pretrained layers, as an `nn.Sequential` that shares its modules with `layers`."""
        return self.layers[: self.pretrained_layers]

    def new_modules(self):
        """The modules that start from scratch: layers past the pretrained ones, head, learnable DRS modules.

        None is listed twice or lies inside another. Every other parameter counts as pretrained.
        """
        drs = [module for module in self.body.modules() if isinstance(module, DRS)]
        learnable = [module for module in drs if list(module.parameters())]
        return [*self.layers[self.pretrained_layers :], self.head, *learnable]

    def score(self, x):
        """Every position scored for every class: (N, 3, H, W) -> (N, C, h, w), linear, at output stride 8."""
        _check_images(x)
        return self.head(self.layers(x))

    def layer_outputs(self, x):
        """What each layer returns, first to last: a list of (N, K_l, h_l, w_l); Figure 5 averages over K_l.

        Taken after the layer's last DRS or ReLU, before the next pooling (the layer above begins with it).
        """
        _check_images(x)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


class Classifier(Network):
    """Figure 3 (a). `forward`: images (N, 3, H, W) -> logits (N, C), the average of the class maps."""

    def forward(self, x):
        return self.class_maps(x).mean((2, 3))

    def class_maps(self, x):
        """The class-specific feature maps F of equation (1), before its ReLU: (N, C, h, w)."""
        return self.score(x)


class RefinementNetwork(Network):
    """Figure 3 (b). `forward`: images (N, 3, H, W) -> refined maps (N, C, h, w), linear: can leave [0, 1]."""

    def forward(self, x):
        return self.score(x)


class DeepLab(Network):
    """Figure 3 (c). `forward`: images (N, 3, H, W) -> logits (N, num_classes, h, w).

    With more than one scale, the logits are the element-wise maximum over the image's scales, at the size of
    the largest scale's logits.
    """

    def __init__(self, backbone, num_classes, layers, head, scales=(1.0,)):
        super().__init__(backbone, num_classes, layers, head, pretrained_layers=len(layers))
        self.scales = scales

    def forward(self, x):
        return self.training_logits(x)[-1]

    def training_logits(self, x):
        """The logits whose losses are summed in training: a list of (N, num_classes, h, w).

        One scale: [logits]. Several: the logits of each scale, each at its own size, and last their maximum.
        """
        resize = partial(F.interpolate, mode="bilinear", align_corners=False)
        logits = [self.score(x if s == 1 else resize(x, scale_factor=s)) for s in self.scales]
        if len(logits) == 1:
            return logits
        size = logits[0].shape[-2:]
        fused = reduce(torch.maximum, (resize(scale, size=size) for scale in logits[1:]), logits[0])
        return [*logits, fused]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; torchvision's `BasicBlock` refuses the dilation needed here."""

    def __init__(self, in_channels, channels, stride, dilation):
        super().__init__()
        self.convs = nn.Sequential(
            _conv3x3(in_channels, channels, stride=stride, dilation=dilation, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            _conv3x3(channels, channels, dilation=dilation, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Identity()
        if stride > 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(_he(projection), nn.BatchNorm2d(channels))

    def forward(self, x):
        return F.relu(self.convs(x) + self.shortcut(x))


class FrozenNorm(torchvision.ops.FrozenBatchNorm2d):
    """Batch norm with fixed statistics whose result has its input's type. Under autocast torchvision's has
    its buffers', float32: activations would be kept, and read again, in twice the size."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class DilatedResNet(nn.Sequential):
    """torchvision's ResNet up to its last block, at output stride 8 instead of 32.

    At every fourth position it computes what the undilated ResNet would: layers 3 and 4 keep the resolution,
    and a 3x3 convolution is dilated as much as its input is finer than in the original. In these layers'
    first block that depends on where the original halves the resolution. torchvision's does so in the 3x3
    convolution, which therefore has half the dilation (1 and 2) of the blocks after it. ResNets made with
    Caffe, the paper's DeepLab-v2 among them, do so in the first 1x1: they have 2 and 4 throughout, and a
    stride of 2 in the first 1x1 of layer 2.

    `caffe_style` (False) says which, and can be set. Weights of the one give something else in the other:
    state dicts of a Caffe-style body therefore have an entry more, and loading a state dict sets the style.
    """

    @property
    def caffe_style(self):
        # A slice of the body has the same class and fewer layers.
        return "layer2" in self._modules and self.layer2[0].conv1.stride == (2, 2)

    @caffe_style.setter
    def caffe_style(self, value):
        halving = self.layer2[0]
        halving.conv1.stride, halving.conv2.stride = ((2, 2), (1, 1)) if value else ((1, 1), (2, 2))
        for block, dilation in ((self.layer3[0], 2), (self.layer4[0], 4)):
            dilation = dilation if value else dilation // 2
            block.conv2.dilation = block.conv2.padding = (dilation, dilation)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.caffe_style:
            device = self.layer2[0].conv1.weight.device
            destination[prefix + CAFFE_STYLE] = torch.ones((), dtype=torch.uint8, device=device)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "layer2.0.conv1.weight" in state_dict:
            self.caffe_style = state_dict.pop(prefix + CAFFE_STYLE, None) is not None
        super()._load_from_state_dict(state_dict, prefix, *args)


class ASPP(nn.ModuleList):
    """Atrous spatial pyramid pooling of DeepLab-v2: the sum of 3x3 convolutions with different dilations."""

    def __init__(self, in_channels, num_classes, rates):
        super().__init__(gaussian(_conv3x3(in_channels, num_classes, dilation=rate)) for rate in rates)

    def forward(self, x):
        return reduce(torch.add, (branch(x) for branch in self))


def classifier(backbone, num_classes, drs_layers=(1, 2, 3, 4, 5, 6), delta=None, weights=None):
    """The classification network with DRS (Figure 3 (a)).

    Args:
        backbone: "vgg16": pools 1 to 3 are 2x2 with stride 2, pool 4 is 3x3 with stride 1, there is no pool 5
            and layer 5 has dilation 2. "mini": one or two convolutions with batch normalisation per layer.
        drs_layers: the layers, 1 to 6, whose ReLUs are DRS modules (Table 2); () is the plain CAM network.
        delta: None for the learnable controller of equation (2), or the constant 0 < delta <= 1.
        weights: None (random), "pretrained" (ImageNet for vgg16, the shipped ones for mini) or a file: see
            `load_weights`.

    Raises:
        ValueError: an unknown backbone or layer number, or a delta outside (0, 1].
    """
    _require("backbone", backbone, ("mini", "vgg16"), "a classifier")
    drs_layers = _layer_numbers(drs_layers)

    def activation(layer, channels):
        return ("drs", DRS(channels, delta)) if layer in drs_layers else _relu(layer, channels)

    return load_weights(_six_layers(Classifier, backbone, num_classes, activation), weights)


def refinement_network(backbone, num_classes, weights=None):
    """The refinement network (Figure 3 (b)): the classifier's body with plain ReLUs, ending in linear maps.

    Arguments as for `classifier`. The new convolutions start from N(0, 0.01), as in the authors' release.
    """
    _require("backbone", backbone, ("mini", "vgg16"), "a refinement network")
    network = _six_layers(RefinementNetwork, backbone, num_classes, _relu)
    for new in network.new_modules():
        new.apply(gaussian)
    return load_weights(network, weights)


def deeplab(kind, backbone, num_classes, weights=None):
    """A DeepLab of Table 4 (Figure 3 (c)).

    On resnet101 batch normalisation is frozen, statistics and affine parameters alike, so it needs weights to
    be of use: "pretrained" (ImageNet), "coco" (torchvision's DeepLab-v3 body, trained on COCO's images of the
    VOC classes *with pixel masks*) or a file, deeplabv1_resnet101-coco.pth for one: see `load_weights`. On
    mini and mini_resnet it is trained.

    Args:
        kind: "largefov", on mini, mini_resnet, vgg16 or resnet101: one wide-dilation head, one scale.
            "aspp", on mini, mini_resnet or resnet101: DeepLab-v2, trained and evaluated over three scales.
        num_classes: the outputs: background included, 21 for VOC.

    Raises:
        ValueError: a combination that does not exist; those that do are listed.
    """
    _require("kind", kind, ("largefov", "aspp"), "a DeepLab")
    _require("backbone", backbone, LARGEFOV if kind == "largefov" else ASPP_RATES, f"DeepLab {kind!r}")
    num_classes = whole("num_classes", num_classes)
    layers, channels = _segmentation_body(backbone, ceil_mode=kind == "aspp")
    if kind == "aspp":
        head, scales = ASPP(channels, num_classes, ASPP_RATES[backbone]), ASPP_SCALES
    else:
        head, scales = _large_fov(backbone, channels, num_classes), (1.0,)
    return load_weights(DeepLab(backbone, num_classes, layers, head, scales), weights)


def mini_resnet_layers():
    """(the layers of "mini_resnet", the channels of the last)."""
    channels, blocks = MINI_RESNET
    conv = _conv3x3(3, channels, stride=2, bias=False)
    layers = OrderedDict(stem=nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)))
    for number, block in enumerate(blocks, 1):
        layers[f"block{number}"] = ResidualBlock(channels, *block)
        channels = block[0]
    return nn.Sequential(layers), channels


def _six_layers(kind, backbone, num_classes, activation):
    # activation(layer, channels) returns a name and a module: this is where DRS takes the place of a ReLU.
    num_classes = whole("num_classes", num_classes)
    if backbone == "mini":
        # The whole body is pretrained: the paper's layer 6 is new because ImageNet's VGG-16 has none.
        layers, pretrained, init = _mini_layers(activation), 6, gaussian
    else:
        pools = [*(_halve() for _ in range(3)), nn.MaxPool2d(3, 1, padding=1), None]
        layers, pretrained, init = _vgg16_layers(VGG16, activation, pools), 5, _he
    head = init(nn.Conv2d((MINI if backbone == "mini" else VGG16)[-1][0], num_classes, 1))
    return kind(backbone, num_classes, layers, head, pretrained)


def _mini_layers(activation):
    pools = [_halve() if pool_after else None for *_, pool_after in MINI[:-1]]
    return _chain([(*layer[:3], 1) for layer in MINI], activation, pools, norm=True)


def _vgg16_layers(spec, activation, pools):
    spec = [(*layer, 1, 2 if number == 5 else 1) for number, layer in enumerate(spec, 1)]
    return _chain(spec, activation, pools, norm=False)


def _chain(spec, activation, pools, norm):
    """Layers of 3x3 convolutions: (channels, convolutions, the first one's stride, dilation) of each, and the
    pooling, or None, with which each but the first begins."""
    layers, in_channels = OrderedDict(), 3
    for number, (layer_spec, pool) in enumerate(zip(spec, [None, *pools], strict=True), 1):
        channels, depth, stride, dilation = layer_spec
        layer = OrderedDict() if pool is None else OrderedDict(pool=pool)
        for j in range(1, depth + 1):
            name, act = activation(number, channels)
            options = dict(stride=stride if j == 1 else 1, dilation=dilation, bias=not norm)
            layer[f"conv{j}"] = _conv3x3(in_channels, channels, **options)
            if norm:
                layer[f"norm{j}"] = nn.BatchNorm2d(channels)
            layer[f"{name}{j}"] = act
            in_channels = channels
        layers[f"layer{number}"] = nn.Sequential(layer)
    return nn.Sequential(layers)


def _segmentation_body(backbone, ceil_mode):
    """The layers under a DeepLab's head, and how many channels they give it."""
    if backbone == "mini":
        return _mini_layers(_relu)[:5], MINI[4][0]
    if backbone == "mini_resnet":
        return mini_resnet_layers()
    if backbone == "vgg16":
        pools = [nn.MaxPool2d(3, stride, padding=1) for stride in (2, 2, 2, 1)]
        return _vgg16_layers(VGG16[:5], _relu, pools), VGG16[4][0]
    dilated = [False, True, True]
    resnet = torchvision.models.resnet101(replace_stride_with_dilation=dilated, norm_layer=FrozenNorm)
    resnet.maxpool.ceil_mode = ceil_mode
    layers = [(name, module) for name, module in resnet.named_children() if name not in ("avgpool", "fc")]
    return DilatedResNet(OrderedDict(layers)), resnet.fc.in_features


def _large_fov(backbone, in_channels, num_classes):
    width, dilation, dropout = (LARGEFOV[backbone][k] for k in ("width", "dilation", "dropout"))
    # A standard deviation of 0.01 suits 4,608 inputs; mini's 576 would hardly pass a signal on.
    init = _he if backbone.startswith("mini") else gaussian
    pool = nn.Sequential(nn.MaxPool2d(3, 1, padding=1), nn.AvgPool2d(3, 1, padding=1))
    head = OrderedDict(
        fc6=init(_conv3x3(in_channels, width, dilation=dilation)),
        relu6=nn.ReLU(inplace=True),
        drop6=nn.Dropout2d(dropout),
        fc7=init(nn.Conv2d(width, width, 1)),
        relu7=nn.ReLU(inplace=True),
        drop7=nn.Dropout2d(dropout),
        score=gaussian(nn.Conv2d(width, num_classes, 1)),
    )
    return nn.Sequential(OrderedDict(pool=pool) | head if backbone == "vgg16" else head)


def _halve():
    # Rounding up, as Caffe and the strided convolutions do: no row of the image goes unseen.
    return nn.MaxPool2d(2, 2, ceil_mode=True)


def _relu(layer, channels):
    return "relu", nn.ReLU(inplace=True)


def _conv3x3(in_channels, channels, stride=1, dilation=1, bias=True):
    return _he(nn.Conv2d(in_channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=bias))


def _he(conv):
    # N(0, sqrt(2 / (k k out))), zero biases: torchvision's VGG, and the release's extra convolutions.
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def gaussian(module):
    """Sets a convolution's weights to N(0, 0.01) and its biases to 0; returns the module."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.01)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return module


def _require(name, value, choices, what):
    if value not in choices:
        raise ValueError(f"{what} has no {name} {value!r}: choose one of {', '.join(map(repr, choices))}")


def _layer_numbers(drs_layers):
    try:
        layers = tuple(drs_layers)
    except TypeError:
        raise TypeError(f"drs_layers is a collection of layer numbers; found {drs_layers!r}") from None
    for layer in layers:
        if layer not in range(1, 7):
            raise ValueError(f"no layer {layer!r} to plug DRS into: the layers are 1, 2, 3, 4, 5 and 6")
    return layers


def _check_images(x):
    # torch.fx traces with proxies, which have no dtype to look at.
    if isinstance(x, torch.Tensor) and (x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point()):
        raise ValueError(
            f"expected normalised float images (N, 3, H, W), found {x.dtype} {tuple(x.shape)}: "
            "drs_lib.data.normalize makes them from uint8 images"
        )
