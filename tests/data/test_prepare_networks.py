"""The models that can prepare data."""

import pytest

from wuerstchen.data.prepare_networks import read_networks
from wuerstchen.errors import UserError


def test_a_model_without_a_compressor(write_published, tmp_path):
    with pytest.raises(UserError, match=r"has no compressor\. Preparing data needs one"):
        read_networks(write_published(tmp_path))
