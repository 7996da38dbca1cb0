"""What a reader sees: pages and pictures are what benchmarks/report.py makes of the results, and fit on a screen."""

import functools
import re
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", ROOT / "benchmarks/RECORDS.md"]
PICTURES = ["iteration_time.png", "learning.png", "overview.png", "speed.png"]
MARKERS = {"README.md": ["agents", "claim"], "benchmarks/README.md": ["learning", "peers", "fps"]}


@functools.cache
def collected():
    """The pages that report.py would write, and the pictures with what draws them."""
    return report.collect(ROOT)


def test_pages_and_pictures_are_what_report_makes(capsys):
    assert report.main(report.Args(check=True)) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", MARKERS)
def test_generated_parts_have_their_place(page):
    """report.py leaves out what a page has no markers for; these are to be there, and no others."""
    assert sorted(re.findall(r"<!-- (\w+):begin -->", (ROOT / page).read_text())) == sorted(MARKERS[page])


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.jsonl")), ids=lambda path: path.stem)
def test_results_name_no_folder_of_a_machine(path):
    """Commands are kept as they were typed; one that wrote elsewhere is to lose that flag before it is kept."""
    assert re.findall(r'[\s"\'=]/\w[^\s"]*', path.read_text()) == []


@pytest.mark.parametrize("page", MARKERS)
def test_no_line_is_wider_than_a_screen(page):
    """Addresses of links and of pictures, which a reader does not see, left out."""
    lines = enumerate((ROOT / page).read_text().splitlines(), start=1)
    assert not [f"line {number}: {line}" for number, line in lines if report.visible(line) > report.WIDTH]


def test_records_are_short():
    table = [line for line in PAGES[2].read_text().splitlines() if line.startswith("|")]
    assert len(table) > 10
    assert not [cell for line in table for cell in line.split("|") if report.visible(cell.strip()) > 120]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


def test_every_picture_is_shown_and_no_other_is_kept():
    _, drawn = collected()
    assert sorted(path.name for path in drawn) == PICTURES
    assert sorted(path.name for path in (ROOT / "benchmarks/plots").iterdir()) == PICTURES
    assert "](benchmarks/plots/overview.png)" in PAGES[0].read_text()
    assert all(f"](plots/{name})" in PAGES[1].read_text() for name in PICTURES if name != "overview.png")


@pytest.mark.parametrize("name", PICTURES)
def test_no_text_leaves_its_picture(name):
    """Nor is there one that the layout had to give up on, which matplotlib warns of."""
    from matplotlib.text import Text

    _, drawn = collected()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = drawn[ROOT / "benchmarks/plots" / name][1]()
        figure.draw_without_rendering()
    assert figure.bbox.width == 1000
    assert not cut_off(figure)
    figure.axes[0].text(
        1.3, 0.5, "a text at the right of its panel", transform=figure.axes[-1].transAxes, in_layout=False
    )
    assert [text.get_text() for text in cut_off(figure)] == ["a text at the right of its panel"]
    assert len(figure.findobj(Text)) > 20


def cut_off(figure) -> list:
    """The texts of a drawn figure that are not wholly inside it."""
    from matplotlib.text import Text

    ticks = {}  # those outside of an axis' range are not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            ticks |= dict.fromkeys((tick.label1, tick.label2), low <= tick.get_loc() <= high)
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and ticks.get(text, True)]
    texts = [text for text in texts if text.axes is None or text.axes.get_visible()]
    inside = figure.bbox.padded(0.5)
    return [
        text for text in texts if not all(inside.contains(*corner) for corner in text.get_window_extent().corners())
    ]
