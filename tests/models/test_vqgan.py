"""Stage A against diffusers' PaellaVQModel with random weights, and the published size."""

import dataclasses

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from wuerstchen.errors import UserError
from wuerstchen.models.layers import to_channels_last
from wuerstchen.models.vqgan import VQGAN, Discriminator, MixingResidualBlock, VectorQuantizer, VQGANConfig

SMALL = VQGANConfig(bottleneck_blocks=2, embed_dim=16, num_vq_embeddings=32)
CONFIGS = {
    "small": (SMALL, (16, 16)),
    "not square": (SMALL, (8, 20)),
    "three levels": (dataclasses.replace(SMALL, levels=3), (16, 24)),
    "one level, patch 4, other scale": (
        dataclasses.replace(SMALL, levels=1, up_down_scale_factor=4, scale_factor=0.7),
        (16, 8),
    ),
    "other channels": (
        dataclasses.replace(SMALL, in_channels=4, out_channels=2, latent_channels=3),
        (8, 8),
    ),
}


def make_pair(config: VQGANConfig, randomise):
    ours = randomise(VQGAN(config)).eval()
    theirs = PaellaVQModel(**dataclasses.asdict(config)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_encode_decode_and_quantise_equal_diffusers(name, randomise, relative_error):
    config, size = CONFIGS[name]
    ours, theirs = make_pair(config, randomise)
    pixels = torch.rand(2, config.in_channels, *size)
    with torch.no_grad():
        z = theirs.encode(pixels).latents
        assert relative_error(ours.embed(pixels), z) <= 1e-5
        # Ours are the original's latents, divided by the factor for Stage B.
        assert relative_error(ours.encode(pixels), z / config.scale_factor) <= 1e-5
        assert relative_error(ours.decode(z / config.scale_factor), theirs.decode(z).sample) <= 1e-5
        quantised = theirs.decode(z, force_not_quantize=False).sample
        assert relative_error(ours(pixels)[0], quantised) <= 1e-5
        codes, _, (_, _, indices) = theirs.vquantizer(z)
        assert torch.equal(ours.vquantizer(z).indices.flatten(), indices.flatten())
        torch.testing.assert_close(ours.vquantizer(z).latents, codes)


def test_quantiser_loss_and_gradients_equal_diffusers(randomise, relative_error):
    ours, theirs = make_pair(SMALL, randomise)
    z = torch.randn(2, 4, 5, 3)
    ours_in, theirs_in = (z.clone().requires_grad_() for _ in range(2))
    output = ours.vquantizer(ours_in)
    codes, loss, _ = theirs.vquantizer(theirs_in)
    torch.testing.assert_close(output.loss, loss)
    direction = torch.randn_like(z)
    (output.loss + (output.latents * direction).sum()).backward()
    (loss + (codes * direction).sum()).backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad)
    torch.testing.assert_close(ours.vquantizer.embedding.weight.grad, theirs.vquantizer.embedding.weight.grad)


def test_network_gradients_equal_diffusers(randomise, assert_same_gradients):
    ours, theirs = make_pair(SMALL, randomise)
    ours.train(), theirs.train()  # batch statistics in the encoder
    pixels = torch.rand(2, 3, 16, 16)
    direction = torch.randn(2, 3, 16, 16)
    (ours(pixels, quantise=False)[0] * direction).sum().backward()
    (theirs.decode(theirs.encode(pixels).latents).sample * direction).sum().backward()
    # Without quantisation the codebook gets no gradient.
    assert_same_gradients(ours, theirs, but=["vquantizer.embedding.weight"])


def test_nearest_code_against_brute_force():
    quantiser = VectorQuantizer(50, 4)
    torch.nn.init.normal_(quantiser.embedding.weight)
    z = torch.randn(2, 4, 6, 7)
    rows = z.permute(0, 2, 3, 1).reshape(-1, 1, 4).double()
    expected = (rows - quantiser.embedding.weight.double()).norm(dim=-1).argmin(1)
    assert torch.equal(quantiser.nearest(z).flatten(), expected)


def test_quantisation_can_differ_per_image(randomise):
    ours = randomise(VQGAN(SMALL)).eval()
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        mixed = ours(pixels, quantise=torch.tensor([True, False]))[0]
        torch.testing.assert_close(mixed[0], ours(pixels, quantise=True)[0][0])
        torch.testing.assert_close(mixed[1], ours(pixels, quantise=False)[0][1])


def test_published_size():
    with torch.device("meta"):
        ours, theirs = VQGAN(VQGANConfig()), PaellaVQModel()
        discriminator = Discriminator()
    assert sum(p.numel() for p in ours.parameters()) == 18_406_894
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert len(shapes) == 122
    assert VQGANConfig().factor == 4
    assert sum(p.numel() for p in discriminator.parameters()) == 6_271_105


def test_blocks_start_as_the_identity():
    x = to_channels_last(torch.randn(1, 8, 5, 5))
    assert torch.equal(MixingResidualBlock(8)(x), x)


def test_discriminator_judges_patches():
    judge = Discriminator(c_hidden=32, depth=4)
    assert judge.min_side == 17
    assert judge(torch.rand(2, 3, 33, 64)).shape == (2, 1, 3, 4)
    # Spectral norm: no convolution may scale its input by more than 1.
    for _ in range(30):
        judge(torch.rand(1, 3, 64, 64))
    stretch = torch.linalg.matrix_norm(judge.encoder[0].weight.detach().flatten(1), 2)
    assert stretch.item() == pytest.approx(1, rel=0.02)


def test_too_small_widths_are_refused():
    with pytest.raises(UserError, match=r"got levels=3 and embed_dim=3\. Use a multiple of 4"):
        VQGANConfig(embed_dim=3, levels=3)
