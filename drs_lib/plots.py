"""The course's figures, as functions of arrays that return a matplotlib ``Figure``.

    figure1   image, CAM, DRS, DRS with refinement               paper, Figure 1
    figure4   one image under every controller                   paper, Figure 4
    figure5   mean features of every layer, CAM above DRS        paper, Figure 5
    figure6   image, truth, segmentations                        paper, Figure 6
    table1_curve   Table 1 as a curve over delta

Images are uint8, as a data set gives them (3, H, W) or as a picture (H, W, 3); maps are (H, W) in [0, 1];
label maps are uint8 (H, W), 0 background, 1..C classes, 255 ignored. Each may be a tensor or an array.

    python -m drs_lib.plots      draws figures/ from the stored runs (`make figures`)
"""

import argparse
import io
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import seaborn as sns
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from drs_lib.data.voc import atomic_path, voc_palette

# Perceptually uniform and safe for the colour-blind; dark where a map is low, so an overlay is a spotlight.
MAP_COLORS = "inferno"
WIDTH = 8.6  # inches: a README column at 100 pixels an inch, where 9 points stay readable
DPI = 130
# Okabe and Ito's colours for the colour-blind, in the order that keeps neighbours apart.
_OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#F0E442", "#0072B2")
_STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 9}


class _Figure(Figure):
    """Shown by a notebook as it is; a plain ``Figure`` needs pyplot for that, which keeps all it makes."""

    def _repr_png_(self):
        return _png(self, self.dpi)


class Panel(NamedTuple):
    """One picture of a grid, (H, W, 3) uint8 or a map (H, W) in [0, 1]; title above it, label at its left."""

    picture: np.ndarray
    title: str = ""
    label: str = ""


def label_colors(num_classes):
    """Colours of label maps: uint8 (256, 3), indexed by the label; 0 is background, 255 ignored pixels.

    Up to seven classes: Okabe and Ito's, which the colour-blind can tell apart. More: the PASCAL VOC palette.
    """
    if num_classes > len(_OKABE_ITO):
        return voc_palette()
    colors = np.full((256, 3), 200, np.uint8)
    colors[0] = 30
    for label, color in enumerate(_OKABE_ITO, 1):
        colors[label] = np.round(255 * np.array(matplotlib.colors.to_rgb(color)))
    return colors


def overlay(image, values, strength=0.6):
    """A localization map laid over its image.

    image: uint8 (3, H, W) or (H, W, 3); values: (H, W), clipped to [0, 1]; strength: the map's share.
    Returns uint8 (H, W, 3). Raises ValueError for sizes that differ and for NaN.
    """
    picture, values = _picture(image), _map(values)
    _same_size(picture, values, "map")
    return _blend(picture, _colored(values), strength)


def overlay_labels(image, labels, num_classes, strength=0.65):
    """A label map laid over its image: objects in `label_colors`, background as it is, ignored pixels greyed.

    image: uint8 (3, H, W) or (H, W, 3); labels: uint8 (H, W). Returns uint8 (H, W, 3).
    """
    picture, labels = _picture(image), _labels(labels, num_classes)
    _same_size(picture, labels, "label map")
    blended = _blend(picture, label_colors(num_classes)[labels], strength)
    return np.where((labels == 0)[..., None], picture, blended)


def layer_mean(features):
    """A layer's features (K, h, w) averaged over channels and scaled to [0, 1], as in the paper's Figure 5.

    Features without any contrast give zeros. Raises ValueError for another shape and for NaN.
    """
    features = _array(features).astype(np.float64)
    if features.ndim != 3 or not features.size:
        raise ValueError(f"Features of one image are (channels, height, width); got shape {features.shape}.")
    mean = features.mean(0)
    if not np.isfinite(mean).all():
        raise ValueError("The features contain NaN or infinity: the network they come from has diverged.")
    span = mean.max() - mean.min()
    return (mean - mean.min()) / span if span > 0 else np.zeros_like(mean)


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
        rows[0].append(Panel(_picture(image), "\n".join(names), "image" if first else ""))
        rows[1].append(Panel(_map(_array(dataset.saliency(i)) / 255), "", "saliency" if first else ""))
        if masks:
            mask = _labels(dataset.mask(i), dataset.num_classes)
            found |= set(np.unique(mask).tolist())
            rows[2].append(Panel(label_colors(dataset.num_classes)[mask], "", "truth" if first else ""))
    return (
        _grid(rows, cmap="gray", legend=(dataset.classes, found)) if masks else _grid(rows[:2], cmap="gray")
    )


def figure1(images, cam, drs, refined, names=None):
    """Figure 1: localization maps of the plain classifier (CAM), of DRS, and of DRS with refinement (DRS†).

    images: N images; cam, drs, refined: N maps (H, W) each, of the class that ``names`` may name.
    """
    names = [""] * len(images) if names is None else names
    titles = ("image", "CAM", "DRS", "DRS†")
    rows = []
    for row, (image, name, *maps) in enumerate(zip(images, names, cam, drs, refined, strict=True)):
        pictures = [_picture(image), *(overlay(image, values) for values in maps)]
        rows.append(
            [
                Panel(picture, titles[column] if row == 0 else "", name if column == 0 else "")
                for column, picture in enumerate(pictures)
            ]
        )
    return _grid(rows, panel_width=1.8, scale="localization map")


def figure4(image, maps, columns=5):
    """Figure 4: one image's localization map under every controller.

    maps: from a title (``"learnable"``, ``"δ = 0.90"``) to the map (H, W), in the order of the panels.
    """
    panels = [Panel(_picture(image), "image")]
    panels += [Panel(overlay(image, values), title) for title, values in maps.items()]
    columns = min(columns, len(panels))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    return _grid(rows, scale="localization map")


def figure5(image, cam, drs):
    """Figure 5: the mean of every layer's features, of the plain classifier above that with DRS.

    cam, drs: for each layer the features (K, h, w) of the image, as `Classifier.layer_outputs` gives them.
    """
    if len(cam) != len(drs) or not cam:
        raise ValueError(f"Both classifiers must have the same layers; got {len(cam)} and {len(drs)}.")
    cam, drs = ([layer_mean(features) for features in network] for network in (cam, drs))
    rows = [[Panel(_picture(image), "image")], [None]]
    for row, label, network in ((0, "CAM", cam), (1, "DRS", drs)):
        for layer, mean in enumerate(network, 1):
            rows[row].append(Panel(mean, f"layer {layer}" if row == 0 else "", label if layer == 1 else ""))
    return _grid(rows, scale="mean feature, scaled per panel")


def figure6(images, truth, drs, refined, classes):
    """Figure 6: segmentations after training on DRS's pseudo labels, without and with refinement (DRS†).

    images: N images; truth, drs, refined: N label maps (H, W) each; classes: names, without background.
    """
    titles = ("image", "ground truth", "DRS", "DRS†")
    colors = label_colors(len(classes))
    rows, found = [], set()
    for row, (image, *labels) in enumerate(zip(images, truth, drs, refined, strict=True)):
        labels = [_labels(one, len(classes)) for one in labels]
        found |= {int(label) for one in labels for label in np.unique(one)}
        pictures = [_picture(image), *(colors[one] for one in labels)]
        rows.append([Panel(p, titles[column] if row == 0 else "") for column, p in enumerate(pictures)])
    return _grid(rows, panel_width=1.95, legend=(classes, found))


def table1_curve(table):
    """Table 1 as a curve: mIoU against the constant delta, the learnable controller as a level line; the
    paper's values and the measured ones.

    table: what ``run_table(1)`` or ``reference_table(1)`` returns. Bars: one standard deviation over seeds.
    """
    needed = {"delta", "paper", "measured", "sd"}
    if not needed <= set(table.columns) or table["delta"].notna().sum() == 0:
        raise ValueError(
            f"This is not Table 1, which has {', '.join(sorted(needed))}; found {', '.join(table.columns)}."
        )
    constant = table[table["delta"].notna()].sort_values("delta")
    learnable = table[table["delta"].isna()]
    data = {"critters": "Critters", "voc": "VOC"}.get(table.attrs.get("data"))
    ours = f"measured ({data})" if data else "measured"
    series = [("paper", "the paper (VOC)", "#0072B2", "o"), ("measured", ours, "#D55E00", "s")]
    with sns.axes_style("ticks", _STYLE), matplotlib.rc_context(_STYLE):
        figure = _Figure((7, 3.6), dpi=DPI, layout="constrained")
        ax = figure.subplots()
        labels = []
        for column, name, color, marker in series:
            spread = constant["sd"] if column == "measured" and constant["sd"].notna().any() else None
            ax.errorbar(
                constant["delta"], constant[column], spread, color=color, marker=marker, ms=5, capsize=3
            )
            labels.append((constant[column].iloc[-1], f"{name}: constant δ", color))
            for level in learnable[column]:
                ax.axhline(level, color=color, linestyle="--", linewidth=1.2)
                labels.append((level, f"{name}: learnable", color))
        ax.set(xlabel="control value δ (smaller: stronger suppression)", ylabel="mIoU (%)")
        ax.set_xticks(constant["delta"], [f"{delta:.2f}" for delta in constant["delta"]])
        ax.margins(y=0.08)
        sns.despine(ax=ax)
        _label_at_right(ax, labels)
    return figure


def _label_at_right(ax, labels):
    """Direct labels (y, text, colour) right of the axes, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    gap = 0.062 * (high - low)
    at = -np.inf
    for y, text, color in sorted(labels):
        at = max(y, at + gap)
        ax.annotate(
            text,
            (1.02, at),
            xycoords=("axes fraction", "data"),
            color=color,
            va="center",
            annotation_clip=False,
        )


def _grid(rows, panel_width=None, cmap=MAP_COLORS, scale=None, legend=None):
    """Panels in rows; None leaves a place empty. ``scale`` names what a colour bar of `MAP_COLORS` stands
    for, ``legend`` is (class names, labels that occur).

    Placed by hand, in inches: a layout engine that keeps the pictures' aspect leaves gaps between them.
    """
    if not rows or not rows[0]:
        raise ValueError("There is nothing to draw: no image was given.")
    columns = max(len(row) for row in rows)
    gap, line, margin = 0.05, 0.16, 0.09
    gutters = [
        0.2 if any(len(row) > c and row[c] and row[c].label for row in rows) else 0 for c in range(columns)
    ]
    fixed = sum(gutters) + gap * (columns - 1) + 2 * margin + (0.7 if scale else 0)
    side = (WIDTH - fixed) / columns if panel_width is None else panel_width
    width = side * columns + fixed
    titles = [
        max((line * (1 + p.title.count("\n")) + 0.03) if p and p.title else 0 for p in row) for row in rows
    ]
    heights = [side * max(p.picture.shape[0] / p.picture.shape[1] for p in row if p) for row in rows]
    # As many names a line as fit if all were of VOC's longest kind.
    per_line = max(1, int(width / 1.2))
    footer = 0.2 * -(-len(legend[1]) // per_line) + 0.06 if legend else 0
    height = sum(titles) + sum(heights) + gap * (len(rows) - 1) + 2 * margin + footer

    with sns.axes_style("white", _STYLE), matplotlib.rc_context(_STYLE):
        figure = _Figure((width, height), dpi=DPI)

        def axes(left, top, width_, height_):
            return figure.add_axes(
                (left / width, 1 - (top + height_) / height, width_ / width, height_ / height)
            )

        top = margin
        for row, title, tall in zip(rows, titles, heights, strict=True):
            top, left = top + title, margin
            for panel, gutter in zip(row, gutters, strict=False):
                left += gutter
                if panel:
                    ax = axes(left, top, side, tall)
                    ax.imshow(panel.picture, cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
                    ax.set(xticks=[], yticks=[])
                    sns.despine(ax=ax, left=True, bottom=True)
                    ax.set_title(panel.title, pad=3)
                    ax.set_ylabel(panel.label, labelpad=3)
                left += side + gap
            top += tall + gap
        if scale:
            bar = axes(
                width - margin - 0.6, margin + titles[0], 0.12, height - 2 * margin - titles[0] - footer
            )
            colors = ScalarMappable(Normalize(0, 1), MAP_COLORS)
            figure.colorbar(colors, cax=bar, label=scale, ticks=[0, 0.5, 1])
        if legend:
            _class_legend(figure, *legend, per_line)
    return figure


def _class_legend(figure, classes, found, per_line):
    colors = label_colors(len(classes)) / 255
    names = {0: "background", **dict(enumerate(classes, 1)), 255: "ignored"}
    handles = [Patch(facecolor=colors[label], edgecolor="0.5", label=names[label]) for label in sorted(found)]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(per_line, len(handles)),
        frameon=False,
        handlelength=1,
        columnspacing=1.2,
        borderaxespad=0.2,
        borderpad=0,
    )


def _array(values):
    return values.detach().cpu().numpy() if torch.is_tensor(values) else np.asarray(values)


def _picture(image):
    image = _array(image)
    if image.dtype == np.uint8 and image.ndim == 3 and image.size:
        if image.shape[2] == 3:
            return image
        if image.shape[0] == 3:
            return image.transpose(1, 2, 0)
    raise ValueError(
        f"An image is uint8, (3, H, W) or (H, W, 3); got {image.dtype} {image.shape}. "
        "Show the data set's image, not the normalised one."
    )


def _map(values):
    values = _array(values)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"A map is (H, W): one class of one image; got shape {values.shape}.")
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("The map contains NaN or infinity: the network it comes from has diverged.")
    return values.clip(0, 1)


def _labels(labels, num_classes):
    labels = _array(labels)
    if labels.ndim != 2 or labels.dtype != np.uint8 or not labels.size:
        raise ValueError(f"A label map is uint8 (H, W); got {labels.dtype} {labels.shape}.")
    if ((labels > num_classes) & (labels != 255)).any():
        raise ValueError(
            f"A label map has 0 (background), 1..{num_classes} and 255 (ignored); "
            f"this one has {np.unique(labels)}."
        )
    return labels


def _same_size(picture, values, what):
    if picture.shape[:2] != values.shape:
        raise ValueError(
            f"The {what} is {values.shape[0]}x{values.shape[1]} and its image "
            f"{picture.shape[0]}x{picture.shape[1]}: "
            "bring it to the image's size first."
        )


def _colored(values):
    lut = (255 * matplotlib.colormaps[MAP_COLORS](np.arange(256))[:, :3]).round().astype(np.uint8)
    return lut[(255 * values).round().astype(np.uint8)]


def _blend(picture, colors, strength):
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is between 0 (only the image) and 1 (only the colours); got {strength}.")
    return np.round((1 - strength) * picture + strength * colors.astype(np.float32)).astype(np.uint8)


def save_figure(figure, path, dpi=DPI, max_bytes=300_000):
    """Writes a figure as PNG of at most ``max_bytes``, atomically; the same figure gives the same bytes.

    A larger one is drawn with fewer dots per inch, and, where a README's width would no longer be filled,
    in 256 colours.
    """
    path = Path(path)
    for share in (1, 0.9, 0.8):
        data = _png(figure, share * dpi)
        if len(data) <= max_bytes:
            break
    while len(data) > max_bytes:
        data = _png(figure, share * dpi, colors=256)
        share *= min(0.9, (max_bytes / len(data)) ** 0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def _png(figure, dpi, colors=None):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    if colors is None:
        return buffer.getvalue()
    image = Image.open(buffer).convert("RGB")
    reduced = io.BytesIO()
    # In two steps because Pillow dithers only towards a given palette, and colour bars need it.
    image.quantize(palette=image.quantize(colors), dither=Image.Dither.FLOYDSTEINBERG).save(
        reduced, "PNG", optimize=True
    )
    return reduced.getvalue()


def make_figures(out_dir, store=None, data="critters", budget=None, seed=0, voc_root=None, seeds=None):
    """Draws the course's figures from the networks in the run store and writes them to ``out_dir`` as PNG.

    The images are the first of the validation set that show one class, no class twice (figure 6: the first
    of all): none was picked for its looks. Nothing is trained: a figure whose networks are not in the store
    is left out and named on the terminal.

    Args:
        store: a `RunStore` or its folder; data, budget, voc_root: as for `run_table`.
        seed: whose networks are shown; seeds: over which Table 1's curve averages (None: that one).
    Returns:
        the paths of the files written.
    """
    from drs_lib.paper import Configuration, table_rows
    from drs_lib.pipeline import Pipeline

    pipeline = Pipeline(data, budget, seed=seed, voc_root=voc_root, store=store)
    seeds = (seed,) if seeds is None else tuple(seeds)
    cam, learnable, refined = Configuration(drs_layers=()), Configuration(), Configuration(refine=True)
    controllers = {row.label.removeprefix("non-learnable with "): row.configuration for row in table_rows(1)}
    singles = _first_of_each_class(pipeline.data.val, 3)

    def draw_figure1():
        maps = [_val_maps(pipeline, c, singles) for c in (cam, learnable, refined)]
        images, names = zip(*(_image_and_class(pipeline.data.val, i) for i in singles), strict=True)
        return figure1(images, *maps, names)

    def draw_figure4():
        maps = {label: _val_maps(pipeline, c, singles[:1])[0] for label, c in controllers.items()}
        return figure4(pipeline.data.val[singles[0]][0], maps)

    def draw_figure5():
        image = pipeline.data.val[singles[0]][0]
        return figure5(image, *(_features(pipeline.classifier(c), image) for c in (cam, learnable)))

    def draw_figure6():
        from drs_lib.train import predict_segmentation

        val = pipeline.data.val
        first = torch.utils.data.Subset(val, range(min(4, len(val))))
        networks = [pipeline.segmentation_network(c) for c in (learnable, refined)]
        labels = [[one for _, one in predict_segmentation(network, first)] for network in networks]
        images, masks = [image for image, _ in first], [val.mask(i) for i in first.indices]
        return figure6(images, masks, *labels, val.classes)

    def draw_table1():
        from drs_lib.experiments import run_table

        options = dict(
            budget=budget, seeds=seeds, voc_root=voc_root, store=pipeline.store, progress=False, jobs=1
        )
        return table1_curve(run_table(1, data, **options))

    drawings = {
        "samples": (lambda: show_samples(pipeline.data.val, range(min(6, len(pipeline.data.val)))), []),
        "figure1": (draw_figure1, [("classify", cam), ("classify", learnable), ("refine", refined)]),
        "figure4": (draw_figure4, [("classify", c) for c in controllers.values()]),
        "figure5": (draw_figure5, [("classify", cam), ("classify", learnable)]),
        "figure6": (draw_figure6, [("segment", learnable), ("segment", refined)]),
        "table1": (draw_table1, None),
    }
    written = []
    for name, (draw, needs) in drawings.items():
        missing = _missing_rows(pipeline, seeds) if needs is None else _missing_stages(pipeline, needs)
        if missing:
            print(f"{name} is left out: the run store has no {missing}. `python -m drs_lib course` makes it.")
        else:
            written.append(save_figure(draw(), Path(out_dir) / f"{name}.png"))
    return written


def _missing_stages(pipeline, needs):
    from drs_lib.pipeline import STAGE_VERSIONS

    for name, configuration in needs:
        stage = pipeline.stage(name, configuration)
        if pipeline.store.get(stage.name, stage.config, stage.inputs, STAGE_VERSIONS[stage.name]) is None:
            return stage.title
    return None


def _missing_rows(pipeline, seeds):
    from drs_lib.paper import table_rows
    from drs_lib.pipeline import Pipeline

    for seed in seeds:
        of_seed = Pipeline(pipeline.data, pipeline.budget, seed=seed, store=pipeline.store)
        for row in table_rows(1):
            if of_seed.stored_scores(row.configuration, ("miou", "accuracy", "labels")) is None:
                return f"score of Table 1's row {row.label!r} with seed {seed}"
    return None


def _first_of_each_class(dataset, count):
    found = {}
    for i in range(len(dataset)):
        labels = dataset[i][1]
        if labels.sum() == 1:
            found.setdefault(int(labels.argmax()), i)
        if len(found) == count:
            break
    if not found:
        raise ValueError(
            "No image of the validation set shows a single class, so there is none for the figures."
        )
    return sorted(found.values())


def _image_and_class(dataset, index):
    image, labels = dataset[index]
    return image, dataset.classes[int(labels.argmax())]


def _val_maps(pipeline, configuration, indices):
    """The localization map of each image's only class, made as the budget makes them for pseudo labels."""
    from drs_lib.localization import iterate_maps

    budget, refine = pipeline.budget, configuration.refine
    model = (pipeline.refinement_network if refine else pipeline.classifier)(configuration)
    options = dict(scales=budget.scales, resize=budget.resize, renormalize=refine and budget.renormalize)
    kind = "refined" if refine else "classifier"
    maps = iterate_maps(model, pipeline.data.val, indices=indices, kind=kind, **options)
    return [of_image[int(labels.argmax())] for _, labels, of_image in maps]


@torch.no_grad()
def _features(model, image):
    from drs_lib.data import normalize

    images = normalize(image[None].to(next(model.parameters()).device))
    return [features[0] for features in model.layer_outputs(images)]


def main(arguments=None):
    """The command line: ``python -m drs_lib.plots``."""
    parser = argparse.ArgumentParser(
        prog="python -m drs_lib.plots", description="Draw the figures from the stored runs."
    )
    parser.add_argument("--out", default="figures", metavar="DIR", help="default: figures")
    parser.add_argument("--store", metavar="DIR", help="the run store; default: $DRS_STORE, else ./runs")
    parser.add_argument("--data", choices=("critters", "voc"), default="critters")
    parser.add_argument("--voc-root", metavar="DIR", help="the folder VOC 2012 is in")
    parser.add_argument("--budget", choices=("ci", "laptop", "paper"), help="default: laptop; paper for voc")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="the networks shown are the first's"
    )
    options = vars(parser.parse_args(arguments))
    for path in make_figures(options.pop("out"), seed=options["seeds"][0], **options):
        print(path)


if __name__ == "__main__":
    main()
