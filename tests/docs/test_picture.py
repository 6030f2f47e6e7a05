"""The picture of the README is what its script draws; its words fit and can be read, on dark pages, too."""

import re
import runpy
import xml.etree.ElementTree as ET

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from tests.support.helpers import ROOT

FILE = ROOT / "docs/pictures/two-passes.svg"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts/draw_scheme.py"))


def test_it_is_what_the_script_draws(script):
    assert FILE.read_text() == script["drawn"](), "run python scripts/draw_scheme.py"


def contrast(one, other):
    """WCAG's ratio of the luminances of two colours."""

    def luminance(colour):
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts))

    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def test_contrast():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)  # just not enough for words


@pytest.mark.parametrize("colours", ["LIGHT", "DARK"])
def test_words_stand_out(colours, script):
    of = script[colours]
    for name in ("text", "clean", "shifted"):
        assert contrast(of[name], of["panel"]) >= 4.5
    assert contrast(of["line"], of["page"]) >= 2


@pytest.fixture(scope="module")
def root():
    return ET.parse(FILE).getroot()


def test_words_fit_their_panels(root):
    """By the widest of the fonts that it names."""
    frames = [
        tuple(float(rect.get(key)) for key in ("x", "y", "width", "height"))
        for rect in root.iter(f"{SVG}rect")
        if rect.get("class") == "panel"
    ]
    words = list(root.iter(f"{SVG}text"))
    assert len(frames) == 5 and len(words) > 25
    for word in words:
        x, y, size = (float(word.get(key)) for key in ("x", "y", "font-size"))
        weight = "bold" if "title" in word.get("class").split() else "normal"
        font = FontProperties(family="DejaVu Sans", weight=weight)
        shown = re.sub(" +", " ", word.text)
        width = TextToPath().get_text_width_height_descent(shown, font, ismath=False)[0] * size / font.get_size()
        left = x - width / 2 if word.get("text-anchor") == "middle" else x
        assert any(
            fx + 8 <= left and left + width <= fx + fwidth - 8 and fy + size <= y <= fy + fheight - 8
            for fx, fy, fwidth, fheight in frames
        ), word.text


@pytest.mark.parametrize(("layout", "titles"), [("detail", 5), ("brief", 5)])
def test_words_are_large_enough_for_the_page(layout, titles, root, script):
    """A telephone shows it 340 pixels wide, and the words of a wide picture are not shown below the limit."""
    words = [set(word.get("class").split()) for word in root.iter(f"{SVG}text")]
    assert all(len(kinds & {"detail", "brief"}) == 1 for kinds in words)
    assert sum({"title", layout} <= kinds for kinds in words) == titles
    pixels = {"detail": script["NARROW"], "brief": 340}[layout]
    sizes = [float(word.get("font-size")) for word in root.iter(f"{SVG}text") if layout in word.get("class")]
    assert min(sizes) * pixels / script["WIDTH"] >= 11


def test_a_layout_is_chosen_by_the_width_of_the_picture(script):
    """An image asks for its own width, not for that of the page."""
    style, below = FILE.read_text(), script["NARROW"] - 1
    assert ".brief { display: none }" in style
    assert f"(max-width: {below}px) {{ .brief {{ display: inline }} .detail {{ display: none }} }}" in style
