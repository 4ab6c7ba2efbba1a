"""A segmentation network from a folder of images with image-level labels and saliency maps.

    python -m drs_lib photos --out out

trains the classifier with DRS, the refinement network and a DeepLab, and leaves in `out` maps.zip and
labels.zip, what the trainings handed on; deeplab.safetensors, the network; and masks/, what it sees in each
image, as indexed PNGs with VOC's colours. Needs a GPU at the paper's sizes. `drs_lib.data.folder` says what
`photos` holds. A run that was stopped begins anew; runs that go on are those of `drs_course`.
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

from drs_lib.data.folder import LabelledFolder
from drs_lib.data.voc import save_indexed_png
from drs_lib.files import atomic_path
from drs_lib.method import weakly_supervised
from drs_lib.recipes import SEGMENTERS, get_budget
from drs_lib.train import predict_segmentation


def main(arguments=None):
    """Runs the command; returns the exit status, 1 for what is wrong with the folder or the training."""
    about = argparse.ArgumentParser(prog="python -m drs_lib", description=__doc__.split("\n\n")[0])
    add = about.add_argument
    add("folder", type=Path, help="holds labels.txt and the folders images and saliency; masks for a score")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="default: out")
    add(
        "--recipes", choices=("paper", "release", "ci"), default="paper", help="ci: two steps each, for a try"
    )
    add("--network", choices=SEGMENTERS, default="largefov", help="of Table 4; default: largefov")
    add("--seed", type=int, default=0, help="default: 0")
    add("--device", help="default: the best there is")
    options = about.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options):
    data, budget = LabelledFolder(options.folder), get_budget(options.recipes, "voc")
    network, miou = weakly_supervised(
        data, data if data.has_masks else None, budget, options.out,
        segmenter=options.network, seed=options.seed, device=options.device,
    )  # fmt: skip
    with atomic_path(options.out / "deeplab.safetensors") as temporary:
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, temporary)
    (options.out / "masks").mkdir(exist_ok=True)
    for index, mask in predict_segmentation(network, data):
        save_indexed_png(options.out / "masks" / f"{data.names[index]}.png", mask)
    print(f"{len(data)} masks of {', '.join(data.classes)} in {options.out / 'masks'}")
    if miou is not None:
        print(f"mean IoU {100 * miou:.1f} % on the training images themselves")


if __name__ == "__main__":
    sys.exit(main())
