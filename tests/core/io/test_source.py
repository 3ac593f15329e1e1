"""Source: every way to read gives the same bytes, sees a file that changes, and leaves the page cache as it was."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pygguf_surgery import BadFile, BadPlan, SourceChanged
from pygguf_surgery._core import Source
from support.page_cache import resident, warm_only

MODES = ["auto", "pread", "direct", "mmap"]
PAGE = os.sysconf("SC_PAGESIZE")


@pytest.fixture(params=["1", "0"], ids=["dontcache", "advice"], autouse=True)
def dontcache(request, monkeypatch):
    monkeypatch.setenv("PGS_DONTCACHE", request.param)


def random_file(path, size, seed=0):
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    return path


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    return random_file(tmp_path_factory.mktemp("source") / "big", 3 * 1024 * 1024 + 1234)


@pytest.mark.parametrize("io", MODES)
@given(data=st.data())
def test_any_range_is_what_python_reads(big, io, data):
    size = big.stat().st_size
    # Around page boundaries and the bounce buffer of 1 MiB is where reading in pieces can go wrong.
    near = st.one_of(
        st.integers(0, size),
        st.builds(
            lambda page, delta: min(max(page * PAGE + delta, 0), size), st.integers(0, size // PAGE), st.integers(-2, 2)
        ),
    )
    begin, end = sorted((data.draw(near), data.draw(near)))
    source = Source(str(big), io)
    expected = big.read_bytes()[begin:end]
    assert source.read(begin, end - begin).tobytes() == expected
    view = source.view(begin, end - begin)
    assert view.tobytes() == expected and not view.flags.writeable


@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 1 << 20, (1 << 20) + 1])
def test_whole_files_of_awkward_sizes(tmp_path, io, size):
    path = random_file(tmp_path / "file", size)
    source = Source(str(path), io)
    assert source.size == size
    assert source.read(0, size).tobytes() == path.read_bytes() == source.view(0, size).tobytes()
    assert source.read(size, 0).size == 0


@pytest.mark.parametrize("io", MODES)
@pytest.mark.parametrize(
    "offset, nbytes",
    [(0, 101), (100, 1), (101, 0), (99, 2), (1, 2**64 - 1), (2**64 - 1, 1), (2**63, 2**63), (0, 2**63)],
)
def test_a_range_beyond_the_end_is_an_error(tmp_path, io, offset, nbytes):
    source = Source(str(random_file(tmp_path / "file", 100)), io)
    for action in (source.read, source.view):
        with pytest.raises(BadFile) as error:
            action(offset, nbytes)
        assert error.value.offset == offset and error.value.path == str(tmp_path / "file")


@pytest.mark.parametrize("io", MODES)
def test_truncation_after_opening_is_an_error_not_a_crash(tmp_path, io):
    path = random_file(tmp_path / "file", 3 * PAGE + 10)
    source = Source(str(path), io)
    os.truncate(path, PAGE + 10)
    with pytest.raises(SourceChanged) as error:
        source.read(PAGE, 2 * PAGE)
    assert (error.value.problem, error.value.found, error.value.expected) == (
        "truncated",
        f"{PAGE + 10} bytes",
        f"{3 * PAGE + 10} bytes",
    )


def test_check_unchanged_says_what_changed(tmp_path):
    def changed(change):
        path = random_file(tmp_path / "file", 1000)
        source = Source(str(path))
        source.check_unchanged()
        change(path)
        with pytest.raises(SourceChanged) as error:
            source.check_unchanged()
        assert error.value.path == str(path)
        return error.value.problem

    assert changed(lambda path: os.truncate(path, 10)) == "truncated"
    assert changed(lambda path: os.truncate(path, 1001)) == "grown"
    assert changed(lambda path: os.utime(path, ns=(5, 5))) == "modified"
    assert changed(lambda path: os.replace(random_file(path.with_name("new"), 1000), path)).startswith("replaced")
    assert changed(os.unlink) == "gone"


def test_a_view_of_a_changed_file_is_refused(tmp_path):
    path = random_file(tmp_path / "file", 1000)
    source = Source(str(path))
    os.truncate(path, 10)
    with pytest.raises(SourceChanged):
        source.view(0, 1000)


def test_identity_is_what_stat_says(tmp_path):
    path = random_file(tmp_path / "file", 1000)
    stat = path.stat()
    assert Source(str(path)).identity == (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@pytest.mark.parametrize("io", MODES)
def test_only_regular_files(tmp_path, monkeypatch, io):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the address of a socket is short
        server.bind("socket")
        for name, word in (("fifo", "FIFO"), ("socket", "socket"), ("", "directory")):
            with pytest.raises(BadFile, match=word):
                Source(str(tmp_path / name), io)
    with pytest.raises(BadFile, match="device"):
        Source("/dev/null", io)
    with pytest.raises(FileNotFoundError) as error:
        Source(str(tmp_path / "missing"), io)
    assert error.value.filename == str(tmp_path / "missing")


def test_an_unknown_way_to_read_is_an_error(big):
    with pytest.raises(BadPlan, match="auto, mmap, pread or direct"):
        Source(str(big), "fast")


def test_closing(big):
    source = Source(str(big))
    view = source.view(10, 100)
    source.close()
    source.close()
    assert view.tobytes() == big.read_bytes()[10:110]
    for action in (lambda: source.read(0, 1), lambda: source.view(0, 1), source.check_unchanged):
        with pytest.raises(ValueError):
            action()


def test_a_name_that_is_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.gguf"
    with open(name, "wb") as file:
        file.write(b"abc")
    source = Source(os.fsdecode(name))
    assert source.read(0, 3).tobytes() == b"abc"
    assert os.fsencode(source.path) == name


def is_as_before(path, before):
    """Nearly: the kernel may refuse to drop a page that it is just handling."""
    after = resident(path)
    return (
        sum(was and now for was, now in zip(before, after, strict=True)) >= sum(before) // 2
        and sum(now and not was for was, now in zip(before, after, strict=True)) <= len(before) // 20
    )


def in_one_of_three_tries(check):
    """The kernel reclaims pages by itself when others need memory."""
    return any(check() for _ in range(3))


@pytest.mark.parametrize("io", MODES)
@settings(max_examples=10)
@given(data=st.data())
def test_reading_leaves_the_page_cache_as_it_was(big, io, data):
    size = big.stat().st_size
    pages = size // PAGE
    first = data.draw(st.integers(0, pages - 1))
    last = data.draw(st.integers(first, min(first + 256, pages)))
    step = data.draw(st.sampled_from([5000, 64 * 1024 + 1, 1 << 20, size]))

    def leaves_it():
        warm_only(big, first * PAGE, last * PAGE)
        before = resident(big)
        source = Source(str(big), io)
        for offset in range(0, size, step):
            source.read(offset, min(step, size - offset))
        source.close()
        return is_as_before(big, before)

    assert in_one_of_three_tries(leaves_it)


@pytest.mark.parametrize("io", MODES)
def test_threads_that_read_leave_the_page_cache_as_it_was(tmp_path, io):
    path = random_file(tmp_path / "file", 100 << 20)
    step = (1 << 20) + 32

    def leave_it():
        warm_only(path, 10 << 20, 50 << 20)
        before = resident(path)
        source = Source(str(path), io)
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(
                lambda offset: len(source.read(offset, min(step, source.size - offset))), range(0, source.size, step)
            ):
                pass
        assert sum(resident(path)) - sum(before) <= (64 << 20) // PAGE
        source.close()
        return is_as_before(path, before)

    assert in_one_of_three_tries(leave_it)
