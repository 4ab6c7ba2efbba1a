"""``python -m drs_course figures``: what can be drawn from the stored runs, and what is left out."""

from PIL import Image

from drs_course.__main__ import main
from drs_course.paper import Configuration
from drs_course.stages import Pipeline


def test_figures_are_drawn_from_what_is_stored_and_the_rest_is_named(tmp_path, capsys):
    runs, out = str(tmp_path / "runs"), str(tmp_path / "out")
    arguments = ["figures", "--budget", "ci", "--store", runs, "--out", out]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "figure1 is left out" in printed and "delta_lab is left out" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.png"]
    pipeline = Pipeline("critters", "ci", store=tmp_path / "runs")
    for configuration in (Configuration(drs_layers=()), Configuration(delta=0.4), Configuration()):
        pipeline.classifier(configuration)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "figure1 is left out" in printed and "delta_lab is left out" not in printed
    for name in ("suppression", "figure5", "delta_lab"):
        assert str(tmp_path / "out" / f"{name}.png") in printed
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert min(image.size) > 100
