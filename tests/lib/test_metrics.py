import numpy as np
import pytest
import torch

from drs_lib.metrics import MapScore, SegmentationScore, exact_match_accuracy, iou_per_class, mean_iou


def direct_confusion(pred, mask, k):
    confusion = np.zeros((k, k), np.int64)
    for truth, guess in zip(mask.ravel(), pred.ravel(), strict=True):
        if truth != 255:
            confusion[truth, guess] += 1
    return confusion


def random_labels(seed, shape=(4, 13, 17), k=5, ignored=0.1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, shape).astype(np.uint8)
    labels[rng.random(shape) < ignored] = 255
    return labels


@pytest.mark.parametrize("as_input", [np.asarray, torch.as_tensor])
def test_score_against_a_direct_confusion_matrix(as_input):
    pred, mask = random_labels(0, ignored=0), random_labels(1)
    score = SegmentationScore(5)
    for p, m in zip(pred, mask, strict=True):
        score.update(as_input(p), as_input(m))
    confusion = direct_confusion(pred, mask, 5)
    np.testing.assert_array_equal(score.confusion, confusion)
    iou = [
        np.sum((pred == c) & (mask == c)) / np.sum(((pred == c) | (mask == c)) & (mask != 255))
        for c in range(5)
    ]
    result = score.compute()
    np.testing.assert_allclose(result["iou"], iou, rtol=1e-12)
    assert result["miou"] == pytest.approx(np.mean(iou), rel=1e-12)


def test_batches_and_images_of_any_size_add_up():
    one, two = SegmentationScore(5), SegmentationScore(5)
    pred, mask = random_labels(2, ignored=0), random_labels(3)
    one.update(pred, mask)
    two.update(pred[0], mask[0]).update(pred[1:, :5], mask[1:, :5]).update(pred[1:, 5:], mask[1:, 5:])
    np.testing.assert_array_equal(one.confusion, two.confusion)


def test_a_label_absent_everywhere_is_left_out_of_the_mean():
    mask = np.array([[0, 0, 1, 1]], np.uint8)
    pred = np.array([[0, 1, 1, 1]], np.uint8)
    result = SegmentationScore(4).update(pred, mask).compute()
    np.testing.assert_allclose(result["iou"], [1 / 2, 2 / 3, np.nan, np.nan])
    assert result["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    # Predicted, though absent in the truth: it counts, with 0.
    result = SegmentationScore(4).update(np.array([[0, 3, 1, 1]], np.uint8), mask).compute()
    np.testing.assert_allclose(result["iou"], [1 / 2, 1, np.nan, 0])
    assert result["miou"] == pytest.approx(0.5)


@pytest.mark.parametrize("rule", ["background", "exclude"])
def test_ignored_pixels_of_a_pseudo_label(rule):
    pred, mask = random_labels(4, ignored=0.3), random_labels(5)
    score = SegmentationScore(5, ignored_prediction=rule).update(pred, mask)
    if rule == "background":
        expected = direct_confusion(np.where(pred == 255, 0, pred), mask, 5)
    else:
        expected = direct_confusion(pred, np.where(pred == 255, 255, mask), 5)
    np.testing.assert_array_equal(score.confusion, expected)


def test_inputs_are_left_alone():
    pred, mask = torch.as_tensor(random_labels(6)), torch.as_tensor(random_labels(7))
    kept = pred.clone(), mask.clone()
    SegmentationScore(5, ignored_prediction="exclude").update(pred, mask)
    assert torch.equal(pred, kept[0]) and torch.equal(mask, kept[1])


@pytest.mark.parametrize(
    "pred, mask, message",
    [
        (np.array([[5]]), np.array([[0]]), r"the prediction holds label 5; expected 0..4"),
        (np.array([[0]]), np.array([[17]]), "the mask holds label 17"),
        (np.array([[0]]), np.array([[-1]]), "the mask holds label -1"),
        (np.zeros((2, 2), int), np.zeros((2, 3), int), "differ in size"),
        (np.zeros((1, 2, 2)), np.zeros((1, 2, 2), int), "hold integers; got torch.float64"),
    ],
)
def test_bad_label_maps_are_refused_and_not_counted(pred, mask, message):
    score = SegmentationScore(5)
    with pytest.raises(ValueError, match=message):
        score.update(pred, mask)
    assert score.confusion.sum() == 0
    with pytest.raises(ValueError, match="no pixel was scored"):
        score.compute()


def test_mean_iou_of_a_confusion_matrix():
    assert mean_iou(np.diag([3, 4, 0])) == 1
    np.testing.assert_allclose(iou_per_class([[2, 1], [1, 0]]), [0.5, 0])
    with pytest.raises(ValueError, match="square"):
        mean_iou(np.zeros((2, 3)))
    for bad in (np.nan, -1):
        with pytest.raises(ValueError, match="counts pixels"):
            mean_iou([[2, bad], [1, 0]])
    with pytest.raises(ValueError, match="ignored_prediction must be"):
        SegmentationScore(3, ignored_prediction="object")


def test_exact_match():
    logits = torch.tensor([[1.0, -1.0], [0.0, -0.1], [2.0, 2.0], [-1.0, -1.0]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert exact_match_accuracy(logits, labels) == 0.5  # a logit of 0 is a sigmoid of 0.5: present
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 3)), rng.integers(0, 2, (200, 3))
    expected = np.mean([all((1 / (1 + np.exp(-f)) >= 0.5) == bool(t) for f, t in zip(*row, strict=True))
                        for row in zip(logits, labels, strict=True)])  # fmt: skip
    assert exact_match_accuracy(logits, labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    "logits, labels, message",
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), r"\(N, C\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "N at least 1"),
        (torch.zeros(3), torch.zeros(3), r"\(N, C\)"),
        (torch.full((1, 2), float("nan")), torch.zeros(1, 2), "NaN"),
        (torch.full((1, 2), float("-inf")), torch.zeros(1, 2), "infinity"),
        (torch.full((1, 2), -3.0), torch.full((1, 2), float("nan")), "labels are unknown"),
    ],
)
def test_exact_match_refuses(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        exact_match_accuracy(logits, labels)


def direct_map_score(maps, masks, labels, alpha):
    rows = {}
    for c in range(maps.shape[1]):
        images = [i for i in range(len(maps)) if labels[i, c]]
        if not images:
            continue
        values = np.concatenate([maps[i, c][masks[i] != 255] for i in images]).astype(np.float64)
        mask = np.concatenate([masks[i][masks[i] != 255] for i in images])
        on, above = mask == c + 1, values > alpha
        rows[c] = {
            "recall": (above & on).sum() / on.sum(),
            "precision": (above & on).sum() / above.sum(),
            "iou": (above & on).sum() / (above | on).sum(),
            "on_object": values[on].mean(),
            "on_background": values[mask == 0].mean(),
        }
    return rows


def test_map_score_against_direct_counts_also_in_parts():
    rng = np.random.default_rng(8)
    maps = rng.random((6, 4, 11, 9)).astype(np.float32)
    masks = random_labels(9, (6, 11, 9), k=5)
    labels = (rng.random((6, 4)) < 0.5).astype(np.float32)
    labels[:, 2] = 0
    labels[0, [0, 1, 3]] = 1
    rows = direct_map_score(maps, masks, labels, 0.4)
    result = MapScore(0.4).update(maps, masks, labels).compute()
    parts = MapScore(0.4).update(maps[:2], masks[:2], labels[:2])
    parts = parts.update(torch.tensor(maps[2:]), torch.tensor(masks[2:]), torch.tensor(labels[2:])).compute()
    for key in MapScore.KEYS:
        assert np.isnan(result["per_class"][key][2])
        for c, row in rows.items():
            assert result["per_class"][key][c] == pytest.approx(row[key], rel=1e-5)
        assert result[key] == pytest.approx(np.mean([row[key] for row in rows.values()]), rel=1e-5)
        np.testing.assert_allclose(parts["per_class"][key], result["per_class"][key], rtol=1e-6)


def test_map_score_where_nothing_is_defined():
    maps, masks = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.uint8)
    result = MapScore().update(maps, masks, torch.tensor([[1.0, 0.0]])).compute()
    assert np.isnan(result["recall"]) and np.isnan(result["precision"]) and np.isnan(result["iou"])
    assert np.isnan(result["on_object"]) and result["on_background"] == 0


def test_map_score_refuses():
    maps, masks, labels = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.uint8), torch.ones(1, 2)
    for bad in ((maps, masks[:, :2], labels), (maps, masks, labels[:, :1]), (maps[0], masks, labels)):
        with pytest.raises(ValueError, match="do not belong together"):
            MapScore().update(*bad)
    with pytest.raises(ValueError, match="a mask holds label 3; expected 0..2"):
        MapScore().update(maps, masks + 3, labels)
    with pytest.raises(ValueError, match="alpha"):
        MapScore(alpha=2)
    score = MapScore()
    with pytest.raises(ValueError, match="labels are unknown"):
        score.update(maps, masks, labels * float("nan"))
    for value, found in ((float("nan"), "nan to nan"), (float("inf"), "0 to inf"), (1.5, "0 to 1.5")):
        spoilt = maps.clone()
        spoilt[0, 1, 2, 2] = value
        with pytest.raises(ValueError, match=rf"maps must lie in \[0, 1\]; got {found}"):
            score.update(spoilt, masks, labels)
        score.update(spoilt, masks, torch.tensor([[1.0, 0.0]]))  # a map that no label names
    with pytest.raises(ValueError, match="Divide 8-bit maps by 255"):
        score.update((maps * 255).byte(), masks, labels)
    assert score.compute()["on_background"] == 0
    with pytest.raises(ValueError, match="no map was scored"):
        MapScore().compute()
    with pytest.raises(ValueError, match="maps of 2 classes came before"):
        MapScore().update(maps, masks, labels).update(maps[:, :1], masks, labels[:, :1])
