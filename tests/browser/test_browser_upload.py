"""Files that are uploaded in the browser: shown, or refused with a sentence, and nothing breaks."""

import io
import re

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


REFUSED = {
    "notes.png": b"This is not an image.\n" * 40,
    "truncated.jpg": picture_file("JPEG", 400, 300)[:2000],
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


def accepted(lab):
    """Uploads an image and waits for it."""
    before, data = lab.on_page.settled_picture(), picture_file("PNG")
    upload(lab, "photo.png", data)
    lab.on_page.changes_from(before)
    eventually(lambda: lab.state()["source"] == "own", "the lab shows the upload")
    assert complaint(lab).count() == 0
    lab.library.receive(data, "photo.png")
    lab.agrees()


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_file_is_refused_with_a_sentence_and_the_lab_goes_on(lab, name):
    lab.agrees()  # the page has left the upload of the test before
    before = lab.on_page.settled_picture()
    upload(lab, name, REFUSED[name])
    complaint(lab).wait_for()
    sentence = complaint(lab).inner_text()
    assert sentence.startswith(name) and re.search(r"\w\.$", sentence.strip()), sentence
    assert lab.on_page.settled_picture() == before
    with lab.redrawn():
        lab.press("image", "ArrowRight")
        lab.reaches_kernel("image")
    assert complaint(lab).count() == 0
    upload(lab, name, REFUSED[name])
    complaint(lab).wait_for()
    accepted(lab)
