"""What is uploaded to a lab: a picture comes of it, or a sentence, and the lab goes on."""

import io
import struct
import zlib
from datetime import datetime

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from released import release_state
from torch.nn.functional import interpolate

from drs_course.download import FILES
from drs_course.labs import ImageLab
from drs_course.labs import image as image_module
from drs_course.labs.image import AUTHORS, LONGEST
from drs_course.labs.upload import MOST_BYTES, ImageRefused, read_image
from drs_course.paper import Configuration
from drs_course.stages import STAGE_VERSIONS, Pipeline
from drs_lib.data import VOC_CLASSES, normalize
from drs_lib.maps import localization_maps
from drs_lib.networks import classifier
from drs_lib.recipes import get_budget

NOISE = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
PHOTO = Image.fromarray(NOISE)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, color, pixels, extra=b"", after=b""):
    """A PNG file of any header over these compressed pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


def white_png(width, height):
    """One colour, a bit a pixel: ten thousand times smaller than its pixels."""
    pack = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((width + 7) // 8)
    return png(width, height, 1, 0, b"".join(pack.compress(row) for _ in range(height)) + pack.flush())


def grey_png(value=16, depth=8, **parts):
    pixels = (b"\0" + struct.pack(">H" if depth == 16 else ">B", value) * 40) * 30
    return png(40, 30, depth, 0, zlib.compress(pixels), **parts)


def gif_claiming(screen, frame):
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0;"


def jpeg_in_passes(count):
    """A progressive JPEG of 12 megapixels whose last pass comes ``count`` times more."""
    data = saved(Image.new("RGB", (4000, 3000), (9, 90, 200)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


JPEG, PNG = saved(PHOTO, "JPEG"), saved(PHOTO, "PNG")
BOMB = zlib.compress(b"a" * 200_000_000, 9)
REFUSED = {
    "empty": (b"", "is empty"),
    "text": (b"dear lab, this is a text", "not an image"),
    "a JPEG's beginning": (JPEG[:20], "not an image"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "damaged or not complete"),
    "half a PNG": (PNG[: len(PNG) // 2], "damaged or not complete"),
    "a PNG with a wrong byte": (PNG[:5000] + b"\0\1\2\3" + PNG[5004:], "damaged or not complete"),
    "100 megapixels": (white_png(10_000, 10_000), "10000 x 10000 pixels"),
    "41 megapixels": (white_png(6_400, 6_400), "6400 x 6400 pixels"),
    "bomb of 400 megapixels": (white_png(20_000, 20_000), "more than 100 million pixels"),
    "bomb of a terapixel": (png(2**20, 2**20, 8, 0, zlib.compress(b"x")), "more than 100 million"),
    "GIF whose frame is larger than it": (gif_claiming((20, 20), (65535, 65535)), "more than 100 million"),
    "zipped text of 200 MB": (grey_png(extra=chunk(b"zTXt", b"k\0\0" + BOMB)), "damaged"),
    "colour profile of 200 MB": (grey_png(extra=chunk(b"iCCP", b"k\0\0" + BOMB)), "damaged"),
    "JPEG in a thousand passes": (jpeg_in_passes(1000), "coded in 1010 passes"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg' width='90' height='90'/>", "an SVG"),
    "EPS": (saved(PHOTO, "EPS"), "PostScript"),
    "PDF": (saved(PHOTO, "PDF"), "a PDF"),
    "TIFF": (saved(PHOTO, "TIFF"), "a TIFF"),
    "ICO": (saved(PHOTO, "ICO"), "an icon"),
    "TGA": (saved(PHOTO, "TGA"), "of another kind"),
    "an iPhone's": (b"\0\0\0\x24ftypheic" + b"\0" * 100, "a HEIC"),
    "too many bytes": (b"\xff\xd8" + b"\0" * MOST_BYTES, "10.1 MB; at most 10 MB"),
    "one pixel": (saved(Image.new("RGB", (1, 1)), "PNG"), "1 x 1 pixels; both sides must have 16"),
    "15 pixels": (saved(Image.new("RGB", (99, 15)), "PNG"), "99 x 15 pixels"),
    "strip": (saved(Image.new("RGB", (4000, 20)), "PNG"), "strip of 4000 x 20 pixels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_usable_image_is_refused_in_a_sentence(name):
    data, says = REFUSED[name]
    with pytest.raises(ImageRefused) as refusal:
        read_image(data, 64)
    text = str(refusal.value)
    assert says in text and text.endswith(".") and text[0].isupper()
    advice = ("Upload", "Make a smaller copy", "Save it again", "Crop it")
    assert any(word in text for word in advice), "what to do is said too"


@pytest.mark.parametrize("says", ["000 pixels", "100 million", "400 pixels", "10.1 MB", "passes"])
def test_nothing_is_decoded_of_what_claims_too_much(monkeypatch, says):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("was decoded"))
    for data in [data for data, sentence in REFUSED.values() if says in sentence]:
        with pytest.raises(ImageRefused, match=says):
            read_image(data, 64)


def solid(mode, color, size=(40, 30)):
    return Image.new(mode, size, color)


def palette_image(index=1):
    image = Image.new("P", (40, 30), index)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


def frames():
    first, second = palette_image(0), palette_image(1)
    return saved(first, "GIF", save_all=True, append_images=[second, first])


def oriented(kind, mode="RGB"):
    exif = Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    image = Image.new(mode, (60, 30), "blue")
    image.paste("red", (0, 0, 30, 30))
    return saved(image, kind, exif=exif)


WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
READ = {
    "RGB PNG": (saved(solid("RGB", RED), "PNG"), RED),
    "JPEG": (saved(solid("RGB", RED), "JPEG", quality=95), (254, 0, 0)),
    "progressive JPEG": (saved(solid("RGB", RED), "JPEG", quality=95, progressive=True), (254, 0, 0)),
    "CMYK JPEG": (saved(solid("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), RED),
    "greyscale JPEG": (saved(solid("L", 128), "JPEG"), (128, 128, 128)),
    "BMP": (saved(solid("RGB", BLUE), "BMP"), BLUE),
    "WEBP": (saved(solid("RGB", BLUE), "WEBP", lossless=True), BLUE),
    "WEBP with transparency": (saved(solid("RGBA", (0, 0, 255, 0)), "WEBP", lossless=True), WHITE),
    "two colours": (white_png(40, 30), WHITE),
    "greyscale": (grey_png(16), (16, 16, 16)),
    "greyscale with a transparent value": (grey_png(16, extra=chunk(b"tRNS", b"\0\x10")), WHITE),
    "greyscale of 16 bits with one": (grey_png(4128, 16, extra=chunk(b"tRNS", b"\x10\x20")), None),
    "palette": (saved(palette_image(), "PNG"), BLUE),
    "palette with transparency": (saved(palette_image(), "PNG", transparency=1), WHITE),
    "half-transparent palette": (saved(palette_image(), "PNG", transparency=b"\xff\x80"), (127, 127, 255)),
    "RGBA": (saved(solid("RGBA", (255, 0, 0, 0)), "PNG"), WHITE),
    "grey and alpha": (saved(solid("LA", (0, 128)), "PNG"), (127, 127, 127)),
    "animated GIF": (frames(), RED),
    "long text": (grey_png(16, extra=chunk(b"tEXt", b"k\0" + b"a" * 5_000_000)), (16, 16, 16)),
    "damaged EXIF": (saved(solid("RGB", RED), "PNG", exif=b"Exif\0\0II*\0garbage, garbage"), RED),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_every_ordinary_image_is_read_as_rgb(name):
    data, color = READ[name]
    picture = read_image(data, 64)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert picture.flags["C_CONTIGUOUS"] and picture.flags["WRITEABLE"]
    assert max(picture.shape) <= 64
    if color is not None:
        np.testing.assert_allclose(picture, np.full_like(picture, color), atol=1)


def test_sixteen_bits_keep_their_contrast():
    ramp = np.linspace(1000, 3000, 50 * 40).reshape(40, 50).astype(np.uint16)
    picture = read_image(saved(Image.fromarray(ramp), "PNG"), 64)
    assert picture.min() == 0 and picture.max() == 255 and (np.diff(picture[:, 0, 0].astype(int)) > 0).all()
    flat = read_image(grey_png(4128, 16), 64)
    assert flat.shape == (30, 40, 3) and len(np.unique(flat)) == 1


@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("WEBP", "RGB")])
def test_photos_are_turned_upright(kind, mode):
    picture = read_image(oriented(kind, mode), 64)
    assert picture.shape == (60, 30, 3)
    assert picture[5, 15, 0] > 200 and picture[55, 15, 2] > 200, "what was on the left is above"


@pytest.mark.parametrize(
    "size, expected", [((160, 120), (48, 64)), ((30, 60), (60, 30)), ((640, 200), (20, 64))]
)
def test_the_longer_side_is_brought_down_and_never_up(size, expected):
    for kind in ("PNG", "JPEG"):
        assert read_image(saved(Image.new("RGB", size), kind), 64).shape[:2] == expected
    photo = saved(Image.new("RGB", (5000, 4000), (200, 40, 90)), "JPEG")  # not decoded at full size
    np.testing.assert_allclose(read_image(photo, 480).mean((0, 1)), (200, 40, 90), atol=2)
    small = PHOTO.resize((50, 40))
    np.testing.assert_array_equal(read_image(saved(small, "PNG"), 64), np.asarray(small))


def test_no_damage_breaks_out_of_the_refusal():
    rng, outcomes = np.random.default_rng(0), set()
    for source in (JPEG, PNG, oriented("JPEG"), frames(), saved(PHOTO, "WEBP"), saved(PHOTO, "BMP")):
        for _ in range(60):
            data = bytearray(source)
            for at in rng.integers(0, min(len(data), 600), 4):
                data[at] = rng.integers(256)
            try:
                picture = read_image(bytes(data[: rng.integers(len(data) // 2, len(data) + 1)]), 64)
                assert picture.dtype == np.uint8 and picture.shape[2] == 3
                outcomes.add("read")
            except ImageRefused as refusal:
                assert str(refusal).endswith(".")
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pipeline = Pipeline("critters", "ci", store=tmp_path_factory.mktemp("runs"))
    pipeline.classifier(Configuration(drs_layers=()))
    return pipeline


@pytest.fixture(autouse=True)
def hub(tmp_path_factory, monkeypatch):
    """Torch hub's folder of checkpoints, empty."""
    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folder.parent))
    return folder


@pytest.fixture
def make(pipeline):
    """Makes image labs, and closes them when the test is over."""
    labs = []

    def make_lab(*other_pipeline, **options):
        labs.append(ImageLab(*(other_pipeline or (pipeline,)), **options))
        return labs[-1]

    yield make_lab
    for lab in labs:
        lab.close()


@pytest.fixture
def lab(make):
    return make(image=3)


@pytest.fixture
def drawn(monkeypatch):
    """The maps that are drawn."""
    drawn = []
    monkeypatch.setattr(image_module, "overlay", lambda picture, values: drawn.append(values) or picture)
    return drawn


def upload(lab, data, name="photo.png"):
    """What the browser does."""
    file = {"name": name, "type": "image/png", "size": len(data), "content": memoryview(data),
            "last_modified": datetime(2020, 1, 1)}  # fmt: skip
    lab.upload.set_trait("value", (file,))


def test_an_uploaded_photo_is_shown_with_its_classes(lab, pipeline):
    drawn = bytes(lab.picture.value)
    upload(lab, PNG)
    assert lab.state["source"] == "own" and "uploaded image" in lab.describe(lab.state)
    assert bytes(lab.picture.value) != drawn and lab.busy.value == "" and lab.upload.value == ()
    assert "drawn images of six animals" in lab.note.value and "means nothing" in lab.note.value
    classes = {row[0] for row in lab.shown.numbers[1:]}
    assert classes == set(pipeline.data.val.classes)
    assert all(0 <= row[1] <= 1 for row in lab.shown.numbers[1:])
    assert lab.controls["image"].disabled
    lab.set(source="drawn")
    assert bytes(lab.picture.value) == drawn and not lab.controls["image"].disabled


@pytest.mark.parametrize("source", ["drawn", "own"])
def test_a_refusal_leaves_the_picture_and_goes_away_with_the_next_change(lab, source):
    if source == "own":
        upload(lab, PNG)
    picture, numbers = bytes(lab.picture.value), lab.numbers.value
    for name in ("text", "half a PNG", "half a JPEG", "bomb of 400 megapixels"):
        upload(lab, REFUSED[name][0], "<b>bad</b>.png")
        assert bytes(lab.picture.value) == picture and lab.numbers.value == numbers
        assert 'role="alert"' in lab.busy.value and REFUSED[name][1] in lab.busy.value
        assert "&lt;b&gt;bad" in lab.busy.value and "<b>" not in lab.busy.value
        assert lab.state["source"] == source
    if source == "own":
        upload(lab, PNG)
        assert bytes(lab.picture.value) == picture, "the same file can be chosen again"
    else:
        lab.set(image=lab.state["image"] + 1)
        assert bytes(lab.picture.value) != picture
    assert lab.busy.value == ""


def test_before_any_upload_it_says_where_the_button_is(lab):
    lab.set(source="own")
    assert lab.shown.numbers == [] and "alert" not in lab.busy.value and lab.drawn == lab.state
    upload(lab, REFUSED["text"][0])
    assert "not an image" in lab.busy.value


def test_a_voc_classifier_of_the_store_is_used_and_one_that_is_damaged_is_said(make, tmp_path):
    own = Pipeline("critters", "ci", store=tmp_path)
    recipe = get_budget("paper", "voc").classify.replace(drs_layers=(), backbone="mini")  # for speed
    config = {name: value for name, value in recipe.to_dict().items() if name != "weights"}
    inputs = {"data": "voc-trainaug-10582-0", "weights": "torchvision vgg16 pretrained"}

    def make_entry(writer):
        writer.weights("model.safetensors", classifier("mini", 20, ()))

    entry = own.store.get_or_make("classify", config, inputs, make_entry, version=STAGE_VERSIONS["classify"])
    lab = make(own)
    lab.receive(JPEG, "photo.jpg")
    assert "trained on PASCAL VOC from ImageNet" in lab.note.value and lab.busy.value == ""
    assert len(lab.shown.numbers) == 7 and lab.shown.numbers[1][0] not in own.data.val.classes
    lab.set(source="drawn")
    assert {row[0] for row in lab.shown.numbers[1:]} == set(own.data.val.classes)
    weights = entry.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    lab = make(own)
    lab.receive(JPEG, "photo.jpg")
    assert "alert" in lab.busy.value and "damaged or gone" in lab.busy.value
    lab.set(source="drawn")
    assert lab.busy.value == "" and lab.shown.numbers


@pytest.fixture
def released(hub, thin_vgg16):
    """DRS_learnable.pth, thin, with random weights."""
    path = hub / FILES["drs"].name
    torch.save({"model": release_state(True, classes=20), "miou": np.float64(0.5)}, path)
    return path


def networks_input(data):
    """What a network sees of a photograph, and the size of its picture."""
    picture = read_image(data, LONGEST)
    image = torch.from_numpy(picture).permute(2, 0, 1)[None]
    side = interpolate(image, (320, 320), mode="bilinear", antialias=True)
    return normalize(side), picture.shape[:2]


def expected_views(network, data):
    """What a lab shows of a photograph: the probabilities and all classes' maps."""
    side, size = networks_input(data)
    with torch.no_grad():
        probabilities = torch.sigmoid(network.eval()(side))[0].numpy()
    return probabilities, localization_maps(network, side, size=size)[0].numpy()


def test_the_authors_network_is_used_for_photographs(make, released, drawn, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(JPEG)
    lab = make(photo=path)
    assert lab.state["source"] == "own" and lab.state["network"] == AUTHORS
    assert lab.controls["network"].options == (AUTHORS,) and lab.busy.value == ""
    assert "authors trained on PASCAL VOC" in lab.note.value and "97 MB" not in lab.note.value
    drawn.clear()
    lab.set(cap=True, delta=0.3)
    learnable = classifier("vgg16", 20, weights=released)
    constant = classifier("vgg16", 20, delta=0.3)
    controllers = [name for name in learnable.state_dict() if ".drs" in name]
    constant.load_state_dict({k: v for k, v in learnable.state_dict().items() if k not in controllers})
    assert controllers and lab.shown.numbers[0] == ["class", "probability, %", "with δ = 0.30"]
    columns, maps = zip(*(expected_views(network, JPEG) for network in (learnable, constant)), strict=True)
    order = columns[0].argsort()[::-1][:6]
    shown = [c for c in order if columns[0][c] >= 0.5][:2]
    np.testing.assert_allclose(drawn, [found[c] for found in maps for c in shown], atol=1e-5)
    assert np.abs(columns[0] - columns[1]).max() > 1e-3
    assert [row[0] for row in lab.shown.numbers[1:]] == [VOC_CLASSES[c] for c in order]
    found = np.array([row[1:] for row in lab.shown.numbers[1:]])
    np.testing.assert_allclose(found, np.stack([c[order] for c in columns], 1), atol=1e-5)
    assert "takes the place of the controllers" in lab.note.value and "δ = 0.30" in lab.describe(lab.state)
    lab.set(cap=False)  # the controllers are back
    np.testing.assert_allclose(drawn[-1], maps[0][shown[-1]], atol=1e-5)


def test_without_the_authors_network_one_sentence_says_how_to_get_it(lab):
    lab.receive(JPEG, "photo.jpg")
    assert "python -m drs_course download --only drs" in lab.shown.note and "97 MB" in lab.shown.note
    lab.set(source="drawn")
    assert "97 MB" not in lab.shown.note


def test_on_voc_the_authors_network_spares_the_training(make, voc_tree, released, tmp_path):
    pipeline = Pipeline("voc", "ci", voc_root=voc_tree, store=tmp_path / "runs")
    lab = make(pipeline)
    assert lab.state["network"] == AUTHORS and lab.busy.value == ""
    assert not list(pipeline.store.metas("classify")) and lab.shown.numbers[1][0] in VOC_CLASSES


def test_a_damaged_file_of_the_authors_is_said(make, released):
    released.write_bytes(released.read_bytes()[:1000])
    lab = make()
    lab.receive(JPEG, "photo.jpg")
    assert "alert" in lab.busy.value and "DRS_learnable.pth cannot be read" in lab.busy.value
    lab.set(source="drawn")
    assert lab.busy.value == "" and lab.shown.numbers


def test_a_damaged_entry_in_the_store_does_not_keep_the_lab_from_opening(make, tmp_path):
    pipeline = Pipeline("critters", "ci", store=tmp_path)
    pipeline.classifier(Configuration(drs_layers=()))
    damaged = pipeline.store.root / "classify" / "damaged" / "meta.json"
    damaged.parent.mkdir()
    damaged.write_text("[1]")
    lab = make(pipeline)
    assert lab.drawn == lab.state
