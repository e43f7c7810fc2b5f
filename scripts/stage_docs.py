"""Writes the pages of the documentation site to build/docs/pages. `make docs` runs it first.

The README, the guides and the model card link to each other, to source files and to folders. That is right on
a code host, but a site only has pages. So this script copies the pages, in the same folders as in the
repository, and changes their links:

- a module or package of wuerstchen becomes its page in the API reference, which is made from the docstrings;
- any other text file becomes a page that shows the file;
- images are copied.

Exits with an error if a link is broken. Links to headings are checked later, when the site is built.
"""

import os
import re
import shutil
import sys
from pathlib import Path

PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "src/wuerstchen/bundled/MODEL_CARD.md")
IMAGES = (".webp", ".png", ".svg")
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".jsonl": "json"}
CODE_OR_LINK = re.compile(
    r"^ *(?P<fence>`{3,}).*?^ *(?P=fence) *$"  # a block of code
    r"|(?P<ticks>`+).*?(?P=ticks)"  # code in a line
    r"|(?P<opening>!?\[[^\]]*\]\()(?P<address>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=[)\s])",
    re.MULTILINE | re.DOTALL,
)
ITEM = re.compile(r" *([-*]|\d+\.) ")


def reference_page(repository: Path, path: Path) -> Path | None:
    """The page of the API reference for a module or package below src/, or None for other paths."""
    if path.parts[0] != "src":
        return None
    page = Path("reference", *path.parts[1:])
    if (repository / path / "__init__.py").is_file():
        return page / "index.md"
    if path.name == "__init__.py":
        return page.with_name("index.md")
    if path.suffix == ".py" and not path.name.startswith("_"):
        return page.with_suffix(".md")
    return None


def file_page(path: Path, text: str) -> str:
    """A page with the contents of a text file."""
    language = LANGUAGES.get(path.suffix, "text")
    return f"# {path.as_posix()}\n\n``````{language}\n{text.rstrip()}\n``````\n"


def separate_lists(text: str) -> str:
    """Adds an empty line before each list, which Python-Markdown needs and code hosts do not."""
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        before = lines[-1] if lines else ""
        in_list = ITEM.match(before) or before.startswith((" ", "\t"))
        if ITEM.match(line) and before.strip() and not fenced and not in_list:
            lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def stage(repository: Path, target: Path) -> None:
    """Writes all pages of ``repository``, and the files that they show, into the folder ``target``.

    Raises ``ValueError`` with all broken links.
    """
    pages = {path.relative_to(repository) for pattern in PAGES for path in repository.glob(pattern)}
    shown: set[Path] = set()
    broken: list[str] = []

    def destination(path: Path) -> Path | None:
        if path in pages:
            return path
        if path.parts[:1] == ("..",) or not (repository / path).exists():
            return None
        if page := reference_page(repository, path):
            return page
        if not (repository / path).is_file():
            return None
        shown.add(path)
        return path if path.suffix in IMAGES else path.with_name(path.name + ".md")

    def staged(page: Path) -> str:
        def follow(found: re.Match[str]) -> str:
            address = found["address"]
            if address is None or ":" in address:
                return found[0]
            to = destination(Path(os.path.normpath(page.parent / address)))
            if to is None:
                broken.append(f"{page.as_posix()}: {address}")
                return found[0]
            new = Path(os.path.relpath(to, page.parent)).as_posix()
            return f"{found['opening']}{new}{found['anchor'] or ''}"

        return separate_lists(CODE_OR_LINK.sub(follow, (repository / page).read_text(encoding="utf-8")))

    texts = {page: staged(page) for page in sorted(pages)}
    if broken:
        raise ValueError("These links are broken:\n  " + "\n  ".join(broken))
    for path in sorted(shown):
        if path.suffix in IMAGES:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / path, target / path)
        else:
            page = path.with_name(path.name + ".md")
            texts[page] = file_page(path, (repository / path).read_text(encoding="utf-8"))
    for page, text in texts.items():
        (target / page).parent.mkdir(parents=True, exist_ok=True)
        (target / page).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    folder = root / "build" / "docs" / "pages"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        stage(root, folder)
    except ValueError as error:
        sys.exit(f"Error: {error}")
