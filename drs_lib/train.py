"""Training and scoring the three networks of Figure 3: one loop, three losses.

    recipe + images and labels                    -> train_classifier    -> classifier with DRS
    recipe + images and localization maps         -> train_refinement    -> refinement network
    recipe + images and (pseudo) segment labels   -> train_segmentation  -> DeepLab

Each is a function of its arguments and the seed alone: on a CPU the same call gives the same weights, bit for
bit, on the same machine with the same number of threads, whatever was drawn before it and however many
processes read the images. A GPU repeats itself as far as its kernels do, see `drs_lib.runtime.deterministic`.
The data set's pixel masks are out of reach for all three (`drs_lib.data.without_masks`).
"""

import functools
import math
import time
import traceback
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from drs_lib import networks
from drs_lib.batches import Batch, LabelMaps, TargetMaps, make_batches, resize_maps
from drs_lib.crf import iterate_crf
from drs_lib.data import IGNORED, normalize, resize_square, without_masks
from drs_lib.drs import LearnableController
from drs_lib.metrics import SegmentationScore, exact_match_accuracy, known_labels
from drs_lib.recipes import PARAMETER_GROUPS, ClassifyRecipe, RefineRecipe, SegmentRecipe
from drs_lib.runtime import (
    autocast,
    evaluating,
    memory_format,
    move,
    pick_device,
    preserved_rng,
    require_finite,
    seeded,
    threads,
    tuned,
)

__all__ = [
    "ClassifyRecipe",
    "OutOfMemory",
    "RefineRecipe",
    "SegmentRecipe",
    "TrainingDiverged",
    "evaluate_classifier",
    "evaluate_segmentation",
    "fit",
    "make_optimizer",
    "parameter_groups",
    "predict_segmentation",
    "train_classifier",
    "train_network",
    "train_refinement",
    "train_segmentation",
]

# Iterations after which a GPU is asked for the losses; asking after each would make it wait every time.
LOSSES_FETCHED_EVERY = 20


class TrainingDiverged(RuntimeError):
    """The loss or the weights are no longer finite; nothing of the training is returned."""


class OutOfMemory(RuntimeError):
    """A batch does not fit into the device's memory; the message says what does."""


def classification_loss(model, batch):
    """Binary cross-entropy of P = sigmoid(GAP(F)) against the labels, averaged over images and classes."""
    return F.binary_cross_entropy_with_logits(model(batch.images).float(), batch.labels)


def refinement_loss(model, batch, size="map", label_mask=False):
    """Mean-squared error between refined maps N and target maps M, batch.extra (N, C, H, W) in [0, 1].

    size "map": M is sampled at N's size, by the grid on which the localization maps were upsampled (bilinear
    with aligned corners), so that an uncropped map comes back unchanged. "image": N is upsampled instead.
    label_mask: the mean is over the channels of the image's own classes.
    """
    refined, target = model(batch.images).float(), batch.extra
    if size == "map":
        target = resize_maps(target, refined.shape[-2:])
    else:
        refined = resize_maps(refined, target.shape[-2:])
    if not label_mask:
        return F.mse_loss(refined, target)
    error = (refined - target).square().mean((2, 3)) * batch.labels
    return error.sum() / batch.labels.sum().clamp(min=1)


def segmentation_loss(model, batch, size="logits"):
    """Cross-entropy against the labels, batch.extra uint8 (N, H, W); the mean over pixels that are not 255.

    Summed over `model.training_logits`: one map for LargeFOV, three scales and their maximum for ASPP. size
    "logits": the labels are sampled, nearest, at the size of each; "image": the logits are upsampled.
    """
    return sum(
        _cross_entropy(logits.float(), batch.extra, size) for logits in model.training_logits(batch.images)
    )


def _cross_entropy(logits, labels, size):
    if size == "image":
        logits = _resize_logits(logits, labels.shape[-2:])
    else:
        labels = F.interpolate(labels[:, None].float(), logits.shape[-2:], mode="nearest-exact")[:, 0]
    labels = labels.long()
    # A batch of crops may hold no labelled pixel at all, and the mean over none of them is NaN.
    labelled = (labels != IGNORED).sum()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labelled.clamp(min=1)


def _resize_logits(logits, size):
    # Without aligned corners, a logit stands for a cell of the image, the same cell from which the nearest
    # label is taken.
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def fit(
    model,
    batches,
    loss,
    optimizer,
    scheduler,
    *,
    steps,
    accumulate=1,
    precision="float32",
    names=None,
    title="training",
    progress=True,
    on_epoch=None,
    checkpoint=None,
    streams=(),
    compile=None,
):
    """Train `model` in place for `steps` iterations of the optimiser; the loop of all three stages.

    batches: an iterable of `Batch` with uint8 images; one pass over it is an epoch. loss(model, batch): a
    scalar. scheduler: stepped after each iteration. accumulate: batches per iteration. names: the images'
    ids, for messages. progress: True for a bar, False for none, or a function (title, step, steps, epoch,
    loss) that is called after every iteration and must not draw random numbers; on a GPU the loss is the last
    that was fetched, NaN before the first. on_epoch(history): called after every epoch; random numbers it
    draws don't change the training. checkpoint: a `drs_course.checkpoint.Checkpoint`, from which the training
    goes on if it holds one, and which is written after every epoch but the last; streams: the generators from
    which `batches` draws. compile: a mode of torch.compile for the loss, or None.

    Returns the history, a list of dict(epoch, loss, lr, seconds) in which `loss` is the epoch's mean and `lr`
    the first parameter group's rate at its end. Raises TrainingDiverged when the loss or a weight stops being
    finite, OutOfMemory when the device can't hold a batch.
    """
    device = next(model.parameters()).device
    layout = memory_format(device)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    summing = compile is not None and accumulate > 1
    if summing:
        # CUDA graphs overwrite the gradients that they returned: they are summed up outside.
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.grad = torch.zeros_like(parameter)
    objective = loss if compile is None else _compiled(loss, compile)
    history, step, seen = [], 0, 0
    kept = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    found = None if checkpoint is None else checkpoint.restore(streams, **kept)
    if found is not None:
        history, step, seen = found["history"], found["step"], found["seen"]
    with _reporting(progress, title, steps, step) as report, _forgetting(compile):
        while step < steps:
            start, seen_before = time.perf_counter(), seen
            losses = _Losses(device, title, len(history) + 1, steps, names)
            rate = optimizer.param_groups[0]["lr"]
            for batch in batches:
                indices = batch.indices
                batch = Batch(*(None if part is None else move(part, device) for part in batch))
                batch = batch._replace(images=normalize(batch.images).contiguous(memory_format=layout))
                seen += 1
                last = seen % accumulate == 0
                with _memory_advice(model, loss, batch, precision, title):
                    value = _gradients(objective, model, batch, accumulate, precision)
                losses.add(value, step + 1, _rates(optimizer), indices, batch.labels)
                if not last:
                    continue
                rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                optimizer.zero_grad(set_to_none=not summing)
                scheduler.step()
                step += 1
                report(step, len(history) + 1, losses.known[-1] if losses.known else math.nan)
                if step == steps:
                    break
            if seen == seen_before:
                raise ValueError(f"{title}: no batch came out of the data; is the data set empty?")
            losses.fetch()
            history.append(
                dict(
                    epoch=len(history) + 1,
                    loss=float(np.mean(losses.known)),
                    lr=rate,
                    seconds=time.perf_counter() - start,
                )
            )
            if step == steps:
                _check_weights(model, f"{title}: after the last iteration, {steps}")
            elif checkpoint is not None:
                checkpoint.save(dict(history=history, step=step, seen=seen), streams, **kept)
            if on_epoch is not None:
                with preserved_rng():
                    on_epoch(history)
    if summing:
        optimizer.zero_grad(set_to_none=True)
    return history


def _gradients(objective, model, batch, accumulate, precision):
    # In a function of its own: where memory runs out, nothing may hold the graph while it is tried what fits.
    with autocast(batch.images.device, precision):
        value = objective(model, batch)
    (value / accumulate).backward()
    return value.detach()


def _compiled(loss, mode):
    def step(model, batch):
        return loss(model, batch)

    compiled = torch.compile(step, mode=mode)
    # A copy, made outside: with CUDA graphs the next step overwrites what this one returns.
    return lambda model, batch: compiled(model, batch).clone()


@contextmanager
def _forgetting(compile):
    """Drops compiled code after a training: the next network needs other code, of which torch keeps few
    versions, and CUDA graphs keep their memory."""
    try:
        yield
    finally:
        if compile is not None:
            torch.compiler.reset()


class _Losses:
    """The losses of an epoch; `known` are those that were fetched so far."""

    def __init__(self, device, title, epoch, steps, names):
        self.title, self.epoch, self.steps, self.names = title, epoch, steps, names
        self.every = 1 if device.type == "cpu" else LOSSES_FETCHED_EVERY
        self.known, self.waiting = [], []

    def add(self, loss, *where):
        self.waiting.append((loss, *where))
        if len(self.waiting) == self.every:
            self.fetch()

    def fetch(self):
        """Raises TrainingDiverged at the first that is not finite, ValueError if its labels are unknown."""
        if not self.waiting:
            return
        values = torch.stack([loss for loss, *_ in self.waiting]).tolist()
        for value, (_, step, rates, indices, labels) in zip(values, self.waiting, strict=True):
            if not math.isfinite(value):
                known_labels(labels)
                raise TrainingDiverged(
                    f"{self.title}: the loss is {value} in epoch {self.epoch}, iteration {step} of "
                    f"{self.steps}, at learning rate {rates}, on the images {_ids(indices, self.names)}. "
                    f"{_REMEDY}"
                )
        self.known += values
        self.waiting = []


@contextmanager
def _memory_advice(model, loss, batch, precision, title):
    """Turns torch's error into one that names the batch, the images' size, and, having tried, what fits."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # or they would keep what did not fit
        count, _, height, width = batch.images.shape
        fits = next((n for n in _halves(count) if _fits(model, loss, batch, precision, n)), None)
        advice = (
            f"A batch of {fits} fits: recipe.replace(batch={fits}, accumulate=...) with accumulate "
            f"{math.ceil(count / fits)} times as large takes the same steps"
            if fits
            else "Not even one such image fits: choose a smaller crop (or resize)"
        )
        raise OutOfMemory(
            f"{title}: a batch of {count} images of {height}x{width} does not fit into the memory of "
            f"{batch.images.device}. {advice}. precision='bfloat16' takes about half the memory, and "
            "whatever else uses the device takes its share."
        ) from error


def _halves(count):
    while count > 1:
        count //= 2
        yield count


def _fits(model, loss, batch, precision, count):
    part = Batch(*(None if values is None else values[:count] for values in batch))
    model.zero_grad(set_to_none=True)
    try:
        with autocast(batch.images.device, precision):
            value = loss(model, part)
        value.backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        if batch.images.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


@contextmanager
def _reporting(progress, title, steps, done=0):
    if callable(progress):
        yield lambda step, epoch, loss: progress(title, step, steps, epoch, loss)
        return
    options = dict(initial=done, unit="step", disable=not progress, dynamic_ncols=True)
    with tqdm(total=steps, desc=title, **options) as bar:

        def report(step, epoch, loss):
            bar.update()
            known = {} if math.isnan(loss) else {"loss": f"{loss:.4f}"}
            bar.set_postfix(epoch=epoch, **known, refresh=False)

        yield report


_REMEDY = (
    "Nothing of this training is kept. Try a smaller learning rate first, recipe.replace(lr=...), then "
    "precision='float32' if it was lower, then look at those images and at what they are trained on."
)


def _check_weights(model, when):
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainingDiverged(f"{when}, {name} is no longer finite. {_REMEDY}")


def _rates(optimizer):
    return ", ".join(f"{rate:.3g}" for rate in sorted({group["lr"] for group in optimizer.param_groups}))


def _ids(indices, names):
    ids = [str(i) if names is None else str(names[i]) for i in indices.tolist()]
    return ", ".join(ids[:10]) + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


def parameter_groups(model, recipe):
    """The model's trainable parameters as groups for an optimiser, in the order of PARAMETER_GROUPS.

    Which modules are new is the model's own word, `model.new_modules()`. A parameter is placed by what it is,
    never by its name, which changes under wrappers. The biases are all parameters of one dimension: batch
    norm's scales and shifts are among them, and `bias_decay=False` spares them from decay too. Empty groups
    are left out.

    Raises ValueError when new_modules() lists a module twice or one that isn't in the model, or leaves out a
    DRS controller or the head; when weights of either kind are missing altogether, or any group whose
    learning rate the recipe multiplies.
    """
    new = [id(module) for listed in model.new_modules() for module in listed.modules()]
    modules = {id(module): module for module in model.modules()}
    if len(set(new)) < len(new):
        twice = next(modules.get(i) for i in new if new.count(i) > 1)
        raise ValueError(f"new_modules() of {_kind(model)} lists a {_kind(twice)} twice: list it once")
    if not modules.keys() >= set(new):
        raise ValueError(f"new_modules() of {_kind(model)} lists a module that is not part of the model")
    for module in modules.values():
        always_new = isinstance(module, LearnableController) or module is getattr(model, "head", None)
        if always_new and id(module) not in new:
            raise ValueError(f"new_modules() of {_kind(model)} leaves out its {_kind(module)}, which is new")

    fresh = {id(p) for listed in model.new_modules() for p in listed.parameters()}
    groups = {name: [] for name in PARAMETER_GROUPS}
    for parameter in model.parameters():
        if parameter.requires_grad:
            age = "new" if id(parameter) in fresh else "pretrained"
            groups[f"{age} {'biases' if parameter.ndim == 1 else 'weights'}"].append(parameter)
    multipliers = dict(zip(PARAMETER_GROUPS, recipe.lr_multipliers, strict=True))
    for name, parameters in groups.items():
        if not parameters and (name.endswith("weights") or multipliers[name] != 1):
            raise ValueError(
                f"{_kind(model)} has no trainable {name}, for which the recipe has the learning rate "
                f"{recipe.lr:g} x {multipliers[name]:g}: its new_modules() is wrong, or the recipe is for "
                "another network (then set that multiplier to 1)"
            )
    return [
        dict(
            params=parameters,
            name=name,
            lr=recipe.lr * multipliers[name],
            weight_decay=recipe.weight_decay if recipe.bias_decay or name.endswith("weights") else 0.0,
        )
        for name, parameters in groups.items()
        if parameters
    ]


def _kind(module):
    return type(module).__name__


def make_optimizer(model, recipe):
    """The recipe's optimiser over `parameter_groups(model, recipe)`."""
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](groups, lr=recipe.lr)


def train_classifier(recipe, dataset, seed=0, device=None, progress=True, **options):
    """Train a classifier with DRS on image-level labels; Figure 3 (a).

    recipe: ClassifyRecipe. dataset: see drs_lib.data; its masks can't be reached from here. device: None for
    the best there is. options: further ones of `train_network`. The last epoch's weights are kept: choosing
    an epoch by its masks' score would be supervision the method claims to do without.

    Returns (model in eval mode, history); see `fit` for the history. Raises TrainingDiverged.
    """

    def build(data):
        return networks.classifier(
            recipe.backbone, data.num_classes, recipe.drs_layers, recipe.delta, weights=recipe.weights
        )

    options |= dict(seed=seed, device=device, progress=progress)
    return _train(ClassifyRecipe, recipe, dataset, build, classification_loss, **options)


def train_refinement(recipe, dataset, targets, seed=0, device=None, progress=True, **options):
    """Train the refinement network on localization maps; Figure 3 (b).

    recipe: RefineRecipe. targets: a sequence with one float array (C, H, W) in [0, 1] for each image, read
    when it is needed; of another size than the image, it is upsampled. The rest as in `train_classifier`.
    Raises ValueError for another number of targets than images, other shapes, or values outside [0, 1].
    """

    def build(data):
        return networks.refinement_network(recipe.backbone, data.num_classes, weights=recipe.weights)

    loss = functools.partial(refinement_loss, size=recipe.loss_size, label_mask=recipe.label_mask)
    options |= dict(seed=seed, device=device, progress=progress, extra=TargetMaps(targets, dataset))
    return _train(RefineRecipe, recipe, dataset, build, loss, **options)


def train_segmentation(recipe, dataset, labels, seed=0, device=None, progress=True, **options):
    """Train a DeepLab on segmentation labels; Figure 3 (c).

    recipe: SegmentRecipe. labels: a sequence with one uint8 array (H, W) for each image: 0 background, 1..C
    the classes, 255 ignored. Pseudo labels give the weakly supervised network; a caller who hands over the
    true masks gets the fully supervised one. The rest as in `train_classifier`. Raises ValueError for another
    number of labels than images, another size than the image's, or a value that is none of these.
    """

    def build(data):
        return networks.deeplab(recipe.kind, recipe.backbone, data.num_classes + 1, weights=recipe.weights)

    loss = functools.partial(segmentation_loss, size=recipe.loss_size)
    options |= dict(seed=seed, device=device, progress=progress, extra=LabelMaps(labels, dataset))
    return _train(SegmentRecipe, recipe, dataset, build, loss, **options)


def train_network(
    recipe,
    dataset,
    build,
    loss,
    *,
    labels=None,
    extra=None,
    seed=0,
    device=None,
    progress=True,
    on_epoch=None,
    checkpoint=None,
    image_cache=None,
    title="training",
):
    """Train the network that ``build(dataset)`` returns: what the three stages and pretraining share.

    loss(model, batch): a scalar, see `fit`. labels: what becomes ``batch.extra``, a sequence with one uint8
    array (H, W) for each image. on_epoch(history): called after every epoch. checkpoint: see `fit`.
    image_cache: a folder for decoded images, where the recipe keeps them in memory (``recipe.images``). The
    rest as in `train_classifier`.
    """
    dataset = without_masks(dataset)
    if labels is not None:
        extra = LabelMaps(labels, dataset)
    device = pick_device(device)
    per_epoch, steps = recipe.steps(len(dataset))
    with seeded(seed), threads(recipe.threads), tuned(device):
        model = build(dataset).to(device=device, memory_format=memory_format(device))
        optimizer = make_optimizer(model, recipe)
        factor = functools.partial(recipe.lr_factor, per_epoch=per_epoch, total=steps)
        batches, streams = make_batches(dataset, recipe, extra, seed, device, image_cache)
        history = fit(
            model,
            batches,
            loss,
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            steps=steps,
            accumulate=min(recipe.accumulate, math.ceil(len(dataset) / recipe.batch)),
            precision=recipe.precision,
            names=dataset.names,
            title=title,
            progress=progress,
            on_epoch=on_epoch,
            checkpoint=checkpoint,
            streams=streams,
            compile=recipe.compile,
        )
    return model.eval(), history


def _train(kind, recipe, dataset, build, loss, **options):
    if not isinstance(recipe, kind):
        raise TypeError(f"recipe is a {_kind(recipe)}: expected a {kind.__name__}")
    title = kind.__name__.removesuffix("Recipe").lower()
    return train_network(recipe, dataset, build, loss, title=title, **options)


def predict_segmentation(model, dataset, *, batch_size=16, output="labels", progress=False):
    """Segment every image of a data set, whole, with the logits upsampled (bilinear) to the image's size.

    Images of one size are passed through the network together. Runs where the model is; its mode is restored.

    Yields (index, result) in order; the result is a NumPy array: for output "labels" uint8 (H, W), for
    "probabilities" float32 (C + 1, H, W), the softmax. Raises ValueError for another output.
    """
    if output not in ("labels", "probabilities"):
        raise ValueError(f"output is {output!r}: expected 'labels' or 'probabilities'")
    return _predict(model, dataset, batch_size, output, progress)


def _predict(model, dataset, batch_size, output, progress):
    for indices, images, _ in _image_batches(dataset, batch_size, None, "segmenting", progress):
        logits = _resize_logits(_infer(model, images), images.shape[-2:])
        results = logits.argmax(1).to(torch.uint8) if output == "labels" else logits.softmax(1)
        yield from zip(indices, results.cpu().numpy(), strict=True)


def evaluate_segmentation(model, dataset, crf=None, jobs=None, *, batch_size=16, progress=False):
    """Mean IoU of a segmentation network against the data set's masks.

    crf: a CRFConfig to score the network's output after the dense CRF as well, on `jobs` processes. Returns
    dict(miou, iou), see drs_lib.metrics.SegmentationScore; with crf also miou_crf and iou_crf. Raises
    RuntimeError when crf is given and pydensecrf is missing.
    """
    plain = SegmentationScore(dataset.num_classes + 1)
    if crf is None:
        for i, labels in predict_segmentation(model, dataset, batch_size=batch_size, progress=progress):
            plain.update(labels, dataset.mask(i))
        return plain.compute()

    def items():
        predictions = predict_segmentation(
            model, dataset, batch_size=batch_size, output="probabilities", progress=progress
        )
        for i, probabilities in predictions:
            plain.update(probabilities.argmax(0), dataset.mask(i))
            yield probabilities, dataset[i][0].permute(1, 2, 0).numpy()

    refined = SegmentationScore(dataset.num_classes + 1)
    for i, labels in enumerate(iterate_crf(items(), crf, jobs, progress=False)):
        refined.update(labels, dataset.mask(i))
    return {**plain.compute(), **{f"{key}_crf": value for key, value in refined.compute().items()}}


def evaluate_classifier(model, dataset, *, batch_size=32, resize=None, progress=False):
    """Exact-match accuracy of a classifier: the fraction of images with every label right at a sigmoid of
    0.5.

    resize: side of the square that images are resized to; None: as they are.
    """
    logits, labels = [], []
    for _, images, batch_labels in _image_batches(dataset, batch_size, resize, "classifying", progress):
        logits.append(_infer(model, images).cpu())
        labels.append(batch_labels)
    return exact_match_accuracy(torch.cat(logits), torch.cat(labels))


def _image_batches(dataset, batch_size, resize, title, progress):
    """(indices, images (n, 3, H, W), labels (n, C)): neighbours of one size, `batch_size` at most."""
    pending = []
    for i in tqdm(range(len(dataset)), desc=title, unit="image", disable=not progress, dynamic_ncols=True):
        image, labels = dataset[i]
        image = resize_square(image, resize)
        if pending and (len(pending) == batch_size or pending[0][1].shape != image.shape):
            yield _stack(pending)
            pending = []
        pending.append((i, image, labels))
    if pending:
        yield _stack(pending)


def _stack(items):
    indices, images, labels = zip(*items, strict=True)
    return indices, torch.stack(images), torch.stack(labels)


def _infer(model, images):
    device = next(model.parameters()).device
    with evaluating(model):
        images = normalize(images.to(device)).contiguous(memory_format=memory_format(device))
        return require_finite(model(images).float())
