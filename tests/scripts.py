"""Scripts that are no package's modules, such as those of tools/, as modules."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def load(name):
    """The module of a file, such as "tools/slides.py"."""
    spec = importlib.util.spec_from_file_location(Path(name).stem + "_script", ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks a class's module up
    spec.loader.exec_module(module)
    return module
