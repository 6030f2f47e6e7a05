"""What mkdocs.yml cannot say: cards of methods join the navigation, and links that leave docs/ work in the site, too.

Pages link to each other, and to files of the repository, as a forge shows them. Files outside of docs/ that pages link
to are copied below repository/ of the site, and a link to a folder there becomes its text.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = "repository"
LINK = re.compile(
    r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])"
    r"\((?P<target>(?!https?:|mailto:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
)
FENCED = re.compile(r"(^```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
LONG_NAME, LONG_CELL = re.compile(r"[\w./]{25,}"), 60  # letters
# what a browser would fetch from elsewhere to show a page
FETCHED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"'](?:https?:)?//"
    r"|<link\b[^>]*\brel=[\"'](?:stylesheet|preconnect|preload)[\"'][^>]*\bhref=[\"'](?:https?:)?//"
)


def on_config(config: Any) -> Any:
    """Fill the section of the methods in the navigation with the cards that there are, in the order of their table."""
    docs = Path(config["docs_dir"])
    (methods,) = [entry["Methods"] for entry in config["nav"] if "Methods" in entry]
    methods += [{card.stem: f"methods/{card.name}"} for card in cards(docs)]
    if not methods:
        config["nav"] = [entry for entry in config["nav"] if "Methods" not in entry]
    return config


def cards(docs: Path) -> list[Path]:
    """List the cards of methods, in the order of README's table; others behind."""
    readme = (ROOT / "README.md").read_text()
    found = {card: readme.find(f"| `{card.stem}` |") for card in sorted((docs / "methods").glob("*.md"))}
    return sorted(found, key=lambda card: (found[card] < 0, found[card]))


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    waiting = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")]
    waiting += [uri.removeprefix(f"{OUTSIDE}/") for uri in _uris(config["nav"]) if uri.startswith(f"{OUTSIDE}/")]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if not path.startswith("docs/"):
            files.append(File.generated(config, f"{OUTSIDE}/{path}", abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            for text, fenced in _parts((ROOT / path).read_text()):
                for link in [] if fenced else LINK.finditer(text):
                    target = _resolved(path, link["target"])
                    if target not in seen and not target.startswith("docs/") and (ROOT / target).is_file():
                        waiting.append(target)
                    seen.add(target)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links of a page to where their targets are in the site, and let mkdocstrings see what a forge hides."""
    markdown = re.sub(r"^<!-- (::: \S+) -->$", r"\1", markdown, flags=re.MULTILINE)
    uri = page.file.src_uri
    path = uri.removeprefix(f"{OUTSIDE}/") if uri.startswith(f"{OUTSIDE}/") else f"docs/{uri}"

    def led(link: re.Match[str]) -> str:
        target = _resolved(path, link["target"])
        if (ROOT / target).is_dir():
            return link["text"].removeprefix("[").removesuffix("]")
        if target.startswith("../") or not (ROOT / target).exists():
            return link[0]  # mkdocs says that it is broken
        place = target.removeprefix("docs/") if target.startswith("docs/") else f"{OUTSIDE}/{target}"
        return f"{link['text']}({posixpath.relpath(place, posixpath.dirname(uri))}{link['anchor'] or ''})"

    return "".join(text if fenced else LINK.sub(led, text) for text, fenced in _parts(markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Prepare tables and code of sentences for narrow pages: long cells get room, and code breaks at fit places."""
    html = re.sub(r"<td([^>]*)>(.*?)</td>", _cell, html, flags=re.DOTALL)
    return re.sub(r"(?<!<pre>)<code>([^<]*)</code>", lambda code: f"<code>{_broken(code[1])}</code>", html)


def _cell(cell: re.Match[str]) -> str:
    """Mark a cell of many letters, and take the backslash from bars, which a forge needs and the site would show."""
    attributes, content = cell.groups()
    if len(re.sub(r"<[^>]*>", "", content)) > LONG_CELL:
        attributes += ' class="long"'
    return f"<td{attributes}>" + content.replace("\\|", "|") + "</td>"


def _broken(code: str) -> str:
    """Keep flags whole, and let a browser break long names behind their underscores, dots and slashes."""
    code = FLAG.sub(r'<span class="flag">\g<0></span>', code)
    return LONG_NAME.sub(lambda name: re.sub(r"(?<=[_./])(?=\w)", "<wbr>", name[0]), code)


def on_post_build(config: Any) -> None:
    """Fail where a page would fetch something from elsewhere."""
    site = Path(config["site_dir"])
    wrong = [file for file in site.rglob("*.html") if FETCHED.search(file.read_text(errors="replace"))]
    if wrong:
        names = ", ".join(os.fspath(file.relative_to(site)) for file in wrong[:3])
        raise PluginError(f"{len(wrong)} page(s) fetch scripts, styles or images from elsewhere: {names}")


def _parts(markdown: str) -> list[tuple[str, bool]]:
    """Split text into what is prose and what is fenced code (True)."""
    return [(part, bool(place % 2)) for place, part in enumerate(FENCED.split(markdown))]


def _resolved(path: str, target: str) -> str:
    """Return the path in the repository that a link of a document stands for."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def _uris(nav: Any) -> list[str]:
    """List the pages of a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [uri for entry in (nav.values() if isinstance(nav, dict) else nav) for uri in _uris(entry)]
