"""The doctor names what is missing and the command that mends it."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import write_voc_tree

import drs_doctor as doctor
from drs_course import store
from drs_course.download import FILES, TREE

ROOT = Path(__file__).parents[2]


def without(monkeypatch, *modules):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in modules else find(n, *a))


def finding(what, **options):
    [found] = [f for f in doctor.examine(**options) if f.what == what]
    return found


def test_a_whole_installation_is_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DRS_STORE", str(tmp_path / "runs"))
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert out.endswith("The course can run.\n")
    assert {"Python", "torch", "numba", "device", "Critters weights", "run store"} <= {
        line[10:].split("  ")[0] for line in out.splitlines()
    }
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("known", [True, False], ids=["installed", "from a folder"])
def test_a_missing_package_gets_its_command(monkeypatch, capsys, known):
    if not known:

        def requires(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "requires", requires)
    without(monkeypatch, "numba", "pydensecrf", "dask_jobqueue", "distributed")
    assert finding("numba").status == "missing"
    assert f'"{sys.executable}" -m pip install "numba' in finding("numba").remedy
    crf = finding("pydensecrf2")
    assert crf.status == "optional" and "make crf" in crf.remedy and "CRF columns" in crf.remedy
    for name in ("dask-jobqueue", "distributed") if known else ():
        status, remedy = finding(name).status, finding(name).remedy
        assert status == "optional" and f'pip install "{name}' in remedy and "tables on a cluster" in remedy
    assert doctor.main([]) == 1
    assert "can't run yet: numba." in capsys.readouterr().out


def run(*command):
    """Python in a process of its own."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


def test_where_nothing_is_installed_everything_is_named():
    done = run("-S", "-m", "drs_doctor")
    missing = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("missing")}
    assert {"torch", "numpy", "numba", "device", "compiled", "run"} <= missing
    assert done.returncode == 1 and "The course can't run yet: torch, torchvision" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("absent", ["filelock", "pandas", "torch"])
def test_where_one_package_is_missing_the_rest_is_looked_at(absent):
    code = f"import sys; sys.modules[{absent!r}] = None; from drs_doctor import main; sys.exit(main([]))"
    done = run("-c", code)
    assert done.returncode == 1 and f"can't run yet: {absent}" in done.stdout and done.stderr == ""
    [found] = [line for line in done.stdout.splitlines() if line.startswith(f"missing   {absent} ")]
    assert "not installed for this Python" in found and "\nok        Critters weights" in done.stdout


def test_a_notebook_s_store_is_the_course_s(monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(store, "__file__", str(tmp_path / "drs_lib" / "store.py"))
    monkeypatch.delenv("DRS_STORE", raising=False)
    for folder in ("notebooks", "."):
        monkeypatch.chdir(tmp_path / folder)
        assert finding("run store").detail.startswith(f"{tmp_path / 'runs'}, ")
    monkeypatch.setenv("DRS_STORE", str(tmp_path / "mine"))
    assert finding("run store").detail.startswith(f"{tmp_path / 'mine'}, ")


def test_an_old_package_is_named(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "2.5.1+cu124" if n == "torch" else real(n))
    found = finding("torch")
    assert found[1:3] == ("missing", "2.5.1+cu124 is too old") and "torch>=2.6" in found.remedy


def test_a_broken_device_weights_and_store(monkeypatch, tmp_path):
    monkeypatch.setenv("DRS_DEVICE", "cuda:99")
    assert finding("device").status == "missing"
    monkeypatch.setattr(doctor, "SHIPPED", tmp_path)
    assert "drs_course pretrain --only mini mini_resnet saliency" in finding("Critters weights").remedy
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3e8}))
    assert "0.3 GB free" in finding("run store").detail


def test_voc_is_looked_at_when_asked(tmp_path):
    assert "VOC 2012" not in [f.what for f in doctor.examine()]
    for root in (tmp_path / "nowhere", tmp_path):
        missing = finding("VOC 2012", voc_root=root)
        assert missing.status == "missing"
        assert "drs_course download --root" in missing.detail + missing.remedy
    tree = write_voc_tree(tmp_path)
    assert finding("VOC 2012", voc_root=tmp_path).status == "ok"
    shutil.rmtree(tree / "saliency_map")
    found = finding("VOC 2012", voc_root=tmp_path)
    assert found.status == "missing" and "--only saliency" in found.detail and not found.remedy
    ready = [f for f in doctor.examine() if f.status != "missing"]
    assert doctor.report([*ready, found]).endswith("The course can run, but not on VOC yet.")


def test_downloaded_weights_that_are_missing_are_optional_and_named(tmp_path, voc_tree, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    weights = [kind for kind in FILES if kind not in TREE]
    for kind in weights[:-2]:
        (folder / FILES[kind].name).touch()
    found = finding("downloaded weights", voc_root=voc_tree)
    assert found.status == "optional" and str(folder) in found.detail
    assert found.remedy == f"python -m drs_course download --root {voc_tree} --only {' '.join(weights[-2:])}"
    for kind in weights[-2:]:
        (folder / FILES[kind].name).touch()
    assert finding("downloaded weights", voc_root=voc_tree).status == "ok"


def test_it_runs_without_loading_the_library_s_heavy_parts():
    code = "import sys, drs_doctor; print(sorted({'torch', 'numba', 'pandas'} & set(sys.modules)))"
    assert run("-c", code).stdout.strip() == "[]"
