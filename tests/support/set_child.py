"""A set of three shards written by the core alone: here, or in a process of its own, to be killed, traced and starved.

set_child.py once FOLDER OVERWRITE    writes set "new" to FOLDER, prints "ok" or the error
set_child.py starved FOLDER           as once, over an old set and with 100 more files, and may open only 50
"""

import errno
import resource
import sys

from pygguf_surgery import _core

NAMES = [f"m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
HOW = {"memory": 64 << 20, "threads": 2, "io": "auto", "overwrite": False, "progress": None}


def content(tag, i):
    return f"{tag} {i} ".encode() * (2000 + 100 * i)


def write_set(folder, names, tag, **how):
    jobs, outputs, kind = [], [], next(t.id for t in _core.types() if t.name == "I8")
    for i, name in enumerate(names):
        data = content(tag, i)
        jobs.append(
            _core.Job(
                f"t{i}",
                source_type=kind,
                target_type=kind,
                row_elements=len(data) - 5,
                rows=1,
                target_offset=5,
                literal=data[5:],
                file=i,
            )
        )
        outputs.append((f"{folder}/{name}", data[:5], len(data)))
    return _core.run([], outputs, jobs, **{**HOW, **how})


def once(folder, overwrite):
    try:
        write_set(folder, NAMES, "new", overwrite=overwrite == "True", threads=1)
        print("ok")
    except Exception as error:
        print(type(error).__name__, error)


def starved(folder):
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
    try:
        write_set(folder, [*NAMES, *map(str, range(100))], "new", overwrite=True)
    except OSError as error:
        print(error.errno == errno.EMFILE, error.strerror)


if __name__ == "__main__":
    {"once": once, "starved": starved}[sys.argv[1]](*sys.argv[2:])
