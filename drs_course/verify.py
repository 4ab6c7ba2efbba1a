"""The authors' released networks and labels, measured on VOC with this course's code; nothing is trained.

    python -m drs_course verify --voc-root data

Scores on VOC's own 1,464 training and 1,449 validation images, each beside what was published of it. Every
hundred images are an entry of the run store, so that an interrupted run goes on where it was, and files that
have changed are measured again. `python -m drs_course download` brings what it needs.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from drs_course.download import COMMAND, FILES, TREE, weights_file
from drs_course.store import RunStore
from drs_lib.crf import INSTALL_HINT, CRFConfig, available, iterate_crf
from drs_lib.data.voc import VOC2012, VOC_CLASSES
from drs_lib.labels import RELEASE_SALIENCY, of_classes, pseudo_labels
from drs_lib.maps import RELEASE_SCALES, iterate_present_maps
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


class _Part:
    """Some images of a data set, numbered from 0."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]

    def mask(self, index):
        return self.dataset.mask(self.indices[index])


def _confusion(dataset, found):
    """Of predicted label maps, (index, uint8 (H, W)), 255 counted as background: [(21, 21)]."""
    score = SegmentationScore(21)
    for index, labels in found:
        try:
            score.update(labels, dataset.mask(index))
        except ValueError as error:
            raise ValueError(f"{dataset.names[index]}: {error}") from error
    return [score.confusion]


def _label_path(dataset, index):
    return dataset.root / "refined_pseudo_segmentation_labels" / f"{dataset.names[index]}.png"


def _released(model, dataset, chunk, jobs):
    return _confusion(dataset, ((i, np.array(Image.open(_label_path(dataset, i)))) for i in chunk))


def _control(model, dataset, chunk, jobs):
    def found():
        for index in chunk:
            generator = np.random.default_rng([SEED, index])
            yield index, no_map(dataset.label(index), dataset.saliency(index), generator)

    return _confusion(dataset, found())


def _from_maps(model, dataset, chunk, jobs):
    def found():
        options = {"scales": RELEASE_SCALES, "resize": SIDE, "indices": chunk, "batch_size": 8}
        for index, present, maps in iterate_present_maps(model, dataset, **options):
            saliency = dataset.saliency(index)[None]
            labels = pseudo_labels(maps[None], saliency, alpha=ALPHA, rule="release")
            yield index, of_classes(labels, present.nonzero().flatten().tolist())[0]

    return _confusion(dataset, found())


def _right(model, dataset, chunk, jobs):
    """Images with all labels right, and images."""
    accuracy = evaluate_classifier(model, _Part(dataset, chunk), resize=SIDE)
    return [round(accuracy * len(chunk)), len(chunk)]


def _segmented(model, dataset, chunk, jobs):
    """Confusion without and, with pydensecrf, with the CRF: [(21, 21), (21, 21)]."""
    plain, refined, part = SegmentationScore(21), SegmentationScore(21), _Part(dataset, chunk)

    def items():
        found = predict_segmentation(model, part, batch_size=4, output="probabilities")
        for index, probabilities in found:
            plain.update(probabilities.argmax(0), part.mask(index))
            yield probabilities, part[index][0].permute(1, 2, 0).numpy()

    if not available():
        for _ in items():
            pass
        return [plain.confusion]
    config = CRFConfig.ASPP_RESNET101
    for index, labels in enumerate(iterate_crf(items(), config, jobs, progress=False, engine="lattice")):
        refined.update(labels, part.mask(index))
    return [plain.confusion, refined.confusion]


class Measure(NamedTuple):
    """One pass over a split.

    rows: what comes of it, and what was published of that. needs: keys of `FILES`. count: gives the sums that
    the rows are computed from, of some images. seconds: for an image, on two cores, and on one GPU beside 16
    cores: from the images per second in docs/voc.md, DeepLab's by its operations; the CRF by its slowest, 4.3
    s an image and core. network: what reads the weights that it needs.
    """

    rows: tuple[tuple[str, str], ...]
    split: str
    needs: tuple[str, ...]
    count: Callable
    seconds: tuple[float, float]
    network: Callable | None = None


_NOTHING = "not published"
_CLASSIFIER = partial(classifier, "vgg16", 20)
MEASURES = {
    "labels": Measure((("released pseudo labels", _NOTHING),), "train", ("labels",), _released, (0.02, 0.02)),
    "no map": Measure((("control: no map", _NOTHING),), "train", ("saliency",), _control, (0.02, 0.02)),
    "accuracy": Measure(
        (("DRS_learnable.pth, accuracy", "72.6 (paper, which does not define it)"),),
        "train", ("drs",), _right, (0.7, 0.005), _CLASSIFIER,
    ),
    "drs": Measure(
        (("DRS_learnable.pth, pseudo labels", _NOTHING),),
        "train", ("drs", "saliency"), _from_maps, (2.1, 0.01), _CLASSIFIER,
    ),
    "refine": Measure(
        (("Refine_DRS_learnable.pth, pseudo labels", _NOTHING),),
        "train", ("refine", "saliency"), _from_maps, (2.1, 0.01), partial(refinement_network, "vgg16", 20),
    ),
    "deeplab": Measure(
        (("DeepLab-v2", "69.4 (README)"), ("DeepLab-v2 with CRF", "70.4 (README; paper, Table 4)")),
        "val", ("deeplab",), _segmented, (2.6 + 4.3 / 2, 0.03 + 4.3 / 16),
        partial(deeplab, "aspp", "resnet101", 21),
    ),
}  # fmt: skip


def verify(voc_root="data", *, limit=None, jobs=None, store=None):
    """Measure what has been downloaded; prints hours beforehand, scores as they come, and a table.

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
    data = {
        split: VOC2012(voc_root, split, cache_dir=store.root / "voc-labels") for split in ("train", "val")
    }
    if data["train"].classes != VOC_CLASSES:
        raise ValueError(f"{data['train'].root} has classes of its own; the released networks know VOC's")
    passes = [_Pass(name, data[measure.split], limit, jobs, store) for name, measure in MEASURES.items()]
    print(_hours(passes))
    scores, lines = {}, []
    for one in passes:
        lacking = one.lacking()
        found = [None] * len(one.measure.rows) if lacking else one.scores()
        for (row, published), score in zip(one.measure.rows, found, strict=True):
            scores[row] = score
            value = f"{100 * score:.1f}" if score is not None else "-"
            lines.append(f"{row:42}{one.measure.split:6}{len(one):7,}{value:>7}   {published}")
            print(f"{row}: {value if score is not None else lacking or INSTALL_HINT}")
    heading = f"{'':42}{'split':6}{'images':>7}{'here':>7}   published"
    print("\n".join(["", heading, *lines, "", CONDITIONS]))
    if limit is not None:
        print(f"The first {limit} images only: not to be compared with anything.")
    return scores


def _hours(passes):
    """How long what is not measured yet will take."""
    ready = [(one, one.left()) for one in passes if not one.lacking()]
    hours = [sum(left * one.measure.seconds[k] for one, left in ready) / 3600 for k in (0, 1)]
    return (
        f"{sum(left for _, left in ready):,} images to go: {hours[0]:.2f} hours on two cores, {hours[1]:.2f} "
        f"on one GPU beside 16 cores (estimated). Every {CHUNK} images are kept."
    )


class _Pass:
    """A `Measure` over the images of its split, chunk by chunk."""

    def __init__(self, name, dataset, limit, jobs, store):
        self.name, self.measure, self.dataset = name, MEASURES[name], dataset
        self.jobs, self.store = jobs, store
        images = range(len(dataset) if limit is None else min(limit, len(dataset)))
        self.chunks = [images[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
        self._model = None

    def __len__(self):
        return sum(map(len, self.chunks))

    def lacking(self):
        """What is missing, and the command that brings it; "" if nothing."""
        missing = []
        for kind in self.measure.needs:
            try:
                if kind == "saliency":
                    self.dataset.require_saliency()
                elif kind != "labels":
                    weights_file(kind)
                elif not all(_label_path(self.dataset, i).is_file() for chunk in self.chunks for i in chunk):
                    missing.append(kind)
            except FileNotFoundError:
                missing.append(kind)
        if not missing:
            return ""
        names = " and ".join(FILES[kind].name for kind in missing)
        return f"needs {names}: '{COMMAND} --root {self.dataset.root.parent} --only {' '.join(missing)}'"

    @cached_property
    def _weights(self):
        """The file of each of the weights, and its hash."""
        files = {kind: weights_file(kind) for kind in self.measure.needs if kind not in TREE}
        return {kind: (path, _digest([path])) for kind, path in files.items()}

    def _entry(self, chunk):
        """The arguments of the run store for a chunk."""
        inputs = {"data": self.dataset.fingerprint} | {kind: of for kind, (_, of) in self._weights.items()}
        if self.name == "labels":
            inputs["labels"] = _digest(_label_path(self.dataset, index) for index in chunk)
        config = {"measure": self.name, "start": chunk[0], "stop": chunk[-1] + 1}
        if self.name == "deeplab":
            config["crf"] = available()
        return "verify", config, inputs

    def left(self):
        """How many images are not measured yet."""
        made = [self.store.made_at("verify", RunStore.key(*self._entry(c), VERSION)) for c in self.chunks]
        return sum(len(chunk) for chunk, at in zip(self.chunks, made, strict=True) if at is None)

    def scores(self):
        """The fraction of each row; None of the CRF's without pydensecrf."""
        totals = 0
        with tqdm(total=len(self), desc=self.name, unit="image") as bar:
            for chunk in self.chunks:
                make = partial(self._make, chunk)
                entry = self.store.get_or_make(*self._entry(chunk), make, version=VERSION)
                totals = np.array(entry.json("counts.json")) + totals
                bar.update(len(chunk))
        self._model = None
        if self.name == "accuracy":
            return [totals[0] / totals[1]]
        return [*map(mean_iou, totals), *[None] * (len(self.measure.rows) - len(totals))]

    def _make(self, chunk, writer):
        if self._model is None and self.measure.network is not None:
            [(path, _)] = self._weights.values()
            device = pick_device()
            model = self.measure.network(weights=path).eval()
            self._model = model.to(device=device, memory_format=memory_format(device))
        counts = self.measure.count(self._model, self.dataset, chunk, self.jobs)
        writer.json("counts.json", np.array(counts).tolist())


def _digest(paths):
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
