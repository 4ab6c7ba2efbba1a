"""``python -m drs_course.doctor``: what is there, what is missing, and the command that mends it.

`examine` looks at the Python that runs it, which in a notebook is the kernel's. Nothing is imported that may
be missing or slow: torch only if its package is there, to ask for devices.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

SHIPPED = Path(__file__).parents[1] / "drs_lib" / "shipped"
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
    found += [_device(), _compiled(), _weights(), _store()]
    if voc_root is not None:
        found += [_voc(voc_root), _downloaded(voc_root)]
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
    plain = [line for line in listed if "extra ==" not in line]
    return plain + [
        line.split(";")[0].strip() for line in listed if re.search(r"extra == .(crf|cluster).", line)
    ]


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
    except importlib.metadata.PackageNotFoundError:
        # conda's package of the same module has another name
        return Finding(name, "ok", "installed")
    if least and _numbers(version) < _numbers(least):
        return Finding(name, status, f"{version} is too old", remedy)
    return Finding(name, "ok", version)


def _numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _device():
    if importlib.util.find_spec("torch") is None:
        return Finding("device", "missing", "unknown without torch")
    try:
        from drs_lib.runtime import pick_device

        device = pick_device()
    except Exception as error:  # a broken installation fails in many ways; each is to be read, none to raise
        remedy = "reinstall torch and torchvision together: 'make clean-env env'"
        return Finding("device", "missing", f"{type(error).__name__}: {error}", remedy)
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    return Finding("device", "ok", f"{device} ({name})")


def _compiled():
    """Whether DRS's loops compile here; the first time, this compiles them."""
    what = "compiled DRS"
    try:
        from drs_lib import kernels
    except ImportError as error:
        return Finding(what, "optional", f"unknown: {error}")
    if kernels.available():
        return Finding(what, "ok", "numba's results are those of the plain form")
    return Finding(what, "optional", "no; a training step takes about twice as long", kernels.REMEDIES["cpu"])


def _weights():
    missing = [
        name
        for name in ("mini", "mini_resnet", "saliency")
        if not (SHIPPED / f"{name}.safetensors").is_file()
    ]
    if missing:
        remedy = f"python -m drs_course pretrain --only {' '.join(missing)}"
        return Finding("Critters weights", "missing", f"no {', '.join(missing)}", remedy)
    return Finding("Critters weights", "ok", "mini, mini_resnet, saliency")


def _store():
    if importlib.util.find_spec("filelock") is None:
        remedy = f'"{sys.executable}" -m pip install filelock'
        return Finding("run store", "missing", "unknown without filelock", remedy)
    from drs_course.store import RunStore, course_store

    root = RunStore(course_store()).root
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e9
    if not os.access(there, os.W_OK):
        return Finding("run store", "missing", f"{root} is not writable", "set DRS_STORE to a folder that is")
    if free < 1:
        return Finding("run store", "missing", f"{root}: {free:.1f} GB free", "free 1 GB, or set DRS_STORE")
    return Finding("run store", "ok", f"{root}, {free:.0f} GB free")


def _voc(root):
    remedy = f"python -m drs_course download --root {root}"
    if not Path(root).is_dir():
        return Finding(_VOC, "missing", f"no folder {root}", remedy)
    try:
        from drs_lib.data import VOC2012

        splits = {split: VOC2012(root, split) for split in ("trainaug", "val")}
        splits["trainaug"].require_saliency()
    except (FileNotFoundError, ValueError) as error:
        # The message names the command, if one command mends it.
        return Finding("VOC 2012", "missing", str(error), "" if "drs_lib download" in str(error) else remedy)
    return Finding(_VOC, "ok", ", ".join(f"{split} {len(data)}" for split, data in splits.items()))


def _downloaded(root):
    """The weights that come by download: ImageNet's, and the authors'."""
    what = "downloaded weights"
    try:
        from drs_course.download import FILES, TREE, weights_folder
    except ImportError as error:
        return Finding(what, "optional", f"unknown: {error}")
    folder, weights = weights_folder(), [kind for kind in FILES if kind not in TREE]
    if missing := [kind for kind in weights if not (folder / FILES[kind].name).is_file()]:
        remedy = f"python -m drs_course download --root {root} --only {' '.join(missing)}"
        detail = f"not in {folder}: {', '.join(FILES[kind].name for kind in missing)}"
        return Finding(what, "optional", detail, remedy)
    return Finding(what, "ok", f"{', '.join(weights)}, in {folder}")


def main(arguments=None):
    """The command line; returns the exit status: 1 if something is missing without which the course fails."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m drs_course.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--voc-root", metavar="DIR", help="also look at VOC 2012 in this folder")
    findings = examine(parser.parse_args(arguments).voc_root)
    print(report(findings))
    return int(any(finding.status == "missing" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
