"""What the paper states and what its authors' released code does: the budgets "paper" and "release" for VOC.

What the two have in common is written once, what the release does otherwise beside it. That the values are
used as they say is tested elsewhere; here are those that somebody published. What the release does and its
budget does not, on purpose:

- It keeps the epoch with the best mIoU against the masks of VOC's training images. No stage is handed a mask
  here, and the last epoch is kept.
- An object wins over background where its refined score is above 1. Refined maps are clipped to [0, 1] here.
- Its ASPP starts from deeplabv1_resnet101-coco.pth, a file that a user has to fetch and to name
  (--aspp-weights). The budget starts from torchvision's, trained on COCO too.
"""

import math

import pytest
import torch
import torchvision
from tiny import TinyDataset
from torch import nn
from torch.nn import functional as F
from torchvision.models import VGG16_Weights

from drs_course.paper import table_rows
from drs_course.stages import open_data
from drs_lib import networks, train, weights
from drs_lib.crf import CRFConfig
from drs_lib.data import VOC2012
from drs_lib.data.voc import VOC_LIST_SIZES
from drs_lib.drs import DRS
from drs_lib.losses import classification_loss
from drs_lib.recipes import PARAMETER_GROUPS, ClassifyRecipe, get_budget

SGD = dict(optimizer="sgd", momentum=0.9, nesterov=False, weight_decay=5e-4, weights="pretrained", flip=True)
# "At epoch 5 and 10", the first epochs at the lower rate. The paper gives no strength of the jitter.
STEPS = dict(schedule="step", epochs=15, milestones=(5, 10), gamma=0.1, batch=5, accumulate=1)
AUGMENTATION = dict(resize=None, scale=None, crop=321, flip=True, jitter=(0.3, 0.3, 0.3, 0.1))
POLY = dict(schedule="poly", power=0.9, iterations=20_000, epochs=None, crop=321, resize=None, jitter=None)
DEEPLAB = SGD | POLY | dict(loss_size="logits")
RESNET = DEEPLAB | dict(backbone="resnet101", lr=2.5e-4)
# {field of the budget: (by the paper, what the release has instead)}; of a recipe, the fields that are named.
PUBLISHED = {
    "classify": (
        SGD
        | STEPS
        | AUGMENTATION
        | dict(backbone="vgg16", drs_layers=(1, 2, 3, 4, 5, 6), delta=None, lr=1e-3)
        | dict(lr_multipliers=(1, 1, 1, 1)),
        dict(nesterov=True, lr_multipliers=(1, 2, 10, 20), batch=5 * 2, resize=384, crop=320),
    ),
    "refine": (
        # "The same augmentation strategy as in the classification network."
        STEPS
        | AUGMENTATION
        | dict(backbone="vgg16", weights="pretrained", optimizer="adam", lr=1e-4, weight_decay=0)
        | dict(loss_size="map", label_mask=False),
        dict(epochs=30, milestones=(10, 20), batch=10, resize=320, crop=None, loss_size="image"),
    ),
    "largefov": (
        DEEPLAB
        | dict(kind="largefov", backbone="vgg16", lr=1e-3, batch=10, accumulate=1, scale=(0.5, 1.5))
        | dict(lr_multipliers=(1, 2, 10, 20), bias_decay=False),
        {},
    ),
    "largefov_resnet": (RESNET | dict(kind="largefov", batch=10, accumulate=1, scale=(0.5, 1.5)), {}),
    "aspp": (
        RESNET | dict(kind="aspp", batch=5, accumulate=2, update_every=10, scale=(0.5, 0.75, 1, 1.25, 1.5)),
        dict(weights="coco", bias_decay=False),
    ),
    # The paper states no scales.
    "scales": ((256, 320, 384), None),
    "resize": (320, None),
    "alpha": (0.2, None),
    "beta": (0.06, None),
    "refined_alpha": (0.2, None),
    "rule": ("paper", "release"),
    "target": ("maps", "largest"),
    "crf_largefov": (CRFConfig(10, 3, 3, 140, 5, 5), None),
    "crf_largefov_resnet": (CRFConfig(10, 3, 3, 121, 5, 4), None),
    "crf_aspp": (CRFConfig(10, 1, 3, 67, 3, 4), None),
}
SEGMENTERS = ("largefov", "largefov_resnet", "aspp")


@pytest.fixture(params=["paper", "release"])
def budget(request):
    return get_budget(request.param, "voc")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_budgets_hold_what_was_published(budget, name):
    paper, release = PUBLISHED[name]
    found = getattr(budget, name)
    if isinstance(paper, dict):
        expected = paper | release if budget.name == "release" else paper
        assert {field: getattr(found, field) for field in expected} == expected
    else:
        assert found == (release or paper if budget.name == "release" else paper)


def test_the_budgets_differ_in_nothing_else():
    paper, release = (get_budget(name, "voc") for name in ("paper", "release"))
    changes = {
        name: getattr(paper, name).replace(**change) if isinstance(change, dict) else change
        for name, (_, change) in PUBLISHED.items()
        if change
    }
    assert release == paper.replace(name="release", **changes)


def test_the_classification_loss_is_binary_cross_entropy():
    logits, labels = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(0))
    labels = (labels > 0).float()
    loss = classification_loss(lambda images: logits, train.Batch(None, None, labels, None))
    torch.testing.assert_close(loss, F.binary_cross_entropy(logits.sigmoid(), labels))


# The networks.


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args).eval()


def count(network):
    return sum(p.numel() for p in network.parameters())


def in_words(sequence):
    return " ".join(one_in_words(module) for module in sequence)


def one_in_words(module):
    """ "conv64 d2": 3x3, 64 channels, dilation 2 and output as large as the input; "1x1 20"; "pool3/2"."""
    if isinstance(module, nn.Conv2d):
        (kernel, _), (dilation, _), channels = module.kernel_size, module.dilation, module.out_channels
        assert module.stride == (1, 1) and module.padding == ((dilation, dilation) if kernel == 3 else (0, 0))
        if kernel == 1:
            return f"1x1 {channels}"
        return f"conv{channels}" + (f" d{dilation}" if dilation > 1 else "")
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        assert module.padding == (1 if module.kernel_size == 3 else 0)
        kind = "pool" if isinstance(module, nn.MaxPool2d) else "average"
        return f"{kind}{module.kernel_size}/{module.stride}"
    if isinstance(module, nn.Sequential):
        return in_words(module)
    return {DRS: "drs", nn.ReLU: "relu", nn.Dropout2d: "dropout2d"}[type(module)]


def test_the_classifier_is_vgg16_with_drs_after_every_convolution():
    network = on_meta(networks.classifier, "vgg16", 20)
    assert [in_words(layer) for layer in network.layers] == [
        "conv64 drs conv64 drs",
        "pool2/2 conv128 drs conv128 drs",
        "pool2/2 conv256 drs conv256 drs conv256 drs",
        "pool2/2 conv512 drs conv512 drs conv512 drs",
        "pool3/1 conv512 d2 drs conv512 d2 drs conv512 d2 drs",
        "conv512 drs conv512 drs conv512 drs",
    ]
    assert one_in_words(network.head) == "1x1 20"
    for size, maps in ((321, 41), (320, 40)):
        assert network.class_maps(torch.empty(1, 3, size, size, device="meta")).shape == (1, 20, maps, maps)
    assert count(network) == 24_401_236 == 21_804_372 + 2_596_864
    for plain in (((),), ((1, 2, 3, 4, 5, 6), 0.55)):
        assert count(on_meta(networks.classifier, "vgg16", 20, *plain)) == 21_804_372


def test_the_classifier_s_new_convolutions_start_as_in_the_release(thin_vgg16):
    assert weights._DOWNLOADS["vgg16", "pretrained"] is VGG16_Weights.IMAGENET1K_V1
    torch.manual_seed(0)
    network = networks.classifier("vgg16", 20)
    extra = [module for module in network.layers[5] if isinstance(module, nn.Conv2d)]
    assert len(extra) == 3 and network.pretrained_layers == 5
    for conv in (*extra, network.head):
        expected = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert not conv.bias.any()


def test_the_classifier_s_groups(budget):
    network = on_meta(networks.classifier, "vgg16", 20)
    optimizer = train.make_optimizer(network, budget.classify)
    # 13 pretrained convolutions; new are the extra ones, the 1x1 and the controllers.
    found = {group["name"]: len(group["params"]) for group in optimizer.param_groups}
    assert found == dict(zip(PARAMETER_GROUPS, (13, 13, 3 + 1 + 16, 3 + 1), strict=True))
    assert {group["nesterov"] for group in optimizer.param_groups} == {budget.name == "release"}


@pytest.mark.parametrize("network", SEGMENTERS)
def test_the_networks_of_table_4(network):
    recipe = get_budget("paper", "voc").segment(network)
    model = on_meta(networks.deeplab, recipe.kind, recipe.backbone, 21)
    assert model.score(torch.empty(1, 3, 321, 321, device="meta")).shape == (1, 21, 41, 41)
    assert model.scales == ((1, 0.75, 0.5) if network == "aspp" else (1,))
    frozen = [m for m in model.modules() if isinstance(m, torchvision.ops.FrozenBatchNorm2d)]
    assert len(frozen) == (0 if network == "largefov" else 104)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if network == "largefov":
        assert [in_words(layer).replace(" relu", "") for layer in model.layers] == [
            "conv64 conv64",
            "pool3/2 conv128 conv128",
            "pool3/2 conv256 conv256 conv256",
            "pool3/2 conv512 conv512 conv512",
            "pool3/1 conv512 d2 conv512 d2 conv512 d2",
        ]
        head = "pool3/1 average3/1 conv1024 d12 relu dropout2d 1x1 1024 relu dropout2d 1x1 21"
        assert in_words(model.head) == head
        assert [module.p for module in model.head if isinstance(module, nn.Dropout2d)] == [0.5, 0.5]
        assert count(model) == 20_505_429
        return
    layers = dict(model.layers.named_children())
    assert [len(layers[f"layer{i}"]) for i in (1, 2, 3, 4)] == [3, 4, 23, 3]
    # How the first blocks of layers 3 and 4 are dilated follows the weights: see tests/lib/test_weights.py.
    for layer, dilation in (("layer1", 1), ("layer2", 1), ("layer3", 2), ("layer4", 4)):
        assert {block.conv2.dilation for block in layers[layer][1:]} == {(dilation, dilation)}
    assert layers["maxpool"].ceil_mode == (network == "aspp")
    heads = {
        "largefov_resnet": "conv1024 d12 relu dropout2d 1x1 1024 relu dropout2d 1x1 21",
        "aspp": "conv21 d6 conv21 d12 conv21 d18 conv21 d24",
    }
    assert in_words(model.head) == heads[network]


@pytest.mark.parametrize("network", SEGMENTERS)
def test_table_4_s_learning_rates_initial_weights_and_upper_bound(budget, network):
    recipe = budget.segment(network)
    optimizer = train.make_optimizer(on_meta(networks.deeplab, recipe.kind, recipe.backbone, 21), recipe)
    base = {"largefov": 1e-3, "largefov_resnet": 2.5e-4, "aspp": 2.5e-4}[network]
    expected = {"pretrained weights": base, "new weights": 10 * base, "new biases": 20 * base}
    if network == "largefov":
        expected["pretrained biases"] = 2 * base
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(expected)
    assert "IMAGENET" in weights._DOWNLOADS[recipe.backbone, "pretrained"].name
    if network != "largefov":
        assert "COCO" in weights._DOWNLOADS[recipe.backbone, "coco"].name
    configurations = [row.configuration for row in table_rows(4) if row.configuration is not None]
    assert [c.network for c in configurations if c.supervised].count(network) == 1


# The data, and what is kept.


def test_the_classifier_is_trained_on_trainaug_and_measured_on_train(budget, voc_tree):
    data = open_data("voc", budget, str(voc_tree))
    assert isinstance(data.accuracy_images, VOC2012)
    assert (data.train.split, data.accuracy_images.split) == ("trainaug", "train")
    assert VOC_LIST_SIZES["train"] == 1_464


def test_the_last_epoch_is_kept(monkeypatch):
    build, built, heads = networks.classifier, [], []
    monkeypatch.setattr(
        networks, "classifier", lambda *a, **options: built.append(build(*a, **options)) or built[-1]
    )
    model, _ = train.train_classifier(
        ClassifyRecipe.laptop().replace(weights=None, epochs=3, batch=4),
        TinyDataset(length=8, size=32, forbid_masks=True),
        device="cpu",
        progress=lambda *_: heads.append(built[-1].head.weight.detach().clone()),
    )
    assert len(heads) == 3 * 2
    assert [torch.equal(model.head.weight, head) for head in heads] == [False] * 5 + [True]
