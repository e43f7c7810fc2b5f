"""What an earlier version wrote is resumed, loaded and drawn with as that version did it (tests/fixtures).

It fails where a checkpoint, a model, a prepared set or an adapter is read in another way, and where an update
or a step of sampling is computed in another way.
"""

import json
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORD = runpy.run_path(str(ROOT / "scripts" / "record_fixtures.py"))
EXPECTED = json.loads(RECORD["EXPECTED"].read_text())


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fixtures")
    RECORD["unpack"](folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", RECORD["REPLAYS"])
def test_what_was_recorded_comes_out_again(name, unpacked, tmp_path):
    found = RECORD["replay"](name, unpacked, tmp_path)
    for kind, (largest, whose) in RECORD["differences"](EXPECTED[name], found).items():
        assert largest <= EXPECTED["tolerances"][name][kind], f"{kind}: {whose}"
    shutil.rmtree(tmp_path)  # half a gigabyte by their lengths


def test_the_fixtures_stay_small():
    assert sum(path.stat().st_size for path in RECORD["FOLDER"].iterdir()) <= RECORD["LIMIT"]
