"""The report of a small random model: rows, scores, targets, and what is written."""

import base64
import dataclasses
import io
import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from wuerstchen.errors import DataError, UserError
from wuerstchen.evaluate.lists import RealImages, read_list, select
from wuerstchen.evaluate.metrics import Score, background_colour, psnr
from wuerstchen.evaluate.page import html_page, write_report
from wuerstchen.evaluate.report import EvaluationOptions, Report, evaluate, sha256_of, summary, to_json
from wuerstchen.evaluate.scoring import ROWS, Measured, Renderer, scores_of
from wuerstchen.evaluate.targets import targets
from wuerstchen.models.cascade import Cascade
from wuerstchen.pipeline import Sampling, Wuerstchen

LIMIT = 4


@pytest.fixture(scope="module")
def found(small_model, emoji_set, use_simple_judges) -> Iterator[Report]:
    with pytest.MonkeyPatch.context() as patch:
        use_simple_judges(patch)
        yield evaluate(
            small_model,
            emoji_set,
            limit=LIMIT,
            before=small_model,
            batch_size=3,
            shown=2,
            sampling=SAMPLING,
            against_targets=True,
        )


SAMPLING = Sampling(guidance=1.0, prior_steps=2)


def stacked(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_every_row_is_there_for_every_entry(found):
    for name in ("a", "b"):
        result = found.lists[name]
        assert result.entries == select(name, limit=LIMIT)
        assert list(result.measured) == list(ROWS)
        assert {len(measured) for measured in result.measured.values()} == {2 * LIMIT}
        for split in ("val", "test"):
            assert {score["recall_1"].n for score in result.scores[split].values()} == {LIMIT}
            kids = {row: score["kid_e3"].n for row, score in result.scores[split].items() if row != "real"}
            assert set(kids.values()) == {LIMIT}
    assert found.settings["sampling"] == {
        "guidance": 1.0,
        "guidance_interval": (0.0, 1.0),
        "prior_steps": 2,
        "prior_sampler": "ddpm",
        "decoder_steps": 2,
        "decoder_guidance": 1.0,
        "decoder_shift": 1.0,
    }
    assert found.settings["image_size"] == 128


def test_columns_are_scored_where_they_mean_something(found):
    base = {"recall_1", "recall_5", "style", "kid_e3", "kid_lite0_e3"}
    for name, extra in (("a", set()), ("b", {"background", "object"})):
        for row, scores in found.lists[name].scores["val"].items():
            likeness = {"psnr", "ssim"} if row in ("jpeg20", "stage_a", "stage_a_quantised", "a_b") else set()
            kid = {"kid_e3", "kid_lite0_e3"} if row == "real" else set()  # halves of four are too few
            assert set(scores) == (base | extra | likeness) - kid
    assert found.lists["b"].scores["val"]["real"]["background"].value == 1
    asked = sum(entry.colour is not None for entry in select("b", ("val",), LIMIT))
    assert found.lists["b"].scores["val"]["c_b_a"]["object"].n == asked < LIMIT


def test_rows_are_what_the_model_makes_alone(small_model, emoji_set, found):
    """Batches, splits and the order of rows must not change an image: its seed is its number."""
    entry = select("b", limit=LIMIT)[4]  # in the middle of a batch
    real = RealImages(emoji_set).image(entry, 128)
    drawn = stacked(small_model.generate(entry.caption, seed=entry.number, sampling=SAMPLING))
    through = small_model.reconstruct(Image.fromarray(real), seed=entry.number, sampling=SAMPLING).image
    vqgan = small_model.cascade.vqgan
    with torch.no_grad():
        z = vqgan.embed(torch.from_numpy(real)[None].permute(0, 3, 1, 2) / 255)
        pixels = [vqgan.unembed(z), vqgan.unembed(vqgan.vquantizer(z).latents)]
        alone, quantised = ((p.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy() for p in pixels)
    rows = {row: measured[4] for row, measured in found.lists["b"].measured.items()}
    assert rows["c_b_a"].background == background_colour(drawn[0])
    assert rows["a_b"].psnr == pytest.approx(psnr(stacked([through]), real[None])[0], abs=0.05)
    assert rows["stage_a"].psnr == pytest.approx(psnr(alone, real[None])[0], abs=0.05)
    assert rows["stage_a_quantised"].psnr == pytest.approx(psnr(quantised, real[None])[0], abs=0.05)
    assert rows["before"] == rows["c_b_a"]  # here it is the same model


def test_of_each_split_the_first_are_shown(found):
    for name in ("a", "b"):
        numbers = sorted(entry.number for split in ("val", "test") for entry in select(name, (split,), 2))
        assert sorted(found.lists[name].strips) == numbers
        with Image.open(io.BytesIO(found.lists[name].strips[numbers[0]])) as strip:
            assert strip.size == (4 * 128, 128)


def test_one_row_on_one_split_is_enough_for_a_sweep(
    small_model, emoji_set, use_simple_judges, monkeypatch, found
):
    use_simple_judges(monkeypatch)
    said: list[str] = []
    report = evaluate(
        small_model,
        emoji_set,
        splits=("val",),
        rows=("c_b_a",),
        limit=LIMIT,
        sampling=SAMPLING,
        announce=said.append,
    )
    assert list(report.lists["a"].measured) == ["real", "c_b_a"]
    assert list(report.lists["a"].scores) == ["val"]
    assert report.targets == {}  # they are another model's
    for column, score in report.lists["a"].scores["val"]["c_b_a"].items():
        assert score.value == pytest.approx(found.lists["a"].scores["val"]["c_b_a"][column].value, abs=1e-2)
    assert said[0].startswith("8 entries and 0 photographs: 8 images to draw from text, 0 to reconstruct")


def test_options_may_be_given_by_name_or_together(small_model, photos):
    """Both ways draw the same, a name given beside the options wins, and an unknown name is refused."""
    options = EvaluationOptions(limit=1, batch_size=2)
    together = evaluate(small_model, None, options, photos=photos)
    by_name = evaluate(small_model, photos=photos, limit=1, batch_size=2)
    assert together.photos.scores == by_name.photos.scores
    assert together.settings == by_name.settings
    assert together.settings["limit"] == 1
    assert evaluate(small_model, None, options, photos=photos, batch_size=1).settings["batch_size"] == 1
    with pytest.raises(TypeError, match="lmit"):
        evaluate(small_model, photos=photos, lmit=1)


def test_scores_compare_with_what_was_asked():
    entries = [entry for entry in read_list("b") if entry.colour][:4]
    measured = [
        Measured(
            rank=rank,
            style=entry.style if rank else "none",
            background=entry.background if rank < 2 else "none",
            object=entry.colour if rank == 3 else None,
            psnr=None,
            ssim=None,
        )
        for rank, entry in zip((0, 1, 4, 5), entries, strict=True)
    ]
    measured[3] = dataclasses.replace(measured[3], object=entries[3].colour)
    features = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    kids = {"kid_e3": (features, features), "kid_lite0_e3": (features + 3, features)}
    scores = scores_of("c_b_a", entries, measured, kids)
    values = {column: score.value for column, score in scores.items()}
    assert values.pop("kid_lite0_e3") > 1000
    assert values == {
        "recall_1": 0.25,
        "recall_5": 0.75,
        "style": 0.75,
        "kid_e3": 0,
        "background": 0.5,
        "object": 0.25,
    }


# --- Targets ---


def score(value: float) -> Score:
    return Score(value=float(value), error=0.0, n=10)


def test_targets_are_those_promised():
    rows = {
        "real": {"recall_1": score(0.8), "style": score(0.9)},
        "jpeg20": {"kid_e3": score(10)},
        "a_b": {"recall_1": score(0.68), "kid_e3": score(20.1)},
        "c_b_a": {"recall_1": score(0.59), "style": score(0.82), "kid_e3": score(30.0)},
        "before": {"recall_1": score(0.6)},
    }
    prompts = {
        "stage_a": {"psnr": score(29.9)},
        "c_b_a": {"background": score(0.95), "object": score(0.84)},
    }
    checked = {t.text: (t.measured, t.limit, t.reached) for t in targets({"a": rows, "b": prompts})}
    assert checked == {
        "Stage A, unquantised: PSNR in dB": (29.9, 30, False),
        "A+B: R@1, 0.85 of real": (0.68, pytest.approx(0.68), True),
        "C+B+A: R@1, 0.75 of real": (0.59, pytest.approx(0.6), False),
        "C+B+A: style, 0.9 of real": (0.82, pytest.approx(0.81), True),
        "C+B+A: background colour": (0.95, 0.95, True),
        "C+B+A: object colour": (0.84, 0.85, False),
        "A+B: KID×1e3, twice that of JPEG q20": (20.1, 20, False),
        "C+B+A: KID×1e3, that of A+B and of JPEG q20": (30, pytest.approx(30.1), True),
        "C+B+A: R@1 lost by compression": (pytest.approx(0.01), 0.01, True),
    }


def test_what_was_not_scored_is_neither_reached_nor_short():
    assert {target.reached for target in targets({})} == {None}
    assert {target.reached for target in targets({"a": {"a_b": {"recall_1": score(1)}}})} == {None}


# --- What is written ---


def test_json_holds_everything(found, model_folder, tmp_path):
    written, _ = write_report(found, tmp_path / "out", model=model_folder, before=model_folder, name="x")
    content = json.loads(written.read_text(), parse_constant=pytest.fail)
    assert content["model"] == content["before"] == sha256_of(model_folder)
    assert set(content["model"]) >= {"model.json", "prior.safetensors", "text_encoder/vocab.txt"}
    assert re.search(r"threads; .*torch \d", content["machine"])
    entries = content["lists"]["b"]["entries"]
    assert [entry["caption"] for entry in entries] == [e.caption for e in select("b", limit=LIMIT)]
    assert entries[0]["rows"]["a_b"].keys() == {"rank", "style", "background", "object", "psnr", "ssim"}
    assert content["lists"]["a"]["scores"]["test"]["a_b"]["psnr"].keys() == {"value", "error", "n"}
    target = content["targets"]["test"][0]
    assert target["text"] == "Stage A, unquantised: PSNR in dB"
    assert target["reached"] is (target["measured"] >= 30)


def test_the_page_stands_alone_and_escapes_prompts(found, model_folder):
    hostile = '<script>alert("1")</script> & \' onerror=x'
    result = found.lists["a"]
    entries = [dataclasses.replace(entry, caption=hostile) for entry in result.entries]
    report = dataclasses.replace(found, lists={"a": dataclasses.replace(result, entries=entries)})
    page = html_page(report, to_json(report, model_folder, None), name="<i>model</i>")
    assert "<script" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &#x27; onerror=x" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    images = re.findall(r'<img src="data:image/webp;base64,([^"]+)" alt="([^"]+)"', page)
    assert len(images) == 4
    for data, alt in images:
        assert alt.startswith("real, A, A+B, C+B+A of: ")
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    assert "Only the first 4 entries of each list and split" in page
    assert ">±" in page


def test_summary_says_what_is_reached(found):
    scores, _, targets = summary(found).partition("targets on test")
    assert re.search(r"list \(a\), val, 4 entries +recall_1 +recall_5 +style", scores)
    psnr = found.lists["b"].scores["test"]["stage_a"]["psnr"].value
    assert re.search(rf"Stage A, unquantised [^\n]* {psnr:.3f} ", scores)
    assert "only the first 4 entries of each list and split: a quick check" in scores
    lines = targets.splitlines()
    assert len(lines) == 10
    assert re.search(r"\(b\) Stage A, unquantised: PSNR in dB +\d+\.\d{3} +≥ 30\.000 +short", lines[1])


# --- Photographs ---


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    Image.effect_noise((300, 200), 60).save(folder / "b.jpg")
    Image.effect_noise((64, 64), 60).save(folder / "deep" / "a.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    Image.effect_noise((64, 64), 60).save(folder / ".hidden.png")
    return folder


def test_photographs_need_no_emoji_set(small_model, photos, model_folder, tmp_path):
    report = evaluate(small_model, photos=photos, batch_size=2)
    result = report.photos
    assert result is not None
    assert result.names == ["b.jpg", "deep/a.png"]
    assert len(result.unreadable) == 1
    assert "broken.jpg" in result.unreadable[0]
    assert result.enlarged == 1
    assert list(result.scores) == ["stage_a", "stage_a_quantised", "a_b"]
    assert {score.n for scores in result.scores.values() for score in scores.values()} == {2}
    assert (report.lists, report.targets) == ({}, {})
    _, page = write_report(report, tmp_path, model=model_folder, name="x")
    assert "<h2>2 photographs</h2>" in page.read_text()
    assert "1 are smaller" in page.read_text()
    lines = summary(report).splitlines()
    assert "broken.jpg" in lines[0]
    assert re.match(r"2 photographs, A\+B, from the real image: PSNR \d+\.\d\d dB, SSIM -?\d", lines[-1])


def test_photographs_that_cannot_be_read_at_all(small_model, photos, tmp_path):
    with pytest.raises(DataError, match="'nowhere', which is not a folder"):
        evaluate(small_model, photos=tmp_path.__class__("nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        evaluate(small_model, photos=tmp_path / "empty")
    (photos / "b.jpg").unlink()
    (photos / "deep" / "a.png").unlink()
    with pytest.raises(DataError, match=r"no photograph in .* can be read.*broken\.jpg"):
        evaluate(small_model, photos=photos)


# --- Refusals ---


def test_a_model_without_parts_has_fewer_rows(small_cascade, emoji_set):
    half = Wuerstchen(
        Cascade(settings=small_cascade.settings, vqgan=small_cascade.vqgan, decoder=small_cascade.decoder),
        torch.device("cpu"),
    )
    renderer = Renderer(model=half, sampling=Sampling())
    assert renderer.rows() == ("real", "jpeg20", "stage_a", "stage_a_quantised")
    with pytest.raises(UserError, match="row 'c_b_a' needs a network that this model lacks"):
        evaluate(half, emoji_set, rows=("c_b_a",))
    with pytest.raises(UserError, match=r"row 'before' needs the model before compression.* jpeg20, stage_a"):
        evaluate(half, emoji_set, rows=("before",))


def test_before_must_draw_the_same_size(small_model, small_cascade):
    settings = dataclasses.replace(small_cascade.settings, image_size=256)
    other = Wuerstchen(dataclasses.replace(small_cascade, settings=settings), torch.device("cpu"))
    with pytest.raises(UserError, match="image_size 128, got 256"):
        Renderer(model=small_model, sampling=Sampling(), before=other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"data": None}, "neither an emoji set nor photographs"),
    ],
)
def test_requests_for_nothing(small_model, emoji_set, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate(small_model, **{"data": emoji_set, **changes})
