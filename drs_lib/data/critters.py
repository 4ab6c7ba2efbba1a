"""Critters: a data set that the program draws itself, so that a class needs neither a download nor a GPU.

Every animal has a *small head that identifies its species* (the markings of the face together with the
shape of the ears) and a *large body that hardly does* (its colour leans towards the species, no more). A
classifier therefore finds the head sufficient, and its class activation map covers the head and misses the
body: the phenomenon of the paper's Figure 1, for the paper's reason. Now and then a ball, a crate or a
mushroom stands in the scene: salient, but of no class.

Shapes are painted from signed distances with one pixel of antialiasing, in NumPy. Whole images only ever
see additions, multiplications, divisions, comparisons and square roots, which IEEE 754 rounds alike
everywhere, and the random stream is the frozen ``RandomState``: the same seed gives the same bytes on every
platform.
"""

import colorsys
import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from drs_lib.arguments import whole
from drs_lib.data.saliency import predict, shipped_identity

# A species is a face and a pair of ears. The six of the course are three faces by two pairs of ears, so that
# no part of the head identifies a species by itself: the network has to see the head as a whole.
SPECIES = {
    "zebbit": ("stripes", "long"),
    "strobear": ("stripes", "round"),
    "dotbit": ("spots", "long"),
    "pandot": ("spots", "round"),
    "maskit": ("mask", "long"),
    "maskoon": ("mask", "round"),
}
# Twelve other species, on which the starting weights and the saliency network are trained: the same faces
# with other ears, so that those weights know the parts of animals but no species of the course, as
# ImageNet's know fur.
OTHER_SPECIES = {
    f"{face}-{ears}": (face, ears)
    for face in ("stripes", "spots", "mask")
    for ears in ("pointed", "floppy", "horns", "antennae")
}

# Name of a split: its place in the random stream, and how many scenes it has unless told otherwise.
SPLITS = {"train": (0, 1000), "val": (1, 300), "pretrain": (2, 3000), "pretrain_val": (3, 600)}
DRAWING = 1  # raised when the same seed draws other bytes, so that stored runs are not mistaken for new ones
LINE = 0.9 / 128  # width of an outline
BODY_HUE_SPREAD = 0.09  # standard deviation of a body's hue around its species', in turns of the hue circle


def _ellipse(x, y, cx, cy, rx, ry):
    """Signed distance to an axis-parallel ellipse (first-order, exact on the outline)."""
    px, py = (x - cx) / rx, (y - cy) / ry
    k0 = np.sqrt(px * px + py * py)
    k1 = np.sqrt((px / rx) ** 2 + (py / ry) ** 2)
    return np.where(k1 > 0, k0 * (k0 - 1) / np.maximum(k1, 1e-6), -min(rx, ry))


def _capsule(x, y, x0, y0, x1, y1, r0, r1):
    """Signed distance to a limb: a thick segment whose radius goes from r0 to r1."""
    dx, dy = x1 - x0, y1 - y0
    t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    qx, qy = x - x0 - t * dx, y - y0 - t * dy
    return np.sqrt(qx * qx + qy * qy) - (r0 + (r1 - r0) * t)


def _polygon(x, y, points):
    """Signed distance to a convex polygon, corners in clockwise order as seen on screen."""
    d = None
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        nx, ny = y1 - y0, x0 - x1
        n = math.sqrt(nx * nx + ny * ny)
        side = (x - x0) * (nx / n) + (y - y0) * (ny / n)
        d = side if d is None else np.maximum(d, side)
    return d


def _rgb(hue, saturation, value):
    return np.float32([round(255 * c, 3) for c in colorsys.hsv_to_rgb(hue % 1.0, saturation, value)])


class _Canvas:
    """A float image in [0, 255], the class mask and the salient pixels, painted shape by shape. One unit is
    the image's side."""

    def __init__(self, size):
        self.size = size
        self.image = np.zeros((size, size, 3), np.float32)
        self.mask = np.zeros((size, size), np.uint8)
        self.salient = np.zeros((size, size), bool)

    def window(self, cx, cy, reach):
        """Pixel centres of the square around (cx, cy), as a view to paint on."""
        lo = [min(max(int(math.floor((c - reach) * self.size)), 0), self.size) for c in (cx, cy)]
        hi = [min(max(int(math.ceil((c + reach) * self.size)), 0), self.size) for c in (cx, cy)]
        rows, cols = slice(lo[1], hi[1]), slice(lo[0], hi[0])
        xs = ((np.arange(lo[0], hi[0], dtype=np.float32) + np.float32(0.5)) / np.float32(self.size))[None, :]
        ys = ((np.arange(lo[1], hi[1], dtype=np.float32) + np.float32(0.5)) / np.float32(self.size))[:, None]
        return rows, cols, xs, ys

    def cover(self, distance):
        """How much of each pixel is inside of a shape, 0..1, from its signed distance."""
        return np.clip(0.5 - distance * np.float32(self.size), 0, 1).astype(np.float32)

    def paint(self, rows, cols, coverage, colour):
        view = self.image[rows, cols]
        view += coverage[..., None] * (colour - view)


class _Pose(NamedTuple):
    """Where an animal stands: its body's centre and half-length, facing (+1 right, -1 left), tilt."""

    cx: float
    cy: float
    length: float
    facing: int
    tilt: float


SPOTS = ((-0.5, -0.3), (0.5, -0.3), (0, 0.1), (-0.42, 0.55), (0.42, 0.55))
# The right ear on a head of radius 1, y down: limbs (x, y, x, y, radius, radius) and ellipses (x, y, rx, ry).
EARS = {
    "round": [(0.8, -0.8, 0.5, 0.5)],
    "long": [(0.4, -0.7, 0.55, -1.9, 0.26, 0.2)],
    "floppy": [(0.8, -0.5, 1.2, 0.75, 0.22, 0.34)],
    "horns": [(0.5, -0.75, 1.1, -1.1, 0.2, 0.16), (1.1, -1.1, 0.95, -1.75, 0.16, 0.05)],
    "antennae": [(0.3, -0.8, 0.6, -1.55, 0.09, 0.09), (0.62, -1.65, 0.25, 0.25)],
}


def _face(kind, u, v):
    """Marked part of a head of radius 1 at local coordinates (u, v), as a signed distance."""
    if kind == "stripes":
        return np.abs(u - np.floor(u / 0.56 + 0.5) * np.float32(0.56)) - 0.15
    if kind == "spots":
        return np.minimum.reduce([_ellipse(u, v, x, y, 0.24, 0.24) for x, y in SPOTS])
    return np.abs(v + 0.12) - 0.3  # a mask


def _ears(kind, u, v):
    """Both ears on a head of radius 1, as a signed distance."""
    shapes = []
    for side in (-1.0, 1.0):
        if kind == "pointed":
            corners = [(side * 0.95, -0.25), (side * 0.2, -0.8), (side * 0.85, -1.6)]
            shapes.append(_polygon(u, v, corners[::-1] if side > 0 else corners))
            continue
        for x, y, *rest in EARS[kind]:
            if len(rest) == 2:
                shapes.append(_ellipse(u, v, side * x, y, *rest))
            else:
                shapes.append(_capsule(u, v, side * x, y, side * rest[0], *rest[1:]))
    return np.minimum.reduce(shapes)


def _draw_animal(canvas, rng, parts, hue, label, pose):
    """Paint an animal of the species (face, ears) and enter it in the mask; its head (x, y, radius)."""
    px = np.float32(1.0 / canvas.size)
    width = pose.length * rng.uniform(0.46, 0.58)
    radius = width * rng.uniform(0.55, 0.68)
    rows, cols, xs, ys = canvas.window(pose.cx, pose.cy, 1.9 * pose.length + 0.03)
    cos, sin = (np.float32(f(pose.tilt)) for f in (math.cos, math.sin))
    # Local frame: x towards the nose, y down, unit = image side.
    dx, dy = xs - np.float32(pose.cx), ys - np.float32(pose.cy)
    x, y = (cos * dx + sin * dy) * np.float32(pose.facing), cos * dy - sin * dx

    body_hue = hue + rng.normal(0, BODY_HUE_SPREAD)
    saturation, value = rng.uniform(0.32, 0.5), rng.uniform(0.62, 0.85)
    fur, shade = _rgb(body_hue, saturation, value), _rgb(body_hue, saturation + 0.12, value * 0.68)
    outline = _rgb(body_hue, 0.5, 0.22)
    # The head's colours are drawn alike for every species: colour alone identifies nobody.
    head_hue = rng.uniform()
    pale, dark = _rgb(head_hue, 0.3, 0.95), _rgb(head_hue + rng.uniform(-0.08, 0.08), 0.9, 0.42)

    body = _ellipse(x, y, 0, 0, pose.length, width)
    # In arrays of one, which both NumPy 1 and 2 compute in float64; a lone float64 only NumPy 2 does.
    stance = rng.uniform(-0.08, 0.08, 4)
    length, hip, foot, thick, thin = (pose.length, *(k * width for k in (0.5, 1.55, 0.2, 0.15)))
    legs = [
        _capsule(x, y, k * length, hip, (k + s) * length, foot, thick, thin)
        for k, s in zip((-0.68, -0.45, 0.42, 0.66), stance.reshape(4, 1), strict=True)
    ]
    wag = rng.uniform(-0.5, 0.4)
    tip_x, tip_y = -1.42 * pose.length, (wag - 0.75) * width
    tail = _capsule(x, y, -0.88 * pose.length, -0.15 * width, tip_x, tip_y, 0.14 * width, 0.2 * width)
    hx, hy = rng.uniform(0.92, 1.02) * pose.length, -rng.uniform(0.72, 0.95) * width
    neck = _capsule(x, y, 0.6 * pose.length, -0.1 * width, hx, hy, 0.42 * width, 0.5 * radius)
    # The head faces the viewer: its own axes are the image's, whatever the body's facing.
    # As NumPy 2 adds a number to a float32; NumPy 1 would turn a Python float into a float64.
    cx, cy = (c if isinstance(c, np.float64) else np.float32(c) for c in (pose.cx, pose.cy))
    head_cx = cx + cos * np.float32(pose.facing * hx) - sin * np.float32(hy)
    head_cy = cy + sin * np.float32(pose.facing * hx) + cos * np.float32(hy)
    head_cx, head_cy = float(head_cx), float(head_cy)
    nod = rng.uniform(-0.2, 0.2)
    nc, ns = np.float32(math.cos(nod)), np.float32(math.sin(nod))
    dx, dy = ((at - np.float32(c)) / np.float32(radius) for at, c in ((xs, head_cx), (ys, head_cy)))
    u, v = nc * dx + ns * dy, nc * dy - ns * dx

    def cover(distance, grow=0.0):
        return np.clip(0.5 - (distance - grow) / px, 0, 1).astype(np.float32)

    paint = partial(canvas.paint, rows, cols)
    for group, colour in (((tail, *legs[::2]), shade), ((body, neck, *legs[1::2]), fur)):
        joined = np.minimum.reduce(group)
        paint(cover(joined, LINE), outline)
        paint(cover(joined), colour)
    _draw_texture(paint, cover, rng, x, y, body, pose.length, width, shade)
    head = _draw_head(paint, cover, parts, u, v, np.float32(radius), pale, dark, outline)
    here = cover(np.minimum.reduce([body, neck, tail, *legs, head]), LINE) > 0.5
    canvas.mask[rows, cols][here] = label
    canvas.salient[rows, cols][here] = True
    return head_cx, head_cy, radius


def _draw_texture(paint, cover, rng, x, y, body, length, width, shade):
    """Belly in shade and a few flecks: the body has texture, but the same for every species."""
    paint(np.clip((y / np.float32(width) - 0.1) * 0.8, 0, 0.75) * cover(body), shade)
    for _ in range(rng.randint(3, 7)):
        a, b, r = rng.uniform(-0.7, 0.45), rng.uniform(-0.6, 0.5), rng.uniform(0.07, 0.16)
        fleck = _ellipse(x, y, a * length, b * width, 1.3 * r * width, r * width)
        paint(cover(fleck) * cover(body) * np.float32(0.7), shade)


def _draw_head(paint, cover, parts, u, v, radius, pale, dark, outline):
    """A head in its local coordinates (u, v), with ears, marks, eyes and nose; its signed distance."""
    face, ears = parts
    ears = _ears(ears, u, v) * radius
    skull = _ellipse(u, v, 0, 0, 1, 1) * radius
    paint(cover(ears, LINE), outline)
    paint(cover(ears), dark)
    paint(cover(skull, LINE), outline)
    paint(cover(skull), pale)
    paint(cover(skull) * cover(_face(face, u, v) * radius), dark)
    for s in (-0.36, 0.36):
        paint(cover(_ellipse(u, v, s, -0.12, 0.17, 0.2) * radius), np.float32([250, 250, 245]))
        paint(cover(_ellipse(u, v, s, -0.1, 0.09, 0.12) * radius), np.float32([20, 20, 25]))
    paint(cover(_ellipse(u, v, 0, 0.42, 0.16, 0.11) * radius), outline)
    return np.minimum(skull, ears)


def _upsample(grid, size):
    """Bilinear enlargement of a small (g, g, ...) grid to (size, size, ...), corners aligned."""
    g = grid.shape[0]
    t = np.arange(size, dtype=np.float32) * np.float32((g - 1) / (size - 1))
    i = np.minimum(t.astype(np.int64), g - 2)
    f = (t - i).reshape(-1, *[1] * (grid.ndim - 1))
    rows = grid[i] * (1 - f) + grid[i + 1] * f
    f = f.reshape(1, -1, *[1] * (grid.ndim - 2))
    return rows[:, i] * (1 - f) + rows[:, i + 1] * f


def _draw_background(canvas, rng):
    hue = rng.uniform()
    sky = _rgb(hue, rng.uniform(0.1, 0.3), rng.uniform(0.7, 0.95))
    ground = _rgb(hue + rng.uniform(-0.2, 0.2), rng.uniform(0.2, 0.45), rng.uniform(0.45, 0.75))
    size, horizon = canvas.size, rng.uniform(0.35, 0.65)
    ys = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size))[:, None, None]
    blend = np.clip((ys - np.float32(horizon)) * np.float32(rng.uniform(2, 8)) + np.float32(0.5), 0, 1)
    canvas.image[:] = sky + blend * (ground - sky)
    canvas.image += _upsample(rng.uniform(-26, 26, (9, 9, 1)).astype(np.float32), size)
    # Clutter: leaves, stones and stalks, in colours that animals have too.
    for _ in range(rng.randint(6, 14)):
        cx, cy, r = rng.uniform(), rng.uniform(0.1, 1.0), rng.uniform(0.012, 0.055)
        colour = _rgb(rng.uniform(), rng.uniform(0.2, 0.6), rng.uniform(0.35, 0.9))
        stalk = rng.uniform() < 0.4
        lean, squash = rng.uniform(-0.06, 0.06), rng.uniform(0.5, 1.0)
        rows, cols, xs, ys2 = canvas.window(cx, cy, 0.2)
        if stalk:
            d = _capsule(xs, ys2, cx, cy, cx + lean, cy - 2.5 * r, 0.2 * r, 0.12 * r)
        else:
            d = _ellipse(xs, ys2, cx, cy, r, r * squash)
        canvas.paint(rows, cols, canvas.cover(d) * np.float32(0.85), colour)


def _draw_props(canvas, rng):
    """Balls, crates and mushrooms: salient as an animal is, but of no class."""
    for _ in range(rng.choice((0, 0, 1))):
        cx, cy, r = rng.uniform(0.08, 0.92), rng.uniform(0.25, 0.9), rng.uniform(0.06, 0.11)
        hue = rng.uniform()
        fill, shade, outline = _rgb(hue, 0.5, 0.8), _rgb(hue, 0.6, 0.55), _rgb(hue, 0.5, 0.22)
        rows, cols, xs, ys = canvas.window(cx, cy, 2 * r)
        kind = rng.randint(3)
        if kind == 0:
            outer = _ellipse(xs, ys, cx, cy, r, r)
            second = np.abs(xs - np.float32(cx) + 0.4 * (ys - np.float32(cy))) - 0.22 * r
        elif kind == 1:
            outer = np.maximum(np.abs(xs - np.float32(cx)), np.abs(ys - np.float32(cy))) - 0.85 * r
            second = np.abs(ys - np.float32(cy)) - 0.2 * r
        else:
            cap = np.maximum(_ellipse(xs, ys, cx, cy, r, 0.8 * r), ys - np.float32(cy))
            outer = np.minimum(cap, _capsule(xs, ys, cx, cy, cx, cy + 0.7 * r, 0.3 * r, 0.4 * r))
            second = ys - np.float32(cy)
        coverage = [canvas.cover(d) for d in (outer - LINE, outer, np.maximum(outer, second))]
        for amount, colour in zip(coverage, (outline, fill, shade), strict=True):
            canvas.paint(rows, cols, amount, colour)
        canvas.salient[rows, cols][coverage[0] > 0.5] = True


class Scene(NamedTuple):
    """image uint8 (size, size, 3); mask uint8 (size, size), 0 background, 1..C species; heads, one (x, y,
    radius, label) in pixels for each animal; salient bool (size, size), the animals and the props."""

    image: np.ndarray
    mask: np.ndarray
    heads: list
    salient: np.ndarray


def _poses(rng, animals):
    """Where the animals stand: heads inside the image, and no head behind another animal."""
    while True:
        poses = []
        drop = rng.choice((-1, 1)) * rng.uniform(0.04, 0.14)
        for k in range(animals):
            length = rng.uniform(0.24, 0.36) if animals == 1 else rng.uniform(0.15, 0.21)
            facing = 1 if rng.uniform() < 0.5 else -1
            cx = rng.uniform(0.4, 0.6) if animals == 1 else 0.27 + 0.46 * k + rng.uniform(-0.04, 0.04)
            room = 1.38 * length  # from the body's centre to the far side of the head
            cx = min(cx, 1 - room) if facing > 0 else max(cx, room)
            cy = 0.55 + rng.uniform(-0.06, 0.06) + (0 if animals == 1 else drop * (1 - 2 * k))
            poses.append(_Pose(cx, cy, length, facing, rng.uniform(-0.3, 0.3)))
        heads = [(p.cx + p.facing * p.length, p.cy - 0.45 * p.length) for p in poses]
        if all(
            math.hypot(x - other.cx, (y - other.cy) * 1.5) > 1.3 * other.length + 0.4 * own.length
            for (x, y), own in zip(heads, poses, strict=True)
            for other in poses
            if other is not own
        ):
            return poses


def species_of(split):
    """The species of a split, name -> (face, ears): the course's six, or the twelve others."""
    return OTHER_SPECIES if split.startswith("pretrain") else SPECIES


def draw(split, index, size=128, seed=0):
    """The `Scene` number ``index`` of a split, a function of the arguments alone."""
    code, _ = SPLITS[split]
    species = list(species_of(split).values())
    rng = np.random.RandomState([seed, code, index])
    canvas = _Canvas(size)
    _draw_background(canvas, rng)
    _draw_props(canvas, rng)
    animals = 2 if rng.uniform() < 0.4 else 1
    chosen = rng.permutation(len(species))[:animals]
    heads = []
    for k, pose in zip(chosen, _poses(rng, animals), strict=True):
        x, y, r = _draw_animal(canvas, rng, species[k], k / len(species), int(k) + 1, pose)
        heads.append((x * size, y * size, r * size, int(k) + 1))
    light = np.float32(rng.uniform(0.85, 1.1))
    noise = np.random.RandomState([seed, code, index, size]).randint(-10, 11, (size, size, 3))
    image = np.clip(np.floor(canvas.image * light + np.float32(0.5)) + noise, 0, 255).astype(np.uint8)
    return Scene(image, canvas.mask, heads, canvas.salient)


class Critters:
    """The drawn data set: one or two animals of six species in an image, each species known by its head.

    Args:
        split: "train" or "val" of the course; "pretrain" or "pretrain_val", twelve other species, from which
            the shipped weights were trained.
        size: side of the images in pixels, a multiple of 8 from 32 on.
        seed: another seed draws another data set.
        length: number of images; the split's own (1,000, 300, 3,000, 600) if None. A longer split begins
            with the shorter one.

    Scenes are drawn when they are first asked for, and kept. ``saliency(i)`` is not the ground truth blurred:
    it comes from a small network trained on the twelve other species, class-agnostic, as PoolNet's comes from
    another data set.

    Raises:
        ValueError: a split that isn't there, or numbers it can't draw.
    """

    def __init__(self, split, size=128, seed=0, length=None):
        if split not in SPLITS:
            raise ValueError(f"there is no Critters split {split!r}; expected one of {', '.join(SPLITS)}")
        length = SPLITS[split][1] if length is None else whole("Critters: length", length)
        size, seed = whole("Critters: size", size, 32), whole("Critters: seed", seed, 0, 2**32 - 1)
        if size % 8:
            raise ValueError(f"Critters: size is {size}: expected a multiple of 8, at least 32")
        self.split, self.size, self.seed = split, size, seed
        self.classes = tuple(species_of(split))
        self.num_classes = len(self.classes)
        self.names = [f"{split}_{i:05d}" for i in range(length)]
        self._images = np.zeros((length, 3, size, size), np.uint8)
        self._masks, self._saliency = (np.zeros((length, size, size), np.uint8) for _ in range(2))
        self._heads = [None] * length
        self._has_saliency = np.zeros(length, bool)

    @property
    def fingerprint(self):
        """What determines the data, without drawing them; see `drs_lib.data`."""
        return (
            f"critters-{DRAWING} {self.split} size {self.size} seed {self.seed} length {len(self)} "
            f"saliency {shipped_identity()}"
        )

    def __len__(self):
        return len(self.names)

    def __repr__(self):
        return f"Critters({self.split!r}, size={self.size}, seed={self.seed}, length={len(self)})"

    def __getitem__(self, i):
        i = self._draw(i)
        labels = torch.zeros(self.num_classes)
        labels[[label - 1 for *_, label in self._heads[i]]] = 1
        return torch.from_numpy(self._images[i]), labels

    def mask(self, i):
        """Pixel labels uint8 (size, size): 0 background, 1..C species. For scoring only."""
        return self._masks[self._draw(i)]

    def heads(self, i):
        """The heads in image i: [(x, y, radius, label), ...] in pixels. For scoring only, like the mask."""
        return self._heads[self._draw(i)]

    def saliency(self, i):
        """Saliency uint8 (size, size), 0..255 for 0..1, from the shipped saliency network."""
        i = range(len(self))[i]
        if not self._has_saliency[i]:
            # Always the same 50 images together, so that a map does not depend on which was asked for first.
            block = slice(i - i % 50, min(i - i % 50 + 50, len(self)))
            for k in range(block.start, block.stop):
                self._draw(k)
            self._saliency[block] = predict(self._images[block])
            self._has_saliency[block] = True
        return self._saliency[i]

    def _draw(self, i):
        i = range(len(self))[i]  # negative indices, and IndexError past the end
        if self._heads[i] is None:
            scene = draw(self.split, i, self.size, self.seed)
            self._images[i], self._masks[i] = scene.image.transpose(2, 0, 1), scene.mask
            self._heads[i] = scene.heads
        return i
