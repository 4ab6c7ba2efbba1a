"""Files that are uploaded in the browser: shown, or refused with a sentence, and nothing breaks."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from browser.pages import eventually
from drs_course.labs import ImageLab


def picture_file(kind, width=96, height=64):
    """An image with a gradient, as a file's bytes."""
    y, x = np.mgrid[:height, :width]
    colors = np.stack([255 * x / width, 255 * y / height, 127 + 0 * x], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colors).save(buffer, kind)
    return buffer.getvalue()


def huge_png(side=10_000):
    """A PNG of 100 megapixels in one colour: some kilobytes, written without having the image in memory."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer, line = zlib.compressobj(9), bytes(1 + side)
    data = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


REFUSED = {
    "notes.png": b"This is not an image.\n" * 40,
    "truncated.jpg": picture_file("JPEG", 400, 300)[:2000],
    "huge.png": huge_png(),
    "heavy.jpg": b"\xff\xd8\xff" + bytes(12_000_000),
}


@pytest.fixture
def lab(subject):
    return subject(ImageLab)


def upload(lab, name, data):
    with lab.page.expect_file_chooser() as chooser:
        lab.on_page.root.get_by_role("button").click()
    kind = "image/jpeg" if name.endswith("jpg") else "image/png"
    chooser.value.set_files({"name": name, "mimeType": kind, "buffer": data})


def complaint(lab):
    """What the lab says has gone wrong, apart from the kernel's end."""
    return lab.on_page.root.locator(".drs-alert:visible")


def test_a_good_image_is_shown(lab):
    before = lab.on_page.settled_picture()
    data = picture_file("PNG")
    upload(lab, "photo.png", data)
    lab.on_page.changes_from(before)
    eventually(lambda: lab.state()["source"] == "own", "the lab shows the upload")
    assert complaint(lab).count() == 0
    lab.library.receive(data, "photo.png")
    lab.agrees()


def test_after_a_refusal_the_next_file_is_taken(lab):
    upload(lab, "heavy.jpg", REFUSED["heavy.jpg"])
    complaint(lab).wait_for()
    before = lab.on_page.settled_picture()
    upload(lab, "photo.png", picture_file("PNG", 64, 96))
    lab.on_page.changes_from(before)
    eventually(lambda: lab.state()["source"] == "own", "the lab shows the upload")
    assert complaint(lab).count() == 0


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_with_a_sentence_and_the_lab_goes_on(lab, name):
    before = lab.on_page.settled_picture()
    upload(lab, name, REFUSED[name])
    complaint(lab).wait_for()
    sentence = complaint(lab).inner_text()
    assert sentence.startswith(name) and re.search(r"\w\.$", sentence.strip()), sentence
    assert lab.on_page.settled_picture() == before
    lab.press("image", "ArrowRight")
    lab.on_page.changes_from(before)
    lab.reaches_kernel("image")
    lab.agrees()
    assert complaint(lab).count() == 0
