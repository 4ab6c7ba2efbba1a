"""What the paper states and what its authors' released code does, row by row: budgets "paper" and "release".

Two tables, "DRS, item by item" and "the three networks of Table 4", with one test for each of their rows, in
their order. A test that takes `budget` runs for both columns. What the release does and its budget does not,
on purpose, is in `NOT_THE_RELEASE_S`.
"""

import math

import numpy as np
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
from drs_lib.crf import CRFConfig, dense_crf
from drs_lib.data import VOC2012, normalize, training_transform
from drs_lib.data.voc import VOC_LIST_SIZES
from drs_lib.drs import DRS
from drs_lib.labels import pseudo_labels
from drs_lib.maps import keep_largest_class, localization_maps, refined_maps
from drs_lib.metrics import exact_match_accuracy
from drs_lib.recipes import PARAMETER_GROUPS, ClassifyRecipe, get_budget

NOT_THE_RELEASE_S = {
    "checkpoint kept": "The release keeps the epoch with the best mIoU against the masks of VOC's training "
    "images. No stage is handed a mask, and the last epoch is kept.",
    "both cues at once": "In the release an object wins over background where its refined score is above 1. "
    "Refined maps are clipped to [0, 1] here, as everything that is called a map.",
    "initial weights": "The release's ASPP starts from deeplabv1_resnet101-coco.pth, a file that a user has "
    "to fetch and to name (--aspp-weights). The budget starts from torchvision's, trained on COCO too.",
}

# The rows of the two tables, filled in below in their order.
DRS_ROWS, DEEPLAB_ROWS = {}, {}


def row(rows, name):
    def register(test):
        rows[name] = test
        return test

    return register


@pytest.fixture(params=["paper", "release"])
def budget(request):
    return get_budget(request.param, "voc")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def photos(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def classifier_of(budget, device="meta", **changes):
    recipe = budget.classify.replace(**changes)
    with torch.device(device):
        return networks.classifier(recipe.backbone, 20, recipe.drs_layers, recipe.delta)


def refinement_of(budget, device="meta"):
    with torch.device(device):
        return networks.refinement_network(budget.refine.backbone, 20)


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


class Maps(nn.Module):
    """A network whose maps are known: one 8x8 convolution with stride 8, and a ReLU for a classifier."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 8, 8)
        self.conv.weight.data = noise(channels, 3, 8, 8)
        self.conv.bias.data = torch.full((channels,), 0.5)

    def forward(self, x):
        return self.conv(x)

    def class_maps(self, x):
        return self.conv(x).relu()


class Outputs(nn.Module):
    """A network that returns what it was given."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs[0]

    def training_logits(self, images):
        return list(self.outputs)


def batch_of(labels=None, extra=None, n=2):
    return train.Batch(torch.arange(n), torch.zeros(n, 3, 8, 8), labels, extra)


def upsampled(maps, size):
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def rates(recipe, epochs):
    """The factor on the learning rate in each epoch, 1 to `epochs`."""
    per_epoch = 7
    factors = [recipe.lr_factor(step, per_epoch, epochs * per_epoch) for step in range(epochs * per_epoch)]
    return [round(factors[epoch * per_epoch], 6) for epoch in range(epochs)]


# DRS, item by item.


@row(DRS_ROWS, "backbone")
def test_backbone(budget):
    network = classifier_of(budget)
    assert [in_words(layer).replace(" drs", "") for layer in network.layers] == [
        "conv64 conv64",
        "pool2/2 conv128 conv128",
        "pool2/2 conv256 conv256 conv256",
        "pool2/2 conv512 conv512 conv512",
        "pool3/1 conv512 d2 conv512 d2 conv512 d2",
        "conv512 conv512 conv512",
    ]
    assert one_in_words(network.head) == "1x1 20"
    for size, maps in ((321, 41), (320, 40)):
        assert network.class_maps(torch.empty(1, 3, size, size, device="meta")).shape == (1, 20, maps, maps)


@row(DRS_ROWS, "where DRS sits")
def test_where_drs_sits(budget):
    network = classifier_of(budget)
    assert budget.classify.drs_layers == (1, 2, 3, 4, 5, 6)
    modules = [in_words(layer).split() for layer in network.layers]
    assert [words.count("drs") for words in modules] == [2, 2, 3, 3, 3, 3]
    assert [sum(word.startswith("conv") for word in words) for words in modules] == [2, 2, 3, 3, 3, 3]
    assert not any("relu" in words for words in modules)
    assert all(type(layer[-1]) is DRS for layer in network.layers)  # after each convolution, not before
    assert not isinstance(network.head, nn.Sequential)


@row(DRS_ROWS, "suppressor")
def test_suppressor():
    x = noise(2, 5, 6, 7)
    x[0, 0] = -1
    features = x.relu()
    expected = torch.minimum(features, 0.55 * features.amax((2, 3), keepdim=True))
    torch.testing.assert_close(DRS(5, delta=0.55)(x), expected)
    # The maximum and the average are taken after the ReLU: adding to what it cuts off changes nothing.
    for drs in (DRS(5, delta=0.55), DRS(5)):
        torch.testing.assert_close(drs(torch.where(x < 0, x - 9, x)), drs(x))


@row(DRS_ROWS, "learnable controller")
def test_learnable_controller(budget):
    assert budget.classify.delta is None
    torch.manual_seed(0)
    drs, x = DRS(200), noise(2, 200, 6, 7)
    (weight,) = drs.parameters()  # one linear layer, K to K, without a bias
    assert weight.shape == (200, 200)
    assert weight.std().item() == pytest.approx(0.01, rel=0.02) and abs(weight.mean()) < 1e-4
    features = x.relu()
    control = torch.sigmoid(features.mean((2, 3)) @ weight.T)
    assert 0.4 < control.min() < control.max() < 0.6
    expected = torch.minimum(features, features.amax((2, 3), keepdim=True) * control[..., None, None])
    torch.testing.assert_close(drs(x), expected)


@row(DRS_ROWS, "parameters")
def test_parameters(budget):
    assert count(classifier_of(budget, drs_layers=())) == 21_804_372
    assert count(classifier_of(budget, delta=0.55)) == 21_804_372
    assert count(classifier_of(budget)) == 24_401_236 == 21_804_372 + 2_596_864


@row(DRS_ROWS, "init")
def test_init(budget, thin_vgg16):
    assert budget.classify.weights == "pretrained"
    downloads = weights._DOWNLOADS
    assert downloads[budget.classify.backbone, "pretrained"] is VGG16_Weights.IMAGENET1K_V1
    torch.manual_seed(0)
    network = classifier_of(budget, device="cpu")
    extra = [module for module in network.layers[5] if isinstance(module, nn.Conv2d)]
    assert len(extra) == 3 and network.pretrained_layers == 5
    for conv in (*extra, network.head):
        expected = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert not conv.bias.any()


@row(DRS_ROWS, "loss")
def test_loss():
    logits, labels = noise(5, 20), (noise(5, 20, seed=1) > 0).float()
    loss = train.classification_loss(Outputs(logits), batch_of(labels, n=5))
    torch.testing.assert_close(loss, F.binary_cross_entropy(logits.sigmoid(), labels))
    torch.testing.assert_close(loss, F.multilabel_soft_margin_loss(logits, labels))


@row(DRS_ROWS, "optimiser")
def test_optimiser(budget):
    network = classifier_of(budget)
    optimizer = train.make_optimizer(network, budget.classify)
    assert type(optimizer) is torch.optim.SGD and budget.classify.lr == 1e-3
    multipliers = {"paper": (1, 1, 1, 1), "release": (1, 2, 10, 20)}[budget.name]
    for group, name, multiplier in zip(optimizer.param_groups, PARAMETER_GROUPS, multipliers, strict=True):
        assert (group["name"], group["lr"]) == (name, pytest.approx(1e-3 * multiplier))
        assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
        assert group["nesterov"] is (budget.name == "release")
    # 13 pretrained convolutions; new are the extra ones, the 1x1 and the controllers.
    names = {id(p): name for name, p in network.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert [len(group) for group in groups] == [13, 13, 3 + 1 + 16, 3 + 1]
    assert not any(name.startswith(("layers.layer6.", "head.")) or ".drs" in name for name in groups[0])


@row(DRS_ROWS, "schedule")
def test_schedule(budget):
    assert budget.classify.epochs == 15
    # Epochs count from 1: the fifth and the tenth are the first at the lower rate.
    assert rates(budget.classify, 15) == [1] * 4 + [0.1] * 5 + [0.01] * 6


@row(DRS_ROWS, "batch")
def test_batch(budget):
    assert budget.classify.batch == {"paper": 5, "release": 5 * 2}[budget.name]
    assert budget.classify.accumulate == 1


@row(DRS_ROWS, "augmentation")
def test_augmentation(budget):
    recipe = budget.classify
    resize, crop = {"paper": (None, 321), "release": (384, 320)}[budget.name]
    assert (recipe.resize, recipe.crop, recipe.flip, recipe.scale) == (resize, crop, True, None)
    assert recipe.jitter == (0.3, 0.3, 0.3, 0.1)  # the paper gives no strength
    # A ramp from left to right tells what becomes of an image of 400 x 500.
    ramp = torch.linspace(0, 250, 500).round().byte().expand(3, 400, 500).contiguous()
    transform = training_transform(crop=crop, resize=resize, scale=None, flip=True)
    torch.manual_seed(0)
    images = torch.stack([transform(ramp)[0] for _ in range(20)])
    assert images.shape == (20, 3, crop, crop)
    rise = (images[:, 0, 0, -1].float() - images[:, 0, 0, 0].float()) / (crop - 1)
    assert {value.sign().item() for value in rise} == {-1, 1}
    torch.testing.assert_close(rise.abs(), torch.full((20,), 250 / (resize or 500)), rtol=0.02, atol=0)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(normalize(images[0]), (images[0] / 255 - mean) / std, rtol=1e-4, atol=1e-5)


@row(DRS_ROWS, "localization map")
def test_localization_map():
    model, images = Maps(), noise(2, 3, 40, 48)
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1]])
    with torch.no_grad():
        maps = upsampled(model.class_maps(images), (40, 48))
    maps = maps / (maps.amax((2, 3), keepdim=True) + 1e-5) * labels[:, :, None, None]
    torch.testing.assert_close(localization_maps(model, images, labels), maps)
    # No pixel lies on the map's maximum: had it been divided first, its largest value would be lower.
    assert maps.amax((2, 3))[labels > 0].min() > 0.9999


@row(DRS_ROWS, "inference scales")
def test_inference_scales(budget):
    assert budget.resize == 320 and budget.scales == (256, 320, 384)  # the paper states none
    model, images, labels = Maps(), noise(1, 3, 320, 320), torch.ones(1, 4)
    expected = []
    with torch.no_grad():
        for side in (256, 320, 384):
            resized = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
            maps = upsampled(model.class_maps(resized), (320, 320))
            expected.append(maps / (maps.amax((2, 3), keepdim=True) + 1e-5))
    maps = localization_maps(model, images, labels, scales=budget.scales)
    torch.testing.assert_close(maps, torch.stack(expected).amax(0))


@row(DRS_ROWS, "refinement target")
def test_refinement_target(budget):
    assert budget.target == {"paper": "maps", "release": "largest"}[budget.name]
    maps = noise(4, 6, 6).abs()
    largest = keep_largest_class(maps)
    assert torch.equal(largest, torch.where(maps == maps.amax(0), maps, 0))


@row(DRS_ROWS, "refinement network")
def test_refinement_network(budget, thin_vgg16):
    torch.manual_seed(0)
    network = refinement_of(budget, "cpu").eval()
    plain = classifier_of(budget, "cpu", drs_layers=())
    assert in_words(network.layers) == in_words(plain.layers)
    # Linear at its end, of M's shape, N(0, 0.01) in what is new.
    x = noise(2, 3, 40, 40)
    with torch.no_grad():
        refined = network(x)
        assert refined.shape == plain.eval().class_maps(x).shape
        network.head.bias.fill_(1.5)
        assert network(x).max() > 1
        network.head.bias.fill_(-1)
        assert network(x).min() < 0
    for conv in (*(m for m in network.layers[5] if isinstance(m, nn.Conv2d)), network.head):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    # The loss: all channels, whether the image has the class or not; in the release after upsampling.
    options = {"size": budget.refine.loss_size, "label_mask": budget.refine.label_mask}
    refined, small, labels = noise(2, 20, 5, 5), torch.rand(2, 20, 5, 5), torch.zeros(2, 20)
    target = upsampled(small, (33, 33))
    expected = {
        "paper": (refined - small).square().mean(),
        "release": (upsampled(refined, (33, 33)) - target).square().mean(),
    }
    loss = train.refinement_loss(Outputs(refined), batch_of(labels, target), **options)
    torch.testing.assert_close(loss, expected[budget.name])
    # The mask is applied at inference.
    labels[:, 3] = 1
    maps = refined_maps(Maps(20), x, labels, renormalize=budget.renormalize)
    assert maps[:, 3].any() and not maps[:, labels[0] == 0].any()


@row(DRS_ROWS, "refinement training")
def test_refinement_training(budget):
    recipe = budget.refine
    optimizer = train.make_optimizer(refinement_of(budget), recipe)
    assert type(optimizer) is torch.optim.Adam
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(1e-4, 0)}
    if budget.name == "paper":
        assert (recipe.batch, recipe.epochs) == (5, 15)
        assert rates(recipe, 15) == [1] * 4 + [0.1] * 5 + [0.01] * 6
        # "The same augmentation strategy as in the classification network."
        augmentation = ("resize", "crop", "flip", "jitter", "scale")
        assert all(getattr(recipe, name) == getattr(budget.classify, name) for name in augmentation)
    else:
        assert recipe.epochs == 30
        assert rates(recipe, 30) == [1] * 9 + [0.1] * 10 + [0.01] * 11
        transform = training_transform(crop=recipe.crop, resize=recipe.resize, scale=recipe.scale, flip=False)
        (image,) = transform(photos(3, 90, 120))
        assert image.shape == (3, 320, 320)  # all of it: nothing is left for a crop to do


# (map of class 1, map of class 2, saliency of 255): the label by the paper and by the release.
PIXELS = [
    ((0.5, 0.1), 200, 1, 1),
    ((0.3, 0.6), 200, 2, 2),
    ((0.1, 0.1), 200, 255, 255),  # no object cue, salient
    ((0.1, 0.1), 5, 0, 0),
    ((0.1, 0.1), 40, 255, 0),  # 40/255 lies between beta and the release's 50/255
    ((0.5, 0.1), 40, 1, 0),
    ((0.5, 0.1), 50, 1, 0),  # "> 50"
    ((0.5, 0.1), 51, 1, 1),
    ((0.19, 0.0), 200, 255, 255),
    ((0.95, 0.95), 200, 1, 1),  # two of 21 channels above 0.9
    ((0.95, 0.95), 20, 1, 255),  # three: background's is 1
]


@row(DRS_ROWS, "pseudo labels")
def test_pseudo_labels(budget):
    assert (budget.alpha, budget.beta) == (0.2, 0.06)
    assert budget.rule == budget.name
    maps = torch.tensor([scores for scores, *_ in PIXELS]).T[None, :, None]
    saliency = torch.tensor([value for _, value, *_ in PIXELS], dtype=torch.uint8)[None, None]
    expected = [pixel[2 if budget.name == "paper" else 3] for pixel in PIXELS]
    rule = dict(alpha=budget.alpha, beta=budget.beta, rule=budget.rule, conflict=budget.conflict)
    assert pseudo_labels(maps, saliency, **rule).flatten().tolist() == expected


@row(DRS_ROWS, "both cues at once")
def test_both_cues_at_once(budget):
    rule = dict(alpha=budget.alpha, beta=budget.beta, rule=budget.rule, conflict=budget.conflict)
    for score in (0.5, 1.0):
        maps, saliency = torch.tensor([score, 0.0])[None, :, None, None], torch.zeros(1, 1, 1)
        assert pseudo_labels(maps, saliency, **rule).item() == 0
    assert "both cues at once" in NOT_THE_RELEASE_S
    with pytest.raises(ValueError, match=r"maps must lie in \[0, 1\]"):
        pseudo_labels(maps * 1.2, saliency, **rule)
    model = Maps(2)
    model.conv.bias.data.fill_(3.0)
    assert refined_maps(model, noise(1, 3, 16, 16) * 0, torch.ones(1, 2)).max() == 1


@row(DRS_ROWS, "checkpoint kept")
def test_checkpoint_kept(monkeypatch):
    assert "checkpoint kept" in NOT_THE_RELEASE_S
    built, heads = [], []
    build = networks.classifier

    def keep(*args, **options):
        built.append(build(*args, **options))
        return built[-1]

    monkeypatch.setattr(networks, "classifier", keep)
    recipe = ClassifyRecipe.laptop().replace(weights=None, epochs=3, batch=4)
    dataset = TinyDataset(length=8, size=32, forbid_masks=True)
    model, history = train.train_classifier(
        recipe,
        dataset,
        device="cpu",
        progress=lambda *_: heads.append(built[-1].head.weight.detach().clone()),
    )
    assert len(history) == 3 and len(heads) == 3 * 2
    assert torch.equal(model.head.weight, heads[-1])
    assert not any(torch.equal(model.head.weight, head) for head in heads[:-1])


@row(DRS_ROWS, "classification accuracy")
def test_classification_accuracy(budget, voc_tree):
    logits = torch.tensor([[2.0, -1, 0], [2, 1, -1], [-1, -1, -1], [3, -3, 3]])
    labels = torch.tensor([[1.0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 0, 0]])
    # A sigmoid of 0.5 counts; one wrong label of three is a wrong image.
    assert exact_match_accuracy(logits, labels) == 2 / 4
    data = open_data("voc", budget, str(voc_tree))
    assert isinstance(data.accuracy_images, VOC2012)
    assert (data.train.split, data.accuracy_images.split) == ("trainaug", "train")
    assert VOC_LIST_SIZES["train"] == 1_464


# The three networks of Table 4: the keys of a budget, in the table's order.

NETWORKS = ("largefov", "largefov_resnet", "aspp")


@pytest.fixture(params=NETWORKS)
def network(request):
    return request.param


def deeplab_of(recipe):
    with torch.device("meta"):
        return networks.deeplab(recipe.kind, recipe.backbone, 21)


@row(DEEPLAB_ROWS, "network")
def test_network(budget, network):
    model = deeplab_of(budget.segment(network)).eval()
    image = torch.empty(1, 3, 321, 321, device="meta")
    assert model.score(image).shape == (1, 21, 41, 41)
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
        assert layers[layer][0].conv2.dilation == (max(dilation // 2, 1),) * 2
    assert layers["maxpool"].ceil_mode == (network == "aspp")
    model.layers.caffe_style = True
    assert [layers[f"layer{i}"][0].conv2.dilation for i in (3, 4)] == [(2, 2), (4, 4)]
    if network == "largefov_resnet":
        words = in_words(module for module in model.head if not isinstance(module, (nn.ReLU, nn.Dropout2d)))
        assert words == "conv1024 d12 1x1 1024 1x1 21"
        return
    assert in_words(model.head) == "conv21 d6 conv21 d12 conv21 d18 conv21 d24"
    torch.manual_seed(0)
    head, x = networks.ASPP(16, 21, networks.ASPP_RATES["resnet101"]), noise(1, 16, 9, 9)
    torch.testing.assert_close(head(x), sum(branch(x) for branch in head))
    for branch in head:
        assert branch.weight.std().item() == pytest.approx(0.01, rel=0.05) and not branch.bias.any()


@row(DEEPLAB_ROWS, "multi-scale in training")
def test_multi_scale_in_training(budget, network):
    recipe = budget.segment(network)
    assert deeplab_of(recipe).scales == ((1, 0.75, 0.5) if network == "aspp" else (1,))
    # The losses of the three scales and of their maximum are summed.
    torch.manual_seed(0)
    model = networks.deeplab(recipe.kind, "mini", 21).eval()
    labels = photos(2, 64, 64) % 21
    batch = train.Batch(torch.arange(2), noise(2, 3, 64, 64), None, labels)
    with torch.no_grad():
        logits = model.training_logits(batch.images)
        sizes = [scale.shape[-1] for scale in logits]
        assert sizes == ([8, 6, 4, 8] if network == "aspp" else [8])
        losses = [train.segmentation_loss(Outputs(scale), batch) for scale in logits]
        torch.testing.assert_close(train.segmentation_loss(model, batch), sum(losses))
        if network == "aspp":
            resized = [F.interpolate(scale, (8, 8), mode="bilinear") for scale in logits[:3]]
            torch.testing.assert_close(logits[3], torch.stack(resized).amax(0))


@row(DEEPLAB_ROWS, "iterations x batch")
def test_iterations_and_batch(budget, network):
    recipe = budget.segment(network)
    assert recipe.steps(10_582)[1] == 20_000
    assert (recipe.batch, recipe.accumulate) == ((5, 2) if network == "aspp" else (10, 1))
    assert recipe.schedule == "poly"
    if network == "largefov":
        other = recipe.replace(iterations=6_000, batch=30, schedule="step", milestones=(4_000, 5_000))
        factors = [other.lr_factor(step, 352, 6_000) for step in (0, 3_999, 4_000, 4_999, 5_000, 5_999)]
        assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@row(DEEPLAB_ROWS, "lr")
def test_lr(budget, network):
    recipe = budget.segment(network)
    groups = {g["name"]: g for g in train.make_optimizer(deeplab_of(recipe), recipe).param_groups}
    found = {name: group["lr"] for name, group in groups.items()}
    base = {"largefov": 1e-3, "largefov_resnet": 2.5e-4, "aspp": 2.5e-4}[network]
    expected = {"pretrained weights": base, "new weights": 10 * base, "new biases": 20 * base}
    if network == "largefov":
        expected["pretrained biases"] = 2 * base
        assert groups["pretrained biases"]["weight_decay"] == groups["new biases"]["weight_decay"] == 0
    assert found == pytest.approx(expected)
    every = 10 if network == "aspp" else 1
    for step in (0, 9, 10, 12_345, 19_999):
        factor = recipe.lr_factor(step, 1_058, 20_000)
        assert factor == pytest.approx((1 - step // every * every / 20_000) ** 0.9)


@row(DEEPLAB_ROWS, "momentum, weight decay")
def test_momentum_and_weight_decay(budget, network):
    recipe = budget.segment(network)
    optimizer = train.make_optimizer(deeplab_of(recipe), recipe)
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"]) == (0.9, False)
        if group["name"].endswith("weights"):
            assert group["weight_decay"] == 5e-4


@row(DEEPLAB_ROWS, "crop, random scale")
def test_crop_and_random_scale(budget, network):
    recipe = budget.segment(network)
    assert recipe.crop == 321
    torch.manual_seed(0)
    scaled = training_transform(scale=recipe.scale, flip=False)
    sides = {scaled(photos(3, 40, 40))[0].shape[-1] for _ in range(80)}
    if network == "aspp":
        assert sides == {20, 30, 40, 50, 60}
    else:
        assert len(sides) > 20 and 20 <= min(sides) < 25 and 55 < max(sides) <= 60
    options = dict(crop=recipe.crop, scale=recipe.scale, flip=recipe.flip, jitter=recipe.jitter)
    image, labels = training_transform(**options)(
        photos(3, 100, 120), torch.ones(100, 120, dtype=torch.uint8)
    )
    assert image.shape[1:] == labels.shape == (321, 321) and labels[-1, -1] == 255


@row(DEEPLAB_ROWS, "label size in the loss")
def test_label_size_in_the_loss(budget, network):
    assert budget.segment(network).loss_size == "logits"
    labels = photos(2, 24, 24) % 21
    labels[:, 12:] = 255
    logits = [noise(2, 21, 6, 6), noise(2, 21, 4, 4)]
    found = train.segmentation_loss(Outputs(*logits), batch_of(extra=labels))
    expected = 0
    for scale in logits:
        cell = 24 // scale.shape[-1]
        nearest = labels[:, cell // 2 :: cell, cell // 2 :: cell].long()
        expected += F.cross_entropy(scale, nearest, ignore_index=255)
    torch.testing.assert_close(found, expected)
    if network == "largefov_resnet":  # either
        at_image = F.interpolate(logits[0], (24, 24), mode="bilinear")
        found = train.segmentation_loss(Outputs(logits[0]), batch_of(extra=labels), size="image")
        torch.testing.assert_close(found, F.cross_entropy(at_image, labels.long(), ignore_index=255))
        budget.segment(network).replace(loss_size="image")  # is not refused


@row(DEEPLAB_ROWS, "batch norm")
def test_batch_norm(budget, network):
    model = deeplab_of(budget.segment(network)).train()
    frozen = [m for m in model.modules() if isinstance(m, torchvision.ops.FrozenBatchNorm2d)]
    assert len(frozen) == (0 if network == "largefov" else 104)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert not any(True for norm in frozen for _ in norm.parameters())


@row(DEEPLAB_ROWS, "initial weights")
def test_initial_weights(budget, network):
    recipe = budget.segment(network)
    coco = budget.name == "release" and network == "aspp"
    assert recipe.weights == ("coco" if coco else "pretrained")
    downloads = weights._DOWNLOADS
    assert "IMAGENET" in downloads[recipe.backbone, "pretrained"].name
    if network != "largefov":
        assert "COCO" in downloads[recipe.backbone, "coco"].name
    # A file's path will do as well; deeplabv1_resnet101-coco.pth is read in tests/lib/test_weights.py.
    with pytest.raises(FileNotFoundError, match="no weights file elsewhere.pth"):
        networks.deeplab(recipe.kind, "mini", 21, weights="elsewhere.pth")


@row(DEEPLAB_ROWS, "inference")
def test_inference(budget, network):
    torch.manual_seed(0)
    model = networks.deeplab(budget.segment(network).kind, "mini", 4).eval()
    dataset = TinyDataset(length=2, size=50)
    predictions = train.predict_segmentation(model, dataset, output="probabilities")
    for index, found in predictions:
        with torch.no_grad():
            whole = normalize(dataset[index][0])[None]
            sides = (50, 37, 25) if network == "aspp" else (50,)
            scales = [
                model.score(whole if s == 50 else F.interpolate(whole, scale_factor=f, mode="bilinear"))
                for s, f in zip(sides, (1, 0.75, 0.5), strict=False)
            ]
            size = scales[0].shape[-2:]
            logits = torch.stack([F.interpolate(s, size, mode="bilinear") for s in scales]).amax(0)
            logits = F.interpolate(logits, (50, 50), mode="bilinear", align_corners=False)
        np.testing.assert_allclose(found, logits.softmax(1)[0].numpy(), rtol=1e-3, atol=1e-5)
    assert index == 1


@row(DEEPLAB_ROWS, "CRF, 10 iterations")
def test_crf(budget, network):
    widths = {
        "largefov": (3, 3, 140, 5, 5),
        "largefov_resnet": (3, 3, 121, 5, 4),
        "aspp": (1, 3, 67, 3, 4),
    }[network]
    assert budget.crf(network) == CRFConfig(10, *widths)
    # It is never handed a mean-subtracted image.
    with pytest.raises(ValueError, match="0..255 scale"):
        dense_crf(np.full((2, 4, 4), 0.5), np.zeros((4, 4, 3), np.float32))


@row(DEEPLAB_ROWS, "fully supervised val mIoU without / with CRF")
def test_fully_supervised_is_a_row_of_table_4(budget, network):
    # A result, for VOC and a GPU: what is tested is that the row is there to be run, for each network.
    configurations = [table_row.configuration for table_row in table_rows(4)]
    supervised = [c for c in configurations if c is not None and c.supervised and c.network == network]
    assert len(supervised) == 1
    assert budget.segment(supervised[0].network).iterations == 20_000


def test_parameter_groups_are_not_empty_under_a_wrapper(budget, network):
    """A known bug of code that picks groups by names, which a data-parallel wrapper changes."""
    recipe = budget.segment(network)
    model = deeplab_of(recipe)
    before = [len(group["params"]) for group in train.parameter_groups(model, recipe)]
    wrapped = nn.DataParallel(model)
    assert all(name.startswith("module.") for name, _ in wrapped.named_parameters())
    groups = train.parameter_groups(wrapped.module, recipe)
    assert [len(group["params"]) for group in groups] == before and min(before) > 0
    assert sum(before) == sum(p.requires_grad for p in wrapped.parameters())


def test_the_tables_are_whole():
    drs = (
        "backbone; where DRS sits; suppressor; learnable controller; parameters; init; loss; optimiser; "
        "schedule; batch; augmentation; localization map; inference scales; refinement target; "
        "refinement network; refinement training; pseudo labels; both cues at once; checkpoint kept; "
        "classification accuracy"
    )
    deeplab = (
        "network; multi-scale in training; iterations x batch; lr; momentum, weight decay; "
        "crop, random scale; label size in the loss; batch norm; initial weights; inference; "
        "CRF, 10 iterations; fully supervised val mIoU without / with CRF"
    )
    assert (list(DRS_ROWS), list(DEEPLAB_ROWS)) == (drs.split("; "), deeplab.split("; "))
    assert set(NOT_THE_RELEASE_S) < set(DRS_ROWS) | set(DEEPLAB_ROWS)
