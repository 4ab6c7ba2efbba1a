"""lab.ipynb in JupyterLab: it runs, and mouse and keyboard move what the library computes."""

import pytest

from browser.pages import MAIN, eventually
from drs_course.labs import CueLab, DeltaLab, FeatureMapLab, LayerLab
from drs_course.labs.networks import PRESETS
from drs_lib.crf import available

FOCUSABLE = 'select, input, button, [tabindex="0"], [contenteditable="true"]'
STOPS = f"""lab => [...lab.querySelectorAll('{FOCUSABLE}')].filter(e => e.checkVisibility() && !e.disabled)"""


@pytest.fixture(params=MAIN, ids=lambda kind: kind.__name__)
def moved(request, subject):
    """A lab and the name of its main slider."""
    return subject(request.param), MAIN[request.param]


def stops(lab):
    """The elements of a lab that the tab key should reach, in the page's order."""
    return lab.root.evaluate_handle(STOPS)


def test_all_labs_appear_and_nothing_fails(page):
    area = page.page.locator(".jp-Notebook")
    assert area.locator(".drs-lab").count() == len(MAIN)
    for kind in MAIN:
        assert page.lab(kind.title).root.locator("img").count() == 1
        assert len(page.lab(kind.title).settled_picture()) > 5000
    errors = (
        '[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]'
    )
    assert area.locator(errors).all_inner_texts() == []
    assert area.locator(".jupyter-widgets-error-widget").count() == 0
    assert area.locator(".drs-alert:visible").all_inner_texts() == []
    assert area.locator(".drs-stored:visible").count() == 0
    assert page.trouble == []


def test_a_drag_changes_the_picture_to_what_the_library_draws(moved):
    lab, control = moved
    with lab.redrawn():
        lab.drag(control, 0.1, 0.7, 0.3)
        lab.reaches_kernel(control)
    low, high = lab.library.controls[control].min, lab.library.controls[control].max
    assert lab.readout(control) == pytest.approx(low + 0.3 * (high - low), abs=0.03 * (high - low))


def test_arrow_keys_move_by_one_step_there_and_back(moved):
    lab, control = moved
    step = lab.library.controls[control].step
    lab.press(control, "ArrowRight", 3)
    lab.reaches_kernel(control)
    start, before = lab.readout(control), lab.on_page.settled_picture()
    lab.press(control, "ArrowLeft", 2)
    lab.reaches_kernel(control)
    assert lab.readout(control) == pytest.approx(start - 2 * step)
    lab.agrees()
    assert lab.on_page.picture() != before
    lab.press(control, "ArrowUp", 2)
    lab.follows(control)
    assert lab.on_page.picture() == before


def test_of_a_fast_drag_the_last_value_stays_and_nothing_grows(moved):
    lab, control = moved
    root = lab.on_page.root
    area = root.locator('xpath=ancestor::*[contains(concat(@class, " "), "jp-OutputArea ")][1]')
    move = lab.on_page.grasp(lab.label(control))
    move(0.5, 3)
    lab.follows(control)
    nodes, drawings = _nodes(area), lab.kernel.ask(f"{lab.name}.drawings")
    first = root.locator("img").get_attribute("src")
    lab.on_page.watch()
    for share, steps in ((0.0, 30), (1.0, 50), (0.35, 25)):
        move(share, steps)
    lab.page.mouse.up()
    lab.follows(control)
    seen = lab.on_page.watched()
    assert seen["frames"] > 10 and seen["pictures"] > 2
    assert seen["elements"] == 1
    assert len(seen["heights"]) == 1 and min(seen["heights"]) > 100, "the picture's box must not collapse"
    assert 2 < lab.kernel.ask(f"{lab.name}.drawings") - drawings <= 105
    assert _nodes(area) == nodes
    kept = lab.page.evaluate("address => fetch(address).then(() => true, () => false)", first)
    assert not kept, "the browser must not keep the pictures of earlier values"
    # When the kernel has answered everything, the picture is still the last value's.
    assert lab.state() == lab.kernel.ask(f"{lab.name}.drawn")
    lab.agrees()


def test_no_frame_of_a_drag_is_without_a_picture(subject):
    lab = subject(DeltaLab)
    move = lab.on_page.grasp(lab.label("delta"))
    with lab.on_page.filmed() as frames:
        move(0.1, 40)
        lab.page.mouse.up()
        lab.follows("delta")
    contrasts = [frame.std() for frame in frames]
    assert len(contrasts) > 10
    assert min(contrasts) > 0.7 * max(contrasts) > 20, contrasts


def _nodes(element):
    return element.evaluate("element => element.getElementsByTagName('*').length")


def test_delta_lab_one_slider_per_layer(subject):
    lab = subject(DeltaLab)
    assert lab.slider("delta").is_visible() and not lab.slider("layer3").is_visible()
    lab.tick("per_layer")
    lab.slider("layer6").wait_for()
    lab.choose("preset", preset(5, 6))
    eventually(lambda: [lab.readout(f"layer{n}") for n in range(1, 7)] == [1] * 4 + [0.8] * 2, "the preset")
    with lab.redrawn():
        lab.drag("layer6", 0.1)
        lab.reaches_kernel("layer6")
    state = lab.state()
    assert state["layer6"] < 0.3 and state["layer5"] == 0.8 and state["preset"] not in PRESETS
    lab.tick("per_layer", False)
    lab.slider("layer6").wait_for(state="hidden")


def test_delta_lab_switches_between_trained_classifiers(subject):
    lab = subject(DeltaLab)
    assert not lab.slider("trained").is_visible()
    lab.choose("mode", "trained")
    lab.slider("trained").wait_for()
    lab.slider("delta").wait_for(state="hidden")
    lab.follows("trained")
    with lab.redrawn():
        lab.press("trained", "ArrowLeft")
        lab.reaches_kernel("trained")
    assert lab.readout("trained") == 0.55
    with lab.redrawn():
        lab.tick("learnable")
    lab.slider("trained").wait_for(state="hidden")
    assert lab.state()["learnable"]


def test_feature_map_lab_goes_to_another_layer(subject):
    lab = subject(FeatureMapLab)
    with lab.redrawn():
        lab.choose("place", "layer 1")
    handle = lab.on_page.handle(lab.label("channel"))
    last = lab.kernel.ask("feature_map_lab.controls['channel'].max")
    eventually(
        lambda: float(handle.get_attribute("aria-valuemax")) == last, "the slider ends at the last channel"
    )
    lab.drag("channel", 1.0)
    lab.follows("channel")
    assert lab.readout("channel") == last


def test_layer_lab_boxes_and_rows_of_table_2(subject):
    lab = subject(LayerLab)
    with lab.redrawn():
        lab.tick("layer4")
    chosen = lab.on_page.control("dropdown", lab.label("preset")).get_by_role("combobox")
    eventually(lambda: chosen.input_value() == preset(4, 5, 6), "the list says that it is a row")
    with lab.redrawn():
        lab.choose("preset", preset(6))
    boxes = [lab.on_page.control("checkbox", lab.label(f"layer{n}")) for n in range(1, 7)]
    ticked = [box.get_by_role("checkbox") for box in boxes]
    eventually(lambda: [box.is_checked() for box in ticked] == [False] * 5 + [True], "only layer 6 is ticked")


def preset(*layers):
    """The words of a row of Table 2."""
    return next(name for name, plugged in PRESETS.items() if plugged == layers)


def test_cue_lab_rules(subject):
    lab = subject(CueLab)
    lab.drag("beta", 0.5)
    lab.follows("beta")
    for control, value in (("conflict", "object"), ("rule", "release")):
        with lab.redrawn():
            lab.choose(control, value)
    box = lab.on_page.control("dropdown", lab.label("conflict")).get_by_role("combobox")
    eventually(box.is_disabled, "the release's rule has no choice for pixels with both cues")


def test_cue_lab_crf(subject):
    lab = subject(CueLab)
    if not available():
        assert lab.on_page.control("checkbox", lab.label("crf")).get_by_role("checkbox").is_disabled()
        return
    with lab.redrawn():
        lab.tick("crf")


def test_tab_reaches_every_control_in_the_pages_order(moved):
    lab, _ = moved
    elements = stops(lab.on_page)
    count = elements.evaluate("all => all.length")
    assert count >= 4
    elements.evaluate("all => all[0].focus()")
    where = "all => all.indexOf(document.activeElement)"
    reached = [elements.evaluate(where)]
    for _ in range(count - 1):
        lab.page.keyboard.press("Tab")
        reached.append(elements.evaluate(where))
    assert reached == list(range(count))
    lab.page.keyboard.press("Shift+Tab")
    assert elements.evaluate(where) == count - 2


def test_every_control_has_a_label(moved):
    lab, _ = moved
    root = lab.on_page.root
    for role in ("combobox", "checkbox", "button"):
        for control in root.get_by_role(role).all():
            assert control.evaluate("e => (e.labels?.[0] ?? e).textContent").strip()
    widgets = root.locator(".widget-slider:visible")
    assert widgets.count() == root.get_by_role("slider").count()
    for widget in widgets.all():
        label = widget.locator(".widget-label")
        assert label.is_visible() and label.text_content().strip()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (800, 1000)])
def test_labs_fit_the_window(page, width, height):
    try:
        page.page.set_viewport_size({"width": width, "height": height})
        for kind in MAIN:
            root = page.lab(kind.title).root
            root.scroll_into_view_if_needed()
            # Measured once the window's new width has reached the lab.
            eventually(
                lambda root=root: root.evaluate("e => e.scrollWidth <= e.clientWidth"), "nothing overflows"
            )
            eventually(
                lambda root=root: root.evaluate(
                    """lab => {
                        const right = lab.getBoundingClientRect().right;
                        const parts = ".drs-picture, select, button, .widget-slider, table";
                        return [...lab.querySelectorAll(parts)].every(
                            e => !e.checkVisibility() || e.getBoundingClientRect().right <= right);
                    }"""
                ),
                f"{kind.title}: nothing is cut off at its right edge",
            )
    finally:
        page.page.set_viewport_size({"width": 1280, "height": 800})
