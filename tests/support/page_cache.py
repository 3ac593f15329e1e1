"""What of a file is in the page cache, asked of the kernel."""

import ctypes
import mmap
import os

import pytest

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def resident(path):
    """One bool per page of the file."""
    size = os.path.getsize(path)
    pages = -(-size // mmap.PAGESIZE)
    fd = os.open(path, os.O_RDONLY)
    try:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        assert address != ctypes.c_void_p(-1).value
        vector = ctypes.create_string_buffer(pages)
        assert _libc.mincore(address, size, vector) == 0
        _libc.munmap(address, size)
    finally:
        os.close(fd)
    return [byte & 1 == 1 for byte in vector.raw]


def warm_only(path, begin, end):
    """Leaves exactly the pages of [begin, end) in the cache; skips the test where that cannot be done."""
    for _ in range(3):  # the kernel may be handling some of its pages
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            os.pread(fd, end - begin, begin)
        finally:
            os.close(fd)
        pages = resident(path)
        if pages == [begin <= i * mmap.PAGESIZE < end for i in range(len(pages))]:
            return
    pytest.skip("the page cache cannot be set here")
