"""Front matter of READMEs: short ones are read, those that would take long are refused."""

import time

import pytest
from huggingface_hub.repocard import metadata_load

from wuerstchen.checkpoints.readme import MAX_FRONT_MATTER, read_front_matter
from wuerstchen.errors import CheckpointError


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: mit\nprior:\n- a/b\n---\n# Title\n---\nmore: text\n---\n",
        "\ufeff---\nprior: a/b\n---",
        "\n--- \nprior: [a/b]\ntags: {x: 1}\n---  \ntext",
        "---\r\nprior: a/b\r\n---\r\n",
        "no front matter\n---\nprior: x\n---\n",
        "---\nprior: never closed\n",
        "---\n# nothing\n---\n",
        "",
    ],
)
def test_it_is_read_as_the_hub_reads_it(text, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_front_matter(path) == (metadata_load(path) or {})


def test_much_text_behind_it_does_not_matter(tmp_path):
    (tmp_path / "README.md").write_text("---\nprior: a/b\n---\n" + "words\n" * 10**6)
    assert read_front_matter(tmp_path / "README.md") == {"prior": "a/b"}


MERGES = [f"m{n}: &m{n}\n  <<: [{','.join([f'*m{n - 1}'] * 9)}]" for n in range(1, 12)]


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("a: 1\n" * 600_000, "front matter has more than 64 kB"),
        ("x" * 4_000_000, "front matter has more than 64 kB"),
        ("\n".join(["m0: &m0 {a: 1}", *MERGES]), "it contains aliases"),
        ("a: &a [*a]", "it contains aliases"),
        ("[" * (MAX_FRONT_MATTER - 10), "cannot be read"),
        ("a: !!python/object/apply:os.abort []", "cannot be read"),
        ("- a", "has no fields"),
        ("a: \x1b[31m", "cannot be read"),
    ],
)
def test_invalid_or_long_front_matter_is_refused(yaml, message, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{yaml}\n---\n")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_front_matter(tmp_path / "README.md")
    assert len(str(caught.value)) < 600
    assert time.monotonic() - began < 30  # the first and third took minutes
