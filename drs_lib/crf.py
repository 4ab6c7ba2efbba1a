"""Dense CRF (Krähenbühl and Koltun 2011) over segmentation probabilities: on all cores, or on a GPU.

Two engines do the same mean field. "lattice" is pydensecrf, which filters on a lattice: quick on a processor,
what the paper's numbers were made with, and the default on every machine. "attention"
(`drs_lib.crf_attention`) computes the kernels as they are: quick on a GPU, about a hundred times slower than
the other on a processor, and in need of nothing but PyTorch. They agree on nearly all pixels; that they score
the same mIoU on VOC nobody has measured, so "attention" has to be named.

This module imports no torch: its worker processes load it, and a worker needs only NumPy and pydensecrf.
"""

from __future__ import annotations

import math
import multiprocessing
from collections import deque
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import numpy as np

from drs_lib.arguments import whole

INSTALL_HINT = (
    "The CRF needs pydensecrf, which is not installed or does not load. "
    "With pip: `pip install pydensecrf2` (it is compiled on your machine, about a minute, and needs a C++ "
    "compiler). With conda: `conda install -c conda-forge pydensecrf` (not built for Apple Silicon: there "
    "use pip inside the environment, with conda's cxx-compiler). Everything but the CRF columns works "
    "without it; so does engine='attention', slowly on a processor."
)
ENGINES = ("lattice", "attention")


@dataclass(frozen=True)
class CRFConfig:
    """Widths (standard deviations) and weights of the two kernels, as in DeepLab; Potts compatibility.

    The smoothness kernel sees positions (``gaussian_sxy`` pixels), the appearance kernel positions
    (``bilateral_sxy`` pixels) and colours (``bilateral_srgb``, on the 0..255 scale). The defaults are those
    of DeepLab-LargeFOV with VGG-16; the presets carry the names of Table 4's three networks.
    """

    iterations: int = 10
    gaussian_sxy: float = 3
    gaussian_weight: float = 3
    bilateral_sxy: float = 140
    bilateral_srgb: float = 5
    bilateral_weight: float = 5

    LARGEFOV_VGG16: ClassVar[CRFConfig]
    LARGEFOV_RESNET101: ClassVar[CRFConfig]
    ASPP_RESNET101: ClassVar[CRFConfig]

    def __post_init__(self):
        object.__setattr__(self, "iterations", whole("iterations", self.iterations, least=0))
        for name in ("gaussian_sxy", "bilateral_sxy", "bilateral_srgb"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} is the width of a kernel and must be positive; got {getattr(self, name)!r}."
                )
        for name in ("gaussian_weight", "bilateral_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 (kernel off) or positive; got {getattr(self, name)!r}.")


CRFConfig.LARGEFOV_VGG16 = CRFConfig()
CRFConfig.LARGEFOV_RESNET101 = CRFConfig(bilateral_sxy=121, bilateral_weight=4)
CRFConfig.ASPP_RESNET101 = CRFConfig(gaussian_sxy=1, bilateral_sxy=67, bilateral_srgb=3, bilateral_weight=4)


def available():
    """Whether pydensecrf can be imported; where not, `INSTALL_HINT` says what to do."""
    try:
        import_module("pydensecrf.densecrf")
    except ImportError:
        return False
    return True


def dense_crf(probabilities, image, config=CRFConfig.LARGEFOV_VGG16, engine="lattice", device=None):
    """Mean-field inference in the fully connected CRF, from a network's probabilities and the image.

    Args:
        probabilities: (C, H, W) floats, a softmax over C labels, background included.
        image: (H, W, 3) uint8 RGB, the original image: not normalised, not mean-subtracted.
        config: kernels and number of iterations.
        engine: "lattice" or "attention", which computes on the device, None being the processor.

    Returns:
        float32 array (C, H, W), the refined probabilities. The same input gives the same bytes.

    Raises:
        ValueError: shapes or values that are not the above, an unknown engine.
        RuntimeError: pydensecrf is missing.
    """
    _expect_usable(engine)
    return _refined(*_checked(probabilities, image), config, engine, device)


def crf_over(items, config=CRFConfig.LARGEFOV_VGG16, jobs=None, progress=True, engine="lattice", device=None):
    """Dense CRF over many images; a list of uint8 label maps (H, W), each the most probable of the C labels.

    Args:
        items: iterable of ``(probabilities, image)`` as `dense_crf` takes them. A generator is read in the
            calling thread, only a few images ahead, so that memory stays flat.
        jobs: number of processes; None: one per core, or a single one inside a worker process. One job starts
            no process. The number changes nothing in the result. "attention" starts none either.
        progress: show a progress bar.
        engine, device: as for `dense_crf`.

    Raises:
        ValueError: as `dense_crf`, with the item's number, or for ``jobs``.
        RuntimeError: pydensecrf is missing.
    """
    return list(iterate_crf(items, config, jobs, progress, engine, device))


def iterate_crf(
    items, config=CRFConfig.LARGEFOV_VGG16, jobs=None, progress=True, engine="lattice", device=None
):
    """`crf_over` as a generator: label maps in the order of ``items``, each as soon as it is ready."""
    _expect_usable(engine)
    jobs = _default_jobs() if jobs is None else whole("jobs", jobs)
    return _iterate(items, (config, engine, device), 1 if engine == "attention" else jobs, progress)


def _iterate(items, how, jobs, progress):
    from tqdm.auto import tqdm

    total = len(items) if hasattr(items, "__len__") else None
    results = _serial(items, how) if jobs == 1 else _parallel(items, how, jobs)
    with tqdm(results, total=total, desc="CRF", unit="image", disable=not progress) as bar:
        yield from bar


def _serial(items, how):
    for item in _checked_items(items):
        yield _label_map(*item, *how)


def _parallel(items, how, jobs):
    # An executor rather than joblib.Parallel, which reads its input from other threads: a generator that runs
    # a network would lose torch's no_grad there, which belongs to a thread. One of its own: loky's reusable
    # executor is the one that joblib.Parallel takes for its own.
    from joblib.externals.loky import ProcessPoolExecutor

    executor = ProcessPoolExecutor(max_workers=jobs)
    pending = deque()
    try:
        for item in _checked_items(items):
            pending.append(executor.submit(_label_map, *item, *how))
            if len(pending) > 2 * jobs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, kill_workers=bool(pending))


def _checked_items(items):
    for index, item in enumerate(items):
        try:
            probabilities, image = item
            yield _checked(probabilities, image)
        except ValueError as error:
            raise ValueError(f"CRF item {index}: {error}") from error


def _label_map(*arguments):
    return _refined(*arguments).argmax(axis=0).astype(np.uint8)


def _refined(probabilities, image, config, engine, device):
    if engine == "lattice":
        return _infer(probabilities, image, config)
    from drs_lib.crf_attention import mean_field

    return mean_field(probabilities, image, config, device or "cpu").cpu().numpy()


def _infer(probabilities, image, config):
    densecrf = import_module("pydensecrf.densecrf")
    labels, height, width = probabilities.shape
    # 1e-5 is the floor of pydensecrf's own unary_from_softmax: log(0) would pin a pixel for good.
    unary = -np.log(np.clip(probabilities, 1e-5, 1)).reshape(labels, -1)
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary, dtype=np.float32))
    if config.gaussian_weight:
        crf.addPairwiseGaussian(sxy=config.gaussian_sxy, compat=config.gaussian_weight)
    if config.bilateral_weight:
        crf.addPairwiseBilateral(
            sxy=config.bilateral_sxy, srgb=config.bilateral_srgb, rgbim=image, compat=config.bilateral_weight
        )
    return np.array(crf.inference(config.iterations), dtype=np.float32).reshape(labels, height, width)


def _checked(probabilities, image):
    probabilities, image = np.asarray(probabilities), np.asarray(image)
    if image.dtype != np.uint8:
        raise ValueError(
            "the CRF compares colours on the 0..255 scale and needs the original uint8 image; got "
            f"{image.dtype}. A normalised or mean-subtracted image would silently change the kernels: pass "
            "the image as it was read."
        )
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"the image must be (H, W, 3); got shape {image.shape}. Tensors (3, H, W) need permute(1, 2, 0)."
        )
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"probabilities must be (C, H, W) at the image's size: expected (C, {image.shape[0]}, "
            f"{image.shape[1]}), got {probabilities.shape}."
        )
    if not 2 <= len(probabilities) <= 255:
        raise ValueError(
            f"the CRF chooses among 2 to 255 labels, background included; got {len(probabilities)}."
        )
    total = probabilities.sum(axis=0, dtype=np.float64)
    if not (np.all(probabilities >= 0) and np.all(np.abs(total - 1) < 1e-2)):  # also refuses NaN
        raise ValueError(
            "probabilities must be 0 or more and sum to 1 over the labels at every pixel; "
            f"got values from {probabilities.min():.4g}, sums {total.min():.4g} to {total.max():.4g}. "
            "Pass the softmax of the logits."
        )
    # pydensecrf takes no read-only image, such as np.asarray(Image.open(path)) is: copied if need be.
    return np.asarray(probabilities, dtype=np.float32), np.require(image, requirements=("C", "W"))


def _expect_usable(engine):
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(map(repr, ENGINES))}.")
    if engine == "lattice" and not available():
        raise RuntimeError(INSTALL_HINT)


def _default_jobs():
    if multiprocessing.parent_process() is not None:
        return 1
    import joblib

    return joblib.cpu_count(only_physical_cores=True)
