"""Whatever happens to a run, the output path holds the old file or the new one, whole, and nothing is beside it."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

import pygguf_surgery as pgs
from support import io_child
from support.gguf_files import make_gguf

U32 = gguf.GGUFValueType.UINT32
CHILD = io_child.__file__


def make_model(path, rows):
    """A model that llama.cpp's rules accept, with three tensors of rows x 256 float32."""
    rng = np.random.default_rng(0)
    keys = dict(block_count=1, context_length=64, embedding_length=256, feed_forward_length=256)
    keys["attention.head_count"] = 1
    return make_gguf(
        path,
        "llama",
        {f"llama.{key}": (value, U32) for key, value in keys.items()},
        {
            f"blk.0.ffn_{name}.weight": rng.standard_normal((rows, 256), dtype=np.float32)
            for name in ("up", "gate", "down")
        },
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("small") / "in.gguf", 1000)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """12.6 MB: its encoding by one thread takes long enough to interfere with."""
    return make_model(tmp_path_factory.mktemp("large") / "in.gguf", 4096)


class Place:
    """A folder with an old output in it."""

    def __init__(self, folder, source):
        folder.mkdir()
        self.folder, self.path, self.source = folder, folder / "out.gguf", source
        self.contents = {}
        with pgs.open(source) as model:
            for name in ("new", "old"):
                io_child.plan(model, name).write(self.path, overwrite=name == "old")
                self.contents[name] = self.path.read_bytes()
        assert self.holds("old")

    def holds(self, *names):
        return self.path.read_bytes() in [self.contents[name] for name in names] and not self.strays()

    def strays(self):
        return [name for name in os.listdir(self.folder) if name != "out.gguf"]


@pytest.fixture
def place(tmp_path, small):
    return Place(tmp_path / "folder", small)


def python(*args, **options):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, check=True, **options)


# --- the process dies ------------------------------------------------------------------------------------------------


def kill_at_random(place, times, nameless, *, until_it_lands=False):
    """until_it_lands: more times if need be, until a run was killed that had begun to write."""
    rng = random.Random(times)
    done = landed = 0
    with subprocess.Popen(
        [sys.executable, CHILD, "loop", place.source, place.path],
        stdin=subprocess.PIPE,
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PGS_TMPFILE": nameless},
    ) as server:
        while done < times or (until_it_lands and not landed and done < 100 * times):
            done += 1
            print("go", file=server.stdin, flush=True)
            pid = int(server.stdout.readline())
            time.sleep(rng.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            assert int(server.stdout.readline()) == -signal.SIGKILL
            assert place.path.read_bytes() in place.contents.values()
            strays = place.strays()
            assert len(strays) <= 1 and all(name.startswith(".out.gguf.pgs-tmp-") for name in strays)
            landed += bool(strays)
        server.stdin.close()
    with pgs.open(place.source) as model:
        io_child.plan(model, "new").write(place.path, overwrite=True)
    assert place.holds("new")
    return landed


def test_kill_9_at_random_100_times(place):
    kill_at_random(place, 100, nameless="1")


def test_kill_9_at_random_without_o_tmpfile(place):
    assert kill_at_random(place, 30, nameless="0", until_it_lands=True) > 0


@pytest.mark.campaign
@pytest.mark.parametrize("nameless", ["1", "0"])
def test_kill_9_at_random_1000_times(place, nameless):
    kill_at_random(place, 1000, nameless)


# --- system calls fail -----------------------------------------------------------------------------------------------

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def traced(place, *options, **environment):
    """Runs one write of "new" under strace: (what the child printed, the trace)."""
    log = place.folder.parent / "strace.log"
    result = subprocess.run(
        ["strace", "-f", "-qq", "-o", log, *options, sys.executable, CHILD, "once", place.source, place.path],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if "ptrace" in result.stderr and "not permitted" in result.stderr:
        pytest.skip("strace may not trace here")
    return result.stdout.strip(), log.read_text()


# A failed fsync of the folder comes after the new file is in place, so it is an error and the new file is whole.
FAILURES = [("fallocate", 1), ("pwritev2", 1), ("fsync", 1), ("linkat", 1), ("renameat", 1), ("fsync", 2)]


@needs_strace
@pytest.mark.parametrize("errno", ["EIO", "ENOSPC", "EINTR"])
@pytest.mark.parametrize("call, when", FAILURES)
def test_a_failing_system_call(place, call, when, errno):
    said, trace = traced(place, "-e", f"trace={call}", "-e", f"inject={call}:error={errno}:when={when}")
    assert "INJECTED" in trace
    repeated = errno == "EINTR" and call in ("fallocate", "pwritev2")
    errors = {"EIO": "OSError", "ENOSPC": "OutOfSpace", "EINTR": "InterruptedError"}
    assert said == ("ok" if repeated else errors[errno])
    assert place.holds("new" if repeated or when == 2 else "old")


@needs_strace
@pytest.mark.parametrize("nameless", ["1", "0"])
@pytest.mark.parametrize(
    "io, call",
    [
        ("pread", "pwritev2"),
        ("pread", "sync_file_range"),
        ("pread", "preadv2"),
        ("direct", "pwritev2"),
        ("direct", "pread64"),
        ("direct", "renameat"),
    ],
)
def test_an_io_error_without_dontcache(place, io, call, nameless):
    only = ["-P", place.source] if call == "pread64" else []  # the program loader uses it too
    said, trace = traced(
        place,
        *only,
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:error=EIO:when=1",
        PGS_DONTCACHE="0",
        PGS_TMPFILE=nameless,
        TEST_IO=io,
    )
    assert "INJECTED" in trace
    assert said == "OSError" and place.holds("old")


@needs_strace
@pytest.mark.parametrize("nameless", ["1", "0"])
@pytest.mark.parametrize("exists", [True, False])
def test_the_order_of_system_calls(place, nameless, exists):
    """Write, fsync the file once, give it its name, fsync the folder: nothing else survives a power cut."""
    if not exists:
        place.path.unlink()
    said, trace = traced(place, "-e", "trace=pwritev2,fsync,linkat,renameat,renameat2", PGS_TMPFILE=nameless)
    assert said == "ok"
    calls = [
        re.match(r"\d+ +(\w+)\((\w+)", line).groups()
        for line in trace.splitlines()
        if "resumed" not in line and "+++" not in line
    ]
    names = [name for name, _ in calls]
    written = len(names) - names[::-1].index("pwritev2")
    assert set(names[:written]) == {"pwritev2"}
    place_it = {
        (True, "1"): ["linkat", "renameat"],
        (True, "0"): ["renameat"],
        (False, "1"): ["linkat"],
        (False, "0"): ["renameat2"],
    }[exists, nameless]
    assert names[written:] == ["fsync", *place_it, "fsync"]
    file, folder = calls[written][1], calls[-1][1]
    assert {fd for _, fd in calls[:written]} == {file} != {folder}


# Calls that only the core makes, and calls that Python makes too: of these, the ones on the output and its folder.
OURS = [
    "fallocate",
    "flock",
    "fchown",
    "fchmod",
    "preadv2",
    "pwritev2",
    "sync_file_range",
    "fsync",
    "linkat",
    "renameat",
]
SHARED = ["openat", "newfstatat", "fcntl", "unlinkat", "close", "fstatfs", "faccessat2"]


@pytest.mark.campaign
@needs_strace
@pytest.mark.parametrize("nameless", ["1", "0"])
@pytest.mark.parametrize("call", OURS + SHARED)
@pytest.mark.parametrize("fault", ["signal=KILL", "error=EIO", "error=ENOMEM", "error=EROFS", "error=EDQUOT"])
def test_every_system_call(place, call, fault, nameless):
    """The n-th call, for every n."""
    only = ["-P", place.folder, "-P", place.path] if call in SHARED else []
    for when in range(1, 1000):
        _, trace = traced(
            place, *only, "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}", PGS_TMPFILE=nameless
        )
        assert place.path.read_bytes() in place.contents.values()
        if "KILL" in fault:
            assert len(place.strays()) <= 1
        elif call != "unlinkat":  # without it nothing can be removed
            assert not place.strays()
        if "INJECTED" not in trace and "killed by" not in trace:
            break
    with pgs.open(place.source) as model:
        io_child.plan(model, "old").write(place.path, overwrite=True)
    assert place.holds("old")


SHIM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
static int hits;
__attribute__((destructor)) static void report(void) { fprintf(stderr, "hits %d\n", hits); }
static size_t cut(size_t n) {
    const char *most = getenv("SHORT");
    if (!most || n <= (size_t)atol(most)) return n;
    __atomic_add_fetch(&hits, 1, __ATOMIC_RELAXED);
    return (size_t)atol(most);
}
ssize_t preadv2(int fd, const struct iovec *v, int n, off_t at, int flags) {
    struct iovec one = {v->iov_base, cut(v->iov_len)};
    return syscall(SYS_preadv2, fd, &one, 1, at, 0, flags);
}
ssize_t pwritev2(int fd, const struct iovec *v, int n, off_t at, int flags) {
    struct iovec one = {v->iov_base, cut(v->iov_len)};
    return syscall(SYS_pwritev2, fd, &one, 1, at, 0, flags);
}
ssize_t pread(int fd, void *data, size_t n, off_t at) { return syscall(SYS_pread64, fd, data, cut(n), at); }
int posix_memalign(void **p, size_t alignment, size_t n) {
    static int calls;
    const char *failing = getenv("NO_MEMORY");
    if (failing && ++calls == atoi(failing)) return ++hits, ENOMEM;
    *p = aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment);
    return *p ? 0 : ENOMEM;
}
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """A library to preload, which shortens reads and writes (SHORT=bytes) or lacks memory (NO_MEMORY=the n-th time)."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, "-x", "c", "-"], input=SHIM, text=True, check=True)
    return library


def preloaded(place, shim, **environment):
    """(what the child printed, how often the shim acted)"""
    result = python(CHILD, "once", place.source, place.path, env={**os.environ, "LD_PRELOAD": str(shim), **environment})
    return result.stdout.strip(), int(re.search(r"hits (\d+)", result.stderr)[1])


@pytest.mark.parametrize("io", ["auto", "pread", "direct"])
@pytest.mark.parametrize("most", ["8192", "10001"])  # O_DIRECT refuses the second
def test_short_reads_and_writes(place, shim, io, most):
    said, hits = preloaded(place, shim, SHORT=most, TEST_IO=io)
    assert said == "ok" and place.holds("new")
    assert hits > (100 if io != "direct" or most == "8192" else 1)


@pytest.mark.parametrize("when", [1, 2, 3])
def test_no_memory(place, shim, when):
    said, hits = preloaded(place, shim, NO_MEMORY=str(when), TEST_IO="direct")
    assert (said, hits) == ("MemoryError", 1)
    assert place.holds("old")


def test_a_storm_of_signals(place):
    """A host with a timer: its handler runs, and no system call takes the interruption for an error."""
    calls = []
    before = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        with pgs.open(place.source) as model:
            for name in 5 * ["old", "new"]:
                io_child.plan(model, name).write(place.path, overwrite=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls and place.holds("new")


# --- no space, no permission -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_of_12_mb(tiny_disk, large):
    output = tiny_disk / "out.gguf"
    output.write_bytes(b"old")
    seen = []
    with pgs.open(large) as model:
        with pytest.raises(pgs.OutOfSpace) as error:
            pgs.Plan(model).write(output, overwrite=True, progress=lambda *args: seen.append(args))
        assert output.read_bytes() == b"old" and os.listdir(tiny_disk) == ["out.gguf"]
        found, expected = int(error.value.found.split()[0]), int(error.value.expected.split()[0])
        assert 11 << 20 < found < 12 << 20 and expected == large.stat().st_size
        assert f"{expected - found} bytes missing" in str(error.value)
        assert seen == []
        pgs.Plan(model).quantize("IQ3_S", pure=True).write(output, overwrite=True)  # 3.5 MB
    assert os.listdir(tiny_disk) == ["out.gguf"]


def test_a_disk_that_others_fill_meanwhile(tiny_disk, large):
    """The space is ours from the start."""

    def fill(*_):
        with open(tiny_disk / "other", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 20))

    with pgs.open(large) as model:
        pgs.Plan(model).quantize("Q4_K", pure=True).write(tiny_disk / "out.gguf", threads=1, progress=fill)
        with pytest.raises(pgs.OutOfSpace):
            pgs.Plan(model).quantize("Q4_K", pure=True).write(tiny_disk / "out2.gguf")
    assert sorted(os.listdir(tiny_disk)) == ["other", "out.gguf"]


def test_rlimit_fsize(place):
    limit = len(place.contents["old"]) - 1

    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert python(CHILD, "once", place.source, place.path, preexec_fn=restrict).stdout == "OutOfSpace\n"
    assert place.holds("old")


def test_a_missing_folder(tmp_path, small):
    with pgs.open(small) as model, pytest.raises(FileNotFoundError, match="folder"):
        pgs.Plan(model).write(tmp_path / "missing" / "out.gguf")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("protected, mode", [("folder", 0o555), ("file", 0o444)])
def test_no_permission(place, protected, mode):
    code = """if True:
        import os, sys
        import pygguf_surgery as pgs
        plan = pgs.Plan(pgs.open("/proc/self/cwd/in.gguf"))
        plan.write("warm.gguf")  # imports everything: root's modules may be closed to others
        os.unlink("warm.gguf")
        os.chmod(*eval(sys.argv[1]))
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            plan.write("out.gguf", overwrite=True)
        except PermissionError as error:
            print(error.filename)
    """
    shutil.copy(place.source, place.folder / "in.gguf")
    place.folder.chmod(0o777)
    # Names from the current folder on: those above it are pytest's and closed to others.
    result = python("-c", code, ("." if protected == "folder" else "out.gguf", mode), cwd=place.folder)
    place.folder.chmod(0o777)
    (place.folder / "in.gguf").unlink()
    assert result.stdout == "out.gguf\n"
    assert place.holds("old")


# --- the input -------------------------------------------------------------------------------------------------------


def old_copy(path, target):
    """A change shows in the time of the last one only if the clock of the file system ticked in between."""
    shutil.copy(path, target)
    os.utime(target, (1e9, 1e9))


def change_during_run(tmp_path, large, change, at_end, io):
    """Writes while `change` happens to a copy of the source; returns the error."""
    source = tmp_path / "source.gguf"
    old_copy(large, source)
    output = tmp_path / "out.gguf"
    output.write_bytes(b"old")
    moments = []

    def progress(done, total):
        if not moments and (not at_end or done == total):
            moments.append(done / total)
            change(source)

    with pgs.open(source) as model, pytest.raises(pgs.SourceChanged) as error:
        pgs.Plan(model).quantize("IQ3_S", pure=True).write(output, overwrite=True, threads=1, io=io, progress=progress)
    assert moments and (at_end or moments[0] < 1)
    assert output.read_bytes() == b"old"
    assert set(os.listdir(tmp_path)) <= {"out.gguf", "source.gguf"}
    assert error.value.path == str(source)
    return error.value.problem


def rewrite(path):
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")


def replace(path):
    other = path.with_name("other")
    shutil.copy(path, other)
    os.replace(other, path)


CHANGES = {
    "truncated": lambda path: os.truncate(path, 10_000_000),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
    "modified": rewrite,
    "replaced by another file": replace,
    "gone": os.unlink,
}


@pytest.mark.parametrize("at_end", [False, True], ids=["midway", "after the last byte"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_source_that_changes_during_the_run(tmp_path, large, what, at_end):
    assert change_during_run(tmp_path, large, CHANGES[what], at_end, "auto") == what


@pytest.mark.parametrize("io", ["pread", "direct"])  # not mmap: SIGBUS, as its documentation says
def test_a_source_that_is_truncated_during_the_run(tmp_path, large, io):
    assert change_during_run(tmp_path, large, CHANGES["truncated"], False, io) == "truncated"


@pytest.mark.parametrize("what", CHANGES)
def test_a_source_that_changes_between_opening_and_writing(tmp_path, small, what):
    source = tmp_path / "source.gguf"
    old_copy(small, source)
    with pgs.open(source) as model:
        CHANGES[what](source) if what != "truncated" else os.truncate(source, 10_000)
        with pytest.raises((pgs.SourceChanged, FileNotFoundError)):
            pgs.Plan(model).write(tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("way", ["same path", "hard link", "symbolic link"])
def test_the_output_is_the_input(tmp_path, small, way):
    source = tmp_path / "in.gguf"
    shutil.copy(small, source)
    output = tmp_path / "other.gguf"
    if way == "same path":
        output = source
    elif way == "hard link":
        os.link(source, output)
    else:
        output.symlink_to(source)
    before = sorted(os.listdir(tmp_path))
    with pgs.open(source) as model:
        for overwrite in (False, True):
            with pytest.raises(pgs.BadPlan, match="input"):
                pgs.Plan(model).write(output, overwrite=overwrite)
    assert source.read_bytes() == Path(small).read_bytes()
    assert sorted(os.listdir(tmp_path)) == before


# --- the caller stops it ---------------------------------------------------------------------------------------------


def test_ctrl_c(tmp_path, large):
    output = tmp_path / "out.gguf"
    output.write_bytes(b"old")
    with subprocess.Popen(
        [sys.executable, CHILD, "slow", large, output], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline()
        child.send_signal(signal.SIGINT)
        seen, errors = child.communicate(timeout=60)
    assert "100%" not in seen  # it stopped at once
    assert child.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
    assert output.read_bytes() == b"old" and os.listdir(tmp_path) == ["out.gguf"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_from_progress(place, error):
    def progress(done, total):
        raise error("stop")

    with pgs.open(place.source) as model, pytest.raises(error, match="stop"):
        io_child.plan(model, "new").write(place.path, overwrite=True, progress=progress)
    assert place.holds("old")


def test_an_existing_output_without_overwrite(place):
    with pgs.open(place.source) as model, pytest.raises(FileExistsError):
        io_child.plan(model, "new").write(place.path)
    assert place.holds("old")
