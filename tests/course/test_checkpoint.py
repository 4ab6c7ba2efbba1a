"""A training that is killed and started again ends with the weights of one that was not."""

import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tiny import TinyDataset

from drs_course.checkpoint import Checkpoint
from drs_course.paper import Configuration
from drs_course.stages import Pipeline
from drs_lib.recipes import ClassifyRecipe, RefineRecipe, SegmentRecipe, get_budget
from drs_lib.train import train_classifier, train_refinement, train_segmentation

EPOCHS = 4
DATA = TinyDataset(length=9, size=32)
MAPS = [np.random.default_rng(i).random((3, 32, 32), np.float32) for i in range(9)]
LABELS = [np.random.default_rng(i).integers(0, 4, (32, 32)).astype(np.uint8) for i in range(9)]
SHORT = dict(epochs=EPOCHS, batch=4, weights=None, jitter=(0.2, 0.2, 0.2, 0.1))
TRAININGS = {
    "classify": lambda **options: train_classifier(
        ClassifyRecipe.laptop().replace(**SHORT, optimizer="sgd", momentum=0.9), DATA, **options
    ),
    "refine": lambda **options: train_refinement(
        RefineRecipe.laptop().replace(**SHORT), DATA, MAPS, **options
    ),
    # Its dropout draws random numbers on the device, and its batches are made in processes of their own.
    "segment": lambda **options: train_segmentation(
        SegmentRecipe.laptop().replace(**SHORT, workers=2), DATA, LABELS, **options
    ),
}


class Killed(BaseException):
    pass


def killed_at(fatal, steps=None):
    """A progress function under which the training ends at that iteration, counted over all its starts."""

    def progress(title, step, total, epoch, loss):
        if steps is not None:
            steps.append(step)
        if step == fatal:
            raise Killed

    return progress


def assert_same(found, expected):
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.fixture(scope="module", params=TRAININGS)
def training(request):
    train = TRAININGS[request.param]
    return train, train(device="cpu", progress=False)


@pytest.mark.parametrize("fatal", [(1,), (3,), (4,), (7,), (2, 4, 5, 8)])  # two iterations make an epoch
def test_a_training_goes_on_where_it_was_killed(training, fatal, tmp_path):
    train, (expected, history) = training
    checkpoint = Checkpoint(tmp_path / "folder" / "state.pt")
    for step in fatal:
        with pytest.raises(Killed):
            train(device="cpu", progress=killed_at(step), checkpoint=checkpoint)
    # Random numbers that are drawn in between belong to somebody else.
    random.random(), np.random.rand(3), torch.rand(3)
    steps = []
    model, found = train(device="cpu", checkpoint=checkpoint, progress=killed_at(None, steps))
    assert steps == list(range(1 + (step - 1) // 2 * 2, 2 * EPOCHS + 1))
    assert_same(model, expected)
    for one, other in zip(found, history, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize("damage", ["truncated", "another_torch", "another_network"])
def test_what_cannot_be_used_is_set_aside(damage, tmp_path, caplog):
    train = TRAININGS["refine"]
    checkpoint = Checkpoint(tmp_path / "state.pt")
    with pytest.raises(Killed):
        TRAININGS["segment" if damage == "another_network" else "refine"](
            device="cpu", progress=killed_at(6), checkpoint=checkpoint
        )
    if damage == "another_torch":
        state = torch.load(checkpoint.path, weights_only=True)
        torch.save(state | {"made_by": "torch 1.0, 0 GPUs"}, checkpoint.path)
    elif damage == "truncated":
        checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-100])
    steps = []
    model, _ = train(device="cpu", checkpoint=checkpoint, progress=killed_at(None, steps))
    assert steps[0] == 1 and "begins anew" in caplog.text
    assert checkpoint.path.with_suffix(".unusable").exists()
    assert_same(model, train(device="cpu", progress=False)[0])


PROGRAM = """
import sys
from drs_course.paper import Configuration
from drs_course.stages import Pipeline
from drs_lib.recipes import get_budget
budget = get_budget("ci")
budget = budget.replace(classify=budget.classify.replace(epochs=8))
line = Pipeline("critters", budget, store=sys.argv[1], device="cpu")
print("ready", flush=True)
line.classifier(Configuration())
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_process_that_is_killed_at_random_moments_finishes_with_the_same_weights(tmp_path):
    """By the pipeline and its store: killed twice, then left alone."""
    rng = random.Random(0)

    def start(store):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, store], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        return process

    process, began = start(tmp_path / "whole"), time.monotonic()
    assert process.wait(timeout=120) == 0
    lasts, kills = time.monotonic() - began, 0
    while kills < 2:
        process = start(tmp_path / "killed")
        try:
            process.wait(timeout=rng.uniform(0.1, 0.6) * lasts)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else:  # quicker than the first, on a machine with other work: once more, and killed earlier
            shutil.rmtree(tmp_path / "killed")
            lasts, kills = lasts / 2, 0
    assert start(tmp_path / "killed").wait(timeout=120) == 0
    (whole,), (killed,) = (list((tmp_path / name).glob("classify/*/model.*")) for name in ("whole", "killed"))
    assert whole.parent.name == killed.parent.name and whole.read_bytes() == killed.read_bytes()
    assert not list((tmp_path / "killed" / "checkpoints").glob("*.pt"))


BUDGET = get_budget("ci")
BUDGET = BUDGET.replace(classify=BUDGET.classify.replace(epochs=2))
EPOCH = BUDGET.train_images // BUDGET.classify.batch


def steps_of(store, kill=None, run=None, **options):
    """The iterations that a start of the pipeline makes, and the weights, None if it was killed."""
    steps = []
    pipeline = Pipeline("critters", BUDGET, store=store, run=run, progress=killed_at(kill, steps))
    try:
        return steps, pipeline.classifier(Configuration(drs_layers=()), **options).state_dict()
    except Killed:
        return steps, None


def test_an_overwritten_training_begins_anew(tmp_path):
    assert steps_of(tmp_path, EPOCH + 1)[1] is None
    assert list((tmp_path / "checkpoints").glob("*.pt"))
    assert steps_of(tmp_path, overwrite=True)[0] == list(range(1, 2 * EPOCH + 1))
    assert not list((tmp_path / "checkpoints").glob("*.pt"))
    assert steps_of(tmp_path)[0] == []


def test_a_run_that_overwrites_goes_on_from_its_own_checkpoints_alone(tmp_path):
    _, expected = steps_of(tmp_path / "undisturbed")
    for run, begins in ((None, 1), ("monday", 1), ("monday", EPOCH + 1), ("tuesday", 1)):
        steps, found = steps_of(tmp_path, EPOCH + 1, run)
        assert (steps[0], found) == (begins, None), run
    steps, found = steps_of(tmp_path, run="tuesday")
    assert steps == list(range(EPOCH + 1, 2 * EPOCH + 1))
    assert all(torch.equal(found[k], v) for k, v in expected.items())
    for run in ("tuesday", None):
        assert steps_of(tmp_path, run=run)[0] == [], "it is its own, and nobody else's to train again"
    assert steps_of(tmp_path, run="wednesday")[0] == list(range(1, 2 * EPOCH + 1))
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    checkpoint = Checkpoint(tmp_path / "file" / "state.pt")
    model, _ = TRAININGS["classify"](device="cpu", progress=False, checkpoint=checkpoint)
    assert caplog.text.count("No checkpoint could be written") == EPOCHS - 1
    assert_same(model, TRAININGS["classify"](device="cpu", progress=False)[0])


def test_what_a_killed_save_left_behind_goes_with_the_next(tmp_path):
    (tmp_path / f".state.pt.{platform.node()}").write_bytes(b"half")
    Checkpoint(tmp_path / "state.pt").save({"step": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_two_machines_save_the_same_checkpoint(tmp_path, monkeypatch, caplog):
    """As where there are no locks; each writes beside the other's file."""
    one, other = Checkpoint(tmp_path / "state.pt"), Checkpoint(tmp_path / "state.pt")
    save = torch.save

    def saved_by_both(state, file):
        monkeypatch.undo()
        monkeypatch.setattr(platform, "node", lambda: "other")
        other.save({"step": 2})
        save(state, file)

    monkeypatch.setattr(torch, "save", saved_by_both)
    one.save({"step": 1})
    assert one.restore() == {"step": 1} and "could be written" not in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
