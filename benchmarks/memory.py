"""What a training step of the paper's recipes keeps in memory, without a GPU to look at.

    python benchmarks/memory.py

One image of each recipe's crop passes through the network, with random weights, and every tensor that
autograd saves for the backward pass is counted once; a batch keeps as many times more. Added to it are the
parameters with their gradients and the optimiser's buffers. cuDNN's workspaces and the allocator's reserve
come on top, and under bfloat16 the activations take about half.
"""

import argparse
import json
from pathlib import Path

import torch

from drs_lib import networks
from drs_lib.batches import Batch
from drs_lib.files import write_text
from drs_lib.losses import classification_loss, refinement_loss, segmentation_loss
from drs_lib.recipes import ClassifyRecipe, RefineRecipe, get_budget

CLASSES = 20
STAGES = ("classify", "refine", "largefov", "largefov_resnet", "aspp")


def build(recipe):
    """The recipe's network, its loss, and what the stage adds to a batch of one image."""
    side = recipe.crop or recipe.resize
    if isinstance(recipe, ClassifyRecipe):
        return networks.classifier(recipe.backbone, CLASSES), classification_loss, None
    if isinstance(recipe, RefineRecipe):
        maps = torch.rand(1, CLASSES, side, side)
        return networks.refinement_network(recipe.backbone, CLASSES), refinement_loss, maps
    labels = torch.randint(0, CLASSES + 1, (1, side, side), dtype=torch.uint8)
    return networks.deeplab(recipe.kind, recipe.backbone, CLASSES + 1), segmentation_loss, labels


def saved_bytes(model, loss, batch):
    """Bytes that autograd keeps for the backward pass of loss(model, batch), the model's own left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss(model, batch)
    kept = sum(saved.values())
    del value
    return kept


def measure(recipe):
    torch.manual_seed(0)
    side = recipe.crop or recipe.resize
    model, loss, extra = build(recipe)
    model = model.to(memory_format=torch.channels_last).train()
    image = torch.randn(1, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.zeros(1, CLASSES)
    labels[:, :2] = 1
    activations = recipe.batch * saved_bytes(model, loss, Batch(torch.arange(1), image, labels, extra))
    # Gradient, and SGD's momentum or Adam's two averages.
    buffers = 1 + (1 if recipe.optimizer == "sgd" else 2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = 4 * (sum(p.numel() for p in model.parameters()) + buffers * trained)
    return {
        "batch": recipe.batch,
        "crop": side,
        "activations": activations,
        "weights": weights,
        "sum": activations + weights,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", choices=("paper", "release"), default="paper")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too, in bytes")
    options = parser.parse_args()

    budget = get_budget(options.budget, "voc")
    print(f"budget {options.budget}, float32, GiB")
    print(f"{'stage':18s}{'batch':>6s}{'crop':>6s}{'activations':>13s}{'weights':>9s}{'sum':>7s}")
    rows = {}
    for stage in STAGES:
        recipe = getattr(budget, stage)
        rows[stage] = row = measure(recipe)
        sizes = [row[key] / 2**30 for key in ("activations", "weights", "sum")]
        print(
            f"{stage:18s}{row['batch']:6d}{row['crop']:6d}{sizes[0]:13.2f}{sizes[1]:9.2f}{sizes[2]:7.2f}",
            flush=True,
        )
    if options.json:
        write_text(options.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
