"""Rows of label files: .csv, .tsv, .txt, .jsonl and .json as objects with the same keys."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Mapping
from typing import Any

FILE_NAME = re.compile(r".*\.\w{3,4}")
FILE_COLUMNS = (
    *("file_name", "filename", "file", "image", "image_path", "path", "filepath", "image_id", "image_name", "id"),
)


def rows_of(path: str, content: bytes) -> tuple[list[dict[str, Any]], str]:
    """The rows of a table, none if it is no table, and what was assumed about its letters.

    A table without a header has the columns `column 1`, `column 2` ...

    Raises:
        ValueError, csv.Error, RecursionError: the file is damaged.
    """
    text, assumed = _decode(content)
    path = path.lower()
    if path.endswith(".jsonl"):
        lines = [json.loads(line) for line in text.split("\n") if line.strip()]  # others may be in a caption
        return [flat(line) for line in lines if isinstance(line, dict)], assumed
    if path.endswith(".json"):
        return _json_rows(json.loads(text)), assumed
    return (_list_rows(text) if path.endswith(".txt") else _csv_rows(text)), assumed


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An object whose inner objects' keys are written as outer.inner."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _decode(content: bytes) -> tuple[str, str]:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace"), ""
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace"), "it is no UTF-8, so it is read as Windows-1252"


def _csv_rows(text: str) -> list[dict[str, Any]]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t|", key=lambda d: (first.count(d), d == ","))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    return _with_header([cells for line in lines if any(cells := [cell.strip() for cell in line])])


def _list_rows(text: str) -> list[dict[str, Any]]:
    """The rows of a list: cells between tabs, commas or else spaces, as the first line has them."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    separator = next((s for s in ("\t", ",") if lines and s in lines[0]), None)
    rows = [[cell.strip() for cell in line.split(separator)] for line in lines]
    header = bool(rows) and any(cell.lower() in FILE_COLUMNS for cell in rows[0])
    return _with_header(rows if header else [[], *rows])


def _with_header(lines: list[list[str]]) -> list[dict[str, Any]]:
    """Rows by the names in the first line, unless it is empty, names a file, or names something twice."""
    if not lines:
        return []
    header = lines[0]
    if not header or len(set(header)) < len(header) or any(FILE_NAME.fullmatch(cell) for cell in header):
        lines = lines if not header else [[], *lines]
        header = [f"column {i + 1}" for i in range(max(map(len, lines)))]
    return [dict(zip(header, line, strict=False)) for line in lines[1:]]


def _json_rows(content: Any) -> list[dict[str, Any]]:
    """Rows from the usual forms: a list of objects, {file: label}, or StyleGAN's {"labels": [[file, label], ...]}."""
    if isinstance(content, dict) and isinstance(content.get("labels"), list):
        content = content["labels"]
    if isinstance(content, dict):
        single = (str, int, float)
        return [{"file_name": key, "label": value} for key, value in content.items() if isinstance(value, single)]
    if isinstance(content, list):
        pairs = [row for row in content if isinstance(row, list) and len(row) == 2]
        return [flat(row) for row in content if isinstance(row, dict)] or [
            {"file_name": name, "label": label} for name, label in pairs
        ]
    return []
