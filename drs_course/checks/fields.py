"""Checks of what notebooks 04 and 06 ask to be written about how far a position sees."""

import torch

from drs_course.checks.functions import Case, compare, one_number, randn
from drs_course.checks.verdict import check


def _field(layers, grow=lambda k, s, d, j: (k - 1) * d * j, start=1):
    """The side after a chain of layers; grow(k, s, d, j) is what a layer adds to it."""
    r, j = start, 1
    for k, s, d in layers:
        r += grow(k, s, d, j)
        j *= s
    return r


@check("04", "2", "a function f(layers) of a list of (kernel, stride, dilation): a whole number")
def receptive_field(answer):
    """The receptive field of a chain of layers (04, *The six layers in numbers* and exercise 2).

    The layers are convolutions and poolings, the first of them first. The number is the side r of the
    receptive field of the last,

        r <- r + (k - 1) d j,    j <- s j,    starting with r = j = 1.
    """
    block = [(3, 1, 1), (3, 1, 1), (2, 2, 1)]
    cases = (
        ([(3, 1, 1)],),
        ([*block, (3, 1, 1)],),
        ([(7, 2, 1), (3, 2, 1), (3, 1, 2), (1, 1, 1), (5, 3, 4), (3, 1, 1)],),
        (2 * block + [(3, 1, 12), (1, 1, 1)],),
        ([],),
    )
    slips = {
        "dilation is left out": {"grow": lambda k, s, d, j: (k - 1) * j},
        "the jump is left out": {"grow": lambda k, s, d, j: (k - 1) * d},
        "the jump is updated before r": {"grow": lambda k, s, d, j: (k - 1) * d * j * s},
        "k takes the place of k - 1": {"grow": lambda k, s, d, j: k * d * j},
        "d multiplies k instead of k - 1": {"grow": lambda k, s, d, j: (k * d - 1) * j},
        "r starts at 0": {"start": 0},
        "j is the layer's own stride, not the product": {"grow": lambda k, s, d, j: (k - 1) * d * s},
        "the layers are gone through from the last to the first": lambda layers: _field(layers[::-1]),
        "only one side of the kernel is counted": {"grow": lambda k, s, d, j: (k // 2) * d * j},
    }
    compare(answer, _field, cases, slips, read=one_number)


def _effective(gradient, share=0.9, measure=torch.abs, side=lambda half: 2 * half + 1):
    """The square that holds a share of the gradient; side(half): what is given of it."""
    g = measure(gradient.double())
    y, x = g.shape[0] // 2, g.shape[1] // 2
    for half in range(max(g.shape)):
        square = g[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1]
        if square.sum() >= share * g.sum():
            return side(half)
    return max(g.shape)


def _box(keep):
    """The side of the box around the values that are kept; keep(g, the largest)."""

    def function(gradient):
        places = keep(gradient.abs(), gradient.abs().max()).nonzero()
        return int((places.amax(0) - places.amin(0)).max()) + 1

    return function


@check("04", "4", "a function f(gradient), (H, W), H and W odd: a whole number, odd")
def effective_field(answer):
    """The effective receptive field (04, exercise 4).

    gradient is that of one central position with respect to the image, summed over its channels, with mixed
    signs. The number is the side of the smallest square with an odd side, around the middle, that holds at
    least 90 % of the absolute gradient.
    """
    cases = []
    for seed, h, w, width in ((50, 21, 31, 3.0), (51, 41, 25, 5.0), (52, 15, 15, 1.2), (53, 33, 33, 9.0)):
        y, x = torch.meshgrid(torch.arange(h) - h // 2, torch.arange(w) - w // 2, indexing="ij")
        near, far = (torch.exp(-(x**2 + y**2) / (2 * side**2)) for side in (width / 3, width))
        noise = randn(2, h, w, seed=seed).abs()
        cases.append((6 * near * noise[0] - 0.3 * far * noise[1],))  # negative values farther out
    cases.append((far * noise[0],))
    point = torch.zeros(7, 9)
    point[3, 4] = 2.0
    cases.append(Case((point,), "a gradient (7, 9) that is 2 in the middle and 0 elsewhere"))
    tenth = "a tenth of the maximum"
    slips = {
        "the distance from the middle is given, not the side": {"side": lambda half: half},
        "the side is twice the distance: the middle itself is not counted": {"side": lambda half: 2 * half},
        "the gradient is added up with its signs": {"measure": lambda g: g},
        "the gradient is squared, not taken absolute": {"measure": torch.square},
        "negative gradients are left out": {"measure": torch.relu},
        "10 % are held instead of 90 %": {"share": 0.1},
        "95 % are held instead of 90 %": {"share": 0.95},
        "99 % are held instead of 90 %": {"share": 0.99},
        f"the box around values above {tenth} is measured": _box(lambda g, peak: g >= 0.1 * peak),
        "all positions with a gradient are held: that is the theoretical field": _box(lambda g, peak: g > 0),
        "the square's area is given, not its side": {"side": lambda half: (2 * half + 1) ** 2},
    }
    compare(answer, _effective, cases, slips, read=one_number)


@check("06", "3", "a function f(d1, d2): a whole number")
def span_of_two(answer):
    """The side that two 3x3 convolutions in a row span together (06, exercise 3).

    d1 and d2 are their dilations, and the side is counted in positions: one convolution of kernel k and
    dilation d spans d (k - 1) + 1.
    """
    reach = "only the reach to one side is counted, without the other side and the position in the middle"
    slips = {
        "both spans are added and the middle is counted twice": lambda a, b: 2 + 2 * a + 2 * b,
        "the position in the middle is not counted": lambda a, b: 2 * a + 2 * b,
        "only one side of each kernel is counted": lambda a, b: 1 + a + b,
        reach: lambda a, b: a + b,
        "the spans are multiplied": lambda a, b: (2 * a + 1) * (2 * b + 1),
        "the dilations are multiplied": (lambda a, b: 1 + 2 * a * b, lambda a, b: 1 + 4 * a * b),
        "only the wider one counts: that is side by side, as in ASPP": lambda a, b: 2 * max(a, b) + 1,
        "k takes the place of k - 1": lambda a, b: 1 + 3 * a + 3 * b,
        "the area is given, not the side": lambda a, b: (1 + 2 * a + 2 * b) ** 2,
        "the weights of one kernel are counted": lambda a, b: 9,
        "only the first dilation is used": lambda a, b: 1 + 4 * a,
        "dilation is left out": lambda a, b: 5,
    }
    cases = ((1, 1), (1, 2), (3, 1), (6, 12), (5, 5))
    compare(answer, lambda d1, d2: 1 + 2 * d1 + 2 * d2, cases, slips, read=one_number)
