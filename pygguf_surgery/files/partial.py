"""A file that several runs write, part after part: what is finished outlives a run that is stopped or killed.

It grows beside its place as NAME.partial, laid out as it will be. Its last bytes are the journal, a pair of float64 for
each part, NaN until the part is on the disk. Its first four bytes say that it is not finished.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from ..base.errors import BadPlan, OutOfSpace

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_UNFINISHED = b"pgs\0"  # in the place of "GGUF"
_PAIR = 16
_PATIENCE = 2.0  # seconds, in which a process that was killed with the run before lets go of it


def partial_path(path: str | os.PathLike[str]) -> str:
    return os.path.realpath(os.fsdecode(path)) + ".partial"


class Partial:
    """The file in the making for `path`. A context manager: on the way out it is kept if a part of it is finished.

    header: the first bytes of the file, which say all that its content depends on: what an earlier run left is gone on
    with if its header is the same. BadPlan for another one's, unless `overwrite`, for a file that is none, and while
    another process writes it. OutOfSpace before the first byte.
    """

    def __init__(self, path: str | os.PathLike[str], header: bytes, size: int, parts: int, *, overwrite: bool = False):
        self.target, self.path = os.path.realpath(os.fsdecode(path)), partial_path(path)
        self._header, self._size, self._overwrite = header, size, overwrite
        self._journal = size - parts * _PAIR
        self._file = self._open()
        try:
            if not self._goes_on():
                self._begin(parts)
        except BaseException:
            os.close(self._file)
            raise

    def _open(self) -> int:
        start = time.monotonic()
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(self.path)):  # or another run has finished it meanwhile
                    if os.fstat(file).st_nlink == 1:
                        return file
                    os.unlink(self.path)  # a run was killed as it gave the finished file its name
            except FileNotFoundError:
                pass
            except BlockingIOError:
                if time.monotonic() - start > _PATIENCE:
                    os.close(file)
                    raise BadPlan("another run is writing it", path=self.path) from None
                time.sleep(0.02)
            except BaseException:
                os.close(file)
                raise
            os.close(file)

    def _goes_on(self) -> bool:
        """Whether the file holds parts of this very one. BadPlan if it is something else that must not be lost."""
        found = os.fstat(self._file).st_size
        if not found:
            return False
        start = os.pread(self._file, len(self._header), 0)
        if start[4:] == self._header[4:] and start[:4] in (_UNFINISHED, self._header[:4]) and found == self._size:
            return True
        if not start.startswith(_UNFINISHED):
            raise BadPlan("something else is in the place of the unfinished file", path=self.path, hint="move it away")
        if not self._overwrite and any(start[4:]):  # or it was killed before it began
            raise BadPlan(
                "an unfinished file of another run", path=self.path, hint="overwrite=True (--force) replaces it"
            )
        return False

    def _begin(self, parts: int) -> None:
        import numpy as np

        os.ftruncate(self._file, 0)
        self._pwrite(_UNFINISHED, 0)
        try:
            os.posix_fallocate(self._file, 0, self._size)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                os.ftruncate(self._file, self._size)
            else:
                os.unlink(self.path)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                free = os.statvfs(os.path.dirname(self.path))
                raise OutOfSpace(
                    "not enough space",
                    errno=error.errno,
                    path=self.path,
                    found=f"{free.f_bavail * free.f_frsize} bytes",
                    expected=f"{self._size} bytes",
                ) from None
        self._pwrite(np.full((parts, 2), np.nan), self._journal)
        self._pwrite(self._header[4:], 4)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            if not self.finished():
                with suppress(OSError):
                    os.unlink(self.path)
            os.close(self._file)
            self._file = -1

    def journal(self) -> NDArray[np.float64]:
        """[parts, 2]: NaN for those that are not finished."""
        import numpy as np

        return np.frombuffer(os.pread(self._file, self._size - self._journal, self._journal), "<f8").reshape(-1, 2)

    def finished(self) -> list[int]:
        import numpy as np

        return [int(i) for i in np.flatnonzero(~np.isnan(self.journal()).any(axis=1))]

    def write(self, offset: int, data: NDArray[np.generic]) -> None:
        """A piece of a part."""
        self._pwrite(data, offset)

    def finish(self, part: int, pair: tuple[float, float]) -> None:
        """The part is written; from now on it is kept."""
        import numpy as np

        os.fdatasync(self._file)
        self._pwrite(np.array(pair, "<f8"), self._journal + part * _PAIR)
        os.fdatasync(self._file)

    def complete(self) -> None:
        """Gives the file its name; at every instant there is the old file, or the new one. FileExistsError where one
        has come there meanwhile, unless it is to be replaced."""
        self._pwrite(self._header[:4], 0)
        if self._overwrite:
            with suppress(FileNotFoundError):
                os.fchmod(self._file, os.stat(self.target).st_mode & 0o7777)
        os.fsync(self._file)
        if self._overwrite:
            os.rename(self.path, self.target)
        else:
            self._link()
        os.close(self._file)
        self._file = -1
        folder = os.open(os.path.dirname(self.target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _link(self) -> None:
        try:
            os.link(self.path, self.target)
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, "exists already", self.target) from None
        except OSError:  # a file system without links
            if os.path.lexists(self.target):
                raise FileExistsError(errno.EEXIST, "exists already", self.target) from None
            os.rename(self.path, self.target)
        else:
            os.unlink(self.path)

    def _pwrite(self, data: bytes | NDArray[np.generic], offset: int) -> None:
        view = memoryview(data if isinstance(data, bytes) else data.tobytes())
        while view:
            try:
                done = os.pwrite(self._file, view, offset)
            except OSError as error:
                error.filename = self.path
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OutOfSpace("not enough space", errno=error.errno, path=self.path) from None
                raise
            view, offset = view[done:], offset + done
