"""``python -m drs_doctor``: what is there, what is missing, and the command that mends it.

`examine` looks at the Python that runs it, which in a notebook is the kernel's. It stands beside the two
packages, and imports from them at function level, because all that they import may be what is missing.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

SHIPPED = Path(__file__).parent / "drs_lib" / "shipped"
# Import name of what is not called like its package, and what works without the package.
_IMPORT_NAMES = {
    "dask-jobqueue": "dask_jobqueue",
    "ipython": "IPython",
    "pillow": "PIL",
    "pydensecrf2": "pydensecrf",
}
_OPTIONAL = {
    "pydensecrf2": "everything but the CRF columns of Table 4",
    "dask": "everything but tables on a cluster",
    "distributed": "everything but tables on a cluster",
    "dask-jobqueue": "everything but tables on a cluster with a queue",
}
_VOC = "VOC 2012"
# What is looked for where the course itself isn't installed and so tells no requirements.
_CHIEF = ("torch>=2.6", "torchvision>=0.21", "numpy", "numba", "jupyterlab", "ipywidgets", "pydensecrf2")


class Finding(NamedTuple):
    """One thing looked at: "ok", "missing" (the course doesn't run without) or "optional" (it does)."""

    what: str
    status: str
    detail: str
    remedy: str = ""


def examine(voc_root=None):
    """Look at Python, packages, devices, compiled code, shipped weights, the run store and, if asked, VOC
    2012 and the weights that are downloaded for it.

    voc_root: the folder VOC 2012 is in, or None to leave it out. Returns a list of `Finding`.
    """
    found = [_python(), *map(_package, _requirements())]
    looks = {"device": _device, "compiled DRS": _compiled, "Critters weights": _weights, "run store": _store}
    if voc_root is not None:
        looks |= {_VOC: partial(_voc, voc_root), "downloaded weights": partial(_downloaded, voc_root)}
    for what, look in looks.items():
        try:
            found.append(Finding(what, *look()))
        except ImportError as error:
            found.append(Finding(what, "missing", f"unknown: {error}"))
    return found


def report(findings):
    """The findings as text, in columns, what is to be done at the end of each line that needs it."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:8}  {finding.what:{width}}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':8}  {'':{width}}  -> {finding.remedy}")
    bad = [finding.what for finding in findings if finding.status == "missing"]
    verdict = f"The course can't run yet: {', '.join(bad)}." if bad else "The course can run."
    if bad == [_VOC]:
        verdict = "The course can run, but not on VOC yet."
    return "\n".join([*lines, "", verdict])


def _python():
    return Finding("Python", "ok", f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}")


def _requirements():
    try:
        listed = importlib.metadata.requires("drs-course") or []
    except importlib.metadata.PackageNotFoundError:
        return list(_CHIEF)
    wanted = [line for line in listed if "extra ==" not in line or re.search("(crf|cluster)", line)]
    return [line.split(";")[0].strip() for line in wanted]


def _package(requirement):
    name, least = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*(?:>=\s*([\w.]+))?\s*", requirement).groups()
    remedy = f'"{sys.executable}" -m pip install "{name}{f">={least}" if least else ""}"'
    if name in _OPTIONAL:
        remedy += f" ({_OPTIONAL[name]} works without it)"
        if name == "pydensecrf2":
            remedy = f"'make crf', which needs a C++ compiler, or {remedy}"
    status = "optional" if name in _OPTIONAL else "missing"
    module = _IMPORT_NAMES.get(name, name)
    if importlib.util.find_spec(module) is None:
        return Finding(name, status, "not installed for this Python", remedy)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # conda's package has another name
        return Finding(name, "ok", "installed")
    if least and _numbers(version) < _numbers(least):
        return Finding(name, status, f"{version} is too old", remedy)
    return Finding(name, "ok", version)


def _numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _device():
    import torch

    try:
        from drs_lib.runtime import pick_device

        device = pick_device()
    except Exception as error:  # a broken installation fails in many ways; each is to be read, none to raise
        remedy = "reinstall torch and torchvision together: 'make clean-env env'"
        return "missing", f"{type(error).__name__}: {error}", remedy
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    return "ok", f"{device} ({name})"


def _compiled():
    """Whether DRS's loops compile here; the first time, this compiles them."""
    from drs_lib import kernels

    if kernels.available():
        return "ok", "numba's results are those of the plain form"
    return "optional", "no; a training step takes about twice as long", kernels.REMEDIES["cpu"]


def _weights():
    names = ("mini", "mini_resnet", "saliency")
    missing = [name for name in names if not (SHIPPED / f"{name}.safetensors").is_file()]
    if missing:
        remedy = f"python -m drs_course pretrain --only {' '.join(missing)}"
        return "missing", f"no {', '.join(missing)}", remedy
    return "ok", ", ".join(names)


def _store():
    from drs_course.store import RunStore, course_store

    root = RunStore(course_store()).root
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    if not os.access(there, os.W_OK):
        return "missing", f"{root} is not writable", "set DRS_STORE to a folder that is"
    if free < 1:
        return "missing", f"{root}: {free:.1f} GB free", "free 1 GB, or set DRS_STORE"
    return "ok", f"{root}, {free:.0f} GB free"


def _voc(root):
    from drs_lib.data import VOC2012

    remedy = f"python -m drs_course download --root {root}"
    if not Path(root).is_dir():
        return "missing", f"no folder {root}", remedy
    try:
        splits = {split: VOC2012(root, split) for split in ("trainaug", "val")}
        splits["trainaug"].require_saliency()
    except (FileNotFoundError, ValueError) as error:
        # The message names the command, if one command mends it.
        return "missing", str(error), "" if "drs_course download" in str(error) else remedy
    return "ok", ", ".join(f"{split} {len(data)}" for split, data in splits.items())


def _downloaded(root):
    """The weights that come by download: ImageNet's, and the authors'."""
    from drs_course.download import FILES, TREE, weights_folder

    folder, weights = weights_folder(), [kind for kind in FILES if kind not in TREE]
    if missing := [kind for kind in weights if not (folder / FILES[kind].name).is_file()]:
        remedy = f"python -m drs_course download --root {root} --only {' '.join(missing)}"
        return "optional", f"not in {folder}: {', '.join(FILES[kind].name for kind in missing)}", remedy
    return "ok", f"{', '.join(weights)}, in {folder}"


def main(arguments=None):
    """The command line; returns the exit status: 1 if something is missing without which the course fails."""
    parser = argparse.ArgumentParser(prog="python -m drs_doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--voc-root", metavar="DIR", help="also look at VOC 2012 in this folder")
    findings = examine(parser.parse_args(arguments).voc_root)
    print(report(findings))
    return int(any(finding.status == "missing" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
