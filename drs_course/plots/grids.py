"""Figures that are rows of pictures: the paper's Figures 1, 4, 5 and 6, samples of a data set, cues."""

import numpy as np
from matplotlib.patches import Patch

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
from drs_course.plots.layout import Panel, class_handles, picture_grid


def show_samples(dataset, indices=range(6), masks=True):
    """Images of a data set over their saliency maps and, where ``masks``, their true label maps.

    dataset: as in `drs_lib.data` (for one made by ``without_masks``, pass ``masks=False``).
    """
    indices = list(indices)
    if not indices:
        raise ValueError("There is nothing to show: no index was given.")
    rows, found = [[], [], []], set()
    for column, i in enumerate(indices):
        image, labels = dataset[i]
        names = [name for name, there in zip(dataset.classes, labels, strict=True) if there]
        first = column == 0
        rows[0].append(Panel(as_picture(image), "\n".join(names), "image" if first else ""))
        rows[1].append(Panel(as_map(array(dataset.saliency(i)) / 255), "", "saliency" if first else ""))
        if masks:
            mask = as_labels(dataset.mask(i), dataset.num_classes)
            found |= set(np.unique(mask).tolist())
            rows[2].append(Panel(label_colors(dataset.num_classes)[mask], "", "truth" if first else ""))
    return (
        picture_grid(rows, cmap="gray", legend=class_handles(dataset.classes, found))
        if masks
        else picture_grid(rows[:2], cmap="gray")
    )


def figure1(images, cam, drs, refined, names=None):
    """Figure 1: localization maps of the plain classifier (CAM), of DRS, and of DRS with refinement (DRS†).

    images: N images; cam, drs, refined: N maps (H, W) each, of the class that ``names`` may name.
    """
    names = [""] * len(images) if names is None else names
    titles = ("image", "CAM", "DRS", "DRS†")
    rows = []
    for row, (image, name, *maps) in enumerate(zip(images, names, cam, drs, refined, strict=True)):
        pictures = [as_picture(image), *(overlay(image, values) for values in maps)]
        rows.append(
            [
                Panel(picture, titles[column] if row == 0 else "", name if column == 0 else "")
                for column, picture in enumerate(pictures)
            ]
        )
    return picture_grid(rows, panel_width=1.8, scale="localization map")


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
    cam, drs = ([layer_mean(features) for features in network] for network in (cam, drs))
    rows = [[Panel(as_picture(image), "image")], [None]]
    for row, label, network in ((0, "CAM", cam), (1, "DRS", drs)):
        for layer, mean in enumerate(network, 1):
            rows[row].append(Panel(mean, f"layer {layer}" if row == 0 else "", label if layer == 1 else ""))
    return picture_grid(rows, scale="mean feature, scaled per panel")


def figure6(images, truth, drs, refined, classes):
    """Figure 6: segmentations after training on DRS's pseudo labels, without and with refinement (DRS†).

    images: N images; truth, drs, refined: N label maps (H, W) each; classes: names, without background.
    """
    titles = ("image", "ground truth", "DRS", "DRS†")
    colors = label_colors(len(classes))
    rows, found = [], set()
    for row, (image, *labels) in enumerate(zip(images, truth, drs, refined, strict=True)):
        labels = [as_labels(one, len(classes)) for one in labels]
        found |= {int(label) for one in labels for label in np.unique(one)}
        pictures = [as_picture(image), *(colors[one] for one in labels)]
        rows.append([Panel(p, titles[column] if row == 0 else "") for column, p in enumerate(pictures)])
    return picture_grid(rows, panel_width=1.95, legend=class_handles(classes, found))


def cue_figure(images, before, after, masks, labels, titles=("cue before", "cue after")):
    """What one object cue recovers and removes of another, image by image, coloured against the mask.

    images: N images; before, after: N cues, bool (H, W) each; masks: N true label maps; labels: the class of
    each image's cues. titles: what the cues are called. See `cue_changes`.
    """
    rows = []
    for row, (image, first, second, mask, label) in enumerate(
        zip(images, before, after, masks, labels, strict=True)
    ):
        changes, on_object = cue_changes(first, second, mask, label), array(mask) == label
        kept = [overlay_changes(image, array(cue).astype(np.uint8), on_object) for cue in (first, second)]
        pictures = [as_picture(image), *kept, overlay_changes(image, changes, on_object)]
        names = ("image", *titles, "what changed")
        rows.append([Panel(p, n if row == 0 else "") for p, n in zip(pictures, names, strict=True)])
    handles = [
        Patch(facecolor=color, edgecolor="0.5", label=name)
        for color, name in zip(CHANGE_COLORS[1:], CHANGES[1:], strict=True)
    ]
    return picture_grid(rows, panel_width=1.95, legend=handles)


def panels(rows, classes=(), cmap=MAP_COLORS):
    """Pictures in rows.

    rows: a list of dicts from a title to a picture, a map (floats (H, W) in [0, 1], coloured by ``cmap``) or
    a label map (uint8 (H, W), in `label_colors`); None leaves a place empty. A title that repeats the one
    above it is left out. classes: the names of the labels, without background; needed for label maps.
    """
    colors, grid, found, above = label_colors(len(classes)), [], set(), []
    for row in rows:
        line = []
        for column, (title, picture) in enumerate(row.items()):
            if picture is not None:
                picture = array(picture)
                if picture.ndim == 2 and picture.dtype == np.uint8:
                    labels = as_labels(picture, len(classes))
                    found |= set(np.unique(labels).tolist())
                    picture = colors[labels]
                picture = as_map(picture) if picture.ndim == 2 else as_picture(picture)
                title = "" if column < len(above) and above[column] == title else title
            line.append(None if picture is None else Panel(picture, title))
        grid.append(line)
        above = list(row)
    legend = class_handles(classes, found) if found else None
    width = None if grid and max(map(len, grid)) > 4 else 1.95
    return picture_grid(grid, panel_width=width, cmap=cmap, legend=legend)
