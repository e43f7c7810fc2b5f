"""Tests the package with the lowest versions that it declares, in a new environment.

    python scripts/lowest_versions.py

Each "name>=version" in pyproject.toml, including the extras below, is installed as "name==version". Versions
that do not exist, or that other packages exclude, fail here. torch comes from constraints-cpu.txt, or from
--torch. Then each command does a small piece of work. Takes some minutes and 2 GB of disk.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("train", "evaluate", "tensorboard", "lora", "data", "serve", "c2pa")
MICRO = (
    "--workers 0 --no-rehearsal --tensorboard --statistics-images 8 --preview-prompts cat --prior-steps 1"
    " --decoder-steps 1 --stage-a.optimization.images 8 --stage-a.optimization.batch-size 4"
    " --stage-a.refine-images 0 --stage-b.optimization.images 4 --stage-b.optimization.batch-size 2"
    " --stage-b.refine-images 0 --stage-c.optimization.images 8 --stage-c.optimization.batch-size 4"
)
COMMANDS = (
    "wuerstchen --version",
    "wuerstchen doctor --out doctor",
    "wuerstchen reconstruct doctor/doctor-0.png --decoder-steps 1 --out again.png",
    f"wuerstchen train tiny --run-dir run {MICRO}",
    "wuerstchen report run",
    "wuerstchen generate cat --model run/model --prior-steps 1 --decoder-steps 1",
    "wuerstchen data prepare photos prepared --model bundled --size 128 --text-states int8",
    "wuerstchen evaluate bundled --photos photos --out evaluation --decoder-steps 1",
    "python lora.py",
    "wuerstchen generate cat --lora adapter --prior-steps 1 --decoder-steps 1",
    "python serve.py",
)
LORA = """
import peft, torch, wuerstchen
model = wuerstchen.load(device="cpu")
names = [n for n, m in model.cascade.prior.named_modules() if isinstance(m, torch.nn.Linear)][:2]
config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=names)
peft.get_peft_model(model.cascade.prior, config).save_pretrained("adapter")
"""
SERVE = """
import json, os, signal, subprocess, time, urllib.request
url = "http://127.0.0.1:8971/"
command = ["wuerstchen", "serve", "--port", "8971", "--device", "cpu"]
process = subprocess.Popen(command)
try:
    for _ in range(600):
        assert process.poll() is None
        try:
            if urllib.request.urlopen(url + "readyz", timeout=5).status == 200:
                break
        except OSError:
            time.sleep(0.2)
    body = {"prompt": "a cat", "n": 1, "response_format": "b64_json"}
    request = urllib.request.Request(url + "v1/images/generations", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    assert len(json.load(urllib.request.urlopen(request, timeout=300))["data"][0]["b64_json"]) > 1000
finally:
    process.send_signal(signal.SIGTERM)
    process.wait(60)
"""


def lowest(requirement: str) -> str | None:
    """The requirement pinned to its lowest version, or None for torch, which is pinned elsewhere."""
    match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", requirement)
    if match is None:
        assert "==" in requirement, f"{requirement} has no lowest version"
        return requirement
    return None if match[1] == "torch" else f"{match[1]}=={match[2]}"


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra]]
    found = map(lowest, dict.fromkeys([*project["dependencies"], *extras]))
    return [requirement for requirement in found if requirement is not None]


def smoke(python: Path, work: Path) -> None:
    """Runs all commands in an empty folder. Raises an error if one fails."""
    write_photos = (
        "from PIL import Image\nfrom pathlib import Path\nPath('photos').mkdir()\nfor n in range(4):\n"
        "    Image.effect_noise((150, 140), 60).convert('RGB').save(f'photos/{n}.jpg')\n"
        "    Path(f'photos/{n}.txt').write_text('noise')\n"
    )
    subprocess.run([python, "-c", write_photos], cwd=work, check=True)
    (work / "lora.py").write_text(LORA)
    (work / "serve.py").write_text(SERVE)
    environment = {**os.environ, "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    for command in COMMANDS:
        print(f"$ {command}", flush=True)
        subprocess.run(command.split(), cwd=work, env=environment, check=True, timeout=900)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="torch", help="another torch, such as torch==2.11.0")
    parser.add_argument("--environment", type=Path, help="an existing environment to test")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = options.environment or Path(folder) / "environment"
        python = environment / "bin" / "python"
        if options.environment is None:
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraints = ["-c", ROOT / "constraints-cpu.txt"] if options.torch == "torch" else []
        subprocess.run([*pip, *constraints, options.torch], check=True)
        subprocess.run([*pip, *constraints, *requirements(), ROOT], check=True)
        work = Path(folder) / "work"
        work.mkdir()
        smoke(python, work)
    print("all commands work with the lowest versions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
