"""Dense CRF (Krähenbühl and Koltun 2011) over segmentation probabilities, by pydensecrf, on all cores."""

from __future__ import annotations

import math
import multiprocessing
from collections import deque
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from drs_lib.arguments import whole

INSTALL_HINT = (
    "The CRF needs pydensecrf, which is not installed or does not load. "
    "With pip: `pip install pydensecrf2` (it is compiled on your machine, about a minute, and needs a C++ "
    "compiler). With conda: `conda install -c conda-forge pydensecrf` (not built for Apple Silicon: there "
    "use pip inside the environment, with conda's cxx-compiler). Everything but the CRF columns works "
    "without it."
)


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
        import pydensecrf.densecrf  # noqa: F401
    except ImportError:
        return False
    return True


def dense_crf(probabilities, image, config=CRFConfig.LARGEFOV_VGG16):
    """Mean-field inference in the fully connected CRF, from a network's probabilities and the image.

    Args:
        probabilities: (C, H, W) floats, a softmax over C labels, background included.
        image: (H, W, 3) uint8 RGB, the original image: not normalised, not mean-subtracted.
        config: kernels and number of iterations.

    Returns:
        float32 array (C, H, W), the refined probabilities. The same input gives the same bytes.

    Raises:
        ValueError: shapes or values that are not the above.
        RuntimeError: pydensecrf is missing.
    """
    return _mean_field(config)(*_checked(probabilities, image))


def iterate_crf(items, config=CRFConfig.LARGEFOV_VGG16, jobs=None):
    """Dense CRF over many images.

    Args:
        items: iterable of ``(probabilities, image)`` as `dense_crf` takes them. A generator is read in the
            calling thread, only a few images ahead, so that memory stays flat.
        jobs: number of processes; None: one per core, or a single one inside a worker process. One job starts
            no process. The number changes nothing in the result.

    Yields:
        Label maps uint8 (H, W), each pixel's most probable of the C labels, in the order of ``items``.

    Raises:
        ValueError: as `dense_crf`, with the item's number, while iterating; or for ``jobs``.
        RuntimeError: pydensecrf is missing.
    """
    jobs = _default_jobs() if jobs is None else whole("jobs", jobs)
    mean_field = _mean_field(config, most_probable=True)
    if jobs > 1:
        return _parallel(items, mean_field, jobs)
    return (mean_field(*item) for item in _all_checked(items))


def _mean_field(config, most_probable=False):
    """A function from checked probabilities and an image to refined ones, or to a label map."""
    if not available():
        raise RuntimeError(INSTALL_HINT)
    options = asdict(config)

    # Made here, of plain values, because such a function is sent to a worker process as it is: the worker
    # loads NumPy and pydensecrf, but not this package, whose torch takes seconds.
    def mean_field(probabilities, image):
        from pydensecrf.densecrf import DenseCRF2D

        labels, height, width = probabilities.shape
        # 1e-5 is the floor of pydensecrf's own unary_from_softmax: log(0) would pin a pixel for good.
        unary = -np.log(np.clip(probabilities, 1e-5, 1)).reshape(labels, -1)
        crf = DenseCRF2D(width, height, labels)
        crf.setUnaryEnergy(np.ascontiguousarray(unary, dtype=np.float32))
        if options["gaussian_weight"]:
            crf.addPairwiseGaussian(sxy=options["gaussian_sxy"], compat=options["gaussian_weight"])
        if options["bilateral_weight"]:
            widths = {"sxy": options["bilateral_sxy"], "srgb": options["bilateral_srgb"]}
            crf.addPairwiseBilateral(rgbim=image, compat=options["bilateral_weight"], **widths)
        refined = np.array(crf.inference(options["iterations"]), np.float32).reshape(labels, height, width)
        return refined.argmax(axis=0).astype(np.uint8) if most_probable else refined

    return mean_field


def _parallel(items, function, jobs):
    # An executor rather than joblib.Parallel, which reads its input from other threads: a generator that runs
    # a network would lose torch's no_grad there, which belongs to a thread. One of its own: loky's reusable
    # executor is the one that joblib.Parallel takes for its own.
    from joblib.externals.loky import ProcessPoolExecutor

    executor = ProcessPoolExecutor(max_workers=jobs)
    pending = deque()
    try:
        for item in _all_checked(items):
            pending.append(executor.submit(function, *item))
            if len(pending) > 2 * jobs:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, kill_workers=bool(pending))


def _default_jobs():
    if multiprocessing.parent_process() is not None:
        return 1
    import joblib

    return joblib.cpu_count(only_physical_cores=True)


def _all_checked(items):
    for index, item in enumerate(items):
        try:
            probabilities, image = item
            yield _checked(probabilities, image)
        except ValueError as error:
            raise ValueError(f"CRF item {index}: {error}") from error


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
