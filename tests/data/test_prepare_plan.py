"""What is to be made."""

import pytest

from wuerstchen.data.prepare_plan import PrepareConfig
from wuerstchen.errors import UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crops": 2, "crop": "centre"}, "all centre crops of a picture are the same"),
        ({"crops": 0}, "crops 0 is wrong"),
        ({"batch_size": 0}, "batch_size 0 is wrong"),
        ({"shard_size": 1 << 20}, "shard_size 1048576 is wrong"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(UserError, match=message):
        PrepareConfig(**change)
