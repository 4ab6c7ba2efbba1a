"""Images per second of localization maps: image by image, batched, and the network alone for comparison.

    python benchmarks/maps.py
    python benchmarks/maps.py --cases vgg16-3-scales --images 4 --device cuda

Weights and images are random: they change no time. Every round measures all ways in turn, and the figures are
medians over the rounds; ratios compare ways within the same run.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from drs_lib.data import normalize
from drs_lib.files import write_text
from drs_lib.maps import RELEASE_SCALES, iterate_maps, localization_maps
from drs_lib.networks import classifier
from drs_lib.runtime import memory_format

# backbone, classes, image size, scales, batch, images
CASES = {
    "mini": ("mini", 6, (128, 128), None, 32, 192),
    "mini-3-scales": ("mini", 6, (128, 128), (96, 128, 160), 32, 96),
    "vgg16": ("vgg16", 20, (320, 320), None, 2, 4),
    "vgg16-3-scales": ("vgg16", 20, (320, 320), RELEASE_SCALES, 2, 2),
}


class Pictures:
    """Random images in memory, one or two classes each."""

    def __init__(self, n, classes, size):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=generator)
        self.labels = torch.zeros(n, classes)
        self.labels.scatter_(1, torch.randint(0, classes, (n, 2), generator=generator), 1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def one_by_one(model, pictures, scales, batch, device):
    for image, labels in pictures:
        localization_maps(model, normalize(image)[None].to(device), labels[None], scales).cpu()


def batched(model, pictures, scales, batch, device):
    for _ in iterate_maps(model, pictures, batch_size=batch, scales=scales):
        pass


@torch.no_grad()
def network_alone(model, pictures, scales, batch, device):
    """The forward passes only, on images that are already normalised, resized and on the device."""
    sides = [(side, side) for side in scales] if scales else [pictures.images.shape[-2:]]
    inputs = [torch.zeros(batch, 3, *side, device=device) for side in sides]
    inputs = [x.contiguous(memory_format=memory_format(device)) for x in inputs]
    model.eval()
    for start in range(0, len(pictures), batch):
        for x in inputs:
            out = model.class_maps(x[: len(pictures) - start])
    out.sum().item()  # waits for a GPU


WAYS = {"image by image": one_by_one, "batched": batched, "network alone": network_alone}


def measure(case, images, rounds, device):
    backbone, classes, size, scales, batch, n = CASES[case]
    model = classifier(backbone, classes).to(device)
    pictures = Pictures(images or n, classes, size)
    for way in WAYS.values():
        way(model, Pictures(batch, classes, size), scales, batch, device)
    seconds = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in WAYS.items():
            start = time.perf_counter()
            way(model, pictures, scales, batch, device)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    baseline = medians["image by image"]
    return [
        {
            "case": case,
            "way": name,
            "images_per_second": len(pictures) / median,
            "milliseconds_per_image": 1000 * median / len(pictures),
            "speedup": baseline / median,
        }
        for name, median in medians.items()
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--images", type=int, help="images per round (default: by case)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"torch {torch.__version__}, device {options.device}, {options.threads} threads")
    print(f"{'case':16s}{'way':18s}{'images/s':>10s}{'ms/image':>10s}{'speed-up':>10s}")
    rows = []
    for case in options.cases:
        for row in measure(case, options.images, options.rounds, options.device):
            rows.append(row)
            print(
                f"{row['case']:16s}{row['way']:18s}{row['images_per_second']:10.1f}"
                f"{row['milliseconds_per_image']:10.2f}{row['speedup']:10.2f}"
            )
    if options.json:
        report = {"torch": torch.__version__, "threads": options.threads, "rows": rows}
        write_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
