"""benchmarks/hours.py: what all four tables need on VOC, how fast each stage is, and how rows share GPUs."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from drs_course.paper import NETWORKS, table_rows
from drs_lib import networks
from drs_lib.recipes import get_budget


def load():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "hours.py"
    spec = importlib.util.spec_from_file_location("hours_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hours = load()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.delenv("DRS_PRECISION", raising=False)
    monkeypatch.setenv("DRS_STORE", str(tmp_path / "store"))


def report(*given):
    return hours.project(hours.arguments([str(part) for part in given]))


def by_stage(found, key):
    return {row["stage"]: row[key] for row in found["stages"]}


def results(path, rows, **changes):
    rows = [dict(stage=stage, path=way, images_per_second=rate) for stage, way, rate in rows]
    path.write_text(json.dumps({"device": "NVIDIA H100", "torch": "2.9", "rows": rows} | changes))
    return path


@pytest.mark.parametrize(
    "rows, gpus, makespan, waiting",
    [
        (["ab", "ac"], 1, 9, 0),  # a is made once
        (["ab", "ac"], 2, 7, 3),  # the second row waits for a
        (["ab", "ac"], 5, 7, 3),  # and other GPUs have nothing to do
        (["d", "e", "e", "f", "g"], 2, 5, 0),  # what is done costs nothing
        (["a", "eac"], 2, 7, 2),  # a row comes to a stage that is half done
        (["ea", "ga", "f"], 2, 5, 3),  # f begins when the first of the rows ends
        (["d", "abc"], 2, 9, 0),
    ],
)
def test_rows_are_started_in_order_and_wait_for_each_others_stages(rows, gpus, makespan, waiting):
    seconds = dict(a=3, b=2, c=4, d=5, e=1, f=1, g=1)
    found = hours.schedule(rows, seconds, gpus)
    assert (found.makespan, found.waiting) == (makespan, waiting)


def test_the_longest_chain_is_that_of_stages_and_not_of_rows():
    parents = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c"), "e": ()}
    assert hours.longest_chain(parents, dict(a=1, b=5, c=2, d=1, e=6.5)) == 7
    assert hours.longest_chain(parents, dict(a=1, b=1, c=2, d=1, e=6.5)) == 6.5


def test_operations_of_two_convolutions():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1, stride=2))
    first, second = 2 * 3 * 9 * 8 * 10 * 12, 2 * 8 * 5 * 5 * 6
    assert hours.count_flops(model, 10, 12, train=False) == first + second
    # Backwards once for the weights, and once for the input, which the image doesn't need.
    assert hours.count_flops(model, 10, 12, train=True) == 2 * first + 3 * second


def test_operations_of_the_classifier():
    sides, before, expected = (32, 16, 8, 4, 4, 4), 3, 0
    for (channels, convolutions), side in zip(networks.VGG16, sides, strict=True):
        for _ in range(convolutions):
            expected += 2 * 9 * before * channels * side**2 + 2 * channels**2  # with the controller
            before = channels
    assert hours.flops("classifier", "vgg16", 32, 32) == expected + 2 * 512 * 20 * 4**2


@pytest.mark.parametrize("budget", ["paper", "release"])
def test_stages_are_those_of_the_tables_each_once(budget, tmp_path):
    rows = [(n, row.configuration) for n in (1, 2, 3, 4) for row in table_rows(n) if row.configuration]
    weak = {(n, c) for n, c in rows if not c.supervised}
    controllers = {(c.drs_layers, c.delta) for _, c in weak}
    refined = {(c.drs_layers, c.delta) for _, c in weak if c.refine}
    labels = {(c.drs_layers, c.delta, c.refine) for _, c in weak}
    expected = {
        "classify": len(controllers),
        "accuracy": len({(c.drs_layers, c.delta) for n, c in weak if n == 1}),
        "target": len(refined),
        "refine": len(refined),
        "labels": len(labels),
        "label_score": len(labels),
    }
    for network in NETWORKS:
        own = {(n, c) for n, c in rows if c.network == network}
        expected[network] = expected[f"evaluate_{network}"] = len({c for _, c in own})
        expected[f"evaluate_crf_{network}"] = len({c for n, c in own if n == 4})
    work = hours.plan(get_budget(budget, "voc"))
    assert work.counts() == expected
    assert len(work.rows) == len({c for _, c in rows})
    assert {stage for row in work.rows for stage in row} == work.kinds.keys() == work.parents.keys()
    assert not (tmp_path / "store").exists()


def test_a_row_makes_a_stage_after_those_that_it_needs():
    work = hours.plan(get_budget("paper", "voc"))
    for row in work.rows:
        assert all(row.index(parent) < i for i, stage in enumerate(row) for parent in work.parents[stage])


def test_images_of_each_stage():
    expected = {"classify": 15 * 2116 * 5, "refine": 15 * 2116 * 5, "labels": 10582, "accuracy": 1464}
    expected |= {"largefov": 20_000 * 10, "aspp": 20_000 * 5 * 2, "evaluate_aspp": 1449}
    paper, release = (get_budget(name, "voc") for name in ("paper", "release"))
    assert {kind: hours.images_of(kind, paper) for kind in expected} == expected
    expected |= {"classify": 15 * 1058 * 10, "refine": 30 * 1058 * 10}
    assert {kind: hours.images_of(kind, release) for kind in expected} == expected


def test_an_estimate_is_its_parts():
    options = hours.arguments("--teraflops 50 --step-ms 8 --start-s 7 --crf-seconds 2 --cores 4".split())
    budget = get_budget("paper", "voc")
    train = hours.flops("classifier", "vgg16", 321, 321, train=True)
    found = hours.estimate("classify", budget, options)
    assert found.seconds == pytest.approx(train / 50e12 + 0.008 / 5)
    assert (found.start, found.basis) == (7, "estimated")
    slow = hours.estimate("classify", budget.for_all(precision="float32"), options)
    assert slow.seconds == pytest.approx(train / 25e12 + 0.008 / 5)
    maps = sum(hours.flops("classifier", "vgg16", side, side) for side in (256, 320, 384))
    found = hours.estimate("labels", budget, options)
    assert found.seconds == pytest.approx(maps / 50e12 + 3 * 0.008 / 32 + 0.004) and found.start == 0
    plain, crf = (hours.estimate(f"evaluate{name}_largefov", budget, options) for name in ("", "_crf"))
    network = hours.flops("largefov", "vgg16", 375, 500)
    assert plain.seconds == pytest.approx(network / 25e12 + 0.008 + 0.011)
    assert crf.seconds - plain.seconds == pytest.approx(0.5 + 0.025)
    assert hours.estimate("label_score", budget, options).seconds == pytest.approx(0.005)


def test_the_release_trains_at_its_own_sizes():
    release = get_budget("release", "voc")
    assert hours.flops_of("classify", release) == hours.flops("classifier", "vgg16", 320, 320, train=True)
    assert hours.flops_of("refine", release) == hours.flops("refinement", "vgg16", 320, 320, train=True)
    none = release.replace(refine=release.refine.replace(resize=None))
    with pytest.raises(ValueError, match="refine has neither crop nor resize"):
        hours.flops_of("refine", none)


@pytest.mark.parametrize("budget", ["paper", "release"])
def test_sums_agree(budget):
    found = report("--budget", budget, "--gpus", 1, 3, 8, 100)
    work = found["hours_of_work"]
    assert sum(by_stage(found, "hours").values()) == pytest.approx(work)
    for run in found["schedules"]:
        shared = run["gpus"] * run["hours"]
        assert shared == pytest.approx(work + run["waiting_hours"] + run["idle_hours"])
        assert run["hours"] >= max(work / run["gpus"], found["longest_chain_hours"]) - 1e-9
    one, *more = (run["hours"] for run in found["schedules"])
    assert one == pytest.approx(work) and one > max(more) and found["basis"] == "estimated"
    for row in found["stages"]:
        start = 30 if row["stage"] in ("classify", "refine", *NETWORKS) else 0
        seconds = row["count"] * (row["images"] / row["images_per_second"] + start)
        assert row["hours"] == pytest.approx(seconds / 3600)


def test_what_is_measured_is_used_and_marked(tmp_path):
    rows = [("classify", "ours", 500.0), ("classify", "plain", 50.0), ("maps", "ours", 90.0)]
    rows += [("evaluate", "ours", 60.0), ("aspp", "plain", 3.0), ("decode", "ours", 800.0)]
    file = results(tmp_path / "stages.json", rows, precision="bfloat16")
    before, found = report(), report("--measured", file, "--start-s", 6)
    rates, basis = by_stage(found, "images_per_second"), by_stage(found, "basis")
    measured = {"classify": 500, "target": 90, "evaluate_largefov": 60}
    for stage in rates:
        assert rates[stage] == pytest.approx(
            measured.get(stage, by_stage(before, "images_per_second")[stage])
        )
        assert basis[stage] == ("measured" if stage in measured else "estimated")
    assert by_stage(found, "hours")["classify"] == pytest.approx(16 * (158_700 / 500 + 6) / 3600)
    # Both paths are known of one stage only.
    assert found["plain"] == {
        "stages": ["classify"],
        "hours": pytest.approx(16 * 158_700 / 50 / 3600),
        "ours": pytest.approx(16 * 158_700 / 500 / 3600),
    }
    assert found["basis"] == "partly measured" and before["plain"] is None
    text = hours.show(found)
    assert "Measured on: NVIDIA H100, torch 2.9, bfloat16." in text and "(measured, 10.0 times)" in text
    assert "none comes from a GPU" in hours.show(before) and "plain path" not in hours.show(before)
    paper_s = "with the batches and crops of the budget paper"
    assert paper_s not in text and paper_s in hours.show(report("--measured", file, "--budget", "release"))
    other = results(tmp_path / "other.json", [("decode", "ours", 800.0)])
    assert hours.show(report("--measured", other)) == hours.show(before)


def test_sums_are_measured_when_every_part_is(tmp_path):
    kinds = hours.plan(get_budget("paper", "voc")).counts()
    file = results(tmp_path / "stages.json", [(kind, "ours", 100.0) for kind in kinds])
    found = report("--measured", file, "--start-s", 0)
    assert found["basis"] == "measured" and set(by_stage(found, "basis").values()) == {"measured"}
    assert "TFLOP/s sustained" not in hours.show(found) and "CRF" not in hours.show(found)
    assert report("--measured", file)["basis"] == "partly measured"


@pytest.mark.parametrize(
    "content, match",
    [
        (None, "can't be read: No such file"),
        ("{", "is not what benchmarks/pipeline.py --json writes"),
        ('{"device": "H100", "torch": "2.9"}', "KeyError: 'rows'"),
        ([("classify", "ours", 0)], "classify .ours. has 0 images per second; expected above 0"),
        ([("classify", "ours", "fast")], "has 'fast' images per second"),
        ([("classify", "ours", 5.0), ("classify", "ours", 6.0)], "has classify .ours. twice"),
    ],
)
def test_a_bad_results_file_is_one_clear_error(tmp_path, content, match):
    file = tmp_path / "stages.json"
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        results(file, content)
    with pytest.raises(SystemExit, match=match):
        hours.main(["--measured", str(file), "--json", str(tmp_path / "hours.json")])
    assert not (tmp_path / "hours.json").exists()


def test_every_line_of_the_tables_says_what_it_is(tmp_path, capsys):
    hours.main(["--json", str(tmp_path / "hours.json"), "--gpus", "1", "8"])
    printed = capsys.readouterr().out
    kept = json.loads((tmp_path / "hours.json").read_text())
    lines = [line.split() for line in printed.splitlines()]
    for name in [row["stage"] for row in kept["stages"]] + ["1", "8"]:
        [line] = [words for words in lines if words and words[0] == name]
        assert line[-1] == "estimated"
    hours.main(["--markdown"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == len(kept["stages"]) + 2 + 2 + 2
    assert {row.count("|") for row in rows} == {8, 7}


@pytest.mark.parametrize("given", ["--gpus 0", "--teraflops 0", "--step-ms -1", "--cores 1.5", "--budget ci"])
def test_options_that_mean_nothing_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        hours.arguments(given.split())
    assert given.split()[0] in capsys.readouterr().err
