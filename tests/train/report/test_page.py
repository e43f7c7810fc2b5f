"""The page of a run: what is in it, and that no log or folder can break it or get into it."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from wuerstchen.errors import RunFolderError, UserError
from wuerstchen.image_files import save_png
from wuerstchen.train.report.cost import Tariff, make_tariff
from wuerstchen.train.report.curves import Line, chart, log_ticks, short, smoothed, ticks
from wuerstchen.train.report.page import read_stages, write_report

NONSENSE = '<script>alert("x")</script>'


class Checker(HTMLParser):
    """Collects tags, and fails where they do not close as they were opened."""

    VOID = ("meta", "img", "line", "polyline", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def event(kind, stage="a", **values):
    return {"event": kind, "time": 1.7e9 + values.get("images", 0), "stage": stage, **values}


def progress(images, loss, **values):
    rate = {"images_per_second": 10.0, "gradient_vqgan": 2.0, "learning_rate": 1e-4}
    return event("progress", images=images, loss=loss, **{**rate, **values})


def write(folder, events, cut: str = ""):
    text = "".join(json.dumps(e) + "\n" for e in events)
    (folder / "log.jsonl").write_text(text + cut, encoding="utf-8")


def page_of(folder, tariff: Tariff | None = None) -> str:
    path = write_report(folder, tariff=tariff)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    names = {name for name, _ in checker.tags}
    assert not names & {"script", "iframe", "object", "link"}
    sources = [attrs["src"] for _, attrs in checker.tags if "src" in attrs]
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert not re.search(r"https?://|@import|url\(", text)  # nothing is fetched
    return text


def rows_of(text: str, title: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    table = text.split(f"<h2>{title}</h2>")[1].split("</table>")[0]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>")[1:]]


def test_a_run_of_two_stages_that_was_killed_once(tmp_path):
    events = [
        event("rehearsed", "b", total=100, seconds=36.0, kwh=None),
        event("start", images=0, total=80, resumed=False, device="cpu"),
        progress(20, 1.0, seconds=10.0, kwh=0.1),
        event("checkpoint", images=20, seconds=11.0, kwh=0.11),
        progress(40, 900.0, seconds=20.0, kwh=0.2),
        event("start", images=20, total=80, resumed=True, device="cpu"),
        progress(40, 0.8, seconds=5.0, kwh=0.05),
        progress(60, 0.6, seconds=15.0, kwh=0.15),
        event("stopped", images=60),
    ]
    write(tmp_path, events)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"name": "mine", "seed": 7}, "data": "f00d"}))
    text = page_of(tmp_path, make_tariff("FR", per_hour=3.6))
    rows = rows_of(text, "Stages and cost")
    # 20 s, of which the kill lost 9, and 15 s; 0.35 kWh; 20 of 80 images are left, at 10 a second.
    assert rows[1][0] == "Stage A"
    assert rows[1][1:3] == ["60 (75%)", "80"]
    assert rows[1][6:] == ["35 s", "0.35", "0.0196", "0.04", "2 s"]
    assert rows[2][0] == "Stage B"
    assert rows[2][6:] == ["", "", "", "", "60.0 min"]
    assert rows[3][2:6] == ["35 s", "0.35", "0.0196", "0.04"]  # so far
    assert rows[4][2:6] == ["60.0 min", "–", "–", "3.60"]  # remaining: B's energy is not known
    assert rows[5][2] == "60.6 min"
    starts = rows_of(text, "Starts and stops")
    assert [row[2] for row in starts[1:]] == ["0", "20"]
    assert starts[1][-1] == "killed, 20 images trained again"
    assert starts[2][-1] == "stopped by a signal"
    assert "stopped by a signal. The same command resumes it" in text
    for word in (
        "mine",
        "f00d",
        "loss",
        "gradient norm",
        "learning rate",
        "images per second",
        "FR, Ember, 2023",
    ):
        assert word in text
    assert "900" not in text.split("<h2>Stage A</h2>")[1].split("<h2>")[0]


def test_later_lines_win_where_starts_overlap():
    events = [
        event("start", images=0, total=100),
        *(progress(n, 1.0) for n in (10, 20, 30, 40)),
        event("validation", images=40, loss=1.0, bins=[1.0, 2.0]),
        event("start", images=20, total=100),
        progress(30, 2.0),
        event("validation", images=20, loss=0.5, bins=[None, 3.0]),
        progress(30, 3.0),  # a line twice
    ]
    stage = read_stages(events)["a"]
    assert stage.values["loss"] == [(10, 1.0), (20, 1.0), (30, 3.0)]
    assert stage.validation == [(20, [None, 3.0])]
    assert [start.last_images for start in stage.starts] == [40, 30]


def test_a_log_with_an_incomplete_line_and_that_of_a_running_run(tmp_path):
    whole = [event("start", images=0, total=80, device="cpu"), progress(20, 1.0), progress(40, 0.5)]
    write(tmp_path, whole, cut='{"event": "progress", "stage": "a", "images": 6')
    text = page_of(tmp_path)
    assert "40 (50%)" in text
    assert "running, or killed" in text
    # As an empty log does: a run that is just beginning.
    write(tmp_path, [])
    assert "Nothing has started yet" in page_of(tmp_path)


def test_validation_by_time_has_one_line_per_bin(tmp_path):
    marks = [event("validation", images=n, loss=0.1, bins=[1 / n] * 8) for n in (10, 20)]
    write(tmp_path, [event("start", images=0, total=20), *marks])
    text = page_of(tmp_path)
    assert "t 0–0.125" in text
    assert "t 0.875–1" in text
    assert text.count("<polyline") == 9  # with their mean
    assert "energy" in text.lower()


def test_skipped_images_are_counted_once_by_reason(tmp_path):
    events = [event("start", images=0, total=20)]
    for n in (1, 2, 3, 1, 1):  # the feed meets a broken image in every epoch
        events.append(event("skipped", name=f"{n}.png", reason=f"/data/{n}.png is cut short at byte {n}00"))
    events.append(event("skipped", name=NONSENSE, reason=f"{NONSENSE} & no picture"))
    write(tmp_path, events)
    text = page_of(tmp_path)
    rows = rows_of(text, "Skipped images")
    assert rows[1] == ["… is cut short at byte …", "3", "1.png, 2.png, 3.png"]
    assert rows[2][1] == "1"
    assert "4 could not be read" in text
    assert NONSENSE not in text


def test_previews_are_few_and_small_and_broken_ones_are_left_out(tmp_path):
    write(tmp_path, [event("start", images=0, total=20)])
    folder = tmp_path / "stage_a" / "previews"
    folder.mkdir(parents=True)
    for n in range(1, 21):
        Image.effect_noise((1200, 300), 50).save(folder / f"{n:012d}.png")
    (folder / f"{20:012d}.png").write_bytes((folder / f"{20:012d}.png").read_bytes()[:5000])
    (folder / "².png").write_bytes(b"")
    (folder / "1000.png").write_text("no picture")
    Image.new("1", (20_000, 10_000)).save(folder / "2000.png")
    text = page_of(tmp_path)
    images = re.findall(r"base64,([^\"]*)", text)
    assert 2 <= len(images) <= 6
    assert all(Image.open(io.BytesIO(base64.b64decode(data))).width == 900 for data in images)
    assert "<figcaption>after 1 image</figcaption>" in text


def write_preview(folder, images, **settings):
    path = folder / "previews" / f"{images:012d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(Image.new("RGB", (30, 20), "red"), path, {"images": images, **settings})


def test_previews_have_labels(tmp_path):
    """Images without a word about which is the original, or which prompt they were drawn of."""
    write(tmp_path, [event("start", s, images=0, total=20) for s in ("a", "c")])
    write_preview(tmp_path / "stage_a", 5, columns=2, rows=["original", "through <b>"])
    prompts = ["a cat", "a dog", NONSENSE, "a cow", "a hat"]
    for images in (5, 10):
        write_preview(tmp_path / "stage_c", images, columns=3, prompts=prompts)
    write_preview(tmp_path / "stage_c", 15, columns=1, prompts=["a bee"])
    text = page_of(tmp_path)
    a, c = text.split("<h2>Stage A</h2>")[1].split("<h2>Stage C</h2>")
    assert "Rows, from the top: original; through &lt;b&gt;." in a
    assert NONSENSE not in text
    first, second = c.split("The prompts, in the same layout as the images:")[1:]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", first)
    assert [cells[0], *cells[1:3], *cells[4:]] == ["row 1", "a cat", "a dog", "row 2", "a cow", "a hat", ""]
    assert (first.count("<figure><img"), second.count("<figure><img")) == (
        2,
        1,
    )  # the same prompts stand once
    assert "a bee" in second


def test_old_previews_of_stage_c_show_the_recipes_prompts(tmp_path):
    """They do not say how many are in a row."""
    write(tmp_path, [event("start", s, images=0, total=20) for s in ("a", "c2")])
    recipe = {"preview_prompts": ["a cat", NONSENSE]}
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe}))
    for stage in ("stage_a", "stage_c2"):
        write_preview(tmp_path / stage, 5)
    text = page_of(tmp_path)
    assert text.count("The prompts in the order of the images") == 1
    assert "<ol><li>a cat</li><li>&lt;script&gt;" in text.split("<h2>Stage C2</h2>")[1]
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"preview_prompts": "a"}}))
    assert "prompts" not in page_of(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": "abc", "columns": 2},
        {"rows": [], "prompts": [], "columns": 2},
        {"prompts": [["a"] * 9, {"b": 1}, None] * 1000, "columns": 10**9},
        {"prompts": ["x" * 100_000], "columns": 0},
        {"prompts": ["a"], "columns": "3"},
        {"prompts": ["a", "b"], "columns": 200},
    ],
)
def test_hostile_labels_leave_a_page(tmp_path, settings):
    write(tmp_path, [event("start", "c", images=0, total=20)])
    write_preview(tmp_path / "stage_c", 5, **settings)
    text = page_of(tmp_path)
    assert "<figcaption>after 5 images</figcaption>" in text
    assert len(text) < 100_000


@pytest.mark.parametrize("width", [320, 390, 768, 1030, 1280])
def test_tables_are_no_wider_than_their_box(tmp_path, browser, width):
    """Half of the columns out of sight on a phone."""
    name = "data/" + "a_long_name" * 9 + ".jpg"
    events = [
        event("start", images=0, total=1_048_576, device="NVIDIA H200 (139 GiB), bf16, 8 processes"),
        *(progress(n * 100_000, 1.0 / n, seconds=3600.0 * n, kwh=1.0 * n) for n in range(1, 9)),
        event("skipped", name=name, reason=f"{name} is cut short at byte 12 of 4096 and cannot be read"),
        event("stopped", images=800_000),
    ]
    write(tmp_path, events)
    write_preview(tmp_path / "stage_a", 5, columns=8, prompts=["a 3D render of a camel"] * 16)
    page = write_report(tmp_path, tariff=make_tariff("FR", per_hour=3.6))
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())
    wider = """return [document.documentElement, ...document.querySelectorAll('.wide, td, th')]
      .filter((each) => each.scrollWidth > each.clientWidth + 1).map((each) => each.outerHTML)"""
    assert browser.execute_script(wider) == []
    # Where the names of columns do not fit above them, they stand beside the values.
    names = "return getComputedStyle(document.querySelector('td[data-name=kWh]'), '::before').content"
    assert browser.execute_script(names) == ('"kWh"' if width < 1050 else "none")


def test_a_hostile_log_is_read_as_far_as_it_makes_sense(tmp_path):
    outside = tmp_path / "previews"
    outside.mkdir()
    Image.new("RGB", (8, 8)).save(outside / "1.png")
    run = tmp_path / "run"
    (run / "stage_x").mkdir(parents=True)
    lines = [
        event("start", images=0, total=1e308, device=NONSENSE),
        event("start", stage="/../..", images=0, total=1),
        event("start", stage=NONSENSE, images=0, total=1),
        event("start", stage=["a"], images=0),
        *(progress(n, 10.0 ** (300 * (n % 3 - 1))) for n in range(9)),
        *(progress(n, 5.0, **{NONSENSE: n, "images_per_second": 0}) for n in range(9, 12)),
        progress(12, float("nan"), images_per_second=float("inf"), memory_gib="much", seconds=True),
        {**progress(13, 1.0), "images": 10**400},
        event("validation", images=12, loss="x", bins="no"),
        event("validation", images=13, loss=None, bins=[None, "x", float("nan"), 1.0]),
        event("skipped", name=3, reason=None),
        {"event": "tariff", "grid": NONSENSE, "kg_per_kwh": 0.1},
        {"event": 3},
        {"event": "end", "time": 1e300},
    ]
    write(run, lines, cut="[" * 100_000 + "\n\xff\xfe\n" + json.dumps(event("progress", images=50)))
    (run / "run.json").write_text('{"recipe": [3], "data": {}}')
    text = page_of(run)
    assert "alert(" in text  # it is there to be read
    assert NONSENSE not in text
    assert "<img" not in text
    (run / "run.json").write_text("{")
    page_of(run)


def test_other_folders_are_refused_in_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            RunFolderError, match=r"is not a run folder: it has no log\.jsonl\. Use the --run-dir"
        ):
            write_report(path)
    write(tmp_path, [])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path, tmp_path / "file" / "page.html")


def points_of(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_curves_rise_where_values_do_and_decades_are_equal_steps():
    (line,) = points_of(chart("x", [Line(name="x", points=[(0.0, 1.0), (10.0, 10.0), (20.0, 100.0)])]))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)  # up is less, and a decade is a decade
    assert y0 > y1
    (line,) = points_of(
        chart("x", [Line(name="x", points=[(0.0, 1.0), (10.0, 10.0), (20.0, 100.0)])], log=False)
    )
    assert (line[0][1] - line[1][1]) / (line[1][1] - line[2][1]) == pytest.approx(0.1, abs=0.01)


def test_long_lines_are_thinned_and_keep_their_peaks():
    points = [(float(n), 1.0) for n in range(100_000)]
    points[77_777] = (77_777.0, 2.0)
    raw, mean = points_of(chart("x", [Line(name="x", points=points, smooth=True)]))
    assert len(raw) <= 400
    assert len(mean) <= 400
    assert min(y for _, y in raw) < min(y for _, y in mean) - 50


def test_a_line_without_points_has_no_figure():
    assert chart("x", []) == ""
    assert chart("x", [Line(name="x", points=[(1.0, 1.0)])]) == ""
    assert chart("x", [Line(name="x", points=[(1.0, 1.0), (1.0, 2.0)])]) == ""
    assert "<polyline" in chart("x", [Line(name="x", points=[(1.0, 0.0), (2.0, 0.0)])])


def test_running_means_begin_at_the_first_value():
    assert smoothed([(0.0, 3.0), (1.0, 3.0)]) == [(0, 3.0), (1, pytest.approx(3.0))]
    assert smoothed([(float(n), 3.0) for n in range(100)])[1] == (1, pytest.approx(3.0))
    noisy = [(float(n), 1.0 + (n % 2)) for n in range(1000)]
    assert all(abs(y - 1.5) < 0.1 for _, y in smoothed(noisy)[200:])


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 80.0) == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert ticks(0.013, 0.021) == pytest.approx([0.013 + 0.001 * k for k in range(9)])
    assert log_ticks(0.9, 120.0) == [1, 2, 5, 10, 20, 50, 100]
    assert log_ticks(1e-5, 10.0) == pytest.approx([10.0**k for k in range(-5, 2)])
    numbers = {0.0: "0", 1e-5: "1e-5", 0.0123: "0.0123", 1234.0: "1234", 12_000.0: "12k", 2.5e6: "2.5M"}
    assert {n: short(n) for n in numbers} == numbers
