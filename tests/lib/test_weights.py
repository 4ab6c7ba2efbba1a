"""Files of weights made elsewhere: the authors' release's, and the Caffe-style ResNet-101 it starts from."""

import argparse
import copy
import hashlib
import re
import types
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from released import THIN_VGG16, aspp_state, caffe_shapes, caffe_state, release_state, vgg16_features
from safetensors.torch import load_file, save_file
from tiny import TinyDataset
from torch import nn
from torch.nn import functional as F

from drs_course.checkpoint import Checkpoint
from drs_lib import weights
from drs_lib.data import IMAGENET_MEAN, normalize
from drs_lib.networks import classifier, deeplab, refinement_network
from drs_lib.recipes import SegmentRecipe
from drs_lib.train import train_segmentation
from drs_lib.weights import body_state_dict, load_weights

MARKER = "layers.caffe_style"
# RGB on the 0..255 scale; the networks themselves take BGR.
CAFFE_MEAN = torch.tensor([122.675, 116.669, 104.008])


def seeded(build, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build(*args, **kwargs)


# The Caffe-style ResNet-101. What follows redoes it from the file's names.


def caffe_image(rgb):
    """uint8 RGB (N, 3, H, W) as the file's network takes it: BGR minus its mean."""
    return (rgb.double() - CAFFE_MEAN[:, None, None]).flip(1)


def caffe_unit(state, name, x, **options):
    x = F.conv2d(x, state[f"{name}.conv.weight"].double(), **options)
    mean, var, weight, bias = (
        state[f"{name}.bn.{k}"].double() for k in ("running_mean", "running_var", "weight", "bias")
    )
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)


def caffe_features(state, image, dilated=True):
    """The body's output (N, 2048, h, w) in float64.

    The border is ImageNet's mean, as in the library; the file's own is one grey level away at most.
    """
    colour = (255 * torch.tensor(IMAGENET_MEAN, dtype=torch.float64) - CAFFE_MEAN).flip(0)[:, None, None]
    assert colour.abs().max() < 1.0001
    x = F.pad(image - colour, (3, 3, 3, 3)) + colour
    x = F.max_pool2d(caffe_unit(state, "layer1.conv1", x, stride=2).relu(), 3, 2, 1, ceil_mode=True)
    strides, dilations = ((1, 2, 1, 1), (1, 1, 2, 4)) if dilated else ((1, 2, 2, 2), (1, 1, 1, 1))
    for number, stride, dilation in zip((2, 3, 4, 5), strides, dilations, strict=True):
        block = 1
        while f"layer{number}.block{block}.reduce.conv.weight" in state:
            name, step = f"layer{number}.block{block}", stride if block == 1 else 1
            y = caffe_unit(state, f"{name}.reduce", x, stride=step).relu()
            y = caffe_unit(state, f"{name}.conv3x3", y, padding=dilation, dilation=dilation).relu()
            y = caffe_unit(state, f"{name}.increase", y)
            x = caffe_unit(state, f"{name}.shortcut", x, stride=step) if block == 1 else x
            x = (x + y).relu()
            block += 1
    return x


def photos(height, width, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.fixture
def coco(tmp_path):
    """A small deeplabv1_resnet101-coco.pth, head and counters included, and its body's entries."""
    state = caffe_state()
    tracked = {
        k.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for k in state if "mean" in k
    }
    head = {"fc.weight": torch.randn(91, 2048, 1, 1), "fc.bias": torch.zeros(91)}
    path = tmp_path / "deeplabv1_resnet101-coco.pth"
    torch.save(state | tracked | head, path)
    return path, state


def build(path=None, kind="aspp", num_classes=4):
    return seeded(deeplab, kind, "resnet101", num_classes, weights=path).eval()


def features(network, images):
    with torch.no_grad():
        return network.double().layers(normalize(images).double())


@pytest.mark.parametrize("kind, size", [("aspp", (65, 49)), ("aspp", (64, 50)), ("largefov", (65, 49))])
def test_a_caffe_style_resnet_computes_what_its_weights_were_trained_for(kind, size, coco, thin_resnet101):
    path, state = coco
    images = photos(*size)
    expected = caffe_features(state, caffe_image(images))
    ours = features(build(path, kind), images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_first_convolution_learns_as_fast_as_the_original(coco, thin_resnet101):
    path, state = coco
    images, network = photos(64, 64), build(path)
    theirs = {"layer1.conv1.conv.weight": state["layer1.conv1.conv.weight"].double().requires_grad_()}
    stem = caffe_unit(state | theirs, "layer1.conv1", caffe_image(images), stride=2, padding=3)
    (expected,) = torch.autograd.grad(stem.relu().square().mean(), theirs.values())
    network.double().layers[:2](normalize(images).double()).relu().square().mean().backward()
    found = network.layers.conv1.weight.grad.flip(1)
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("style", ["caffe", "torchvision"])
def test_dilation_computes_the_undilated_network_on_a_finer_grid(style, coco, thin_resnet101):
    path, state = coco
    images = photos(97, 65)
    if style == "caffe":
        expected = caffe_features(state, caffe_image(images), dilated=False)
        network = build(path)
    else:
        undilated = seeded(torchvision.models.resnet101, seed=1).double().eval()
        torch.save(undilated.state_dict(), path)
        network = build(path)
        with torch.no_grad():
            expected = nn.Sequential(*list(undilated.children())[:-2])(normalize(images).double())
    torch.testing.assert_close(features(network, images)[..., ::4, ::4], expected, rtol=1e-4, atol=1e-4)


def test_the_style_travels_with_the_weights(coco, thin_resnet101, tmp_path):
    source, images = build(coco[0]), photos(40, 40)
    state, body = source.state_dict(), body_state_dict(source)
    assert state[MARKER] == 1 and not any(name.endswith(MARKER) for name in dict(source.named_buffers()))
    save_file(state, tmp_path / "model.safetensors")
    torch.save(body, tmp_path / "body.pth")
    loaded, wrapped = build(), nn.DataParallel(build())
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    wrapped.load_state_dict({f"module.{name}": tensor for name, tensor in state.items()})
    read = build(tmp_path / "model.safetensors"), build(tmp_path / "body.pth", num_classes=7)
    expected = features(copy.deepcopy(source), images)
    for network in (source, loaded, wrapped.module, *read):
        assert torch.equal(features(network, images), expected)


def test_a_caffe_style_network_trains_and_goes_on_from_a_checkpoint(coco, thin_resnet101, tmp_path):
    short = dict(iterations=1, batch=2, crop=48, images="files", workers=0, lr=1e-6)
    recipe = SegmentRecipe.aspp_resnet101().replace(weights=str(coco[0]), **short)
    dataset = TinyDataset(length=4, size=48)
    model, _ = train_segmentation(recipe, dataset, dataset.masks, device="cpu", progress=False)
    assert model.layers.caffe_style
    checkpoint = Checkpoint(tmp_path / "training.pt")
    checkpoint.save({}, model=model)
    again = build()
    assert checkpoint.restore(model=again) == {} and again.layers.caffe_style
    torch.testing.assert_close(features(again, photos(40, 40)), features(model, photos(40, 40)))


def test_every_entry_of_a_state_dict_is_on_the_network_s_device(coco, thin_resnet101):
    elsewhere = build(coco[0]).to("meta")
    assert {tensor.device.type for tensor in elsewhere.state_dict().values()} == {"meta"}
    with torch.device("meta"):
        again = deeplab("aspp", "resnet101", 4)
    again.load_state_dict(elsewhere.state_dict())
    assert again.layers.caffe_style


def test_other_weights_bring_the_other_style_back(coco, thin_resnet101, tmp_path):
    plain, images = build(), photos(40, 40)
    state = plain.state_dict()
    assert MARKER not in state and not plain.layers.caffe_style
    save_file(body_state_dict(plain), tmp_path / "body.safetensors")
    one, other = build(coco[0]), build(coco[0])
    assert one.layers.caffe_style and one.body.caffe_style
    # Part of a state dict, without the body, leaves the style alone.
    one.load_state_dict({k: v for k, v in state.items() if k.startswith("head.")}, strict=False)
    assert one.layers.caffe_style
    one.load_state_dict(state)
    load_weights(other, tmp_path / "body.safetensors")
    expected = features(copy.deepcopy(plain), images)
    assert all(torch.equal(features(network, images), expected) for network in (one, other))


def test_a_style_without_its_layers_is_an_unexpected_entry(thin_resnet101):
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{MARKER}"):
        classifier("mini", 3).load_state_dict(
            classifier("mini", 3).state_dict() | {MARKER: torch.ones((), dtype=torch.uint8)}
        )


@pytest.mark.parametrize("prefix", ["base.", "scale.", "module.base."])
def test_prefixes_wrappers_heads_and_number_types(prefix, coco, thin_resnet101, tmp_path):
    path, state = coco
    expected = body_state_dict(build(path))
    state = {k: v.double() if "running" in k else v for k, v in state.items()}
    state |= {f"aspp.c{i}.weight": torch.zeros(21, 2048, 3, 3) for i in range(4)}
    state = {prefix + name: tensor for name, tensor in state.items()}
    other = tmp_path / "other.pth"
    torch.save({"state_dict": state, "iteration": 5}, other)
    found = body_state_dict(build(other))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_deeplab_v2_computes_what_its_file_s_network_does(thin_resnet101, tmp_path):
    state = caffe_state() | aspp_state(classes=4)
    path, images = tmp_path / "Deeplabv2_pseudo_segmentation_labels.pth", photos(65, 49)
    torch.save({f"base.{name}": tensor for name, tensor in state.items()}, path)
    x, logits = caffe_image(images), []
    for scale in (1, 0.75, 0.5):
        at_scale = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear")
        features = caffe_features(state, at_scale)
        heads = [
            F.conv2d(features, *(state[f"aspp.c{i}.{name}"].double() for name in ("weight", "bias")), 1, r, r)
            for i, r in enumerate((6, 12, 18, 24))
        ]
        logits.append(F.interpolate(sum(heads), (logits or [sum(heads)])[0].shape[-2:], mode="bilinear"))
    expected = torch.stack(logits).amax(0)
    with torch.no_grad():
        found = build(path).double()(normalize(images).double())
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Another head, or another number of classes: initial weights, as ever.
    for kind, classes in (("largefov", 4), ("aspp", 5)):
        fresh, read = build(None, kind, classes).head, build(path, kind, classes).head
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), read.parameters(), strict=True))


def test_the_real_file_s_names_and_shapes_fit_the_real_network(monkeypatch):
    shapes = caffe_shapes(blocks=(3, 4, 23, 3), width=64) | {"fc.weight": (91, 2048, 1, 1), "fc.bias": (91,)}
    assert len(shapes) == 5 * 104 + 2
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    monkeypatch.setattr(weights, "_read", lambda path: state)
    layers = deeplab("largefov", "resnet101", 21, weights="deeplabv1_resnet101-coco.pth").layers
    windows = {n: m for n, m in layers.named_modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))}
    halving = {name for name, module in windows.items() if module.stride in (2, (2, 2))}
    assert halving == {"conv1", "maxpool", "layer2.0.conv1", "layer2.0.downsample.0"}
    for layer, dilation in ((layers.layer1, 1), (layers.layer2, 1), (layers.layer3, 2), (layers.layer4, 4)):
        assert {block.conv2.dilation for block in layer} == {(dilation, dilation)}
        assert {block.conv2.padding for block in layer} == {(dilation, dilation)}


def test_a_caffe_file_in_the_wrong_place_is_refused(coco, thin_resnet101, thin_vgg16, tmp_path):
    path, state = coco
    for wrong in (partial(classifier, "vgg16"), partial(deeplab, "aspp", "mini_resnet")):
        with pytest.raises(ValueError, match=r"coco.pth holds a ResNet-101 .* backbone '.*': it is for deep"):
            wrong(4, weights=path)
    del state["layer1.conv1.bn.running_mean"]
    state["layer3.block1.reduce.conv.weight"] = torch.zeros(1)
    state["layer5.block9.reduce.conv.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "broken.pth")
    network = build()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError) as error:
        load_weights(network, tmp_path / "broken.pth")
    message = str(error.value)
    assert "broken.pth does not fit the body of 'resnet101'" in message
    assert "1 missing: layers.bn1.running_mean;" in message
    assert "1 unexpected: layers.layer4.8.conv1.weight;" in message
    assert "1 mis-shaped: layers.layer2.0.conv1.weight (1,) instead of (16, 256, 1, 1)" in message
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], v) for k, v in before.items())


# The release's own checkpoints.


def release_output(state, x):
    for layer, (_, depth) in enumerate(THIN_VGG16, 1):
        block, dilation = ("extra" if layer == 6 else f"layer{layer}"), 2 if layer == 5 else 1
        for j in range(1, depth + 1):
            name = f"{block}_conv{j}"
            x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], 1, dilation, dilation).relu()
            if (control := state.get(f"{block}_relu{j}.fc.0.weight")) is not None:
                control = (x.mean((2, 3)) @ control.T).sigmoid()[..., None, None]
                x = torch.minimum(x, x.amax((2, 3), keepdim=True) * control)
        if layer < 4:
            x = F.max_pool2d(x, 2)
        elif layer == 4:
            x = F.max_pool2d(x, 3, 1, 1)
    return F.conv2d(x, state["extra_conv4.weight"], state["extra_conv4.bias"])


@pytest.mark.parametrize(
    "build, controllers",
    [
        (partial(refinement_network, "vgg16", 3), False),
        (partial(classifier, "vgg16", 3), True),
        (partial(classifier, "vgg16", 3, ()), False),
    ],
    ids=["Refine_DRS_learnable.pth", "DRS_learnable.pth", "DRS with delta"],
)
def test_the_release_s_checkpoints_compute_the_same_here(build, controllers, thin_vgg16, tmp_path):
    state = release_state(controllers=controllers)
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1, momentum=0.9)
    # Kept with the weights: the optimiser, counters, and the score that chose the epoch, a NumPy number.
    checkpoint = {"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": optimizer.state_dict()}
    torch.save(checkpoint | {"epoch": 12, "iter": 9000, "miou": np.float64(0.6)}, tmp_path / "best.pth")
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    network = build(weights=tmp_path / "best.pth").eval()
    with torch.no_grad():
        torch.testing.assert_close(network.score(x), release_output(state, x))


def test_a_score_that_an_older_numpy_wrote_does_no_harm(thin_vgg16, tmp_path):
    state, path = release_state(controllers=True), tmp_path / "best.pth"
    checkpoint = {"model": state, "miou": np.float64(0.6)}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    pickled = path.read_bytes()
    for module in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        written = pickled.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module)
        assert module in written
        path.write_bytes(written)
        network = classifier("vgg16", 3, weights=path)
        assert torch.equal(network.layers[5].conv3.weight, state["extra_conv3.weight"])


def test_a_release_checkpoint_of_the_other_network_is_refused(thin_vgg16, tmp_path):
    drs, refine = tmp_path / "DRS_learnable.pth", tmp_path / "Refine_DRS_learnable.pth"
    torch.save({"model": release_state(controllers=True)}, drs)
    torch.save({"model": release_state(controllers=False)}, refine)
    for build, args, path, message in (
        (refinement_network, ("vgg16", 3), drs, "16 unexpected: layers.layer1.drs1"),
        (classifier, ("vgg16", 3), refine, "16 missing: layers.layer1.drs1"),
        (refinement_network, ("vgg16", 20), refine, "2 mis-shaped: head.weight"),
        (classifier, ("mini", 3), drs, "Classifier on 'mini'"),
    ):
        with pytest.raises(ValueError, match=message):
            build(*args, weights=path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_other_objects_in_a_file_are_not_loaded_and_the_way_round_works(zipped, thin_vgg16, tmp_path):
    path, tensors = tmp_path / "run.pth", tmp_path / "tensors.pth"
    state = release_state(controllers=True)
    contents = {"model": state, "args": argparse.Namespace(lr=0.1)}
    torch.save(contents, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"run.pth cannot be read: .*argparse\.Namespace.* weights_only=F"):
        classifier("vgg16", 3, weights=path)
    torch.save(torch.load(path, weights_only=False)["model"], tensors)
    network = classifier("vgg16", 3, weights=tensors)
    assert torch.equal(network.layers[5].conv3.weight, state["extra_conv3.weight"])


@pytest.mark.parametrize("content", [b"not weights\n", b"", b"\x80\x02.", bytes(range(256))])
@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors"])
def test_what_is_no_weights_file_at_all_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read as a dictionary of tensors"):
        classifier("mini", 3, weights=tmp_path / name)


NESTED = ("model", "state_dict")


@pytest.mark.parametrize("wrappers", [(), ("model",), ("state_dict",), NESTED, NESTED[::-1]])
def test_names_and_nesting_that_other_programs_leave_are_read(wrappers, tmp_path):
    network = seeded(classifier, "mini", 3)
    state = network.state_dict()
    state = {f"module.{k.replace('layers.', 'layers._orig_mod.', 1)}": v for k, v in state.items()}
    for wrapper in wrappers:
        state = {wrapper: state, "epoch": 3}
    torch.save(state, tmp_path / "run.pth")
    read = seeded(classifier, "mini", 3, seed=1, weights=tmp_path / "run.pth")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), read.parameters(), strict=True))


# torch hub's cache, where the library downloads to, and where its message tells people to put files.


class Runs:
    """What an attacker pickles: unpickling it makes the file `trace`."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (type(self.trace).touch, (self.trace,))


@pytest.fixture
def hub(thin_vgg16, tmp_path, monkeypatch):
    """A VGG-16 by torchvision's names; a function that writes it to torch hub's cache under a name that fits
    its hash."""
    published = types.SimpleNamespace(url="https://example.org/models/vgg16-0.pth")
    monkeypatch.setitem(weights._DOWNLOADS, ("vgg16", "pretrained"), published)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = {f"features.{k}": v for k, v in vgg16_features().state_dict().items()}

    def publish(contents=state):
        torch.save(contents, tmp_path / "new.pth")
        digest = hashlib.sha256((tmp_path / "new.pth").read_bytes()).hexdigest()
        published.url = f"https://example.org/models/vgg16-{digest[:8]}.pth"
        return (tmp_path / "new.pth").rename(tmp_path / "checkpoints" / f"vgg16-{digest[:8]}.pth")

    return state, publish


def test_a_file_of_torchvision_s_is_read_when_it_has_the_hash_of_its_name(hub):
    state, publish = hub
    path = publish()
    for source in ("pretrained", path):
        network = classifier("vgg16", 3, weights=source)
        assert torch.equal(network.layers[4].conv2.weight, state["features.26.weight"])


@pytest.mark.parametrize("damage", ["page", "cut", "other weights", "code"])
def test_another_file_of_torchvision_s_name_is_named_and_not_unpickled(hub, damage, tmp_path):
    state, publish = hub
    path, trace = publish(), tmp_path / "ran"
    if damage == "other weights":
        torch.save({name: torch.randn_like(tensor) for name, tensor in state.items()}, path)
    elif damage == "code":
        torch.save(state | {"features.0.bias": Runs(trace)}, path)
    else:
        path.write_bytes({"page": b"<html>moved</html>", "cut": path.read_bytes()[:-100]}[damage])
    for source in ("pretrained", path):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged or not .*Delete it"):
            classifier("vgg16", 3, weights=source)
    assert not trace.exists()


def test_code_does_not_run_even_where_the_hash_fits(hub, tmp_path):
    state, publish = hub
    path = publish(state | {"features.0.bias": Runs(tmp_path / "ran")})
    with pytest.raises(ValueError, match=f"{path.name} cannot be read: .* a Python object"):
        classifier("vgg16", 3, weights="pretrained")
    assert not (tmp_path / "ran").exists()


def test_a_download_with_another_hash_is_not_kept_and_the_error_says_where_the_file_goes(hub, tmp_path):
    _, publish = hub
    published = weights._DOWNLOADS["vgg16", "pretrained"]
    page = tmp_path / "vgg16-0123abcd.pth"
    page.write_text("<html>sign in</html>")
    published.url = page.as_uri()
    with pytest.raises(RuntimeError, match=f"invalid hash.*put {page.name} into .*checkpoints"):
        classifier("vgg16", 3, weights="pretrained")
    assert not list((tmp_path / "checkpoints").iterdir())
    good = publish()
    published.url = good.rename(tmp_path / good.name).as_uri()
    classifier("vgg16", 3, weights="pretrained")
    assert list((tmp_path / "checkpoints").iterdir()) == [good]
