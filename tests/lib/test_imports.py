"""The two packages: what each may import, and how the library does with nothing but what it needs."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = {"torch", "torchvision", "numpy", "PIL", "safetensors", "tqdm"}
# `import drs_lib` and one map, where an import that drs_lib itself makes finds only what is needed.
PROGRAM = f"""
import builtins, sys
find, allowed = builtins.__import__, {NEEDED!r} | set(sys.stdlib_module_names) | {{"drs_lib"}}
def refuse(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and (globals or {{}}).get("__name__", "").startswith("drs_lib"):
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{{name}} is not installed")
    return find(name, globals, locals, fromlist, level)
builtins.__import__ = refuse
import drs_lib, torch
from drs_lib.data import normalize
x = torch.randn(2, 3, 5, 5)
limit = 0.5 * x.relu().amax((2, 3), keepdim=True)
assert torch.equal(drs_lib.suppress(x, 0.5), torch.minimum(x.relu(), limit))
data = drs_lib.Critters("val", size=64, length=2)
maps = drs_lib.localization_maps(drs_lib.classifier("mini", 6), normalize(data[0][0][None]))
assert maps.shape == (1, 6, 64, 64)
names = [getattr(drs_lib, name) for name in drs_lib.__all__]
print(len(names), "matplotlib" in sys.modules, "drs_course" in sys.modules)
"""


def test_the_library_needs_six_packages():
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "numba" in run.stderr, "it should say that DRS runs uncompiled"
    count, *loaded = run.stdout.split()
    assert int(count) > 10 and loaded == ["False", "False"]


def test_the_course_s_figures_need_no_display(tmp_path):
    gone = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    program = (
        "import sys, torch, matplotlib.pyplot as plt; from drs_course import plots; "
        "plots.panels([{'map': torch.rand(8, 8)}]); plt.savefig(sys.argv[1])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "map.png")]
    subprocess.run(command, env=environment, cwd=ROOT, check=True)
    assert (tmp_path / "map.png").stat().st_size > 1000
