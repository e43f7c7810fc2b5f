"""The pages that `make docs` builds the site from. The site itself is built by `make lint`."""

import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(REPOSITORY / "scripts" / "stage_docs.py"))


@pytest.fixture
def repository(tmp_path):
    """A small repository: a function that adds files to it, by name and text."""

    def add(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "repository" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path / "repository"

    return add


def test_every_link_of_this_repository_leads_somewhere(script, tmp_path):
    script["stage"](REPOSITORY, tmp_path)
    names = {path.name for path in REPOSITORY.glob("docs/*.md")}
    assert names == {path.name for path in tmp_path.glob("docs/*.md")} - {
        "experiments.jsonl.md",
        "speedrun.jsonl.md",
    }
    assert (tmp_path / "README.md").is_file()
    assert (tmp_path / "docs" / "demo.webp").read_bytes() == (REPOSITORY / "docs" / "demo.webp").read_bytes()


@pytest.mark.parametrize(
    ("link", "staged"),
    [
        ("[a](../README.md#train)", "[a](../README.md#train)"),
        ("[a](other.md)", "[a](other.md)"),
        (
            "[a\nb](../src/wuerstchen/runtime/recorder.py)",
            "[a\nb](../reference/wuerstchen/runtime/recorder.md)",
        ),
        (
            "[a](../src/wuerstchen/runtime/recorder.py#wuerstchen.runtime.recorder.f)",
            "[a](../reference/wuerstchen/runtime/recorder.md#wuerstchen.runtime.recorder.f)",
        ),
        ("[a](../src/wuerstchen/data)", "[a](../reference/wuerstchen/data/index.md)"),
        ("[a](../src/wuerstchen/data/__init__.py)", "[a](../reference/wuerstchen/data/index.md)"),
        ("[a](../benchmarks/speed.py)", "[a](../benchmarks/speed.py.md)"),
        ("![a](a.png)", "![a](a.png)"),
        ("[a](https://example.org/x.py)", "[a](https://example.org/x.py)"),
        ("`a[0](none.md)`", "`a[0](none.md)`"),
        ("```python\na[0](none)\n```", "```python\na[0](none)\n```"),
    ],
)
def test_links(script, repository, tmp_path, link, staged):
    root = repository(
        {
            "README.md": "# Read me",
            "docs/guide.md": f"# Guide\n\n{link}\n",
            "docs/other.md": "# Other",
            "docs/a.png": "an image",
            "benchmarks/speed.py": "print(1)",
            "src/wuerstchen/runtime/recorder.py": "",
            "src/wuerstchen/data/__init__.py": "",
        }
    )
    script["stage"](root, tmp_path / "pages")
    assert (tmp_path / "pages" / "docs" / "guide.md").read_text(encoding="utf-8") == f"# Guide\n\n{staged}\n"
    assert (tmp_path / "pages" / "docs" / "a.png").exists() == link.startswith("!")
    shown = tmp_path / "pages" / "benchmarks" / "speed.py.md"
    assert shown.exists() == ("benchmarks" in link)
    if shown.exists():
        assert "``````python\nprint(1)\n``````" in shown.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "address",
    ["none.md", "../src/wuerstchen/none.py", "../src", "../../outside.md", "../src/wuerstchen/_own.py/x"],
)
def test_a_link_that_leads_nowhere_is_an_error(script, repository, tmp_path, address):
    root = repository(
        {
            "docs/guide.md": f"[a]({address}) and [b](none2.md)",
            "src/wuerstchen/_own.py": "",
            "../outside.md": "",
        }
    )
    with pytest.raises(ValueError, match="These links are broken") as caught:
        script["stage"](root, tmp_path / "pages")
    assert f"docs/guide.md: {address}" in str(caught.value)
    assert "docs/guide.md: none2.md" in str(caught.value)
    assert not (tmp_path / "pages").exists()


def test_a_list_is_separated_from_the_text_before_it(script):
    text = "takes\n- one,\n  - inner\n- two\n\n1. a\n2. b\n"
    assert script["separate_lists"](text) == "takes\n\n- one,\n  - inner\n- two\n\n1. a\n2. b\n"
    code = "```\ntext\n- no list\n```\n"
    assert script["separate_lists"](code) == code
