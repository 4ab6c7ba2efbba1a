"""What the GPU's kernels ask of a GPU, known without one: registers, spills, and the bytes that they move.

    python benchmarks/registers.py                              # Turing (Colab's T4), Ampere, Hopper
    python benchmarks/registers.py --arch 90 --json registers.json

Each kernel that DRS launches at VGG-16's activations is compiled ahead of time, specialised as a launch would
specialise it. The first table holds what the compiler says of it: registers of a thread, bytes that did not
fit into them, shared memory. The second holds, for each activation, the least time in which the bytes that
ReLU and DRS move, forward and backward, can be moved at --bandwidth (default: an H100's memory).
"""

import argparse
import json
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path

import torch
from joblib import Parallel, delayed

SIZES = (320, 256, 384)  # of images: in training, and the other scales of the maps
BLOCKS = (
    (64, 1),
    (128, 2),
    (256, 4),
    (512, 8),
)  # channels and stride of VGG-16's blocks; layer 6 is as the last
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
# How many times a kernel reads or writes a whole batch of maps.
PASSES = {"_suppress_tile": 2, "_extract_part": 1, "_clamp_part": 2, "_gradient_part": 3, "_spread_part": 3}
RELU_PASSES = 5


def launches(shape, dtype, layout):
    """What a step, forward and backward, launches, with tensors on the meta device: {"constant": [...],
    "learnable": [...]} of (kernel, values, options)."""
    from drs_lib.kernels import cuda

    found = []

    class Recorded(cuda._Cut):
        def run(self, kernel, *tensors, **options):
            values = *tensors, self.channels, self.positions
            found.append((kernel, values, self.options | options))

    x, g = (torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout) for _ in range(2))
    control = torch.empty(shape[:2], dtype=torch.float32, device="meta")
    cut, cuda._Cut = cuda._Cut, Recorded
    try:
        y, tau, _, argmax = cuda.suppressed(x, control)
        gx, _ = cuda.gradients(g, y, tau, control, argmax)
        constant, found = found, []
        peak, argmax, _ = cuda.extracted(x)
        y, tau = cuda.clamped(x, peak, control)
        cuda.gradients(g, y, tau, control, argmax)
        cuda.average_gradient(y, control, gx)
    finally:
        cuda._Cut = cut
    return {"constant": constant, "learnable": found}


def specialised(kernel, values, options):
    """How Triton compiles a launch, as plain values: the kernel's name, types, constants, what is divisible
    by 16, warps."""
    constants = {name: value for name, value in options.items() if name != "num_warps"}
    signature, divisible = dict.fromkeys(kernel.arg_names, "constexpr"), []
    for place, (name, value) in enumerate(zip(kernel.arg_names, values, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif value == 1:
            constants[name] = 1
            continue
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            divisible.append(place)
    kinds = tuple(signature.items()), tuple(constants.items()), tuple(divisible)
    return kernel.__name__, *kinds, options.get("num_warps", 4)


def usage(name, signature, constants, divisible, warps, arch):
    """Registers of a thread, bytes of it that spilled, bytes of shared memory."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from drs_lib.kernels import cuda

    attributes = {(place,): [["tt.divisibility", 16]] for place in divisible}
    source = ASTSource(getattr(cuda, name), dict(signature), dict(constants), attributes)
    made = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(made.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", path]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    spilled = max(found["STACK"], found["LOCAL"])
    return {"registers": found["REG"], "spilled": spilled, "shared": made.metadata.shared}


def register_table(architectures, batch, types=tuple(TYPES)):
    """A row for each kernel as it is specialised at VGG-16's activations, and for each architecture."""
    tasks = {}
    for kind, (label, layout) in product(types, LAYOUTS.items()):
        for size, (channels, stride) in product(SIZES, BLOCKS):
            found = launches((batch, channels, size // stride, size // stride), TYPES[kind], layout)
            for launch in (*found["constant"], *found["learnable"]):
                tasks.setdefault(specialised(*launch), {"type": kind, "layout": label})
    jobs = list(product(tasks, architectures))
    usages = Parallel(n_jobs=-1)(delayed(usage)(*task, arch) for task, arch in jobs)
    rows = []
    for (task, arch), found in zip(jobs, usages, strict=True):
        name, _, constants, _, warps = task
        tile = [value for key, value in constants if key in ("P", "B")]
        rows.append({"kernel": name, **tasks[task], "tile": tile, "warps": warps, "sm": arch, **found})
    return rows


def floor_table(batch, bandwidth):
    """For each of VGG-16's activations, the microseconds that the bytes of a step take at least."""
    rows = []
    for (kind, dtype), (label, layout) in product(TYPES.items(), LAYOUTS.items()):
        for channels, stride in BLOCKS:
            side = SIZES[0] // stride
            passes = {"ReLU": RELU_PASSES}
            for name, found in launches((batch, channels, side, side), dtype, layout).items():
                passes[name] = sum(PASSES.get(kernel.__name__, 0) for kernel, *_ in found)
            megabytes = batch * channels * side**2 * dtype.itemsize / 1e6
            floors = {name: round(count * megabytes / bandwidth, 1) for name, count in passes.items()}
            rows.append({"type": kind, "layout": label, "channels": channels, "side": side, **floors})
    return rows


def show(rows):
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in (dict(zip(widths, widths, strict=True)), *rows):
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[75, 80, 90], help="compute capabilities, 90 for 9.0"
    )
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of the memory, in TB/s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write both tables there too")
    options = parser.parse_args()
    registers = register_table(options.arch, options.batch)
    floors = floor_table(options.batch, options.bandwidth)
    show(registers)
    most = max(row["registers"] for row in registers)
    spilling = sum(row["spilled"] > 0 for row in registers)
    print(f"\n{len(registers)} kernels; at the most {most} registers a thread; {spilling} spill.")
    print(f"\nMicroseconds that the bytes take at least, batch {options.batch}, {options.bandwidth} TB/s:")
    show(floors)
    if options.json:
        from drs_lib.files import write_text

        write_text(options.json, json.dumps({"registers": registers, "floors": floors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
