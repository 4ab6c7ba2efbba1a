"""Checks of what is worked out by hand or predicted: numbers, positions, words."""

import math

from drs_course.checks.verdict import (
    Wrong,
    alike,
    as_list,
    as_number,
    as_numbers,
    as_pairs,
    cause,
    check,
    choose,
    choose_each,
    found,
    same_numbers,
)
from drs_course.tables import reference_table


@check("00", "2", "two numbers: (pixel accuracy, mIoU)")
def lazy_network(answer):
    """Pixel accuracy and mIoU of a network that calls every pixel background (00, exercise 2).

    They are shares in [0, 1], over Critters' validation images with six species. How much background there
    is depends on the run's images; how the two hang together does not.
    """
    accuracy, miou = as_numbers(answer, ("pixel accuracy", "mIoU"))
    if accuracy > 1 or miou > 1:
        text = f"pixel accuracy {accuracy:g} and mIoU {miou:g}"
        raise Wrong(f"{text}: give shares between 0 and 1, not percent")
    if alike(accuracy, miou / 7):
        raise Wrong("the two numbers look exchanged: the answer is (pixel accuracy, mIoU)")
    if not 0.6 <= accuracy <= 0.92:
        raise Wrong(
            f"a pixel accuracy of {accuracy:.3g} is not the share of Critters' pixels that are background. "
            "The network says 0 everywhere; in which share of the pixels is the mask 0?"
        )
    causes = {
        accuracy: "That is the IoU of background alone; six species have an IoU too",
        0: "The species' IoU is 0, but background has one",
        accuracy / 6: "There are seven labels, background and six species",
        1 / 7: "Background's IoU is not 1: its union has all the animals' pixels as well",
        accuracy / 2: "There are not two labels, background and animal, but seven",
    }
    if not alike(miou, accuracy / 7):
        text = f"the accuracy is possible, but an mIoU of {miou:.4g} does not go with {accuracy:.4g}"
        raise Wrong(text + cause(miou, causes))


@check("00", "4", "a whole number")
def shared_stages(answer):
    """How many stages of Configuration(delta=0.55, refine=True) Tables 1 and 2 have made (00, exercise 4).

    Its stages are classify, target, refine, labels, segment and evaluate.
    """
    causes = {
        0: "One row of Table 1 has the same δ. What does its first stage read, and does refining come "
        "before it?",
        2: "Target maps are made for refinement, and no row of Tables 1 and 2 refines",
        3: "A stage is shared only if all that it reads is; what do the pseudo labels read here?",
        4: "Stages of the same name are not the same stage: compare the keys",
        5: "A stage is shared only if all that it reads is the same; what comes after refining differs",
        6: "That is how many stages it has in all",
    }
    same_numbers(answer, {"the number of stages": 1}, causes, tolerance=1e-6)


_UP_DOWN = ("up", "down", "same")
_RECALL_AND_PRECISION = '{"recall": ..., "precision": ...}, each "up", "down" or "same"'


@check("01", "3", _RECALL_AND_PRECISION)
def minmax_scores(answer):
    """What rescaling from minimum to maximum, without a ReLU, does to the cue at 0.2 (01, exercise 3)."""
    where = "Where does 0 of the class map come to lie after rescaling?"
    questions = {
        "recall": ("up", f"{where} Does a pixel of the old cue drop out of the new one?"),
        "precision": ("down", f"{where} What joins the cue?"),
    }
    choose_each(answer, _UP_DOWN, questions)


@check("01", "4", '"sparser", "denser" or "same"')
def max_pooling_map(answer):
    """What global max pooling in place of GAP does to the map (01, exercise 4)."""
    where = "At how many positions of a class map does the score's gradient arrive"
    choose(answer, "sparser", dict.fromkeys(("denser", "same"), f"{where}, with a mean and with a maximum?"))


@check(
    "01",
    "5",
    '{"not normalised": ..., "training mode": ..., "integers": ...}, each "loud", "handled" or "silent"',
)
def broken_inputs(answer):
    """Which wrong inputs of localization_maps fail loudly, which in silence, which not (01, exercise 5)."""
    tell = "Can a function tell from a tensor of floats whether somebody normalised it? Try it."
    questions = {
        "not normalised": ("silent", tell),
        "training mode": ("handled", "Compare the maps, and look at model.training after the call."),
        "integers": ("loud", "Call it with uint8 pixels and read what comes."),
    }
    choose_each(answer, ("loud", "handled", "silent"), questions)


_DELTA, _TAU = 0.44, 4.4
_SUPPRESSED = frozenset({(1, 3), (2, 2), (2, 3), (2, 4)})
_OF_TAU = {
    _DELTA: "tau is a share of the map's maximum, not the share itself",
    _DELTA * 51 / 25: "tau is a share of the map's maximum, not of its mean",
    _DELTA * 51 / 15: "tau is a share of the map's maximum, not of the mean of its active positions",
    5.6: "That is 1 - delta of the maximum; a map may keep the share delta",
    10: "That is the maximum; which share of it may the map keep?",
    6.9: "That is the bound with G = 0.69; here G is delta",
    6: 'That is the bound of "Where the gradient goes", with 0.6; here delta is 0.44',
}
_OF_POSITIONS = {
    frozenset((r + 1, c + 1) for r, c in _SUPPRESSED): "Rows and columns seem counted from 1; here they "
    "count from 0",
    frozenset((c, r) for r, c in _SUPPRESSED): "Rows and columns look exchanged: a position is (row, column)",
    _SUPPRESSED - {(2, 3)}: "The maximum itself is above tau, too",
    _SUPPRESSED - {(2, 2)}: "That was right at G = 0.69; tau has sunk since",
    _SUPPRESSED | {(1, 4)}: "4.3 is below tau",
    frozenset({(2, 3)}): "Not only the maximum is above tau",
}
_OF_GRADIENT = {
    1.8: 'That is 0.6 of three gradients, as in "Where the gradient goes". Here delta is 0.44, and other '
    "positions are suppressed",
    1: "Without DRS it would be 1; what do the other suppressed positions hand to tau?",
    4: "Four gradients reach tau; which share of them does the maximum get?",
    _DELTA: "That is its own share; the others' gradients go through tau as well",
    _DELTA * 3: "The maximum's own gradient goes through tau, too",
    1 + _DELTA * 3: "The maximum is suppressed itself: its own gradient goes through tau like the others'",
    1 + _DELTA * 4: "The maximum is suppressed itself: nothing reaches it but through tau",
    0: "The maximum decides tau, and tau is in the result",
}


@check("02", "1", "three things: (tau, suppressed positions (row, column) from 0, gradient of the maximum)")
def five_by_five(answer):
    """The 5 x 5 map of notebook 02 with delta = 0.44 (02, exercise 1).

    tau is the upper bound; a position whose X is at or above it is suppressed, and the maximum is one. The
    positions are pairs, or a 5 x 5 mask; the gradient is what the maximum receives if g = 1 everywhere. A
    dictionary with the keys "tau", "positions" and "gradient" will do, too.
    """
    tau, positions, gradient = as_list(answer, ("tau", "positions", "gradient"))
    tau, gradient = as_number(tau, "tau"), as_number(gradient, "the gradient")
    positions = _positions(positions)
    if not alike(tau, _TAU):
        why = cause(tau, _OF_TAU, "What is the maximum of the map, and what delta of it?")
        raise Wrong(f"tau is not {tau:g}{why}")
    if positions != _SUPPRESSED:
        extra, missing = len(positions - _SUPPRESSED), len(_SUPPRESSED - positions)
        why = f"{extra} too many, {missing} missing. Compare each X with tau"
        why = _OF_POSITIONS.get(frozenset(positions), why)
        raise Wrong(f"tau is right, but the positions are not {sorted(positions)}. {why}")
    if not alike(gradient, _DELTA * 4):
        why = cause(gradient, _OF_GRADIENT, "See the formula for the gradient at the maximum, p = p*")
        raise Wrong(f"tau and the positions are right, but the gradient is not {gradient:g}{why}")


def _positions(value):
    rows = value.tolist() if hasattr(value, "tolist") else value
    listed = isinstance(rows, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in rows)
    if listed and list(map(len, rows)) == [5] * 5:
        return {(r, c) for r, row in enumerate(rows) for c, one in enumerate(row) if one}
    return as_pairs(rows, "the positions")


def _sigmoid(z):
    return 1 / (1 + math.exp(-z))


@check("02", "2", "two numbers: the upper bounds of map 1 and map 2")
def two_maps(answer):
    """The two upper bounds of a layer with two maps and a learnable controller (02, exercise 2).

    To 1 %: tau = max X * sigmoid(theta GAP(X)) with averages (2.0, 0.5), maxima (10, 4) and
    theta = ((0.4, -1), (0.2, 0.1)).
    """
    z, w = 0.4 * 2 - 1 * 0.5, 0.2 * 2 + 0.1 * 0.5  # theta GAP(X)
    G, H = _sigmoid(z), _sigmoid(w)
    e, f = math.exp(z), math.exp(w)
    by_columns = 10 * _sigmoid(0.4 * 2 + 0.2 * 0.5), 4 * _sigmoid(-1 * 2 + 0.1 * 0.5)
    causes = {
        (G, H): "Those are the control values; a bound is the maximum times G",
        (10 * z, 4 * w): "The sigmoid is left out",
        by_columns: "theta is read by columns: row k belongs to map k",
        (10 * _sigmoid(0.8), 4 * _sigmoid(0.05)): "Only the diagonal of theta is used: the other map has "
        "a say as well",
        (2 * G, 0.5 * H): "G is multiplied with the average, not with the maximum",
        (10 * e / (e + f), 4 * f / (e + f)): "softmax takes the place of the sigmoid",
        (10 * _sigmoid(0), 4 * _sigmoid(2.4)): "f is applied to the maxima: it reads the averages",
        (4 * H, 10 * G): "The two bounds are exchanged",
        (4 * G, 10 * H): "The two maxima are exchanged",
        (10 * math.tanh(z), 4 * math.tanh(w)): "tanh takes the place of the sigmoid",
    }
    same_numbers(answer, {"the bound of map 1": 10 * G, "the bound of map 2": 4 * H}, causes)


@check("02", "2", '"stronger", "weaker" or "not at all"')
def second_map(answer):
    """How map 1 is suppressed the more active map 2 is (02, exercise 2)."""
    why = {
        "weaker": "Look at the sign of theta_12, and at what a smaller G does to the bound.",
        "not at all": "f is a full matrix: which of its numbers joins the average of map 2 to G of map 1?",
    }
    choose(answer, "stronger", why)


@check("02", "4", '{"scaling": ..., "max pooling": ...}, each "holds" or "fails"')
def soft_properties(answer):
    """Which of the two properties the soft suppressor tau * tanh(X / tau) has (02, exercise 4)."""
    never = "The proof uses that the function never decreases and that tau stays. Does tanh decrease?"
    questions = {
        "scaling": ("holds", "With s x in place of x, what becomes of tau, and of X / tau?"),
        "max pooling": ("holds", never),
    }
    choose_each(answer, ("holds", "fails"), questions)


@check("02", "5", "a number: the G that weight decay pulls towards")
def weight_decay(answer):
    """What weight decay pulls G towards if the controller has a bias that starts at +3 (02, exercise 5).

    It is in [0, 1]. Weight decay acts on the bias as well.
    """
    causes = {
        _sigmoid(3): "That is where G starts. Weight decay shrinks the bias, too",
        0: "The weights go to 0; G is their sigmoid",
        1: "The weights go to 0; what is the sigmoid of 0?",
        3: "That is the bias at its start; G is between 0 and 1",
        0.55: "That is the paper's delta, which nothing here knows of",
    }
    same_numbers(answer, {"G": 0.5}, causes)


@check("03", "1", '"CAM", "learnable", "delta 0.90" or "DRS in layer 6"')
def delta_one(answer):
    """Which row Configuration(delta=1.0) must equal (03, exercise 1).

    "CAM" is the row without DRS, "learnable" the one with DRS in layers 1-6.
    """
    why = "With delta = 1 the bound is the maximum itself: which value is above it?"
    choose(answer, "CAM", dict.fromkeys(("learnable", "delta 0.90", "DRS in layer 6"), why))


@check("03", "6", '"flat", "empty", "sparse" or "unchanged"')
def delta_near_zero(answer):
    """A feature map, divided by its new maximum, when delta is close to 0 (03, exercise 6).

    "flat" is one value wherever the map is active, "empty" 0 everywhere, "sparse" the maximum alone.
    """
    why = {
        "empty": "Its values are small, but divide them by their new maximum, as equation 1 does.",
        "sparse": "The maximum is cut down to tau. Which active values are not?",
        "unchanged": "Which active values are above a bound that is close to 0, and what do they become?",
    }
    choose(answer, "flat", why)


@check("03", "2", "a list of the values of delta")
def within_two_sd(answer):
    """Which constant delta are within two sd of the best one in the reference results (03, exercise 2).

    A set or array will do, too, with or without the best one itself; sd is that of the best row.
    """
    reference = reference_table(1).dropna(subset=["delta"])
    best = reference.loc[reference["measured"].idxmax()]
    measured = dict(zip(reference["delta"].round(4), reference["measured"], strict=True))
    if isinstance(answer, (str, bytes)) or not hasattr(answer, "__iter__"):
        raise Wrong(f"the answer is {found(answer)}; expected a list of deltas such as [0.9, 0.8]")
    given = {round(as_number(value, "a delta"), 4) for value in answer}
    if unknown := sorted(given - set(measured)):
        verb = "is" if len(unknown) == 1 else "are"
        raise Wrong(f"{unknown} {verb} not among Table 1's constant deltas {sorted(measured)}")

    def near(distance):
        return frozenset(delta for delta, value in measured.items() if value >= best["measured"] - distance)

    right, with_best = near(2 * best["sd"]), given | {round(float(best["delta"]), 4)}
    if not given:
        raise Wrong("it is not []: the best one is within two sd of itself")
    if with_best == right:
        return
    counts = f"{len(given - right)} of them too many, {len(right - with_best)} missing"
    otherwise = f"{counts}. Subtract twice the sd of the best row from its mIoU"
    sd = reference["sd"]
    causes = {  # where two are equal, the last one counts
        near(best["sd"]): "that is one sd; take two",
        near(2 * sd.mean()): "that is with the mean sd of the table; take the sd of the best row",
        near(2 * sd.max()): "that is with the largest sd of the table; take the sd of the best row",
    }
    raise Wrong(f"it is not {sorted(given)}: {causes.get(frozenset(with_best), otherwise)}")


@check("04", "1", '"higher", "lower" or "the same"')
def larger_heads(answer):
    """In which layers DRS would do its work if heads were twice as large (04, exercise 1)."""
    shift = "Shift the band of head sizes up in the figure's top panel"
    why = f"{shift}. At which layer does the curve enter it now?"
    choose(answer, "higher", dict.fromkeys(("lower", "the same"), why))


@check("04", "2", "five whole numbers: the sides in pixels, block by block")
def vgg16_fields(answer):
    """The receptive fields of torchvision's VGG-16: five poolings of stride 2, no dilation (04, exercise 2).

    Those of a block are of its last convolution, or after its pooling.
    """
    given = as_numbers(answer, [f"block {number}" for number in range(1, 6)])
    rights = [5, 14, 40, 92, 196], [6, 16, 44, 100, 212]  # of the last convolutions, after the poolings
    if given in rights:
        return
    one, sizes, jumps = (
        "A block has two or three convolutions, not one",
        "Those are sizes of the outputs for an image of 224 pixels",
        "Those are the jumps",
    )
    causes = {
        (5, 14, 40, 92, 204): "That is the paper's network, whose fifth block is dilated",
        (5, 10, 18, 26, 34): "The jump between positions is not doubled by the poolings",
        (5, 9, 15, 21, 27): "Only convolutions are counted, without the poolings between them",
        (5, 13, 37, 85, 181): "The poolings double the jump, but their own kernel of 2 is not counted",
        (3, 8, 18, 38, 78): one,
        (4, 10, 22, 46, 94): one,
        (224, 112, 56, 28, 14): sizes,
        (112, 56, 28, 14, 7): sizes,
        (1, 2, 4, 8, 16): jumps,
        (2, 4, 8, 16, 32): jumps,
    }
    if why := causes.get(tuple(given)):
        raise Wrong(f"they are not {[int(value) for value in given]}. {why}")
    for right in rights:
        if count := next(k for k in range(5) if given[k] != right[k]):
            begins = f"the first {count} are right" if count > 1 else "the first is right"
            why = "r grows by (k - 1) d j, then j by the stride"
            raise Wrong(f"{begins}, but block {count + 1} is not {given[count]:g}. {why}")
    raise Wrong(f"block 1 is not {given[0]:g}: it has two 3x3 convolutions, and starts at r = j = 1")


@check("05", "1", "two numbers: N, and N if half of these images are taken for another species")
def refinement_mean(answer):
    """What N is where 60 of 100 similar images have M = 1 and the others 0.1 (05, exercise 1)."""
    average = "the most frequent value; the squared error asks for another kind of average"
    causes = {
        (1, 1): f"That is {average}",
        (1, 0.5): f"The first is {average}",
        (0.6, 0.3): "The other 40 images have 0.1, not 0",
        (0.55, 0.275): "1 and 0.1 are not equally frequent",
        (0.64, 0.64): "The first is right. An absent class has the target 0: what is the mean then?",
        (0.46, 0.23): "The shares are exchanged: 60 of 100 have M = 1",
        (0.64, 0.37): "The first is right. In the other half the target is 0, not 0.1",
        (0.64, 0.82): "The first is right. The other species' map is 0 where this one is answered for",
    }
    same_numbers(answer, {"N": 0.64, "N with half of the images taken for another species": 0.32}, causes)


@check("05", "5", '"mean map", "own map", "zero" or "noise"')
def shuffled_targets(answer):
    """What the refinement network learns from the targets of other images (05, exercise 5).

    "mean map" is each class's mean over all targets, "own map" the image's own map.
    """
    mean = "The loss is a mean over many images; what is the best answer that does not depend on the image?"
    why = {
        "own map": "Does the image still say anything about its target?",
        "zero": "The best constant under the squared error is a mean; is the mean of the targets 0?",
        "noise": mean,
    }
    choose(answer, "mean map", why)


_CONFLICT = "is saliency 0.10 below beta? A setting decides only where both cues are there"
_ABOVE = "is its largest map above alpha?"
_LEVEL = "is 0.10 above 50/255? What does background then score?"


def _not_class_2(background, ignored):
    """What is to be said of wrong labels where class 2 is right."""
    counted = "classes count from 1, and class 2 is named in the text"
    largest = "of several maps above alpha the largest wins"
    return {0: background, 1: counted, 3: counted, 5: largest, 255: ignored}


_LABELS = {
    "background": _not_class_2(_CONFLICT, f"a pixel is ignored if it has neither cue. {_ABOVE.capitalize()}"),
    "object": _not_class_2(_ABOVE, "two maps above alpha are no reason to ignore; the largest wins"),
    "ignore": _not_class_2("a pixel is background if saliency is below beta. Is 0.10?", _CONFLICT),
    "release": {
        2: _LEVEL,
        5: _LEVEL,
        255: "only salient pixels, or those with more than two scores above 0.9, are ignored by this rule",
    },
}


@check("06", "1", "four labels: for conflict background, object, ignore, and by the release's rule")
def conflict_pixel(answer):
    """The label of a pixel with maps 0.30 (class 2) and 0.25 (class 5) and saliency 0.10 (06, exercise 1).

    alpha is 0.2 and beta 0.06. A dictionary with the keys "background", "object", "ignore" and "release"
    will do, too.
    """
    given = as_list(answer, _LABELS)
    given = [as_number(value, f"the label for {name!r}") for value, name in zip(given, _LABELS, strict=True)]
    wrong = [
        f"{name!r} is not {value:g}: {_LABELS[name].get(value, 'labels are 0, a class, or 255')}"
        for name, value, right in zip(_LABELS, given, (2, 2, 2, 0), strict=True)
        if value != right
    ]
    if wrong:
        raise Wrong("; ".join(wrong))


@check("06", "2", '{"alpha": ..., "beta": ...}, each "up", "down" or "same"')
def ignored_share(answer):
    """How the share of ignored pixels moves when alpha rises, and when beta does (06, exercise 2).

    Background wins a conflict.
    """
    text = "A pixel is ignored if it has neither cue. Which cue does"
    questions = {
        name: (right, f"{text} {name} make, and does a higher one make more?")
        for name, right in (("alpha", "up"), ("beta", "down"))
    }
    choose_each(answer, _UP_DOWN, questions)


@check("06", "3", "pairs (d1, d2) of dilations")
def dense_pairs(answer):
    """For which dilations two 3x3 convolutions see every position of the square they span (06, exercise 3).

    d1 and d2 are at least 1; the order in a pair does not matter.
    """
    pairs = {tuple(sorted(pair)) for pair in as_pairs(answer, "the pairs")}
    if any(min(pair) < 1 for pair in pairs):
        raise Wrong(f"the pairs hold {min(pairs)}; a dilation is at least 1")
    right = {(1, 1), (1, 2), (1, 3)}
    for a, b in sorted(pairs - right):
        raise Wrong(f"({a}, {b}) leaves gaps: count the different i d1 + j d2 with i and j in -1, 0, 1")
    if missing := len(right - pairs):
        begins = "all of these are dense" if pairs else "no pair was given"
        more = f"{missing} more {'is' if missing == 1 else 'are'} missing"
        raise Wrong(f"{begins}, but {more}. At most how many positions of a row can be seen?")


@check("07", "1", '"flat", "falling", "rising" or "peaked"')
def all_ones_map(answer):
    """The curve over alpha < 1 of a map that is 1 everywhere for the image's classes (07, exercise 1)."""
    one = "alpha asks one question of a pixel: is its map above it?"
    why = f"{one} Which pixels answer otherwise at another alpha?"
    choose(answer, "flat", dict.fromkeys(("falling", "rising", "peaked"), why))


@check("07", "6", _RECALL_AND_PRECISION)
def without_saliency(answer):
    """Labels by "map > 0.2" alone, without saliency: learnable DRS compared with CAM (07, exercise 6)."""
    means = "See the means on background."
    questions = {
        "recall": ("up", "A cap brings the body closer to the head. More of the object above 0.2, or less?"),
        "precision": (
            "down",
            f"A cap lifts what is low, relative to the maximum, and background is low. {means}",
        ),
    }
    choose_each(answer, _UP_DOWN, questions)
