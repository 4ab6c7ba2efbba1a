import copy
import math
import types

import numpy as np
import pytest
import torch
from torch import nn

from drs_lib import networks, runtime, train
from drs_lib.data import MaskAccessError, without_masks
from drs_lib.train import ClassifyRecipe, RefineRecipe, SegmentRecipe, TrainingDiverged

SIDE = 32
CLASSIFY = ClassifyRecipe.laptop().replace(weights=None, batch=8, epochs=2)
REFINE = RefineRecipe.laptop().replace(weights=None, batch=8, epochs=1)
SEGMENT = SegmentRecipe.laptop().replace(weights=None, batch=8, epochs=1)


class Squares:
    """Images with one coloured square each, whose colour is its class; `mask` counts who asks for it."""

    classes = ("red", "green", "blue")
    num_classes = 3
    fingerprint = "squares"

    def __init__(self, length=24, sizes=(SIDE,)):
        rng = np.random.default_rng(0)
        self.names = [f"square-{i:02d}" for i in range(length)]
        self.images, self.masks, self.asked = [], [], []
        for i in range(length):
            side, c = sizes[i % len(sizes)], i % 3
            image, mask = rng.integers(0, 60, (3, side, side), np.uint8), np.zeros((side, side), np.uint8)
            top, left = rng.integers(0, side // 2, 2)
            square = np.s_[top : top + side // 2, left : left + side // 2]
            image[c][square], mask[square] = 255, c + 1
            self.images.append(torch.from_numpy(image))
            self.masks.append(mask)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        labels = torch.zeros(3)
        labels[i % 3] = 1
        return self.images[i], labels

    def saliency(self, i):
        return (self.masks[i] > 0).astype(np.uint8) * 255

    def mask(self, i):
        self.asked.append(i)
        return self.masks[i]

    def maps(self):
        return [np.stack([mask == c for c in (1, 2, 3)]).astype(np.float32) for mask in self.masks]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("DRS_DEVICE", "cpu")


@pytest.fixture
def squares():
    return Squares()


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def classify(dataset, recipe=CLASSIFY, **options):
    return train.train_classifier(recipe, dataset, progress=False, **options)


def refine(dataset, recipe=REFINE, maps=None, **options):
    maps = dataset.maps() if maps is None else maps
    return train.train_refinement(recipe, dataset, maps, progress=False, **options)


def segment(dataset, recipe=SEGMENT, labels=None, **options):
    labels = dataset.masks if labels is None else labels
    return train.train_segmentation(recipe, dataset, labels, progress=False, **options)


def batches_of(dataset, recipe, extra=None):
    return train.make_batches(without_masks(dataset), recipe, extra, 0, torch.device("cpu"))[0]


class Outputs(nn.Module):
    """A network that returns what it was given."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = nn.ParameterList(torch.as_tensor(output).float() for output in outputs)

    def forward(self, images):
        return self.outputs[0]

    def training_logits(self, images):
        return self.outputs


def fit(model, batches, loss, rate=0.1, factor=lambda step: 1, **options):
    """`train.fit` with SGD; returns the optimiser's history."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return train.fit(model, batches, loss, optimizer, scheduler, progress=False, **options)


def batch_of(labels, extra):
    return train.Batch(torch.arange(len(extra)), torch.zeros(len(extra), 3, 8, 8), labels, extra)


def test_refinement_loss_over_present_classes():
    refined, target = torch.rand(2, 3, 5, 5), torch.rand(2, 3, 5, 5)
    labels = torch.tensor([[1.0, 0, 0], [1, 0, 1]])
    loss = train.refinement_loss(Outputs(refined), batch_of(labels, target), label_mask=True)
    error = (refined - target).square()
    assert loss.item() == pytest.approx(torch.stack([error[0, 0], error[1, 0], error[1, 2]]).mean().item())
    assert train.refinement_loss(Outputs(refined), batch_of(labels * 0, target), label_mask=True).item() == 0


def test_a_batch_without_a_labelled_pixel_has_no_loss_and_no_gradient():
    model = Outputs(torch.ones(2, 3, 4, 4))
    loss = train.segmentation_loss(model, batch_of(None, torch.full((2, 8, 8), 255, dtype=torch.uint8)))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(model.outputs[0].grad, torch.zeros(2, 3, 4, 4))


def test_training_learns(squares):
    model, history = classify(squares, CLASSIFY.replace(epochs=12, lr=3e-3), device="cpu")
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert train.evaluate_classifier(model, squares) > 0.9
    assert [entry["epoch"] for entry in history] == list(range(1, 13))
    assert all(entry["seconds"] > 0 for entry in history)
    assert not model.training


def test_segmentation_learns_and_is_scored(squares):
    recipe = SEGMENT.replace(backbone="mini_resnet", epochs=30, lr=3e-3, schedule="constant")
    model, history = segment(squares, recipe)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert squares.asked == []
    score = train.evaluate_segmentation(model, squares)
    # 0.19 for an empty prediction, 0.27 for squares of one and the same class. The logits are 4 x 4.
    assert score["miou"] > 0.35
    assert len(score["iou"]) == 4
    assert sorted(squares.asked) == list(range(24))


def test_refinement_learns(squares):
    recipe = REFINE.replace(epochs=8, lr=3e-3)
    _, history = refine(squares, recipe)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


@pytest.mark.parametrize("kind", ["largefov", "aspp"])
@pytest.mark.parametrize("backbone", ["mini", "mini_resnet"])
def test_every_small_deeplab_trains(squares, kind, backbone):
    recipe = SegmentRecipe.laptop(kind, backbone).replace(weights=None, batch=8, iterations=1, epochs=None)
    model, history = segment(squares, recipe)
    assert len(history) == 1 and np.isfinite(history[0]["loss"])
    assert model.num_classes == 4


def test_the_history_tells_the_rate(squares):
    recipe = CLASSIFY.replace(epochs=3, schedule="step", milestones=(2, 3), lr=1e-3)
    seen = []
    _, history = classify(squares, recipe, on_epoch=lambda history: seen.append(len(history)))
    assert [entry["lr"] for entry in history] == pytest.approx([1e-3, 1e-4, 1e-5])
    assert seen == [1, 2, 3]


def test_iterations_are_counted_across_epochs_and_stop_within_one(squares, monkeypatch):
    steps = []
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, closure=None: steps.append(self.param_groups[0]["lr"])
    )
    recipe = CLASSIFY.replace(epochs=None, iterations=5, schedule="poly", lr=1.0)
    _, history = classify(squares, recipe)
    assert len(history) == 2
    assert steps == pytest.approx([(1 - step / 5) ** 0.9 for step in range(5)])


def test_the_same_seed_gives_the_same_weights_whatever_came_before(squares):
    first, history = classify(squares, seed=3)
    torch.manual_seed(99)
    np.random.seed(1)
    torch.randn(1000)
    before = torch.get_rng_state()
    again, history_again = classify(squares, seed=3)
    assert same_weights(first, again)
    assert [entry["loss"] for entry in history] == [entry["loss"] for entry in history_again]
    assert torch.equal(torch.get_rng_state(), before)
    other, _ = classify(squares, seed=4)
    assert not same_weights(first, other)


def test_neither_a_callback_nor_the_reading_processes_change_the_weights(squares):
    # DeepLab draws random numbers between the epochs: dropout.
    recipe = SEGMENT.replace(epochs=2)
    plain, _ = segment(squares, recipe)
    assert same_weights(plain, segment(squares, recipe, on_epoch=lambda history: torch.rand(7))[0])
    assert same_weights(plain, segment(squares, recipe.replace(workers=1))[0])


def test_augmentation_differs_from_epoch_to_epoch_and_every_image_is_shown(squares):
    loader = batches_of(squares, CLASSIFY)
    epochs = []
    for _ in range(2):
        batches = list(loader)
        order = torch.cat([batch.indices for batch in batches]).tolist()
        assert sorted(order) == list(range(24))
        images = torch.cat([batch.images for batch in batches])
        flipped = [not torch.equal(images[k], squares.images[i]) for k, i in enumerate(order)]
        assert all(torch.equal(images[k].flip(-1), squares.images[order[k]]) for k in range(24) if flipped[k])
        epochs.append((order, [flipped[order.index(i)] for i in range(24)]))
    assert epochs[0][0] != epochs[1][0]
    assert epochs[0][1] != epochs[1][1]
    assert 0 < sum(epochs[0][1]) < 24


@pytest.mark.parametrize(
    ("images", "batch", "accumulate", "expected"),
    [(24, 8, 1, [8, 8, 8]), (23, 8, 1, [8, 8]), (5, 8, 1, [5]), (24, 4, 2, [4] * 6), (20, 4, 2, [4] * 4)]
    + [(5, 4, 2, [4, 1]), (3, 4, 2, [3])],
)
def test_batches_of_an_epoch(images, batch, accumulate, expected):
    recipe = CLASSIFY.replace(batch=batch, accumulate=accumulate)
    loader = batches_of(Squares(images), recipe)
    assert [len(b.indices) for b in loader] == expected
    assert len(loader) == len(expected)


def test_the_loop_is_gradient_descent_at_the_schedules_rates():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 4, 3, 1, 1), np.uint8)
    labels = rng.integers(0, 2, (3, 4, 2)).astype(np.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False)).eval()
    weight = model[1].weight.detach().numpy().astype(np.float64)
    batches = [
        train.Batch(torch.arange(4), torch.from_numpy(x), torch.from_numpy(y), None)
        for x, y in zip(pixels, labels, strict=True)
    ]
    losses = fit(model, batches, train.classification_loss, 0.5, lambda step: 1 / (1 + step), steps=3)
    expected = []
    for step in range(3):
        x = (pixels[step, :, :, 0, 0] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        p = 1 / (1 + np.exp(-x @ weight.T))
        expected.append(-np.mean(labels[step] * np.log(p) + (1 - labels[step]) * np.log(1 - p)))
        weight = weight - 0.5 / (1 + step) * (p - labels[step]).T @ x / p.size
    assert np.allclose(model[1].weight.detach().numpy(), weight, atol=1e-5)
    assert losses[0]["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert losses[0]["lr"] == pytest.approx(0.5 / 3)
    assert model.training


def test_two_accumulated_batches_are_one_of_twice_the_size(squares):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    results = []
    for batch, accumulate in ((8, 1), (4, 2)):
        net = copy.deepcopy(model)
        recipe = CLASSIFY.replace(batch=batch, accumulate=accumulate, flip=False)
        batches = batches_of(squares, recipe)
        fit(net, batches, train.classification_loss, rate=0.5, steps=1, accumulate=accumulate)
        results.append(net[0].weight)
    assert (results[0] - model[0].weight).abs().max() > 1e-2
    assert torch.allclose(*results, rtol=0, atol=1e-5)


def test_targets_and_labels_are_augmented_with_their_image(squares):
    data = without_masks(squares)
    for extra in (train.LabelMaps(squares.masks, data), train.TargetMaps(squares.maps(), data)):
        batch = next(iter(batches_of(data, SEGMENT.replace(batch=24), extra)))
        for image, target in zip(batch.images, batch.extra, strict=True):
            assert torch.equal(image.amax(0) > 100, target > 0 if target.ndim == 2 else target.amax(0) > 0)


@pytest.mark.parametrize(
    ("build", "recipe"),
    [
        (lambda: networks.classifier("mini", 3), CLASSIFY),
        (lambda: networks.classifier("vgg16", 20), ClassifyRecipe(lr_multipliers=(1, 2, 10, 20))),
        (lambda: networks.refinement_network("vgg16", 20), RefineRecipe(lr_multipliers=(1, 2, 10, 20))),
        (lambda: networks.deeplab("largefov", "vgg16", 21), SegmentRecipe()),
        (lambda: networks.deeplab("aspp", "resnet101", 21), SegmentRecipe.aspp_resnet101()),
        (lambda: networks.deeplab("aspp", "mini_resnet", 4), SegmentRecipe.laptop("aspp", "mini_resnet")),
    ],
)
def test_groups_are_the_trainable_parameters_each_once_at_its_rate(build, recipe):
    with torch.device("meta"):
        model = build()
    groups = train.parameter_groups(model, recipe)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    fresh = {id(p) for module in model.new_modules() for p in module.parameters()}
    multiplier = dict(zip(train.PARAMETER_GROUPS, recipe.lr_multipliers, strict=True))
    for group in groups:
        age, kind = group["name"].split()
        assert {id(p) in fresh for p in group["params"]} == {age == "new"}
        assert {p.ndim == 1 for p in group["params"]} == {kind == "biases"}
        assert group["lr"] == recipe.lr * multiplier[group["name"]]
        decays = recipe.bias_decay or kind == "weights"
        assert group["weight_decay"] == (recipe.weight_decay if decays else 0)
    assert {"pretrained weights", "new weights", "new biases"} <= {group["name"] for group in groups}


def test_an_empty_group_with_a_rate_of_its_own_is_refused():
    model = networks.deeplab("largefov", "mini", 4)
    model.new_modules = types.MethodType(lambda self: [self.layers, self.head], model)
    with pytest.raises(ValueError, match="no trainable pretrained weights"):
        train.parameter_groups(model, SEGMENT)
    with torch.device("meta"):
        resnet = networks.deeplab("largefov", "resnet101", 21)
    with pytest.raises(ValueError, match="no trainable pretrained biases.* 0.001 x 2"):
        train.parameter_groups(resnet, SegmentRecipe())


def test_a_diverging_training_says_where_and_stops(squares):
    recipe = CLASSIFY.replace(optimizer="sgd", lr=1e30, schedule="constant")
    with pytest.raises(TrainingDiverged) as caught:
        classify(squares, recipe)
    message = str(caught.value)
    assert "epoch 1, iteration" in message and "learning rate 1e+30" in message
    assert message.count("square-") == 8 and "recipe.replace(lr=...)" in message


@pytest.mark.parametrize("images", ["files", "memory"])
def test_unknown_labels_are_called_so_and_no_divergence(squares, monkeypatch, images):
    known = Squares.__getitem__
    monkeypatch.setattr(
        Squares, "__getitem__", lambda self, i: (known(self, i)[0], torch.full((3,), math.nan))
    )
    with pytest.raises(ValueError, match="labels are unknown .*labels='none'"):
        classify(squares, CLASSIFY.replace(images=images))
    segment(squares)  # which needs none
    with pytest.raises(ValueError, match="labels are unknown"):
        train.evaluate_classifier(networks.classifier("mini", 3), squares)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_network_has_no_score(squares, value):
    for network, score in (
        (networks.classifier("mini", 3), train.evaluate_classifier),
        (networks.deeplab("largefov", "mini", 4), train.evaluate_segmentation),
    ):
        with torch.no_grad():
            list(network.head.parameters())[-1].fill_(value)
        with pytest.raises(ValueError, match="NaN or infinity: it has diverged"):
            score(network, squares)


@pytest.mark.parametrize("during", ["forward", "backward"])
def test_out_of_memory_says_what_to_change(squares, monkeypatch, during):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def loss(model, batch):
        if during == "forward":
            full()
        output = model(batch.images)
        output.register_hook(full)
        return output.mean()

    monkeypatch.setattr(train, "classification_loss", loss)
    with pytest.raises(train.OutOfMemory, match=f"a batch of 8 images of {SIDE}x{SIDE} .*half the batch"):
        classify(squares, CLASSIFY)


def test_weights_that_end_as_nan_are_noticed_though_the_last_loss_was_finite():
    batch = train.Batch(torch.arange(1), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), None, None)
    with pytest.raises(TrainingDiverged, match="after the last iteration, 1, bias is no longer finite"):
        fit(nn.Conv2d(3, 1, 1), [batch], lambda model, batch: (0 * model.bias).sqrt().sum(), steps=1)


def test_an_empty_stream_of_batches_is_an_error():
    with pytest.raises(ValueError, match="no batch"):
        fit(nn.Conv2d(3, 1, 1), [], None, steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: masks[:-1], "23 labels for 24 images"),
        (lambda masks: [mask[1:] for mask in masks], r"torch.uint8 \(31, 32\): expected uint8 \(32, 32\)"),
        (lambda masks: [mask.astype(np.int64) for mask in masks], "torch.int64"),
    ],
)
def test_labels_are_checked(squares, change, message):
    with pytest.raises(ValueError, match=message):
        segment(squares, labels=change(squares.masks))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps: maps[:1], "1 targets for 24 images"),
        (lambda maps: [one * np.nan for one in maps], "nan"),
        (lambda maps: [one[:2] for one in maps], r"\(2, 32, 32\): expected floating point \(3, H, W\)"),
        (lambda maps: [one.astype(np.uint8) for one in maps], "torch.uint8"),
    ],
)
def test_target_maps_are_checked(squares, change, message):
    with pytest.raises(ValueError, match=message):
        refine(squares, maps=change(squares.maps()))


def test_target_maps_may_be_small_half_precision_and_read_only(squares):
    def read_only(maps):
        maps = maps[:, ::8, ::8].astype(np.float16)
        maps.flags.writeable = False
        return maps

    _, history = refine(squares, maps=[read_only(maps) for maps in squares.maps()])
    assert np.isfinite(history[0]["loss"])


def test_no_stage_can_reach_a_mask(squares, monkeypatch):
    reached = []
    make_batches = train.make_batches

    def spy(dataset, *args):
        reached.append(dataset)
        return make_batches(dataset, *args)

    monkeypatch.setattr(train, "make_batches", spy)
    classify(squares)
    refine(squares)
    segment(squares)
    for dataset in reached:
        with pytest.raises(MaskAccessError):
            dataset.mask(0)
    assert len(reached) == 3 and squares.asked == []


def test_images_of_several_sizes_need_a_crop_or_a_resize():
    dataset = Squares(24, sizes=(32, 40))
    with pytest.raises(ValueError, match="32x32, 40x40.*set the recipe's crop or resize"):
        classify(dataset)
    for change in (dict(crop=24), dict(resize=32), dict(resize=32, precision="bfloat16")):
        _, history = classify(dataset, CLASSIFY.replace(epochs=1, **change))
        assert np.isfinite(history[0]["loss"])


def test_an_interrupt_passes_and_the_surroundings_are_restored(squares):
    def stop(history):
        raise KeyboardInterrupt

    with runtime.threads(2):
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            classify(squares, CLASSIFY.replace(threads=1), on_epoch=stop)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), state)


def test_a_recipe_of_another_stage_is_refused(squares):
    for stage, expected in ((classify, "Classify"), (refine, "Refine"), (segment, "Segment")):
        wrong = REFINE if stage is classify else CLASSIFY
        with pytest.raises(TypeError, match=f"recipe is a .*Recipe: expected a {expected}Recipe"):
            stage(squares, wrong)


@pytest.fixture(scope="module")
def deeplab():
    with runtime.seeded(0):
        model = networks.deeplab("largefov", "mini", 4)
        nn.init.normal_(model.head.score.weight)
    return model


def test_predictions_are_at_the_images_size_one_image_at_a_time_or_many(deeplab):
    dataset = Squares(7, sizes=(32, 32, 40))
    alone = dict(train.predict_segmentation(deeplab, dataset, batch_size=1))
    assert list(alone) == list(range(7))
    assert len(np.unique(np.concatenate([labels.ravel() for labels in alone.values()]))) > 1
    deeplab.train()
    together = train.predict_segmentation(deeplab, dataset, output="probabilities")
    for i, probabilities in together:
        assert probabilities.shape == (4, *dataset.masks[i].shape)
        assert np.allclose(probabilities.sum(0), 1, atol=1e-5)
        assert (probabilities.argmax(0) == alone[i]).mean() > 0.999
        assert alone[i].dtype == np.uint8
    assert deeplab.training
    with pytest.raises(ValueError, match="output is 'masks'"):
        train.predict_segmentation(deeplab, dataset, output="masks")


def test_evaluate_segmentation_against_a_confusion_matrix_by_hand(deeplab):
    dataset = Squares(5, sizes=(32, 40))
    dataset.masks[0][:4] = 255
    found = np.concatenate([labels.ravel() for _, labels in train.predict_segmentation(deeplab, dataset)])
    truth = np.concatenate([mask.ravel() for mask in dataset.masks])
    found, truth = found[truth != 255], truth[truth != 255]
    union = [((found == c) | (truth == c)).sum() for c in range(4)]
    iou = [((found == c) & (truth == c)).sum() / union[c] if union[c] else np.nan for c in range(4)]
    score = train.evaluate_segmentation(deeplab, dataset)
    assert score["iou"] == pytest.approx(iou, nan_ok=True) and score["miou"] == pytest.approx(np.nanmean(iou))


def test_evaluate_segmentation_with_a_crf(deeplab):
    crf = pytest.importorskip("drs_lib.crf")
    if not crf.available():
        pytest.skip("pydensecrf is not installed")
    dataset = Squares(3)
    # Without iterations and kernels the CRF is the network's own answer.
    off = crf.CRFConfig(iterations=0, gaussian_weight=0, bilateral_weight=0)
    score = train.evaluate_segmentation(deeplab, dataset, crf=off, jobs=1)
    assert score["miou"] == train.evaluate_segmentation(deeplab, dataset)["miou"]
    assert score["miou_crf"] == pytest.approx(score["miou"], abs=1e-3)
    smooth = crf.CRFConfig(gaussian_weight=50)
    assert train.evaluate_segmentation(deeplab, dataset, crf=smooth, jobs=1)["miou_crf"] != score["miou_crf"]


def test_evaluate_classifier_counts_images_with_every_label_right(squares):
    class Channels(Outputs):
        """Sees the colour of the square, and one colour too many in every fourth image."""

        def forward(self, images):
            logits = images.mean((2, 3))
            logits = logits - logits.amax(1, keepdim=True)
            logits[::4] = 1
            return logits

    assert train.evaluate_classifier(Channels(0), squares) == pytest.approx(0.75)


def test_evaluate_classifier_resizes():
    model, sizes = networks.classifier("mini", 3), []
    model.register_forward_pre_hook(lambda model, images: sizes.append(tuple(images[0].shape)))
    train.evaluate_classifier(model, Squares(6, sizes=(32, 40)), resize=24)
    assert sizes == [(6, 3, 24, 24)]
