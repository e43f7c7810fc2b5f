"""The loss on held-out pictures: what it measures, on which pictures, and that training does not notice."""

import copy
import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from wuerstchen.data.emoji import EmojiSource, listed_heldout, sample_root
from wuerstchen.data.folder import FolderSource
from wuerstchen.data.open import open_source
from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.evaluate.lists import select
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.previewer import Previewer
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train import run_data
from wuerstchen.train.config import Phase
from wuerstchen.train.engine.ema import make_average
from wuerstchen.train.engine.validation import BINS, Denoising, HeldOut, Validation, held_out
from wuerstchen.train.feed.random import ImageRandom
from wuerstchen.train.stages.decoder import StageB, StageBRefinement
from wuerstchen.train.stages.prior import StageC

from ...configurations import SMALL_PREVIEWER, SMALL_STATISTICS, with_lite0

CPU = torch.device("cpu")
RECIPE = tiny()


@pytest.fixture
def cascade(small_cascade):
    return with_lite0(copy.deepcopy(small_cascade))


@pytest.fixture
def pictures():
    images = torch.randint(0, 256, (6, 128, 128, 3), generator=torch.Generator().manual_seed(3))
    return HeldOut(images=images.to(torch.uint8), captions=["a cat"] * 6)


def make_stage(name, cascade):
    if name == "c":
        settings = dataclasses.replace(cascade.settings, latent_statistics=SMALL_STATISTICS)
        return StageC(RECIPE.stage_c, RECIPE, dataclasses.replace(cascade, settings=settings))
    model = dataclasses.replace(cascade, previewer=Previewer(SMALL_PREVIEWER), text_encoder=None)
    config = dataclasses.replace(RECIPE.stage_b, refine_images=8)
    return (StageB if name == "b" else StageBRefinement)(config, RECIPE, model)


def averages_of(stage):
    return {name: make_average(stage.networks[name]) for name in stage.averaged}


def measure(stage, pictures):
    return Validation(stage, pictures, dtype=None, device=CPU)(averages_of(stage))


@pytest.mark.parametrize("name", ["b", "b2", "c"])
def test_what_knows_nothing_has_the_loss_of_the_noise_itself_and_what_knows_all_has_none(
    name, cascade, pictures, monkeypatch
):
    stage = make_stage(name, cascade)
    assert isinstance(stage, Denoising)
    monkeypatch.setattr(type(stage), "predict", lambda self, averages, inputs, x, t: torch.zeros_like(x))
    found = measure(stage, pictures)
    assert len(found["bins"]) == BINS
    assert found["bins"] == pytest.approx([1.0] * BINS, abs=0.35)  # latents of 2×3×3, six times

    def knowing(self, averages, inputs, x, t):
        alpha_bar = CosineSchedule().alpha_bar(t).view(-1, 1, 1, 1)
        return (x - alpha_bar.sqrt() * inputs[self.denoises]) / (1 - alpha_bar).sqrt()

    monkeypatch.setattr(type(stage), "predict", knowing)
    assert measure(stage, pictures)["bins"] == pytest.approx([0.0] * BINS, abs=1e-6)


def test_stage_c_written_out(cascade, pictures):
    """By hand, all images in one batch; the batches of the stage must not matter."""
    stage = make_stage("c", cascade)
    stage.optimization = dataclasses.replace(stage.optimization, batch_size=4)
    averages = averages_of(stage)
    found = Validation(stage, pictures, dtype=None, device=CPU)(averages)
    prior = averages["prior"]
    with torch.no_grad():
        pixels = pictures.images.permute(0, 3, 1, 2).float() / 255
        z = cascade.compressor.eval()(compressor_input(pixels))
        x = (z - torch.tensor([0.5, -1.0]).view(2, 1, 1)) / torch.tensor([2.0, 3.0]).view(2, 1, 1)
        text = cascade.text_encoder.encode(pictures.captions)
        context = prior.context(text.states, text.mask)
        bins = []
        for k in range(8):
            t = torch.full((6,), (k + 0.5) / 8)
            alpha_bar = CosineSchedule().alpha_bar(t).view(-1, 1, 1, 1)
            noise = ImageRandom(0, torch.arange(6)).normal(f"validation {k}", (2, 3, 3))
            predicted = prior(alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise, t, context)
            bins.append((predicted - noise).double().square().mean().item())
    assert found["bins"] == pytest.approx(bins, rel=1e-4)
    weights = 1 - CosineSchedule().alpha_bar((torch.arange(8) + 0.5) / 8)
    assert stage.config.loss_weight == "p2"
    assert found["loss"] == pytest.approx(
        (weights.double() * torch.tensor(bins).double()).mean().item(), rel=1e-3
    )


@pytest.mark.parametrize("name", ["b", "c"])
def test_errors_around_a_known_rectangle_are_of_the_other_cells(name, cascade, pictures, monkeypatch):
    """The same cells count with the rectangle known and with nothing known."""
    stage, seen = make_stage(name, cascade), []

    def reading(self, averages, inputs, x, t):
        known, difference = t == 0, (x - inputs[self.denoises]).abs().amax(1)
        seen.append((known, bool((difference[known] == 0).all())))
        some_known = known.flatten(1).any(1).view(-1, 1, 1, 1)
        return torch.where(some_known, 2.0, 3.0).expand_as(x)

    monkeypatch.setattr(type(stage), "predict", reading)
    monkeypatch.setattr("wuerstchen.train.engine.validation._noise", lambda clean, *_: torch.ones_like(clean))
    found = Validation(stage, pictures, dtype=None, device=CPU).around_known_cells({})
    assert found == {"known": [1.0] * BINS, "nothing_known": [4.0] * BINS}
    known, is_clean = zip(*seen, strict=True)
    assert all(is_clean)
    side = known[0].shape[1]
    assert {int(cells[0].sum()) for cells in known} == {0, (side // 2) ** 2}
    assert known[0][0, side // 2, side // 2]


@pytest.mark.parametrize("name", ["b", "b2", "c"])
def test_it_repeats_and_leaves_networks_and_generators_alone(name, cascade, pictures):
    stage = make_stage(name, cascade)
    for network in stage.networks.values():
        network.train()
    averages = averages_of(stage)
    modules = [*stage.networks.values(), *averages.values(), cascade.vqgan, cascade.compressor]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    modes = [[m.training for m in module.modules()] for module in modules]
    state = torch.random.get_rng_state()
    validation = Validation(stage, pictures, dtype=None, device=CPU)
    first, second = validation(averages), validation(averages)
    assert first == second
    assert torch.equal(state, torch.random.get_rng_state())
    for module, weights in zip(modules, before, strict=True):
        assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
    assert modes == [[m.training for m in module.modules()] for module in modules]
    # And it looks at the averages: others give another loss.
    with torch.no_grad():
        for average in averages.values():
            for parameter in average.parameters():
                parameter.mul_(1.2)
    assert validation(averages)["bins"] != first["bins"]


def test_what_is_not_finite_is_none(cascade, pictures, monkeypatch):
    stage = make_stage("c", cascade)
    monkeypatch.setattr(StageC, "predict", lambda self, averages, inputs, x, t: x / (t.mean() > 0.2))
    found = measure(stage, pictures)
    assert found["bins"][:2] == [None, None]
    assert None not in found["bins"][2:]
    assert found["loss"] is None
    json.dumps(found, allow_nan=False)


def test_it_takes_at_most_a_twentieth_of_the_time(cascade, pictures, monkeypatch):
    clock = [100.0]
    # Not time's own function: event loops of other tests would wait by that clock.
    of_validation = "wuerstchen.train.engine.validation.time"
    monkeypatch.setattr(of_validation, SimpleNamespace(monotonic=lambda: clock[0]))
    stage = make_stage("c", cascade)
    predict = StageC.predict

    def slow(self, *given):
        clock[0] += 1.0
        return predict(self, *given)

    monkeypatch.setattr(StageC, "predict", slow)
    validation = Validation(stage, pictures, dtype=None, device=CPU)
    assert validation.due
    validation(averages_of(stage))
    took = clock[0] - 100.0
    assert not validation.due
    clock[0] += 19 * took
    assert not validation.due
    clock[0] += 2 * took
    assert validation.due


def make_folder(root, count):
    root.mkdir()
    for n in range(count):
        Image.new("RGB", (16, 16), (n % 256, 0, 0)).save(root / f"{n}.png")
        (root / f"{n}.txt").write_text(f"picture {n}")
    return root


def names(source):
    return {source.name(item) for item in range(len(source))}


def test_one_image_in_fifty_of_a_folder_is_held_out_and_never_trained_on(tmp_path):
    root = make_folder(tmp_path / "a", 600)
    training, kept = names(open_source(str(root))), names(FolderSource(root, split="heldout"))
    assert training | kept == names(FolderSource(root))
    assert not training & kept
    assert 4 <= len(kept) <= 25
    # More images move none from one side to the other.
    for n in range(600, 700):
        Image.new("RGB", (16, 16)).save(root / f"{n}.png")
        (root / f"{n}.txt").write_text("new")
    assert training <= names(open_source(str(root)))
    assert kept <= names(FolderSource(root, split="heldout"))
    found = held_out(open_source(str(root), "heldout", verify=False), 16, count=3)
    assert found.images.shape == (3, 16, 16, 3)
    again = held_out(open_source(str(root), "heldout", verify=False), 16, count=3)
    assert torch.equal(found.images, again.images)
    assert found.captions == again.captions


def test_small_folders_and_the_sample_hold_out_nothing(tmp_path):
    root = make_folder(tmp_path / "a", 99)
    assert len(open_source(str(root))) == 99
    assert held_out(open_source(str(root), "heldout", verify=False), 16) is None
    assert held_out(open_source("sample", "heldout", verify=False), 16) is None
    assert held_out(open_source(str(sample_root()), "heldout", verify=False), 16) is None


def test_what_one_phase_holds_out_no_other_trains_on(tmp_path, monkeypatch):
    """A folder in another gives its images other names, and so had others on the other side."""
    monkeypatch.chdir(tmp_path)
    root = make_folder(tmp_path / "photos", 300)
    fine, few = make_folder(root / "fine", 600), make_folder(root / "few", 60)
    full = tiny()
    phases = [Phase(optimization=full.stage_c.optimization, data=str(folder)) for folder in (fine, few)]
    config = dataclasses.replace(full.stage_c, phases=tuple(phases))
    recipe = dataclasses.replace(full, data="photos", stage_c=config)
    training, kept = set(), set()
    for data, source in run_data.open_sources(recipe).items():
        trained = {(source.root / name).resolve() for name in names(source)}
        around = run_data.folder_around(data, recipe)
        assert around == (None if data == "photos" else root)
        heldout = {(source.root / name).resolve() for name in names(FolderSource(data, "heldout", around))}
        assert len(trained) + len(heldout) == len(FolderSource(data))
        training |= trained
        kept |= heldout
    assert kept
    assert not training & kept
    assert any(path.parent == fine for path in kept)
    assert names(FolderSource(fine, "heldout")) != names(FolderSource(fine, "heldout", root))
    # A folder that the other does not read keeps its own.
    hidden = make_folder(root / ".hidden", 300)
    assert names(FolderSource(hidden, "heldout", root)) == names(FolderSource(hidden, "heldout"))


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    root = make_folder(tmp_path / "a", 200)
    kept = sorted(names(FolderSource(root, split="heldout")))
    (root / kept[0]).write_bytes(b"no picture")
    found = held_out(open_source(str(root), "heldout", verify=False), 16)
    assert (0 if found is None else len(found.captions)) == len(kept) - 1


def test_of_a_built_set_they_are_the_val_part(tmp_path):
    built = tmp_path / "emoji"
    shutil.copytree(sample_root(), built)
    lines = (built / "index.jsonl").read_text().splitlines()
    val = {entry.id for entry in select("a", ("val",))}
    heldout = listed_heldout()
    chosen = [*sorted(val)[:5], *sorted(heldout - val)[:5]]
    for name in chosen:  # images borrowed from the sample under held-out names
        style, subject = name.split("/")
        record = json.loads(lines[0]) | {"id": name, "style": style, "hex": subject, "split": "heldout"}
        record["license"] = {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0"}.get(style, "MIT")
        lines.append(json.dumps(record))
        shutil.copy(built / f"{json.loads(lines[0])['id']}.webp", built / f"{name}.webp")
    (built / "index.jsonl").write_text("\n".join(lines) + "\n")
    assert len(EmojiSource(built, split="heldout")) == 10
    assert len(held_out(open_source(str(built), "heldout", verify=False), 32).captions) == 5
