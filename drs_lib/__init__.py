"""drs_lib: the implementations behind the course on Discriminative Region Suppression.

The public names below are resolved on first use, so that ``import drs_lib`` costs nothing: a worker process
that only runs the CRF never loads torch, and a warm ``make course`` never loads torchvision.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME_OF = {
    "suppress": "drs",
    "DRS": "drs",
    "LearnableController": "drs",
    "ConstantController": "drs",
    "plug_drs": "drs",
    "classifier": "networks",
    "refinement_network": "networks",
    "deeplab": "networks",
    "localization_maps": "localization",
    "pseudo_labels": "labels",
    "Critters": "data",
    "VOC2012": "data",
    "run_table": "experiments",
    "run_tables": "experiments",
    "reference_table": "experiments",
}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name):
    if name in _HOME_OF:
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(set(globals()) | set(__all__))
