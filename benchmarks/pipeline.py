"""Images per second of the pipeline's stages at VOC's sizes: by this library, and by a plain path.

    python benchmarks/pipeline.py                                  # the best device there is
    python benchmarks/pipeline.py --stages classify maps --steps 5 --json stages.json

The plain path is how such code is usually written, and how the authors released theirs: float32, images read
and augmented one by one in processes, DRS as a composition of library calls, the loss fetched after every
iteration, maps image by image and scale by scale with an array kept for each image, labels made from those in
one process. The library's path is a run under the paper's budget, with the same batches, in float32 too
unless --precision says otherwise. On a processor its images come out of memory as they would on a GPU.

Both run in one process on the same files, which the benchmark makes: JPEGs of 500 x 375 pixels, masks and
saliency maps. Weights are random. Trainings (classify, refine, largefov, largefov_resnet, aspp) are timed
over --steps batches after --warmup others, the plain path first; the other stages over all images after a
first pass over some.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from drs_lib import kernels, networks
from drs_lib.archives import write_labels, write_targets
from drs_lib.batches import Batch
from drs_lib.data import VOC2012, VOC_CLASSES, Critters, normalize, save_indexed_png, without_masks
from drs_lib.data.transforms import training_transform
from drs_lib.files import write_text
from drs_lib.labels import pseudo_labels
from drs_lib.losses import classification_loss, refinement_loss, segmentation_loss
from drs_lib.maps import iterate_maps
from drs_lib.metrics import mean_iou
from drs_lib.recipes import get_budget
from drs_lib.runtime import pick_device
from drs_lib.train import evaluate_segmentation, train_classifier, train_refinement, train_segmentation

HEIGHT, WIDTH, MAP = 375, 500, 320
SEGMENTS = ("largefov", "largefov_resnet", "aspp")
TRAININGS = ("classify", "refine", *SEGMENTS)
STAGES = (*TRAININGS, "maps", "labels", "evaluate")


def make_voc(root, images):
    """A tree in VOC's layout with `images` JPEGs of VOC's usual size, drawn by Critters."""
    source = Critters("train", size=WIDTH + 4, length=images)  # sizes are multiples of 8
    voc = root / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClassAug", "saliency_map", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    for i, name in enumerate(source.names):
        # With noise, because a drawing is decoded faster than a photograph.
        noise = np.random.default_rng(i).integers(-12, 13, (HEIGHT, WIDTH, 3))
        pixels = (
            (source[i][0][:, :HEIGHT, :WIDTH].permute(1, 2, 0).numpy() + noise).clip(0, 255).astype(np.uint8)
        )
        Image.fromarray(pixels).save(voc / "JPEGImages" / f"{name}.jpg", quality=92)
        Image.fromarray(source.saliency(i)[:HEIGHT, :WIDTH]).save(voc / "saliency_map" / f"{name}.png")
        save_indexed_png(voc / "SegmentationClassAug" / f"{name}.png", source.mask(i)[:HEIGHT, :WIDTH])
    (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(source.names) + "\n")
    (voc / "classes.txt").write_text("\n".join(VOC_CLASSES) + "\n")
    return VOC2012(voc, "train")


class Run:
    """What all measurements share."""

    def __init__(self, options, folder):
        self.device, self.steps, self.warmup = pick_device(options.device), options.steps, options.warmup
        self.folder, self.workers = folder, options.workers
        gpu = self.device.type == "cuda"
        self.budget = get_budget("paper", "voc").for_all(
            weights=None, precision=options.precision, workers=options.workers, images="memory",
        )  # fmt: skip
        self.data = make_voc(folder, options.images or (256 if gpu else 10))
        self.weak = without_masks(self.data)

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def recipe(self, stage):
        recipe = self.budget.segment(stage) if stage in SEGMENTS else getattr(self.budget, stage)
        # Batches only, all of one kind: at a rate at which random weights don't diverge.
        return recipe.replace(
            epochs=None, iterations=self.warmup + self.steps, accumulate=1, schedule="constant", lr=1e-9
        )

    def targets(self, stage):
        if stage == "refine":
            return Targets(self.data)
        return None if stage == "classify" else [self.data.mask(i) for i in range(len(self.data))]

    def network(self, stage):
        recipe, classes = self.recipe(stage), self.data.num_classes
        torch.manual_seed(0)
        if stage == "classify":
            return networks.classifier(recipe.backbone, classes)
        if stage == "refine":
            return networks.refinement_network(recipe.backbone, classes)
        return networks.deeplab(recipe.kind, recipe.backbone, classes + 1)


class Targets:
    """A map of the image's own classes, blurred masks, as the target stage stores them."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def stack(self, i):
        mask = torch.from_numpy(self.data.mask(i))
        classes = self.data[i][1].nonzero().flatten().tolist() or [0]
        maps = torch.stack([(mask == c + 1).float() for c in classes])
        return classes, (F.avg_pool2d(maps, 31, 1, 15) * 255).byte().numpy()

    def __getitem__(self, i):
        classes, stack = self.stack(i)
        maps = np.zeros((self.data.num_classes, *stack.shape[1:]), np.float32)
        maps[classes] = stack * np.float32(1 / 255)
        return maps


def train_ours(run, stage):
    train = {"classify": train_classifier, "refine": train_refinement}.get(stage, train_segmentation)
    targets = () if stage == "classify" else (run.targets(stage),)
    times = {}

    def clock(title, step, *rest):
        if step in (run.warmup, run.warmup + run.steps):
            times[step] = run.now()

    recipe = run.recipe(stage)
    train(recipe, run.weak, *targets, device=run.device, progress=clock)
    return recipe.batch * run.steps, times[run.warmup + run.steps] - times[run.warmup]


class PlainSamples(Dataset):
    def __init__(self, data, transform, targets):
        self.data, self.transform, self.targets = data, transform, targets

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        image, labels = self.data[i]
        if self.targets is None:
            return i, self.transform(image)[0], labels, torch.zeros(())
        image, target = self.transform(image, torch.from_numpy(self.targets[i]))
        return i, image, labels, target


def train_plain(run, stage):
    recipe = run.recipe(stage)
    model = run.network(stage).to(run.device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    sgd = partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4)
    optimizer = (torch.optim.Adam if stage == "refine" else sgd)(trained, lr=recipe.lr)
    loss = {"classify": classification_loss, "refine": refinement_loss}.get(stage, segmentation_loss)
    transform = training_transform(
        crop=recipe.crop, resize=recipe.resize, scale=recipe.scale, flip=recipe.flip, jitter=recipe.jitter
    )
    loader = DataLoader(
        PlainSamples(run.weak, transform, run.targets(stage)), recipe.batch, shuffle=True, drop_last=True,
        num_workers=run.workers, persistent_workers=run.workers > 0, pin_memory=run.device.type == "cuda",
    )  # fmt: skip
    batches = (batch for _ in cycle([0]) for batch in loader)
    with kernels.disabled():
        for step, parts in enumerate(islice(batches, run.warmup + run.steps)):
            if step == run.warmup:
                start = run.now()
            batch = Batch(*(part.to(run.device) for part in parts))
            optimizer.zero_grad()
            value = loss(model, batch._replace(images=normalize(batch.images)))
            value.backward()
            optimizer.step()
            value.item()
    return recipe.batch * run.steps, run.now() - start


def timed(run, work, images):
    """Seconds that `work(indices)` takes for all images, after a first pass over some."""
    work(range(min(images, 2)))
    start = run.now()
    work(range(images))
    return images, run.now() - start


def present_maps(run, model, indices):
    budget, recipe = run.budget, run.budget.classify
    return iterate_maps(
        model, run.weak, scales=budget.scales, resize=budget.resize, indices=indices,
        workers=run.workers, precision=recipe.precision, present_only=True,
    )  # fmt: skip


def maps_ours(run):
    def work(indices):
        write_targets(run.folder / "maps.zip", present_maps(run, model, indices), run.weak.names)

    model = run.network("classify").to(run.device, memory_format=torch.channels_last)
    return timed(run, work, len(run.data))


def labels_ours(run):
    def work(indices):
        write_labels(run.folder / "labels.zip", present_maps(run, model, indices), run.weak)

    model = run.network("classify").to(run.device, memory_format=torch.channels_last)
    return timed(run, work, len(run.data))


@torch.no_grad()
def plain_maps(run, model, indices):
    """An array of all classes' maps for each image, in whole 255ths."""
    for i in indices:
        image, labels = run.weak[i]
        image = F.interpolate(image[None].float(), (MAP, MAP), mode="bilinear")
        best = None
        for side in run.budget.scales:
            scaled = F.interpolate(image, (side, side), mode="bilinear").byte()
            maps = model.class_maps(normalize(scaled.to(run.device)))
            maps = F.interpolate(maps, (MAP, MAP), mode="bilinear", align_corners=True).relu()
            maps = maps / (maps.amax((2, 3), keepdim=True) + 1e-5)
            maps = maps * labels.to(run.device)[:, None, None]
            best = maps if best is None else torch.maximum(best, maps)
        np.save(run.folder / f"{i}.npy", (best[0] * 255).byte().cpu().numpy())


def plain_labels(run, indices):
    for i in indices:
        saliency = run.weak.saliency(i)
        maps = torch.from_numpy(np.load(run.folder / f"{i}.npy"))[None].float() / 255
        maps = F.interpolate(maps, saliency.shape, mode="bilinear", align_corners=True)
        labels = pseudo_labels(maps.clamp(0, 1), saliency[None])[0].numpy()
        save_indexed_png(run.folder / f"{i}.png", labels)


def maps_plain(run, then=lambda run, indices: None):
    model = run.network("classify").to(run.device).eval()

    def work(indices):
        plain_maps(run, model, indices)
        then(run, indices)

    with kernels.disabled():
        return timed(run, work, len(run.data))


def evaluate_ours(run):
    model = run.network("largefov").to(run.device, memory_format=torch.channels_last).eval()
    return timed(run, lambda indices: evaluate_segmentation(model, Part(run.data, indices)), len(run.data))


class Part:
    """The first images of a data set."""

    def __init__(self, data, indices):
        self.data, self.length, self.num_classes, self.mask = data, len(indices), data.num_classes, data.mask

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.data[i]


@torch.no_grad()
def evaluate_plain(run):
    model = run.network("largefov").to(run.device).eval()
    count = run.data.num_classes + 1

    def work(indices):
        confusion = np.zeros((count, count), np.int64)
        for i in indices:
            logits = model(normalize(run.data[i][0][None].to(run.device)))
            logits = F.interpolate(logits, (HEIGHT, WIDTH), mode="bilinear")
            found, mask = logits.argmax(1)[0].cpu().numpy(), run.data.mask(i)
            known = mask < count
            pairs = count * mask[known].astype(np.int64) + found[known]
            confusion += np.bincount(pairs, minlength=count * count).reshape(count, count)
        return mean_iou(confusion)

    return timed(run, work, len(run.data))


WAYS = {
    **{s: {"plain": partial(train_plain, stage=s), "ours": partial(train_ours, stage=s)} for s in TRAININGS},
    "maps": {"plain": maps_plain, "ours": maps_ours},
    "labels": {"plain": partial(maps_plain, then=plain_labels), "ours": labels_ours},
    "evaluate": {"plain": evaluate_plain, "ours": evaluate_ours},
}


def measure(run, stages):
    """Yields a row for each stage and path."""
    for stage in stages:
        plain = None
        for path, way in WAYS[stage].items():
            images, seconds = way(run)
            rate = images / seconds
            plain = rate if path == "plain" else plain
            yield {
                "stage": stage,
                "path": path,
                "images": images,
                "seconds": round(seconds, 4),
                "images_per_second": round(rate, 3),
                "speedup": None if plain is None else round(rate / plain, 3),
            }
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE")
    parser.add_argument("--images", type=int, help="default: 256 on a GPU, else 10")
    parser.add_argument("--steps", type=int, default=2, help="batches that are timed; 50 or more for a GPU")
    parser.add_argument("--warmup", type=int, default=1, help="batches before; 20 or more for a GPU")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="reading processes")
    precisions = dict(choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--precision", **precisions, help="of the library's path; default: float32")
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, row by row")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, Path(folder))
        gpu = run.device.type == "cuda"
        name = torch.cuda.get_device_name(run.device) if gpu else platform.processor() or platform.machine()
        report = {
            "device": name, "torch": torch.__version__, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "workers": options.workers, "steps": options.steps,
            "precision": run.budget.classify.precision, "rows": [],
        }  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in report.items() if key != "rows"))
        print(f"{'stage':18s}{'path':8s}{'images/s':>10s}{'speed-up':>10s}")
        for row in measure(run, options.stages):
            report["rows"].append(row)
            speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}"
            print(
                f"{row['stage']:18s}{row['path']:8s}{row['images_per_second']:10.2f}{speedup:>10s}",
                flush=True,
            )
            if options.json:
                write_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
