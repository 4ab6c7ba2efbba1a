"""The figures of README and notebooks, drawn from the networks in the run store."""

from pathlib import Path

import torch

from drs_course.plots.charts import table1_curve
from drs_course.plots.drs_figure import suppression
from drs_course.plots.grids import figure1, figure4, figure5, figure6, show_samples
from drs_course.plots.layout import save_figure
from drs_lib.drs import DRS


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
    from drs_course.paper import Configuration, table_rows
    from drs_course.stages import Pipeline

    pipeline = Pipeline(data, budget, seed=seed, voc_root=voc_root, store=store)
    seeds = (seed,) if seeds is None else tuple(seeds)
    cam, learnable, refined = Configuration(drs_layers=()), Configuration(), Configuration(refine=True)
    controllers = {row.label.removeprefix("non-learnable with "): row.configuration for row in table_rows(1)}
    singles = first_of_each_class(pipeline.data.val, 3)

    def draw_suppression():
        image = pipeline.data.val[singles[0]][0]
        return suppression(image, *_strongest_channel(pipeline.classifier(learnable), image))

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
        from drs_course.tables import run_table

        options = dict(
            budget=budget, seeds=seeds, voc_root=voc_root, store=pipeline.store, progress=False, jobs=1
        )
        return table1_curve(run_table(1, data, **options))

    drawings = {
        "samples": (lambda: show_samples(pipeline.data.val, range(min(6, len(pipeline.data.val)))), []),
        "suppression": (draw_suppression, [("classify", learnable)]),
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
            options = "" if data == "critters" else " --data voc --voc-root DIR"
            command = f"python -m drs_course tables{options}"
            print(f"{name} is left out: the run store has no {missing}. `{command}` makes it.")
        else:
            written.append(save_figure(draw(), Path(out_dir) / f"{name}.png"))
    return written


def _missing_stages(pipeline, needs):
    for name, configuration in needs:
        if not pipeline.has(name, configuration):
            return pipeline.stage(name, configuration).title
    return None


def _missing_rows(pipeline, seeds):
    from drs_course.paper import table_rows
    from drs_course.stages import Pipeline

    for seed in seeds:
        of_seed = Pipeline(pipeline.data, pipeline.budget, seed=seed, store=pipeline.store)
        for row in table_rows(1):
            if of_seed.stored_scores(row.configuration, ("miou", "accuracy", "labels")) is None:
                return f"score of Table 1's row {row.label!r} with seed {seed}"
    return None


def first_of_each_class(dataset, count):
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
    maps = pipeline.maps(configuration, pipeline.data.val, indices)
    return [of_image[int(labels.argmax())] for _, labels, of_image in maps]


@torch.no_grad()
def _features(model, image):
    from drs_lib.data import normalize

    images = normalize(image[None].to(next(model.parameters()).device))
    return [features[0] for features in model.layer_outputs(images)]


@torch.no_grad()
def _strongest_channel(model, image):
    """In layer 6, which has two DRS modules: the first one's map with the highest peak, and its G."""
    from drs_lib.data import normalize

    first_of_last_layer = [module for module in model.modules() if isinstance(module, DRS)][-2]
    seen = []
    hook = first_of_last_layer.register_forward_hook(lambda module, given, _: seen.append(given[0][0].relu()))
    model(normalize(image[None].to(next(model.parameters()).device)))
    hook.remove()
    [features] = seen
    channel = int(features.amax((1, 2)).argmax())
    return features[channel], first_of_last_layer.controller(features[None])[0, channel]
