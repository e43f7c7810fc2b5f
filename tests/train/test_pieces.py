"""A recipe that is trained in pieces: run after run, each from the model of the one before."""

import dataclasses
import json

import pytest
import torch

import wuerstchen
from wuerstchen.checkpoints.native import read_parts
from wuerstchen.cli import main
from wuerstchen.data.open import open_source
from wuerstchen.diffusion.objective import OBJECTIVES, make_objective
from wuerstchen.errors import UserError
from wuerstchen.models.cascade import PUBLISHED_STATISTICS, CascadeSettings
from wuerstchen.models.compressor import Compressor
from wuerstchen.models.decoder import Decoder
from wuerstchen.models.previewer import Previewer
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.recipes.mini import mini
from wuerstchen.recipes.tiny import tiny
from wuerstchen.recipes.v2 import v2_stage_b, v2_stage_c
from wuerstchen.train.config import Optimization, Phase, as_dict
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.initial_weights import InitialWeights, Parts
from wuerstchen.train.recorded_recipe import recipe_of
from wuerstchen.train.report.events import Log
from wuerstchen.train.run import TrainingRun, train
from wuerstchen.train.stage_table import invalidated, needed_before, trained_phases
from wuerstchen.train.stages.base import cascade_settings

from ..configurations import with_optimization

NETWORKS = ("vqgan", "decoder", "compressor", "previewer", "prior")
PIECES = (("a",), ("b",), ("b2",), ("b3", "a2"), ("c",), ("c2",))


def phased():
    """All kinds of phases, with a few updates each."""
    recipe = tiny()
    decoder = dataclasses.replace(recipe.decoder, c_hidden=(16, 32), blocks=(1, 1), c_cond=16)

    def brief(config, **changes):
        return dataclasses.replace(with_optimization(config, images=16, batch_size=8), **changes)

    alone = Phase(
        optimization=Optimization(images=8, batch_size=4, learning_rate=2e-4),
        time_shift=3.0,
        decoder_only=True,
    )
    again = Phase(optimization=Optimization(images=8, batch_size=4, learning_rate=5e-4))
    return dataclasses.replace(
        recipe,
        vqgan=dataclasses.replace(recipe.vqgan, embed_dim=16),
        decoder=decoder,
        prior=dataclasses.replace(recipe.prior, c=64, depth=1, nhead=1),
        stage_a=brief(recipe.stage_a, refine_images=8, discriminator_width=16, perceptual="none"),
        stage_b=brief(recipe.stage_b, phases=(alone,), refine_images=8, refine_shift=0.5),
        stage_c=brief(recipe.stage_c, phases=(again,), blend=0.5),
        statistics_images=8,
        prior_steps=1,
        decoder_steps=1,
        preview_prompts=(),
        workers=0,
        checkpoint_seconds=3600.0,
    )


def piece(only, start, **changes):
    return dataclasses.replace(phased(), only=only, start_from=str(start or ""), **changes)


def weights_of(model) -> dict[str, torch.Tensor]:
    parts = read_parts(model)[1]
    return {f"{n}/{k}": t for n in NETWORKS if n in parts for k, t in parts[n].state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(phased(), tmp_path_factory.mktemp("whole") / "run", device="cpu")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The models after each piece, by its phases."""
    folder, model, found = tmp_path_factory.mktemp("pieces"), None, {}
    for only in PIECES:
        model = found[only] = train(piece(only, model), folder / "-".join(only), device="cpu")
        assert {path.name for path in model.parent.glob("stage_*")} == {f"stage_{name}" for name in only}
    return found


def test_pieces_make_the_model_of_the_whole_run(whole, pieces):
    """The same images, noise, rates and shifts in every phase: the weights are equal, bit for bit."""
    expected, found = weights_of(whole), weights_of(pieces["c2",])
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    (settings, _, origins), (ours, _, our_origins) = read_parts(whole), read_parts(pieces["c2",])
    assert settings == ours
    assert {n: p.images for n, p in origins.items()} == {n: p.images for n, p in our_origins.items()}
    assert origins["decoder"].images == 32
    assert origins["compressor"].images == 16


def test_phases_log_the_same_settings_alone_and_in_one_run(whole, pieces):
    def starts(model):
        events = map(json.loads, (model.parent / "log.jsonl").read_text().splitlines())
        return [(e["stage"], e["total"]) for e in events if e["event"] == "start"]

    assert starts(whole) == [start for model in pieces.values() for start in starts(model)]


def test_each_phase_has_its_own_shift(tmp_path, monkeypatch):
    """The shift of the stage, of a phase, and of the refinement."""
    seen = {}

    def run_stage(self, stage, phase, multiple):
        seen[stage.name] = stage.objective.time_shift
        return self.run_dir

    monkeypatch.setattr(TrainingRun, "run_stage", run_stage)
    statistics = {"mean": [0.0] * 16, "std": [1.0] * 16}
    monkeypatch.setattr(TrainingRun, "averaged", lambda self, checkpoint, network, name: network)
    monkeypatch.setattr(TrainingRun, "measured_once", lambda self, folder, measure, known: statistics)
    recipe = dataclasses.replace(phased(), stages=("b", "c"), start_from="bundled")
    recipe = dataclasses.replace(
        recipe,
        fresh=("b", "c"),
        stage_a=dataclasses.replace(recipe.stage_a, refine_images=0),
        stage_c=dataclasses.replace(
            recipe.stage_c,
            time_shift=1.5,
            phases=(dataclasses.replace(recipe.stage_c.phases[0], time_shift=4.0),),
        ),
    )
    train(recipe, tmp_path / "run", device="cpu")
    assert seen == {"b": 1.0, "b2": 3.0, "b3": 0.5, "c": 1.5, "c2": 4.0}


@pytest.mark.parametrize(
    ("only", "frozen"), [("b2", {"vqgan", "compressor"}), ("a2", {"vqgan", "compressor", "decoder"})]
)
def test_frozen_networks_are_on_the_device_of_the_run(only, frozen, tmp_path, monkeypatch):
    """The training loop moves only what it trains, and the networks of the start are on the CPU."""
    recipe, device, seen = piece((only,), "start"), torch.device("meta"), {}
    classes = {"vqgan": VQGAN, "compressor": Compressor, "decoder": Decoder, "previewer": Previewer}
    networks = {name: network(getattr(recipe, name)) for name, network in classes.items()}

    def run_stage(self, stage, phase, multiple):
        for name in frozen:
            assert getattr(stage, name) not in stage.networks.values()
            seen[name] = {parameter.device for parameter in getattr(stage, name).parameters()}
        raise InterruptedError

    monkeypatch.setattr(TrainingRun, "run_stage", run_stage)
    start = InitialWeights(settings=CascadeSettings(), parts=Parts(**networks))
    log = Log(tmp_path / "log.jsonl", writes=False)
    run = TrainingRun(recipe, tmp_path, {recipe.data: open_source("sample")}, start, Processes(device), log)
    with pytest.raises(InterruptedError):
        run.train_stages()
    assert seen == {name: {device} for name in frozen}


@pytest.mark.parametrize("prediction", OBJECTIVES)
def test_a_refinement_of_stage_a_samples_by_the_objective_of_the_start(prediction, tmp_path, monkeypatch):
    """Stage B is not trained in this piece, so the recipe does not say what it predicts."""
    recipe, seen = piece(("a2",), "start"), []
    decoder = dataclasses.replace(recipe.decoder, prediction=prediction)
    parts = Parts(
        vqgan=VQGAN(recipe.vqgan), decoder=Decoder(decoder), compressor=Compressor(recipe.compressor)
    )

    def run_stage(self, stage, phase, multiple):
        seen.append(stage.objective)
        raise InterruptedError

    monkeypatch.setattr(TrainingRun, "run_stage", run_stage)
    settings = CascadeSettings(decoder_objective=make_objective(prediction))
    start = InitialWeights(settings=settings, parts=parts)
    log, sources = Log(tmp_path / "log.jsonl", writes=False), {recipe.data: open_source("sample")}
    run = TrainingRun(recipe, tmp_path, sources, start, Processes(torch.device("cpu")), log)
    with pytest.raises(InterruptedError):
        run.train_stages()
    assert seen == [make_objective(prediction)]


@pytest.mark.gpu
@pytest.mark.parametrize("only", PIECES[2:])
def test_pieces_train_on_a_gpu(only, pieces, tmp_path):
    """Each later piece, with recorded updates, from the folder of the one before."""
    before = PIECES[PIECES.index(only) - 1]
    model = train(piece(only, pieces[before], acceleration="graph"), tmp_path / "run", device="cuda")
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(model).values())


def test_pieces_from_fp16_folders_work(whole, pieces, tmp_path):
    """A refinement of Stage B of a complete model: all other networks stay as they are in the folder."""
    small = {"storage": "float16", "max_shard_size": "12MiB"}
    start = tmp_path / "start"
    arguments = ["--layout", "native", "--storage", "float16", "--max-shard-size", "12MiB"]
    assert main(["convert", str(whole), str(start), *arguments]) == 0
    model = train(piece(("b3",), start, **small), tmp_path / "b3", device="cpu")
    assert max(path.stat().st_size for path in model.rglob("*.safetensors")) <= 12 * 2**20
    assert {path.name for path in (model / "text_encoder").glob("model*")} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    before, after = weights_of(start), weights_of(model)
    assert all(torch.equal(t, t.half().float()) for t in after.values() if t.is_floating_point())
    changed = {n.partition("/")[0] for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed == {"decoder", "previewer"}
    assert read_parts(model)[0].latent_statistics == read_parts(whole)[0].latent_statistics
    (image,) = wuerstchen.load(model, "cpu").generate("a cat")
    assert image.size == (128, 128)


def test_a_run_of_one_phase_resumes_and_exports(pieces, tmp_path):
    recipe, run = piece(("b2",), pieces["b",]), tmp_path / "run"
    model = train(recipe, run, device="cpu")
    assert recipe_of(as_dict(recipe), "run.json") == recipe
    assert train(recipe, run, device="cpu") == model
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--storage", "float16", "--max-shard-size", "12MiB"]) == 0
    expected, found = weights_of(model), weights_of(out)
    assert all(
        torch.equal(t.half().float() if t.is_floating_point() else t, found[n]) for n, t in expected.items()
    )
    train(recipe, run, device="cpu", changes=["images=16"])
    assert read_parts(model)[2]["decoder"].images == 16 + 16


def names(recipe):
    return [phase.name for phase in trained_phases(recipe)]


def test_only_decides_which_stages_are_trained_and_needed():
    recipe = dataclasses.replace(mini(), only=("b2", "a2"), start_from="m")
    assert (recipe.stages, names(recipe)) == (("a", "b"), ["b2", "a2"])
    assert [kind.short for kind in needed_before(recipe)] == ["a", "b"]
    assert invalidated(recipe) == []
    recipe = dataclasses.replace(mini(), only=("a2",), start_from="m")
    assert [kind.short for kind in needed_before(recipe)] == ["a", "b"]
    recipe = dataclasses.replace(mini(), only=("b", "b2"), start_from="m")
    assert [kind.short for kind in needed_before(recipe)] == ["a"]
    assert [kind.short for kind in invalidated(recipe) if kind.makes] == ["c", "few", "few_b"]
    assert dataclasses.replace(recipe, only=("b2",)).stages == ("b",)
    assert names(dataclasses.replace(mini(), only=("a",))) == ["a"]


def test_later_phases_are_not_fresh():
    """Recipes that start a stage anew in a model say so, and its second phase goes on all the same."""
    first = dataclasses.replace(v2_stage_b(), only=("b",))
    second = dataclasses.replace(v2_stage_b(), only=("b2",), start_from="runs/b/model")
    assert (first.fresh, second.fresh) == (("b",), ())
    assert names(dataclasses.replace(v2_stage_c(), only=("c3", "c4"))) == ["c3", "c4"]


def test_fresh_names_only_stages_of_the_recipe():
    with pytest.raises(UserError, match="fresh must name trained stages, got b"):
        dataclasses.replace(mini(), stages=("c",), fresh=("b",), only=("c",), start_from="m")


def test_the_sampler_of_a_later_stage_c_stops_no_piece():
    """Before Stage C the model has the published objective, which the sampler of flow matching does not
    fit."""
    prior = dataclasses.replace(mini().prior, prediction="flow")
    recipe = dataclasses.replace(mini(), prior=prior, prior_sampler="euler")
    start = CascadeSettings()
    for only, sampler in (("a",), "ddpm"), (("b",), "ddpm"), (("b2", "a2"), "ddpm"), (("c",), "euler"):
        of_piece = dataclasses.replace(recipe, only=only, start_from="m")
        start = cascade_settings(of_piece, PUBLISHED_STATISTICS, start)
        assert start.prior_sampler == sampler
    assert cascade_settings(dataclasses.replace(recipe, only=("b2",), start_from="m"), PUBLISHED_STATISTICS)


@pytest.mark.parametrize(
    ("only", "start", "message"),
    [
        (("b9",), "m", r"got b9\. Its phases are a b b2 a2 c"),
        (("b", "a2"), "m", r"consecutive phases of the recipe, got b a2"),
        (("b2",), "", r"only=b2 builds on a and b, which this run neither trains nor starts from"),
        (("a2",), "", r"only=a2 builds on a and b"),
    ],
)
def test_impossible_selections_are_refused(only, start, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(mini(), only=only, start_from=start)


def test_a_phase_named_in_stages_gets_a_hint_at_only():
    """Run folders and logs call it a stage."""
    with pytest.raises(UserError, match=r"whole stages, got b2, a phase of a stage\. Use --only b2 "):
        dataclasses.replace(mini(), stages=("b2",), start_from="m")


def test_a_start_without_the_phases_before_is_refused(pieces, tmp_path):
    """A refinement of Stage A samples from Stage B, which the model after Stage A does not have."""
    for only in (("a2",), ("b2",)):
        with pytest.raises(UserError, match=r"has no decoder\. Use a"):
            train(piece(only, pieces["a",]), tmp_path / "run", device="cpu")


def test_stage_c_has_no_phase_of_a_decoder():
    alone = Phase(optimization=Optimization(images=8, batch_size=8), decoder_only=True)
    with pytest.raises(UserError, match="decoder_only is for phases of Stage B"):
        dataclasses.replace(tiny().stage_c, phases=(alone,))
