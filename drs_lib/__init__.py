"""Discriminative Region Suppression (Kim, Han, Kim, AAAI 2021), and the pipeline of its Figure 3.

The course that stands on it, with tables, exercises and labs, is `drs_course`.
"""

from drs_lib.data import VOC2012, Critters
from drs_lib.drs import DRS, ConstantController, LearnableController, suppress
from drs_lib.labels import pseudo_labels
from drs_lib.maps import localization_maps, refined_maps
from drs_lib.networks import classifier, deeplab, refinement_network
from drs_lib.plug import plug_drs

__version__ = "0.1.0"

__all__ = [
    "DRS",
    "VOC2012",
    "ConstantController",
    "Critters",
    "LearnableController",
    "classifier",
    "deeplab",
    "localization_maps",
    "plug_drs",
    "pseudo_labels",
    "refined_maps",
    "refinement_network",
    "suppress",
]
