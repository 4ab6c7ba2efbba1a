"""Figures that are rows of pictures: the paper's Figures 1, 4, 5 and 6, samples of a data set, cues."""

import numpy as np

from drs_course.plots.colors import (
    CHANGE_COLORS,
    CHANGES,
    MAP_COLORS,
    array,
    as_labels,
    as_map,
    as_picture,
    cue_changes,
    label_colors,
    layer_mean,
    overlay,
    overlay_changes,
)
from drs_course.plots.layout import Panel, class_handles, handles, picture_grid


def show_samples(dataset, indices=range(6), masks=True):
    """Images of a data set over their saliency maps and, where ``masks``, their true label maps.

    dataset: as in `drs_lib.data` (for one made by ``without_masks``, pass ``masks=False``).
    """
    indices = list(indices)
    if not indices:
        raise ValueError("There is nothing to show: no index was given.")
    images, labels = zip(*(dataset[i] for i in indices), strict=True)
    titles = ["\n".join(np.array(dataset.classes)[np.asarray(present) > 0]) for present in labels]
    saliency = [as_map(array(dataset.saliency(i)) / 255) for i in indices]
    rows, legend = {"image": map(as_picture, images), "saliency": saliency}, None
    if masks:
        truth = [dataset.mask(i) for i in indices]
        rows["truth"], legend = _in_colors(truth, dataset.classes), class_handles(dataset.classes, truth)
    return picture_grid(_titled(titles, rows.values(), list(rows)), cmap="gray", legend=legend)


def figure1(images, cam, drs, refined, names=None):
    """Figure 1: localization maps of the plain classifier (CAM), of DRS, and of DRS with refinement (DRS†).

    images: N images; cam, drs, refined: N maps (H, W) each, of the class that ``names`` may name.
    """
    rows = [
        [as_picture(image), *(overlay(image, values) for values in maps)]
        for image, *maps in zip(images, cam, drs, refined, strict=True)
    ]
    grid = _titled(("image", "CAM", "DRS", "DRS†"), rows, names)
    return picture_grid(grid, panel_width=1.8, scale="localization map")


def figure4(image, maps, columns=5):
    """Figure 4: one image's localization map under every controller.

    maps: from a title (``"learnable"``, ``"δ = 0.90"``) to the map (H, W), in the order of the panels.
    """
    panels = [Panel(as_picture(image), "image")]
    panels += [Panel(overlay(image, values), title) for title, values in maps.items()]
    columns = min(columns, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return picture_grid(rows, scale="localization map")


def figure5(image, cam, drs):
    """Figure 5: the mean of every layer's features, of the plain classifier above that with DRS.

    cam, drs: for each layer the features (K, h, w) of the image, as `Classifier.layer_outputs` gives them.
    """
    if len(cam) != len(drs) or not cam:
        raise ValueError(f"Both classifiers must have the same layers; got {len(cam)} and {len(drs)}.")
    titles = [f"layer {layer}" for layer in range(1, len(cam) + 1)]
    above, below = _titled(titles, [map(layer_mean, network) for network in (cam, drs)], ("CAM", "DRS"))
    rows = [[Panel(as_picture(image), "image"), *above], [None, *below]]
    return picture_grid(rows, scale="mean feature, scaled per panel")


def figure6(images, truth, drs, refined, classes):
    """Figure 6: segmentations after training on DRS's pseudo labels, without and with refinement (DRS†).

    images: N images; truth, drs, refined: N label maps (H, W) each; classes: names, without background.
    """
    rows = [
        [as_picture(image), *_in_colors(labels, classes)]
        for image, *labels in zip(images, truth, drs, refined, strict=True)
    ]
    grid = _titled(("image", "ground truth", "DRS", "DRS†"), rows)
    return picture_grid(grid, panel_width=1.95, legend=class_handles(classes, [*truth, *drs, *refined]))


def cue_figure(images, before, after, masks, labels, titles=("cue before", "cue after")):
    """What one object cue recovers and removes of another, image by image, coloured against the mask.

    images: N images; before, after: N cues, bool (H, W) each; masks: N true label maps; labels: the class of
    each image's cues. titles: what the cues are called. See `cue_changes`.
    """
    rows = []
    for image, first, second, mask, label in zip(images, before, after, masks, labels, strict=True):
        shown = (array(first).astype(int), array(second).astype(int), cue_changes(first, second, mask, label))
        on_object = array(mask) == label
        rows.append([as_picture(image), *(overlay_changes(image, one, on_object) for one in shown)])
    grid = _titled(("image", *titles, "what changed"), rows)
    return picture_grid(grid, panel_width=1.95, legend=handles(CHANGE_COLORS[1:], CHANGES[1:]))


def panels(rows, classes=(), cmap=MAP_COLORS):
    """Pictures in rows.

    rows: a list of dicts from a title to a picture, a map (floats (H, W) in [0, 1], coloured by ``cmap``) or
    a label map (uint8 (H, W), in `label_colors`); None leaves a place empty. A title that repeats the one
    above it is left out. classes: the names of the labels, without background; needed for label maps.
    """
    grid, found, above = [], [], []
    for row in rows:
        line = []
        for column, (title, picture) in enumerate(row.items()):
            if picture is not None:
                picture = array(picture)
                if picture.ndim == 2 and picture.dtype == np.uint8:
                    found.append(picture)
                    (picture,) = _in_colors([picture], classes)
                picture = as_map(picture) if picture.ndim == 2 else as_picture(picture)
                picture = Panel(picture, "" if above[column : column + 1] == [title] else title)
            line.append(picture)
        grid.append(line)
        above = list(row)
    width = None if grid and max(map(len, grid)) > 4 else 1.95
    return picture_grid(grid, width, cmap, legend=class_handles(classes, found) if found else None)


def _titled(titles, rows, names=None):
    """Rows of pictures as panels: the titles above the first row, a row's name at its left."""
    names = [""] * len(rows) if names is None else names
    return [
        [
            Panel(picture, title if row == 0 else "", name if column == 0 else "")
            for column, (picture, title) in enumerate(zip(pictures, titles, strict=True))
        ]
        for row, (pictures, name) in enumerate(zip(rows, names, strict=True))
    ]


def _in_colors(labels, classes):
    """Label maps, checked, in the colours of their labels."""
    return [label_colors(len(classes))[as_labels(one, len(classes))] for one in labels]
