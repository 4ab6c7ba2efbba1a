"""The course's figures, as functions of arrays that return a matplotlib ``Figure``.

`figure1`, `figure2`, `figure4`, `figure5` and `figure6` are those of the paper. Images are uint8, as a data
set gives them (3, H, W) or as a picture (H, W, 3); maps are (H, W) in [0, 1]; label maps are uint8 (H, W), 0
background, 1..C classes, 255 ignored. Each may be a tensor or an array.

`python -m drs_course figures` (`make figures`) draws figures/ from the stored runs, see `make_figures`.
"""
# ruff: noqa: F401

from drs_course.plots.charts import labelled_scatter, loss_curve, table1_curve, threshold_curves
from drs_course.plots.colors import (
    CHANGES,
    cue_changes,
    label_colors,
    layer_mean,
    outline,
    overlay,
    overlay_changes,
    overlay_labels,
)
from drs_course.plots.drs_figure import figure2, profile, suppression
from drs_course.plots.grids import cue_figure, figure1, figure4, figure5, figure6, panels, show_samples
from drs_course.plots.layout import WIDTH, save_figure
from drs_course.plots.stored import make_figures
