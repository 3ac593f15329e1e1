"""What the benchmarks share: whole processes timed from outside, and the page cache counted."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time

MIB = 1 << 20
# The installed command: -m would find the checkout's sources, without their core, in the current folder.
_COMMAND = os.path.join(os.path.dirname(sys.executable), "gguf-surgery")
SURGERY = [_COMMAND] if os.path.exists(_COMMAND) else [sys.executable, "-m", "pygguf_surgery"]


def timed(command: list[str]) -> tuple[float, float]:
    """(wall seconds, peak RSS in MiB) of a command; its failure ends the benchmark with what it said."""
    with tempfile.TemporaryFile() as said:
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command}: exit {process.returncode}\n{said.read().decode(errors='replace')[-2000:]}")
    return seconds, usage.ru_maxrss / 1024


def cached_bytes(path: str, offset: int = 0, length: int = 0) -> int:
    """Bytes of a file's range (to the end if length is 0) in the page cache, by cachestat(2), Linux 6.5 or newer."""
    request = (ctypes.c_uint64 * 2)(offset, length)
    answer = (ctypes.c_uint64 * 5)()
    fd = os.open(path, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(451, fd, request, answer, 0):
            raise OSError(ctypes.get_errno(), "cachestat")
    finally:
        os.close(fd)
    return answer[0] * os.sysconf("SC_PAGESIZE")


def drop_cache(path: str) -> None:
    """Write back and drop the pages of one file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def warm(path: str, length: int) -> None:
    with open(path, "rb", buffering=0) as f:
        while length > 0 and (n := len(f.read(min(length, 8 * MIB)))):
            length -= n


_COMPARE = """
import sys
import pygguf_surgery as pgs
with pgs.open(sys.argv[1]) as a, pgs.open(sys.argv[2]) as b:
    assert sorted(a.tensors) == sorted(b.tensors)
    for name, t in a.tensors.items():
        other = b.tensors[name]
        assert (t.type, t.shape) == (other.type, other.shape), name
        assert (t.bytes() == other.bytes()).all(), f"{name}: bytes differ"
    print(len(a.tensors))
"""


def equal_tensors(ours: str, theirs: str) -> int:
    """How many tensors two files hold, all of the same type, shape and bytes; fails if they are not. In a process of
    its own: a child's peak RSS begins with that of its parent."""
    found = subprocess.run([sys.executable, "-c", _COMPARE, ours, theirs], check=True, capture_output=True, text=True)
    return int(found.stdout)


def show(label: str, seconds: list[float], peak: float) -> None:
    print(
        f"{label:44s} median {statistics.median(seconds):7.2f} s   ({min(seconds):.2f} to {max(seconds):.2f}, "
        f"{len(seconds)} runs)   peak RSS {peak:6.0f} MiB",
        flush=True,
    )
