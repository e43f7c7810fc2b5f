"""The table of stages: names, order and dependencies."""

import dataclasses

import pytest

from wuerstchen.errors import UserError
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train import stage_table
from wuerstchen.train.config import Phase
from wuerstchen.train.stage_table import after, before, kind_of, kinds, maker_of, selectable, trained_phases
from wuerstchen.train.stages.base import NamedPhase, StageKind


def test_stages_follow_their_dependencies():
    seen: set[str] = set()
    for kind in kinds():
        assert {*kind.builds_on} <= seen, kind.name
        assert {*kind.optional} <= {*kind.makes}
        assert kind.name not in seen
        seen.add(kind.name)


def test_dependencies_are_followed():
    assert [kind.short for kind in before(["c"])] == ["a", "b"]
    assert [kind.short for kind in after(["vqgan"])] == ["b", "c", "few", "few_b", "lora"]
    assert [kind.short for kind in after(["prior"])] == ["few", "lora"]
    assert [kind.short for kind in after(["b"])] == ["c", "few", "few_b", "lora"]
    assert after(["few"]) == after(["few_b"]) == after(["adapter"]) == before(["vqgan"]) == []
    assert maker_of("previewer").name == "decoder"
    assert maker_of("text_encoder") is None


def test_full_names_become_short_names():
    """Run folders keep the short names of earlier versions."""
    recipe = dataclasses.replace(tiny(), stages=("vqgan", "b", "prior"), fresh=("prior",))
    assert (recipe.stages, recipe.fresh) == (("a", "b", "c"), ("c",))
    assert recipe.trains("decoder")
    assert not dataclasses.replace(tiny(), stages=("a",)).trains("b")


def test_the_phases_of_a_run_are_in_the_order_of_training():
    recipe = tiny()
    more = (Phase(optimization=recipe.stage_b.optimization),)
    recipe = dataclasses.replace(
        recipe,
        stage_a=dataclasses.replace(recipe.stage_a, refine_images=8),
        stage_b=dataclasses.replace(recipe.stage_b, phases=more, refine_images=16),
        stage_c=dataclasses.replace(recipe.stage_c, phases=more),
    )
    found = [(p.name, p.path, p.phase.optimization.images) for p in trained_phases(recipe)]
    assert found == [
        ("a", "stage_a", 2400),
        ("b", "stage_b", 1600),
        ("b2", "stage_b.phases.0", 1600),
        ("b3", "", 16),
        ("a2", "", 8),
        ("c", "stage_c", 2400),
        ("c2", "stage_c.phases.0", 1600),
    ]
    assert [p.name for p in trained_phases(dataclasses.replace(recipe, stages=("a", "b")))][-1] == "a2"


def _no_phases(recipe) -> list[NamedPhase]:
    return []


def _nothing(run) -> None:
    pass


BRANCH = StageKind(
    name="upscaler",
    short="u",
    config="stage_a",
    makes=(),
    builds_on=("vqgan",),
    phases=_no_phases,
    train=_nothing,
)


def test_stages_may_branch(monkeypatch):
    """A stage that builds on Stage A needs no Stage B, and does not prevent one."""
    monkeypatch.setattr(stage_table, "STAGES", (*stage_table.STAGES, f"{__name__}:BRANCH"))
    assert [kind.name for kind in before(["u"])] == ["vqgan"]
    assert kind_of("upscaler").short == "u"
    assert len(selectable()) == 7
    for stages in (("a", "u"), ("a", "b", "c", "u"), ("a", "b", "u")):
        assert dataclasses.replace(tiny(), stages=stages).stages == stages
    with pytest.raises(
        UserError, match=r"stages=u builds on a, which this run neither trains nor starts from"
    ):
        dataclasses.replace(tiny(), stages=("u",))
    with pytest.raises(UserError, match=r"consecutive, got u a\. .* or one of few, few_b, lora, u"):
        dataclasses.replace(tiny(), stages=("u", "a"))
