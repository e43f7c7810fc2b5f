"""The list of faults that the tests must notice fits the code."""

from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "wuerstchen"


def test_every_mutation_still_fits(script):
    """A change of the line would take its mutation out of the list without a word."""
    mutations = script("scripts/mutate").read_list(TESTS.parent / "scripts" / "mutations.toml")
    assert len(mutations) > 250
    assert [each.title for each in mutations if not each.fits(SOURCE)] == []
    named = {test.split("::")[0] for each in mutations for test in each.tests}
    assert [name for name in sorted(named) if not (TESTS / name).is_file()] == []
