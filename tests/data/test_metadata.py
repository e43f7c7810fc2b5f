"""Reading the metadata file of a folder."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wuerstchen.data.metadata import CSV, JSONL, PARQUET, metadata_rows
from wuerstchen.errors import DataError


def rows(root, name, **columns):
    return list(metadata_rows(root, name, **columns))


def test_lines_of_json(tmp_path):
    lines = ['\ufeff{"a": 1}', "", '{"b": 2}']
    for newline in ("\n", "\r\n", "\r"):
        (tmp_path / JSONL).write_bytes(newline.join(lines).encode())
        assert rows(tmp_path, JSONL) == [
            ("metadata.jsonl line 1", {"a": 1}),
            ("metadata.jsonl line 3", {"b": 2}),
        ]


def test_a_line_without_end_is_refused(tmp_path):
    (tmp_path / JSONL).write_text(json.dumps({"text": "x" * (1 << 20)}))
    with pytest.raises(DataError, match=r"metadata.jsonl line 1 is too long\. It may have at most 1 MiB"):
        rows(tmp_path, JSONL)


def test_csv(tmp_path):
    text = 'file_name,text,pwatermark\r\na.png,"two\nlines, ""quoted""",0.25\r\n\r\nb.png,b,\r\n'
    (tmp_path / CSV).write_bytes(text.encode("utf-8-sig"))
    assert rows(tmp_path, CSV) == [
        (
            "metadata.csv line 3",
            {"file_name": "a.png", "text": 'two\nlines, "quoted"', "pwatermark": 0.25},
        ),
        ("metadata.csv line 5", {"file_name": "b.png", "text": "b", "pwatermark": None}),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name,text\na.png\n", "line 2 has 1 cells, but the first line names 2"),
        (b"file_name,text\na.png,a,b\n", "line 2 has 3 cells"),
        (b"text,text\na,b\n", "line 1 must contain the names of the columns, each once"),
        (b"", "line 1 must contain the names of the columns, each once"),
        (b"file_name,text\na.png,caf\xe9\n", "is not UTF-8"),
        (b'file_name,text\na.png,"' + b"x" * (1 << 20), "is not valid CSV"),
        (b'file_name,text\na.png,"a"b\n', "line 2 is not valid CSV"),
    ],
)
def test_what_is_no_csv(tmp_path, content, message):
    (tmp_path / CSV).write_bytes(content)
    with pytest.raises(DataError, match=message):
        rows(tmp_path, CSV)


def test_parquet_reads_the_columns_that_are_used(tmp_path):
    table = {
        "file_name": ["a.png"],
        "text": ["a"],
        "long": ["b"],
        "pwatermark": [0.5],
        "taken": pa.array([2**31 - 1], pa.date32()),  # beyond Python's last date
    }
    pq.write_table(pa.table(table), tmp_path / PARQUET)
    assert rows(tmp_path, PARQUET) == [
        ("metadata.parquet row 1", {"file_name": "a.png", "text": "a", "pwatermark": 0.5})
    ]
    found = rows(tmp_path, PARQUET, image_column="file_name", text_columns=("long",))
    assert found[0][1] == {"file_name": "a.png", "long": "b", "pwatermark": 0.5}


def test_what_is_no_parquet(tmp_path):
    (tmp_path / PARQUET).write_bytes(b"PAR1" + bytes(99) + b"PAR1")
    with pytest.raises(DataError, match=r"metadata.parquet' cannot be read"):
        rows(tmp_path, PARQUET)
    dates = pa.array([datetime.date(2020, 1, 1)])
    pq.write_table(pa.table({"file_name": ["a.png"], "text": dates}), tmp_path / PARQUET)
    assert rows(tmp_path, PARQUET)[0][1]["text"] == "date32[day]"
