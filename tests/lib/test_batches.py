"""Two ways to make batches, from files and from memory, that show the same."""

import numpy as np
import pytest
import torch
from tiny import TinyDataset

from drs_lib import batches
from drs_lib.batches import TargetMaps, make_batches
from drs_lib.data import without_masks
from drs_lib.recipes import ClassifyRecipe, RefineRecipe, SegmentRecipe
from drs_lib.train import train_classifier, train_refinement, train_segmentation

CPU = torch.device("cpu")
DATA = TinyDataset(length=9, size=32)
# Maps in whole 255ths, as the pipeline stores them; the second class is in no image.
MAPS = [
    np.random.default_rng(i).integers(0, 256, (3, 32, 32)).astype(np.float32)
    * np.float32(1 / 255)
    * np.array([i != 4, 0, i % 2], np.float32)[:, None, None]
    for i in range(9)
]
LABELS = [np.random.default_rng(i).integers(0, 4, (32, 32)).astype(np.uint8) for i in range(9)]
SHORT = dict(weights=None, batch=4, epochs=2, jitter=(0.3, 0.3, 0.3, 0.1))
AUGMENTATIONS = [
    dict(crop=40, scale=(0.5, 1.5), resize=None),
    dict(crop=24, scale=None, resize=28),
    dict(crop=None, scale=None, resize=20, jitter=None),
]
STAGES = {
    "classify": lambda changes, **options: train_classifier(
        ClassifyRecipe.laptop().replace(**SHORT | changes), DATA, **options
    ),
    "refine": lambda changes, **options: train_refinement(
        RefineRecipe.laptop().replace(**SHORT | changes), DATA, MAPS, **options
    ),
    "segment": lambda changes, **options: train_segmentation(
        SegmentRecipe.laptop().replace(**SHORT | changes), DATA, LABELS, **options
    ),
}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=lambda a: f"crop-{a['crop']}-{a['resize']}")
@pytest.mark.parametrize("stage", STAGES)
def test_a_training_from_memory_is_the_training_from_files(stage, augmentation):
    def run(**changes):
        model, history = STAGES[stage](augmentation | changes, device="cpu", progress=False)
        return model.state_dict(), [epoch["loss"] for epoch in history]

    expected, losses = run(images="files")
    found, same_losses = run(images="memory")
    assert same_losses == losses
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_images_stay_in_files_without_a_gpu():
    recipe = ClassifyRecipe.laptop()
    made, _ = make_batches(without_masks(DATA), recipe, None, 0, CPU)
    assert isinstance(made, torch.utils.data.DataLoader) and recipe.images == "auto"
    made, _ = make_batches(without_masks(DATA), recipe.replace(images="memory"), None, 0, CPU)
    assert isinstance(made, batches._FromMemory) and len(made) == 1


def test_only_the_maps_of_an_images_classes_are_kept():
    data = without_masks(DATA)
    extra = TargetMaps(MAPS, data)
    kept = [extra.as_bytes(i, data[i][0]) for i in range(9)]
    assert [len(stack) for stack in kept] == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    stacks = [extra.unpack(stack) for stack in kept]
    assert np.array_equal(extra.stack(stacks, range(9)).numpy(), np.stack(MAPS))
    assert not stacks[4].any()  # an image without a class has a map of zeros


def test_maps_that_are_no_255ths_are_rounded_to_them_and_small_ones_brought_to_the_images_size():
    data = without_masks(DATA)
    maps = [np.random.default_rng(i).random((3, 32, 32), np.float32) for i in range(9)]
    extra = TargetMaps(maps, data)
    found = extra.stack([extra.unpack(extra.as_bytes(i, data[i][0])) for i in range(9)], range(9))
    assert np.abs(found.numpy() - np.stack(maps)).max() <= 0.5 / 255 + 1e-6
    small = TargetMaps([np.full((3, 4, 4), 0.2, np.float16) for _ in range(9)], data)
    assert small.as_bytes(0, data[0][0]).shape == (3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_holds_the_images():
    made, _ = make_batches(without_masks(DATA), ClassifyRecipe.laptop(), None, 0, torch.device("cuda"))
    assert all(image.is_cuda for image in made.images)
    assert next(iter(made)).images.is_cuda


@pytest.mark.parametrize("images", ["files", "memory"])
def test_bad_labels_and_targets_are_named_whichever_way_they_are_read(images):
    changes = dict(images=images, workers=0)
    labels = [*LABELS[:5], np.full((32, 32), 9, np.uint8), *LABELS[6:]]
    with pytest.raises(ValueError, match="labels of .*5 hold the value 9: expected 0"):
        train_segmentation(SegmentRecipe.laptop().replace(**SHORT | changes), DATA, labels, device="cpu")
    maps = [*MAPS[:5], MAPS[5] + 1, *MAPS[6:]]
    with pytest.raises(ValueError, match="maps of .*5 go from .*: expected .0, 1."):
        train_refinement(RefineRecipe.laptop().replace(**SHORT | changes), DATA, maps, device="cpu")


def test_a_checkpoint_of_one_way_serves_the_other(tmp_path):
    from drs_course.checkpoint import Checkpoint

    class Killed(BaseException):
        pass

    def stop(title, step, *rest):
        if step == 3:
            raise Killed

    checkpoint = Checkpoint(tmp_path / "state.pt")
    with pytest.raises(Killed):
        STAGES["classify"](dict(images="files"), device="cpu", progress=stop, checkpoint=checkpoint)
    resumed, _ = STAGES["classify"](
        dict(images="memory"), device="cpu", progress=False, checkpoint=checkpoint
    )
    whole, _ = STAGES["classify"](dict(images="files"), device="cpu", progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_a_pipeline_on_voc_from_memory_makes_what_it_makes_from_files(tmp_path):
    from drs_course.export import export_voc
    from drs_course.paper import Configuration
    from drs_course.stages import Pipeline, Splits
    from drs_lib.data import VOC2012, Critters
    from drs_lib.recipes import get_budget

    splits = {"train": Critters("train", size=64, length=12), "val": Critters("val", size=64, length=4)}
    tree = export_voc(splits, tmp_path, progress=False)
    data = Splits("voc", *(VOC2012(tree, name) for name in ("train", "val")))
    found = {}
    for images in ("files", "memory"):
        budget = get_budget("ci").for_all(images=images)
        line = Pipeline(data, budget, store=tmp_path / images, device="cpu")
        stages = line.stages(Configuration(refine=True), ("miou", "labels"))
        line.scores(Configuration(refine=True), ("miou", "labels"))
        found[images] = {
            (stage.name, stage.key, name): facts["sha256"]
            for stage in stages
            for name, facts in line.get(stage).files.items()
            if name not in ("meta.json", "history.json")
        }
    assert found["files"] == found["memory"] and len(found["files"]) >= 8
