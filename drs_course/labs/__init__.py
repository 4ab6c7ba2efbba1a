"""The labs: pages of the course with sliders, on ipywidgets.

    DeltaLab        a localization map while delta is dragged           notebooks 02, 03
    FeatureMapLab   Algorithm 1 on one channel of a feature map         notebook 02
    LayerLab        DRS plugged in and out of six layers                notebook 04
    CueLab          from map and saliency to a pseudo label             notebook 06
    ImageLab        an image of your own                                notebook 01

Each takes the `Pipeline` that `drs_course.notebook.open_course` returns, as in ``DeltaLab(pipeline)``, and is
shown where it is a cell's last line. ``lab.set(delta=0.4)`` moves a control from code, ``lab.state`` reads
them all, ``lab.close()`` removes it.
"""

from drs_course.labs.cue import CueLab
from drs_course.labs.delta import DeltaLab
from drs_course.labs.feature_map import FeatureMapLab
from drs_course.labs.image import ImageLab
from drs_course.labs.layers import LayerLab

__all__ = ["CueLab", "DeltaLab", "FeatureMapLab", "ImageLab", "LayerLab"]
