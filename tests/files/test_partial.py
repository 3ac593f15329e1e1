"""A file that several runs write: finished parts stay, its place has the old file or the new one, no other is lost."""

import errno
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery.files import partial
from pygguf_surgery.files.partial import Partial, partial_path

HEADER = b"GGUF" + bytes(range(60))
PARTS, EACH = 4, 100
SIZE = len(HEADER) + PARTS * EACH + PARTS * 16


def data(part):
    return np.full(EACH, part + 1, np.uint8)


def write(file, part):
    file.write(len(HEADER) + part * EACH, data(part)[:30])
    file.write(len(HEADER) + part * EACH + 30, data(part)[30:])
    file.finish(part, (part + 0.5, part + 0.25))


WHOLE = (
    HEADER
    + b"".join(data(part).tobytes() for part in range(PARTS))
    + np.array([(part + 0.5, part + 0.25) for part in range(PARTS)], "<f8").tobytes()
)


def open_it(path, header=HEADER, **options):
    return Partial(path, header, SIZE, PARTS, **options)


@given(
    order=st.permutations(range(PARTS)),
    stops=st.sets(st.integers(1, PARTS - 1)),
    cut=st.integers(0, EACH),
    overwrite=st.booleans(),
)
def test_parts_of_several_runs_make_the_file(tmp_path_factory, order, stops, cut, overwrite):
    path = tmp_path_factory.mktemp("partial") / "out"
    if overwrite:
        path.write_bytes(b"old")
    done = []
    for stop in [*sorted(stops), PARTS]:
        with open_it(path, overwrite=overwrite) as file:
            assert file.finished() == sorted(done)
            for part in order[len(done) : stop]:
                write(file, part)
                done.append(part)
            if stop < PARTS:  # a part that is not finished is none, whatever was written of it
                file.write(len(HEADER) + order[stop] * EACH, np.full(cut, 255, np.uint8))
            else:
                file.complete()
        if stop < PARTS:
            assert path.exists() == overwrite and (not overwrite or path.read_bytes() == b"old")
            with pytest.raises(pgs.BadFile):
                pgs.open(partial_path(path))
    assert path.read_bytes() == WHOLE and os.listdir(path.parent) == ["out"]


def test_nothing_finished_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_it(tmp_path / "out") as file:
        file.write(len(HEADER), data(0))
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_what_another_run_left_needs_overwrite(tmp_path):
    with open_it(tmp_path / "out") as file:
        write(file, 1)
    other = HEADER[:-1] + b"\xff"
    with pytest.raises(pgs.BadPlan, match="another run"):
        open_it(tmp_path / "out", other)
    with open_it(tmp_path / "out") as file:
        assert file.finished() == [1]
    with open_it(tmp_path / "out", other, overwrite=True) as file:
        assert file.finished() == []


@pytest.mark.parametrize("content", [b"mine", WHOLE[:-1], HEADER, b"pgs"])
def test_a_file_of_somebody_else_stays(tmp_path, content):
    (tmp_path / "out.partial").write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(pgs.BadPlan, match="something else"):
            open_it(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out.partial").read_bytes() == content


def test_a_symbolic_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "out.partial").symlink_to("mine")
    with pytest.raises(OSError):
        open_it(tmp_path / "out", overwrite=True)
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_two_runs_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "_PATIENCE", 0.1)
    with open_it(tmp_path / "out") as file:
        with pytest.raises(pgs.BadPlan, match="another run is writing"):
            open_it(tmp_path / "out", overwrite=True)
        write(file, 0)
    with open_it(tmp_path / "out") as file:
        assert file.finished() == [0]


def test_an_output_that_came_meanwhile_stays(tmp_path):
    with pytest.raises(FileExistsError), open_it(tmp_path / "out") as file:
        for part in range(PARTS):
            write(file, part)
        (tmp_path / "out").write_bytes(b"theirs")
        file.complete()
    assert (tmp_path / "out").read_bytes() == b"theirs"
    with open_it(tmp_path / "out", overwrite=True) as file:  # nothing is lost
        assert file.finished() == [0, 1, 2, 3]
        file.complete()
    assert (tmp_path / "out").read_bytes() == WHOLE


def test_killed_between_link_and_unlink(tmp_path):
    (tmp_path / "out").write_bytes(WHOLE)
    os.link(tmp_path / "out", tmp_path / "out.partial")
    with open_it(tmp_path / "out", HEADER[:-1] + b"\xff", overwrite=True) as file:
        write(file, 0)
    assert (tmp_path / "out").read_bytes() == WHOLE  # it is not written into


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "ftruncate"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_before_the_first_part(tmp_path, call, number):
    """Whatever it has begun, another run begins anew."""
    code = f"""
import os, signal, sys
sys.path[:] = {sys.path!r}
from pygguf_surgery.files.partial import Partial
calls, before = [], os.{call}
def killed(*arguments):
    calls.append(1)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*arguments)
os.{call} = killed
Partial({str(tmp_path / "out")!r}, {HEADER!r}, {SIZE}, {PARTS})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == (-9 if number == 1 or call == "pwrite" else 0), done.stderr
    other = HEADER[:-1] + b"\xff"
    if done.returncode:
        with open_it(tmp_path / "out", other) as file:
            assert file.finished() == []


def test_the_mode_of_the_old_file_stays(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    (tmp_path / "out").chmod(0o640)
    with open_it(tmp_path / "out", overwrite=True) as file:
        for part in range(PARTS):
            write(file, part)
        file.complete()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_no_space_is_an_error_before_the_first_byte(tmp_path):
    code = f"""
import resource, sys
sys.path[:] = {sys.path!r}
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
from pygguf_surgery import OutOfSpace
from pygguf_surgery.files.partial import Partial
try:
    Partial({str(tmp_path / "out")!r}, {HEADER!r}, {SIZE}, {PARTS})
except OutOfSpace as error:
    print(error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{errno.EFBIG}\n", "") and os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100


@pytest.mark.parametrize("call", ["fdatasync", "pwrite", "fsync"])
def test_a_failing_disk_loses_no_finished_part(tmp_path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_it(tmp_path / "out") as file:
        write(file, 2)
    with monkeypatch.context() as patch, pytest.raises(OSError), open_it(tmp_path / "out") as file:
        patch.setattr(os, call, fail)
        write(file, 0)
        file.complete()
    with open_it(tmp_path / "out") as file:
        assert 2 in file.finished()
        for part in {0, 1, 3} - set(file.finished()):
            write(file, part)
        file.complete()
    assert (tmp_path / "out").read_bytes() == WHOLE
