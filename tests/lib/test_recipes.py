import json

import pytest

from drs_lib.recipes import ClassifyRecipe, RefineRecipe, SegmentRecipe

PRESETS = [
    ClassifyRecipe(),
    ClassifyRecipe.laptop(),
    ClassifyRecipe.ci(),
    RefineRecipe(),
    RefineRecipe.laptop(),
    RefineRecipe.ci(),
    SegmentRecipe.largefov_vgg16(),
    SegmentRecipe.largefov_resnet101(),
    SegmentRecipe.aspp_resnet101(),
    SegmentRecipe.laptop(),
    SegmentRecipe.laptop("aspp", "mini_resnet"),
    SegmentRecipe.ci(),
]


def expect(recipe, **values):
    assert {name: getattr(recipe, name) for name in values} == values


def test_classify_defaults_are_the_papers():
    recipe = ClassifyRecipe()
    expect(recipe, backbone="vgg16", weights="pretrained", drs_layers=(1, 2, 3, 4, 5, 6), delta=None)
    expect(recipe, optimizer="sgd", lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=False)
    expect(recipe, epochs=15, iterations=None, schedule="step", milestones=(5, 10), gamma=0.1, batch=5)
    expect(recipe, crop=321, flip=True, resize=None, scale=None)
    assert recipe.jitter is not None


def test_refine_defaults_are_the_papers():
    recipe = RefineRecipe()
    expect(recipe, backbone="vgg16", weights="pretrained", optimizer="adam", lr=1e-4, batch=5)
    expect(
        recipe, epochs=15, schedule="step", milestones=(5, 10), gamma=0.1, loss_size="map", label_mask=False
    )
    # "We apply the same augmentation strategy as in the classification network."
    augmentation = ("resize", "scale", "crop", "flip", "jitter")
    expect(recipe, **{name: getattr(ClassifyRecipe(), name) for name in augmentation})


def test_segment_presets_are_table_4s():
    vgg, resnet, aspp = (
        SegmentRecipe.largefov_vgg16(),
        SegmentRecipe.largefov_resnet101(),
        SegmentRecipe.aspp_resnet101(),
    )
    for recipe in (vgg, resnet, aspp):
        expect(recipe, iterations=20_000, epochs=None, optimizer="sgd", momentum=0.9, weight_decay=5e-4)
        expect(recipe, schedule="poly", power=0.9, crop=321, loss_size="logits")
        assert recipe.batch * recipe.accumulate == 10
    expect(vgg, kind="largefov", backbone="vgg16", lr=1e-3, lr_multipliers=(1, 2, 10, 20), bias_decay=False)
    expect(resnet, kind="largefov", backbone="resnet101", lr=2.5e-4)
    expect(aspp, kind="aspp", backbone="resnet101", lr=2.5e-4, update_every=10, batch=5, accumulate=2)
    expect(aspp, scale=(0.5, 0.75, 1.0, 1.25, 1.5))


@pytest.mark.parametrize("per_epoch", [1, 7])
def test_milestones_are_the_first_epochs_at_the_lower_rate(per_epoch):
    recipe = ClassifyRecipe()
    for epoch in range(1, 16):
        expected = 1.0 if epoch < 5 else 0.1 if epoch < 10 else 0.01
        for step in range((epoch - 1) * per_epoch, epoch * per_epoch):
            assert recipe.lr_factor(step, per_epoch, 15 * per_epoch) == pytest.approx(expected)


def test_milestones_count_iterations_where_the_length_does():
    recipe = SegmentRecipe(iterations=6000, schedule="step", milestones=(4000, 5000))
    factors = [recipe.lr_factor(step, 100, 6000) for step in (0, 3999, 4000, 4999, 5000, 5999)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_poly_by_its_formula():
    recipe = SegmentRecipe()
    for step in (0, 1, 777, 19_999):
        assert recipe.lr_factor(step, 50, 20_000) == pytest.approx((1 - step / 20_000) ** 0.9)
    every_ten = SegmentRecipe.aspp_resnet101()
    for step, counted in ((0, 0), (9, 0), (10, 10), (19, 10), (12_345, 12_340)):
        assert every_ten.lr_factor(step, 50, 20_000) == pytest.approx((1 - counted / 20_000) ** 0.9)


def test_onecycle_rises_to_one_and_falls_to_almost_nothing():
    recipe = ClassifyRecipe.laptop().replace(warmup=0.25, schedule="onecycle")
    factors = [recipe.lr_factor(step, 10, 100) for step in range(100)]
    assert all(a < b for a, b in zip(factors[:25], factors[1:26], strict=True))
    assert all(a > b for a, b in zip(factors[25:], factors[26:], strict=False))
    assert factors[25] == max(factors) == pytest.approx(1)
    assert 0 < factors[0] < 0.05 and 0 < factors[-1] < 0.01
    no_warmup = recipe.replace(warmup=0)
    assert no_warmup.lr_factor(0, 10, 100) == 1
    assert no_warmup.lr_factor(50, 10, 100) == pytest.approx(0.5)


def test_constant_is_constant():
    recipe = ClassifyRecipe(schedule="constant")
    assert {recipe.lr_factor(step, 3, 45) for step in range(45)} == {1.0}


def test_steps():
    assert ClassifyRecipe().steps(10_582) == (2116, 15 * 2116)
    assert SegmentRecipe().steps(10_582) == (1058, 20_000)
    assert SegmentRecipe.aspp_resnet101().steps(10_582) == (1058, 20_000)
    assert ClassifyRecipe(batch=32, epochs=2).steps(20) == (1, 2)
    with pytest.raises(ValueError, match="empty"):
        ClassifyRecipe().steps(0)


def test_a_recipe_is_cut_as_it_counts_and_never_longer():
    assert ClassifyRecipe().at_most(2, 103) == ClassifyRecipe(epochs=2)
    assert ClassifyRecipe.ci().at_most(2, 103) == ClassifyRecipe.ci()
    counted = SegmentRecipe(iterations=25, batch=5, accumulate=2)
    assert counted.at_most(2, 103) == counted.replace(iterations=20)
    assert counted.at_most(3, 103) == counted


@pytest.mark.parametrize("recipe", PRESETS, ids=lambda r: f"{type(r).__name__}-{r.backbone}-{r.epochs}")
def test_recipes_survive_json(recipe):
    text = json.dumps(recipe.to_dict(), sort_keys=True, allow_nan=False)
    again = type(recipe).from_dict(json.loads(text))
    assert again == recipe
    assert json.dumps(again.to_dict(), sort_keys=True) == text


def test_to_dict_holds_what_changes_the_result_in_one_spelling():
    assert ClassifyRecipe(delta=1, lr=1, drs_layers=[6, 5]).to_dict() == (
        ClassifyRecipe(delta=1.0, lr=1.0, drs_layers=(5, 6, 6)).to_dict()
    )
    assert json.dumps(ClassifyRecipe(lr=1).to_dict()) == json.dumps(ClassifyRecipe(lr=1.0).to_dict())
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
        (dict(momentum=1), "momentum"),
        (dict(weight_decay=-1), "weight_decay"),
        (dict(batch=0), "batch holds 0: expected a whole number of 1 or more"),
        (dict(batch=2.5), "batch holds 2.5"),
        (dict(batch=True), "batch holds True"),
        (dict(accumulate=0), "accumulate"),
        (dict(workers=-1), "workers"),
        (dict(crop=0), "crop"),
        (dict(optimizer="rmsprop"), "optimizer is 'rmsprop': expected one of sgd, adam, adamw"),
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


def test_stage_fields_are_checked_too():
    with pytest.raises(ValueError, match="SegmentRecipe: kind is 'fcn': expected one of largefov, aspp"):
        SegmentRecipe(kind="fcn")
    with pytest.raises(ValueError, match="SegmentRecipe: loss_size"):
        SegmentRecipe(loss_size="map")
    with pytest.raises(ValueError, match="RefineRecipe: loss_size"):
        RefineRecipe(loss_size="logits")
    with pytest.raises(ValueError, match="RefineRecipe: label_mask"):
        RefineRecipe(label_mask="yes")


def test_replace_names_what_is_not_there():
    with pytest.raises(ValueError, match="RefineRecipe has no delta, speed; its fields are .*lr"):
        RefineRecipe().replace(delta=0.5, speed=1)
    with pytest.raises(ValueError, match="lr is -1"):
        RefineRecipe().replace(lr=-1)
    assert ClassifyRecipe().replace(delta=0.55).delta == 0.55
