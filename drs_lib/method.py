"""Figure 3 of the paper, from top to bottom: images, their labels and saliency in, a DeepLab out.

    network, score = weakly_supervised(train, val, get_budget("laptop"), "out")

Each of the six calls also works alone. `python -m drs_lib` makes them for a folder of images.
"""

from pathlib import Path

from drs_lib.archives import LabelArchive, MapArchive, write_labels, write_targets
from drs_lib.data.weak import without_masks
from drs_lib.maps import iterate_maps
from drs_lib.networks import RefinementNetwork
from drs_lib.runtime import threads
from drs_lib.train import evaluate_segmentation, train_classifier, train_refinement, train_segmentation


def weakly_supervised(train, val, budget, folder, segmenter="largefov", seed=0, device=None, progress=True):
    """Train a segmentation network on image-level labels and saliency maps, and score it.

    Args:
        train: a data set (`drs_lib.data`), of which images, labels and saliency are read, and no mask.
        val: a data set with masks, for the score alone; None: no score.
        budget: a `drs_lib.recipes.Budget`: the recipes, and how maps are read. Its numbers of images are not
            looked at: `train` and `val` are taken whole.
        folder: for ``maps.zip`` and ``labels.zip``, what one step hands to the next; made if it is not there.
        segmenter: "largefov", "largefov_resnet" or "aspp", the networks of Table 4.
        seed, device, progress: of the three trainings, see `drs_lib.train.train_classifier`.

    Returns:
        (the DeepLab in evaluation mode, its mean IoU as a fraction or None).
    """
    train, folder = without_masks(train), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(seed=seed, device=device, progress=progress)
    classifier, _ = train_classifier(budget.classify, train, **options)
    maps = localization_maps_of(classifier, train, budget, folder / "maps.zip")
    refiner, _ = train_refinement(budget.refine, train, maps, **options)
    labels = pseudo_labels_of(refiner, train, budget, folder / "labels.zip")
    network, _ = train_segmentation(budget.segment(segmenter), train, labels, **options)
    return network, None if val is None else evaluate_segmentation(network, val)["miou"]


def localization_maps_of(classifier, train, budget, path):
    """Equation 1 for every training image, as the refinement network learns it: a `MapArchive`.

    path: of the zip file in which the maps are kept.
    """
    found = maps_of(classifier, train, budget, present_only=True)
    classes = write_targets(path, found, train.names, largest=budget.target == "largest")
    return MapArchive(path, classes, train.num_classes)


def pseudo_labels_of(network, train, budget, path):
    """Pseudo labels of every training image, from the network's maps and saliency: a `LabelArchive`.

    network: the refinement network, or the classifier where there is none. path: of the zip file in which
    the labels are kept.
    """
    rule = label_rule(budget, isinstance(network, RefinementNetwork))
    write_labels(path, maps_of(network, train, budget, present_only=True), train, **rule)
    return LabelArchive(path)


def label_rule(budget, refined):
    """The arguments of `drs_lib.labels.pseudo_labels` under a budget."""
    alpha = budget.refined_alpha if refined else budget.alpha
    return {"alpha": alpha, "beta": budget.beta, "rule": budget.rule, "conflict": budget.conflict}


def map_options(budget, refined):
    """How maps are made under a budget: arguments of `drs_lib.maps.iterate_maps`."""
    options = {"scales": budget.scales, "resize": budget.resize}
    return options | ({"renormalize": budget.renormalize} if refined else {})


def maps_of(network, dataset, budget, **options):
    """`drs_lib.maps.iterate_maps` of a trained network, as the budget makes maps.

    options: ``indices`` and ``present_only``.
    """
    refined = isinstance(network, RefinementNetwork)
    recipe = budget.refine if refined else budget.classify
    options |= dict(workers=recipe.workers, precision=recipe.precision, **map_options(budget, refined))
    with threads(recipe.threads):
        yield from iterate_maps(network, dataset, **options)
