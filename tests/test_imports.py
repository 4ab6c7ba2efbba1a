"""The library without what is optional: no CRF, no compiler, no widgets, no display."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ABSENT = ("pydensecrf", "numba", "ipywidgets", "IPython")
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
import drs_lib
assert not [name for name in sys.modules if name.startswith("drs_lib.")], "the names are to be lazy"
names = {{name: getattr(drs_lib, name) for name in drs_lib.__all__}}
import torch
from drs_lib.data import normalize
x = torch.randn(2, 3, 5, 5)
limit = 0.5 * x.relu().amax((2, 3), keepdim=True)
assert torch.equal(drs_lib.suppress(x, 0.5), torch.minimum(x.relu(), limit))
data = drs_lib.Critters("val", size=64, length=2)
network = drs_lib.classifier("mini", 6)
maps = drs_lib.localization_maps(network, normalize(data[0][0][None]))
assert maps.shape == (1, 6, 64, 64)
import matplotlib.pyplot as plt
from drs_course import plots
plots.panels([{{"map": maps[0, 0]}}])
plt.savefig(sys.argv[1])
print(len(names))
"""


def test_the_library_without_what_is_optional(tmp_path):
    gone = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    program = [sys.executable, "-c", PROGRAM, str(tmp_path / "map.png")]
    run = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 10 and (tmp_path / "map.png").stat().st_size > 1000
