"""A notebook open in a browser, the labs on it, and the kernel behind it."""

import ast
import base64
import io
import re
import time
from contextlib import contextmanager

import nbformat
import numpy as np
from jupyter_client import BlockingKernelClient
from PIL import Image

from drs_course.labs import CueLab, DeltaLab, FeatureMapLab, ImageLab, LayerLab

# The labs, each with its main slider.
MAIN = {
    DeltaLab: "delta",
    FeatureMapLab: "delta",
    LayerLab: "delta",
    CueLab: "alpha",
    ImageLab: "image",
}
# The bytes of the picture that is shown; null while it is being replaced.
PICTURE = """async image => {
    const answer = await fetch(image.src).catch(() => null);
    if (!answer || !image.complete || !image.naturalWidth) return null;
    const bytes = new Uint8Array(await answer.arrayBuffer());
    let text = "";
    for (let at = 0; at < bytes.length; at += 8192)
        text += String.fromCharCode(...bytes.subarray(at, at + 8192));
    return btoa(text);
}"""
# Looks at a lab once in every frame until it is stopped. (naturalWidth is 0 while the next picture is
# decoded, when the browser goes on painting the last one; what a picture that is gone loses is its box.)
WATCH = """lab => {
    const picture = lab.querySelector("img");
    const seen = {frames: 0, pictures: new Set(), heights: new Set(), elements: new Set()};
    const look = () => {
        seen.frames += 1;
        seen.pictures.add(picture.src);
        seen.heights.add(picture.isConnected ? picture.getBoundingClientRect().height : 0);
        lab.querySelectorAll("img").forEach(image => seen.elements.add(image));
        if (!seen.over) requestAnimationFrame(look);
    };
    look();
    window.drsSeen = seen;
}"""
WATCHED = """() => {
    const seen = window.drsSeen;
    seen.over = true;
    return {
        frames: seen.frames, pictures: seen.pictures.size,
        heights: [...seen.heights], elements: seen.elements.size,
    };
}"""


def eventually(holds, what, seconds=15):
    """Waits until ``holds()`` returns something true, and returns it; fails if that takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = holds()
        if found:
            return found
        time.sleep(0.03)
    raise AssertionError(f"not within {seconds} seconds: {what}")


def listen(page, url):
    """A list that collects the errors in the browser's console, but for files of other sites than ``url``:
    Voilà asks for some, and does without them where there is no network."""
    trouble = []

    def note(message):
        elsewhere = not message.location.get("url", "").startswith(url)
        if message.type == "error" and not (elsewhere and message.text.startswith("Failed to load resource")):
            trouble.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    return trouble


class LabOnPage:
    """One of the labs on a page. title: its heading."""

    def __init__(self, page, title):
        self.page = page
        heading = page.locator(".drs-title", has_text=re.compile(f"^{re.escape(title)}$"))
        self.root = page.locator(".drs-lab", has=heading)

    def control(self, kind, label):
        """A control by its kind of widget ("slider", "dropdown", "checkbox") and its label."""
        text = re.compile(f"^\\s*{re.escape(label)}\\s*$")
        named = self.page.locator(".widget-label, .widget-label-basic", has_text=text)
        return self.root.locator(f".widget-{kind}", has=named)

    def handle(self, label):
        return self.control("slider", label).get_by_role("slider")

    def readout(self, label):
        return float(self.control("slider", label).locator(".widget-readout").text_content())

    def choose(self, label, option):
        self.control("dropdown", label).get_by_role("combobox").select_option(label=option)

    def tick(self, label, on=True):
        self.control("checkbox", label).get_by_role("checkbox").set_checked(on)

    def press(self, label, key, times=1):
        self.handle(label).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def grasp(self, label):
        """Puts the mouse on a slider's handle and presses it. Returns a function that moves the mouse to a
        share of the slider's range, in as many movements as it is told."""
        slider = self.control("slider", label)
        slider.scroll_into_view_if_needed()
        rail = slider.locator(".noUi-base").bounding_box()
        handle = slider.get_by_role("slider").bounding_box()
        height = handle["y"] + handle["height"] / 2
        self.page.mouse.move(handle["x"] + handle["width"] / 2, height)
        self.page.mouse.down()
        return lambda share, steps: self.page.mouse.move(
            rail["x"] + share * rail["width"], height, steps=steps
        )

    def drag(self, label, *shares, steps=12):
        """Drags a slider's handle with the mouse to one share of its range after the other."""
        move = self.grasp(label)
        for share in shares:
            move(share, steps)
        self.page.mouse.up()

    def picture(self):
        """The bytes of the picture as the page has them; None while it is being replaced."""
        found = self.root.locator("img").evaluate(PICTURE)
        return None if found is None else base64.b64decode(found)

    def settled_picture(self):
        return eventually(self.picture, "the lab shows a picture")

    def shows(self, data, seconds=15):
        """Waits until the picture's bytes are ``data``."""
        return eventually(lambda: self.picture() == data, "the picture is the one of this state", seconds)

    def changes_from(self, before):
        """Waits until the picture is another than ``before``, and returns it."""
        return eventually(
            lambda: (now := self.picture()) is not None and now != before and now, "another picture"
        )

    def numbers(self):
        """The cells of the table beside the picture, row by row, without its heading."""
        rows = self.root.locator(".drs-numbers tr:has(td)")
        return rows.evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")

    @contextmanager
    def filmed(self):
        """The frames that the browser paints meanwhile, cut to the picture: a list of grey arrays, filled at
        the end."""
        session, frames, cut = self.page.context.new_cdp_session(self.page), [], []

        def keep(frame):
            frames.append(frame["data"])
            session.send("Page.screencastFrameAck", {"sessionId": frame["sessionId"]})

        session.on("Page.screencastFrame", keep)
        session.send("Page.startScreencast", {"format": "jpeg", "quality": 60, "everyNthFrame": 1})
        yield cut
        session.send("Page.stopScreencast")
        box = self.root.locator("img").bounding_box()
        place = (box["x"], box["y"], box["x"] + box["width"], box["y"] + min(box["height"], 200))
        for data in frames:
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                cut.append(np.asarray(image.crop(place).convert("L"), np.float32))
        session.detach()

    def watch(self):
        self.root.evaluate(WATCH)

    def watched(self):
        return self.page.evaluate(WATCHED)


def write_notebook(path, *cells):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


class Notebook:
    """A notebook open in JupyterLab. ``trouble`` collects what the browser's console calls an error."""

    def __init__(self, browser, server, name, width=1280, height=800):
        self.server, self.name = server, name
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.trouble = listen(self.page, server.url)
        # An address of its own for every page: two in one workspace would open each other's files.
        workspace = re.sub(r"\W", "-", f"{name}-{time.monotonic_ns()}")
        self.page.goto(f"{server.url}lab/workspaces/{workspace}/tree/{name}?token={server.token}")
        self.wait_until_idle()

    def wait_until_idle(self, seconds=90):
        """Until the kernel has nothing to do and no cell waits for it."""
        self.page.locator(".jp-Notebook").wait_for()
        idle = self.page.locator("#jp-bottom-panel, .jp-StatusBar-Widget").get_by_text("| Idle")
        idle.first.wait_for(timeout=1000 * seconds)
        busy = self.page.locator(".jp-InputPrompt", has_text="[*]")
        eventually(lambda: busy.count() == 0, "all cells have run", seconds)

    def menu(self, menu, entry):
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        # An entry's own name has its keys behind it.
        self.page.get_by_role("menuitem", name=re.compile(f"^{entry}")).first.click()

    def run_all(self, labs):
        """Runs all cells and waits until so many labs are there."""
        self.menu("Run", "Run All Cells$")
        self.page.locator(".drs-lab:not(.jupyter-widgets-disconnected) img").nth(labs - 1).wait_for(
            timeout=90_000
        )
        self.wait_until_idle()

    def lab(self, title):
        return LabOnPage(self.page, title)

    def kernel_id(self):
        sessions = self.server.ask("GET", "api/sessions")
        return next(s["kernel"]["id"] for s in sessions if s["path"] == self.name)

    def kernel(self):
        return Kernel(self.server.kernel_file(self.kernel_id()))

    def close(self):
        """Closes the page and ends its kernel."""
        self.page.close()
        for session in self.server.ask("GET", "api/sessions"):
            if session["path"] == self.name:
                self.server.ask("DELETE", f"api/sessions/{session['id']}")


class Kernel:
    """A second line to a page's kernel, past the browser."""

    def __init__(self, connection_file):
        self.client = BlockingKernelClient(connection_file=str(connection_file))
        self.client.load_connection_file()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def ask(self, expression):
        """The value of an expression in the notebook, of Python's literal kinds."""
        it = self._execute("", user_expressions={"it": expression})["user_expressions"]["it"]
        if it["status"] != "ok":
            raise RuntimeError(f"{expression}: {it['ename']}: {it['evalue']}")
        return ast.literal_eval(it["data"]["text/plain"])

    def run(self, code):
        reply = self._execute(code)
        if reply["status"] != "ok":
            raise RuntimeError(f"{code}: {reply['ename']}: {reply['evalue']}")

    def _execute(self, code, **options):
        options |= {"silent": True, "store_history": False}
        return self.client.execute(code, reply=True, timeout=60, **options)["content"]

    def tell(self, code):
        """Sends code without waiting for it, such as code that ends the kernel."""
        self.client.execute(code, silent=True, store_history=False)

    def close(self):
        self.client.stop_channels()
