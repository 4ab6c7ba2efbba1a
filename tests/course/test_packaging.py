"""The files around the library: what is installed, how the environment is made, what the README promises."""

import ast
import importlib.util
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import drs_lib

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no TOML reader of its own")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("drs_lib", "drs_course")
CONDA_NAMES = {"pytorch": "torch", "playwright-python": "playwright", "dask-core": "dask"}
IMPORT_NAMES = {"PIL": "pillow", "pydensecrf": "pydensecrf2", "yaml": "pyyaml"}
# Under `make test`, make's own variables would reach the makes that are started here.
WITHOUT_MAKE = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def specifiers(lines):
    return {CONDA_NAMES.get(r.name, r.name): r.specifier for r in map(Requirement, lines)}


def requirements(*extras):
    """The versions of the library's packages, and of these extras'."""
    of_extras = (PROJECT["optional-dependencies"][extra] for extra in extras)
    return specifiers(line for lines in (PROJECT["dependencies"], *of_extras) for line in lines)


def test_environment_yml_lists_the_packages_of_pyproject():
    *listed, pip = yaml.safe_load(read("environment.yml"))["dependencies"]
    conda = specifiers(listed)
    own = {name: conda.pop(name) for name in ("python", "pip", "cxx-compiler")}
    pip["pip"].remove("-e .")
    by_pip = specifiers(pip["pip"])
    assert {*by_pip} == {"pydensecrf2", "sphinx-revealjs"}
    assert conda | by_pip == requirements("crf", "test", "cluster", "docs")
    lowest = min(s.version for s in own["python"] if s.operator == ">=")
    assert PROJECT["requires-python"] == f">={lowest}"


def test_the_tests_bring_what_the_site_is_built_with():
    assert requirements("docs").items() <= requirements("test").items()


def test_every_import_of_the_library_is_declared():
    declared = {name.lower() for name in requirements("crf", "cluster")}
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0]: path.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found[node.module.partition(".")[0]] = path.name
    third_party = {IMPORT_NAMES.get(name, name).lower(): path for name, path in found.items()
                   if name not in sys.stdlib_module_names and name not in PACKAGES}  # fmt: skip
    assert {"torch", "numpy"} <= set(third_party)
    # scipy reads one archive format that a user may bring, and triton comes with torch where it can be used.
    undeclared = set(third_party) - declared - {"scipy", "triton"}
    assert not undeclared, {name: third_party[name] for name in undeclared}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """A wheel and an sdist of a copy of the project that has a weights file and a reference file."""
    copy = tmp_path_factory.mktemp("dist") / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "drs_doctor.py", "MANIFEST.in", "README.md", "LICENSE", "LICENSE-docs"):
        shutil.copy(ROOT / name, copy)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("drs_lib/shipped/probe.safetensors", "drs_course/reference/probe.json"):
        (copy / name).write_text("{}")
    build = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    (copy / "dist").mkdir()
    run = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,), (sdist,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    return copy, in_wheel, in_sdist


def test_wheel_and_sdist_have_every_file_of_the_library(distributions):
    copy, in_wheel, in_sdist = distributions
    paths = (path for package in PACKAGES for path in (copy / package).rglob("*") if path.is_file())
    files = {path.relative_to(copy).as_posix() for path in paths}
    files = {name for name in files if "__pycache__" not in name}
    assert {"drs_lib/shipped/probe.safetensors", "drs_course/reference/probe.json", "drs_lib/drs.py"} <= files
    assert not files - in_wheel
    assert not files - in_sdist
    assert {"LICENSE", "LICENSE-docs", "README.md", "drs_doctor.py", "pyproject.toml"} <= in_sdist
    # And nothing beside it.
    info = f"drs_course-{drs_lib.__version__}.dist-info"
    assert {name.split("/")[0] for name in in_wheel} == {*PACKAGES, "drs_doctor.py", info}


def test_citation_names_the_course_and_the_paper():
    cff = yaml.safe_load(read("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert cff["version"] == drs_lib.__version__
    (paper,) = cff["references"]
    of_paper = [paper[key] for key in ("year", "volume", "issue", "start", "end")]
    assert of_paper == [2021, 35, 2, 1754, 1761]
    assert [author["family-names"] for author in paper["authors"]] == ["Kim", "Han", "Kim"]


def test_readme_names_only_commands_that_exist():
    readme = read("README.md")
    targets = set(re.findall(r"^([a-z-]+):.*##", read("Makefile"), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", readme, re.MULTILINE))
    assert {"course", "test", "lab"} <= named
    assert not named - targets
    for module in set(re.findall(r"python -m (drs_\w+[\w.]*)", readme)):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"`([\w./-]+/|LICENSE[\w-]*|[\w-]+\.(?:cff|yml))`", readme):
        places = [ROOT / folder / path for folder in (".", "tests", *PACKAGES)]
        assert path in ("runs/", "results/") or any(place.exists() for place in places), path


def make(*arguments):
    command = ["make", *arguments]
    return subprocess.run(command, cwd=ROOT, env=WITHOUT_MAKE, capture_output=True, text=True)


@needs_make
def test_makefile_hands_its_settings_on():
    settings = ("DATA=voc", "VOC_ROOT=/a folder", "BUDGET=ci", "SEEDS=0 1", "JOBS=3", "TABLES=1 4")
    course = make("-n", "course", *settings).stdout
    for part in ('--data "voc"', '--voc-root "/a folder"', "--budget ci", "--seeds 0 1", "--jobs 3"):
        assert part in course
    assert "--tables 1 4" in course and "--voc-root" not in make("-n", "course").stdout
    tests = make("-n", "test", "PYTEST_ARGS=-x").stdout
    assert "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -x" in tests
    assert "make course" in make().stdout


@needs_make
def test_makefile_says_what_is_missing_where_there_is_no_python(tmp_path):
    run = make("env", "PYTHON=", f"VENV={tmp_path / 'venv'}")
    assert run.returncode != 0
    assert "Python 3.10 or newer is needed" in run.stdout


def test_ci_script_is_executable_bash():
    script = ROOT / ".ci" / "run"
    assert os.name == "nt" or os.access(script, os.X_OK)
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(("ci", "code", "word"), [("true", 1, "must not be skipped"), ("", 0, "2 skipped")])
def test_skipped_notebook_tests_fail_in_ci(tmp_path, ci, code, word):
    shutil.copy(ROOT / "conftest.py", tmp_path)
    skipped = "import pytest\n@pytest.mark.skip(reason='no')\ndef test(): pass\n"
    failing = "import pytest\ndef test_passes(): pass\n@pytest.mark.xfail\ndef test_fails(): assert 0\n"
    (tmp_path / "test_notebooks.py").write_text(skipped)
    (tmp_path / "test_browser.py").write_text("import pytest\npytest.importorskip('no_such_browser')\n")
    (tmp_path / "test_other.py").write_text(failing)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"]
    environment = {**os.environ, "CI": ci, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    # Pytest's status 2 is for the module that was skipped as a whole, at collection.
    assert bool(run.returncode) == bool(code), run.stdout
    assert word in run.stdout


# The environment. An empty project, built by its own backend, stands in for the course; pip is the real one.


def write_wheel(folder, name, version, more=""):
    """An empty package's wheel, and the name of its file."""
    info, file = f"{name}-{version}.dist-info/", f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, file), "w") as wheel:
        wheel.writestr(f"{name}_probe.py", "")
        wheel.writestr(info + "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    return file


BACKEND = f"""
import os, zipfile
{inspect.getsource(write_wheel)}
EXTRAS = "Provides-Extra: test\\nProvides-Extra: crf\\nRequires-Dist: pydensecrf2; extra == 'crf'\\n"
def build_editable(directory, config_settings=None, metadata_directory=None):
    here = os.path.dirname(os.path.abspath(__file__))
    open(os.path.join(here, "built"), "w").close()
    if os.path.exists(os.path.join(here, "fail")):
        raise SystemExit("the backend was told to fail")
    return write_wheel(directory, "probe", "1", EXTRAS)
build_wheel = build_editable
"""


class Environment:
    def __init__(self, folder):
        self.project, self.wheels, self.venv = folder / "project", folder / "wheels", folder / "venv"
        self.project.mkdir()
        self.wheels.mkdir()
        (self.project / "backend.py").write_text(BACKEND)
        self.declare("")

    def declare(self, more):
        (self.project / "pyproject.toml").write_text(
            '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n' + more
        )

    def start(self, *arguments):
        settings = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(self.wheels)}
        command = [sys.executable, ROOT / "tools" / "make_env.py", "--venv", self.venv]
        return subprocess.Popen(
            [*command, "--project", self.project, *arguments],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=os.name != "nt",
        )

    def run(self, *arguments):
        process = self.start(*arguments)
        output, _ = process.communicate()
        return process.returncode, output

    def has(self, package):
        python = self.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        found = subprocess.run([python, "-m", "pip", "show", "-q", package], capture_output=True)
        return found.returncode == 0


def test_environment_is_made_kept_renewed_and_removed(tmp_path):
    env = Environment(tmp_path)
    if os.name != "nt":
        _kill_the_first_installation(env)
    code, output = env.run()
    assert code == 0, output
    assert ("interrupted: making it anew" in output) == (os.name != "nt")
    assert "is ready" in output and env.has("probe")
    assert "CRF package (pydensecrf2) could not be built" in output  # there is no wheel of it, and it goes on
    assert not (env.venv / "drs-unfinished").exists() and not (env.venv / "left-over").exists()

    (env.project / "built").unlink()
    assert env.run() == (0, "")
    assert not (env.project / "built").exists()

    for name in ("cython", "setuptools", "wheel", "pydensecrf2"):
        write_wheel(env.wheels, name, "99.0")
    code, output = env.run("--retry-crf")
    assert code == 0 and "could not be built" not in output, output
    assert env.has("pydensecrf2")

    env.declare("# another project file\n")
    (env.project / "fail").touch()
    code, output = env.run()
    assert code != 0 and "pip could not install the course" in output
    (env.project / "fail").unlink()
    code, output = env.run()
    assert code == 0 and "making it anew" not in output  # pip failed in an orderly way: what is there is kept
    assert env.has("pydensecrf2")

    assert env.run("--remove")[0] == 0
    assert not env.venv.exists()


def _kill_the_first_installation(env):
    first = env.start()
    try:
        deadline = time.monotonic() + 60
        while not (env.venv / "pyvenv.cfg").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(first.pid, signal.SIGKILL)
        # What it had started goes on writing for a while; nobody may build on that.
        code, output = env.run()
        assert code != 0 and "another process is installing" in output
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    (env.venv / "left-over").touch()


@pytest.fixture
def make_env(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_env", ROOT / "tools" / "make_env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_environment_needs_a_new_enough_python_with_ensurepip(make_env, monkeypatch, tmp_path):
    arguments = ["--venv", str(tmp_path / "venv"), "--project", str(ROOT)]
    monkeypatch.setattr(make_env.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        make_env.main(arguments)
    monkeypatch.setattr(make_env.sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match="3.10 or newer is needed, and .* is 3.9"):
        make_env.main(arguments)
    assert not (tmp_path / "venv").exists()


def test_environment_leaves_alone_what_it_did_not_make(make_env, tmp_path):
    (tmp_path / "work.txt").touch()
    (tmp_path / make_env.UNFINISHED).touch()  # the course was being installed into it
    with pytest.raises(SystemExit, match="interrupted.*not made by the course"):
        make_env.main(["--venv", str(tmp_path), "--project", str(ROOT)])
    (tmp_path / make_env.UNFINISHED).unlink()
    with pytest.raises(SystemExit, match="left alone"):
        make_env.main(["--venv", str(tmp_path), "--remove"])
    with pytest.raises(SystemExit, match="no Python with a working pip"):
        make_env.main(["--venv", str(tmp_path), "--project", str(ROOT)])
    assert (tmp_path / "work.txt").exists()
