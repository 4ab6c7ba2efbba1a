"""The checks of the exercises: right answers are accepted, mutants rejected with a helpful sentence.

Whatever is handed in, a sentence comes back. What the checks hold for right is computed once more here.
"""

import ast
import inspect
import json
import random
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from mutants import ANSWERS, verdicts
from torch import nn

import drs_lib
from drs_course import checks
from drs_course.checks.__main__ import table
from drs_course.checks.verdict import Verdict
from drs_course.paper import Configuration, table_rows
from drs_lib import DRS, suppress
from drs_lib.labels import pseudo_labels
from drs_lib.metrics import MapScore, SegmentationScore

NAMES = sorted(checks.__all__)
BY_NAME = pytest.mark.parametrize("name", NAMES)
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def functions():
    """The names of the checks whose answer is a function that the check calls."""
    return [name for name in NAMES if re.match("a (function|class)", getattr(checks, name).exercise.answer)]


def test_every_check_has_a_table_of_answers():
    assert set(ANSWERS) == set(NAMES)
    assert all(len(answers.right) >= 3 and len(answers.wrong) >= 5 for answers in ANSWERS.values())
    assert all(len({mutant.what for mutant in a.wrong}) == len(a.wrong) for a in ANSWERS.values())


@BY_NAME
def test_right_answers_are_accepted(name):
    for answer in ANSWERS[name].right:
        assert getattr(checks, name)(answer) == "correct"


@BY_NAME
def test_mutants_are_rejected_with_a_hint(name):
    for mutant, verdict in verdicts(name):
        assert not verdict.ok, f"{mutant.what} was accepted"
        assert verdict.startswith("Not yet: ") and "can't be read" not in verdict, f"{mutant.what}: {verdict}"
        assert mutant.hint in verdict, f"{mutant.what}: {verdict}"


class Hostile:
    """Whatever is asked of it, it fails."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("no")

    __len__ = __iter__ = __float__ = __bool__ = __eq__ = __repr__ = __array__
    __hash__ = object.__hash__


class Failing(nn.Module):
    def forward(self, *args):
        raise KeyError("nothing")


HOSTILES = np.empty(1, object)
HOSTILES[0] = Hostile()
MALFORMED = [
    None, True, -3, 17.5, float("nan"), float("inf"), 1j, "", "a word", b"bytes", [], {}, set(), [None, None],
    [[1, 2], 3], {"N": 1}, ("0.64", "0.32", None), range(3), (i for i in "ab"), object(), type, print,
    torch.tensor(float("nan")), torch.rand(2, 3), torch.zeros(0), np.array(["a", "b"]), np.zeros((2, 2, 2)),
    Hostile(), Hostile, HOSTILES, Failing(), Failing, lambda: None, lambda *args: None,
    lambda *args: Hostile(), lambda *args: "text", lambda *args: torch.tensor(float("nan")),
    lambda *args: np.array([]), lambda *args: args,
    lambda *args: args[0], lambda *args: 1 / 0, lambda *args: sys.exit(1),
    lambda *args: (_ for _ in ()).throw(NotImplementedError("a hint")),
    lambda *args: torch.zeros(3, device="meta"), lambda *args: torch.zeros(2, 2).to_sparse(),
]  # fmt: skip


@BY_NAME
def test_whatever_is_handed_in_gets_a_sentence(name):
    check = getattr(checks, name)
    for answer in MALFORMED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict = check(answer)
        assert isinstance(verdict, Verdict) and not verdict.ok and len(verdict) > 20
    assert check().startswith("Not yet: this check takes one answer")
    assert check(1, 2).startswith("Not yet: this check takes one answer")


@pytest.mark.parametrize("name", functions())
def test_a_blank_of_the_handout_is_told_from_an_error(name):
    def blank(*args):
        raise NotImplementedError("Write it in three lines.")

    verdict = getattr(checks, name)(blank)
    assert "still to be written. Write it in three lines." in verdict


NO_NUMBERS = {"channel_controller", "fixed_controller", "peak_region"}


@pytest.mark.parametrize("name", [name for name in functions() if name not in NO_NUMBERS])
def test_a_result_of_nan_is_named(name):
    right = ANSWERS[name].right[0]

    def spoilt(*args):
        result = right(*args)
        if torch.is_tensor(result) and result.is_floating_point():
            return result * float("nan")
        return [float("nan")] * len(result) if isinstance(result, (tuple, list, np.ndarray)) else float("nan")

    verdict = getattr(checks, name)(spoilt)
    assert "nan" in verdict or "whole numbers" in verdict or "expected a tensor of labels" in verdict


@BY_NAME
def test_random_states_stay_and_verdicts_repeat(name):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def noisy(*args):
        return torch.rand(3), np.random.rand(3), random.random()

    answers = ANSWERS[name].right[0], ANSWERS[name].wrong[0].answer, noisy
    torch.manual_seed(1)
    before = states()
    first = [getattr(checks, name)(answer) for answer in answers]
    assert states() == before
    torch.manual_seed(2)
    assert [getattr(checks, name)(answer) for answer in answers] == first


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["suppress", "learnable_controller", "channel_controller", "mse_of_labels"])
def test_a_notebook_without_gradients_makes_no_difference(mode, name):
    with mode():
        assert getattr(checks, name)(ANSWERS[name].right[0]) == "correct"


def test_a_verdict_is_a_string_that_shows_without_quotes():
    assert repr(checks.weight_decay(0.5)) == str(checks.weight_decay(0.5)) == "correct"
    wrong = checks.suppress(lambda x, delta: x.relu())
    assert isinstance(wrong, str) and not wrong.ok
    assert max(map(len, repr(wrong).splitlines())) <= 100
    assert repr(wrong).split() == wrong.split()


def test_the_sentence_says_what_was_tried_what_came_out_and_what_was_expected():
    by_what = {(name, m.what): m.answer for name in NAMES for m in ANSWERS[name].wrong}
    assert checks.suppress(by_what["suppress", "maximum over the batch too"]) == (
        "Not yet: with x of shape (3, 4, 5, 7), float32, delta = 0.55, the result at [0, 1, 0, 5] is 2.074; "
        "expected 1.657 (39 of 420 values differ). Your result equals what comes out if the maximum is taken "
        "over the batch too, not of every image."
    )
    assert checks.algorithm_1(by_what["algorithm_1", "one maximum"]) == (
        "Not yet: with x of shape (3, 4, 5, 7) and theta of (4, 4), float32, the result at [0, 1, 0, 6] is "
        "5.87; expected 2.843 (70 of 420 values differ). Your result equals what comes out if there is one "
        "maximum for the whole batch."
    )
    assert checks.receptive_field(lambda layers: 3) == (
        "Not yet: with layers = [(3, 1, 1), (3, 1, 1), (2, 2, 1), (3, 1, 1)], the result is 3; expected 10."
    )


@BY_NAME
def test_every_check_is_documented_and_its_exercise_exists(name):
    check = getattr(checks, name)
    exercise, doc = check.exercise, inspect.getdoc(check)
    assert exercise.name == check.__name__ == name and list(inspect.signature(check).parameters) == ["answer"]
    assert f"({exercise.notebook}, " in doc and f"exercise {exercise.number})" in doc
    assert f"\n\nThe answer is {exercise.answer}." in doc
    [path] = NOTEBOOKS.glob(f"{exercise.notebook}_*.ipynb")
    begins = rf'"(\*\*(Exercise )?{exercise.number}\. |{exercise.number}\. \*\*)'
    assert re.search(begins, path.read_text(encoding="utf-8")), exercise


def test_the_list_has_every_check_and_an_unknown_one_gets_help():
    lines = table().splitlines()
    assert len(lines) == len(NAMES) and lines == sorted(lines, key=lambda line: line[:2])
    assert all(any(f" {name} " in line for line in lines) for name in NAMES)
    with pytest.raises(AttributeError, match="there is no check 'supress'; the checks are .*suppress"):
        _ = checks.supress
    assert set(NAMES) <= set(dir(checks))


def functions_of(notebook, *names):
    """Functions that a notebook defines, by name, made outside of it."""
    [path] = NOTEBOOKS.glob(f"{notebook}_*.ipynb")
    scope = {"torch": torch, "np": np, "F": F, "interpolate": F.interpolate}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and any(f"def {name}(" in source for name in names):
            for node in ast.parse(source).body:
                if isinstance(node, ast.FunctionDef) and node.name in names:
                    exec(ast.unparse(node), scope)
    return [scope[name] for name in names]


def test_the_notebooks_own_functions_are_right_answers():
    equation_1, of_size = functions_of("01", "localization_map", "map_of_image_size")
    assert checks.localization_map(equation_1) == checks.map_of_image_size(of_size) == "correct"
    algorithm1, constant = functions_of("02", "algorithm1", "my_suppress")
    assert checks.suppress(lambda x, delta: algorithm1(x, lambda X: delta)) == "correct"
    [learnable] = functions_of("03", "learnable_controller")
    assert checks.suppress(constant) == checks.learnable_controller(learnable) == "correct"
    assert checks.algorithm_1(lambda x, theta: algorithm1(x, lambda X: learnable(X, theta))) == "correct"
    [largest] = functions_of("05", "keep_largest")
    assert checks.keep_largest(largest) == "correct"
    paper, release = functions_of("06", "my_pseudo_labels", "my_release_rule")
    assert checks.pseudo_labels(paper) == checks.release_rule(release) == "correct"


# What the checks of handwork and predictions hold for right, from the library.


def test_five_by_five_is_the_map_of_notebook_02():
    source = (NOTEBOOKS / "02_drs_module.ipynb").read_text(encoding="utf-8")
    rows = re.findall(r'"    \[((?:-?\d+\.\d+, ){4}-?\d+\.\d+)\],', source)
    x = torch.tensor([[float(value) for value in row.split(", ")] for row in rows[:5]])
    x4 = x[None, None].clone().requires_grad_()
    y = suppress(x4, 0.44)
    y.sum().backward()
    suppressed = (x.relu() > 0) & (x.relu() >= y.max())
    assert checks.five_by_five((y.max(), suppressed, x4.grad.max())) == "correct"


def test_two_maps_and_the_second_one_by_the_module():
    drs = DRS(2)
    drs.controller.f.weight.data = torch.tensor([[0.4, -1.0], [0.2, 0.1]])

    def bounds(second):
        maps = torch.stack([torch.full((20,), 2.0 - 8 / 19), torch.full((20,), second - (4 - second) / 19)])
        maps[:, 0] = torch.tensor([10.0, 4.0])
        return drs(maps.view(1, 2, 4, 5)).amax((2, 3))[0].detach()

    assert checks.two_maps(bounds(0.5)) == "correct"
    assert checks.second_map("stronger" if bounds(0.8)[0] < bounds(0.5)[0] else "weaker") == "correct"


def test_soft_properties_hold():
    soft = ANSWERS["soft_suppressor"].right[0]
    x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    pool = nn.MaxPool2d(2, ceil_mode=True)
    assert torch.allclose(soft(3 * x, 0.4), 3 * soft(x, 0.4))
    assert torch.allclose(pool(soft(x, 0.4)), soft(pool(x), 0.4))
    assert checks.soft_properties(["holds", "holds"]) == "correct"


def test_weight_decay_by_the_optimiser():
    f = nn.Linear(4, 4)
    nn.init.constant_(f.bias, 3.0)
    optimiser = torch.optim.SGD(f.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(300):
        optimiser.zero_grad()
        (0 * f(torch.rand(2, 4))).sum().backward()
        optimiser.step()
    assert checks.weight_decay(torch.sigmoid(f(torch.rand(1, 4))).mean()) == "correct"


def test_deltas_of_1_and_near_0():
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert suppress(x, 1.0).equal(x.relu()) and checks.delta_one("CAM") == "correct"
    assert str(Configuration(drs_layers=())) == "CAM"
    flat = suppress(x, 1e-4) / suppress(x, 1e-4).amax((2, 3), keepdim=True)
    assert ((flat == 1) == (x > 0)).float().mean() > 0.97 and checks.delta_near_zero("flat") == "correct"


def test_shared_stages_by_their_keys(tmp_path):
    from drs_course.stages import Pipeline
    from drs_course.store import RunStore

    line = Pipeline("critters", "ci", store=RunStore(tmp_path))
    rows = [row.configuration for n in (1, 2) for row in table_rows(n) if row.configuration]
    made = {stage.key for row in rows for stage in line.stages(row)}
    stages = line.stages(Configuration(delta=0.55, refine=True))
    assert checks.shared_stages(sum(stage.key in made for stage in stages)) == "correct"
    assert ", ".join(stage.name for stage in stages[:-1]) in checks.shared_stages.__doc__


def test_a_lazy_network_on_critters():
    from drs_lib.data import Critters

    critters, score, right = Critters("val", length=40), SegmentationScore(7), 0.0
    for i in range(40):
        mask = critters.mask(i)
        score.update(np.zeros_like(mask), mask)
        right += (mask == 0).mean() / 40
    assert checks.lazy_network((right, score.compute()["miou"])) == "correct"


def test_rescaling_without_relu_raises_recall_and_lowers_precision():
    generator = torch.Generator().manual_seed(0)
    masks = (F.avg_pool2d(torch.randn(20, 1, 40, 40, generator=generator), 9, 1, 4)[:, 0] > 0.05).long()
    maps = 3 * masks[:, None] - 2 + torch.randn(20, 1, 40, 40, generator=generator)
    old, new = ANSWERS["localization_map"].right[0](maps), ANSWERS["minmax_map"].right[0](maps)
    old, new = (
        MapScore().update(found.clamp(0, 1), masks, torch.ones(20, 1)).compute() for found in (old, new)
    )
    assert new["recall"] > old["recall"] and new["precision"] < old["precision"]
    assert checks.minmax_scores(["up", "down"]) == "correct"


def test_broken_inputs_of_localization_maps():
    network = drs_lib.classifier("mini", 6, ())
    pixels = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    drs_lib.localization_maps(network, pixels / 255)  # silent
    maps = drs_lib.localization_maps(network.eval(), pixels / 255)
    assert drs_lib.localization_maps(network.train(), pixels / 255).equal(maps) and network.training
    with pytest.raises(ValueError):
        drs_lib.localization_maps(network, pixels.byte())
    assert checks.broken_inputs(["silent", "handled", "loud"]) == "correct"


def test_receptive_fields_of_torchvisions_vgg16():
    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None).features
    field = ANSWERS["receptive_field"].right[0]
    layers, of_convolutions, after_pooling = [], [], []
    for module in features:
        if isinstance(module, nn.MaxPool2d):
            of_convolutions.append(field(layers))
            layers.append((2, 2, 1))
            after_pooling.append(field(layers))
        elif isinstance(module, nn.Conv2d):
            layers.append((3, 1, 1))
    assert checks.vgg16_fields(of_convolutions) == checks.vgg16_fields(after_pooling) == "correct"


def test_refinement_means_by_search():
    there, guesses = torch.tensor([1.0] * 60 + [0.1] * 40), torch.linspace(0, 1, 101)
    both = there, torch.cat([there, torch.zeros(100)])
    best = [guesses[(guesses[:, None] - targets).square().mean(1).argmin()] for targets in both]
    assert checks.refinement_mean(best) == "correct"


def test_the_conflict_pixel_by_the_library():
    maps, saliency = torch.zeros(1, 6, 1, 1), torch.full((1, 1, 1), 0.10)
    maps[0, 1], maps[0, 4] = 0.30, 0.25
    conflicts = ("background", "object", "ignore")
    found = [pseudo_labels(maps, saliency, 0.2, 0.06, conflict=c).item() for c in conflicts]
    found.append(pseudo_labels(maps, saliency, 0.2, rule="release").item())
    assert checks.conflict_pixel(found) == "correct"


def test_ignored_share_by_the_library():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 40, 40, generator=generator) ** 2
    saliency = torch.rand(2, 40, 40, generator=generator)
    low, of_alpha, of_beta = (
        (pseudo_labels(maps, saliency, *thresholds) == 255).float().mean()
        for thresholds in ((0.2, 0.2), (0.4, 0.2), (0.2, 0.4))
    )
    assert (
        checks.ignored_share(["up" if share > low else "down" for share in (of_alpha, of_beta)]) == "correct"
    )


def test_dense_pairs_and_spans_by_the_gradient():
    def seen(d1, d2):
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=d, dilation=d) for d in (d1, d2))).double()
        x = torch.zeros(1, 1, 51, 51, dtype=torch.float64, requires_grad=True)
        layers(x)[0, 0, 25, 25].backward()
        rows = (x.grad[0, 0] != 0).any(1).nonzero()
        side = int(rows.max() - rows.min()) + 1
        return side, int((x.grad != 0).sum()) == side**2

    pairs = [(d1, d2) for d1 in range(1, 6) for d2 in range(1, 6)]
    assert checks.dense_pairs([pair for pair in pairs if seen(*pair)[1]]) == "correct"
    assert checks.span_of_two(lambda d1, d2: seen(d1, d2)[0]) == "correct"


def test_a_map_of_ones_has_a_flat_curve():
    from drs_course.audits import AlphaScan

    rng = np.random.default_rng(0)
    scan = AlphaScan(3)
    for label in (0, 1, 2):
        maps = torch.zeros(3, 20, 20)
        maps[label] = 1
        mask = np.where(rng.random((20, 20)) < 0.5, label + 1, 0).astype(np.uint8)
        scan.update(maps, rng.integers(0, 60, (20, 20), np.uint8), mask)
    assert np.ptp(scan.miou()) == np.ptp(scan.miou(saliency=False)) == 0
    assert checks.all_ones_map("flat") == "correct"
