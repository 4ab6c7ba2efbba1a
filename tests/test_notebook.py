"""What the notebooks use around the library: opening the course, and the live loss curve."""

from pathlib import Path

import numpy as np
import pytest

from drs_lib import notebook, store
from drs_lib.notebook import LiveLoss, open_course
from drs_lib.paper import Configuration


def test_open_course_says_what_it_runs_on(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DRS_BUDGET", raising=False)
    line = open_course(budget="ci", seed=2, store=tmp_path)
    assert capsys.readouterr().out == "critters: 36 training and 12 validation images; budget 'ci', seed 2.\n"
    assert (line.seed, line.store.root, line.budget.name) == (2, tmp_path, "ci")
    assert isinstance(line._progress, LiveLoss)
    with pytest.raises(ValueError, match="drs_lib.data.download"):
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
    assert len(first) == 5 and "epoch 2, loss 0.250" in first[3] and 'value="4" max="5"' in first[3]
    assert [text.count(",") for text in first[:4]] == sorted(text.count(",") for text in first[:4])
    assert first[-1].startswith("train classifier: 5 steps in ") and "svg" not in first[-1]
    assert len(second) == 1 and second[0].startswith("next: 1 steps")


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

    line._progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        line.classifier(Configuration())
    stage = line.stage("classify", Configuration())
    assert line.store.made_at(stage.name, stage.key) is None
    line._progress = False
    line.classifier(Configuration())
    assert line.store.made_at(stage.name, stage.key) is not None
    assert len(line.history("classify", Configuration())) == line.budget.classify.epochs
