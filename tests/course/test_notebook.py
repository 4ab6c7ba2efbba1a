"""What the notebooks use around the library: opening the course, and the live loss curve."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from drs_course import notebook, store
from drs_course.notebook import LiveLoss, image_batch, may_train, open_course, receptive_fields
from drs_course.paper import Configuration
from drs_lib.data import VOC2012
from drs_lib.networks import classifier, deeplab
from drs_lib.recipes import ClassifyRecipe


def test_open_course_says_what_it_runs_on(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DRS_BUDGET", raising=False)
    line = open_course(budget="ci", seed=2, store=tmp_path)
    assert capsys.readouterr().out == "critters: 36 training and 12 validation images; budget 'ci', seed 2.\n"
    assert (line.seed, line.store.root, line.budget.name) == (2, tmp_path, "ci")
    assert isinstance(line.progress, LiveLoss)
    with pytest.raises(ValueError, match="drs_course download"):
        open_course("voc", store=tmp_path)


def test_notebooks_share_the_store_of_make_course(tmp_path, monkeypatch):
    monkeypatch.delenv("DRS_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    root = Path(notebook.__file__).parents[1]
    assert open_course(budget="ci").store.root == root / "runs"
    monkeypatch.setenv("DRS_STORE", str(tmp_path / "mine"))
    assert open_course(budget="ci").store.root == tmp_path / "mine"
    monkeypatch.delenv("DRS_STORE")
    monkeypatch.setattr(store, "__file__", str(tmp_path / "site-packages" / "drs_lib" / "store.py"))
    assert open_course(budget="ci").store.root == tmp_path / "runs"


def test_images_of_different_sizes_become_one_batch(voc_tree):
    data = VOC2012(voc_tree, "train")
    assert data[0][0].shape != data[1][0].shape
    batch = image_batch(data, [1, 0], 24)
    assert batch.shape == (2, 3, 24, 24) and batch.dtype == torch.uint8
    expected = interpolate(data[0][0][None].float(), (24, 24), mode="bilinear", antialias=True)[0]
    assert (batch[1] - expected).abs().max() < 1
    assert image_batch(data, [2]).equal(data[2][0][None])
    with pytest.raises(RuntimeError, match="size"):
        image_batch(data, [0, 1])


def test_a_training_that_no_table_needs_is_done_where_it_is_short_and_else_asked_for(tmp_path, capsys):
    line = open_course(budget="ci", store=tmp_path)
    capsys.readouterr()
    assert may_train(line, line.budget.classify) and not capsys.readouterr().out
    line.budget = line.budget.replace(name="paper")
    recipe = ClassifyRecipe(epochs=None, iterations=1234, batch=6)
    assert not may_train(line, recipe, 2)
    cost = "2 x 1,234 steps of vgg16, 6 images each"
    assert capsys.readouterr().out == f"Left out: {cost}. TRAIN_MORE = True, above, trains it.\n"
    assert may_train(line, recipe, 2, anyway=True)
    assert capsys.readouterr().out == f"Training {cost}.\n"


@pytest.mark.parametrize("backbone", ["mini", "vgg16"])
def test_receptive_fields_are_what_the_gradient_sees(backbone, thin_vgg16):
    network = classifier(backbone, 6, drs_layers=()).eval()
    fields = receptive_fields(network)
    for layer in network.layers:
        for name, m in layer.named_children():
            if isinstance(m, nn.Conv2d):
                nn.init.constant_(m.weight, 1 / 9)
            elif isinstance(m, nn.MaxPool2d):  # a maximum hides the rest of its window
                setattr(layer, name, nn.AvgPool2d(m.kernel_size, m.stride, m.padding, m.ceil_mode))
    image = torch.ones(1, 3, 320, 320, dtype=torch.float64, requires_grad=True)
    for output, field in zip(network.double().layer_outputs(image), fields, strict=True):
        middle = output.shape[-1] // 2
        (gradient,) = torch.autograd.grad(output[0, 0, middle, middle], image, retain_graph=True)
        seen = gradient[0, 0].nonzero()
        assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [field, field]
    with pytest.raises(ValueError, match="ResidualBlock"):
        receptive_fields(deeplab("largefov", "mini_resnet", 6))


class Handle:
    def __init__(self):
        self.shown = []

    def update(self, content):
        self.shown.append(content.data)


def test_the_live_curve_grows_and_leaves_one_line(monkeypatch):
    handles = []
    monkeypatch.setattr(notebook, "_display_handle", lambda: handles.append(Handle()) or handles[-1])
    live = LiveLoss(interval=0)
    for step in range(1, 6):
        live("train classifier", step, 5, 1 + step // 3, 1.0 / step)
    live("next", 1, 1, 1, 0.5)
    first, second = (handle.shown for handle in handles)
    # Nothing at the first step, from which alone no rate follows.
    assert len(first) == 4 and "epoch 2, loss 0.250" in first[2] and 'value="4" max="5"' in first[2]
    assert [text.count(",") for text in first[:3]] == sorted(text.count(",") for text in first[:3])
    assert first[-1].startswith("train classifier: 5 steps in ") and "svg" not in first[-1]
    assert len(second) == 1 and second[0].startswith("next: 1 steps")


@pytest.mark.parametrize("again", [51, 41, 1])
def test_a_resumed_training_is_shown_anew_and_timed_from_there(again, monkeypatch):
    """Interrupted after step 50 of 300; the checkpoint is of any step before."""
    handles, clock, cell = [], [0.0], [3]
    monkeypatch.setattr(notebook, "_display_handle", lambda: handles.append(Handle()) or handles[-1])
    monkeypatch.setattr(notebook, "_cell", lambda: cell[0])
    monkeypatch.setattr(notebook.time, "monotonic", lambda: clock[0])
    live = LiveLoss(interval=0)

    def run(begin, end):
        for step in range(begin, end + 1):
            clock[0] += 2
            live("classify", step, 300, 1, 0.3)

    run(1, 50)
    assert len(handles) == 1 and "about 500 s left" in handles[0].shown[-1]
    clock[0] += 10_000
    if again == 51:  # only the cell tells that this is another run
        cell[0] = 4
    run(again, again + 1)
    assert len(handles) == 2 and len(handles[1].shown) == 1
    assert f"about {2 * (300 - again - 1)} s left" in handles[1].shown[-1]
    # The curve stands where the steps are.
    assert f'points="{again / 300 * 420:.1f},' in handles[1].shown[-1]
    run(again + 2, 300)
    count = 301 - again
    expected = "300 steps" if again == 1 else f"the last {count} of 300 steps"
    assert handles[1].shown[-1] == f"classify: {expected} in {2 * (count - 1)} s"


def test_losses_that_a_gpu_has_not_sent_yet_are_left_out(monkeypatch):
    handle = Handle()
    monkeypatch.setattr(notebook, "_display_handle", lambda: handle)
    live = LiveLoss(interval=0)
    for step in range(1, 6):
        live("classify", step, 10, 1, float("nan") if step < 4 else 1 / step)
    assert len(handle.shown) == 2 and "loss 0.200" in handle.shown[-1]
    assert not any("nan" in text for text in handle.shown)


def test_a_cell_that_is_run_again_after_an_interrupt_has_its_display():
    """nbclient empties the cell's outputs; an update of the display that was there fails."""
    from nbclient import NotebookClient

    define = "from drs_course.notebook import LiveLoss\nlive, begin = LiveLoss(interval=0), 1"
    train = (
        "for step in range(begin, 9):\n"
        "    if begin == 1 and step == 5:\n"
        "        begin = 5\n"
        "        raise KeyboardInterrupt\n"
        "    live('classify', step, 10, 1, 0.5)"
    )
    cells = [nbformat.v4.new_code_cell(source) for source in (define, train)]
    client = NotebookClient(nbformat.v4.new_notebook(cells=cells), kernel_name="python3", allow_errors=True)
    with client.setup_kernel(cwd=str(Path(notebook.__file__).parents[1])):
        for index in (0, 1, 1):
            client.execute_cell(cells[index], index)
    (shown,) = cells[1].outputs
    assert 'value="8" max="10"' in shown["data"]["text/html"]


def test_the_live_curve_is_drawn_seldom_and_outside_of_a_notebook_not_at_all(monkeypatch, capsys):
    handle = Handle()
    live = LiveLoss(interval=3600)
    with monkeypatch.context() as patched:
        patched.setattr(notebook, "_display_handle", lambda: handle)
        for step in range(1, 50):
            live("training", step, 100, 1, 0.3)
    assert handle.shown == []
    LiveLoss(interval=0)("training", 1, 1, 1, 0.3)
    assert capsys.readouterr().out == ""


def test_smoothing_is_a_running_mean():
    losses = np.array([3.0, 1.0, 2.0, 6.0])
    np.testing.assert_allclose(notebook.smoothed(losses, window=2), [3.0, 2.0, 1.5, 4.0])
    np.testing.assert_allclose(notebook.smoothed([5.0] * 30), 5.0)


def test_an_interrupted_training_can_be_run_again(tmp_path):
    line = open_course(budget="ci", store=tmp_path)

    def interrupt(title, step, steps, epoch, loss):
        if step == 2:
            raise KeyboardInterrupt

    line.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        line.classifier(Configuration())
    stage = line.stage("classify", Configuration())
    assert line.store.made_at(stage.name, stage.key) is None
    line.progress = False
    line.classifier(Configuration())
    assert line.store.made_at(stage.name, stage.key) is not None
    assert len(line.history("classify", Configuration())) == line.budget.classify.epochs
