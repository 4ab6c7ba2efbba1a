"""What each stage makes of a small fixed input, by the number of its version. The store's keys know nothing
of code: a change of what a stage makes has to raise its version, and is noticed here if it doesn't.

Numbers were worked out by hand, but for those of trainings and of the CRF, which leave room for another
processor's rounding."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import TinyDataset
from torch import nn

from drs_course import stages
from drs_course.paper import Configuration
from drs_course.stages import STAGE_VERSIONS, Pipeline, Splits
from drs_course.store import EntryWriter
from drs_lib import crf, train
from drs_lib.archives import LabelArchive, MapArchive
from drs_lib.batches import Batch
from drs_lib.data import normalize
from drs_lib.networks import RefinementNetwork
from drs_lib.recipes import ClassifyRecipe, RefineRecipe, SegmentRecipe, get_budget

TINY, SMALL = TinyDataset(8, 32), dict(weights=None, epochs=3, batch=4)
# The paper's recipes, with every choice of the release's, at a size for three epochs of two steps.
LIKE_THE_PAPER = dict(
    weights=None, backbone="mini", lr=0.01, nesterov=True, optimizer="sgd", weight_decay=0.01,
    lr_multipliers=(1, 2, 10, 20), epochs=3, iterations=None, schedule="step", milestones=(3,), batch=4,
    crop=28, jitter=(0.3, 0.3, 0.3, 0.1), threads=1, workers=0,
)  # fmt: skip
THIRDS = np.array([[3, 2, 2, 3], [1, 1, 1, 1], [2, 1, 1, 2], [3, 1, 1, 3]])
SIDES = {4: [[0, 3], [3, -3]], 8: [[3, 0], [-3, 3]]}


class Pictures:
    """Two pictures of one colour, the first's red just above ImageNet's mean, the second's just below."""

    classes, num_classes = ("a", "b"), 2
    names, fingerprint, split = ["first", "second"], "two pictures", "train"
    labels = torch.tensor([[1.0, 1.0], [0.0, 1.0]])

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.full((3, 4, 4), 124 - index, dtype=torch.uint8), self.labels[index]

    def saliency(self, index):
        return np.array([[0, 15, 16, 255]] * 4, np.uint8)

    def mask(self, index):
        return np.array([[[0, 1, 1, 1], [255, 1, 2, 2]][index]] * 4, np.uint8)


class Known(nn.Module):
    """A network whose answers to the two pictures are known, by the side of its input."""

    def __init__(self, answers):
        nn.Module.__init__(self)
        self.answers, self.parameter = answers, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        answers = torch.tensor(self.answers[x.shape[-1]], dtype=torch.float32)
        return answers[(x[:, 0].mean((1, 2)) < 0).long()]

    def training_logits(self, x):
        return [self(x), self(x)]


class KnownClassifier(Known):
    class_maps = Known.forward


class KnownRefined(Known, RefinementNetwork):
    """The same as a refinement network."""


class Line(Pipeline):
    """A pipeline whose networks and pseudo labels are given."""

    def __init__(self, tmp_path, answers=None, labels=None, **changes):
        sizes = dict(resize=4, scales=(4, 8), alpha=0.5, refined_alpha=0.5)
        budget = get_budget("ci").replace(**sizes, **changes)
        super().__init__(Splits("two", Pictures(), Pictures()), budget, store=tmp_path, device="cpu")
        self.known, self.refined, self.given = KnownClassifier(answers), KnownRefined(answers), labels

    def classifier(self, configuration, overwrite=False):
        return self.known

    segmentation_network = classifier

    def refinement_network(self, configuration, overwrite=False):
        return self.refined

    def labels(self, configuration):
        return self.given

    def made(self, stage, refine=False):
        writer = EntryWriter(self.store.root)
        planned = self.stage(stage, Configuration(refine=refine))
        stages.STAGES[stage][1](self, planned, writer)
        return self.store.root


def batch(labels, extra=None):
    return Batch(None, normalize(torch.stack([Pictures()[index][0] for index in (0, 1)])), labels, extra)


def losses(training, recipes, *arguments):
    histories = [training(recipe, TINY, *arguments, device="cpu", progress=False)[1] for recipe in recipes]
    return [epoch["loss"] for history in histories for epoch in history]


def scores(folder, *names):
    found = json.loads((folder / "scores.json").read_text())
    return [found[name] for name in names]


# Class a's map has the above corners at one scale and their mirror image at the other; together, in thirds,
# THIRDS. Class b's is high in the first picture's first row, and the second's is class a's first scale alone.
MAPS = {side: [[corners, [[3, 3], [-6, -6]]], [[[9, 9]] * 2, SIDES[4]]] for side, corners in SIDES.items()}
FIRST_ROW = np.array([[3, 3, 3, 3], *[[0, 0, 0, 0]] * 3])
ONE_SCALE = np.array([[0, 1, 2, 3], [1, 1, 1, 1], [2, 1, 0, 0], [3, 1, 0, 0]])
THIRDS_ALONE, FIRST_ROW_ALONE = THIRDS.copy(), FIRST_ROW.copy()
# Where only the larger of the two stays, the first of equal.
THIRDS_ALONE[0, 1:3] = FIRST_ROW_ALONE[0, ::3] = 0
NOTHING = np.zeros((4, 4))
TARGETS = [THIRDS, FIRST_ROW, NOTHING, ONE_SCALE, THIRDS_ALONE, FIRST_ROW_ALONE, NOTHING, ONE_SCALE]


def classify(tmp_path):
    answers = {4: [[0, math.log(3)], [-math.log(3), 0]]}
    loss = train.classification_loss(Known(answers), batch(torch.tensor([[1.0, 1.0], [1.0, 0.0]])))
    recipes = ClassifyRecipe(**LIKE_THE_PAPER), ClassifyRecipe.laptop().replace(**SMALL, delta=0.55)
    return [loss.item(), *losses(train.train_classifier, recipes)]


def refine(tmp_path):
    refined, target = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 3, 3)
    refined[0, 0, 0, 1], target[0, 0, 0, 2], target[0, 0, 1, 1] = 1, 0.5, 0.9
    one = Batch(None, None, torch.tensor([[1.0, 0.0]]), target)
    by = [{}, {"label_mask": True}, {"size": "image"}]
    found = [train.refinement_loss(lambda images: refined, one, **options).item() for options in by]
    targets = [np.stack([mask == c for c in (1, 2, 3)]).astype(np.float32) for mask in TINY.masks]
    recipes = RefineRecipe(**LIKE_THE_PAPER), RefineRecipe.laptop().replace(**SMALL)
    return [*found, *losses(train.train_refinement, recipes, targets)]


def segment(tmp_path):
    labels = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    labels[:, 1, 1] = labels[:, 3, 3] = 1
    labels[:, 3, 1] = labels[:, 0, 0] = 0
    network = Known({4: [[[[0, 0], [0, 0]], [[math.log(3)] * 2] * 2]] * 2})
    both = batch(None, labels)
    found = [train.segmentation_loss(network, both, size).item() for size in ("logits", "image")]
    paper = SegmentRecipe(**LIKE_THE_PAPER, scale=(0.5, 1.5))
    recipes = paper, SegmentRecipe.laptop("aspp", "mini").replace(**SMALL)
    return [*found, *losses(train.train_segmentation, recipes, TINY.masks)]


def accuracy(tmp_path):
    # At a sigmoid of exactly 0.5 a class counts as there.
    line = Line(tmp_path, {4: [[0, 2], [-0.1, -0.1]]})
    return scores(line.made("accuracy"), "accuracy")


def map_score(tmp_path):
    folder = Line(tmp_path, MAPS).made("map_score")
    return scores(folder, "recall", "precision", "iou", "on_object", "on_background")


def target(tmp_path):
    found = []
    for kind in ("maps", "largest"):
        folder = Line(tmp_path, MAPS, target=kind).made("target", refine=True)
        found += MapArchive(folder / "maps.zip", json.loads((folder / "classes.json").read_text()), 2)
    return np.ravel(found)


def labels(tmp_path):
    found = []
    for rule in ("paper", "release"):
        found += LabelArchive(Line(tmp_path, MAPS, rule=rule).made("labels") / "labels.zip")
    # Refined, in rows: 0.6 of a, and of b 2, 2/3, -2/3 and -2, which is cut at 1 and 0.
    flat = [[0.6, 0.6], [0.6, 0.6]], [[2, 2], [-2, -2]], [[0.4, 0.4], [0.4, 0.4]]
    line = Line(tmp_path, dict.fromkeys((4, 8), [flat[:2], flat[2:] * 2]))
    return np.ravel([*found, *LabelArchive(line.made("labels", refine=True) / "labels.zip")])


def label_score(tmp_path):
    labels = [np.array([[0, 1, 2, 255]] * 4, np.uint8)] * 2
    return scores(Line(tmp_path, labels=labels).made("label_score"), "miou", "miou_claimed")


# Upsampled, -1 and 4 become -1, 0.25, 2.75 and 4: the class has three of the four columns.
RISING, LOW, ZERO = [[-1, 4]] * 2, [[-9, -9]] * 2, [[0, 0]] * 2
LOGITS = {4: [[ZERO, RISING, LOW], [ZERO, LOW, RISING]]}


def evaluate(tmp_path):
    return scores(Line(tmp_path, LOGITS).made("evaluate"), "miou")


def evaluate_crf(tmp_path):
    pytest.importorskip("pydensecrf")
    # So smooth that every picture becomes one class. Then the values themselves.
    smooth = crf.CRFConfig(gaussian_sxy=10, gaussian_weight=50)
    y, x = np.mgrid[:6, :8]
    image = np.stack([30 * x, 20 * y, 10 * (x + y)], axis=2).astype(np.uint8)
    likely = np.exp([0 * x, np.sin(x * y), np.cos(x + 2 * y)])
    weights = dict(gaussian_sxy=1, gaussian_weight=2, bilateral_sxy=4, bilateral_srgb=30)
    config = crf.CRFConfig(iterations=3, **weights)
    found = scores(Line(tmp_path, LOGITS, crf_largefov=smooth).made("evaluate_crf"), "miou")
    return found + crf.dense_crf(likely / likely.sum(0), image, config)[:, 2:4, 5].ravel().tolist()


STAGES = dict(
    classify=classify, accuracy=accuracy, map_score=map_score, target=target, refine=refine, labels=labels,
    label_score=label_score, segment=segment, evaluate=evaluate, evaluate_crf=evaluate_crf,
)  # fmt: skip
LOG2, LOG3, LOG4 = (math.log(n) for n in (2, 3, 4))
# By stage and version. A new version's values stand beside its number, in place of the old one's.
EXPECTED = {
    ("classify", 1): [
        (2 * LOG2 + LOG4 - LOG3 + LOG4) / 4,
        *(0.684769, 0.606404, 0.544376, 0.689972, 0.619007, 0.558399),
    ],
    ("accuracy", 1): [1 / 2],
    ("map_score", 1): [1 / 3, 23 / 48, 1 / 4, 59 / 144, 1 / 2],
    ("target", 1): np.ravel(TARGETS) / 3,
    ("refine", 1): [
        *(1 / 32, 1 / 16, 1.1725 / 18),
        *(0.0549489, 0.0395843, 0.0421841, 0.0382821, 0.0279696, 0.0210254),
    ],
    ("labels", 1): np.ravel(
        [
            [[0, 0, 2, 1], [0, 0, 255, 255], [0, 0, 255, 1], [0, 0, 255, 1]],
            [[0, 0, 2, 2], [0, 0, 255, 255], [0, 0, 255, 255], [0, 0, 255, 255]],
            [[255, 0, 0, 1], [0, 0, 0, 255], [0, 0, 0, 1], [0, 0, 0, 1]],
            [[0, 0, 0, 2], [0, 0, 0, 255], [0, 0, 0, 255], [0, 0, 0, 255]],
            [[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1]],
            [[0, 0, 255, 255]] * 4,
        ]
    ),
    ("label_score", 1): [7 / 18, 13 / 18],
    ("segment", 1): [
        *(2 * (3 * LOG4 - 2 * LOG3) / 3, 2 * (4 * LOG4 - 2 * LOG3) / 4),
        *(1.30745, 1.01384, 0.778692, 4.31471, 3.76261, 3.23098),
    ],
    ("evaluate", 1): [29 / 36],
    ("evaluate_crf", 1): [19 / 45, 0.272092, 0.148274, 0.220261, 0.496958, 0.507647, 0.354768],
}


@pytest.mark.parametrize("stage", STAGE_VERSIONS)
def test_a_stage_makes_what_its_version_stands_for(stage, tmp_path):
    version = STAGE_VERSIONS[stage]
    found = np.array(STAGES[stage](tmp_path), float)
    assert (stage, version) in EXPECTED, (
        f"STAGE_VERSIONS[{stage!r}] is {version}: enter in EXPECTED what that version makes, {found.tolist()}"
    )
    expected = np.array(EXPECTED[stage, version], float)
    assert found.shape == expected.shape and np.allclose(found, expected, rtol=2e-3, atol=1e-5), (
        f"version {version} of the stage {stage!r} makes {expected.tolist()} of this input, the code now "
        f"{found.tolist()}. If that is meant, raise STAGE_VERSIONS[{stage!r}] in drs_course/stages.py, or "
        "stored results of the old code are shown for the new one's, and enter the new values in EXPECTED."
    )
