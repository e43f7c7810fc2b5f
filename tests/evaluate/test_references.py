"""References that several evaluations share."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from wuerstchen.errors import UserError
from wuerstchen.evaluate import references as module
from wuerstchen.evaluate.lists import RealImages
from wuerstchen.evaluate.references import References
from wuerstchen.evaluate.report import evaluate
from wuerstchen.pipeline import Sampling

CPU = torch.device("cpu")
OPTIONS = {
    "splits": ("val",),
    "rows": ("c_b_a",),
    "limit": 4,
    "batch_size": 3,
    "sampling": Sampling(guidance=1.0, prior_steps=2),
}


def test_shared_references_give_the_same_scores_and_are_encoded_once(
    small_model, emoji_set, use_simple_judges, monkeypatch
):
    """Bugs: another entry's features are used, or every evaluation composes and encodes again."""
    use_simple_judges(monkeypatch)
    alone = [evaluate(small_model, emoji_set, first_seed=seed, **OPTIONS) for seed in (0, 1000)]
    composed, encoded = [], []
    compose, network = RealImages.image, module.FeatureNetwork

    def counted(*arguments, **options):
        features = network(*arguments, **options)
        return lambda images: encoded.append(len(images)) or features(images)

    monkeypatch.setattr(RealImages, "image", lambda *a: composed.append(a[1].id) or compose(*a))
    monkeypatch.setattr(module, "FeatureNetwork", counted)
    references = References(emoji_set, CPU)
    shared = [
        evaluate(small_model, emoji_set, first_seed=seed, references=references, **OPTIONS)
        for seed in (0, 1000)
    ]
    for one, other in zip(alone, shared, strict=True):
        for name in ("a", "b"):
            assert one.lists[name].scores == other.lists[name].scores
    assert len(composed) == 8
    # Two networks encode 8 drawn images in each evaluation, and 8 real images in the first one.
    assert sum(encoded) == 2 * (2 * 8 + 8)


def test_references_may_have_another_path_of_the_same_folder(
    small_model, emoji_set, use_simple_judges, monkeypatch
):
    use_simple_judges(monkeypatch)
    monkeypatch.chdir(emoji_set.parent)
    references = References(Path(emoji_set.name), CPU)
    options = {**OPTIONS, "limit": 1, "lists": ("a",)}
    assert evaluate(small_model, emoji_set, references=references, **options).lists.keys() == {"a"}


def test_without_an_emoji_set_references_are_not_used(small_model, emoji_set, tmp_path):
    """The report must not name data that nothing was scored on."""
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    report = evaluate(small_model, photos=tmp_path, references=References(emoji_set, CPU), limit=1)
    assert report.settings["data"] is None


def test_references_of_other_data_are_refused(small_model, emoji_set, tmp_path):
    references = References(emoji_set, CPU)
    references.data = Path("other")
    with pytest.raises(UserError, match=f"of the evaluated data set, {emoji_set}, got those of other"):
        evaluate(small_model, emoji_set, references=references, **OPTIONS)
