"""Checks of what notebooks 04 and 06 ask to be written about how far a position sees."""

import torch

from .functions import Case, Slip, Task, compare, one_number, randn
from .verdict import check


def _walk(layers, grow, start=1, early=False):
    r, j = start, 1
    for k, s, d in layers:
        if early:
            j *= s
        r += grow(k, s, d, j)
        if not early:
            j *= s
    return r


def _field(layers):
    return _walk(layers, lambda k, s, d, j: (k - 1) * d * j)


@check("04", "2", "a function f(layers) of a list of (kernel, stride, dilation): a whole number")
def receptive_field(answer):
    """The receptive field of a chain of layers (04, *The six layers in numbers* and exercise 2).

    The answer is a function f(layers), layers a list of (kernel, stride, dilation) of convolutions and
    poolings, the first of them first. It returns the side r of the receptive field of the last,

        r <- r + (k - 1) d j,    j <- s j,    starting with r = j = 1.
    """
    block = [(3, 1, 1), (3, 1, 1), (2, 2, 1)]
    cases = (
        Case(([(3, 1, 1)],)),
        Case(([(3, 1, 1), (3, 1, 1), (2, 2, 1), (3, 1, 1)],)),
        Case(([(7, 2, 1), (3, 2, 1), (3, 1, 2), (1, 1, 1), (5, 3, 4), (3, 1, 1)],)),
        Case((2 * block + [(3, 1, 12), (1, 1, 1)],)),
        Case(([],)),
    )
    slips = (
        Slip(lambda ls: _walk(ls, lambda k, s, d, j: (k - 1) * j), "dilation is left out"),
        Slip(lambda ls: _walk(ls, lambda k, s, d, j: (k - 1) * d), "the jump is left out"),
        Slip(
            lambda ls: _walk(ls, lambda k, s, d, j: (k - 1) * d * j, early=True),
            "the jump is updated before r",
        ),
        Slip(lambda ls: _walk(ls, lambda k, s, d, j: k * d * j), "k takes the place of k - 1"),
        Slip(lambda ls: _walk(ls, lambda k, s, d, j: (k * d - 1) * j), "d multiplies k instead of k - 1"),
        Slip(lambda ls: _walk(ls, lambda k, s, d, j: (k - 1) * d * j, start=0), "r starts at 0"),
        Slip(
            lambda ls: _walk(ls, lambda k, s, d, j: (k - 1) * d * s),
            "j is the layer's own stride, not the product",
        ),
        Slip(lambda ls: _field(ls[::-1]), "the layers are gone through from the last to the first"),
        Slip(
            lambda ls: _walk(ls, lambda k, s, d, j: (k // 2) * d * j),
            "only one side of the kernel is counted",
        ),
    )
    compare(answer, Task(("layers",), _field, cases, slips, read=one_number))


def _effective(gradient, share=0.9, measure=torch.abs):
    g = measure(gradient.double())
    y, x = g.shape[0] // 2, g.shape[1] // 2
    for half in range(max(g.shape)):
        square = g[max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1]
        if square.sum() >= share * g.sum():
            return 2 * half + 1
    return max(g.shape)


def _radius(gradient):
    return (_effective(gradient) - 1) // 2


def _box(gradient, keep):
    rows, columns = keep(gradient.abs()).nonzero(as_tuple=True)
    return max(int(rows.max() - rows.min()), int(columns.max() - columns.min())) + 1


def _halves(gradient, threshold):
    return _box(gradient, lambda g: g >= threshold * g.max())


@check("04", "4", "a function f(gradient), (H, W), H and W odd: a whole number, odd")
def effective_field(answer):
    """The effective receptive field (04, exercise 4).

    The answer is a function f(gradient): the gradient of one central position with respect to the image,
    summed over its channels, a tensor (H, W) with H and W odd and signs mixed. It returns the side of the
    smallest square with an odd side, around the middle, that holds at least 90 % of the absolute gradient.
    """
    cases = []
    for seed, (h, w), width in (
        (50, (21, 31), 3.0),
        (51, (41, 25), 5.0),
        (52, (15, 15), 1.2),
        (53, (33, 33), 9.0),
    ):
        y, x = torch.meshgrid(torch.arange(h) - h // 2, torch.arange(w) - w // 2, indexing="ij")
        near, far = (torch.exp(-(x**2 + y**2) / (2 * side**2)) for side in (width / 3, width))
        noise = randn(2, h, w, seed=seed).abs()
        cases.append(Case((6 * near * noise[0] - 0.3 * far * noise[1],)))  # negative values farther out
    cases.append(Case((far * noise[0],)))
    point = torch.zeros(7, 9)
    point[3, 4] = 2.0
    cases.append(Case((point,), "a gradient (7, 9) that is 2 in the middle and 0 elsewhere"))
    slips = (
        Slip(_radius, "the distance from the middle is given, not the side"),
        Slip(lambda g: 2 * _radius(g), "the side is twice the distance: the middle itself is not counted"),
        Slip(lambda g: _effective(g, measure=lambda v: v), "the gradient is added up with its signs"),
        Slip(lambda g: _effective(g, measure=torch.square), "the gradient is squared, not taken absolute"),
        Slip(lambda g: _effective(g, measure=torch.relu), "negative gradients are left out"),
        Slip(lambda g: _effective(g, 0.1), "10 % are held instead of 90 %"),
        Slip(lambda g: _effective(g, 0.95), "95 % are held instead of 90 %"),
        Slip(lambda g: _effective(g, 0.99), "99 % are held instead of 90 %"),
        Slip(lambda g: _halves(g, 0.1), "the box around values above a tenth of the maximum is measured"),
        Slip(lambda g: _halves(g, 0.9), "the box around values above 90 % of the maximum is measured"),
        Slip(
            lambda g: _box(g, lambda v: v > 0),
            "all positions with a gradient are held: that is the theoretical field",
        ),
        Slip(lambda g: _effective(g) ** 2, "the square's area is given, not its side"),
    )
    compare(answer, Task(("gradient",), _effective, tuple(cases), slips, read=one_number))


@check("06", "3", "a function f(d1, d2): a whole number")
def span_of_two(answer):
    """The side that two 3x3 convolutions in a row span together (06, exercise 3).

    The answer is a function f(d1, d2) of their dilations. It returns a number of positions: one convolution
    of kernel k and dilation d spans d (k - 1) + 1.
    """
    cases = tuple(Case(pair) for pair in ((1, 1), (1, 2), (3, 1), (6, 12), (5, 5)))
    slips = (
        Slip(lambda a, b: 2 + 2 * a + 2 * b, "both spans are added and the middle is counted twice"),
        Slip(lambda a, b: 2 * a + 2 * b, "the position in the middle is not counted"),
        Slip(lambda a, b: 1 + a + b, "only one side of each kernel is counted"),
        Slip(
            lambda a, b: a + b,
            "only the reach to one side is counted, without the other side and the position in the middle",
        ),
        Slip(lambda a, b: (2 * a + 1) * (2 * b + 1), "the spans are multiplied"),
        Slip(lambda a, b: 1 + 2 * a * b, "the dilations are multiplied"),
        Slip(lambda a, b: 1 + 4 * a * b, "the dilations are multiplied"),
        Slip(lambda a, b: 2 * max(a, b) + 1, "only the wider one counts: that is side by side, as in ASPP"),
        Slip(lambda a, b: 1 + 3 * a + 3 * b, "k takes the place of k - 1"),
        Slip(lambda a, b: (1 + 2 * a + 2 * b) ** 2, "the area is given, not the side"),
        Slip(lambda a, b: 9, "the weights of one kernel are counted"),
        Slip(lambda a, b: 1 + 4 * a, "only the first dilation is used"),
        Slip(lambda a, b: 5, "dilation is left out"),
    )
    compare(answer, Task(("d1", "d2"), lambda a, b: 1 + 2 * a + 2 * b, cases, slips, read=one_number))
