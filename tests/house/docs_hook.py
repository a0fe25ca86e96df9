"""Hook of MkDocs: the site has every page of the repository, by its path there, so that all links can be followed.

Links to other files (sources, WIT, unit files) and to folders are checked to exist.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ("*.md", "docs/**/*.md", "components/**/*.md", "deploy/**/*.md")
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")

log = get_plugin_logger("docs_hook")


def on_files(_files: Files, config: MkDocsConfig) -> Files:
    """Replace what docs/ has by every page, under its path in the repository."""
    pages = sorted({page for pattern in PATTERNS for page in ROOT.glob(pattern)})
    return Files([File.generated(config, str(page.relative_to(ROOT)), abs_src_path=str(page)) for page in pages])


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Check links to what is no page, then point them nowhere, since the site has no such file."""
    here = (ROOT / page.file.src_uri).parent

    def replace(found: re.Match[str]) -> str:
        target = found[1]
        if re.match(r"[a-z]+:", target) or target.endswith(".md"):
            return found[0]
        if not (here / target).exists():
            log.warning("%s links to %s, which is not in the repository", page.file.src_uri, target)
        return "](#)"

    plain = CODE.sub(lambda code: " " * len(code[0]), markdown)
    parts, at = [], 0
    for found in LINK.finditer(plain):
        parts += [markdown[at : found.start()], replace(found)]
        at = found.end()
    return "".join([*parts, markdown[at:]])
