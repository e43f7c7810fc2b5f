"""The models that can prepare data."""

import pytest
from torch import nn

from wuerstchen.checkpoints.native import Provenance, write_network
from wuerstchen.data import prepare_networks
from wuerstchen.data.prepare_networks import read_networks
from wuerstchen.errors import UserError
from wuerstchen.models.compressor import Compressor, CompressorConfig


def test_a_model_without_a_compressor(write_published, tmp_path, monkeypatch):
    model = write_published(tmp_path)
    with pytest.raises(UserError, match=r"has no compressor\. Preparing data needs one.* --compressor"):
        read_networks(model)
    compressor = Compressor(CompressorConfig(backbone="efficientnet_lite0", c_latent=4))
    nn.init.constant_(compressor.mapper[1].weight, 42.0)
    path = tmp_path / "compressor.safetensors"
    write_network(compressor, path, Provenance(recipe="test", seed=0, images=0, data=""))
    assert read_networks(model, compressor=str(path)).compressor.config == compressor.config
    # The published v2 takes the published compressor.
    monkeypatch.setattr(prepare_networks, "fits_published", lambda *_: True)
    monkeypatch.setattr(prepare_networks, "read_published_compressor", lambda: compressor)
    assert read_networks(model).compressor is compressor
