"""The suppressor alone, forward and backward, against ReLU, at the shapes it has in the paper's classifier.

    python benchmarks/suppressor.py                          # the best device there is
    python benchmarks/suppressor.py --device cpu --batch 2    # smaller, for a processor

At each of VGG-16's sixteen activations (images of 320x320): ReLU, DRS compiled by this library with a
constant and with a learnable controller, the same as a composition of library calls, and with --compile that
composition under torch.compile. All take turns in one process; the table gives medians as ratios to ReLU, and
the sum over the sixteen. Memory is what a forward pass leaves allocated for the backward pass, on a GPU only.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from drs_lib import kernels
from drs_lib.drs import LearnableController, suppress_plain
from drs_lib.files import write_text
from drs_lib.runtime import pick_device

# (channels, side) of VGG-16's blocks with output stride 8 and of layer 6, for images of 320x320, and how
# often each occurs.
SHAPES = {(64, 320): 2, (128, 160): 2, (256, 80): 3, (512, 40): 9}
DELTA = 0.55
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def variants(channels, device, dtype, compile_plain):
    controller = LearnableController(channels).to(device, dtype)
    form = kernels.for_input(torch.empty(1, channels, 2, 2, device=device, dtype=dtype))
    found = {"ReLU": F.relu}
    if form is not None:
        control = {}

        def constant(x):
            key = x.shape[0]
            if key not in control:
                control[key] = torch.full((key, channels), DELTA, device=device)
            return form.suppress(x, control[key])

        found["constant, compiled"] = constant
        found["learnable, compiled"] = lambda x: form.suppress_learnable(x, controller.f.weight)

    def plain(x):
        return suppress_plain(x, DELTA)

    def plain_learnable(x):
        features = F.relu(x)
        return suppress_plain(features, controller(features))

    found |= {"constant, plain": plain, "learnable, plain": plain_learnable}
    if compile_plain:
        found["constant, torch.compile"] = torch.compile(plain)
        found["learnable, torch.compile"] = torch.compile(plain_learnable)
    return found


def measure(shape, device, dtype, layout, repeats, compile_plain):
    """Milliseconds, medians, of each variant, and its megabytes kept for the backward pass."""
    x = torch.randn(shape, device=device).to(dtype).to(memory_format=layout).requires_grad_()
    g = torch.randn(shape, device=device).to(dtype).to(memory_format=layout)
    functions = variants(shape[1], device, dtype, compile_plain)
    times, memory = {name: [] for name in functions}, {}
    for turn in range(-3, repeats):
        for name, function in functions.items():
            x.grad = None
            synchronize(device)
            before = allocated(device)
            begun = time.perf_counter()
            y = function(x)
            memory[name] = (allocated(device) - before) / 1e6
            y.backward(g)
            synchronize(device)
            if turn >= 0:
                times[name].append(1000 * (time.perf_counter() - begun))
            del y
    return {name: statistics.median(values) for name, values in times.items()}, memory


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device):
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--batch", nargs="+", type=int, default=[5, 32])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=None, help="default: by the device")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain form, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def main():
    options = arguments()
    device = pick_device(options.device)
    types = options.types or (list(TYPES) if device.type == "cuda" else ["float32"])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}")
    rows = []
    for batch in options.batch:
        for kind in types:
            for layout in (torch.channels_last, torch.contiguous_format):
                rows += table(batch, kind, layout, device, options)
    if options.json:
        write_text(
            options.json,
            json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=2) + "\n",
        )


def table(batch, kind, layout, device, options):
    label = "channels_last" if layout == torch.channels_last else "nchw"
    print(f"\nbatch {batch}, {kind}, {label}: time and kept memory, as ratios to ReLU")
    rows, totals = [], {}
    for (channels, side), often in SHAPES.items():
        shape = (batch, channels, side, side)
        times, memory = measure(shape, device, TYPES[kind], layout, options.repeats, options.compile)
        for name, milliseconds in times.items():
            totals[name] = totals.get(name, 0) + often * milliseconds
            row = dict(batch=batch, type=kind, layout=label, channels=channels, side=side, variant=name)
            rows.append(row | dict(milliseconds=round(milliseconds, 4), kept_mb=round(memory[name], 3)))
        ratios = "  ".join(f"{name} {value / times['ReLU']:.2f}" for name, value in times.items())
        print(f"{channels:4d} x {side:3d} x {side:3d}  {ratios}")
    print("sixteen together  " + "  ".join(f"{n} {v / totals['ReLU']:.2f}" for n, v in totals.items()))
    return rows


if __name__ == "__main__":
    main()
