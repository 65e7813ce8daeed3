"""Files are written whole or not at all, wherever a disk fills up, and by several processes at once."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from verl_ext.runs.files import append_whole, write_whole


@pytest.mark.parametrize("fits", [0, 1, 999, 4096])
@pytest.mark.parametrize("before", [None, b"earlier"])
def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(tmp_path, full_disk, fits, before):
    file = tmp_path / "a.json"
    if before is not None:
        file.write_bytes(before)
    with full_disk(fits), pytest.raises(OSError, match="File too large: '.*/a.json.new'"):
        write_whole(file, b"x" * 5000)
    assert (file.read_bytes() if file.exists() else None) == before
    assert os.listdir(tmp_path) == (["a.json"] if before else [])
    write_whole(file, b"y" * 5000)
    assert file.read_bytes() == b"y" * 5000


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, full_disk):
    with open(tmp_path / "log", "ab", buffering=0) as f:
        append_whole(f.fileno(), b"first\n")
        with full_disk(9), pytest.raises(OSError):
            append_whole(f.fileno(), b"second\n")
        append_whole(f.fileno(), b"third\n")
    assert (tmp_path / "log").read_bytes() == b"first\nthird\n"


def test_several_writers_leave_one_whole_file(tmp_path):
    def write(writer):
        for _ in range(50):
            write_whole(tmp_path / "state", str(writer).encode() * 5000, writer)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    content = (tmp_path / "state").read_bytes()
    assert len(content) == 5000 and len(set(content)) == 1 and os.listdir(tmp_path) == ["state"]
