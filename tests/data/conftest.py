"""Folders for several tests of the data."""

from pathlib import Path

import pytest
from data.files import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty grey images in two classes; image k of a class has brightness k, plus 100 in the second class."""
    for class_name, offset in (("cat", 0), ("dog", 100)):
        for k in range(10):
            save(tmp_path / "pets" / class_name / f"{k}.png", offset + k)
    return tmp_path / "pets"


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """The folder with cat/3 cut short, cat/4 empty and dog/0 a dead link; all images are for training."""
    (folder / "cat" / "3.png").write_bytes((folder / "cat" / "3.png").read_bytes()[:-30])
    (folder / "cat" / "4.png").write_bytes(b"")
    (folder / "dog" / "0.png").unlink()
    (folder / "dog" / "0.png").symlink_to(folder / "nowhere.png")
    save(tmp_path / "held" / "cat" / "x.png")
    return folder
