"""What a notebook needs around the library: the run at hand, batches of its images, the price of a training
that no table needs, and a loss curve that grows.

    pipeline = open_course(DATA, BUDGET, VOC_ROOT)   one sentence says what it runs on
    model = pipeline.classifier(Configuration())     from the store, or trained under a live loss curve

The arguments of `open_course` are what a notebook's first cell, tagged ``parameters``, sets.
"""

import math
import time

import numpy as np
import torch
from IPython import get_ipython
from IPython.display import HTML, display
from torch import nn

from drs_course.stages import Pipeline
from drs_course.store import RunStore, course_store
from drs_lib.data import resize_square

__all__ = ["LiveLoss", "image_batch", "may_train", "open_course", "receptive_fields"]


def open_course(data="critters", budget=None, voc_root=None, seed=0, store=None, device=None):
    """The `Pipeline` of a notebook, whose trainings show a bar and a live loss curve; prints what it runs on.

    Args:
        data: "critters" or "voc".
        budget: "ci", "laptop" or "paper"; None: see `drs_course.stages.get_budget`.
        voc_root: the folder VOC 2012 is in.
        seed: of the trainings.
        store: the run store; None: $DRS_STORE, else ``runs`` in the course's folder, so that notebooks and
            ``make course`` share their trainings.
        device: see `drs_lib.runtime.pick_device`.

    Raises ValueError and FileNotFoundError as `Pipeline` does; for VOC that is not there the message names
    the command that downloads it.
    """
    pipeline = Pipeline(
        data,
        budget,
        seed=seed,
        voc_root=voc_root,
        store=RunStore(store or course_store()),
        device=device,
        progress=LiveLoss(),
    )
    train, val = len(pipeline.data.train), len(pipeline.data.val)
    print(
        f"{pipeline.data.name}: {train} training and {val} validation images; "
        f"budget {pipeline.budget.name!r}, seed {seed}."
    )
    return pipeline


def image_batch(dataset, indices, side=None):
    """Images of a data set as one batch, uint8 (N, 3, H, W).

    side: of the square that they are resized to, as a budget's ``resize`` has it; images of different sizes
    need one. None: they stay as they are.
    """
    return torch.stack([resize_square(dataset[i][0], side) for i in indices])


def may_train(pipeline, recipe, trainings=1, anyway=False):
    """Whether a notebook trains something that no table needs.

    At the budgets "ci" and "laptop" it does: that is a matter of seconds, or of a minute or two. At the
    others ``anyway`` decides, and what is trained or left out is printed, with its number of steps.

    Args:
        pipeline: the `Pipeline`.
        recipe: of the trainings, on the pipeline's training images.
        trainings: how many there are.
        anyway: a notebook's switch TRAIN_MORE.
    """
    if pipeline.budget.name in ("ci", "laptop"):
        return True
    steps, images = recipe.steps(len(pipeline.data.train))[1], recipe.batch * recipe.accumulate
    cost = f"{trainings} x {steps:,} steps of {recipe.backbone}, {images} images each"
    print(f"Training {cost}." if anyway else f"Left out: {cost}. TRAIN_MORE = True, above, trains it.")
    return anyway


def receptive_fields(network):
    """Side, in pixels, of the square of the image that one position of each layer's output depends on.

    Counts convolutions and poolings of a mini or vgg16 network: the maximum and the average inside a DRS
    module see the whole map, but only to decide how much to suppress. Raises ValueError for a network whose
    layers are not a chain (a ResNet).
    """
    fields, field, jump = [], 1, 1
    for layer in network.layers:
        if not isinstance(layer, nn.Sequential):
            raise ValueError(f"receptive_fields takes mini and vgg16 networks; found {type(layer).__name__}")
        for module in layer:
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
                shape = (module.kernel_size, module.stride, module.dilation)
                kernel, stride, dilation = (v if isinstance(v, int) else v[0] for v in shape)
                field += (kernel - 1) * dilation * jump
                jump *= stride
        fields.append(field)
    return fields


class LiveLoss:
    """Shows a training in a notebook: how far it is, and its loss so far; gone when the training is over.

    To be passed as ``progress`` to a `Pipeline` or to one of the functions of `drs_lib.train`. Drawn at most
    every ``interval`` seconds, so that it costs a training next to nothing. A training that goes on where it
    was interrupted has a display of its own, and the time that is left comes from the steps since then.
    """

    def __init__(self, interval=1.0):
        self.interval = interval
        self._handle = self._place = None

    def __call__(self, title, step, steps, epoch, loss):
        now = time.monotonic()
        # Nobody says that a training was interrupted: the next one is in another cell, or at another step.
        if self._handle is None or (_cell(), step - 1) != self._place:
            self._handle = _display_handle()
            self._first, self._began, self._drawn, self._losses = step, now, now, {}
        self._place = _cell(), step
        if not math.isnan(loss):  # a GPU's, before the first was fetched
            self._losses[step] = loss
        done = step - self._first
        if step == steps:
            which = f"{steps} steps" if self._first == 1 else f"the last {done + 1} of {steps} steps"
            self._handle.update(HTML(f"{title}: {which} in {now - self._began:.0f} s"))
            self._handle = None
        elif now - self._drawn >= self.interval and done and self._losses:
            self._drawn = now
            left = (now - self._began) / done * (steps - step)
            self._handle.update(
                HTML(
                    f"{title}: epoch {epoch}, loss {next(reversed(self._losses.values())):.3f}, "
                    f"about {left:.0f} s left<br>"
                    f'<progress value="{step}" max="{steps}" style="width: 30em"></progress><br>'
                    + _curve(self._losses, steps)
                )
            )


def _display_handle():
    return _Silent() if _cell() is None else display(HTML(""), display_id=True)


def _cell():
    """The number of the running cell; None outside of a notebook."""
    shell = get_ipython()
    return None if shell is None else shell.execution_count


class _Silent:
    """In place of a display where there is no notebook."""

    def update(self, content):
        pass


def _curve(losses, steps, width=420, height=110):
    """The losses {step: loss} as an SVG line; every value is the mean of its neighbourhood."""
    smooth = smoothed(list(losses.values()))
    low, high = min(smooth), max(smooth)
    x = np.array(list(losses)) / steps * width
    y = height - (smooth - low) / max(high - low, 1e-12) * (height - 10) - 5
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="loss, now {smooth[-1]:.3f}">'
        f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="1.5"/></svg>'
    )


def smoothed(losses, window=9):
    """The running mean over the last ``window`` values, float (len(losses),)."""
    losses = np.asarray(losses, float)
    sums = np.concatenate([[0.0], losses.cumsum()])
    ends = np.arange(1, len(losses) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)
