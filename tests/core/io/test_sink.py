"""Sink: the output path holds the old file or the new one, whole, and nothing else appears in its folder."""

import fcntl
import itertools
import os
import random
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pygguf_surgery import BadPlan, OutOfSpace
from pygguf_surgery._core import Sink, Source
from support.page_cache import resident

MODES = ["auto", "pread", "direct", "mmap"]
PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture(params=["1", "0"], ids=["nameless", "named"])
def temp_kind(request, monkeypatch):
    """With O_TMPFILE, and as where the file system has none."""
    monkeypatch.setenv("PGS_TMPFILE", request.param)


@pytest.fixture(params=["1", "0"], ids=["dontcache", "advice"])
def dontcache(request, monkeypatch):
    monkeypatch.setenv("PGS_DONTCACHE", request.param)


def write(path, content, **options):
    with Sink(str(path), len(content), **options) as sink:
        sink.write_at(0, content)


# --- the bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", MODES)
@settings(max_examples=15)
@given(data=st.data())
def test_any_order_of_any_pieces_gives_the_file(tmp_path, dontcache, io, data):
    size = data.draw(st.one_of(st.integers(0, 3 * PAGE), st.integers(0, 3 << 20)))
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    cuts = data.draw(st.lists(st.integers(0, size), max_size=40))
    cuts = sorted({0, size, *cuts})
    pieces = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    with Sink(str(tmp_path / "out"), size, overwrite=True, io=io) as sink:
        for begin, end in pieces:
            sink.write_at(begin, content[begin:end])
    assert (tmp_path / "out").read_bytes() == content.tobytes()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize("shift", [0, 1, 64, 512])
def test_memory_of_any_alignment(tmp_path, dontcache, io, shift):
    size = (2 << 20) + 100
    memory = np.random.default_rng(1).integers(0, 256, size + 2 * PAGE, dtype=np.uint8)
    start = -memory.ctypes.data % PAGE + shift
    write(tmp_path / "out", memory[start : start + size], io=io)
    assert (tmp_path / "out").read_bytes() == memory[start : start + size].tobytes()


def test_threads_may_write_at_once(tmp_path, dontcache):
    size, step = 4_000_037, 7_919
    content = random.Random(0).randbytes(size)
    with Sink(str(tmp_path / "out"), size) as sink:

        def work(first):
            for offset in range(first * step, size, 4 * step):
                sink.write_at(offset, content[offset : offset + step])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.parametrize("io", MODES)
def test_the_output_is_not_in_the_page_cache(tmp_path, dontcache, io):
    write(tmp_path / "out", random.Random(0).randbytes(5_000_000), io=io)
    pages = resident(tmp_path / "out")
    if all(pages):
        pytest.skip("this file system keeps everything in memory")
    assert not any(pages)


@pytest.mark.parametrize("pieces", [[], [(0, 99)], [(1, 99)], [(0, 50), (51, 49)]])
def test_a_missing_byte_is_never_committed(tmp_path, pieces):
    (tmp_path / "out").write_bytes(b"old")
    sink = Sink(str(tmp_path / "out"), 100, overwrite=True)
    for offset, nbytes in pieces:
        sink.write_at(offset, bytes(nbytes))
    with pytest.raises(BadPlan, match="missing"):
        sink.commit()
    assert (tmp_path / "out").read_bytes() == b"old" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("size", [100, 3 * PAGE])
def test_a_byte_written_twice_is_never_committed(tmp_path, size):
    with pytest.raises(BadPlan, match="twice"), Sink(str(tmp_path / "out"), size) as sink:
        sink.write_at(0, bytes(size))
        sink.write_at(0, bytes(size))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("offset, nbytes", [(0, 101), (100, 1), (101, 0), (2**64 - 1, 1)])
def test_a_write_beyond_the_end_is_an_error(tmp_path, offset, nbytes):
    sink = Sink(str(tmp_path / "out"), 100)
    with pytest.raises(BadPlan, match="beyond the end"):
        sink.write_at(offset, bytes(nbytes))


def test_data_must_be_contiguous_bytes(tmp_path):
    sink = Sink(str(tmp_path / "out"), 100)
    with pytest.raises((BufferError, ValueError)):
        sink.write_at(0, np.zeros(200, np.uint8)[::2])
    with pytest.raises(TypeError):
        sink.write_at(0, "text")


# --- life ------------------------------------------------------------------------------------------------------------


def test_nothing_is_visible_before_commit(tmp_path):
    sink = Sink(str(tmp_path / "out"), 3)
    sink.write_at(0, b"abc")
    assert not (tmp_path / "out").exists()
    sink.commit()
    assert (tmp_path / "out").read_bytes() == b"abc"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_in_the_block_removes_the_temp(tmp_path, temp_kind, overwrite):
    if overwrite:
        (tmp_path / "out").write_bytes(b"old")
    before = os.listdir(tmp_path)
    with pytest.raises(KeyboardInterrupt), Sink(str(tmp_path / "out"), 3, overwrite=overwrite) as sink:
        sink.write_at(0, b"abc")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == before
    assert not overwrite or (tmp_path / "out").read_bytes() == b"old"


def test_abort_and_forgetting_remove_the_temp(tmp_path, temp_kind):
    Sink(str(tmp_path / "out"), 3).abort()
    sink = Sink(str(tmp_path / "out"), 3)
    del sink
    assert os.listdir(tmp_path) == []


def test_a_closed_sink_says_so(tmp_path):
    for close in (Sink.commit, Sink.abort):
        sink = Sink(str(tmp_path / "out"), 0, overwrite=True)
        close(sink)
        for action in (sink.commit, lambda: sink.write_at(0, b"")):
            with pytest.raises(ValueError, match="closed"):
                action()
        sink.abort()


def test_an_existing_file_needs_overwrite(tmp_path, temp_kind):
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        Sink(str(tmp_path / "out"), 3)
    write(tmp_path / "out", b"new", overwrite=True)
    assert (tmp_path / "out").read_bytes() == b"new" and os.listdir(tmp_path) == ["out"]


def test_of_two_writers_without_overwrite_the_first_commit_wins(tmp_path, temp_kind):
    first, second = (Sink(str(tmp_path / "out"), 5) for _ in range(2))
    first.write_at(0, b"first")
    second.write_at(0, b"secon")
    first.commit()
    with pytest.raises(FileExistsError):
        second.commit()
    assert (tmp_path / "out").read_bytes() == b"first" and os.listdir(tmp_path) == ["out"]


def test_of_two_writers_with_overwrite_the_last_commit_wins(tmp_path, temp_kind):
    first, second = (Sink(str(tmp_path / "out"), 5, overwrite=True) for _ in range(2))
    first.write_at(0, b"first")
    second.write_at(0, b"secon")
    second.commit()
    first.commit()
    assert (tmp_path / "out").read_bytes() == b"first" and os.listdir(tmp_path) == ["out"]


# --- the target ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_any_new_file(tmp_path, temp_kind, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "out", b"abc")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_replaced_file_keeps_its_mode(tmp_path, temp_kind, mode):
    (tmp_path / "out").write_bytes(b"old")
    (tmp_path / "out").chmod(mode)
    write(tmp_path / "out", b"new", overwrite=True)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(tmp_path, temp_kind):
    (tmp_path / "out").write_bytes(b"old")
    os.chown(tmp_path / "out", 1234, 5678)
    write(tmp_path / "out", b"new", overwrite=True)
    result = (tmp_path / "out").stat()
    assert (result.st_uid, result.st_gid) == (1234, 5678)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path, temp_kind, exists, relative):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    real = tmp_path / "b" / "real"
    if exists:
        real.write_bytes(b"old")
    (tmp_path / "hop").symlink_to("b/real" if relative else real)
    (tmp_path / "a" / "link").symlink_to("../hop" if relative else tmp_path / "hop")
    write(tmp_path / "a" / "link", b"new", overwrite=exists)
    assert (tmp_path / "a" / "link").is_symlink() and (tmp_path / "hop").is_symlink()
    assert real.read_bytes() == b"new" and os.listdir(tmp_path / "b") == ["real"]
    assert os.listdir(tmp_path / "a") == ["link"]


def test_a_circle_of_links_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        Sink(str(tmp_path / "a"), 3)


@pytest.mark.parametrize("name", ["", ".", "..", "folder", "folder/", "fifo"])
def test_a_target_that_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadPlan):
        Sink(f"{tmp_path}/{name}", 3, overwrite=True)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder does not exist") as error:
        Sink(str(tmp_path / "missing" / "out"), 3)
    assert error.value.filename == str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        Sink("", 3)


def test_a_relative_path_is_resolved_once(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Sink("out", 3) as sink:
        sink.write_at(0, b"abc")
        monkeypatch.chdir("elsewhere")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]


@pytest.mark.parametrize("way", ["path", "dots", "hard link", "symbolic link"])
def test_the_output_is_never_an_input(tmp_path, way):
    path = tmp_path / "in"
    path.write_bytes(b"input")
    source = Source(str(path))
    other = tmp_path / "other"
    if way == "hard link":
        os.link(path, other)
    elif way == "symbolic link":
        other.symlink_to(path)
    elif way == "dots":
        other = f"{tmp_path}/../{tmp_path.name}/in"
    else:
        other = path
    for overwrite in (False, True):
        with pytest.raises(BadPlan, match="one of the inputs"):
            Sink(str(other), 3, overwrite=overwrite, inputs=[source])
    assert path.read_bytes() == b"input"


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "x" * 220, "x" * 200, "\udcff"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_names_as_long_as_they_get(tmp_path, temp_kind, name, overwrite):
    if overwrite:
        (tmp_path / name).write_bytes(b"old")
    write(tmp_path / name, b"new", overwrite=overwrite)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"new"


def test_a_name_that_is_too_long_fails_at_once(tmp_path):
    with pytest.raises(OSError, match="too long"):
        Sink(str(tmp_path / ("x" * 256)), 3)


# --- what killed runs leave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "x" * 255])
def test_stale_temps_are_removed_and_nothing_else_is(tmp_path, temp_kind, name):
    # The name that a killed run would have left, seen in a live one.
    os.environ["PGS_TMPFILE"], before = "0", os.environ["PGS_TMPFILE"]
    live = Sink(str(tmp_path / name), 3)
    os.environ["PGS_TMPFILE"] = before
    [temp] = os.listdir(tmp_path)
    assert temp.startswith(".") and ".pgs-tmp-" in temp and len(os.fsencode(temp)) <= 255
    stale = temp[:-16] + "0123456789abcdef"
    keep = [
        f".{name[:100]}.pgs-tmp-1-0123456789abcdef.pgs-tmp-1-0123456789abcdef",
        ".other.pgs-tmp-1-0123456789abcdef",
        ".out.pgs-tmp-",
        ".out.pgs-tmp-x-0123456789abcdef",
        ".out.pgs-tmp-1-0123456789abcde",
        "out.pgs-tmp-1-0123456789abcdef",
    ]
    for file in (stale, *keep):
        (tmp_path / file).write_bytes(b"")
    write(tmp_path / "other2", b"")
    assert (tmp_path / stale).exists()  # another target's
    Sink(str(tmp_path / name), 3).abort()
    assert sorted(os.listdir(tmp_path)) == sorted([temp, "other2", *keep])
    live.write_at(0, b"abc")
    live.commit()
    assert (tmp_path / name).read_bytes() == b"abc" and not (tmp_path / temp).exists()


def test_a_temp_that_another_process_holds_is_kept(tmp_path):
    temp = tmp_path / ".out.pgs-tmp-1-0123456789abcdef"
    with temp.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Sink(str(tmp_path / "out"), 3).abort()
        assert temp.exists()
    Sink(str(tmp_path / "out"), 3).abort()
    assert not temp.exists()


def test_a_stale_temp_that_is_a_link_or_a_folder_is_left_alone(tmp_path):
    (tmp_path / "precious").write_bytes(b"")
    (tmp_path / ".out.pgs-tmp-1-0123456789abcdef").symlink_to("precious")
    (tmp_path / ".out.pgs-tmp-2-0123456789abcdef").mkdir()
    os.mkfifo(tmp_path / ".out.pgs-tmp-3-0123456789abcdef")
    before = sorted(os.listdir(tmp_path))
    Sink(str(tmp_path / "out"), 3).abort()
    assert sorted(os.listdir(tmp_path)) == before


# --- space -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << 60, 2**63 - 1, 2**63, 2**64 - 1])
def test_more_than_the_disk_holds_is_refused_at_once(tmp_path, temp_kind, size):
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(OutOfSpace) as error:
        Sink(str(tmp_path / "out"), size, overwrite=True)
    assert isinstance(error.value, OSError)
    assert error.value.expected == f"{size} bytes"
    missing = size - int(error.value.found.split()[0])
    assert f"{missing} bytes missing" in error.value.problem
    assert (tmp_path / "out").read_bytes() == b"old" and os.listdir(tmp_path) == ["out"]


def test_the_space_is_reserved_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setenv("PGS_TMPFILE", "0")
    sink = Sink(str(tmp_path / "out"), 64 << 20)
    [temp] = tmp_path.iterdir()
    assert temp.stat().st_blocks * 512 >= 64 << 20
    sink.abort()


def test_a_file_size_limit_is_an_error_not_a_signal(tmp_path):
    code = """if True:
        import os, resource, signal, sys
        from pygguf_surgery import OutOfSpace
        from pygguf_surgery._core import Sink
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # as in a host that is not Python
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        for io in ("auto", "pread", "direct"):
            with Sink(sys.argv[1], 1_000_000, overwrite=True, io=io) as sink:
                sink.write_at(0, b"x" * 1_000_000)
            try:
                Sink(sys.argv[1], 1_000_001, overwrite=True, io=io)
            except OutOfSpace as error:
                print(error.problem, error.found, error.expected, sep="; ")
    """
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True, cwd=tmp_path
    )  # the checkout has the package without its core
    assert result.stdout.splitlines() == 3 * [
        "no space for the output: 1 bytes missing; 1000000 bytes; 1000001 bytes"
    ], result.stderr
    assert (tmp_path / "out").read_bytes() == b"x" * 1_000_000 and os.listdir(tmp_path) == ["out"]
