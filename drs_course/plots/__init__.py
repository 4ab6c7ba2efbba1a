"""The course's figures, as functions of arrays that return a matplotlib ``Figure``.

    figure1   image, CAM, DRS, DRS with refinement               paper, Figure 1
    figure2   a DRS module at work                                paper, Figure 2
    figure4   one image under every controller                   paper, Figure 4
    figure5   mean features of every layer, CAM above DRS        paper, Figure 5
    figure6   image, truth, segmentations                        paper, Figure 6
    profile   one feature map, cut through its maximum, before and after suppression
    suppression    an image, one channel's map over it, before and after, and the cut
    table1_curve   Table 1 as a curve over delta
    panels    pictures, maps and label maps in rows
    cue_figure     what one object cue recovers and removes of another
    threshold_curves   a score over the threshold alpha
    labelled_scatter   points with their names, none covering another

Images are uint8, as a data set gives them (3, H, W) or as a picture (H, W, 3); maps are (H, W) in [0, 1];
label maps are uint8 (H, W), 0 background, 1..C classes, 255 ignored. Each may be a tensor or an array.

    colors, layout        what the figures are made of
    grids, charts, drs_figure     the figures above
    stored                the course's own figures, from the run store

    python -m drs_course figures    draws figures/ from the stored runs (`make figures`)
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
