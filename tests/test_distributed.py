"""Two processes take the steps of one. Processes are real, started by Accelerate's launchers, on the CPU."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from drs_course.paper import Configuration
from drs_course.stages import Pipeline
from drs_lib import distributed

TRAIN = """
import json, sys
import numpy as np, torch
from safetensors.torch import save_file
from conftest import TinyDataset
from drs_lib import distributed, networks
from drs_course.checkpoint import Checkpoint
from drs_lib.recipes import ClassifyRecipe, RefineRecipe, SegmentRecipe
from drs_lib.train import train_classifier, train_refinement, train_segmentation

out = sys.argv[1]
# Thin, and without dropout, which draws other numbers in each process.
networks.VGG16 = ((8, 2), (8, 2), (8, 3), (8, 3), (8, 3), (8, 3))
networks.LARGEFOV = networks.LARGEFOV | {"vgg16": dict(width=8, dilation=2, dropout=0.0)}
data = TinyDataset(length=10, size=32)
maps = [np.random.default_rng(i).random((3, 32, 32), np.float32) for i in range(10)]
labels = [np.random.default_rng(i).integers(0, 4, (32, 32)).astype(np.uint8) for i in range(10)]
for i, label in enumerate(labels):
    label[:, : 3 * i] = 255  # parts of a batch with very different numbers of labelled pixels
# Five images, which two processes can't halve; three batches for a step.
common = dict(
    weights=None, epochs=4, schedule="constant", batch=5, crop=24, threads=1, workers=0, optimizer="sgd",
    lr=0.01, momentum=0.9, jitter=(0.3, 0.3, 0.3, 0.1),
)
segment = common | dict(iterations=None, accumulate=2, images="memory")

def classify(**options):
    return train_classifier(ClassifyRecipe(**common), data, progress=False, **options)

class Killed(BaseException):
    pass

def stop(title, step, *rest):
    if step == 5:
        raise Killed

def resumed():
    checkpoint = Checkpoint(out + "/state.pt")
    try:
        train_classifier(ClassifyRecipe(**common), data, progress=stop, checkpoint=checkpoint)
    except Killed:
        pass
    distributed.agree(None)
    return classify(checkpoint=checkpoint)

trainings = {
    "classify": classify,
    "refine": lambda: train_refinement(RefineRecipe(**common), data, maps, progress=False),
    "present classes": lambda: train_refinement(
        RefineRecipe(**common, label_mask=True), data, maps, progress=False
    ),
    "segment": lambda: train_segmentation(SegmentRecipe(**segment), data, labels, progress=False),
    "resumed": resumed,
}
for name, train in trainings.items():
    model, history = train()
    sums = distributed.gather(float(sum(p.detach().double().sum() for p in model.parameters())))
    if distributed.rank() == 0:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, f"{out}/{name}.safetensors")
        facts = dict(loss=[epoch["loss"] for epoch in history], processes=distributed.world_size(), sums=sums)
        with open(f"{out}/{name}.json", "w") as file:
            json.dump(facts, file)
try:
    train_classifier(ClassifyRecipe(**common | dict(batch=1)), data, progress=False)
except ValueError as error:
    print(error)
"""
LAUNCH = (
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
)


def start(*arguments):
    tests = os.path.dirname(__file__)
    environment = os.environ | {
        "DRS_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([tests, os.path.dirname(tests), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        out, errors = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        # Processes that wait for each other don't end with their launcher.
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
        raise
    assert process.returncode == 0, out + errors
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-processes")
    program = folder / "train.py"
    program.write_text(TRAIN)
    for name in ("one", "two"):
        (folder / name).mkdir()
    start(program, folder / "one")
    printed = start(*LAUNCH, program, folder / "two")
    return folder, printed


@pytest.mark.parametrize("name", ["classify", "refine", "present classes", "segment"])
def test_two_processes_take_the_steps_of_one(trained, name):
    folder, _ = trained
    one, two = (json.loads((folder / n / f"{name}.json").read_text()) for n in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["sums"][0] == two["sums"][1]  # both hold the same network
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert len(set(one["loss"])) == len(one["loss"])  # it did train
    one, two = (load_file(folder / n / f"{name}.safetensors") for n in ("one", "two"))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("processes", ["one", "two"])
def test_a_killed_training_ends_with_the_same_weights(trained, processes):
    folder, _ = trained
    whole, resumed = (load_file(folder / processes / f"{n}.safetensors") for n in ("classify", "resumed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_batch_smaller_than_the_processes_is_refused(trained):
    _, printed = trained
    assert "a batch of 1 images can't be shared by 2 processes" in printed


COURSE = ("course", "--budget", "ci", "--tables", "3", "--quiet")


def test_a_table_from_the_command_line(tmp_path):
    options = ("--store", tmp_path / "store", "--out", tmp_path / "out")
    printed = start(*LAUNCH, "-m", "drs_course", *COURSE, *options)
    assert printed.count("Table 3:") == 1  # the first process prints
    rows = json.loads((tmp_path / "out" / "table3.json").read_text())
    assert "measured" in json.dumps(rows)
    assert list((tmp_path / "out" / "figures").glob("*.png"))  # the first process draws
    # What two processes made, one reads.
    line = Pipeline("critters", "ci", store=tmp_path / "store", device="cpu")
    assert line.stored_scores(Configuration(refine=True), ("miou", "labels")) is not None
    assert not list((tmp_path / "store").rglob(".tmp-*")) and not list((tmp_path / "store").rglob("*.pt"))


NOTEBOOK = """
import sys
from accelerate import notebook_launcher
from drs_lib.distributed import world_size
from drs_course.tables import run_tables

def cell(store):
    assert world_size() == 2
    run_tables((3,), budget="ci", store=store, progress=False)

if __name__ == "__main__":
    notebook_launcher(cell, (sys.argv[1],), num_processes=2, use_port=sys.argv[2])
    print(run_tables((3,), budget="ci", store=sys.argv[1], progress=False)[3]["measured"].tolist())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the launcher for notebooks forks")
def test_a_table_from_a_notebook(tmp_path):
    program = tmp_path / "cell.py"
    program.write_text(NOTEBOOK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    measured = json.loads(start(program, tmp_path / "store", port).splitlines()[-1])
    assert len(measured) == 4 and all(0 < value < 100 for value in measured)


def test_a_failure_of_the_first_process_ends_all(tmp_path):
    """The store is a file, so that nothing can be kept."""
    (tmp_path / "store").write_text("")
    with pytest.raises(AssertionError, match="is not a folder"):
        start(*LAUNCH, "-m", "drs_course", *COURSE, "--store", tmp_path / "store", "--out", tmp_path / "out")


def test_alone_nothing_is_shared():
    assert distributed.world_size() == 1 and distributed.rank() == 0
    value = torch.tensor(2.0, requires_grad=True)
    assert distributed.share(value, 3) is value and distributed.average(value) is value
    assert distributed.agree("x") == "x" and distributed.gather("x") == ["x"]


def test_one_of_several_processes_can_work_alone(monkeypatch):
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyError), distributed.alone():
        assert (distributed.world_size(), distributed.rank()) == (1, 0)
        raise KeyError
    assert (distributed.world_size(), distributed.rank()) == (2, 1)


def test_without_accelerate_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    distributed._accelerate.cache_clear()
    with pytest.raises(RuntimeError, match="process 0 of 2.*pip install"):
        distributed.agree(1)
