"""The options of Stage B's losses: features of the predicted image, and the previewer's say."""

import contextlib
import copy
import dataclasses
import gc
import weakref

import pytest
import torch

from wuerstchen.diffusion.schedule import CosineSchedule
from wuerstchen.models.compressor import compressor_input
from wuerstchen.models.efficientnet import EfficientNetLite
from wuerstchen.models.vqgan import VQGAN
from wuerstchen.recipes.tiny import tiny
from wuerstchen.train.engine import update
from wuerstchen.train.engine.checkpoint import TrainingState
from wuerstchen.train.engine.distributed import Processes
from wuerstchen.train.engine.optim import make_optimizer
from wuerstchen.train.initial_weights import InitialWeights, Parts
from wuerstchen.train.stages import decoder
from wuerstchen.train.stages.base import inputs_of
from wuerstchen.train.stages.decoder import DECODER_STAGE, StageB, StageBRefinement
from wuerstchen.train.stages.perceptual import PerceptualLoss

from ...configurations import with_lite0
from .test_base import CPU, RECIPE, a_run, losses_of, make_batch, random_of, with_previewer

PLAIN = {"map_dropout": 0.0, "map_noise": 0.0}


@pytest.fixture
def cascade(small_cascade):
    """A copy that a test may train, with a previewer and a compressor whose backbone sees something."""
    return with_previewer(with_lite0(copy.deepcopy(small_cascade)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return EfficientNetLite()


def make_stage(cascade, network, *, refines: bool = False, **changes):
    config = dataclasses.replace(RECIPE.stage_b, refine_images=8, **PLAIN, **changes)
    kind = StageBRefinement if refines else StageB
    stage = kind(config, RECIPE, cascade, None, network)
    for trained in stage.networks.values():
        trained.requires_grad_(True).eval()  # fixed statistics of the batch norm
    return stage


def make_step(stage, device: torch.device) -> update.TrainStep:
    optimizers = {name: make_optimizer(n, stage.optimization) for name, n in stage.networks.items()}
    state = TrainingState(networks=stage.networks, averages={}, optimizers=optimizers)
    return update.TrainStep(stage, state, 1, None, Processes(device))


def decoder_loss(stage, batch):
    inputs = {"images": batch.images, **stage.prepare(batch, CPU)}
    return next(stage.losses(inputs, random_of(batch)))


@pytest.mark.parametrize("refines", [False, True])
@torch.no_grad()
def test_the_feature_loss_written_out(refines, cascade, network):
    """On the first half of the batch. Catches the other phase's weight, a wrong x̂₀, a missing factor ᾱ."""
    own, other = "feature_weight", "refine_feature_weight"
    own, other = (other, own) if refines else (own, other)
    weights = {own: 3.0, other: 0.5}
    batch = make_batch(128)
    plain = decoder_loss(make_stage(cascade, network, refines=refines), batch)[1]
    stage = make_stage(cascade, network, refines=refines, feature_fraction=0.5, **weights)
    _, loss, terms = decoder_loss(stage, batch)
    random, pixels = random_of(batch), batch.pixels(CPU)
    latents, z = cascade.vqgan.encode(pixels), cascade.compressor(compressor_input(pixels))
    t = stage.objective.times(random.uniform("time"))
    noise = random.normal("noise", latents.shape[1:])
    alpha_bar = CosineSchedule().alpha_bar(t)[:, None, None, None]
    x = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    predicted = cascade.decoder(x, t, cascade.decoder.context(z, tuple(x.shape[2:])))
    clean = (x - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
    drawn, perceptual = cascade.vqgan.decode(clean), PerceptualLoss(network)
    each = torch.stack([perceptual(drawn[i : i + 1], pixels[i : i + 1]) for i in range(2)])
    expected = (alpha_bar[:2].flatten() * each).mean()
    assert expected > 0
    torch.testing.assert_close(terms["features"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, plain + 3.0 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("refines", [False, True])
def test_the_feature_loss_trains_the_decoder_alone(refines, cascade, network):
    """Gradients pass through Stage A and the features, whose weights stay as they are."""
    stage = make_stage(cascade, network, refines=refines, feature_weight=1.0, refine_feature_weight=1.0)
    torch.nn.init.normal_(cascade.decoder.clf[1].weight, std=0.02)  # at 0 nothing before it would learn
    batch = make_batch(128)
    with torch.no_grad():
        inputs = {"images": batch.images, **stage.prepare(batch, CPU)}
    _, _, terms = next(stage.losses(inputs, random_of(batch)))
    terms["features"].backward()
    assert cascade.decoder.embedding[1].weight.grad.abs().sum() > 0
    assert (cascade.compressor.mapper[0].weight.grad is None) == refines
    frozen = (*cascade.vqgan.parameters(), *network.parameters())
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_a_fraction_is_rounded_up(cascade, network, monkeypatch):
    """A smaller last batch still has at least one image."""
    stage, seen = make_stage(cascade, network, feature_weight=1.0, feature_fraction=0.25), []
    of_each = PerceptualLoss.of_each
    monkeypatch.setattr(
        PerceptualLoss, "of_each", lambda *given: (seen.append(len(given[1])), of_each(*given))[1]
    )
    for count in (1, 4, 5):
        with torch.no_grad():
            decoder_loss(stage, make_batch(128, count))
    assert seen == [1, 1, 2]


def test_refinement_reads_images_only_for_the_feature_loss(cascade, network):
    """They take the most memory of all inputs."""
    batch = make_batch(128)
    for weight in (0.0, 1.0):
        stage = make_stage(cascade, network, refines=True, feature_weight=2.0, refine_feature_weight=weight)
        with torch.no_grad():
            assert ("images" in inputs_of(stage, batch, CPU)) == (weight > 0)


def train_stage_b(recipe, train_phase, updates=True):
    """Trains Stage B with ``train_phase`` in place of the loop."""
    DECODER_STAGE.train(
        a_run(
            recipe=recipe,
            device=CPU,
            start=InitialWeights(),
            parts=Parts(vqgan=VQGAN(recipe.vqgan)),
            makes_updates=updates,
            is_new=lambda name: False,
            train_phase=train_phase,
        )
    )


@pytest.mark.parametrize(
    ("changes", "updates", "loaded"),
    [
        ({}, True, False),
        ({"feature_weight": 1.0}, True, True),
        ({"refine_feature_weight": 1.0, "refine_images": 8}, True, True),
        ({"refine_feature_weight": 1.0}, True, False),
        ({"feature_weight": 1.0}, False, False),
    ],
)
def test_the_network_is_loaded_where_it_is_used(changes, updates, loaded, monkeypatch):
    """Exports make no updates."""
    recipe, seen = tiny(), []
    recipe = dataclasses.replace(recipe, stage_b=dataclasses.replace(recipe.stage_b, **changes))
    monkeypatch.setattr(decoder, "perceptual_network", lambda device: EfficientNetLite())

    def train_phase(stage, phase, *, multiple):
        seen.append(stage.perceptual is not None)
        return lambda network, name: stage.networks[name]

    train_stage_b(recipe, train_phase, updates)
    assert seen == [loaded] * (1 + ("refine_images" in changes))


def test_a_phase_does_not_keep_the_networks_of_the_phase_before(monkeypatch):
    """Its raw weights would take memory on the GPU until the end of the refinement."""
    recipe, earlier = tiny(), []
    recipe = dataclasses.replace(recipe, stage_b=dataclasses.replace(recipe.stage_b, refine_images=8))

    def train_phase(stage, phase, *, multiple):
        gc.collect()
        assert [reference() for reference in earlier] == [None] * len(earlier)
        earlier.extend(map(weakref.ref, stage.networks.values()))
        return lambda network, name: network

    train_stage_b(recipe, train_phase)
    assert len(earlier) == 4


def test_the_loss_of_the_previewer_trains_the_compressor(cascade):
    """The compressor's gradient is that of both losses, with the weight given."""
    batch, found = make_batch(128), {}
    for weight in (0.0, 1.0, 3.0):
        stage = make_stage(cascade, None, previewer_weight=weight)
        stage.trained.zero_grad()
        next(losses_of(stage, batch))[1].backward(inputs=list(stage.trained.parameters()))
        found[weight] = [p.grad.clone() for p in stage.trained.compressor.mapper[0].parameters()]
        assert all(p.grad is None for p in stage.previewer.parameters())
    for none, one, three in zip(*found.values(), strict=True):
        assert not torch.allclose(none, one, rtol=1e-3)
        torch.testing.assert_close(three - none, 3 * (one - none), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_previewers_own_update_is_the_same(sharded, cascade, monkeypatch):
    """A network learns from its own loss alone. A sharded network's backward pass reaches all weights."""
    if sharded:
        monkeypatch.setattr(update, "is_sharded", lambda network: hasattr(network, "compressor"))
    batch, found = make_batch(128), []
    for weight in (0.0, 5.0):
        stage = make_stage(copy.deepcopy(cascade), None, previewer_weight=weight)
        stage.optimization = dataclasses.replace(stage.optimization, accumulate=2)
        with torch.no_grad():
            inputs = inputs_of(stage, batch, CPU)
        values = make_step(stage, CPU)(inputs, batch.indices)
        found.append((values["gradient_previewer"], stage.previewer.state_dict(), values["loss"]))
    (gradient, plain, loss), (same, again, larger) = found
    assert gradient == same
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
    assert larger > loss


def trained(stage, device: torch.device, *, records: bool) -> dict[str, torch.Tensor]:
    """The weights after six updates."""
    for network in (stage.vqgan, stage.perceptual, *stage.networks.values()):
        network.to(device)
    batch = make_batch(128)
    with torch.no_grad():
        inputs = inputs_of(stage, batch, device)
    with contextlib.closing(update.StepRunner(make_step(stage, device), records)) as runner:
        for _ in range(6):
            runner(inputs, batch.indices.to(device))
    return torch.nn.ModuleDict(stage.networks).state_dict()


@pytest.mark.gpu
def test_updates_with_all_options_can_be_recorded(cascade, network):
    """A decision on the host, or a number copied to the GPU, would stop the recording."""
    device, options = torch.device("cuda"), {"feature_weight": 1.0, "previewer_weight": 1.0}
    found = [
        trained(make_stage(copy.deepcopy(cascade), network, **options), device, records=records)
        for records in (False, True)
    ]
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5)
