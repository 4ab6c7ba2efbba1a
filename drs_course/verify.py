"""The authors' released networks and labels, measured on VOC with this course's code; nothing is trained.

    python -m drs_course verify --voc-root data

Scores on VOC's own 1,464 training and 1,449 validation images, each beside what was published of it. Every
hundred images are an entry of the run store, so that an interrupted run goes on where it was, and files that
have changed are measured again. `python -m drs_course download` brings what it needs.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Subset
from tqdm.auto import tqdm

from drs_course.download import COMMAND, FILES, TREE, weights_file
from drs_course.store import RunStore
from drs_lib.crf import INSTALL_HINT, CRFConfig, available, iterate_crf
from drs_lib.data.voc import VOC2012, VOC_CLASSES
from drs_lib.labels import RELEASE_SALIENCY, of_classes, pseudo_labels
from drs_lib.maps import RELEASE_SCALES, iterate_maps
from drs_lib.metrics import SegmentationScore, mean_iou
from drs_lib.networks import classifier, deeplab, refinement_network
from drs_lib.runtime import memory_format, pick_device
from drs_lib.train import evaluate_classifier, predict_segmentation

VERSION = 1  # raised when the code changes a count
CHUNK = 100  # images
SIDE = 320  # of the square that images are resized to for the VGG-16 networks, as in the release
ALPHA = 0.2  # the release's, of both kinds of maps
SEED = 0  # of the control
CONDITIONS = (
    f"mIoU and accuracy in percent. Maps: scales {', '.join(map(str, RELEASE_SCALES))} of images of {SIDE} x "
    f"{SIDE}. Pseudo labels: the release's rule, threshold {ALPHA}, saliency {RELEASE_SALIENCY}/255; ignored "
    "pixels count as background. Accuracy: all 20 labels right. DeepLab-v2: whole images, scales 1, 0.75 and "
    "0.5; CRF by pydensecrf, 10 iterations. No map: salient pixels get one of the image's classes at random."
)


def no_map(labels, saliency, generator):
    """The control that asks no classifier: every pixel that saliency does not call background gets one of the
    image's classes, drawn at random.

    labels: multi-hot (C,). saliency: uint8 (H, W). Returns uint8 (H, W): 0 background, 1..C.
    """
    result = np.zeros(saliency.shape, np.uint8)
    classes = np.flatnonzero(labels) + 1
    salient = saliency > RELEASE_SALIENCY
    if len(classes):
        result[salient] = generator.choice(classes, int(salient.sum()))
    return result


def _label_path(dataset, index):
    return dataset.root / "refined_pseudo_segmentation_labels" / f"{dataset.names[index]}.png"


# What is measured: a network or None, a data set, and the numbers of some of its images go in; label maps by
# image number, or the sums that the scores are computed from, come out.


def _released(model, dataset, chunk):
    for index in chunk:
        yield index, np.array(Image.open(_label_path(dataset, index)))


def _control(model, dataset, chunk):
    for index in chunk:
        generator = np.random.default_rng([SEED, index])
        yield index, no_map(dataset.label(index), dataset.saliency(index), generator)


def _from_maps(model, dataset, chunk):
    options = {"scales": RELEASE_SCALES, "resize": SIDE, "indices": chunk, "batch_size": 8}
    for index, present, maps in iterate_maps(model, dataset, present_only=True, **options):
        saliency = dataset.saliency(index)[None]
        labels = pseudo_labels(maps[None], saliency, alpha=ALPHA, rule="release")
        yield index, of_classes(labels, present.nonzero().flatten().tolist())[0]


def _confusion(find, model, dataset, chunk, jobs):
    """Of label maps, 255 counted as background: [(21, 21)]."""
    score = SegmentationScore(21)
    for index, labels in find(model, dataset, chunk):
        try:
            score.update(labels, dataset.mask(index))
        except ValueError as error:
            raise ValueError(f"{dataset.names[index]}: {error}") from error
    return [score.confusion]


def _right(model, dataset, chunk, jobs):
    """Images with all labels right, and images."""
    accuracy = evaluate_classifier(model, Subset(dataset, chunk), resize=SIDE)
    return [round(accuracy * len(chunk)), len(chunk)]


def _segmented(model, dataset, chunk, jobs):
    """Confusion without and, with pydensecrf, with the CRF: [(21, 21), (21, 21)]."""
    plain, refined = SegmentationScore(21), SegmentationScore(21)

    def items():
        found = predict_segmentation(model, Subset(dataset, chunk), batch_size=4, output="probabilities")
        for number, probabilities in found:
            plain.update(probabilities.argmax(0), dataset.mask(chunk[number]))
            yield probabilities, dataset[chunk[number]][0].permute(1, 2, 0).numpy()

    if not available():
        deque(items(), maxlen=0)
        return [plain.confusion]
    found = iterate_crf(items(), CRFConfig.ASPP_RESNET101, jobs)
    for index, labels in zip(chunk, found, strict=True):
        refined.update(labels, dataset.mask(index))
    return [plain.confusion, refined.confusion]


class Measure(NamedTuple):
    """One pass over a split. rows: what comes of it, and what was published. needs: keys of `FILES`. count:
    gives the sums that the rows are computed from, of some images. network: what reads the weights that it
    needs."""

    rows: dict[str, str]
    split: str
    needs: tuple[str, ...]
    count: Callable
    network: Callable | None = None


_CONTROL, _RELEASED, _LABELS = (partial(_confusion, find) for find in (_control, _released, _from_maps))
_CLASSIFIER, _REFINEMENT = partial(classifier, "vgg16", 20), partial(refinement_network, "vgg16", 20)
_DEEPLAB = partial(deeplab, "aspp", "resnet101", 21)
NOT = "not published"
_ACCURACY = {"DRS_learnable.pth, accuracy": "72.6 (paper, which does not define it)"}
_DRS, _REFINE = {"DRS_learnable.pth, pseudo labels": NOT}, {"Refine_DRS_learnable.pth, pseudo labels": NOT}
_CRF = {"DeepLab-v2": "69.4 (README)", "DeepLab-v2 with CRF": "70.4 (README; paper, Table 4)"}
MEASURES = {
    "labels": Measure({"released pseudo labels": NOT}, "train", ("labels",), _RELEASED),
    "no map": Measure({"control: no map": NOT}, "train", ("saliency",), _CONTROL),
    "accuracy": Measure(_ACCURACY, "train", ("drs",), _right, _CLASSIFIER),
    "drs": Measure(_DRS, "train", ("drs", "saliency"), _LABELS, _CLASSIFIER),
    "refine": Measure(_REFINE, "train", ("refine", "saliency"), _LABELS, _REFINEMENT),
    "deeplab": Measure(_CRF, "val", ("deeplab",), _segmented, _DEEPLAB),
}


def verify(voc_root="data", *, limit=None, jobs=None, store=None):
    """Measure what has been downloaded; prints scores as they come, and a table.

    Args:
        voc_root: the folder VOC 2012 is in.
        limit: the first images of each split only, for a try.
        jobs: processes for the CRF; None: one per core.
        store: a `RunStore`, or its folder.

    Returns:
        {row: fraction}, None for what lacks a file; what it lacks is printed with the command that brings it.

    Raises:
        FileNotFoundError, ValueError: there is no VOC 2012, or a file is not what it should be.
    """
    store = store if isinstance(store, RunStore) else RunStore(store)
    data = {split: VOC2012(voc_root, split) for split in ("train", "val")}
    if data["train"].classes != VOC_CLASSES:
        raise ValueError(f"{data['train'].root} has classes of its own; the released networks know VOC's")
    ranges = {split: range(min(limit or len(found), len(found))) for split, found in data.items()}
    scores, lines = {}, []
    for name, measure in MEASURES.items():
        dataset, images = data[measure.split], ranges[measure.split]
        lacking = _lacking(measure, dataset, images)
        found = [None] * len(measure.rows) if lacking else _scores(name, dataset, images, jobs, store)
        for (row, published), score in zip(measure.rows.items(), found, strict=True):
            scores[row] = score
            value = f"{100 * score:.1f}" if score is not None else "-"
            lines.append(f"{row:42}{measure.split:6}{len(images):7,}{value:>7}   {published}")
            print(f"{row}: {value if score is not None else lacking or INSTALL_HINT}")
    heading = f"{'':42}{'split':6}{'images':>7}{'here':>7}   published"
    print("\n".join(["", heading, *lines, "", CONDITIONS]))
    if limit is not None:
        print(f"The first {limit} images only: not to be compared with anything.")
    return scores


def _lacking(measure, dataset, images):
    """What is missing, and the command that brings it; "" if nothing."""
    missing = []
    for kind in measure.needs:
        try:
            if kind == "saliency":
                dataset.require_saliency()
            elif kind != "labels":
                weights_file(kind)
            elif not all(_label_path(dataset, index).is_file() for index in images):
                missing.append(kind)
        except FileNotFoundError:
            missing.append(kind)
    if not missing:
        return ""
    names = " and ".join(FILES[kind].name for kind in missing)
    return f"needs {names}: '{COMMAND} --root {dataset.root.parent} --only {' '.join(missing)}'"


def _scores(name, dataset, images, jobs, store):
    """The fraction of each row; None of the CRF's without pydensecrf. Every `CHUNK` images are kept."""
    measure, model, totals = MEASURES[name], None, 0
    weights = {kind: weights_file(kind) for kind in measure.needs if kind not in TREE}
    read = {"data": dataset.fingerprint} | {kind: _digest([path]) for kind, path in weights.items()}

    def make(writer):
        nonlocal model
        if model is None and measure.network is not None:
            [path], device = weights.values(), pick_device()
            model = measure.network(weights=path).eval()
            model.to(device=device, memory_format=memory_format(device))
        writer.json("counts.json", np.array(measure.count(model, dataset, chunk, jobs)).tolist())

    with tqdm(total=len(images), desc=name, unit="image") as bar:
        for start in range(0, len(images), CHUNK):
            chunk = images[start : start + CHUNK]
            config = {"measure": name, "start": chunk[0], "stop": chunk[-1] + 1}
            if name == "deeplab":
                config["crf"] = available()
            labels = {"labels": _digest(_label_path(dataset, i) for i in chunk)} if name == "labels" else {}
            entry = store.get_or_make("verify", config, read | labels, make, version=VERSION)
            totals = np.array(entry.json("counts.json")) + totals
            bar.update(len(chunk))
    if name == "accuracy":
        return [totals[0] / totals[1]]
    return [*map(mean_iou, totals), *[None] * (len(measure.rows) - len(totals))]


def _digest(paths):
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
