"""What ``scripts/lowest_versions.py`` installs; the script itself takes minutes and is run by hand."""

import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "lowest_versions.py"


def test_every_requirement_has_a_floor():
    found = runpy.run_path(str(SCRIPT))["requirements"]()
    assert all("==" in requirement for requirement in found)
    assert len({requirement.partition("==")[0] for requirement in found}) == len(found)  # one floor each
    assert {"safetensors", "peft", "fastapi", "datasets"} <= {r.partition("==")[0] for r in found}
