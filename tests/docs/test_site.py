"""The site has every page in its navigation, its links lead somewhere, and it fetches nothing from elsewhere."""

import re
import runpy

import pytest
import yaml

from tests.support.helpers import ROOT

DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def pages(nav):
    """The pages that a navigation names, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages(entry)]


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs", reason="mkdocs is in the extra docs: pip install -e '.[docs]'")
    return runpy.run_path(str(ROOT / "scripts/site/hooks.py"))


@pytest.fixture(scope="module")
def site(hooks, tmp_path_factory):
    """The site as CI builds it."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return folder


def test_every_page_is_in_the_navigation_once():
    named = pages(CONFIG["nav"])
    assert len(set(named)) == len(named)
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert {page for page in named if not page.startswith("repository/")} == {
        page for page in there if not page.startswith("methods/")
    }
    assert all((ROOT / page.removeprefix("repository/")).is_file() for page in named if page.startswith("repository/"))


def test_the_first_page_names_every_other():
    text = (DOCS / "README.md").read_text()
    assert [page for page in pages(CONFIG["nav"]) if f"({page})" not in text and page != "README.md"] == [
        "repository/CONTRIBUTING.md",
        "repository/CHANGELOG.md",
    ]


def test_cards_come_in_the_order_of_the_methods(hooks, tmp_path):
    (tmp_path / "methods").mkdir()
    for name in ("unheard-of", "sam", "apart"):
        (tmp_path / f"methods/{name}.md").touch()
    config = {"docs_dir": str(tmp_path), "nav": [{"Methods": ["METHODS.md"]}]}
    assert pages(hooks["on_config"](config)["nav"]) == [
        "METHODS.md",
        "methods/apart.md",
        "methods/sam.md",
        "methods/unheard-of.md",
    ]


def test_the_site_is_whole(site):
    """Built strictly: a broken link or anchor fails."""
    for page in pages(CONFIG["nav"]):
        assert (site / page.replace("README.md", "index.md")).with_suffix(".html").exists(), page
    for card in (DOCS / "methods").glob("*.md"):
        assert (site / f"methods/{card.stem}.html").exists()
    reference = (site / "reference/api.html").read_text()
    assert 'id="apart_hf.create_strategy"' in reference and ":::" not in reference
    assert ":::" not in re.sub("<!--.*?-->", "", (DOCS / "reference/api.md").read_text())  # as a forge shows it
    assert (site / "repository/results/study-cifar100-wide_resnet16_2-small.png").exists()


def test_a_flag_within_a_sentence_is_kept_whole(hooks):
    """A browser would break it behind its hyphens."""
    shown = hooks["on_page_content"]("<p>a - b <code>-b 2 --val-split x-y</code></p><pre><code>--z</code></pre>")
    flags = ('<span class="flag">-b</span> 2', '<span class="flag">--val-split</span> x-y')
    assert shown == f"<p>a - b <code>{' '.join(flags)}</code></p><pre><code>--z</code></pre>"


def test_long_cells_and_names_fit_narrow_pages(hooks):
    long = "words " * 11
    shown = hooks["on_page_content"](
        f"<td>{long}<code>a\\|b</code></td><td>{'w' * 60}</td><code>tests/a_b/{'c' * 20}.py</code>"
    )
    assert shown.startswith(f'<td class="long">{long}<code>a|b</code></td><td>w')
    assert shown.endswith(f"<code>tests/<wbr>a_<wbr>b/<wbr>{'c' * 20}.<wbr>py</code>")


@pytest.mark.parametrize("fetched", ['<script src="https://x/y.js">', '<img alt="" src="//x/y.png">'])
def test_what_is_fetched_from_elsewhere_is_refused(fetched, hooks, tmp_path):
    from mkdocs.exceptions import PluginError

    (tmp_path / "page.html").write_text('<a href="https://x/">link</a><script src="assets/y.js"></script>')
    hooks["on_post_build"]({"site_dir": str(tmp_path)})
    (tmp_path / "page.html").write_text(fetched)
    with pytest.raises(PluginError, match=r"page.html"):
        hooks["on_post_build"]({"site_dir": str(tmp_path)})
