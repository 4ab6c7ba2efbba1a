"""The figures of README and notebooks, drawn from the networks in the run store."""

from functools import partial
from pathlib import Path

import torch

from drs_course.paper import Configuration, table_rows
from drs_course.plots.charts import table1_curve
from drs_course.plots.drs_figure import suppression
from drs_course.plots.grids import figure1, figure4, figure5, figure6, show_samples
from drs_course.plots.layout import save_figure
from drs_course.stages import Pipeline
from drs_course.tables import run_table
from drs_lib.data import normalize
from drs_lib.drs import DRS
from drs_lib.train import predict_segmentation

CAM, LEARNABLE, REFINED = Configuration(drs_layers=()), Configuration(), Configuration(refine=True)
CONTROLLERS = {row.label.removeprefix("non-learnable with "): row.configuration for row in table_rows(1)}


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
    pipeline = Pipeline(data, budget, seed=seed, voc_root=voc_root, store=store)
    seeds = (seed,) if seeds is None else tuple(seeds)
    singles = first_of_each_class(pipeline.data.val, 3)
    drawings = {
        name: (_missing_stage(pipeline, needs), partial(draw, pipeline, singles))
        for name, (draw, needs) in FIGURES.items()
    }
    quiet = dict(budget=budget, seeds=seeds, voc_root=voc_root, store=pipeline.store, progress=False, jobs=1)
    drawings["table1"] = _missing_row(pipeline, seeds), lambda: table1_curve(run_table(1, data, **quiet))
    written = []
    for name, (missing, draw) in drawings.items():
        if missing:
            options = "" if data == "critters" else " --data voc --voc-root DIR"
            command = f"python -m drs_course tables{options}"
            print(f"{name} is left out: the run store has no {missing}. `{command}` makes it.")
        else:
            written.append(save_figure(draw(), Path(out_dir) / f"{name}.png"))
    return written


def _missing_stage(pipeline, needs):
    return next((pipeline.stage(*need).title for need in needs if not pipeline.has(*need)), None)


def _missing_row(pipeline, seeds):
    for seed in seeds:
        of_seed = Pipeline(pipeline.data, pipeline.budget, seed=seed, store=pipeline.store)
        for row in table_rows(1):
            if of_seed.stored_scores(row.configuration, ("miou", "accuracy", "labels")) is None:
                return f"score of Table 1's row {row.label!r} with seed {seed}"
    return None


def first_of_each_class(dataset, count):
    """The indices of the first images that show a single class, no class twice. Raises ValueError: none."""
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


def _samples(pipeline, singles):
    return show_samples(pipeline.data.val, range(min(6, len(pipeline.data.val))))


def _suppression(pipeline, singles):
    image = pipeline.data.val[singles[0]][0]
    return suppression(image, *_strongest_channel(pipeline.classifier(LEARNABLE), image))


def _figure1(pipeline, singles):
    val = pipeline.data.val
    images, labels = zip(*(val[i] for i in singles), strict=True)
    names = [val.classes[int(shown.argmax())] for shown in labels]
    return figure1(images, *(_val_maps(pipeline, c, singles) for c in (CAM, LEARNABLE, REFINED)), names)


def _figure4(pipeline, singles):
    maps = {label: _val_maps(pipeline, c, singles[:1])[0] for label, c in CONTROLLERS.items()}
    return figure4(pipeline.data.val[singles[0]][0], maps)


def _figure5(pipeline, singles):
    image = pipeline.data.val[singles[0]][0]
    return figure5(image, *(_features(pipeline.classifier(c), image) for c in (CAM, LEARNABLE)))


def _figure6(pipeline, singles):
    val = pipeline.data.val
    first = torch.utils.data.Subset(val, range(min(4, len(val))))
    networks = [pipeline.segmentation_network(c) for c in (LEARNABLE, REFINED)]
    labels = [[one for _, one in predict_segmentation(network, first)] for network in networks]
    return figure6([image for image, _ in first], [val.mask(i) for i in first.indices], *labels, val.classes)


# Of each figure: what draws it, and the stages whose networks it shows.
FIGURES = {
    "samples": (_samples, []),
    "suppression": (_suppression, [("classify", LEARNABLE)]),
    "figure1": (_figure1, [("classify", CAM), ("classify", LEARNABLE), ("refine", REFINED)]),
    "figure4": (_figure4, [("classify", c) for c in CONTROLLERS.values()]),
    "figure5": (_figure5, [("classify", CAM), ("classify", LEARNABLE)]),
    "figure6": (_figure6, [("segment", LEARNABLE), ("segment", REFINED)]),
}


def _val_maps(pipeline, configuration, indices):
    """The localization map of each image's only class, made as the budget makes them for pseudo labels."""
    maps = pipeline.maps(configuration, pipeline.data.val, indices)
    return [of_image[int(labels.argmax())] for _, labels, of_image in maps]


def _batch(model, image):
    return normalize(image[None].to(next(model.parameters()).device))


@torch.no_grad()
def _features(model, image):
    return [features[0] for features in model.layer_outputs(_batch(model, image))]


@torch.no_grad()
def _strongest_channel(model, image):
    """In layer 6, which has two DRS modules: the first one's map with the highest peak, and its G."""
    first_of_last_layer = [module for module in model.modules() if isinstance(module, DRS)][-2]
    seen = []
    hook = first_of_last_layer.register_forward_hook(lambda module, given, _: seen.append(given[0][0].relu()))
    model(_batch(model, image))
    hook.remove()
    [features] = seen
    channel = int(features.amax((1, 2)).argmax())
    return features[channel], first_of_last_layer.controller(features[None])[0, channel]
