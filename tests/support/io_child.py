"""A writer in a process of its own, to be killed, traced and starved by test_faults.

io_child.py once SOURCE OUTPUT      writes plan "new" over OUTPUT, prints "ok" or the name of the error's class
io_child.py loop SOURCE OUTPUT      for each line on stdin: forks a child, which prints its pid and overwrites
                                    OUTPUT with plans "old" and "new" in turn until it is killed; prints its status
io_child.py slow SOURCE OUTPUT      as once, with one thread and an encoding that takes seconds; prints progress
"""

import os
import sys

import pygguf_surgery as pgs


def plan(model, name):
    return pgs.Plan(model).set_metadata({"general.name": name})


def forever(model, output):
    try:
        print(os.getpid(), flush=True)
        while True:
            for name in ("old", "new"):
                plan(model, name).write(output, overwrite=True)
    finally:
        os._exit(1)


def once(source, output):
    try:
        plan(pgs.open(source), "new").write(output, overwrite=True, io=os.environ.get("TEST_IO", "auto"))
        print("ok")
    except Exception as error:
        print(type(error).__name__)


def main(how, source, output):
    if how == "once":
        return once(source, output)
    model = pgs.open(source)
    if how == "loop":
        plan(model, "new").check()  # imports what the children need, so that they write at once
        for _ in sys.stdin:
            pid = os.fork()
            if pid == 0:
                forever(model, output)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    elif how == "slow":
        os.environ["PGS_KERNELS"] = "ggml"
        pgs.Plan(model).quantize("IQ3_S", pure=True).write(
            output, overwrite=True, threads=1, progress=lambda done, total: print(f"{100 * done // total}%", flush=True)
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
