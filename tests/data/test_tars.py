"""WebDataset shards."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from wuerstchen.data.filters import Tally
from wuerstchen.data.items import Item, Reader
from wuerstchen.data.open import open_reader
from wuerstchen.data.tars import TarReader
from wuerstchen.errors import DataError


def image_file(colour: str = "red", suffix: str = "jpeg") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), colour).save(file, suffix)
    return file.getvalue()


def read(reader: Reader) -> tuple[list[Item], Tally]:
    tally = Tally()
    return list(reader.items(tally)), tally


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, caption: str, colour: str = "red") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{key}.jpg", image_file(colour)), member(f"{key}.txt", caption.encode())]


@pytest.fixture
def three(tmp_path) -> Path:
    return write_tar(tmp_path / "a.tar", *sample("0", "zero"), *sample("1", "one"), *sample("2", "two"))


def test_tars(tmp_path):
    scores = {"pwatermark": 0.0, "original_width": 640, "original_height": 480, "other": "x"}
    write_tar(
        tmp_path / "1.tar",
        *sample("b/000", " a  blue\nthing ", "blue"),
        member("b/000.json", json.dumps(scores).encode()),
        member("b/001.json", json.dumps({"caption": "in json"}).encode()),
        member("b/001.PNG", image_file("lime", "png")),
        member("b/001.cls", b"7"),
    )
    write_tar(tmp_path / "0.tar", *sample("000", "first"))
    reader = open_reader(tmp_path)
    assert isinstance(reader, TarReader)
    items, tally = read(reader)
    assert [(i.name, i.captions) for i in items] == [
        ("0.tar:000", ("first",)),
        ("1.tar:b/000", ("a blue thing",)),
        ("1.tar:b/001", ("in json",)),
    ]
    assert items[1].fields == {k: v for k, v in scores.items() if k != "other"}
    assert not tally.dropped
    # In any order, because other processes read other images.
    assert reader.read(items[2].name, items[2].place) == image_file("lime", "png")
    assert reader.read(items[1].name, items[1].place) == image_file("blue")
    before = reader.fingerprint()
    write_tar(tmp_path / "0.tar", *sample("000", "first"), *sample("001", "x"))
    assert open_reader(tmp_path).fingerprint() != before
    assert [i.name for i in read(open_reader(f"{tmp_path}/[1-9].tar"))[0]] == ["1.tar:b/000", "1.tar:b/001"]


def test_members_that_lead_out_or_are_links_are_skipped_counted_and_named(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        *sample("000", "good"),
        *sample("/etc/001", "absolute"),
        *sample("../002", "climbs"),
        *sample("x/../../003", "climbs inside"),
        *sample("C:\\004", "Windows"),
        member("005.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("006.jpg", type=tarfile.LNKTYPE, linkname="000.jpg"),
        member("007.jpg", type=tarfile.FIFOTYPE),
        member("dir", type=tarfile.DIRTYPE),
        *sample("008", "good too"),
    )
    items, tally = read(TarReader([path]))
    assert [i.captions[0] for i in items] == ["good", "good too"]
    assert tally.dropped == {"member leads out": 8, "member is a link": 2, "member is a special file": 1}
    assert (f"{path}: ../002.jpg", "its name points outside the shard") in tally.damaged
    assert (f"{path}: 005.jpg", "it is a link, not a regular file") in tally.damaged


def test_a_size_below_zero_ends_its_shard_alone(tmp_path):
    """It points before the start of the file, where seeking raises OSError instead of an error of tarfile."""
    header, data = member("001.jpg", image_file("red"))
    header.pax_headers = {"size": "-9000000"}
    bad = write_tar(tmp_path / "a.tar", *sample("000", "first"), (header, data))
    good = write_tar(tmp_path / "b.tar", *sample("000", "second"))
    items, tally = read(TarReader([bad, good]))
    assert items[-1].captions == ("second",)
    assert tally.dropped == {"shard cut short": 1}


def test_samples_that_lack_something_are_dropped(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        member("0.jpg", image_file()),
        member("1.txt", b"no image"),
        *sample("2", " \n "),
        *sample("3", "good"),
        member("4.jpg", image_file()),
        member("4.txt", b"\xff\xfe"),
        member("5.jpg", image_file()),
        member("5.json", b'{"caption": "x"'),
        member("6.jpg", image_file()),
        member("6.json", b"[1]"),
        member("7.jpg", image_file()),
        member("7.json", b'{"caption": "\\ud83d"}'),
        member("8.jpg", image_file()),
        member("8.txt", b"x" * (1 << 20) + b"x"),
        *sample("9", "twice"),
        member("9.txt", b"other"),
        member("10.jpg", image_file()),
        member("10.json", b"[" * 100_000),
        member(".hidden", b""),
        member("README", b""),
    )
    items, tally = read(TarReader([path]))
    assert [i.captions for i in items] == [("good",), ("twice",)]
    assert tally.dropped == {"no caption": 3, "no image": 1, "bad text": 5, "member twice": 1}
    assert {name for name, _ in tally.damaged} == {f"a.tar:{n}" for n in (4, 5, 6, 8, 10)} | {
        f"{path}: 9.txt"
    }


def test_a_shard_cut_at_any_byte_gives_what_came_before(three):
    data = three.read_bytes()
    with tarfile.open(three) as tar:
        ends = [m.offset_data + m.size for m in tar.getmembers()]
        begins = [m.offset for m in tar.getmembers()]
    for length in [*range(0, ends[-1] + 1024, 256), *(b + d for b in (*begins, *ends) for d in (-1, 0, 1))]:
        if length < 0:
            continue
        three.write_bytes(data[:length])
        items, tally = read(TarReader([three]))
        # A sample is complete with its last member, but this is only known once the next one starts.
        whole = [i for i, end in enumerate(ends[1::2]) if length >= end]
        assert [int(i.name[-1]) for i in items] in (whole, whole[:-1]), length
        assert [i.captions[0] for i in items] == ["zero", "one", "two"][: len(items)]
        if length < ends[-1] + 512:
            assert tally.dropped == {"shard cut short": 1}, length
            assert tally.damaged[0][0] == str(three)
            assert f"of {length}" in tally.damaged[0][1]
    three.write_bytes(data)
    assert len(read(TarReader([three]))[0]) == 3


def test_a_damaged_header_is_noticed(three):
    data = bytearray(three.read_bytes())
    with tarfile.open(three) as tar:
        begin = tar.getmember("1.txt").offset
    data[begin : begin + 100] = b"\xff" * 100
    three.write_bytes(bytes(data))
    items, tally = read(TarReader([three]))
    assert [i.captions[0] for i in items] == ["zero"]
    assert f"damaged at byte {begin}" in tally.damaged[0][1]


def test_a_member_larger_than_any_file(three):
    data = bytearray(three.read_bytes())
    info = tarfile.TarInfo("1.jpg")
    info.size = 1 << 60
    with tarfile.open(three) as tar:
        begin = tar.getmember("1.jpg").offset
    data[begin : begin + 512] = info.tobuf(tarfile.GNU_FORMAT)
    three.write_bytes(bytes(data))
    items, tally = read(TarReader([three]))
    assert [i.captions[0] for i in items] == ["zero"]
    assert tally.dropped == {"shard cut short": 1}


def test_no_tar_at_all_among_others(tmp_path, three):
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(os.urandom(5000))
    items, tally = read(open_reader(tmp_path))
    assert len(items) == 3
    assert tally.dropped == {"shard cut short": 2}


def test_an_image_that_vanished_from_its_shard(three):
    reader = TarReader([three])
    items, _ = read(reader)
    three.write_bytes(three.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"Image 'a.tar:2' is truncated in"):
        reader.read(items[2].name, items[2].place)


def test_an_image_truncated_by_its_shard_is_not_read_in_part(three):
    reader = TarReader([three])
    items, _ = read(reader)
    _, offset, size = items[2].place
    three.write_bytes(three.read_bytes()[: offset + size - 1])
    with pytest.raises(DataError, match=r"Image 'a.tar:2' is truncated in"):
        reader.read(items[2].name, items[2].place)


def test_what_macos_adds_ends_no_sample(tmp_path):
    """Its tar writes a ``._`` file before each member. There are also other members outside of samples."""
    path = write_tar(
        tmp_path / "a.tar",
        member("./._0000.jpg", b"resource fork"),
        member("./0000.jpg", image_file("red")),
        member("./._0000.txt", b"resource fork"),
        member("./0000.txt", b"zero"),
        member("0001.jpg", image_file("blue")),
        member("README", b""),
        member("sub", type=tarfile.DIRTYPE),
        member(".DS_Store", b""),
        member("0002.jpg", type=tarfile.SYMTYPE, linkname="0001.jpg"),
        member("0001.txt", b"one"),
    )
    reader = TarReader([path])
    items, tally = read(reader)
    assert [(i.name, i.captions) for i in items] == [("a.tar:0000", ("zero",)), ("a.tar:0001", ("one",))]
    assert reader.read(items[1].name, items[1].place) == image_file("blue")
    assert tally.dropped == {"member is a link": 1}


def test_members_may_come_in_any_order(tmp_path):
    """As ``tar cf a.tar *.jpg *.txt *.json`` writes them."""
    path = write_tar(
        tmp_path / "a.tar",
        *(member(f"{key}.jpg", image_file()) for key in "abc"),
        *(member(f"{key}.txt", key.encode()) for key in "cab"),
        *(member(f"{key}.json", json.dumps({"pwatermark": 0.5}).encode()) for key in "bca"),
    )
    items, tally = read(TarReader([path]))
    assert [i.captions for i in items] == [("a",), ("b",), ("c",)]  # in the order of their first members
    assert all(i.fields == {"pwatermark": 0.5} for i in items)
    assert not tally.dropped


def test_keys_match_in_any_normal_form(tmp_path):
    path = write_tar(
        tmp_path / "a.tar", member("caf\u00e9.jpg", image_file()), member("cafe\u0301.txt", b"coffee")
    )
    assert [(i.name, i.captions) for i in read(TarReader([path]))[0]] == [("a.tar:caf\u00e9", ("coffee",))]


def test_keys_that_come_again_are_samples_of_their_own(tmp_path):
    """Concatenated tars can repeat names."""
    path = write_tar(tmp_path / "a.tar", *sample("0", "first"), *sample("1", "second"), *sample("0", "third"))
    items, tally = read(TarReader([path]))
    assert [i.captions[0] for i in items] == ["first", "second", "third"]
    assert not tally.dropped


@pytest.mark.parametrize(
    "header",
    [
        tarfile.TarInfo._create_pax_generic_header({"path": "x"}, tarfile.XHDTYPE, "utf-8"),
        tarfile.TarInfo._create_gnu_long_header("y" * 200, tarfile.GNUTYPE_LONGNAME, "utf-8", "strict"),
    ],
    ids=["pax", "long name"],
)
def test_headers_that_follow_on_hundreds_end_their_shard_alone(tmp_path, header):
    """tarfile reads each header recursively, up to Python's recursion limit."""
    good = write_tar(tmp_path / "b.tar", *sample("0", "good"))
    bad = tmp_path / "a.tar"
    whole = write_tar(tmp_path / "c.tar", *sample("0", "first"), *sample("1", "second"))
    with tarfile.open(whole) as tar:
        end = tar.getmember("1.jpg").offset
    bad.write_bytes(whole.read_bytes()[:end] + header * 900 + whole.read_bytes()[end:])
    items, tally = read(TarReader([bad, good]))
    assert items[-1].captions == ("good",)
    assert tally.dropped == {"shard cut short": 1}
    assert f"at byte {end} of" in tally.damaged[0][1]


def test_a_header_of_many_mebibytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("0.jpg")
    info.pax_headers = {"comment": "x" * (2 << 20)}
    path = write_tar(tmp_path / "a.tar", *sample("a", "first"), *sample("b", "second"), (info, b""))
    items, tally = read(TarReader([path]))
    assert [i.captions[0] for i in items] == ["first"]
    assert tally.dropped == {"shard cut short": 1}


def test_long_names_and_other_endings(tmp_path):
    key = "k" * 300
    path = write_tar(
        tmp_path / "a.tar",
        *sample(key, "long"),
        member("0.jfif", image_file()),
        member("0.caption", b"kohya"),
        *sample("n" * 5000, "longer than any path"),
    )
    items, tally = read(TarReader([path]))
    assert [i.captions[0] for i in items] == ["long", "kohya"]
    assert tally.dropped == {"member with a long name": 2}


def test_columns_of_tars(tmp_path):
    fields = json.dumps({"caption": "short", "caption_llava": "long"}).encode()
    path = write_tar(
        tmp_path / "a.tar",
        member("0.jpg", image_file("red")),
        member("0.seg.png", image_file("blue", "png")),
        member("0.txt", b"beside"),
        member("0.json", fields),
        member("1.jpg", image_file("red")),
        member("1.txt", b"alone"),
    )
    reader = TarReader([path], "seg.png", "caption_llava")
    items, tally = read(reader)
    assert [i.captions for i in items] == [("long",)]
    assert reader.read(items[0].name, items[0].place) == image_file("blue", "png")
    assert tally.dropped == {"no image": 1}
    items, tally = read(TarReader([path], text_column="caption_llava"))
    assert [i.captions for i in items] == [("long",)]
    assert tally.dropped == {"no caption": 1}
    assert [i.captions[0] for i in read(TarReader([path], text_column="txt"))[0]] == ["beside", "alone"]
    with pytest.raises(
        DataError, match=r"no column 'gone'\. Its columns are: jpg, .*, caption, caption_llava"
    ):
        read(TarReader([path], text_column="gone"))
    with pytest.raises(DataError, match=r"no column 'gone'\. Its columns are: jpg, seg.png, txt, json"):
        read(TarReader([path], image_column="gone"))


def test_whole_numbers_of_any_length(tmp_path):
    """401 digits do not fit into a float, and Python does not parse 5,000."""
    path = write_tar(
        tmp_path / "a.tar",
        *sample("0", "many digits"),
        member("0.json", b'{"pwatermark": ' + b"9" * 401 + b"}"),
        *sample("1", "too many"),
        member("1.json", b'{"pwatermark": ' + b"9" * 5000 + b"}"),
    )
    items, tally = read(TarReader([path]))
    assert [i.fields for i in items] == [{"pwatermark": int("9" * 401)}]
    assert tally.dropped == {"bad text": 1}
