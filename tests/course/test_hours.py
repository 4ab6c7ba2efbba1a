"""benchmarks/hours.py: what all four tables need on VOC, and how fast each stage is."""

import importlib.util
import json
from pathlib import Path

import pytest

from drs_course.paper import NETWORKS, table_rows
from drs_lib import networks
from drs_lib.recipes import get_budget

SPEC = importlib.util.spec_from_file_location(
    "hours_benchmark", Path(__file__).parents[2] / "benchmarks" / "hours.py"
)
hours = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hours)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.delenv("DRS_PRECISION", raising=False)
    monkeypatch.setenv("DRS_STORE", str(tmp_path / "store"))


STAGE, COUNT, IMAGES, OPERATIONS, RATE, HOURS, BASIS = range(7)


def by_stage(lines, column):
    return {line[STAGE]: line[column] for line in lines}


def results(path, rows):
    rows = [dict(stage=stage, path=way, images_per_second=rate) for stage, way, rate in rows]
    path.write_text(json.dumps({"device": "NVIDIA H100", "torch": "2.9", "rows": rows}))
    return path


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
    accuracy = {(c.drs_layers, c.delta) for n, c in weak if n == 1}
    expected = {"classify": len(controllers), "accuracy": len(accuracy)}
    expected |= dict.fromkeys(("target", "refine"), len(refined))
    expected |= dict.fromkeys(("labels", "label_score"), len(labels))
    for network in NETWORKS:
        own = {(n, c) for n, c in rows if c.network == network}
        expected[network] = expected[f"evaluate_{network}"] = len({c for _, c in own})
        expected[f"evaluate_crf_{network}"] = len({c for n, c in own if n == 4})
    assert by_stage(hours.table(get_budget(budget, "voc")), COUNT) == expected
    assert not (tmp_path / "store").exists()


def test_images_and_sizes_of_each_stage():
    expected = {"classify": 15 * 2116 * 5, "refine": 15 * 2116 * 5, "labels": 10582, "accuracy": 1464}
    expected |= {"largefov": 20_000 * 10, "aspp": 20_000 * 5 * 2, "evaluate_aspp": 1449}
    assert expected.items() <= by_stage(hours.table(get_budget("paper", "voc")), IMAGES).items()
    release = list(hours.table(get_budget("release", "voc")))
    expected |= {"classify": 15 * 1058 * 10, "refine": 30 * 1058 * 10}
    assert expected.items() <= by_stage(release, IMAGES).items()
    operations = by_stage(release, OPERATIONS)
    assert operations["classify"] == hours.flops("classifier", "vgg16", 320, 320, train=True)
    assert operations["refine"] == hours.flops("refinement", "vgg16", 320, 320, train=True)


def test_an_estimate_is_its_parts():
    budget = get_budget("paper", "voc").for_all(precision="bfloat16")
    rates = by_stage(hours.table(budget, 50), RATE)
    train = hours.flops("classifier", "vgg16", 321, 321, train=True)
    assert 1 / rates["classify"] == pytest.approx(train / 50e12 + 0.010 / 5)
    slow = by_stage(hours.table(budget.for_all(precision="float32"), 50), RATE)
    assert 1 / slow["classify"] == pytest.approx(train / 25e12 + 0.010 / 5)
    maps = sum(hours.flops("classifier", "vgg16", side, side) for side in (256, 320, 384))
    assert 1 / rates["labels"] == pytest.approx(maps / 50e12 + 3 * 0.010 / 32 + 0.004)
    network = hours.flops("largefov", "vgg16", 375, 500)
    assert 1 / rates["evaluate_largefov"] == pytest.approx(network / 25e12 + 0.010 + 0.011)
    crf = 1 / rates["evaluate_crf_largefov"] - 1 / rates["evaluate_largefov"]
    assert crf == pytest.approx(4.3 / 16 + 0.025)
    assert 1 / rates["label_score"] == pytest.approx(0.005)


def test_hours_are_images_at_their_rate_and_the_start_of_each_training():
    for stage, count, images, _, rate, found, basis in hours.table(get_budget("paper", "voc")):
        start = 30 if stage in ("classify", "refine", *NETWORKS) else 0
        assert found == pytest.approx(count * (images / rate + start) / 3600) and basis == "estimated"


def test_what_is_measured_is_used_and_marked(tmp_path, capsys):
    rows = [("classify", "ours", 500.0), ("classify", "plain", 50.0), ("maps", "ours", 90.0)]
    rows += [("evaluate", "ours", 60.0), ("aspp", "plain", 3.0), ("decode", "ours", 800.0)]
    file, budget = results(tmp_path / "stages.json", rows), get_budget("paper", "voc")
    before, found = list(hours.table(budget)), list(hours.table(budget, rates=hours.read_measured(file)))
    measured = {"classify": 500, "target": 90, "evaluate_largefov": 60}
    assert by_stage(found, RATE) == by_stage(before, RATE) | measured
    assert {line[STAGE] for line in found if line[BASIS] == "measured"} == measured.keys()
    hours.main(["--measured", str(file)])
    assert capsys.readouterr().out.splitlines()[-1].endswith("| partly measured |")
    rows = [(line[STAGE], "ours", 100.0) for line in found]
    hours.main(["--measured", str(results(tmp_path / "all.json", rows))])
    assert capsys.readouterr().out.splitlines()[-1].endswith(" | measured |")


@pytest.mark.parametrize(
    "content, match",
    [
        (None, "No such file"),
        ("{", "is not what benchmarks/pipeline.py --json writes"),
        ('{"device": "H100", "torch": "2.9"}', r"KeyError\('rows'\)"),
        ([("classify", "ours", 0)], "classify has 0.0 images per second, expected above 0"),
        ([("classify", "ours", "fast")], "fast"),
    ],
)
def test_a_bad_results_file_is_one_clear_error(tmp_path, content, match):
    file = tmp_path / "stages.json"
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        results(file, content)
    with pytest.raises(SystemExit, match=match):
        hours.main(["--measured", str(file)])


@pytest.mark.parametrize("given", ["--teraflops 0", "--budget ci"])
def test_options_that_mean_nothing_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        hours.main(given.split())
    assert given.split()[0] in capsys.readouterr().err
