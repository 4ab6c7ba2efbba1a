"""Training and scoring the three networks of Figure 3: one loop, three losses (`drs_lib.losses`).

    recipe + images and labels                    -> train_classifier    -> classifier with DRS
    recipe + images and localization maps         -> train_refinement    -> refinement network
    recipe + images and (pseudo) segment labels   -> train_segmentation  -> DeepLab

Each is a function of its arguments and the seed alone: on a CPU the same call gives the same weights, bit for
bit, on the same machine with the same number of threads, whatever was drawn before it and however many
processes read the images. A GPU repeats itself as far as its kernels do, see
`torch.use_deterministic_algorithms`. The data set's pixel masks are out of reach for all three
(`drs_lib.data.without_masks`).
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch
from tqdm.auto import tqdm

from drs_lib import networks, runtime
from drs_lib.batches import Batch, LabelMaps, TargetMaps, make_batches
from drs_lib.crf import iterate_crf
from drs_lib.data import normalize, resize_square, without_masks
from drs_lib.data.voc import first_few
from drs_lib.losses import classification_loss, refinement_loss, resize_logits, segmentation_loss
from drs_lib.metrics import SegmentationScore, exact_match_accuracy, known_labels
from drs_lib.recipes import PARAMETER_GROUPS, ClassifyRecipe, RefineRecipe, SegmentRecipe

# Iterations after which a GPU is asked for the losses; asking after each would make it wait every time.
LOSSES_FETCHED_EVERY = 20


class TrainingDiverged(RuntimeError):
    """The loss or the weights are no longer finite; nothing of the training is returned."""


class OutOfMemory(RuntimeError):
    """A batch does not fit into the device's memory; the message says what does."""


def fit(model, batches, loss, optimizer, scheduler, *, on_epoch=None, checkpoint=None, streams=(), **options):
    """Train `model` in place; the loop of all three stages.

    Args:
        batches: an iterable of `Batch` with uint8 images; one pass over it is an epoch.
        loss: ``loss(model, batch)``, a scalar.
        scheduler: stepped after each iteration.
        on_epoch: ``on_epoch(history)``, called after every epoch; random numbers that it draws don't change
            the training.
        checkpoint: an object whose ``save(progress, streams, **parts)`` is called after every epoch but the
            last, and ``restore(streams, **parts)`` before the first: it brings the parts (model, optimizer,
            scheduler) and streams back and returns the progress, a dict; or None, to begin anew.
        streams: the generators from which `batches` draws.
        options: the fields of `Training` from ``steps`` on.

    Returns:
        The history, a list of dict(epoch, loss, lr, seconds) in which `loss` is the epoch's mean and `lr` the
        first parameter group's rate at its end.

    Raises:
        TrainingDiverged: the loss or a weight stops being finite.
        OutOfMemory: the device can't hold a batch.
    """
    run = Training(model, loss, optimizer, scheduler, **options)
    kept = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    found = None if checkpoint is None else checkpoint.restore(streams, **kept)
    if found is not None:
        run.history, run.step, run.seen = found["history"], found["step"], found["seen"]
    shown = dict(total=run.steps, disable=run.progress is not True, dynamic_ncols=True)
    with tqdm(desc=run.title, unit="step", initial=run.step, **shown) as run.bar:
        while run.step < run.steps:
            run.epoch(batches)
            if run.step == run.steps:
                _check_weights(model, f"{run.title}: after the last iteration, {run.steps}")
            elif checkpoint is not None:
                checkpoint.save(dict(history=run.history, step=run.step, seen=run.seen), streams, **kept)
            if on_epoch is not None:
                with runtime.preserved_rng():
                    on_epoch(run.history)
    return run.history


@dataclass
class Training:
    """The state of a training; `epoch` makes one more pass over the batches."""

    model: torch.nn.Module
    loss: Callable
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: int  # iterations of the optimiser
    accumulate: int = 1  # batches per iteration
    precision: str = "float32"
    names: Sequence | None = None  # the images' ids, for messages
    title: str = "training"
    # True for a bar, False for none, or a function (title, step, steps, epoch, loss) that is called after
    # every iteration and must not draw random numbers. On a GPU the loss is the last that was fetched, NaN
    # before the first.
    progress: bool | Callable = True

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        self.history, self.step, self.seen = [], 0, 0
        self.model.train()
        self.optimizer.zero_grad()

    def epoch(self, batches):
        start, seen, losses = time.perf_counter(), self.seen, _Losses(self)
        rate = self.optimizer.param_groups[0]["lr"]
        for batch in batches:
            self.seen += 1
            indices, batch = batch.indices, self.on_device(batch)
            losses.add(self.gradients(batch), indices, batch.labels)
            if self.seen % self.accumulate:
                continue
            rate = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.step += 1
            self.report(losses)
            if self.step == self.steps:
                break
        if self.seen == seen:
            raise ValueError(f"{self.title}: no batch came out of the data; is the data set empty?")
        losses.fetch()
        mean, seconds = float(np.mean(losses.known)), time.perf_counter() - start
        self.history.append(dict(epoch=losses.epoch, loss=mean, lr=rate, seconds=seconds))

    def on_device(self, batch):
        batch = Batch(*(None if part is None else runtime.move(part, self.device) for part in batch))
        images = normalize(batch.images).contiguous(memory_format=runtime.memory_format(self.device))
        return batch._replace(images=images)

    def gradients(self, batch):
        """Adds the batch's gradients to the parameters' and returns its loss."""
        try:
            with runtime.autocast(self.device, self.precision):
                loss = self.loss(self.model, batch)
            (loss / self.accumulate).backward()
        except torch.OutOfMemoryError as error:
            count, _, height, width = batch.images.shape
            raise OutOfMemory(
                f"{self.title}: a batch of {count} images of {height}x{width} does not fit into the memory "
                f"of {self.device}. recipe.replace(batch=..., accumulate=...) with half the batch and twice "
                "the accumulate takes the same steps; precision='bfloat16' takes about half the memory, and "
                "whatever else uses the device takes its share."
            ) from error
        return loss.detach()

    def report(self, losses):
        loss = losses.known[-1] if losses.known else math.nan
        if callable(self.progress):
            self.progress(self.title, self.step, self.steps, losses.epoch, loss)
        self.bar.update()
        known = {} if math.isnan(loss) else {"loss": f"{loss:.4f}"}
        self.bar.set_postfix(epoch=losses.epoch, **known, refresh=False)


class _Losses:
    """The losses of an epoch of a `Training`; `known` are those that were fetched so far."""

    def __init__(self, run):
        self.run, self.epoch, self.known, self.waiting = run, len(run.history) + 1, [], []
        self.every = 1 if run.device.type == "cpu" else LOSSES_FETCHED_EVERY

    def add(self, loss, indices, labels):
        rates = sorted({group["lr"] for group in self.run.optimizer.param_groups})
        when = f"in epoch {self.epoch}, iteration {self.run.step + 1} of {self.run.steps}"
        when += f", at learning rate {', '.join(f'{rate:.3g}' for rate in rates)}"
        self.waiting.append((loss, when, indices, labels))
        if len(self.waiting) == self.every:
            self.fetch()

    def fetch(self):
        """Raises TrainingDiverged at the first that is not finite, ValueError if its labels are unknown."""
        values = torch.stack([loss for loss, *_ in self.waiting]).tolist() if self.waiting else []
        for value, (_, when, indices, labels) in zip(values, self.waiting, strict=True):
            if not math.isfinite(value):
                known_labels(labels)
                ids = [str(i if self.run.names is None else self.run.names[i]) for i in indices.tolist()]
                images = first_few(ids, 10)
                raise TrainingDiverged(
                    f"{self.run.title}: the loss is {value} {when}, on the images {images}. {_REMEDY}"
                )
        self.known += values
        self.waiting = []


_REMEDY = (
    "Nothing of this training is kept. Try a smaller learning rate first, recipe.replace(lr=...), then "
    "precision='float32' if it was lower, then look at those images and at what they are trained on."
)


def _check_weights(model, when):
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TrainingDiverged(f"{when}, {name} is no longer finite. {_REMEDY}")


def parameter_groups(model, recipe):
    """The model's trainable parameters as groups for an optimiser, in the order of PARAMETER_GROUPS.

    New are those of `model.new_modules()`; names would change under wrappers. Biases are all parameters of
    one dimension: batch norm's scales and shifts are among them, and `bias_decay=False` spares them from
    decay too. Empty groups are left out.

    Raises:
        ValueError: weights of either kind are missing altogether, or a group whose learning rate the recipe
            multiplies.
    """
    fresh = {id(p) for listed in model.new_modules() for p in listed.parameters()}
    members, groups = {name: [] for name in PARAMETER_GROUPS}, []
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        age = "new" if id(parameter) in fresh else "pretrained"
        members[f"{age} {'biases' if parameter.ndim == 1 else 'weights'}"].append(parameter)
    for (name, parameters), multiplier in zip(members.items(), recipe.lr_multipliers, strict=True):
        weights = name.endswith("weights")
        if parameters:
            decay = recipe.weight_decay if recipe.bias_decay or weights else 0.0
            groups.append(dict(params=parameters, name=name, lr=recipe.lr * multiplier, weight_decay=decay))
        elif weights or multiplier != 1:
            raise ValueError(
                f"{type(model).__name__} has no trainable {name}, for which the recipe has the learning rate "
                f"{recipe.lr:g} x {multiplier:g}: the recipe is for another network; set that multiplier to 1"
            )
    return groups


def make_optimizer(model, recipe):
    """The recipe's optimiser over `parameter_groups(model, recipe)`."""
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
    return torch.optim.Adam(groups, lr=recipe.lr)


def train_classifier(recipe, dataset, seed=0, **options):
    """Train a classifier with DRS on image-level labels; Figure 3 (a).

    Args:
        recipe: ClassifyRecipe.
        dataset: see `drs_lib.data`; its masks can't be reached from here.
        options: device, progress and more, see `train_network`.

    Returns:
        (model in eval mode, history), see `fit` for the history. The last epoch's weights are kept: choosing
        an epoch by its masks' score would be supervision the method claims to do without.
    """

    def build(data):
        return networks.classifier(
            recipe.backbone, data.num_classes, recipe.drs_layers, recipe.delta, weights=recipe.weights
        )

    return _train(ClassifyRecipe, recipe, dataset, build, classification_loss, seed=seed, **options)


def train_refinement(recipe, dataset, targets, seed=0, **options):
    """Train the refinement network on localization maps; Figure 3 (b).

    recipe: RefineRecipe. targets: a sequence with one float array (C, H, W) in [0, 1] for each image, read
    when it is needed; of another size than the image, it is upsampled. The rest as in `train_classifier`.
    """

    def build(data):
        return networks.refinement_network(recipe.backbone, data.num_classes, weights=recipe.weights)

    def loss(model, batch):
        return refinement_loss(model, batch, recipe.loss_size, recipe.label_mask)

    options |= dict(seed=seed, extra=TargetMaps(targets, dataset))
    return _train(RefineRecipe, recipe, dataset, build, loss, **options)


def train_segmentation(recipe, dataset, labels, seed=0, **options):
    """Train a DeepLab on segmentation labels; Figure 3 (c).

    recipe: SegmentRecipe. labels: a sequence with one uint8 array (H, W) for each image: 0 background, 1..C
    the classes, 255 ignored. Pseudo labels give the weakly supervised network; a caller who hands over the
    true masks gets the fully supervised one. The rest as in `train_classifier`.
    """

    def build(data):
        return networks.deeplab(recipe.kind, recipe.backbone, data.num_classes + 1, weights=recipe.weights)

    def loss(model, batch):
        return segmentation_loss(model, batch, recipe.loss_size)

    options |= dict(seed=seed, extra=LabelMaps(labels, dataset))
    return _train(SegmentRecipe, recipe, dataset, build, loss, **options)


def _train(kind, recipe, dataset, build, loss, **options):
    if not isinstance(recipe, kind):
        raise TypeError(f"recipe is a {type(recipe).__name__}: expected a {kind.__name__}")
    title = kind.__name__.removesuffix("Recipe").lower()
    return train_network(recipe, dataset, build, loss, title=title, **options)


def train_network(recipe, dataset, build, loss, *, extra=None, seed=0, device=None, **options):
    """Train the network that ``build(dataset)`` returns: what the three stages and pretraining share.

    Args:
        loss: ``loss(model, batch)``, a scalar.
        extra: what becomes ``batch.extra``: `TargetMaps` or `LabelMaps` of `drs_lib.batches`, or None.
        device: None for the best there is.
        options: title, progress, on_epoch and checkpoint, see `fit` and `Training`.
    """
    dataset = without_masks(dataset)
    device = runtime.pick_device(device)
    per_epoch, steps = recipe.steps(len(dataset))
    with runtime.seeded(seed), runtime.threads(recipe.threads), runtime.tuned(device):
        model = build(dataset).to(device=device, memory_format=runtime.memory_format(device))
        optimizer = make_optimizer(model, recipe)
        factor = functools.partial(recipe.lr_factor, per_epoch=per_epoch, total=steps)
        batches, streams = make_batches(dataset, recipe, extra, seed, device)
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
            streams=streams,
            **options,
        )
    return model.eval(), history


def predict_segmentation(model, dataset, *, batch_size=16, output="labels"):
    """Segment every image of a data set, whole, with the logits upsampled (bilinear) to the image's size.

    Images of one size are passed through the network together. Runs where the model is; its mode is restored.

    Yields:
        (index, result) in order, a NumPy array: for output "labels" uint8 (H, W), for "probabilities" float32
        (C + 1, H, W), the softmax.
    """
    if output not in ("labels", "probabilities"):
        raise ValueError(f"output is {output!r}: expected 'labels' or 'probabilities'")

    def results(images):
        logits = resize_logits(_infer(model, images), images.shape[-2:])
        found = logits.argmax(1).to(torch.uint8) if output == "labels" else logits.softmax(1)
        return found.cpu().numpy()

    batches = _image_batches(dataset, batch_size)
    return (one for indices, images, _ in batches for one in zip(indices, results(images), strict=True))


def evaluate_segmentation(model, dataset, crf=None, jobs=None):
    """dict(miou, iou) of a segmentation network against the data set's masks, as fractions.

    miou is the mean, iou has one value per label, see `drs_lib.metrics.SegmentationScore.compute`. crf: a
    CRFConfig, to score the output after the dense CRF as well, on `jobs` processes; the dict then has also
    miou_crf and iou_crf. Raises RuntimeError when crf is given and pydensecrf is missing.
    """
    plain, refined = (SegmentationScore(dataset.num_classes + 1) for _ in range(2))
    if crf is None:
        for i, labels in predict_segmentation(model, dataset):
            plain.update(labels, dataset.mask(i))
        return plain.compute()

    def items():
        for i, probabilities in predict_segmentation(model, dataset, output="probabilities"):
            plain.update(probabilities.argmax(0), dataset.mask(i))
            yield probabilities, dataset[i][0].permute(1, 2, 0).numpy()

    for i, labels in enumerate(iterate_crf(items(), crf, jobs)):
        refined.update(labels, dataset.mask(i))
    return {**plain.compute(), **{f"{key}_crf": value for key, value in refined.compute().items()}}


def evaluate_classifier(model, dataset, *, resize=None):
    """The fraction of images with every label right at a sigmoid of 0.5.

    resize: side of the square that images are resized to; None: as they are.
    """
    logits, labels = [], []
    for _, images, batch_labels in _image_batches(dataset, 32, resize):
        logits.append(_infer(model, images).cpu())
        labels.append(batch_labels)
    return exact_match_accuracy(torch.cat(logits), torch.cat(labels))


def _image_batches(dataset, batch_size, resize=None):
    """(indices, images (n, 3, H, W), labels (n, C)): neighbours of one size, `batch_size` at most."""

    def items():
        for i in range(len(dataset)):
            image, labels = dataset[i]
            yield i, resize_square(image, resize), labels

    for _, of_one_size in groupby(items(), key=lambda item: item[1].shape):
        while batch := list(islice(of_one_size, batch_size)):
            indices, images, labels = zip(*batch, strict=True)
            yield indices, torch.stack(images), torch.stack(labels)


def _infer(model, images):
    device = next(model.parameters()).device
    with runtime.evaluating(model):
        images = normalize(images.to(device)).contiguous(memory_format=runtime.memory_format(device))
        return runtime.require_finite(model(images).float())
