"""Weights of a network: reads files of several origins, and says what is wrong with one that doesn't fit."""

import hashlib
import re
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models import ResNet101_Weights, VGG16_Weights
from torchvision.models.segmentation import DeepLabV3_ResNet101_Weights

from drs_lib.data import IMAGENET_MEAN, IMAGENET_STD
from drs_lib.drs import DRS

_DOWNLOADS = {
    ("vgg16", "pretrained"): VGG16_Weights.IMAGENET1K_V1,
    ("resnet101", "pretrained"): ResNet101_Weights.IMAGENET1K_V1,
    ("resnet101", "coco"): DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1,
}
# Where VGG-16's convolutions are among what torchvision calls its features.
_VGG16_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
SHIPPED = Path(__file__).with_name("shipped")

# The name under which the state dict of a body keeps that it is Caffe-style, see `DilatedResNet`.
CAFFE_STYLE = "caffe_style"
# What is subtracted from the images of a Caffe-style network, RGB on the 0..255 scale.
CAFFE_MEAN = (122.675, 116.669, 104.008)
_CAFFE_STEM = "layer1.conv1.conv.weight"
# A block's convolutions there, and what torchvision calls each and its batch norm.
_CAFFE_UNITS = {
    "reduce": {"conv": "conv1", "bn": "bn1"},
    "conv3x3": {"conv": "conv2", "bn": "bn2"},
    "increase": {"conv": "conv3", "bn": "bn3"},
    "shortcut": {"conv": "downsample.0", "bn": "downsample.1"},
}


def body_state_dict(network):
    """The pretrained layers of a network as {name: tensor}, without DRS controllers.

    This is what shipped/<backbone>.safetensors holds. The tensors are on the CPU and contiguous, as
    `safetensors.torch.save_file` wants them. A Caffe-style body's says that it is one, see `DilatedResNet`.
    """
    controllers = tuple(f"layers.{n}." for n, m in network.body.named_modules() if isinstance(m, DRS))
    state = network.body.state_dict(prefix="layers.")
    return {k: v.detach().cpu().contiguous() for k, v in state.items() if not k.startswith(controllers)}


def load_weights(network, weights):
    """Load `weights` into the network and return it.

    None: leave it as it is. "pretrained": ImageNet weights through torchvision for vgg16 and resnet101
    (downloaded once), the shipped weights for mini and mini_resnet. "coco" (resnet101): the body of
    torchvision's DeepLab-v3. Else a path of a .safetensors file, or a .pth with a state dict, by itself or as
    "model" or "state_dict" of a dict, wrapped ("module.", "_orig_mod.") or not. It is recognised by its names
    as all of this network (`state_dict`), its body (`body_state_dict`), torchvision's file for the backbone,
    or one of the files that the authors' release comes with:

    - DRS_learnable.pth and Refine_DRS_learnable.pth: vgg16's classifier and refinement network. They began as
      torchvision's VGG-16 and take the images that ours do.
    - deeplabv1_resnet101-coco.pth: initial weights of the ResNet-101, trained on COCO *with pixel masks* and
      converted from Caffe. The network becomes Caffe-style, see `DilatedResNet`; the file's own head is left
      out. Other DeepLabs converted by the same code (github.com/kazuto1011/deeplab-pytorch) are read alike.
    - the release's DeepLab-v2, trained on its pseudo labels: "aspp" on resnet101 in that code's layout. Its
      head is taken too, by a network that has the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit, holds Python objects, or bears the name of a torchvision file and is
            another one.
        RuntimeError: the download fails.
    """
    if weights is None:
        return network
    if (network.backbone, weights) in _DOWNLOADS:
        download = _DOWNLOADS[network.backbone, weights]
        state, source = _download(download), download.url.rsplit("/", 1)[-1]
    else:
        source = SHIPPED / f"{network.backbone}.safetensors" if weights == "pretrained" else Path(weights)
        state = _read(source)
    if "layer1_conv1.weight" in state:
        state = _from_release(state)
    state = _from_caffe(network, state, source)
    if any(name.startswith("head.") for name in state):
        _check_fit(network.state_dict(), state, f"{type(network).__name__} on {network.backbone!r}", source)
    else:
        # The file's body may have more layers than the network takes: DeepLab stops at layer 5.
        above = tuple(f"layers.layer{number}." for number in range(network.pretrained_layers + 1, 7))
        state = {k: v for k, v in _from_torchvision(network, state).items() if not k.startswith(above)}
        _check_fit(body_state_dict(network), state, f"the body of {network.backbone!r}", source)
    network.load_state_dict(state, strict=False)
    return network


def _from_torchvision(network, state):
    """Rename what torchvision calls the body's entries; our own names come back unchanged."""
    if network.backbone == "vgg16" and "features.0.weight" in state:
        convs = [name for name, module in network.body.named_modules() if isinstance(module, nn.Conv2d)]
        ours = {f"features.{i}": f"layers.{name}" for i, name in zip(_VGG16_CONVS, convs, strict=True)}
        state = {
            re.sub(r"features\.\d+", lambda theirs: ours.get(theirs[0], theirs[0]), k): v
            for k, v in state.items()
            if not k.startswith("classifier.")
        }
    elif network.backbone == "resnet101":
        if "backbone.conv1.weight" in state:
            state = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
        if "conv1.weight" in state:
            state = {f"layers.{k}": v for k, v in state.items() if not k.startswith("fc.")}
        state = {k: v for k, v in state.items() if not k.endswith(".num_batches_tracked")}
    return state


def _from_release(state):
    """Rename the authors' layer<i>_conv<j>, layer<i>_relu<j>.fc.0, extra_conv<j> and extra_relu<j>.fc.0."""
    pattern = re.compile(r"(?:layer([1-5])|extra)_(conv|relu)([1-3])\.(?:fc\.0\.)?(weight|bias)")
    (controller_weight,) = DRS(1).state_dict()
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("features."):  # the blocks' tensors once more
            continue
        if match := pattern.fullmatch(name):
            layer, kind, j, entry = match.groups()
            place = f"conv{j}.{entry}" if kind == "conv" else f"drs{j}.{controller_weight}"
            name = f"layers.layer{layer or 6}.{place}"
        renamed[name.replace("extra_conv4.", "head.")] = tensor
    return renamed


def _from_caffe(network, state, source):
    """Rename what deeplab-pytorch calls a Caffe model's entries, and make it take our images; other state
    dicts come back unchanged."""
    first = next((name for name in state if name.endswith(_CAFFE_STEM)), None)
    if first is None:
        return state
    if network.backbone != "resnet101":
        raise ValueError(
            f"{source} holds a ResNet-101 converted from Caffe and does not fit the backbone "
            f"{network.backbone!r}: it is for deeplab(kind, 'resnet101', ...)"
        )
    prefix = first.removesuffix(_CAFFE_STEM)  # "base." or "scale.", of a network over several scales
    block_entry = re.compile(rf"layer([2-5])\.block(\d+)\.({'|'.join(_CAFFE_UNITS)})\.(conv|bn)\.(\w+)")
    renamed, head = {f"layers.{CAFFE_STYLE}": torch.ones((), dtype=torch.uint8)}, {}
    for name, tensor in state.items():
        name = name.removeprefix(prefix)
        if name.startswith("aspp.c"):
            head[name.replace("aspp.c", "head.")] = tensor
        if name.startswith(("fc.", "aspp.")) or name.endswith(".num_batches_tracked"):
            continue
        if match := block_entry.fullmatch(name):
            layer, block, unit, kind, entry = match.groups()
            name = f"layers.layer{int(layer) - 1}.{int(block) - 1}.{_CAFFE_UNITS[unit][kind]}.{entry}"
        stem = name.replace("layer1.conv1.conv", "layers.conv1").replace("layer1.conv1.bn", "layers.bn1")
        renamed[stem] = tensor
    _check_fit(body_state_dict(network), renamed, f"the body of {network.backbone!r}", source)
    stem = ("layers.conv1.weight", "layers.bn1.weight", "layers.bn1.running_mean")
    renamed.update(zip(stem, _for_normalised_rgb(*(renamed[name] for name in stem)), strict=True))
    own = {name: v.shape for name, v in network.state_dict().items() if name.startswith("head.")}
    return renamed | (head if {name: v.shape for name, v in head.items()} == own else {})


def _for_normalised_rgb(weight, scale, running_mean):
    """A Caffe-style network's first convolution (O, 3, k, k), with its batch norm's scale and mean, for our
    images.

    It was trained on v = 255 (x std + mean) - caffe_mean with reversed channels, where x is what ours take.
    Its convolution of v is that of x with the weights reversed and times 255 std, plus a constant. Batch norm
    subtracts the constant with its mean, and takes the factor 255 std too, but for the little by which std
    differs between the channels: the weights keep their size and thus learn as fast as in the original. Only
    at the border does the result differ: outside, theirs sees the colour caffe_mean and ours ImageNet's mean,
    one grey level apart at most.
    """
    weight, scale, running_mean = weight.double().flip(1), scale.double(), running_mean.double()
    mean, std, caffe = (weight.new_tensor(values) for values in (IMAGENET_MEAN, IMAGENET_STD, CAFFE_MEAN))
    constant = torch.einsum("ocij,c->o", weight, 255 * mean - caffe)
    factor = 255 * std.mean()
    ours = weight * (std / std.mean())[:, None, None], scale * factor, (running_mean - constant) / factor
    return [tensor.float() for tensor in ours]


def _download(weights):
    name, folder = weights.url.rsplit("/", 1)[-1], Path(torch.hub.get_dir()) / "checkpoints"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(folder / name), _published_hash(name))
        except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
            raise RuntimeError(
                f"could not download {weights.url} ({error}): put {name} into {folder}, "
                "or pass weights=<path to that file>"
            ) from error
    return _read(folder / name)


def _published_hash(name):
    """The first digits of the SHA-256 that a file of torchvision's has in its name; None for other names."""
    published = any(weights.url.endswith(f"/{name}") for weights in _DOWNLOADS.values())
    return name.removesuffix(".pth").rsplit("-", 1)[-1] if published else None


def _read(path):
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights file {path}: weights is None, 'pretrained', 'coco' (resnet101) or the path of a "
            ".safetensors or .pth file; `python -m drs_course pretrain` makes those of mini and mini_resnet"
        )
    if expected := _published_hash(path.name):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(expected):
            raise ValueError(
                f"{path} is damaged or not torchvision's file of that name: {path.stat().st_size:,} bytes "
                f"whose SHA-256 begins with {found[: len(expected)]} and not with {expected}. Delete it: the "
                "next run downloads it again, or put a whole copy there"
            )
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals(_numpy_numbers()):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise errors of almost any kind
        if found := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            raise ValueError(
                f"{path} cannot be read: besides tensors it holds a Python object ({found[1]}), and loading "
                "one can run any code. If you trust where the file is from, save its tensors alone: state = "
                "torch.load(path, weights_only=False); torch.save(state['model'], 'tensors.pth'), with the "
                "key under which the state dict is; then pass that file"
            ) from error
        raise ValueError(f"{path} cannot be read as a dictionary of tensors: {error}") from error
    for wrapper in 2 * ("model", "state_dict"):  # either may lie in the other
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path} does not hold a dictionary of tensors: save model.state_dict()")
    # What DataParallel and torch.compile put into the names of what they wrap.
    return {re.sub(r"\b(?:module|_orig_mod)\.", "", name): tensor for name, tensor in state.items()}


def _numpy_numbers():
    # The release's checkpoints keep the score of their epoch, a NumPy number, beside the model.
    number, _ = np.float64(0).__reduce__()
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before and since NumPy 2
    kinds = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)]
    return [*((number, name) for name in names), np.dtype, *kinds]


def _check_fit(expected, state, what, source):
    style = f"layers.{CAFFE_STYLE}"  # either style fits the other's network, which follows its weights
    expected, state = ({k: v for k, v in entries.items() if k != style} for entries in (expected, state))
    problems = {
        "missing": [k for k in expected if k not in state],
        "unexpected": [k for k in state if k not in expected],
        "mis-shaped": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
            for k, v in expected.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    found = "; ".join(
        f"{len(names)} {problem}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for problem, names in problems.items()
        if names
    )
    if found:
        raise ValueError(f"{source} does not fit {what}, which has {len(expected)} entries. {found}")
