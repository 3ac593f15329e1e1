"""Several outputs of one run: the bytes of single runs, and never a set of names that mixes two sets."""

import errno
import fcntl
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery
from pygguf_surgery import BadPlan, OutOfSpace, SourceChanged, _core
from pygguf_surgery.quant.types import tensor_type
from support import set_child
from support.set_child import HOW, NAMES, content, write_set

PACKAGE = str(Path(pygguf_surgery.__file__).parents[1])  # of an installation, or of a checkout with the core in it
I8, F32, Q8_0 = (tensor_type(name).id for name in ("I8", "F32", "Q8_0"))


def write(folder, tag="new", **how):
    return write_set(folder, NAMES, tag, **how)


def state(folder):
    """What a loader finds: "old", "new", "mix" or None, a set that is not loadable."""
    tags = [(folder / name).read_bytes() if (folder / name).exists() else None for name in NAMES]
    for i, data in enumerate(tags):
        if data is not None:
            tags[i] = data[:3].decode()
            assert data == content(tags[i], i)  # each file is whole
    if tags[0] is None:
        return None
    if set(tags) - {tags[0], None}:
        return "mix"
    return None if None in tags else tags[0]


def strays(folder):
    return sorted(set(os.listdir(folder)) - set(NAMES))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "set"
    path.mkdir()
    return path


@pytest.fixture
def old(folder):
    write(folder, "old")
    assert state(folder) == "old" and not strays(folder)
    return folder


@pytest.fixture(params=["1", "0"], ids=["nameless", "named"])
def temp_kind(request, monkeypatch):
    monkeypatch.setenv("PGS_TMPFILE", request.param)


# --- the bytes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    x = np.random.default_rng(0).standard_normal((400, 256), np.float32)
    path = tmp_path_factory.mktemp("weights") / "in"
    path.write_bytes(x.tobytes())
    return _core.Source(str(path)), x


@given(data=st.data())
def test_the_bytes_are_those_of_single_runs(tmp_path, weights, data):
    """Any jobs in any files, in any order, with gaps; the first file may have no tensors."""
    source, _ = weights
    count = data.draw(st.integers(1, 4))
    ends = data.draw(st.lists(st.integers(1, 9000), min_size=count, max_size=count))  # of the headers, so far
    outputs = [bytes([65 + i]) * n for i, n in enumerate(ends)]
    jobs, alone = [], [[] for _ in range(count)]
    for i in range(data.draw(st.integers(0, 8))):
        file, first, rows = data.draw(st.tuples(st.integers(0, count - 1), st.integers(0, 300), st.integers(1, 100)))
        target = data.draw(st.sampled_from([F32, Q8_0]))
        at = ends[file] + data.draw(st.integers(0, 5000))
        at += -at % 8 if target == Q8_0 else 0
        make = dict(
            source_type=F32,
            target_type=target,
            row_elements=256,
            rows=rows,
            target_offset=at,
            runs=[_core.Run(0, first * 1024, rows * 1024)],
        )
        jobs.append(_core.Job(f"t{i}", **make, file=file))
        alone[file].append(_core.Job(f"t{i}", **make))
        ends[file] = at + jobs[-1].target_bytes
    jobs = data.draw(st.permutations(jobs))
    how = HOW | {
        "threads": data.draw(st.integers(1, 4)),
        "memory": data.draw(st.sampled_from([20, 64])) << 20,
        "io": data.draw(st.sampled_from(["auto", "pread", "direct"])),
        "overwrite": True,
    }
    seen = []
    stats = _core.run(
        [source],
        [(str(tmp_path / f"set{i}"), header, ends[i]) for i, header in enumerate(outputs)],
        jobs,
        **how | {"progress": lambda done, total: seen.append((done, total))},
    )
    assert seen[-1] == (sum(ends), sum(ends)) and stats["bytes_written"] == sum(ends)
    for i, header in enumerate(outputs):
        _core.run([source], [(str(tmp_path / "one"), header, ends[i])], alone[i], **HOW | {"overwrite": True})
        assert (tmp_path / f"set{i}").read_bytes() == (tmp_path / "one").read_bytes()
    assert set(os.listdir(tmp_path)) <= {"one", "set0", "set1", "set2", "set3"}


def test_hundreds_of_shards(folder):
    opened = len(os.listdir("/proc/self/fd"))
    names = [f"{i}.gguf" for i in range(300)]
    for overwrite in (False, True):
        write_set(folder, names, "new", overwrite=overwrite)
        assert sorted(os.listdir(folder)) == sorted(names)
        assert all((folder / name).read_bytes() == content("new", i) for i, name in enumerate(names))
    assert len(os.listdir("/proc/self/fd")) == opened


# --- what is wrong is found before the first byte --------------------------------------------------------------------


def outputs_of(folder, *sizes):
    return [(str(folder / name), b"head", size) for name, size in zip(NAMES, sizes, strict=False)]


def literal(file, at, nbytes=8):
    return _core.Job(
        f"t{file}",
        source_type=I8,
        target_type=I8,
        row_elements=nbytes,
        rows=1,
        target_offset=at,
        literal=bytes(nbytes),
        file=file,
    )


@pytest.mark.parametrize(
    "jobs, sizes, problem",
    [
        ([literal(2, 8)], (20, 20), "no such output file"),
        ([literal(2**32 - 1, 8)], (20, 20), "no such output file"),
        ([literal(1, 8), literal(1, 15)], (20, 40), "overlaps"),
        ([literal(1, 3)], (20, 20), "overlaps"),  # its header
        ([literal(0, 8), literal(1, 13)], (20, 20), "beyond the file"),
        ([literal(1, 2**64 - 9)], (20, 20), "beyond the file"),
        ([], (20, 3), "header reaches beyond"),
        (
            [
                _core.Job(
                    "t", source_type=Q8_0, target_type=F32, row_elements=32, rows=1, target_offset=12, literal=bytes(34)
                )
            ],
            (140,),
            "not aligned",
        ),
        ([], (2**63 - 1, 20), "overflows"),
        ([], (2**64 - 1, 20), "overflows"),
        ([], (), "no output file"),
    ],
)
def test_a_plan_that_contradicts_itself(folder, jobs, sizes, problem):
    with pytest.raises(BadPlan, match=problem):
        _core.run([], outputs_of(folder, *sizes), jobs, **HOW)
    assert os.listdir(folder) == []


def test_the_same_place_in_several_files_is_no_overlap(folder):
    _core.run([], outputs_of(folder, 16, 16, 16), [literal(2, 8), literal(0, 8), literal(1, 4)], **HOW)
    assert (folder / NAMES[1]).read_bytes() == b"head" + bytes(12)


def test_misuse_of_outputs(folder):
    for outputs in ([("x", b"", -1)], [("x", "text", 1)], [("x", b"")], [(None, b"", 0)], "path"):
        with pytest.raises(TypeError):
            _core.run([], outputs, [], **HOW)
    with pytest.raises(TypeError):
        literal(-1, 0)


@pytest.mark.parametrize("way", ["same", "dots", "link to a new file", "link to an old file", "hard link"])
def test_two_outputs_that_are_one_file(folder, way):
    first, second = folder / "a", folder / "b"
    if way in ("link to an old file", "hard link"):
        first.write_bytes(b"precious")
    if way.startswith("link"):
        second.symlink_to("a")
    elif way == "hard link":
        os.link(first, second)
    else:
        second = first if way == "same" else f"{folder}/../{folder.name}/a"
    before = sorted(os.listdir(folder))
    with pytest.raises(BadPlan, match="same file"):
        _core.run([], [(str(first), b"", 0), (str(second), b"", 0)], [], **HOW | {"overwrite": True})
    assert sorted(os.listdir(folder)) == before
    assert not first.exists() or first.read_bytes() == b"precious"


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_output_is_an_input(old, which, overwrite):
    source = _core.Source(str(old / NAMES[which]))
    with pytest.raises(BadPlan, match="one of the inputs"):
        _core.run(
            [source],
            outputs_of(old, 4, 4, 4)[which:] + outputs_of(old, 4, 4, 4)[:which],
            [],
            **HOW | {"overwrite": overwrite},
        )
    assert state(old) == "old" and not strays(old)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_without_overwrite_no_target_may_exist(folder, which, temp_kind):
    (folder / NAMES[which]).write_bytes(b"precious")
    seen = []
    with pytest.raises(FileExistsError) as error:
        write(folder, progress=lambda *args: seen.append(args))
    assert error.value.filename == str(folder / NAMES[which]) and not seen
    assert os.listdir(folder) == [NAMES[which]] and (folder / NAMES[which]).read_bytes() == b"precious"


def test_the_sum_must_fit_the_disk(folder):
    """Each file would fit by itself."""
    fs = os.statvfs(folder)
    size = fs.f_bfree * fs.f_frsize * 2 // 3
    with pytest.raises(OutOfSpace) as error:
        _core.run([], outputs_of(folder, size, 5, size), [], **HOW)
    assert error.value.errno == errno.ENOSPC and error.value.expected == f"{2 * size + 5} bytes"
    missing = int(re.search(r"(\d+) bytes missing", error.value.problem)[1])
    assert missing == 2 * size + 5 - int(error.value.found.split()[0])
    assert os.listdir(folder) == []


def test_a_small_disk(tmp_path):
    """The space of all files is ours before the first byte, so that others cannot take it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        with pytest.raises(OutOfSpace):
            _core.run([], outputs_of(disk, 4 << 20, 4 << 20, 5 << 20), [], **HOW)
        assert os.listdir(disk) == []

        def fill(*_):
            with open(disk / "other", "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(1 << 20))

        _core.run([], outputs_of(disk, 4 << 20, 4 << 20, 3 << 20), [], **HOW | {"progress": fill})
        assert sorted(os.listdir(disk)) == [*NAMES, "other"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_too_many_open_files(old):
    said = subprocess.run(
        [sys.executable, set_child.__file__, "starved", old],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE},
    ).stdout
    assert said.startswith("True ") and "larger shards" in said
    assert state(old) == "old" and not strays(old)


# --- the run stops ---------------------------------------------------------------------------------------------------


def test_an_exception_from_progress_leaves_the_old_set(old, temp_kind):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(old, overwrite=True, progress=stop)
    assert state(old) == "old" and not strays(old)


def test_a_source_that_changes(old, tmp_path, weights):
    path = tmp_path / "in"
    shutil.copy(weights[0].path, path)
    source = _core.Source(str(path))
    nbytes = path.stat().st_size
    job = _core.Job(
        "t",
        source_type=F32,
        target_type=F32,
        row_elements=256,
        rows=400,
        target_offset=4,
        file=2,
        runs=[_core.Run(0, 0, nbytes)],
    )
    with pytest.raises(SourceChanged):
        _core.run(
            [source],
            outputs_of(old, 4, 4, 4 + nbytes),
            [job],
            **HOW | {"overwrite": True, "progress": lambda *_: os.truncate(path, nbytes + 1)},
        )
    assert state(old) == "old" and not strays(old)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [(), (0,), (1, 2), (0, 1, 2)])
def test_overwriting_what_is_there(folder, temp_kind, there):
    write(folder, "old")
    for i in {0, 1, 2} - set(there):
        (folder / NAMES[i]).unlink()
    for i in there:
        (folder / NAMES[i]).chmod(0o640)
    write(folder, overwrite=True)
    assert state(folder) == "new" and not strays(folder)
    assert all(stat.S_IMODE((folder / NAMES[i]).stat().st_mode) == 0o640 for i in there)


def test_a_shard_on_another_disk_by_a_link(old, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    os.rename(old / NAMES[1], away / "real")
    (old / NAMES[1]).symlink_to(away / "real")
    write(old, overwrite=True)
    assert state(old) == "new" and not strays(old)
    assert (old / NAMES[1]).is_symlink() and os.listdir(away) == ["real"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_target_that_appears_meanwhile_is_left_alone(folder, temp_kind, which):
    path = folder / NAMES[which]

    def appear(*_):
        path.write_bytes(b"precious")

    with pytest.raises(FileExistsError):
        write(folder, progress=appear)
    assert os.listdir(folder) == [NAMES[which]] and path.read_bytes() == b"precious"


def test_hidden_old_files_go_when_a_set_is_complete_and_not_before(old):
    """What a killed run has moved aside may be all that is left of the old set."""
    hidden = f".{NAMES[0]}.pgs-old-1-0123456789abcdef"
    os.rename(old / NAMES[0], old / hidden)
    with pytest.raises(FileExistsError):
        write(old)
    with pytest.raises(OutOfSpace):
        _core.run([], outputs_of(old, 1 << 60, 5, 5), [], **HOW | {"overwrite": True})
    _core.run([], outputs_of(old, 4)[:1], [], **HOW)  # a single file of that name
    assert strays(old) == [hidden] and (old / hidden).read_bytes() == content("old", 0)
    write(old, overwrite=True)
    assert state(old) == "new" and not strays(old)


def test_a_run_without_overwrite_removes_nothing(folder):
    hidden = folder / f".{NAMES[0]}.pgs-old-1-0123456789abcdef"
    hidden.write_bytes(b"precious")
    write(folder)
    assert state(folder) == "new" and hidden.read_bytes() == b"precious"


def test_of_sets_at_one_place_each_is_whole(folder):
    """Two writers at once: the names hold the set of one of them."""

    def work(tag):
        for _ in range(15):
            write(folder, tag, overwrite=True)

    threads = [threading.Thread(target=work, args=(tag,)) for tag in ("old", "new")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state(folder) in ("old", "new") and not strays(folder)


def test_names_change_under_a_lock_of_the_folder(old):
    fd = os.open(old, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    thread = threading.Thread(target=write, args=(old,), kwargs={"overwrite": True})
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and state(old) == "old"
    os.close(fd)
    thread.join()
    assert state(old) == "new"


# --- system calls fail, the process dies -----------------------------------------------------------------------------

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
NAMING = ["linkat", "renameat", "renameat2", "unlinkat", "fsync", "fsync of the folder"]


def inject(call, fault, folder):
    """Options of strace. It counts the calls of each thread by itself: here data is synced by the worker, the folder by
    the main thread."""
    only = ["-P", folder] if call.endswith("folder") else []
    call = call.split()[0]
    return [*only, "-e", f"trace={call}", "-e", f"inject={call}:{fault}"]


def traced(folder, overwrite, *options, **environment):
    """Writes "new" under strace: (what the child printed, the trace)."""
    log = folder.parent / "strace.log"
    result = subprocess.run(
        [
            "strace",
            "-f",
            "-qq",
            "-o",
            log,
            *options,
            sys.executable,
            "-S",
            set_child.__file__,
            "once",
            folder,
            str(overwrite),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE, **environment},
    )
    if "ptrace" in result.stderr and "not permitted" in result.stderr:
        pytest.skip("strace may not trace here")
    return result.stdout.strip(), log.read_text()


def start(folder, overwrite):
    """A fresh folder, with an old set if it is to be overwritten."""
    shutil.rmtree(folder)
    folder.mkdir()
    if overwrite:
        write(folder, "old")


@needs_strace
@pytest.mark.parametrize("nameless", ["1", "0"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_order_of_system_calls(folder, overwrite, nameless):
    """All data on the disk, the old first file away, the others, the new first file last; the folder synced between."""
    start(folder, overwrite)
    said, trace = traced(
        folder, overwrite, "-e", "trace=pwritev2,linkat,renameat,renameat2,unlinkat,fsync", PGS_TMPFILE=nameless
    )
    assert said == "ok"
    calls = []
    for line in trace.splitlines():
        if match := re.match(r"\d+ +(\w+)\((.*)", line):
            name, rest = match.groups()
            names = [text for text in re.findall(r'"([^"]*)"', rest) if text in NAMES]
            if "pgs-old" in rest:
                name = "aside" if name.startswith("rename") else "drop"
            elif name in ("linkat", "renameat2"):
                name = "place"
            calls.append((name, NAMES.index(names[0]) if names else None))
    written = max(i for i, (name, _) in enumerate(calls) if name == "pwritev2")
    data_synced = [i for i, (name, _) in enumerate(calls) if name == "fsync"][2]
    sync = ("fsync", None)
    expected = [sync, ("place", 2), ("place", 1), sync, ("place", 0), sync]
    if overwrite:
        expected = [
            ("aside", 0),
            sync,
            ("aside", 2),
            ("place", 2),
            ("aside", 1),
            ("place", 1),
            sync,
            ("place", 0),
            sync,
            *3 * [("drop", None)],
        ]
    assert calls[max(written, data_synced) + 1 :] == expected


@needs_strace
@pytest.mark.parametrize("overwrite, nameless", [(False, "1"), (True, "1"), (True, "0")])
def test_a_kill_between_the_names(folder, overwrite, nameless):
    killed, states = 0, set()
    for call in NAMING:
        for when in range(1, 30):
            start(folder, overwrite)
            _, trace = traced(
                folder, overwrite, *inject(call, f"signal=KILL:when={when}", folder), PGS_TMPFILE=nameless
            )
            if "killed by" not in trace:
                break
            killed += 1
            states.add(check_killed(folder, overwrite))
    assert killed == {(False, "1"): 3 + 6, (True, "1"): 3 + 3 + 3 + 6, (True, "0"): 3 + 3 + 3 + 6}[overwrite, nameless]
    assert states == ({"old", "new", None} if overwrite else {"new", None})


def check_killed(folder, overwrite):
    """The names hold the old set, the new one or none; no old file is lost; the next run takes it from there."""
    found = state(folder)
    assert found != "mix"
    hidden = strays(folder)
    assert all(re.fullmatch(r"\.m-0000[123]-of-00003\.gguf\.pgs-(tmp|old)-\d+-[0-9a-f]{16}", name) for name in hidden)
    if overwrite and found is None:
        everything = [(folder / name).read_bytes() for name in os.listdir(folder)]
        assert all(content("old", i) in everything for i in range(3))
    write(folder, overwrite=True)
    assert state(folder) == "new" and not strays(folder)
    return found


# The n-th link gives shard 3, 2, 1 its name; renames move the old shards 1, 3, 2 aside.
@needs_strace
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "call, when",
    [
        ("linkat", 1),
        ("linkat", 2),
        ("linkat", 3),
        ("renameat", 1),
        ("renameat", 2),
        ("renameat", 3),
        ("fsync", 1),
        ("fsync", 3),
        ("fsync of the folder", 1),
        ("flock", 1),
    ],
)
def test_an_error_takes_everything_back(folder, overwrite, call, when):
    start(folder, overwrite)
    said, trace = traced(folder, overwrite, *inject(call, f"error=EIO:when={when}", folder))
    if call == "flock" or (call == "renameat" and not overwrite):  # a file system without locks; no old files
        assert said == "ok" and state(folder) == "new"
    else:
        assert "INJECTED" in trace and said.startswith("OSError") and "kept" not in said
        assert state(folder) == ("old" if overwrite else None)
        assert overwrite or os.listdir(folder) == []
    assert not strays(folder)


@needs_strace
def test_what_is_taken_back_is_on_the_disk_before_the_first_file_returns(old):
    """Else a power cut could leave the old first file with new others."""
    said, trace = traced(
        old, True, "-e", "trace=linkat,renameat,renameat2,unlinkat,fsync", "-e", "inject=linkat:error=EIO:when=2"
    )
    assert said.startswith("OSError") and state(old) == "old"
    calls = [line for line in trace.splitlines() if re.search(r"fsync|m-0000", line)]
    assert "renameat2" in calls[-1] and NAMES[0] in calls[-1] and "fsync" in calls[-2]
    assert any("renameat2" in line and NAMES[2] in line for line in calls[:-2])


@needs_strace
def test_an_old_file_that_another_run_has_just_moved_aside(old):
    """Found, and gone when its permission is asked for."""
    said, trace = traced(old, True, *inject_anywhere("faccessat2", "error=ENOENT:when=1", old))
    assert "INJECTED" in trace and said == "ok" and state(old) == "new" and not strays(old)


@pytest.mark.campaign
def test_a_lock_of_the_folder_that_stays(old):
    """An error before the work, not after it; the run waits half a minute for other runs."""
    fd, seen = os.open(old, os.O_RDONLY), []
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(BlockingIOError, match="keeps it locked"):
        write(old, overwrite=True, progress=lambda *args: seen.append(args))
    os.close(fd)
    assert not seen and state(old) == "old" and not strays(old)


@needs_strace
def test_a_failed_sync_after_the_last_name_keeps_the_old_files(old):
    said, trace = traced(old, True, *inject("fsync of the folder", "error=EIO:when=3", old))
    assert "INJECTED" in trace and said.startswith("OSError") and state(old) == "new"
    assert all(name in said and ".pgs-old-" in name for name in strays(old)) and len(strays(old)) == 3
    write(old, overwrite=True)
    assert not strays(old)


@needs_strace
@pytest.mark.parametrize("fails", ["renameat2", "unlinkat"])
def test_what_cannot_be_undone_is_named(old, fails):
    """The second shard cannot be placed, and then the third not be put back: the first stays away."""
    said, trace = traced(
        old,
        True,
        "-e",
        f"trace=linkat,{fails}",
        "-e",
        "inject=linkat:error=EIO:when=2",
        "-e",
        f"inject={fails}:error=EIO",
    )
    assert trace.count("INJECTED") >= 2 and said.startswith("OSError")
    assert state(old) is None and not (old / NAMES[0]).exists()
    hidden = [name for name in strays(old) if ".pgs-old-" in name]
    assert hidden and all(f"{old}/{name}" in said for name in hidden)
    found = [(old / name).read_bytes() for name in os.listdir(old)]
    assert all(content("old", i) in found for i in range(3))


def inject_anywhere(call, fault, folder):
    """Calls that Python makes too: those on the folder and its files."""
    files = (folder, *(folder / name for name in NAMES))
    only = [option for path in files for option in ("-P", path)] if call in SHARED else []
    return [*only, *inject(call, fault, folder)]


OURS = ["flock", "fallocate", "preadv2", "pwritev2", "sync_file_range", "fchown", "fchmod", *NAMING]
SHARED = ["openat", "newfstatat", "fcntl", "fstatfs", "fadvise64", "faccessat2", "getdents64", "close"]


@pytest.mark.campaign
@needs_strace
@pytest.mark.parametrize("nameless", ["1", "0"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", OURS + SHARED)
def test_a_kill_at_every_system_call(folder, call, overwrite, nameless):
    """The n-th call, for every n."""
    for when in range(1, 1000):
        start(folder, overwrite)
        _, trace = traced(
            folder, overwrite, *inject_anywhere(call, f"signal=KILL:when={when}", folder), PGS_TMPFILE=nameless
        )
        if "killed by" not in trace:
            break
        check_killed(folder, overwrite)


@pytest.mark.campaign
@needs_strace
@pytest.mark.parametrize("nameless", ["1", "0"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", OURS + SHARED)
@pytest.mark.parametrize("fault", ["error=EIO", "error=ENOMEM", "error=EROFS"])
def test_an_error_of_every_system_call(folder, call, fault, overwrite, nameless):
    for when in range(1, 1000):
        start(folder, overwrite)
        said, trace = traced(
            folder, overwrite, *inject_anywhere(call, f"{fault}:when={when}", folder), PGS_TMPFILE=nameless
        )
        if "INJECTED" not in trace:
            break
        found = state(folder)
        if said == "ok":
            assert found == "new"
        elif call == "fsync of the folder":  # the last one comes after the last name
            assert found in ("old" if overwrite else None, "new")
        else:
            assert found == ("old" if overwrite else None)
        if call not in ("unlinkat", "fsync of the folder"):  # without the first nothing can be removed
            assert not strays(folder) and (found or not os.listdir(folder))
