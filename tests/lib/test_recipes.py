import json

import pytest

from drs_lib.recipes import ClassifyRecipe, RefineRecipe, SegmentRecipe

PRESETS = [
    ClassifyRecipe(),
    ClassifyRecipe.laptop(),
    RefineRecipe(),
    RefineRecipe.laptop(),
    SegmentRecipe(),
    SegmentRecipe.largefov_resnet101(),
    SegmentRecipe.aspp_resnet101(),
    SegmentRecipe.laptop(),
    SegmentRecipe.laptop("aspp", "mini_resnet"),
]


@pytest.mark.parametrize("per_epoch", [1, 7])
def test_milestones_are_the_first_epochs_at_the_lower_rate(per_epoch):
    recipe = ClassifyRecipe()
    for epoch in range(1, 16):
        expected = 1.0 if epoch < 5 else 0.1 if epoch < 10 else 0.01
        for step in range((epoch - 1) * per_epoch, epoch * per_epoch):
            assert recipe.lr_factor(step, per_epoch, 15 * per_epoch) == pytest.approx(expected)


# (recipe, iterations in an epoch, {iteration: factor}, by the schedules' formulas)
FACTORS = [
    (
        SegmentRecipe(iterations=6000, schedule="step", milestones=(4000, 5000)),
        {0: 1, 3999: 1, 4000: 0.1, 4999: 0.1, 5000: 0.01, 5999: 0.01},
    ),
    (SegmentRecipe(), {step: (1 - step / 20_000) ** 0.9 for step in (0, 1, 777, 19_999)}),
    (
        SegmentRecipe.aspp_resnet101(),
        {s: (1 - s // 10 * 10 / 20_000) ** 0.9 for s in (0, 9, 10, 19, 12_345)},
    ),
    (SegmentRecipe(schedule="onecycle", warmup=0), {0: 1, 10_000: 0.5}),
    (SegmentRecipe(schedule="constant"), {0: 1, 7: 1, 19_999: 1}),
]


@pytest.mark.parametrize(("recipe", "factors"), FACTORS, ids=lambda value: getattr(value, "schedule", ""))
def test_schedules_by_their_formulas(recipe, factors):
    found = [recipe.lr_factor(step, 50, recipe.iterations) for step in factors]
    assert found == pytest.approx(list(factors.values()))


def test_onecycle_rises_to_one_and_falls_to_almost_nothing():
    recipe = ClassifyRecipe.laptop(warmup=0.25, schedule="onecycle")
    factors = [recipe.lr_factor(step, 10, 100) for step in range(100)]
    assert all(a < b for a, b in zip(factors[:25], factors[1:26], strict=True))
    assert all(a > b for a, b in zip(factors[25:], factors[26:], strict=False))
    assert factors[25] == max(factors) == pytest.approx(1)
    assert 0 < factors[0] < 0.05 and 0 < factors[-1] < 0.01


def test_steps():
    assert ClassifyRecipe().steps(10_582) == (2116, 15 * 2116)
    assert SegmentRecipe().steps(10_582) == (1058, 20_000)
    assert SegmentRecipe.aspp_resnet101().steps(10_582) == (1058, 20_000)
    assert ClassifyRecipe(batch=32, epochs=2).steps(20) == (1, 2)
    with pytest.raises(ValueError, match="empty"):
        ClassifyRecipe().steps(0)


def test_a_recipe_is_cut_as_it_counts_and_never_longer():
    assert ClassifyRecipe().at_most(2, 103) == ClassifyRecipe(epochs=2)
    assert ClassifyRecipe(epochs=1).at_most(2, 103) == ClassifyRecipe(epochs=1)
    counted = SegmentRecipe(iterations=25, batch=5, accumulate=2)
    assert counted.at_most(2, 103) == counted.replace(iterations=20)
    assert counted.at_most(3, 103) == counted


@pytest.mark.parametrize("recipe", PRESETS, ids=lambda r: f"{type(r).__name__}-{r.backbone}-{r.epochs}")
def test_recipes_survive_json(recipe):
    text = json.dumps(recipe.to_dict(), sort_keys=True, allow_nan=False)
    again = type(recipe)().replace(**json.loads(text))
    assert again == recipe
    assert json.dumps(again.to_dict(), sort_keys=True) == text


def test_to_dict_holds_what_changes_the_result_in_one_spelling():
    assert json.dumps(ClassifyRecipe(delta=1, lr=1, drs_layers=[6, 5]).to_dict()) == (
        json.dumps(ClassifyRecipe(delta=1.0, lr=1.0, drs_layers=(5, 6, 6)).to_dict())
    )
    assert ClassifyRecipe(workers=0).to_dict() == ClassifyRecipe(workers=8).to_dict()
    base = ClassifyRecipe().to_dict()
    assert "workers" not in base
    for change in (dict(lr=2e-3), dict(delta=0.55), dict(drs_layers=()), dict(threads=1), dict(flip=False)):
        assert ClassifyRecipe(**change).to_dict() != base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr=0), "lr is 0.0: expected above 0"),
        (dict(lr=float("nan")), "lr holds nan: expected a finite number"),
        (dict(lr="1e-3"), "lr holds '1e-3'"),
        (dict(lr=None), "lr holds None"),
        (dict(momentum=1), "momentum"),
        (dict(weight_decay=-1), "weight_decay"),
        (dict(gamma=0), "gamma is 0.0: expected above 0 and at most 1"),
        (dict(power=0), "power"),
        (dict(warmup=1), "warmup"),
        (dict(batch=0), "batch holds 0: expected a whole number of 1 or more"),
        (dict(batch=2.5), "batch holds 2.5"),
        (dict(batch=True), "batch holds True"),
        (dict(accumulate=0), "accumulate"),
        (dict(workers=-1), "workers holds -1: expected a whole number of 0 or more"),
        (dict(crop=0), "crop"),
        (dict(optimizer="rmsprop"), "optimizer is 'rmsprop': expected one of sgd, adam"),
        (dict(optimizer=None), "optimizer is None"),
        (dict(schedule="cosine"), "schedule is 'cosine': expected one of constant, step, poly, onecycle"),
        (dict(precision="half"), "precision"),
        (dict(lr_multipliers=(1, 2, 10)), "four factors.*pretrained weights.*new biases"),
        (dict(lr_multipliers=5), "lr_multipliers is 5: expected a sequence"),
        (dict(milestones=(10, 5)), "increasing"),
        (dict(milestones=(0, 5)), "milestones holds 0"),
        (dict(scale=(1,)), "scale"),
        (dict(scale=(0, 1)), "scale"),
        (dict(jitter=(0.3, 0.3, 0.3)), "jitter"),
        (dict(jitter=(0.3, 0.3, 0.3, 0.6)), "hue"),
        (dict(epochs=None), "epochs is None and iterations is None"),
        (dict(iterations=10), "epochs is 15 and iterations is 10"),
        (dict(nesterov=True, optimizer="adam"), "nesterov needs"),
        (dict(flip=1), "flip is 1: expected True or False"),
        (dict(drs_layers=(0, 1)), "drs_layers holds 0"),
        (dict(drs_layers=(7,)), "layer numbers from 1 to 6"),
        (dict(drs_layers=6), "drs_layers is 6: expected a sequence"),
        (dict(delta=0), "delta is 0.0"),
        (dict(delta=1.1), "delta is 1.1"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"ClassifyRecipe: .*{message}"):
        ClassifyRecipe(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (SegmentRecipe, dict(kind="fcn"), "SegmentRecipe: kind is 'fcn': expected one of largefov, aspp"),
        (SegmentRecipe, dict(loss_size="map"), "SegmentRecipe: loss_size"),
        (RefineRecipe, dict(loss_size="logits"), "RefineRecipe: loss_size"),
        (RefineRecipe, dict(label_mask="yes"), "RefineRecipe: label_mask"),
        (RefineRecipe, dict(lr=-1), "lr is -1"),
        (RefineRecipe, dict(delta=0.5, speed=1), "RefineRecipe has no delta, speed; its fields are .*lr"),
    ],
)
def test_stage_fields_are_checked_too_and_replace_names_what_is_not_there(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind().replace(**changes)
    assert ClassifyRecipe().replace(delta=0.55).delta == 0.55
