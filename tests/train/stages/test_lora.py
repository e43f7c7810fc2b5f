"""Adapters for Stage C: their layers and weights, and whole runs from images to a file."""

import copy
import dataclasses
import errno
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata, weights_hash
from wuerstchen.checkpoints.adapters import read_adapter
from wuerstchen.checkpoints.native import read_cascade
from wuerstchen.cli import main, make_parser
from wuerstchen.cli.train import overridden
from wuerstchen.data.plan import stable_hash
from wuerstchen.errors import UserError
from wuerstchen.lora import lora_names
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.int8_linear import quantize_linear_layers
from wuerstchen.models.prior import Prior, PriorConfig
from wuerstchen.models.text import TextEncoder
from wuerstchen.pipeline import load
from wuerstchen.recipes import RECIPES
from wuerstchen.recipes.scale import scaled
from wuerstchen.train.config import Optimization, Recipe, StageLoraConfig
from wuerstchen.train.config_lora import cached_crops, with_length
from wuerstchen.train.engine import checkpoint_writer
from wuerstchen.train.engine.checkpoint import best_of, newest
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.export import export
from wuerstchen.train.feed.images import Batch
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.run import train
from wuerstchen.train.run_folder import read_json
from wuerstchen.train.stages import adapter, class_images
from wuerstchen.train.stages import prior as prior_stage
from wuerstchen.train.stages.adapter import AdaptedPrior, target_layers
from wuerstchen.train.stages.lora import LORA_STAGE, StageLora
from wuerstchen.train.stages.new_word import NewWord

from ...configurations import TOY_PRIOR, with_student, write_model


@pytest.fixture
def lora_runs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    yield importlib.import_module("lora_runs")
    del sys.modules["lora_runs"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(10):
        colours = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((128, 128), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def prior():
    torch.manual_seed(0)
    network = Prior(TOY_PRIOR)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


def output(prior: Prior) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 3, 3, generator=generator), torch.randn(2, 5, 8, generator=generator)
    return prior(x, torch.tensor([0.3, 0.8]), prior.context(text))


def randomized(adapted: AdaptedPrior) -> AdaptedPrior:
    torch.manual_seed(2)
    for parameter in adapted.weights.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapted


# --- The adapter ---


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing_and_leaves_the_prior_alone(prior, targets, dora):
    before = {key: tensor.clone() for key, tensor in prior.state_dict().items()}
    adapted = AdaptedPrior(prior, StageLoraConfig(rank=3, targets=targets, dora=dora))
    torch.testing.assert_close(output(adapted.prior), output(prior), rtol=1e-5, atol=1e-5)
    randomized(adapted)
    assert not torch.allclose(output(adapted.prior), output(prior), atol=1e-2)
    assert prior.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in prior.state_dict().items())


def test_layers(prior):
    attention = {f"blocks.{b}.attention.{n}" for b in (2, 5) for n in ("to_q", "to_k", "to_v", "to_out.0")}
    assert set(target_layers(prior, "attention")) == attention
    everything = set(target_layers(prior, "all"))
    assert attention < everything
    others = {"projection", "out.1", "cond_mapper.0", "cond_mapper.2"}
    for block in (0, 3):
        others |= {f"blocks.{block}.channelwise.0", f"blocks.{block}.channelwise.4"}
        others |= {f"blocks.{block + 1}.mapper", f"blocks.{block + 2}.kv_mapper.1"}
    assert everything == attention | others  # no depthwise convolutions


def test_only_the_adapter_is_trained_and_it_is_as_large_as_estimated():
    with torch.device("meta"):
        published = Prior(PriorConfig())
    names = target_layers(published, "attention")
    assert len(names) == 128
    assert sum(16 * sum(published.get_submodule(name).weight.shape) for name in names) == 6_291_456


def test_it_is_a_low_rank_update_with_alpha(prior):
    """The adapted network equals one whose weights are W + (alpha / rank) · B A."""
    adapted = randomized(AdaptedPrior(prior, StageLoraConfig(rank=2, alpha=3.0, targets="all")))
    plain = Prior(TOY_PRIOR).eval()
    plain.load_state_dict(prior.state_dict())
    layers = adapted.weights.tensors(alpha=3.0)
    assert layers.keys() == set(target_layers(prior, "all"))
    for name, layer in layers.items():
        a, b = layer.a, layer.b
        weight = plain.get_submodule(name).weight
        weight.data += 1.5 * (b.flatten(1) @ a.flatten(1)).view_as(weight)
    torch.testing.assert_close(output(adapted.prior), output(plain), rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_weight_of_the_adapter_and_no_other(prior):
    adapted = randomized(AdaptedPrior(prior, StageLoraConfig(rank=2, targets="all", dora=True)))
    output(adapted.prior).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.weights.parameters())
    own = set(adapted.weights.parameters())
    assert all(p.grad is None for p in adapted.prior.parameters() if p not in own)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_new_dora_on_a_rounded_base_leaves_the_exact_model_alone(prior, targets):
    adapted = AdaptedPrior(prior, StageLoraConfig(rank=2, dora=True, targets=targets), torch.bfloat16)
    for name, layer in adapted.weights.tensors(2.0).items():
        weight = prior.get_submodule(name).weight.flatten(1)
        torch.testing.assert_close(layer.magnitude, torch.linalg.vector_norm(weight, dim=1))


def test_the_average_takes_the_place_of_the_weights_for_a_while(prior):
    adapted = AdaptedPrior(prior, StageLoraConfig(rank=2))
    average = make_average(adapted.weights)
    randomized(adapted)
    trained = output(adapted.prior)
    adapted.prior.train()
    with adapted.using(average) as averaged:
        assert not averaged.training
        torch.testing.assert_close(output(averaged), output(prior), rtol=1e-5, atol=1e-5)
    assert adapted.prior.training
    assert torch.equal(output(adapted.prior.eval()), trained)


def test_the_adapter_can_be_turned_off_for_a_while(prior):
    adapted = randomized(AdaptedPrior(prior, StageLoraConfig(rank=2, dora=True)))
    with adapted.disabled() as plain:
        torch.testing.assert_close(output(plain), output(prior))
    assert not torch.allclose(output(adapted.prior), output(prior), atol=1e-2)
    assert all(parameter.requires_grad for parameter in adapted.weights.parameters())


def test_the_base_may_be_in_half_precision_and_the_adapter_is_not(prior):
    adapted = AdaptedPrior(prior, StageLoraConfig(rank=2), torch.bfloat16)
    own = set(adapted.weights.parameters())
    assert {p.dtype for p in own} == {torch.float32}
    assert {p.dtype for p in adapted.prior.parameters() if p not in own} == {torch.bfloat16}
    assert {p.dtype for p in prior.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        loss = output(randomized(adapted).prior).float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in own)


def test_the_base_may_be_in_int8(prior, monkeypatch):
    """Nearly the loss and the gradients of the base as it is."""
    monkeypatch.setattr(adapter, "quantize_linear_layers", partial(quantize_linear_layers, least=1))
    found = {}
    for base in ("half", "int8"):
        for targets in ("attention", "all"):
            torch.manual_seed(4)
            adapted = AdaptedPrior(prior, StageLoraConfig(rank=2, base_weights=base, targets=targets))
            for parameter in adapted.weights.parameters():
                torch.nn.init.normal_(parameter, std=0.02)  # with larger ones, rounding changes the output
            loss = output(adapted.prior).square().mean()
            loss.backward()
            gradients = [p.grad for p in adapted.weights.parameters()]
            assert all(gradient.abs().sum() > 0 for gradient in gradients)
            found[base, targets] = loss.item(), torch.cat([g.flatten() for g in gradients])
            kinds = {p.dtype for p in adapted.prior.parameters() if not p.requires_grad}
            assert (torch.int8 in kinds) == (base == "int8")
            assert all(p.dtype is torch.float32 for p in adapted.weights.parameters())
    for targets in ("attention", "all"):
        (loss, gradient), (expected, wanted) = (found[base, targets] for base in ("int8", "half"))
        assert loss == pytest.approx(expected, rel=0.02)
        assert torch.cosine_similarity(gradient, wanted, dim=0) > 0.999


# --- Settings ---


@pytest.mark.parametrize(
    ("images", "updates", "length"),
    [(5, 0, 300), (12, 0, 300), (20, 0, 500), (50, 0, 1250), (1000, 0, 2000), (20, 7, 7)],
)
def test_the_length_follows_from_the_number_of_images(images, updates, length):
    optimization = Optimization(images=1, batch_size=4)
    found = with_length(StageLoraConfig(optimization=optimization, updates=updates), images)
    assert found.optimization.images == 4 * length
    assert with_length(found, 10 * images) == found  # it is set once
    fixed = StageLoraConfig(optimization=optimization, updates=None)
    assert with_length(fixed, images).optimization.images == 1


@pytest.mark.parametrize(
    ("images", "crops", "cached"),
    [(5, 8, 40), (100, 8, 800), (200, 8, 1000), (1024, 8, 1024), (1025, 8, 0), (5, 0, 0)],
)
def test_a_bounded_number_of_crops_is_cached(images, crops, cached):
    assert cached_crops(StageLoraConfig(crops=crops), images) == cached


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": "two words"}, r"token must be one word, got 'two words'\."),
        ({"class_images": 0}, r"class_images must be at least 1, got 0\."),
        ({"class_weight": 0.0}, r"class_weight must be above 0, got 0\.0\."),
        ({"crops": -1}, r"crops must be at least 0, got -1\."),
        ({"rank": 0}, r"rank must be at least 1, got 0\."),
        ({"alpha": 0.0}, r"alpha must be above 0, got 0\.0\."),
        ({"alpha": float("nan")}, r"alpha must be above 0, got nan\."),
        ({"updates": -1}, r"updates must be at least 0, got -1\."),
        ({"caption_dropout": 1.5}, r"caption_dropout must be between 0 and 1, got 1\.5\."),
        ({"image_size": 100}, r"image_size must be a multiple of 128, got 100\."),
        ({"dora": True, "base_weights": "int8"}, r"dora needs base_weights=half, got int8\."),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        StageLoraConfig(**settings)


def test_options_need_no_prefix(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr("wuerstchen.train.run.train", lambda recipe, *_, **__: found.append(recipe))
    words = "--rank 4 --alpha=8 --targets all --dora --updates 50 --learning-rate 2e-4 --batch-size 2"
    other = "--caption sks --start-from bundled --image-size 128"
    assert main(["train", "lora", "--data", str(tmp_path), *words.split(), *other.split()]) == 0
    config = found[0].stage_lora
    assert (config.rank, config.alpha, config.targets, config.dora, config.updates) == (4, 8, "all", True, 50)
    assert (config.optimization.learning_rate, config.optimization.batch_size) == (2e-4, 2)
    assert (found[0].caption, config.image_size) == ("sks", 128)
    # Other recipes need prefixes, because they have several stages.
    assert main(["train", "tiny", "--rank", "4"]) == 2


# --- Runs ---


def last(run_dir: Path) -> tuple[Path, dict]:
    path, state = newest(run_dir / "stage_lora" / "checkpoints")
    return path, state["files"]


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def test_a_run_with_an_int8_base_resumes_and_makes_an_adapter(
    lora_runs, model_folder, photos, tmp_path, monkeypatch
):
    """The weights of the base are not in checkpoints, so they must be quantized in the same way again."""
    monkeypatch.setattr(adapter, "quantize_linear_layers", partial(quantize_linear_layers, least=1))
    recipe = lora_runs.recipe(model_folder, photos)
    smaller = dataclasses.replace(recipe.stage_lora, base_weights="int8")
    recipe = dataclasses.replace(recipe, stage_lora=smaller)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe, whole, device="cpu")
    save = checkpoint_writer.Writer.start

    def dies(writer, state, header):
        save(writer, state, header)
        writer.wait()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.Writer, "start", dies)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, broken, device="cpu")
    train(recipe, broken, device="cpu")
    assert last(broken)[1] == last(whole)[1]
    (file,) = (whole / "lora").iterdir()
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


@pytest.mark.parametrize("crops", [0, 2])
def test_a_run_survives_a_kill_and_makes_an_adapter_that_loads(
    crops, lora_runs, model_folder, photos, tmp_path
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    recipe = lora_runs.recipe(model_folder, photos, crops=crops)
    result = train(recipe, whole, device="cpu")
    assert result == whole / "lora"

    command = [sys.executable, lora_runs.__file__, str(model_folder), str(photos), str(broken), str(crops)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert last(broken)[0].name == "000000000016"
    train(recipe, broken, device="cpu")
    assert last(broken)[1] == last(whole)[1]  # checksums of all tensors
    validations = [[(e["images"], e["loss"]) for e in events(run, "validation")] for run in (whole, broken)]
    assert validations[0] == validations[1]  # including the one that the kill prevented
    assert [images for images, _ in validations[0]] == [8, 16, 24]

    (file,) = result.iterdir()
    stored = load_file(file)
    assert stored.keys() == load_file(broken / "lora" / file.name).keys()
    assert len(stored) == 8
    checkpoint = load_file(last(whole)[0] / "networks.safetensors")
    assert len(checkpoint) == 8  # nothing of the base is in it
    assert all(key.startswith("adapter/") for key in checkpoint)

    base = load(model_folder, "cpu")
    before = np.asarray(base.generate("sks", seed=1)[0])
    base.load_lora(result)
    assert (np.asarray(base.generate("sks", seed=1)[0]) != before).any()
    assert not (whole / "model").exists()
    assert newest(whole / "stage_lora" / "checkpoints")[1]["images"] == lora_runs.IMAGES
    modified = (result / file.name).stat().st_mtime_ns
    assert train(recipe, whole, device="cpu") == result  # finished
    assert (result / file.name).stat().st_mtime_ns == modified


def test_previews_of_a_model_with_a_student_show_the_adapted_prior(
    lora_runs, small_cascade, photos, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setattr(prior_stage, "previews", lambda cascade, *_: seen.append(cascade) or [])
    model = write_model(with_student(small_cascade), tmp_path / "model")
    result = train(lora_runs.recipe(model, photos, preview_every=8), tmp_path / "run", device="cpu")
    assert seen
    for cascade in seen:
        assert cascade.prior_student is None
        assert lora_names(cascade.prior)
    load(model, "cpu").load_lora(result)


def test_the_file_has_the_averages_with_the_lowest_validation_loss(
    lora_runs, model_folder, photos, tmp_path, monkeypatch
):
    from wuerstchen.train.engine.validation import Validation

    losses = iter([3.0, 1.0, 2.0, 4.0, 0.5])
    monkeypatch.setattr(Validation, "__call__", lambda *_: {"loss": next(losses), "bins": []})
    recipe = lora_runs.recipe(model_folder, photos)
    result = train(recipe, tmp_path / "run", device="cpu")
    folder = tmp_path / "run" / "stage_lora" / "checkpoints"
    assert best_of(folder) == {"images": 16, "loss": 1.0}

    def is_from(images: int, result: Path) -> bool:
        average = load_file(folder / f"{images:012d}" / "averages.safetensors")
        stored = load_file(result / "pytorch_lora_weights.safetensors")
        name = "blocks.2.attention.to_q"
        ours = average[f"adapter/layers.{name.replace('.', '_')}.lora_B.weight"]
        return torch.equal(stored[f"prior.{name}.lora_B.weight"], ours)

    assert is_from(16, result)
    assert not is_from(24, result)
    assert read_adapter(result).metadata.updates == 4  # of 6: those of the weights in the file
    export(tmp_path / "run", tmp_path / "newest")
    assert is_from(24, tmp_path / "newest")
    export(tmp_path / "run", tmp_path / "best", checkpoint="best")
    assert is_from(16, tmp_path / "best")

    monkeypatch.setattr(Validation, "__call__", lambda *_: {"loss": next(losses), "bins": []})
    losses = iter([1.0, 2.0, 3.0])
    folder = tmp_path / "last" / "stage_lora" / "checkpoints"
    assert is_from(24, train(lora_runs.recipe(model_folder, photos, keep="last"), folder.parents[1]))


def test_images_are_encoded_once(lora_runs, model_folder, photos, tmp_path, monkeypatch):
    """Two crops of each of 8 images, and the two that are held out."""
    encoded = []
    encode, forward = TextEncoder.encode, Compressor.forward
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, texts, *more: encoded.extend(texts) or encode(self, texts, *more)
    )
    seen = []
    monkeypatch.setattr(Compressor, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    recipe = lora_runs.recipe(model_folder, photos, keep="last")
    train(recipe, tmp_path, device="cpu")
    assert read_json(tmp_path / "run.json")["recipe"]["prepared_images"] == 16
    assert sum(seen) == 16 + 2
    assert encoded.count("a photo of sks") == 16 + 2


def test_encoders_are_on_the_device_only_while_they_encode(lora_runs, model_folder, monkeypatch):
    cascade = read_cascade(model_folder)
    recipe = lora_runs.recipe(model_folder, Path("photos"))
    adapted = AdaptedPrior(cascade.prior, recipe.stage_lora)
    (phase,) = LORA_STAGE.phases(recipe)
    stage = StageLora(recipe.stage_lora, recipe, cascade, adapted, phase)
    stage.lent = [stage.compressor, stage.text_encoder]
    moves = []
    for network in (stage.compressor, stage.text_encoder):
        monkeypatch.setattr(network, "to", lambda device: moves.append(str(device)))
    device = torch.device("meta")
    with stage.lent_encoders(device):
        with stage.lent_encoders(device):  # as prepare does
            pass
        assert moves == ["meta", "meta"]
    assert moves == ["meta", "meta", "cpu", "cpu"]
    with pytest.raises(KeyError), stage.lent_encoders(device):
        raise KeyError
    assert moves[4:] == ["meta", "meta", "cpu", "cpu"]
    images = torch.zeros(1, 128, 128, 3, dtype=torch.uint8)
    stage.prepare(Batch(torch.arange(1), images, ["sks"], []), torch.device("cpu"))
    assert moves[8:] == ["cpu"] * 4


@pytest.mark.parametrize("crops", [0, 2])
def test_a_new_word_is_learnt_with_the_adapter(crops, lora_runs, model_folder, photos, tmp_path):
    settings = {"token": "sks-1", "class_word": "dog", "class_images": 2, "crops": crops}
    recipe = lora_runs.recipe(model_folder, photos, caption="a photo of sks-1", **settings)
    recipe = dataclasses.replace(recipe, preview_prompts=("sks-1",))
    result = train(recipe, tmp_path / "whole", device="cpu")
    adapter = read_adapter(result)
    assert adapter.metadata.trigger_words == ("sks-1",)
    encoder = read_cascade(model_folder).text_encoder
    (dog,) = encoder.tokenizer.encode("dog", add_special_tokens=False).ids
    initial = encoder.model.get_input_embeddings().weight[dog]
    (word,) = adapter.tokens["sks-1"]
    assert word.shape == initial.shape
    assert 0 < (word - initial).abs().max() < 1
    stored = load_file(last(tmp_path / "whole")[0] / "networks.safetensors")
    assert "adapter/word" in stored

    model = load(model_folder, "cpu")
    model.load_lora(result)
    assert model.cascade.text_encoder.words == ["sks-1"]
    train(recipe, tmp_path / "whole", device="cpu", changes=["images=28"])  # from the checkpoint
    assert "adapter/word" in load_file(last(tmp_path / "whole")[0] / "averages.safetensors")


def test_text_states_follow_the_embedding_that_is_trained(small_cascade):
    """Those of a caption equal what an encoder with this embedding gives, and have gradients."""
    encoder = copy.deepcopy(small_cascade.text_encoder)
    word = NewWord(encoder, "sks-1", like="a cat")
    assert encoder.words == []
    vectors = torch.nn.Parameter(torch.randn(1, encoder.width))
    word.vectors = lambda: vectors
    ids, mask = word.tokens(["a sks-1 cat", "a cat"], torch.device("cpu"))
    states = word.encoder.last_states(ids, mask)
    encoder.add_words({"sks-1": vectors.detach()})
    expected = encoder.encode(["a sks-1 cat", "a cat"])
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(states, expected.states)
    vectors.data.neg_()  # copies, such as those for autocast, follow it too
    copied = copy.deepcopy(word.encoder).last_states(ids, mask)
    assert torch.equal(copied, word.encoder.last_states(ids, mask))
    assert not torch.allclose(copied, states, atol=1e-3)
    states[1].sum().backward()
    assert vectors.grad.abs().sum() == 0  # it is not in the second caption
    word.encoder.last_states(ids, mask)[0].square().sum().backward()
    assert vectors.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("token", "message"),
    [("sks-1", r"token=sks-1 is in no caption of"), ("photo", r"'photo' is already a word of the tokenizer")],
)
def test_words_that_cannot_be_learnt(token, message, lora_runs, model_folder, photos, tmp_path):
    with pytest.raises(UserError, match=message):
        train(lora_runs.recipe(model_folder, photos, token=token), tmp_path, device="cpu")


@pytest.mark.slow
def test_two_processes_train_what_one_does(lora_runs, model_folder, photos, tmp_path):
    """Rank 0 alone writes the file. A collective operation there would wait forever."""
    alone = train(lora_runs.recipe(model_folder, photos), tmp_path / "one", device="cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, lora_runs.__file__, str(model_folder), str(photos), str(tmp_path / "two"), "2"]
    processes = [
        subprocess.Popen(command, env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    try:
        assert [process.wait(200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    # Processes have other dropout masks.
    one, two = ([e["loss"] for e in events(tmp_path / run, "validation")] for run in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-2)
    assert [file.name for file in (tmp_path / "two" / "lora").iterdir()] == [
        file.name for file in alone.iterdir()
    ]


@pytest.mark.parametrize(("word", "prompt"), [("", ""), ("dog", "a dog"), ("a black dog", "a black dog")])
def test_the_prompt_of_a_class(word, prompt):
    assert StageLoraConfig(class_word=word).class_prompt == prompt


def test_images_of_the_class_are_drawn_once_and_trained_on(
    lora_runs, model_folder, photos, tmp_path, monkeypatch
):
    """They are those of the model without the adapter, and have a loss of their own."""
    recipe = lora_runs.recipe(model_folder, photos, class_word="dog", class_images=3, class_weight=2.0)
    recipe = dataclasses.replace(recipe, prior_guidance=1.0)
    draws, drawn = [], class_images.trajectories
    monkeypatch.setattr(class_images, "trajectories", lambda *a, **k: draws.append(a[0]) or drawn(*a, **k))
    losses = []
    loss = StageLora._loss

    def noted(self, inputs, random, purpose=""):
        losses.append((purpose, inputs["states"].detach().clone(), loss(self, inputs, random, purpose)))
        return losses[-1][2]

    monkeypatch.setattr(StageLora, "_loss", noted)
    train(recipe, tmp_path, device="cpu")
    assert len(draws) == 1
    stored = load_file(tmp_path / "stage_lora" / "class_images.safetensors")["latents"]
    assert stored.shape == (3, 2, 3, 3)
    cascade = read_cascade(model_folder)
    text = cascade.text_encoder.encode(["a dog", ""])
    plain = class_images._samples(
        cascade.prior,
        cascade.settings,
        text,
        ImageRandom(stable_hash(0, "class images") >> 1, torch.arange(3)).normal("noise", (2, 3, 3)),
        None,
    )
    torch.testing.assert_close(stored, plain, rtol=1e-4, atol=1e-4)

    assert [purpose for purpose, _, _ in losses] == ["", "class "] * 6
    own, of_class = cascade.text_encoder.encode(["a photo of sks", "a dog"]).states
    torch.testing.assert_close(losses[0][1][0], own)
    torch.testing.assert_close(losses[1][1], of_class.expand(4, -1, -1))
    (first, *_) = events(tmp_path, "progress")
    assert first["loss"] == pytest.approx((losses[0][2] + 2 * losses[1][2]).item(), rel=1e-5)
    assert first["class"] == pytest.approx(losses[1][2].item(), rel=1e-5)
    draws.clear()
    train(recipe, tmp_path, device="cpu", changes=["images=28"])
    assert draws == []


def test_the_file_describes_the_adapter(lora_runs, model_folder, photos, tmp_path):
    settings = {"alpha": 3.0, "dora": True, "form": "kohya", "licence": "CC0-1.0", "updates": 2}
    recipe = lora_runs.recipe(model_folder, photos, storage="float16", **settings)
    result = train(recipe, tmp_path, device="cpu")
    adapter = read_adapter(result)
    assert {layer.alpha for layer in adapter.prior.values()} == {3.0}
    assert {layer.a.dtype for layer in adapter.prior.values()} == {torch.float16}
    assert all(layer.a.shape[0] == 2 and layer.magnitude is not None for layer in adapter.prior.values())
    assert adapter.metadata == AdapterMetadata(
        base_model=model_folder.name,
        base_hash=weights_hash(read_cascade(model_folder).prior),
        trigger_words=("sks",),
        images=8,
        updates=2,
        licence="CC0-1.0",
    )
    (file,) = result.iterdir()
    assert any(key.startswith("lora_prior_unet_blocks_2_attention_to_q.") for key in load_file(file))
    load(model_folder, "cpu").load_lora(result)


def test_a_run_may_have_more_images_later(lora_runs, model_folder, photos, tmp_path):
    recipe = lora_runs.recipe(model_folder, photos, keep="last")
    (file,) = train(recipe, tmp_path, device="cpu").iterdir()
    before = file.read_bytes()
    train(recipe, tmp_path, device="cpu", changes=["images=32"])
    assert last(tmp_path)[0].name == "000000000032"
    assert file.read_bytes() != before
    assert not (tmp_path / "lora.new").exists()


def test_settings_come_from_the_model_and_batches_may_be_larger_than_the_data(
    lora_runs, model_folder, photos, tmp_path
):
    settings = read_cascade(model_folder).settings
    recipe = lora_runs.recipe(
        model_folder,
        photos,
        image_size=1024,
        text_positions="all",
        updates=1,
        optimization=Optimization(images=4, batch_size=12),
    )
    train(recipe, tmp_path, device="cpu")
    recorded = read_json(tmp_path / "run.json")["recipe"]
    assert recorded["image_size"] == settings.image_size == 128
    assert recorded["text_positions"] == "real"
    assert recorded["stage_lora"]["optimization"]["images"] == 12
    assert recorded["stage_lora"]["updates"] is None
    train(recipe, tmp_path, device="cpu")  # the same command resumes


def test_recipes():
    for name in ("lora", "v2-lora"):
        recipe = RECIPES[name]()
        assert recipe.stages == ("lora",)
        assert recipe.stage_lora.rank == 16
        assert recipe.stage_lora.updates == 0
    assert RECIPES["lora"]().start_from == "bundled"


# --- What can go wrong ---


def test_too_few_images(lora_runs, model_folder, photos, tmp_path):
    (tmp_path / "two").mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(photos / name, tmp_path / "two")
    with pytest.raises(UserError, match=r"two has 2 images to train on\. An adapter needs at least 3"):
        train(lora_runs.recipe(model_folder, tmp_path / "two"), tmp_path / "run", device="cpu")
    shutil.copy(photos / "2.png", tmp_path / "two")
    train(lora_runs.recipe(model_folder, tmp_path / "two", updates=1), tmp_path / "run", device="cpu")


def test_equal_captions_in_files(lora_runs, model_folder, photos, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for image in data.glob("*.png"):
        image.with_suffix(".txt").write_text("a cat")
    train(lora_runs.recipe(model_folder, data, caption="", updates=1), tmp_path / "a", device="cpu")
    assert "all captions of" in (said := capsys.readouterr().out)
    assert "are 'a cat'. " in said
    (data / "0.txt").write_text("a dog")
    (data / "1.txt").write_text("a bird")
    train(lora_runs.recipe(model_folder, data, caption="", updates=1), tmp_path / "b", device="cpu")
    train(lora_runs.recipe(model_folder, data, updates=1), tmp_path / "c", device="cpu")  # as asked
    assert "all captions of" not in capsys.readouterr().out


def test_an_adapter_is_no_model_to_start_from(lora_runs, model_folder, photos, tmp_path):
    result = train(lora_runs.recipe(model_folder, photos, updates=1), tmp_path / "run", device="cpu")
    for start in (result, *result.iterdir()):
        with pytest.raises(UserError, match="is an adapter, not a model"):
            train(lora_runs.recipe(start, photos), tmp_path / "other", device="cpu")


def test_a_model_without_its_text_encoder(lora_runs, model_folder, photos, tmp_path):
    """The bundled text encoder would take its place if it has the same width."""
    shutil.copytree(model_folder, tmp_path / "model")
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    description["parts"].remove("text_encoder")
    (tmp_path / "model" / "model.json").write_text(json.dumps(description))
    shutil.move(tmp_path / "model" / "text_encoder", tmp_path / "encoder")
    recipe = lora_runs.recipe(tmp_path / "model", photos, updates=1)
    with pytest.raises(UserError, match=r"not the text encoder .* Use --text-encoder"):
        train(recipe, tmp_path / "run", device="cpu")
    recipe = dataclasses.replace(recipe, text_encoder=str(tmp_path / "encoder"))
    assert train(recipe, tmp_path / "run", device="cpu").is_dir()


def test_images_that_are_added_to_a_run(lora_runs, model_folder, photos, tmp_path):
    """The length and the cache of a started run stay, although they follow from the number of images."""
    shutil.copytree(photos, tmp_path / "data")
    recipe = lora_runs.recipe(model_folder, tmp_path / "data", updates=0)
    optimization = dataclasses.replace(recipe.stage_lora.optimization, batch_size=1)
    config = dataclasses.replace(recipe.stage_lora, optimization=optimization)
    recipe = dataclasses.replace(recipe, stage_lora=config, checkpoint_seconds=1e9, validate_every=300)
    stops = "wuerstchen.train.run.TrainingRun.train_stages"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stops, lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", device="cpu")
        for number in range(10, 20):
            shutil.copy(photos / "0.png", tmp_path / "data" / f"{number}.png")
        with pytest.raises(UserError, match=r"the data in .* have changed since .*--accept-changed-data"):
            train(recipe, tmp_path / "run", device="cpu")
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", device="cpu", accept_changed_data=True)
    recorded = read_json(tmp_path / "run" / "run.json")["recipe"]
    assert recorded["stage_lora"]["optimization"]["images"] == 300
    assert recorded["prepared_images"] == 16


def test_another_model_for_the_same_run(lora_runs, model_folder, photos, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    train(lora_runs.recipe(model_folder, photos, updates=1), tmp_path / "run", device="cpu")
    other = read_cascade(model_folder)
    torch.nn.init.ones_(other.prior.blocks[0].depthwise.bias)
    write_model(other, tmp_path / "other")
    with pytest.raises(UserError, match=r"the weights in .* have changed since"):
        train(lora_runs.recipe(tmp_path / "other", photos, updates=1), tmp_path / "run", device="cpu")


def test_a_full_disk_at_the_end_loses_nothing(lora_runs, model_folder, photos, tmp_path, monkeypatch):
    recipe = lora_runs.recipe(model_folder, photos)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("wuerstchen.train.stages.lora.write_adapter", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            train(recipe, tmp_path, device="cpu")
    assert last(tmp_path)[0].name == "000000000024"
    assert not (tmp_path / "lora").exists()
    assert (train(recipe, tmp_path, device="cpu") / "pytorch_lora_weights.safetensors").is_file()


def test_nan_ends_the_run_at_its_last_checkpoint(lora_runs, model_folder, photos, tmp_path, monkeypatch):
    recipe = lora_runs.recipe(model_folder, photos)
    whole = train(recipe, tmp_path / "whole", device="cpu")
    loss = StageLora._loss

    def broken(self, inputs, random, purpose=""):
        found = loss(self, inputs, random, purpose)
        return found * float("nan") if random.indices[0] >= 16 else found

    with monkeypatch.context() as patched:
        patched.setattr(StageLora, "_loss", broken)
        with pytest.raises(UserError, match="the loss of adapter is nan at image 16") as raised:
            train(recipe, tmp_path / "run", device="cpu")
    assert "\n" not in str(raised.value)
    assert last(tmp_path / "run")[0].name == "000000000016"
    again = train(recipe, tmp_path / "run", device="cpu")
    one, other = (load_file(next(folder.iterdir())) for folder in (whole, again))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def of_options(*words: str) -> Recipe:
    """The recipe ``lora`` with the options of a command line."""
    options = make_parser().parse_known_args(["train", "lora"])[0]
    options.overrides = [*words]
    return overridden(RECIPES["lora"](), options)


def test_a_length_in_images_is_used():
    """Bug: the length was chosen from the number of images all the same, without a word."""

    images = "--stage-lora.optimization.images"
    config = of_options(images, "40").stage_lora
    assert (config.updates, with_length(config, 1000).optimization.images) == (None, 40)
    assert of_options(f"{images}=40").stage_lora.updates is None
    assert of_options().stage_lora.updates == 0
    with pytest.raises(UserError, match="both set the length"):
        of_options(images, "40", "--stage-lora.updates", "9")


def test_intervals_follow_the_batch_size_and_the_length():
    """Bug: a run of 10 updates ended at half of its learning rate."""
    optimization, own = "--stage-lora.optimization", of_options()
    assert own == RECIPES["lora"]()

    def found(*words: str) -> tuple[int, int, int]:
        recipe = of_options(*words)
        return recipe.stage_lora.optimization.warmup, recipe.validate_every, recipe.preview_every

    assert found(f"{optimization}.batch-size", "1") == (20, 25, 100)
    assert found("--stage-lora.updates", "10") == (8, 200, 800)
    assert found(f"{optimization}.images=800") == (80, 200, 800)
    assert found("--stage-lora.updates=5") == (0, 200, 800)
    given = (f"{optimization}.warmup=7", "--validate-every=8", "--preview-every", "9")
    assert found(*given, "--stage-lora.updates", "10") == (7, 8, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage": "int8"}, r"storage must be float32 or float16 for an adapter, got int8\."),
        ({"max_shard_size": "2MB"}, r"max_shard_size is for models, got 2MB"),
        ({"fresh": ("lora",)}, r"fresh=lora is for networks of a model"),
        (
            {"optimization": Optimization(images=8, batch_size=4, optimizer="muon")},
            r"optimizer=muon is for matrices of whole networks",
        ),
    ],
)
def test_settings_without_effect_are_refused(settings, message, lora_runs, model_folder, photos, tmp_path):
    with pytest.raises(UserError, match=message):
        train(lora_runs.recipe(model_folder, photos, **settings), tmp_path, device="cpu")


def test_options_without_effect_are_refused():
    for option in ("--stage-c.text-noise=0.3", "--stage-c.optimization.images=8", "--stage-b.image-size=256"):
        with pytest.raises(UserError, match=f"{option.partition('=')[0]} has no effect on an adapter"):
            of_options(option)
    assert of_options("--stage-b.compressor-init=x").stage_b.compressor_init == "x"
    with pytest.raises(UserError, match=r"trains an adapter\. Leave them out\. --rank sets its size"):
        scaled(RECIPES["lora"](), 0.5)


def test_the_storage_is_that_of_the_file(lora_runs, model_folder, photos, tmp_path):
    """Settings of Stage C, which an adapter does not read, may differ when a run goes on."""
    recipe = lora_runs.recipe(model_folder, photos, storage="float16", updates=1)

    def dtypes(folder: Path) -> set[torch.dtype]:
        (file,) = folder.iterdir()
        return {tensor.dtype for tensor in load_file(file).values()}

    assert dtypes(train(recipe, tmp_path / "run", device="cpu")) == {torch.float16}
    export(tmp_path / "run", tmp_path / "full", storage="float32")
    assert dtypes(tmp_path / "full") == {torch.float32}
    with pytest.raises(UserError, match="storage must be float32 or float16"):
        export(tmp_path / "run", tmp_path / "int8", storage="int8")
    other = dataclasses.replace(recipe.stage_c, text_noise=0.3)
    train(dataclasses.replace(recipe, stage_c=other), tmp_path / "run", device="cpu")
