"""The command line: its output, and one-line errors with exit code 2."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.run import get_args_parser

from wuerstchen import doctor
from wuerstchen.checkpoints.adapter_metadata import AdapterMetadata
from wuerstchen.checkpoints.adapter_write import write_adapter
from wuerstchen.checkpoints.adapters import Adapter, LayerTensors
from wuerstchen.checkpoints.hub import BUNDLED, is_bundled, local_folder
from wuerstchen.cli import main, make_parser
from wuerstchen.image_files import MADE_BY_A_MODEL, read_settings
from wuerstchen.pipeline import Wuerstchen

from .configurations import with_student, write_model


@pytest.fixture
def run(capsys, model_folder, monkeypatch, tmp_path):
    """Runs a command in an empty folder. Returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path, model: bool = True) -> tuple[int, str, str]:
        drawing = arguments[:1] and arguments[0] in ("generate", "reconstruct") and model
        code = main([*map(str, arguments), *(["--model", str(model_folder)] if drawing else [])])
        captured = capsys.readouterr()
        return code, captured.out, re.sub(r"[^\n]*\r", "", captured.err)

    return call


def size_of(path: str | Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_generate_writes_an_image_with_its_settings(run, tmp_path, model_folder):
    code, out, _ = run(
        "generate", "a Purple  camel, ümlaut", "--seed", "7", "--guidance", "2", "--prior-steps", "4"
    )
    assert code == 0
    path = Path(out.strip())
    assert path.name == "a-purple-camel-ümlaut-7.png"
    assert read_settings(path) == {
        "prompt": "a Purple  camel, ümlaut",
        "negative": "",
        "seed": 7,
        "model": str(model_folder),
        "guidance": 2.0,
        "guidance_interval": [0.0, 1.0],
        "prior_steps": 4,
        "prior_sampler": "ddpm",
        "decoder_steps": 2,
        "decoder_guidance": 1.0,
        "decoder_shift": 1.0,
    }
    with Image.open(path) as image:
        assert image.size == (128, 128)
        assert MADE_BY_A_MODEL in image.info["XML:com.adobe.xmp"]  # programs look for this


def test_the_sampler_can_be_chosen(run):
    """The second-order sampler gives another image."""
    pictures = {}
    for sampler in ("ddpm", "dpm"):
        code, out, errors = run("generate", "a cat", "--prior-sampler", sampler, "--out", f"{sampler}.png")
        assert code == 0, errors
        assert read_settings(Path(out.strip()))["prior_sampler"] == sampler
        pictures[sampler] = Image.open(out.strip()).tobytes()
    assert pictures["ddpm"] != pictures["dpm"]


def test_full_asks_for_the_networks_instead_of_their_students(run, small_cascade, tmp_path):
    """The settings in the file say which network sampled."""
    folder = write_model(with_student(small_cascade), tmp_path / "model")
    for options, sampler, network in (
        ((), "few", "student"),
        (("--full",), "ddpm", "full"),
        (("--negative", "red"), "ddpm", "full"),
    ):
        code, out, errors = run("generate", "a cat", *options, "--model", str(folder), model=False)
        assert code == 0, errors
        settings = read_settings(Path(out.strip()))
        assert (settings["prior_sampler"], settings["stage_c"]) == (sampler, network), options
    options = ("--negative", "red", "--prior-sampler", "few", "--model", str(folder))
    code, _, errors = run("generate", "a cat", *options, model=False)
    assert (code, "does not support a negative prompt" in errors) == (2, True)


def test_the_guidance_interval_can_be_chosen(run):
    """Guided at no step, the image is the one without guidance."""
    images = {}
    for options in (("--guidance", "2"), ("--guidance-interval", "0", "0.001"), ("--guidance", "1")):
        code, out, errors = run("generate", "a cat", *options, "--out", "out.png")
        assert code == 0, errors
        images[options] = Image.open(out.strip()).tobytes()
        if "0.001" in options:
            assert read_settings(Path(out.strip()))["guidance_interval"] == [0, 0.001]
    always, never, unguided = images.values()
    assert always != never == unguided


def test_images_are_numbered_by_seed_and_nothing_is_overwritten(run, tmp_path):
    _, out, _ = run("generate", "a cat", "a dog", "--count", "2", "--out", "deep/er")
    names = [Path(line).name for line in out.split()]
    assert names == ["a-cat-0.png", "a-cat-1.png", "a-dog-2.png", "a-dog-3.png"]
    _, out, _ = run("generate", "a cat", "--out", "deep/er")
    assert Path(out.strip()).name == "a-cat-0-2.png"


def test_file_names_are_limited_in_bytes(run):
    code, out, _ = run("generate", "𠀀" * 80, "--seed", "4294967290")
    assert code == 0
    assert len(Path(out.strip()).name.encode()) < 200


def test_a_folder_named_like_a_file_is_refused_at_the_start(run, tmp_path):
    (tmp_path / "x.png").mkdir()
    code, _, err = run("generate", "a", "--out", "x.png", "--model", "nowhere", model=False)
    assert (code, "x.png is a folder" in err) == (2, True)


def test_a_closed_pipe_is_not_an_error(model_folder, tmp_path):
    command = (
        f"{sys.executable} -m wuerstchen generate a b --model {model_folder} | true; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
    assert "Traceback" not in done.stderr


def test_grid_and_size(run):
    code, out, _ = run(
        "generate", "a cat", "a dog", "a cow", "--grid", "--out", "all.png", "--size", "256x128"
    )
    assert (code, out.strip()) == (0, "all.png")
    width, height = size_of("all.png")
    assert width > 2 * 256
    assert 2 * 128 < height < 3 * 128
    assert read_settings("all.png")["prompt"] == "a cat\na dog\na cow"


def test_reconstruct_saves_both_images_and_prints_the_size_of_the_latents(run):
    Image.effect_noise((200, 150), 50).save("photo.jpg")
    code, out, err = run("reconstruct", "photo.jpg")
    assert (code, out.strip()) == (0, "photo-reconstructed.png")
    assert size_of("photo-reconstructed.png")[0] > 2 * 128
    assert "semantic latents 2x3x3: 42.67x smaller per side" in err


@pytest.mark.parametrize("command", [["reconstruct"], ["generate", "--init"]])
def test_a_note_says_what_the_bundled_model_makes_of_photographs(run, command):
    """Other models do not have this limitation."""
    Image.effect_noise((64, 64), 50).save("photo.jpg")
    few = ["--decoder-steps", "1", *(["--prior-steps", "1"] if "--init" in command else [])]
    _, _, own = run(*command, "photo.jpg", *few, model=False)
    assert own.count("a photograph comes out as blobs of its colours") == 1
    _, _, other = run(*command, "photo.jpg", *few)
    assert "photograph" not in other
    _, _, without = run("generate", "a cat", "--prior-steps", "1", "--decoder-steps", "1", model=False)
    assert "photograph" not in without


def test_the_bundled_model_is_known_by_its_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(map(is_bundled, (None, "bundled", BUNDLED, str(BUNDLED))))
    assert not any(map(is_bundled, ("warp-ai/wuerstchen", tmp_path, "nowhere")))
    (tmp_path / "bundled").mkdir()
    assert not is_bundled("bundled")


BAD_CALLS = {
    "no prompt": (["generate"], "no prompt was given"),
    "strength alone": (["generate", "a", "--strength", "0.5"], "strength 0.5 needs an image"),
    "steps 0": (
        ["generate", "a", "--prior-steps", "0"],
        "prior_steps must be an integer from 1 to 1000, got 0",
    ),
    "guidance nan": (
        ["generate", "a", "--guidance", "nan"],
        "guidance must be a number from 0 to 100, got nan",
    ),
    "interval upside down": (
        ["generate", "a", "--guidance-interval", "0.8", "0.2"],
        "guidance_interval must be two times with 0 <= LOW < HIGH <= 1, got (0.8, 0.2)",
    ),
    "negative seed": (["generate", "a", "--seed", "-1"], "must be from 0 to"),
    "large seed": (["generate", "a", "--seed", str(2**32)], "must be from 0 to"),
    "count 0": (["generate", "a", "--count", "0"], "count must be at least 1, got 0"),
    "far too many": (["generate", "a", "--count", str(10**11)], "also for later images"),
    "too large a grid": (
        ["generate", "a", "--count", "500", "--grid"],
        "too large: 500 images. A grid has at most 400",
    ),
    "a JPEG": (["generate", "a", "--out", "cat.jpg"], "must be a folder or a .png file, got cat.jpg"),
    "no number": (["generate", "a", "--count", "many"], "invalid int value: 'many'"),
    "bad size": (["generate", "a", "--size", "big"], "'big' is neither N nor WIDTHxHEIGHT"),
    "impossible size": (["generate", "a", "--size", "130"], "Use 128 in place of 130"),
    "one file for two": (["generate", "a", "b", "--out", "x.png"], "is one file for 2 images"),
    "unknown option": (["generate", "a", "--speed", "9"], "unknown option: --speed 9"),
    "unknown command": (["dream"], "invalid choice: 'dream'"),
    "no model": (
        ["generate", "a", "--model", "nowhere"],
        "'nowhere' does not exist",
    ),
    "bad device": (["generate", "a", "--device", "toaster"], "device 'toaster' is not available"),
    "missing image": (["reconstruct", "nothing.png"], "nothing.png"),
    "no recipe": (["train"], "no recipe was given. Use one of tiny"),
    "unknown recipe": (["train", "huge"], "unknown recipe 'huge'. Give one of tiny, mini"),
    "recipe after options": (["train", "--seed", "5"], "no recipe was given"),
    "bad field": (["train", "tiny", "--image-size", "100"], "image_size must be a multiple of 128, got 100"),
    "bad number": (["train", "tiny", "--log-every", "many"], "many"),
    "unknown field": (["train", "tiny", "--learning-rat", "1"], "--learning-rat"),
    "no data for V2": (
        ["train", "tiny", "--compressor.backbone", "efficientnet_v2_s"],
        "--compressor-init FILE",
    ),
    "damaged init": (["train", "tiny", "--compressor-init", __file__], "test_cli.py"),
    "unknown region": (["train", "tiny", "--region", "Mars"], "got Mars"),
    "two words for CO2": (
        ["train", "tiny", "--region", "DE", "--co2-per-kwh", "1"],
        "cannot be used together",
    ),
    "no run": (["report", "nowhere"], "nowhere is not a run folder"),
    "missing data": (["train", "tiny", "--data", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_invalid_options_get_a_one_line_error_and_exit_code_2(name, run, tmp_path):
    arguments, message = BAD_CALLS[name]
    code, out, err = run(*arguments, model="--model" not in arguments)
    assert code == 2
    assert message in err
    assert re.fullmatch(r"Error: [^\n]+\n", err)
    assert out == "" or arguments[0] == "train"
    assert not (tmp_path / "runs" / "tiny" / "run.json").exists()
    assert [p for p in tmp_path.rglob("*") if p.suffix in (".png", ".tmp")] == []


@pytest.mark.parametrize("content", ["empty", "truncated", "text", "huge"])
def test_unreadable_images_get_a_one_line_error(content, run, tmp_path):
    path = tmp_path / "x.png"
    Image.effect_noise((64, 64), 50).save(path)
    if content == "empty":
        path.write_bytes(b"")
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-500])
    elif content == "text":
        path.write_text("not a picture")
    else:
        Image.new("1", (10_001, 10_000)).save(path)
    code, _, err = run("reconstruct", path)
    assert code == 2
    assert re.fullmatch(r"Error: [^\n]*x\.png[^\n]+\n", err)


def test_an_unwritable_folder_is_refused_at_the_start(run, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = run("generate", "a", "--out", "file/inside", "--model", "nowhere", model=False)
    assert code == 2
    assert "cannot be written" in err


def test_a_truncated_prompt_gets_a_one_line_warning(run):
    code, _, err = run("generate", "cat " * 40 + "lostword")
    assert code == 0
    assert re.search(r"^Warning: [^\n]*lostword[^\n]*$", err, re.MULTILINE)


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


@pytest.mark.parametrize(
    "statement", ["import wuerstchen", "import wuerstchen.cli; wuerstchen.cli.make_parser()"]
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement):
    loaded = python(f"import sys; {statement}; print(*sys.modules)").split()
    assert not {"torch", "numpy", "transformers", "PIL", "tyro", "tqdm"} & set(loaded)


def test_public_names_exist():
    import wuerstchen

    for name in wuerstchen.__all__:
        assert getattr(wuerstchen, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        wuerstchen.nothing  # noqa: B018


def test_help_of_train_lists_recipes_and_fields(run, capsys):
    code, out, _ = run("train", "--help")
    assert code == 0
    assert "--run-dir" in out
    assert "tiny: All three stages" in out
    with pytest.raises(SystemExit) as stopped:
        run("train", "tiny", "--help")
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "--run-dir" in out
    assert "--stage-b.optimization.images" in out


@pytest.mark.parametrize("command", [("train", "v2"), ("data", "prepare")])
def test_options_pass_through_torchrun(command, run, capsys):
    """Before Python 3.13, torchrun's parser rejects a script's option that is a prefix of several of its
    own."""
    with pytest.raises(SystemExit):
        run(*command, "--help")
    options = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    assert len(options) > 20
    theirs = [name for action in get_args_parser()._actions for name in action.option_strings]
    for option in options:
        assert option in theirs or sum(name.startswith(option) for name in theirs) < 2, option


def test_average_accepts_the_old_name_of_weight(capsys):
    """Existing scripts use --share. The help lists only --weight."""
    arguments = ["average", "a", "b", "out"]
    assert make_parser().parse_args(arguments).weight == 0.5
    for name in ("--weight", "--share"):
        assert make_parser().parse_args([*arguments, name, "0.25"]).weight == 0.25
    with pytest.raises(SystemExit):
        main(["average", "--help"])
    text = capsys.readouterr().out
    assert "--weight" in text
    assert "--share" not in text


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert 'wuerstchen generate "a 3D render of a purple camel' in capsys.readouterr().out


WARNED = {
    "not quoted": (["a", "cat"], "2 prompts were given, several of one word: 'a cat'"),
    "not quoted, several times": (["a", "cat", "--count", "2"], "4 images in total"),
    "empty": ([""], "the prompt is empty"),
    "blank": (["  "], "the prompt is empty"),
    "another script": (
        ["你好"],
        "text encoder: '你好'. The image may have nothing to do",
    ),
    "letters": (["the asdfgh qwertz"], "no word of the prompt is in the vocabulary"),
    "emoji": (["🚀"], "no word of the prompt is in the vocabulary"),
}


@pytest.mark.parametrize("name", WARNED)
def test_suspicious_prompts_get_a_warning(run, name):
    arguments, message = WARNED[name]
    code, out, err = run("generate", *arguments, "--prior-steps", "1", "--decoder-steps", "1")
    assert code == 0
    assert out
    assert err.count("Warning: ") == 1
    assert message in err


@pytest.mark.parametrize("arguments", [["a cat", "dog"], ["a cat", "a dog"], ["T-Rex"], ["UFO"], ["世"]])
def test_ordinary_prompts_get_no_warning(run, arguments):
    code, _, err = run("generate", *arguments, "--prior-steps", "1", "--decoder-steps", "1")
    assert code == 0
    assert "Warning" not in err


def test_variations_of_an_image_need_no_prompt(run, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    _, _, err = run("generate", "--init", "photo.png", "--prior-steps", "1", "--decoder-steps", "1")
    assert "Warning" not in err


@pytest.mark.parametrize(
    ("arguments", "low_memory", "prompts"),
    [
        (["--low-memory", "a cat"], "stage", ["a cat"]),
        (["--low-mem", "a cat"], "stage", ["a cat"]),
        (["--low-memory", "layer", "a cat"], "layer", ["a cat"]),
        (["--low-memory=layer", "a cat"], "layer", ["a cat"]),
        (["--low-memory", "--seed", "3", "a cat"], "stage", ["a cat"]),
        (["a cat", "--low-memory"], "stage", ["a cat"]),
        (["--", "--low-memory", "a cat"], None, ["--low-memory", "a cat"]),
        (["--low", "--crop-to-mask", "a cat"], "stage", ["a cat"]),
    ],
)
def test_low_memory_does_not_take_the_prompt_as_its_value(monkeypatch, arguments, low_memory, prompts):
    seen = []
    monkeypatch.setattr("wuerstchen.cli.generate._generate", lambda options: seen.append(options) or 0)
    assert main(["generate", *arguments]) == 0
    assert (seen[0].low_memory, seen[0].prompts) == (low_memory, prompts)


def test_the_bundled_model_can_be_named(run, tmp_path):
    code, _, err = run("generate", "a cat", "--model", "bundled", "--prior-steps", "1", model=False)
    assert (code, err.count("Error")) == (0, 0)
    assert read_settings(tmp_path / "a-cat-0.png")["model"] == "bundled"
    assert local_folder("bundled") == BUNDLED
    (tmp_path / "bundled").mkdir()
    assert local_folder("bundled") == Path("bundled")  # a local folder comes first


@pytest.mark.parametrize("command", [["reconstruct"], ["generate", "a cat", "--init"]])
def test_the_input_image_is_never_overwritten(run, tmp_path, command):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    (tmp_path / "again.png").symlink_to(tmp_path / "photo.png")
    before = (tmp_path / "photo.png").read_bytes()
    for name in ("photo.png", "again.png"):
        code, _, err = run(*command, "photo.png", "--out", name)
        assert (code, err) == (
            2,
            f"Error: out is the input image: {name}. It would be overwritten. "
            "Give --out another name, or a folder.\n",
        )
    assert (tmp_path / "photo.png").read_bytes() == before


def test_an_init_image_needs_no_prompt(run, tmp_path):
    Image.effect_noise((200, 150), 60).convert("RGB").save(tmp_path / "My photo.png")
    code, out, _ = run("generate", "--init", "My photo.png", "--strength", "0.3", "--size", "136x128")
    assert code == 0
    assert Path(out.strip()).name == "my-photo-0.png"
    assert size_of(out.strip()) == (136, 128)
    settings = read_settings(out.strip())
    assert (settings["init"], settings["strength"], settings["prompt"]) == ("My photo.png", 0.3, "")
    code, out, _ = run("generate", "a cat", "--init", "My photo.png")
    assert Path(out.strip()).name == "a-cat-0.png"
    for arguments, message in (
        (["--init", "nothing.png"], "nothing.png"),
        (["--init", "My photo.png", "--strength", "-1"], "strength must be at least 0 and at most 1, got -1"),
    ):
        code, _, err = run("generate", *arguments)
        assert code == 2
        assert message in err


def test_a_mask_is_repainted_and_the_rest_is_the_image(run, tmp_path):
    """Grey, white and transparent masks, and an extension. The settings name what was used."""
    init = Image.effect_noise((140, 100), 60).convert("RGB")
    init.save("photo.png")
    mask = Image.new("L", init.size, 0)
    mask.paste(255, (100, 0, 140, 100))
    mask.save("mask.png")
    cut = init.copy()
    cut.putalpha(mask.point(lambda value: 255 - value))
    cut.save("cut.png")
    drawn = []
    for given in (("photo.png", "mask.png"), ("photo.png", "cut.png"), ("cut.png", "cut.png")):
        code, out, err = run("generate", "a cat", "--init", given[0], "--mask", given[1], "--feather", "4")
        assert code == 0, err
        assert ("init is transparent" in err) == (given[0] == "cut.png")
        drawn.append(Image.open(out.strip()))
        assert drawn[-1].size == init.size
        assert drawn[-1].crop((0, 0, 96, 100)).tobytes() == init.crop((0, 0, 96, 100)).tobytes()
        settings = read_settings(out.strip())
        assert (settings["init"], settings["mask"], settings["strength"], settings["feather"]) == (
            *given,
            1,
            4,
        )
    assert drawn[0].tobytes() == drawn[1].tobytes()
    code, out, _ = run(
        *("generate", "--init", "photo.png", "--mask", "mask.png", "--extend", "left=8"),
        *("--crop-to-mask", "a cat", "--strength", "0.5"),
    )
    assert code == 0
    assert size_of(out.strip()) == (148, 100)
    settings = read_settings(out.strip())
    assert (settings["extend"], settings["crop_to_mask"], settings["strength"]) == ("left=8", 32, 0.5)


def test_a_morph_is_an_animation_or_frames(run, tmp_path, model_folder):
    small = ("--prior-steps", "2", "--decoder-steps", "1", "--model", model_folder)
    code, out, err = run("morph", "a cat", "a red car", "--frames", "3", *small)
    assert code == 0, err
    assert out.strip() == "a-cat-to-a-red-car-0.webp"
    with Image.open(out.strip()) as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (3, (128, 128), 0)
        image.load()
        assert image.info["duration"] == 125
        assert MADE_BY_A_MODEL in image.info["xmp"].decode()
        assert '"end": "a red car"' in image.getexif()[270]
    code, again, _ = run("morph", "a cat", "a red car", "--frames", "3", *small)
    assert again.strip() == "a-cat-to-a-red-car-0-2.webp"
    code, out, _ = run("morph", "a cat", "--end-seed", "4", "--frames", "2", "--out", "m.gif", *small)
    assert code == 0
    with Image.open("m.gif") as image:
        assert (image.format, image.n_frames) == ("GIF", 2)
        assert b'"end_seed": 4' in image.info["comment"]
        assert image.info["duration"] == 130
    assert out.strip() == "m.gif"
    Image.new("RGB", (140, 128), "red").save("My photo.png")
    code, out, _ = run("morph", "My photo.png", "a cat", "--frames", "3", "--format", "frames", *small)
    assert code == 0
    assert out.split() == [f"my-photo-to-a-cat-0-{n:03d}.png" for n in range(3)]
    assert read_settings(out.split()[1])["frame"] == 1


def test_a_morph_stores_what_repeats_it_and_no_folders(run, tmp_path, model_folder):
    """Bug: strength, size, fps and sampling were missing, and images had their whole paths."""
    small = ("--prior-steps", "2", "--decoder-steps", "1", "--model", model_folder)
    (tmp_path / "private").mkdir()
    Image.new("RGB", (140, 128), "red").save("private/photo.png")
    code, out, err = run(
        *("morph", "private/photo.png", "a cat", "--frames", "2", "--format", "frames"),
        *("--strength", "0.4", "--size", "128x64", "--fps", "12", *small),
    )
    assert code == 0, err
    found = read_settings(out.split()[0])
    assert "private" not in str(found)
    expected = {"start": "photo.png", "end": "a cat", "frames": 2, "fps": 12.0, "size": "128x64"}
    expected |= {"strength": 0.4, "prior_steps": 2, "decoder_steps": 1, "prior_sampler": "dpm"}
    assert found | expected == found
    # Bug: an empty prompt at the end was stored as the start.
    code, out, err = run("morph", "a cat", "", "--frames", "2", "--format", "frames", *small)
    assert code == 0, err
    found = read_settings(out.split()[0])
    assert (found["start"], found["end"], "strength" in found) == ("a cat", "", False)
    assert "the prompt is empty" in err
    code, _, err = run("morph", "a cat", "qqqq", "--frames", "2", *small)
    assert code == 0
    assert "no word of the prompt is in the vocabulary" in err


def test_bad_morphs_are_one_line(run, tmp_path, model_folder):
    Image.new("RGB", (70, 70), "red").save("photo.webp")
    (tmp_path / "text.png").write_text("none")
    for arguments, message in (
        (["a cat"], "the same prompt with the same seed"),
        (["a cat", "a dog", "--frames", "1"], "frames must be an integer from 2"),
        (["a cat", "a dog", "--fps", "0"], "fps must be from 0.1 to 100, got 0"),
        (["a cat", "a dog", "--fps", "60", "--format", "gif"], "fps must be from 0.1 to 50, got 60"),
        (["catt.png", "a dog"], "start is not a file: 'catt.png'"),
        (["a cat", "photos/dog.JPG"], "end is not a file: 'photos/dog.JPG'"),
        (["a cat", "a dog", "--out", "x.mp4"], "out must be a folder, a .webp or a .gif file"),
        (["a cat", "a dog", "--out", "x.gif", "--format", "webp"], "format webp does not fit x.gif"),
        (["photo.webp", "a dog", "--out", "photo.webp"], "out is the input image"),
        (["text.png", "a dog"], "text.png"),
    ):
        code, _, err = run("morph", *arguments, "--model", model_folder)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1


def test_details_and_weights_are_options(run):
    """The settings in the file name what was used."""
    drawn = {}
    for options in ((), ("--detail-seed", "5"), ("--prompt-weights",)):
        code, out, err = run("generate", "a (red:3) cat", "--count", "2", *options)
        assert code == 0, err
        drawn[options] = [Image.open(path).tobytes() for path in out.split()]
        settings = read_settings(out.split()[1])
        assert settings.get("detail_seed") == (6 if "5" in options else None)
        assert settings.get("prompt_weights") == ("--prompt-weights" in options or None)
    assert len({tuple(images) for images in drawn.values()}) == 3
    code, _, err = run("generate", "a (cat", "--prompt-weights")
    assert (code, "does not match" in err) == (2, True)


def test_bad_edits_are_one_line(run, tmp_path):
    Image.new("RGB", (70, 70), "red").save("photo.png")
    Image.new("L", (70, 70), 0).save("empty.png")
    Image.new("L", (70, 60), 255).save("other.png")
    (tmp_path / "text.png").write_text("none")
    for arguments, message in (
        (["--mask", "empty.png"], "needs an image to start from. Add --init"),
        (["--init", "photo.png", "--mask", "empty.png"], "mask is empty"),
        (["--init", "photo.png", "--mask", "other.png"], "mask has 70x60 pixels, but init has 70x70"),
        (["--init", "photo.png", "--mask", "text.png"], "text.png"),
        (["--init", "photo.png", "--mask", "no.png"], "no.png"),
        (["--init", "photo.png", "--extend", "left=x"], "extend cannot be read: 'left=x'"),
        (["--init", "photo.png", "--extend", "left=9999"], "10069x70 pixels"),
        (["--init", "photo.png", "--feather", "3"], "feather 3 needs a region to repaint"),
        (["--init", "photo.png", "--mask", "empty.png", "--out", "empty.png"], "out is the input image"),
    ):
        code, _, err = run("generate", "a cat", *arguments)
        assert code == 2
        assert message in err
        assert len(err.splitlines()) == 1


def test_adapters_are_named_with_their_scale(run, tmp_path):
    layer = "prior.blocks.2.attention.to_q"
    shapes = {f"{layer}.lora_A.weight": (2, 16), f"{layer}.lora_B.weight": (16, 2)}
    save_file({key: torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "style.safetensors")
    pictures = []
    for adapters in ([], ["style.safetensors"], ["style.safetensors:0.5"], ["style.safetensors:0"]):
        options = [option for adapter in adapters for option in ("--lora", adapter)]
        code, out, err = run("generate", "a cat", *options)
        assert code == 0
        assert ("which gives scale 1" in err) == bool(adapters)
        assert read_settings(out.strip()).get("lora") == (adapters[0] if adapters else None)
        pictures.append(Image.open(out.strip()).tobytes())
    plain, one, half, none = pictures
    assert plain == none
    assert len({plain, one, half}) == 3
    for adapter, message in (
        ("style.safetensors:much", "does not end in a number"),
        ("none.safetensors", "none.safe"),
    ):
        code, _, err = run("generate", "a cat", "--lora", adapter)
        assert code == 2
        assert message in err


def test_a_folder_of_peft_is_an_adapter(run, tmp_path, model_folder):
    """peft stores its own strength, alpha 16 at rank 4. The scale multiplies it."""
    import peft

    from wuerstchen.pipeline import load

    network = load(model_folder, device="cpu").cascade.prior
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"], init_lora_weights=False)
    peft.get_peft_model(network, config).save_pretrained(str(tmp_path / "style"))
    tensors = load_file(tmp_path / "style" / "adapter_model.safetensors")
    save_file({k: t * 4 if "lora_B" in k else t for k, t in tensors.items()}, tmp_path / "same.safetensors")
    pictures = []
    for adapter in ("style", "same.safetensors", "style:0.25", "same.safetensors:0.25"):
        code, out, err = run("generate", "a cat", "--lora", adapter)
        assert code == 0, err
        assert ("which gives scale 1" in err) == adapter.startswith("same")
        pictures.append(Image.open(out.strip()).tobytes())
    assert pictures[0] == pictures[1]
    assert pictures[2] == pictures[3]
    assert pictures[0] != pictures[2]


def small_adapter() -> Adapter:
    draw = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 16, generator=draw), torch.randn(16, 4, generator=draw)
    layers = {"blocks.2.attention.to_q": LayerTensors(a, b, 2.0)}
    return Adapter(prior=layers, metadata=AdapterMetadata(trigger_words=("sks dog",)))


def test_trigger_words_are_named_if_no_prompt_has_them(run, tmp_path):
    write_adapter(tmp_path / "dog.safetensors", small_adapter())
    options = ("--lora", "dog.safetensors", "--prior-steps", "1", "--decoder-steps", "1")
    code, _, err = run("generate", "a cat", *options)
    assert code == 0
    assert "no prompt has a trigger word of the adapter dog.safetensors: 'sks dog'" in err
    _, _, err = run("generate", "a SKS dog", *options)
    assert "trigger" not in err


def test_adapters_are_converted(run, tmp_path, monkeypatch):
    write_adapter(tmp_path / "a.safetensors", small_adapter())
    for target, form in (("b", "kohya"), ("c", "diffusers"), ("peft/d", "peft")):
        code, out, _ = run("convert", "a.safetensors", f"{target}.safetensors", "--layout", f"lora-{form}")
        assert (code, out.strip()) == (0, f"{target}.safetensors")
    layer = "lora_prior_unet_blocks_2_attention_to_q"
    kinds = ("alpha", "lora_down.weight", "lora_up.weight")
    assert load_file(tmp_path / "b.safetensors").keys() == {f"{layer}.{kind}" for kind in kinds}
    assert load_file(tmp_path / "a.safetensors").keys() == load_file(tmp_path / "c.safetensors").keys()
    run("convert", "b.safetensors", "half.safetensors", "--layout", "lora-diffusers", "--storage", "float16")
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    monkeypatch.setattr("wuerstchen.adapters.local_folder", lambda *_, **__: tmp_path / "a.safetensors")
    assert run("convert", "someone/dog", "hub.safetensors", "--layout", "lora-kohya")[0] == 0
    assert load_file(tmp_path / "hub.safetensors").keys() == load_file(tmp_path / "b.safetensors").keys()
    for arguments, message in (
        (["a.safetensors", "b.safetensors"], "b.safetensors already exists"),
        (["a.safetensors", "e.safetensors", "--storage", "int8"], "stored whole as float32 or float16"),
        (["a.safetensors", "e.safetensors", "--prior", "x"], "stored whole as float32 or float16"),
        (["a.safetensors", "folder"], "must end in .safetensors"),
        (["nowhere", "e.safetensors"], "nowhere does not exist"),
    ):
        code, _, err = run("convert", *arguments, "--layout", "lora-kohya")
        assert code == 2
        assert message in err


def test_a_converted_model_generates_images(run, tmp_path, model_folder, write_published):
    published = write_published(tmp_path / "published")
    code, out, _ = run("convert", published, "native", "--layout", "native", "--storage", "float16")
    assert (code, out) == (0, "native\n")
    code, _, err = run("convert", published, "native", "--layout", "native")
    assert (code, "already exists" in err) == (2, True)
    drawing = ["generate", "cat", "--size", "64", "--prior-steps", "2", "--decoder-steps", "1", "--seed", "3"]
    drawn = {}
    for model in (published, "native"):
        code, out, _ = run(*drawing, "--model", model, "--precision", "bfloat16", "--low-memory", model=False)
        assert code == 0
        drawn[model] = Image.open(out.strip()).tobytes()
    code, _, err = run("convert", model_folder, "out", "--layout", "diffusers")
    assert code == 2
    assert re.fullmatch(
        r"Error: text_encoder cannot be stored in the diffusers layout: it is not a CLIP[^\n]+\n", err
    )


def test_the_doctor_generates_images_and_reports(run, tmp_path, model_folder):
    code, out, _ = run("doctor", "--model", model_folder, "--out", "report")
    assert code == 0
    assert "layout native" in out
    checksum = hashlib.sha256((model_folder / "prior.safetensors").read_bytes()).hexdigest()
    assert f"{checksum}" in out
    assert re.search(r"torch \d+\.\d+", out)
    assert [size_of(f"report/doctor-{seed}.png") for seed in range(3)] == [(128, 128)] * 3
    assert out.splitlines()[-1].startswith("verdict: the model loads and generates images")
    assert run("doctor", "--model", model_folder, "--out", "report")[0] == 0
    assert len(list((tmp_path / "report").iterdir())) == 6  # the first three are still there
    code, out, err = run("doctor", "--model", "nobody/nothing", "--revision", "main")
    assert code == 2
    assert re.search(
        r"Error: 'nobody/nothing' is not a local folder, and cannot be downloaded from the hub[^\n]+\n$", err
    )


@pytest.mark.slow
def test_the_doctor_knows_the_images_of_the_bundled_model(run, monkeypatch):
    """If the bundled model is replaced, this fails until its recorded images are replaced too."""
    monkeypatch.setattr(doctor, "BUNDLED_PROMPTS", doctor.BUNDLED_PROMPTS[:1])
    code, out, err = run("doctor")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == (
        "verdict: the bundled model works, and its images match the reference images"
    )
    monkeypatch.setattr(doctor, "BUNDLED_IMAGES", doctor.BUNDLED_IMAGES[1:])
    monkeypatch.setattr(Wuerstchen, "generate", lambda *_, **__: [Image.open("doctor/doctor-0.png")])
    code, out, err = run("doctor", "--model", "bundled")
    assert code == 2
    assert "doctor-0-2.png differs from the reference image by" in err


def test_the_doctor_ignores_files_that_only_look_like_weights(run, tmp_path, model_folder):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "dangling.bin").symlink_to("nowhere")
    (folder / "folder.safetensors").mkdir()
    code, out, _ = run("doctor", "--model", folder)
    assert code == 0
    assert "dangling" not in out


def test_operating_system_errors_are_one_line(run, model_folder, monkeypatch):
    code, _, err = run("convert", model_folder, "x" * 300, "--layout", "native")
    assert code == 2
    assert re.fullmatch(r"Error: [^\n]*File name too long[^\n]*\n", err)

    def locked(*_, **__):
        raise PermissionError(13, "Permission denied", "secret/model.json")

    monkeypatch.setattr("wuerstchen.checkpoints.layouts.layout_of", locked)
    code, _, err = run("convert", model_folder, "out", "--layout", "native")
    assert code == 2
    assert re.fullmatch(r"Error: [^\n]*Permission denied: 'secret/model\.json'[^\n]*\n", err)


def test_the_doctor_detects_overflow(run, model_folder, monkeypatch):
    """An image of a single colour is a failure."""
    monkeypatch.setattr(Wuerstchen, "generate", lambda *_, **__: [Image.new("RGB", (64, 64), "grey")])
    code, _, err = run("doctor", "--model", model_folder)
    assert code == 2
    assert "has a single colour" in err


@pytest.mark.slow  # compiles all of torch, as nobody keeps what -OO compiles
def test_python_without_docstrings():
    command = [sys.executable, "-W", "ignore", "-OO", "-m", "wuerstchen", "train", "tiny", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--stage-a.optimization.images" in done.stdout


def test_python_without_docstrings_reads_no_text_encoder(run, monkeypatch):
    flags = SimpleNamespace(flags=SimpleNamespace(optimize=2))
    monkeypatch.setattr("wuerstchen.errors.sys", flags)
    monkeypatch.setitem(sys.modules, "transformers.models.bert.modeling_bert", None)  # cannot be imported
    code, _, err = run("generate", "cat")
    assert code == 2
    assert re.fullmatch(r"Error: text encoders cannot be loaded under python -OO, because [^\n]+\n", err)
