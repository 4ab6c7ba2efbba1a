"""What a change of the code's shape must leave as it is: keys of all stages, reference tables, and bits.

    python tools/golden.py freeze golden.json       # before the change: three minutes, on one core
    python tools/golden.py compare golden.json      # after it; exit status 1 if anything differs

Frozen are the run store's keys of every stage of Tables 1-4 under every budget, the committed reference
tables, the weights of two classifiers trained at the laptop budget, and the pseudo labels that one of them
gives 20 images. The last two are bits of one processor: compare on the machine that froze them.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from drs_course.paper import table_rows
from drs_course.stages import MEASURES, Pipeline, Splits
from drs_course.tables import TABLES, reference_path
from drs_lib.data import Critters, without_masks
from drs_lib.labels import pseudo_labels
from drs_lib.maps import iterate_maps
from drs_lib.recipes import get_budget
from drs_lib.train import train_classifier

BUDGETS = (("critters", ("ci", "laptop", "paper")), ("voc", ("ci", "paper", "release")))


def digest(*parts):
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def stand_in(name):
    """A data set as far as keys are concerned."""
    return SimpleNamespace(fingerprint=name, fingerprint_without_saliency=f"{name} without", num_classes=20)


def stage_keys():
    """{data, budget, stage: a hash of the keys of all its entries}."""
    found = defaultdict(set)
    with tempfile.TemporaryDirectory() as folder:
        for data, budgets in BUDGETS:
            splits = Splits(data, *map(stand_in, ("train", "val", "accuracy")))
            for budget in budgets:
                pipeline = Pipeline(splits, get_budget(budget, data), store=folder)
                for configuration in {row.configuration for t in TABLES for row in table_rows(t)} - {None}:
                    weak = {"labels", "maps", "accuracy"} if configuration.supervised else set()
                    for stage in pipeline.stages(configuration, sorted(set(MEASURES) - weak)):
                        found[f"{data}, {budget}, {stage.name}"].add(stage.key)
    return {name: digest(*(key.encode() for key in sorted(keys))) for name, keys in sorted(found.items())}


def reference():
    return {f"reference table {t}": digest(reference_path(t).read_bytes()) for t in TABLES}


def bits():
    """The weights of two classifiers of the laptop budget, and 20 label maps."""
    budget, found = get_budget("laptop"), {}
    train = Critters("train", size=budget.image_size, length=budget.train_images)
    for name, delta in (("delta 0.55", 0.55), ("learnable", None)):
        recipe = budget.classify.replace(drs_layers=(1, 2, 3, 4, 5, 6), delta=delta)
        model, _ = train_classifier(recipe, train, seed=0, device="cpu", progress=False)
        state = model.state_dict()
        found[f"classifier, {name}"] = digest(*(state[key].numpy().tobytes() for key in sorted(state)))
    labels = []
    for index, _, maps in iterate_maps(model, without_masks(train), indices=range(20)):
        cues = maps[None], train.saliency(index)[None]
        labels.append(pseudo_labels(*cues, alpha=budget.alpha, beta=budget.beta))
    found["labels of 20 images"] = digest(*(part.numpy().tobytes() for part in labels))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("freeze", "compare"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    found = {**stage_keys(), **reference(), **bits()}
    if options.what == "freeze":
        options.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    frozen = json.loads(options.file.read_text(encoding="utf-8"))
    other = sorted(name for name in frozen.keys() | found.keys() if frozen.get(name) != found.get(name))
    print("\n".join(f"{name}: {frozen.get(name)} before, {found.get(name)} now" for name in other))
    print(f"{len(frozen) - len(other)} of {len(frozen)} equal")
    return bool(other)


if __name__ == "__main__":
    sys.exit(main())
