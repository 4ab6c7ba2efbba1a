"""Stages, jobs and tables: what is shared, what is measured, what happens when things go wrong."""

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import TinyDataset

from drs_course import jobs as jobs_module
from drs_course import stages
from drs_course import tables as experiments
from drs_course.__main__ import main
from drs_course.paper import NETWORKS, Configuration, table_rows
from drs_course.stages import Pipeline, Splits
from drs_course.store import EntryWriter, RunStore, StoreError
from drs_course.tables import (
    RowsFailed,
    format_table,
    load_table,
    reference_table,
    run_table,
    run_tables,
    save_table,
    style_table,
)
from drs_lib import archives
from drs_lib.archives import LabelArchive, MapArchive
from drs_lib.crf import available as crf_available
from drs_lib.recipes import get_budget
from drs_lib.train import TrainingDiverged

ROOT = Path(__file__).parents[2]
REFINED, CAM = Configuration(refine=True), Configuration(drs_layers=())


def tiny_budget(**changes):
    """The ci budget from random weights: the shipped ones belong to Critters."""
    ci = get_budget("ci")
    recipes = {
        name: getattr(ci, name).replace(weights=None, batch=4)
        for name in ("classify", "refine", "largefov", "largefov_resnet", "aspp")
    }
    return ci.replace(**recipes | changes)


def tiny_splits(**options):
    return Splits("tiny", TinyDataset(8, 32, **options), TinyDataset(4, 32, seed=1))


SPLITS, BUDGET = tiny_splits(), tiny_budget()
TINY = dict(data=SPLITS, budget=BUDGET, jobs=1, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All four tables in one store: (store, tables)."""
    store = RunStore(tmp_path_factory.mktemp("runs"))
    return store, run_tables(store=store, **TINY)


@pytest.fixture
def store(finished):
    return finished[0]


@pytest.fixture
def tables(finished):
    return finished[1]


@pytest.fixture
def line(store):
    return Pipeline(SPLITS, BUDGET, store=store)


def stored(store):
    folders = (path.parent for path in store.root.glob("*/*/meta.json"))
    # What is being written, or was when its process was killed, is no entry.
    return {(one.parent.name, one.name): one for one in folders if not one.name.startswith(".tmp-")}


def contents(store, names=("model.safetensors", "scores.json", "labels.zip", "maps.zip")):
    return {
        (*entry, name): (folder / name).read_bytes()
        for entry, folder in stored(store).items()
        for name in names
        if (folder / name).exists()
    }


def test_the_paper_s_tables():
    assert [len(table_rows(number)) for number in (1, 2, 3, 4)] == [8, 9, 4, 31]
    quoted = [row for row in table_rows(4) if row.configuration is None]
    assert len(quoted) == 21 and len({row.label for row in quoted}) == 13
    by_network = {"Large-FOV (VGG-16)": 64.0, "Large-FOV (ResNet-101)": 67.8, "ASPP (ResNet-101)": 67.1}
    for network, miou in by_network.items():
        assert max(r.paper for r in quoted if dict(r.columns)["network"] == f"DeepLab-{network}") == miou
    # Numbers that the paper prints in several tables agree.
    rows = [row for number in (1, 2, 3, 4) for row in table_rows(number) if row.configuration]
    assert len({(row.configuration, row.paper) for row in rows}) == len({row.configuration for row in rows})
    with pytest.raises(ValueError, match="no Table 5"):
        table_rows(5)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"network": "unet"}, "network is 'unet'"),
        ({"drs_layers": (), "delta": 0.5}, "plain CAM"),
        ({"supervised": True, "refine": True}, "trains on masks"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        Configuration(**changes)


def test_budgets(monkeypatch):
    monkeypatch.delenv("DRS_BUDGET", raising=False)
    assert get_budget().name == "laptop" and get_budget(data="voc").name == "paper"
    assert get_budget("ci") == get_budget("ci") and hash(get_budget("ci")) == hash(get_budget("ci"))
    assert tiny_budget() != get_budget("ci")
    for name, data, match in (
        ("big", "critters", "'ci' or 'laptop'"),
        ("release", "critters", "no budget 'release'"),
        ("laptop", "voc", "no budget 'laptop'"),
        (None, "coco", "unknown data"),
    ):
        with pytest.raises(ValueError, match=match):
            get_budget(name, data)
    monkeypatch.setenv("DRS_BUDGET", "ci")
    assert get_budget().name == "ci" and get_budget(data="voc").name == "ci"
    assert get_budget("laptop").name == "laptop"
    monkeypatch.setenv("DRS_BUDGET", "desktop")
    with pytest.raises(ValueError, match="no budget 'desktop'"):
        get_budget()


def test_a_weights_file_that_does_not_fit_is_noticed_before_anything_is_trained(tmp_path, capsys):
    bad = tmp_path / "bad.pth"
    bad.write_text("rubbish")
    command = ["tables", "--budget", "ci", "--quiet", "--store", str(tmp_path / "store"), "--aspp-weights"]
    for path, word in ((bad, "bad.pth"), (tmp_path / "nosuch.pth", "no weights file")):
        assert main([*command, str(path)]) == 1
        assert word in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_program_without_a_main_guard_is_told_so(tmp_path, monkeypatch):
    """Its image readers, where they are spawned, run it again, and would wait for the lock that it holds."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match="__main__"):
        Pipeline(budget="ci", store=tmp_path).classifier(Configuration())


def test_tables_tell_the_precision_where_it_is_a_choice(tmp_path):
    tables = [
        experiments.stored_table(1, Pipeline(budget=get_budget("ci").for_all(precision=p), store=tmp_path))
        for p in ("float32", "bfloat16")
    ]
    assert "precision" not in experiments.format_table(tables[0])
    assert "precision: bfloat16" in experiments.format_table(tables[1])


def test_every_budget_computes_in_float32_unless_told_otherwise(monkeypatch):
    def precisions(*names):
        budget = get_budget(*names)
        return {r.precision for r in (budget.classify, budget.refine, *map(budget.segment, NETWORKS))}

    for names in (("laptop", "critters"), ("ci", "voc"), ("paper", "voc"), ("release", "voc")):
        assert precisions(*names) == {"float32"}
    monkeypatch.setenv("DRS_PRECISION", "bfloat16")
    assert precisions("paper", "voc") == {"bfloat16"}
    monkeypatch.setenv("DRS_PRECISION", "half")
    with pytest.raises(ValueError, match="precision is 'half': expected one of float32, bfloat16"):
        get_budget("paper", "voc")


def test_the_release_s_choices_and_no_others():
    paper, release = (get_budget(name, "voc") for name in ("paper", "release"))

    def differences(one, other):
        other = other.to_dict()
        return {k: (v, other[k]) for k, v in one.to_dict().items() if v != other[k]}

    assert differences(paper.classify, release.classify) == {
        "nesterov": (False, True),
        "lr_multipliers": ([1, 1, 1, 1], [1, 2, 10, 20]),
        "batch": (5, 10),
        "resize": (None, 384),
        "crop": (321, 320),
    }
    assert differences(paper.refine, release.refine) == {
        "epochs": (15, 30),
        "milestones": ([5, 10], [10, 20]),
        "batch": (5, 10),
        "resize": (None, 320),
        "crop": (321, None),
        "loss_size": ("map", "image"),
    }
    for network in ("largefov", "largefov_resnet"):
        assert paper.segment(network) == release.segment(network)
    assert differences(paper.aspp, release.aspp) == {
        "weights": ("pretrained", "coco"),
        "bias_decay": (True, False),
    }
    same = ("alpha", "beta", "conflict", "scales", "resize", "refined_alpha", "renormalize")
    assert all(getattr(paper, name) == getattr(release, name) for name in same)
    assert (release.rule, release.target) == ("release", "largest")


def test_tables_share_stages(store):
    counts = pd.Series([stage for stage, _ in stored(store)]).value_counts().to_dict()
    # 8 controllers and 8 further choices of layers; 2 refinements; LargeFOV on all of these and the masks,
    # and two more networks on 2 refined label sets and the masks.
    expected = {"classify": 16, "accuracy": 8, "target": 2, "refine": 2, "labels": 18, "label_score": 18}
    expected |= {"segment": 18 + 1 + 2 * 3, "evaluate": 25}
    assert {name: counts[name] for name in expected} == expected


def test_the_columns_and_conditions_of_the_tables(tables):
    for number, table in tables.items():
        measured = [row.configuration is not None for row in table_rows(number)]
        assert len(table) == len(measured) and (table["measured"].notna() == measured).all()
        assert (table["seeds"] == np.array(measured, int)).all() and table["sd"].isna().all()
        assert table["measured"].dropna().between(0, 100).all()
        np.testing.assert_array_equal(table["paper"], [row.paper or math.nan for row in table_rows(number)])
        for key in ("split", "scales", "alpha", "beta", "CRF", "seeds", "budget", "rule"):
            assert key in table.attrs
    assert tables[1]["accuracy"].notna().all()
    assert tables[1]["paper accuracy"].dropna().tolist() == [72.6, 68.7]
    assert tables[2][[f"layer{n}" for n in range(1, 7)]].sum(axis=1).tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 4]
    assert tables[3]["refine"].tolist() == [False, True, False, True]
    measured = {number: table["measured"] for number, table in tables.items()}
    assert measured[1][0] == measured[2][6] == measured[3][0]
    lower = tables[4]["configuration"].str.startswith("lower")
    assert measured[4][lower].item() == measured[2][0]


def direct_miou(pairs, classes):
    """Mean IoU from its definition, in numpy; ignored predictions count as background."""
    counts = np.zeros((classes, 3))
    for prediction, mask in pairs:
        prediction = np.where(prediction == 255, 0, prediction)[mask != 255]
        mask = mask[mask != 255]
        for c in range(classes):
            counts[c] += [((prediction == c) & (mask == c)).sum(), (prediction == c).sum(), (mask == c).sum()]
    union = counts[:, 1] + counts[:, 2] - counts[:, 0]
    return 100 * float(np.mean([i / u for i, u in zip(counts[:, 0], union, strict=True) if u]))


def test_the_numbers_are_those_of_the_stored_networks(line, tables):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for row, configuration in enumerate(row.configuration for row in table_rows(3)):
        network = line.segmentation_network(configuration)
        pairs = []
        for i in range(len(SPLITS.val)):
            image = SPLITS.val[i][0][None].float() / 255
            with torch.no_grad():
                logits = network((image - mean) / std)
            logits = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
            pairs.append((logits.argmax(1)[0].numpy(), SPLITS.val.mask(i)))
        assert tables[3]["measured"][row] == pytest.approx(direct_miou(pairs, 4), abs=0.3)
        labels = line.labels(configuration)
        assert len(labels) == 8 and labels[0].dtype == np.uint8
        pairs = [(labels[i], SPLITS.train.mask(i)) for i in range(8)]
        assert tables[3]["pseudo-label mIoU"][row] == pytest.approx(direct_miou(pairs, 4), abs=1e-3)
    of_maps = line.scores(Configuration(), ["maps"])["maps"]
    assert 0 <= of_maps["recall"] <= 1 and set(of_maps["per_class"]["on_object"]) == set(SPLITS.train.classes)


def test_a_finished_run_reads_only_scores(store, tables, monkeypatch):
    monkeypatch.setattr(Pipeline, "get", lambda self, stage: pytest.fail(f"{stage.title} was asked for"))
    monkeypatch.setattr(TinyDataset, "__getitem__", lambda self, i: pytest.fail("an image was read"))
    again = run_tables(store=store, **TINY)
    for number, table in tables.items():
        pd.testing.assert_frame_equal(again[number], table)
        assert again[number].attrs == table.attrs


def test_no_stage_that_makes_labels_sees_a_mask(tmp_path):
    line = Pipeline(tiny_splits(forbid_masks=True), BUDGET, store=tmp_path)
    assert len(line.get(line.stage("segment", REFINED)).weights()) > 0
    made = {stage for stage, _ in stored(line.store)}
    assert made == {"classify", "target", "refine", "labels", "segment"}
    supervised = Configuration(supervised=True)
    for stage in (("label_score", REFINED), ("map_score", REFINED), ("segment", supervised)):
        with pytest.raises(AssertionError, match="mask was read"):
            line.get(line.stage(*stage))


def test_label_maps_that_claim_nothing_are_scored(tmp_path):
    class AllSalient(TinyDataset):
        def saliency(self, index):
            return np.full_like(self.masks[index], 255)

    splits = Splits("tiny", AllSalient(8, 32), TinyDataset(4, 32))
    line = Pipeline(splits, tiny_budget(alpha=1.0), store=tmp_path)
    assert all((labels == 255).all() for labels in line.labels(CAM))
    scores = line.scores(CAM, ["labels"])["labels"]
    assert scores["miou_claimed"] is None
    background = np.mean([(line.data.train.mask(i) == 0).mean() for i in range(8)])
    assert scores["miou"] == pytest.approx(background / 4), "all background, nothing of the other classes"


def test_keys_follow_from_what_changes_the_result_and_from_nothing_else(store, monkeypatch, tmp_path):
    monkeypatch.setattr(TinyDataset, "__getitem__", lambda self, i: pytest.fail("an image was read"))
    monkeypatch.setattr(TinyDataset, "mask", lambda self, i: pytest.fail("a mask was read"))

    def keys(budget=BUDGET, seed=0, data=SPLITS, configuration=REFINED, **options):
        line = Pipeline(data, budget, seed=seed, store=store, **options)
        return {s.name: s.key for s in line.stages(configuration, ("miou", "crf", "accuracy", "labels"))}

    def changed(**options):
        before, after = keys(), keys(**options)
        return {name for name in before if before[name] != after[name]}

    everything = set(keys())
    assert everything == set(stages.STAGE_VERSIONS) - {"map_score"}
    workers = BUDGET.replace(classify=BUDGET.classify.replace(workers=3))
    assert changed(budget=workers) == changed(device="cpu", crf_jobs=3) == set()
    assert changed(seed=1) == changed(configuration=Configuration(delta=0.5, refine=True)) == everything
    other_train = Splits("tiny", TinyDataset(6, 32), SPLITS.val)
    assert changed(data=other_train) == everything
    other_val = Splits("tiny", SPLITS.train, TinyDataset(4, 32, seed=2))
    assert changed(data=other_val) == {"accuracy", "evaluate", "evaluate_crf"}
    after_labels = {"labels", "label_score", "segment", "evaluate", "evaluate_crf"}
    assert changed(budget=BUDGET.replace(refined_alpha=0.3)) == after_labels
    assert changed(budget=BUDGET.replace(alpha=0.3)) == set(), "alpha is not what refined maps are read at"
    assert changed(budget=BUDGET.replace(scales=(32, 48))) == after_labels | {"target", "refine"}
    assert changed(budget=BUDGET.replace(refine=BUDGET.refine.replace(lr=2e-4))) == after_labels | {"refine"}
    monkeypatch.setitem(stages.STAGE_VERSIONS, "segment", 2)
    assert keys()["segment"] not in {key for _, key in stored(store)}


def test_other_initial_weights_are_another_training(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"one")
    one = stages.weights_identity("mini", str(file))
    moved = file.rename(tmp_path / "moved.safetensors")
    assert stages.weights_identity("mini", str(moved)) == one, "the content counts, not the place"
    moved.write_bytes(b"other")
    assert stages.weights_identity("mini", str(moved)) != one
    names = {stages.weights_identity("resnet101", w) for w in (None, "pretrained", "coco")}
    assert len(names) == 3
    with pytest.raises(FileNotFoundError, match="no weights file.*drs_course pretrain"):
        stages.weights_identity("mini", str(tmp_path / "absent.safetensors"))


def test_archives_of_labels_and_maps(tmp_path):
    rng, count = np.random.default_rng(0), 2 * archives.PNGS_AHEAD + 3  # more than are made at a time
    labels = [rng.choice([0, 1, 7, 255], (5, 4 + i)).astype(np.uint8) for i in range(count)]
    maps = [rng.random((2, 5, 4)).astype(np.float32), np.zeros((0, 6, 3), np.float32)]
    for repeat in ("a", "b"):
        named = ((f"image{i}", label) for i, label in enumerate(labels))
        archives.write_pngs(tmp_path / f"{repeat}.zip", named, indexed=True)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    archive = LabelArchive(tmp_path / "a.zip")
    assert archive.names == [f"image{i}.png" for i in range(count)]
    for found, expected in zip(archive, labels, strict=True):
        np.testing.assert_array_equal(found, expected)
    stack = np.round(maps[0] * 255).astype(np.uint8).reshape(-1, 4)
    archives.write_pngs(tmp_path / "maps.zip", [("x", stack), ("y", np.zeros((6, 3), np.uint8))])
    targets = MapArchive(tmp_path / "maps.zip", [[1, 3], []], 4)
    assert targets[0].shape == (4, 5, 4) and targets[0].dtype == np.float32
    np.testing.assert_allclose(targets[0][[1, 3]], maps[0], atol=0.5 / 255 + 1e-6)
    assert not targets[0][[0, 2]].any()
    np.testing.assert_array_equal(targets[1], np.zeros((4, 6, 3)))


def test_jobs_that_share_a_training_are_kept_apart(store):
    lines = {0: Pipeline(SPLITS, BUDGET, store=store)}
    measures = {1: ("miou", "accuracy", "labels"), 3: ("miou", "labels"), 4: ("miou", "labels", "crf")}
    jobs = experiments._jobs_of(measures, (0,))
    assert len(jobs) == len({job.configuration for job in jobs}) == 18
    order = [job.configuration for job in jobs_module.in_order(jobs[::-1], lines)]
    assert sorted(map(str, order)) == sorted(str(job.configuration) for job in jobs)
    # Two make what six others share: the classifiers and, refined, the labels of Table 4's three networks.
    assert {(c.delta, c.refine) for c in order[:2]} == {(None, True), (0.55, True)}
    assert all(c.delta in (None, 0.55) and c.drs_layers and not c.supervised for c in order[-6:])


def test_processes_change_nothing(store, tables, tmp_path):
    pd.testing.assert_frame_equal(run_table(3, store=tmp_path, **TINY | {"jobs": 2}), tables[3])
    alone, together = contents(store), contents(RunStore(tmp_path))
    assert len(together) > 20 and together.items() <= alone.items(), "every file the same to the last bit"


def test_threads_are_refused(tmp_path):
    threads = joblib.parallel_config(backend="threading", n_jobs=2)
    with threads, pytest.raises(ValueError, match="random generator"):
        run_table(3, store=tmp_path, **TINY | {"jobs": None})


def test_a_row_takes_a_device_that_no_other_row_has(tmp_path, monkeypatch):
    """Rows end at different times: what counts is who is free, not whose turn it is."""
    slots = [(tmp_path / f"{k}.lock", f"cuda:{k}") for k in range(2)]
    begun, ended = threading.Event(), threading.Event()

    def run(row, common, device):
        if row == "long":  # it outlasts all the others
            begun.set()
            assert ended.wait(timeout=60)
        assert begun.wait(timeout=60)  # none of the others is over before it has begun
        if row == "last":
            ended.set()
        return device

    monkeypatch.setattr(jobs_module, "_run_job", run)
    with ThreadPoolExecutor(2) as pool:
        rows = ["long", "short", "short", "short", "last"]
        long, *rest = pool.map(lambda row: jobs_module._run_in_slot(row, {}, slots), rows)
    assert {long, *rest} == {"cuda:0", "cuda:1"} and long not in rest


def test_how_many_processes(monkeypatch):
    monkeypatch.setenv("DRS_DEVICE", "cpu")

    def processes(*asked):
        return jobs_module._processes(*asked, get_budget("ci"))

    cores = joblib.cpu_count(only_physical_cores=True)
    assert processes(None, 100) == (cores, cores, [None])
    for asked, rows in ((3, 100), (8, 2), (1, 100)):
        assert processes(asked, rows) == (asked, min(asked, rows), [None])
    for workers in (5, 1):
        with joblib.parallel_config(n_jobs=workers):
            assert processes(None, 100)[1] == workers


PROGRAM = """
import sys
sys.path[:0] = ["tests/course", "tests"]
import test_tables as t
t.run_table(3, store=sys.argv[1], **t.TINY)
"""


def test_killed_and_started_again_it_gives_the_same_numbers(store, tables, tmp_path):
    target = RunStore(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT)
    while process.poll() is None and len(stored(target)) < 7:
        time.sleep(0.005)
    time.sleep(random.random() * 0.1)
    assert process.poll() is None, "it was to be killed while at work"
    process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()
    before = {entry: os.stat(path).st_mtime_ns for entry, path in stored(target).items()}
    assert len(before) >= 7
    old = tmp_path / "checkpoints" / "segment-0123456789abcdef01234567.pt"
    old.parent.mkdir(exist_ok=True)
    old.touch()
    os.utime(old, (time.time() - 31 * 24 * 3600,) * 2)
    table = run_table(3, store=target, **TINY)
    pd.testing.assert_frame_equal(table, tables[3])
    assert contents(target).items() <= contents(store).items()
    after = stored(target)
    kept = {entry for entry, when in before.items() if os.stat(after[entry]).st_mtime_ns == when}
    assert kept == set(before), "not made again"
    left = [*tmp_path.glob("*/.tmp-*"), *tmp_path.glob("checkpoints/*")]
    assert not left, "what the killed one left is cleared away"


def test_a_failing_row_costs_no_other_row(tables, tmp_path, monkeypatch, capsys):
    train = stages.train_classifier

    def failing(recipe, *args, **options):
        if recipe.delta == 0.55:
            raise TrainingDiverged("the loss is nan")
        return train(recipe, *args, **options)

    said = "2 of 4 rows failed.*\n.*delta 0.55.*the loss is nan"
    with monkeypatch.context() as patch, pytest.raises(RowsFailed, match=said) as caught:
        patch.setattr(stages, "train_classifier", failing)
        run_table(3, store=tmp_path, **TINY)
    pd.testing.assert_frame_equal(run_table(3, store=tmp_path, **TINY), tables[3])
    partial = caught.value.tables[3]
    assert partial["measured"].isna().tolist() == [False, False, True, True]
    pd.testing.assert_frame_equal(partial[:2], tables[3][:2])
    assert "TrainingDiverged" in next(iter(caught.value.failures.values()))[1]

    monkeypatch.setattr("drs_course.__main__.run_tables", lambda *a, **k: (_ for _ in ()).throw(caught.value))
    assert main(["tables", "--tables", "3", "--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr()
    assert "learnable, with refine" in output.out and "the loss is nan" in output.err


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    tried = []

    def full(self, name, model):
        tried.append(name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EntryWriter, "weights", full)
    with pytest.raises(StoreError, match="disk.*full"):
        run_table(3, store=tmp_path, **TINY)
    assert len(tried) == 1, "no other row trains in vain"


def test_progress_is_shown_and_overwrite_makes_each_stage_again_once(tmp_path, monkeypatch, capsys):
    options, made = TINY | {"store": tmp_path}, []
    first = run_table(3, **options | {"progress": True})
    shown = capsys.readouterr().err
    assert "4 rows | " in shown and "100%" in shown and "label score" in shown
    make = RunStore._make

    def noted(self, folder, meta, *rest):
        made.append((meta["stage"], meta["key"]))
        return make(self, folder, meta, *rest)

    monkeypatch.setattr(RunStore, "_make", noted)
    again = run_table(3, overwrite=True, **options)
    assert sorted(made) == sorted(stored(RunStore(tmp_path))), "every stage once, however many rows share it"
    pd.testing.assert_frame_equal(first, again)


def test_a_run_that_overwrites_goes_on_by_its_name(tmp_path, monkeypatch, capsys):
    """The second row's training fails; what was finished is read when the run is started again."""
    options = TINY | {"store": RunStore(tmp_path)}
    first = run_table(3, **options)
    metas = {entry: folder / "meta.json" for entry, folder in stored(options["store"]).items()}

    def runs():
        return {entry: json.loads(path.read_text())["run"] for entry, path in metas.items()}

    def failing(*args, **kwargs):
        raise ValueError("no refinement today")

    assert set(runs().values()) == {None}
    with monkeypatch.context() as patch, pytest.raises(RowsFailed) as failed:
        patch.setattr("drs_course.stages.train_refinement", failing)
        run_table(3, **options, overwrite=True)
    [name] = set(runs().values()) - {None}
    assert f"the same command (with overwrite '{name}') goes on" in str(failed.value)
    before, made = runs(), {entry: path.read_text() for entry, path in metas.items()}
    pd.testing.assert_frame_equal(run_table(3, **options, overwrite=name), first)
    assert set(runs().values()) == {name}
    kept = {entry for entry, path in metas.items() if path.read_text() == made[entry]}
    assert kept == {entry for entry, run in before.items() if run == name} and 0 < len(kept) < len(metas)
    run_table(3, **options, overwrite=True)
    assert not {None, name} & set(runs().values()) and len(set(runs().values())) == 1


def test_seeds(store):
    table = run_table(3, seeds=(0, 1), store=store, **TINY)
    assert (table["seeds"] == 2).all()
    for row in range(len(table)):
        values = table.attrs["per_seed"][row]["measured"]
        assert len(values) == 2
        assert table["measured"][row] == pytest.approx(np.mean(values))
        assert table["sd"][row] == pytest.approx(np.std(values, ddof=1))
    assert table["pseudo-label mIoU sd"].max() > 0, "another seed is another training"


def test_the_crf_has_a_column_of_its_own_empty_without_it(store, tables, monkeypatch):
    if crf_available():
        np.testing.assert_array_equal(tables[4]["with CRF"].notna(), tables[4]["measured"].notna())
    monkeypatch.setattr("drs_lib.crf.available", lambda: False)
    table = run_table(4, store=store, **TINY)
    assert table["with CRF"].isna().all() and "pydensecrf" in table.attrs["CRF"]
    assert "not available" in format_table(table)
    pd.testing.assert_series_equal(table["measured"], tables[4]["measured"])


@pytest.mark.parametrize(
    "options, match",
    [
        ({"numbers": (5,)}, "no Table 5"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"seeds": (0.5,)}, "seeds"),
        ({"jobs": 0}, "jobs"),
        ({"budget": "huge"}, "no budget 'huge'"),
        ({"data": "coco"}, "unknown data 'coco'"),
        ({"data": "voc"}, "voc_root.*drs_course download"),
    ],
)
def test_bad_arguments(options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        run_tables(store=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_voc_root_sends_to_the_download(tmp_path, capsys):
    missing = str(tmp_path / "nowhere")
    assert main(["tables", "--data", "voc", "--voc-root", missing, "--store", str(tmp_path)]) == 1
    assert "drs_course download" in capsys.readouterr().err


def test_saved_tables_come_back(tables, tmp_path, monkeypatch):
    for number, table in tables.items():
        save_table(table, tmp_path / f"table{number}-critters.json")
        back = load_table(tmp_path / f"table{number}-critters.json")
        pd.testing.assert_frame_equal(back, table)
        assert back.attrs == table.attrs
        csv = pd.read_csv(tmp_path / f"table{number}-critters.csv")
        assert list(csv.columns) == list(table.columns) and len(csv) == len(table)
    monkeypatch.setattr(experiments, "REFERENCE", tmp_path)
    pd.testing.assert_frame_equal(reference_table(2), tables[2])
    with pytest.raises(FileNotFoundError, match="python -m drs_course reference --data voc --tables 2"):
        reference_table(2, "voc")
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_a_table_is_replaced_whole_or_not_at_all(tables, tmp_path, monkeypatch):
    save_table(tables[3], tmp_path / "table3.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        save_table(tables[1], tmp_path / "table3.json")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_tables_for_terminal_and_notebook(tables):
    text = format_table(tables[1])
    lines = text.splitlines()
    assert lines[0].startswith("Table 1: ") and "non-learnable with δ=0.55" in text
    assert lines[1].split()[:3] == ["configuration", "paper", "measured"]
    row = next(line for line in lines if line.startswith("learnable"))
    assert f"62.9  {tables[1]['measured'][0]:8.1f}" in row and "72.6" in row
    for condition in ("budget: ci", "alpha: 0.2", "beta: 0.06", "seeds: [0]", "rule: paper", "CRF: off"):
        assert condition in text
    lines = format_table(tables[2]).splitlines()
    assert next(line for line in lines if line.startswith("DRS in layers 5-6")).split()[4:10] == [*"----xx"]
    assert f"refined alpha: {BUDGET.refined_alpha}; renormalize: False" in format_table(tables[3])
    text = format_table(tables[4])
    assert text.count("DeepLab-ASPP (ResNet-101)\n") == 1 and "SGAN (Yao and Gong 2020)" in text
    for table in tables.values():
        html = style_table(table).to_html()
        assert "measured" in html and "alpha: 0.2" in html and ">nan<" not in html
    assert "✓" in style_table(tables[2]).to_html()


def test_the_command_line(tables, tmp_path, monkeypatch, capsys):
    seen = {}

    def measured(numbers, **options):
        seen.update(options, numbers=numbers)
        return {number: tables[number] for number in numbers}

    monkeypatch.setattr("drs_course.__main__.run_tables", measured)
    out = tmp_path / "out"
    arguments = ["--tables", "1", "3", "--seeds", "0", "1", "--jobs", "2", "--budget", "ci"]
    assert main(["tables", *arguments, "--out", str(out), "--no-figures"]) == 0
    assert seen["numbers"] == [1, 3] and seen["seeds"] == [0, 1] and seen["jobs"] == 2
    assert seen["overwrite"] is None
    assert sorted(p.name for p in out.iterdir()) == ["table1.csv", "table1.json", "table3.csv", "table3.json"]
    output = capsys.readouterr().out
    assert "Table 1" in output and "Table 3" in output and "minutes" in output and str(out) in output
    assert main(["tables", "--tables", "3", "--out", str(out / "table1.csv")]) == 1
    assert "not everything could be written" in capsys.readouterr().err
    monkeypatch.setattr(experiments, "REFERENCE", tmp_path / "reference")
    assert main(["reference", "--tables", "3"]) == 0
    pd.testing.assert_frame_equal(reference_table(3), tables[3])
    for bad in ("--tables 5", "--jobs 0", "--seeds -1", "--budget huge", "--data coco"):
        with pytest.raises(SystemExit) as stopped:
            main(["tables", *bad.split()])
        assert stopped.value.code == 2


def test_the_command_line_names_a_run_that_overwrites(tmp_path, monkeypatch, capsys):
    given = []

    def stopped(numbers, overwrite, **options):
        given.append(overwrite)
        raise KeyboardInterrupt

    monkeypatch.setattr("drs_course.__main__.run_tables", stopped)
    for arguments in (["--overwrite"], ["--overwrite", "monday"], ["--overwrite", ""], ["--overwrite"]):
        assert main(["tables", "--store", str(tmp_path), *arguments]) == 130
        output, name = capsys.readouterr(), given[-1]
        assert f"--overwrite {name} goes on" in output.out and f"with --overwrite {name} goes" in output.err
    assert given[1] == "monday" and len(set(given)) == 4 and all(given)
    assert main(["tables", "--store", str(tmp_path)]) == 130 and given[-1] is None
    assert "overwrite" not in "".join(capsys.readouterr())


def test_figures_are_drawn_again_when_their_stages_were_made_again(store, tables, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("drs_course.__main__.run_tables", lambda *a, **k: tables)
    monkeypatch.setattr(
        "drs_course.plots.make_figures",
        lambda folder, **k: (folder.mkdir(parents=True, exist_ok=True), drawn.append(k)),
    )
    monkeypatch.setattr(
        "drs_course.__main__.Pipeline",
        lambda seed, store, **k: Pipeline(SPLITS, BUDGET, seed=seed, store=store),
    )
    arguments = ["tables", "--store", str(store.root), "--out", str(tmp_path), "--budget", "ci"]
    for expected in (1, 1):
        assert main(arguments) == 0 and len(drawn) == expected
    assert drawn[0]["budget"].name == "ci" and drawn[0]["seeds"] == [0]
    assert main([*arguments, "--seeds", "0", "1"]) == 0 and len(drawn) == 2
    made_at = RunStore.made_at
    monkeypatch.setattr(RunStore, "made_at", lambda self, *entry: (made_at(self, *entry) or 0) + 1)
    assert main([*arguments, "--seeds", "0", "1"]) == 0 and len(drawn) == 3


def test_voc_runs_the_same_way(voc_tree, tmp_path):
    budget = get_budget("ci", "voc")
    line = Pipeline("voc", budget, voc_root=str(voc_tree), store=tmp_path)
    scores = line.scores(Configuration(), ("miou", "accuracy", "labels"))
    assert 0 <= scores["miou"]["miou"] <= 1 and len(scores["miou"]["iou"]) == 21
    labels = line.labels(Configuration())
    assert [name.removesuffix(".png") for name in labels.names] == line.data.train.names
    for i in range(len(labels)):
        assert labels[i].shape == line.data.train.mask(i).shape
    pairs = [(labels[i], line.data.train.mask(i)) for i in range(len(labels))]
    assert 100 * scores["labels"]["miou"] == pytest.approx(direct_miou(pairs, 21), abs=1e-3)


def test_the_course_on_critters(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRS_STORE", raising=False)
    arguments = ["tables", "--budget", "ci", "--tables", "3", "--jobs", "1", "--quiet", "--no-figures"]

    def printed():
        assert main(arguments) == 0
        return capsys.readouterr().out.split("minutes")[0].rsplit("\n", 1)[0]

    cold = printed()
    made = stored(RunStore(tmp_path / "runs"))
    table = load_table(tmp_path / "results" / "table3.json")
    assert table["measured"].notna().all() and table.attrs["data"] == "critters"
    monkeypatch.setattr(Pipeline, "get", lambda self, stage: pytest.fail(f"{stage.title} was asked for"))
    assert printed() == cold
    assert stored(RunStore(tmp_path / "runs")) == made


def test_a_table_row_by_row(store, tables, tmp_path):
    line = Pipeline(SPLITS, BUDGET, store=RunStore(tmp_path))
    assert experiments.stored_table(1, line)["measured"].isna().all()
    row = experiments.run_row(1, Configuration(delta=0.7), line)
    pd.testing.assert_frame_equal(row, tables[1][tables[1]["delta"] == 0.7])
    assert format_table(row).endswith("data: tiny; budget: ci; seeds: [0]")
    so_far = experiments.stored_table(1, line)
    assert so_far["measured"].notna().tolist() == [delta == 0.7 for delta in so_far["delta"]]
    whole = experiments.stored_table(1, Pipeline(SPLITS, BUDGET, store=store))
    pd.testing.assert_frame_equal(whole, tables[1])
    assert whole.attrs == tables[1].attrs

    def metas(delta, **options):
        experiments.run_row(1, Configuration(delta=delta), line, **options)
        return {entry: (folder / "meta.json").read_text() for entry, folder in stored(line.store).items()}

    first = {entry: (folder / "meta.json").read_text() for entry, folder in stored(line.store).items()}
    assert metas(0.7) == first
    made = metas(0.5)
    again = metas(0.7, overwrite=True)
    assert experiments.stored_table(1, line)["measured"].notna().sum() == 2
    assert again.keys() == made.keys()
    assert {entry for entry in made if again[entry] != made[entry]} == set(first)
    assert line.run is None
    with pytest.raises(ValueError, match="Table 1 has no row for CAM"):
        experiments.run_row(1, CAM, line)


def test_what_is_in_the_store_is_told_without_making_it(line, store, tmp_path):
    stages = [("classify", CAM), ("refine", REFINED), ("labels", REFINED), ("evaluate", CAM)]
    assert all(line.has(*stage) for stage in stages)
    assert not line.has("classify", Configuration(delta=0.123))
    assert not Pipeline(SPLITS, BUDGET, store=store, seed=7).has("classify", CAM)
    empty = Pipeline(SPLITS, BUDGET, store=tmp_path / "runs")
    assert not any(empty.has(*stage) for stage in stages) and not empty.store.root.exists()
    assert not Pipeline(SPLITS, BUDGET, store=store, run="another").has("classify", CAM)
    with pytest.raises(ValueError, match="its refine is False"):
        line.has("refine", CAM)


def test_overwriting_one_training_leaves_what_it_reads(tmp_path):
    line, seen = Pipeline(SPLITS, BUDGET, store=tmp_path), []
    line.progress = lambda title, step, steps, epoch, loss: seen.append((title, step, steps))
    first = line.segmentation_network(CAM).state_dict()
    assert [one for one in seen if one[1] == one[2]] == [("classify", 2, 2), ("segment", 2, 2)]
    seen.clear()
    again = line.segmentation_network(CAM, overwrite=True).state_dict()
    assert {title for title, *_ in seen} == {"segment"}
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_held_against_the_reference(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "REFERENCE", tmp_path)
    table = tables[1].copy()
    assert "Nothing is compared" in experiments.compare_with_reference(table)
    table.attrs = table.attrs | {"budget": "laptop", "data": "critters"}
    save_table(table, experiments.reference_path(1))
    assert experiments.compare_with_reference(table) == (
        "8 rows, all within 5.0 points of the reference; the farthest is 0.0 away."
    )
    moved = table.copy()
    moved.loc[3, "measured"] += 5.5
    moved.loc[5, "measured"] = math.nan
    with pytest.raises(AssertionError, match="1 rows are more than 5.0 points .*non-learnable with δ=0.70: "):
        experiments.compare_with_reference(moved)
    assert experiments.compare_with_reference(moved, 6.0).startswith("7 rows, all within 6.0 points")
    moved["measured"] = math.nan
    assert experiments.compare_with_reference(moved) == "No row is measured yet."


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_the_paper_s_number_that_is_after_crf_is_said_to_be_below_its_table(number):
    table = reference_table(number)
    for text in (format_table(table), style_table(table).to_html()):
        assert ("70.4 is after CRF, 69.4 without" in text.replace("\n", " ")) == (number == 4)
