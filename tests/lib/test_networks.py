import copy
import math
import pickle
from functools import partial
from urllib.error import URLError

import pytest
import torch
import torchvision
from released import vgg16_features
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from drs_lib import networks, weights
from drs_lib.drs import DRS
from drs_lib.networks import classifier, deeplab, refinement_network
from drs_lib.weights import body_state_dict, load_weights

SMALL_DEEPLABS = [(kind, backbone) for kind in ("largefov", "aspp") for backbone in ("mini", "mini_resnet")]


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs).eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def images(size=64, n=2, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def seeded(build, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build(*args, **kwargs)


def shuffle_norms(network):
    """Batch norm statistics and affine parameters that make a difference, as after training."""
    for name, module in network.named_modules():
        if isinstance(module, (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d)):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                if name.endswith("bn3"):
                    module.weight.mul_(0.1)  # or the signal of 33 random blocks in a row explodes
    return network.eval()


@pytest.fixture(scope="module")
def resnet101():
    return seeded(deeplab, "aspp", "resnet101", 3)


# The numbers the paper and the release state.


def test_resnet101_deeplabs_train_the_convolutions_and_the_head_alone():
    with torch.device("meta"):
        resnet = torchvision.models.resnet101()
    convolutions = sum(m.weight.numel() for m in resnet.modules() if isinstance(m, nn.Conv2d))
    large_fov = (2048 * 1024 * 9 + 1024) + (1024 * 1024 + 1024) + (1024 * 21 + 21)
    assert count(on_meta(deeplab, "largefov", "resnet101", 21)) == convolutions + large_fov
    assert count(on_meta(deeplab, "aspp", "resnet101", 21)) == convolutions + 4 * (2048 * 21 * 9 + 21)


@pytest.mark.parametrize("size, expected", [(321, 41), (320, 40)])
@pytest.mark.parametrize(
    "build, args",
    [
        (deeplab, ("largefov", "resnet101", 21)),
        (classifier, ("mini", 6)),
        (deeplab, ("largefov", "mini_resnet", 7)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else value.__name__,
)
def test_output_stride_is_eight_rounded_up(build, args, size, expected):
    maps = on_meta(build, *args).score(torch.empty(1, 3, size, size, device="meta"))
    assert maps.shape == (1, args[-1], expected, expected)


def test_aspp_scores_three_scales_and_their_maximum_at_the_finest_size():
    logits = on_meta(deeplab, "aspp", "resnet101", 21).training_logits(
        torch.empty(2, 3, 321, 321, device="meta")
    )
    assert [tuple(t.shape) for t in logits] == [(2, 21, s, s) for s in (41, 31, 21, 41)]


# Where things sit.


@pytest.mark.parametrize("backbone, per_layer", [("vgg16", (2, 2, 3, 3, 3, 3)), ("mini", (1, 1, 1, 1, 2, 2))])
@pytest.mark.parametrize("drs_layers", [(), (6,), (5, 6), {1, 2, 3, 4}, (1, 2, 3, 4, 5, 6)], ids=str)
def test_drs_takes_the_place_of_the_relus_of_the_chosen_layers(backbone, per_layer, drs_layers):
    network = on_meta(classifier, backbone, 6, drs_layers=iter(drs_layers), delta=0.5)
    for number, (layer, modules) in enumerate(zip(network.layers, per_layer, strict=True), 1):
        plugged, other = (DRS, nn.ReLU) if number in drs_layers else (nn.ReLU, DRS)
        kinds = [type(module) for module in layer]
        assert kinds.count(plugged) == modules and other not in kinds


# What the networks compute, against formulas of their own.


@pytest.mark.parametrize("delta", [0.55, None])
def test_mini_classifier_computes_figure_3a(delta):
    network = shuffle_norms(seeded(classifier, "mini", 6, drs_layers=(2, 5, 6), delta=delta)).double()
    state = network.state_dict()
    x, outputs, pool = images(50).double(), [], False
    for number, (_, depth, stride, pool_after) in enumerate(networks.MINI, 1):
        name = f"layers.layer{number}"
        x = F.max_pool2d(x, 2, ceil_mode=True) if pool else x
        for j in range(1, depth + 1):
            x = F.conv2d(x, state[f"{name}.conv{j}.weight"], stride=stride if j == 1 else 1, padding=1)
            mean, var, scale, shift = (
                state[f"{name}.norm{j}.{k}"][:, None, None]
                for k in ("running_mean", "running_var", "weight", "bias")
            )
            x = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)
            if number in (2, 5, 6):
                control = delta
                if delta is None:
                    linear = next(v for k, v in state.items() if k.startswith(f"{name}.drs{j}."))
                    control = (x.mean((2, 3)) @ linear.T).sigmoid()[..., None, None]
                x = torch.minimum(x, x.amax((2, 3), keepdim=True) * control)
        outputs.append(x)
        pool = pool_after
    maps = (
        torch.einsum("nkhw,ck->nchw", x, state["head.weight"][..., 0, 0]) + state["head.bias"][:, None, None]
    )
    with torch.no_grad():
        torch.testing.assert_close(network.class_maps(images(50).double()), maps)
        torch.testing.assert_close(network(images(50).double()), maps.mean((2, 3)))
        torch.testing.assert_close(network.layer_outputs(images(50).double()), outputs)


def test_refinement_network_is_the_plain_classifiers_body_and_linear(thin_vgg16):
    plain = seeded(classifier, "vgg16", 3, drs_layers=()).eval()
    refine = refinement_network("vgg16", 3).eval()
    refine.load_state_dict(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(refine(images(32)), plain.class_maps(images(32)))
        assert (refine(images(32)) < 0).any()


def test_vgg16_body_is_torchvisions_up_to_pool4(thin_vgg16, tmp_path):
    features = seeded(vgg16_features).eval()
    state = {f"features.{k}": v for k, v in features.state_dict().items()}
    state["classifier.0.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "vgg16.pth")
    network = classifier("vgg16", 3, drs_layers=(), weights=tmp_path / "vgg16.pth").eval()
    with torch.no_grad():
        outputs = network.layer_outputs(images(32))
        for output, end in zip(outputs[:4], (4, 9, 16, 23), strict=True):
            torch.testing.assert_close(output, features[:end](images(32)))
        x = F.max_pool2d(outputs[3], 3, 1, 1)
        for i in (24, 26, 28):
            x = F.conv2d(x, features[i].weight, features[i].bias, padding=2, dilation=2).relu()
        torch.testing.assert_close(outputs[4], x)
    largefov = deeplab("largefov", "vgg16", 4, weights=tmp_path / "vgg16.pth")
    torch.testing.assert_close(largefov.layers[4].conv3.weight, features[28].weight)


def test_resnet101_body_is_torchvisions_with_frozen_norms(resnet101, monkeypatch):
    torch.manual_seed(1)
    reference = torchvision.models.resnet101(replace_stride_with_dilation=[False, True, True])
    state = shuffle_norms(reference).state_dict()
    backbone = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    files = {
        "resnet101-63fe2227.pth": state,
        "deeplabv3_resnet101_coco-586e9e4e.pth": {**backbone, "classifier.4.weight": torch.zeros(1)},
    }
    monkeypatch.setattr(weights, "_download", lambda weights: files[weights.url.rpartition("/")[2]])
    network = load_weights(copy.deepcopy(resnet101), "pretrained").eval()
    getter = torchvision.models._utils.IntermediateLayerGetter(reference, {"layer4": "out"})
    with torch.no_grad():
        expected = getter(images(33, 1))["out"]  # 33 pixels: the ceil-mode stem pool makes no difference
        torch.testing.assert_close(network.layers(images(33, 1)), expected, rtol=1e-4, atol=1e-4)
    pretrained = {name: tensor.clone() for name, tensor in network.layers.state_dict().items()}
    nn.init.zeros_(network.layers.conv1.weight)
    load_weights(network, "coco")
    assert all(torch.equal(tensor, pretrained[name]) for name, tensor in network.layers.state_dict().items())


def test_resnet101_batch_norm_stays_frozen_in_training(resnet101):
    network = shuffle_norms(copy.deepcopy(resnet101)).train()
    norms = {k: v.clone() for k, v in network.layers.state_dict().items() if "bn" in k or "downsample.1" in k}
    assert len(norms) == 4 * 104
    stem = network.layers.conv1.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, weight_decay=0.1)
    network.score(images(32)).square().mean().backward()
    optimizer.step()
    after = network.layers.state_dict()
    assert all(torch.equal(after[k], v) for k, v in norms.items())
    assert not torch.equal(network.layers.conv1.weight, stem)
    with torch.no_grad():
        batched, alone = network.layers(images(32)), network.layers(images(32)[:1])
    torch.testing.assert_close(batched[:1], alone)


@pytest.mark.parametrize("backbone", ["mini", "mini_resnet"])
def test_aspp_sums_its_branches_and_fuses_three_scales(backbone):
    network = shuffle_norms(seeded(deeplab, "aspp", backbone, 7))
    x = images(64)
    with torch.no_grad():
        expected = []
        for scale in (1, 0.75, 0.5):
            side = int(64 * scale)
            features = network.layers(F.interpolate(x, (side, side), mode="bilinear", align_corners=False))
            expected.append(
                sum(
                    F.conv2d(features, branch.weight, branch.bias, padding=rate, dilation=rate)
                    for branch, rate in zip(network.head, (1, 2, 4, 6), strict=True)
                )
            )
        upsampled = [F.interpolate(e, (8, 8), mode="bilinear", align_corners=False) for e in expected]
        expected.append(torch.stack(upsampled).max(0).values)
        assert not torch.equal(expected[-1], expected[0])
        torch.testing.assert_close(network.training_logits(x), expected)
        torch.testing.assert_close(network(x), expected[-1])


@pytest.mark.parametrize("backbone", ["mini", "mini_resnet"])
def test_largefov_has_one_logit_map_and_drops_whole_channels_in_training_only(backbone):
    network = seeded(deeplab, "largefov", backbone, 7).eval()
    (logits,) = network.training_logits(images())
    torch.testing.assert_close(network(images()), logits)
    network.head.train()
    assert not torch.equal(network.head(network.layers(images())), logits)


def test_mini_resnet_blocks_add_their_shortcut():
    block = shuffle_norms(networks.ResidualBlock(4, 4, stride=1, dilation=2))
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        first = block.convs[1](F.conv2d(x, block.convs[0].weight, padding=2, dilation=2)).relu()
        second = block.convs[4](F.conv2d(first, block.convs[3].weight, padding=2, dilation=2))
        torch.testing.assert_close(block(x), (x + second).relu())


# Initial values.


def test_refinement_and_deeplab_heads_start_from_a_hundredth(resnet101):
    refine = seeded(refinement_network, "vgg16", 20)
    new = [m for module in refine.new_modules() for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert len(new) == 4
    new += list(resnet101.head)
    new.append(seeded(deeplab, "largefov", "vgg16", 21).head.fc6)
    for conv in new:
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert not conv.bias.any()
    assert refine.layers[4].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.03)


# What counts as new, and what travels as pretrained.


@pytest.mark.parametrize(
    "network, fresh",
    [
        (on_meta(classifier, "vgg16", 20), {"layers.layer6", "head"}),
        (on_meta(classifier, "vgg16", 20, drs_layers=(1, 6), delta=0.5), {"layers.layer6", "head"}),
        (on_meta(classifier, "mini", 6), {"head"}),
        (on_meta(refinement_network, "vgg16", 20), {"layers.layer6", "head"}),
        (on_meta(refinement_network, "mini", 6), {"head"}),
        (on_meta(deeplab, "largefov", "vgg16", 21), {"head"}),
        (on_meta(deeplab, "aspp", "resnet101", 21), {"head"}),
        (on_meta(deeplab, "aspp", "mini_resnet", 7), {"head"}),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.backbone}" if isinstance(value, nn.Module) else "",
)
def test_new_modules_and_body_divide_the_parameters(network, fresh):
    names = {id(p): n for n, p in network.named_parameters()}
    listed = [names[id(p)] for module in network.new_modules() for p in module.parameters()]
    assert len(set(listed)) == len(listed)
    pretrained = {n for n in names.values() if n not in listed}
    controllers = {n for n in names.values() if ".drs" in n}
    assert set(listed) == {n for n in names.values() if n.startswith(tuple(fresh))} | controllers
    assert all(any(True for _ in module.parameters()) for module in network.new_modules())
    body = {n for n in network.body.state_dict(prefix="layers.") if ".drs" not in n}
    assert pretrained <= body


@pytest.mark.parametrize("backbone", ["mini", "mini_resnet"])
def test_a_pretrained_body_reaches_every_network_on_its_backbone(backbone, tmp_path):
    builds = [partial(deeplab, kind, backbone, 7) for kind in ("largefov", "aspp")]
    if backbone == "mini":
        builds = [partial(classifier, "mini", 6, ()), partial(refinement_network, "mini", 6), *builds]
    source = shuffle_norms(seeded(builds[0]))
    state = body_state_dict(source.to(memory_format=torch.channels_last))
    path = tmp_path / f"{backbone}.safetensors"
    save_file(state, path)
    for build in builds:
        ours = body_state_dict(build(weights=path))
        assert set(ours) <= set(state)
        assert all(torch.equal(state[name], tensor) for name, tensor in ours.items())
    with torch.no_grad():
        found = build(weights=str(path)).eval().layers(images())
        torch.testing.assert_close(found, source.layers[:5](images()))


def test_pretrained_means_the_shipped_file_for_mini(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mini.safetensors.*drs_course.pretrain"):
        classifier("mini", 6, weights="pretrained")
    source = seeded(classifier, "mini", 12)
    save_file(body_state_dict(source), tmp_path / "mini.safetensors")
    network = classifier("mini", 6, weights="pretrained")
    assert torch.equal(network.layers[3].conv1.weight, source.layers[3].conv1.weight)


def test_a_state_dict_that_does_not_fit_is_named(tmp_path):
    state = body_state_dict(classifier("mini", 6, drs_layers=()))
    broken = {k: v for k, v in state.items() if "layer2.norm1" not in k}
    broken["layers.layer1.conv1.weight"] = torch.zeros(1, 3, 3, 3)
    broken["layers.layer3.stray"] = torch.zeros(1)
    save_file(broken, tmp_path / "broken.safetensors")
    before = seeded(classifier, "mini", 6)
    after = copy.deepcopy(before)
    with pytest.raises(ValueError) as error:
        load_weights(after, tmp_path / "broken.safetensors")
    message = str(error.value)
    assert "broken.safetensors does not fit the body of 'mini', which has 48 entries" in message
    missing = (f"layers.layer2.norm1.{name}" for name in ("weight", "bias", "running_mean"))
    assert f"5 missing: {', '.join(missing)}, ..." in message
    assert "1 unexpected: layers.layer3.stray" in message
    assert "1 mis-shaped: layers.layer1.conv1.weight (1, 3, 3, 3) instead of (16, 3, 3, 3)" in message
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_unreadable_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file nowhere.pth"):
        classifier("mini", 6, weights="nowhere.pth")
    with pytest.raises(FileNotFoundError, match=r"'coco' \(resnet101\)"):
        classifier("mini", 6, weights="coco")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold a dictionary of tensors"):
        classifier("mini", 6, weights=tmp_path / "other.pth")


@pytest.mark.parametrize(
    "build, file",
    [
        (lambda: classifier("vgg16", 3, weights="pretrained"), "vgg16-397923af.pth"),
        (lambda: deeplab("aspp", "resnet101", 3, weights="pretrained"), "resnet101-63fe2227.pth"),
        (lambda: deeplab("largefov", "resnet101", 3, "coco"), "deeplabv3_resnet101_coco-586e9e4e.pth"),
    ],
    ids=["vgg16", "resnet101", "coco"],
)
def test_without_a_connection_the_error_says_which_file_goes_where(
    build, file, thin_vgg16, tmp_path, monkeypatch
):
    def offline(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(RuntimeError, match="no route to host") as error, torch.device("meta"):
        build()
    assert f"put {file} into {tmp_path / 'checkpoints'}, or pass weights=" in str(error.value)


# How networks are used.


SMALL_NETWORKS = {
    "classifier-learnable": lambda: classifier("mini", 6),
    "classifier-constant": lambda: classifier("mini", 6, delta=0.55),
    "classifier-cam": lambda: classifier("mini", 6, drs_layers=()),
    "refinement": lambda: refinement_network("mini", 6),
    **{f"{k}-{b}": lambda k=k, b=b: deeplab(k, b, 6) for k, b in SMALL_DEEPLABS},
}


@pytest.fixture(params=SMALL_NETWORKS)
def small(request):
    return shuffle_norms(seeded(SMALL_NETWORKS[request.param]))


def test_memory_format_changes_nothing(small):
    expected = small(images()).detach()
    network = copy.deepcopy(small).to(memory_format=torch.channels_last)
    with torch.no_grad():
        output = network(images().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_autocast(small):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = small(images())
        output.float().square().mean().backward()
    expected = small(images())
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_every_parameter_trains(small):
    small.train()
    outputs = small.training_logits(images()) if hasattr(small, "training_logits") else [small(images())]
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in small.parameters())


def test_copies_are_whole(small):
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(images()), small(images()))
        inside = {id(m) for m in twin.modules()}
        assert all(id(m) in inside for m in twin.new_modules())


def test_torch_fx_can_trace_the_plain_network():
    plain = shuffle_norms(seeded(classifier, "mini", 6, drs_layers=()))
    torch.testing.assert_close(torch.fx.symbolic_trace(plain)(images()), plain(images()))


# Bad arguments.


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: classifier("mini", 6, drs_layers=(5, 7)), "no layer 7 .* 1, 2, 3, 4, 5 and 6"),
        (lambda: classifier("mini", 6, drs_layers=(0,)), "no layer 0"),
        (lambda: classifier("mini", 6, drs_layers="6"), "no layer '6'"),
        (lambda: classifier("mini", 6, delta=1.5), "1.5"),
        (lambda: classifier("resnet101", 20), "'resnet101'.*'mini', 'vgg16'"),
        (lambda: refinement_network("mini_resnet", 20), "'mini_resnet'.*'mini', 'vgg16'"),
        (lambda: deeplab("v3", "mini", 7), "'v3'.*'largefov', 'aspp'"),
        (lambda: deeplab("aspp", "vgg16", 21), "'vgg16'.*'mini', 'mini_resnet', 'resnet101'"),
        (
            lambda: deeplab("largefov", "alexnet", 21),
            "'alexnet'.*'mini', 'mini_resnet', 'vgg16', 'resnet101'",
        ),
        (lambda: classifier("mini", 0), "num_classes holds 0: expected a whole number of 1"),
        (lambda: deeplab("largefov", "mini", 6.5), "holds 6.5"),
        (lambda: classifier("mini", 6)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "uint8.*normalize"),
        (lambda: classifier("mini", 6).layer_outputs(torch.zeros(3, 32, 32)), r"\(3, 32, 32\)"),
        (lambda: deeplab("aspp", "mini", 7)(torch.zeros(1, 4, 32, 32)), r"\(1, 4, 32, 32\)"),
    ],
)
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_one_layer_number_is_not_a_collection():
    with pytest.raises(TypeError, match="collection of layer numbers; found 6"):
        classifier("mini", 6, drs_layers=6)


def test_frozen_norm_keeps_the_precision_of_its_input():
    norm = networks.FrozenNorm(3)
    norm.weight.fill_(1.3)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = torchvision.ops.FrozenBatchNorm2d.forward(norm, x)
    assert torch.equal(norm(x), exact)
    half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=1e-2, atol=1e-2)
