"""Law 4: a run stays within its memory budget, whatever the size of the file. Measured from outside Python's
allocator."""

import subprocess
import sys
from pathlib import Path

import pytest

import pygguf_surgery as pgs
from pygguf_surgery import _core
from pygguf_surgery.quant.types import tensor_type

MIB = 1 << 20
RUN = """if True:
    import re, sys
    import pygguf_surgery as pgs
    source, target, memory, threads, io = sys.argv[1:]

    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

    with pgs.open(source) as model:
        keep = pgs.experts.rank(model).keep(12)
        plan = pgs.Plan(model).keep_experts(keep).quantize("MXFP4_MOE")
        stated = plan.check(memory=memory, threads=int(threads), io=io).peak_memory_bytes
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak starts again
        before = peak()
        plan.write(target, memory=memory, threads=int(threads), io=io)
        print(peak() - before, stated)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A sparse file of half a GiB: one layer of 16 experts."""
    path = tmp_path_factory.mktemp("memory") / "large.gguf"
    keys = {
        "general.architecture": ("qwen3moe", "str"),
        "qwen3moe.block_count": (1, "u32"),
        "qwen3moe.expert_count": (16, "u32"),
        "qwen3moe.expert_used_count": (2, "u32"),
    }
    half = tensor_type("F16").id
    infos = [_core.TensorInfo("blk.0.ffn_gate_inp.weight", (2048, 16), tensor_type("F32").id)]
    infos += [
        _core.TensorInfo(f"blk.0.ffn_{part}_exps.weight", ne, half)
        for part, ne in (("gate", (2048, 2730, 16)), ("up", (2048, 2730, 16)), ("down", (2720, 2048, 16)))
    ]
    header, _, size = _core.encode_header([(k, pgs.Value(*v)) for k, v in keys.items()], infos, 32)
    with open(path, "wb") as f:
        f.write(header)
        f.truncate(size)
    assert size > 500 * MIB
    return path


@pytest.mark.parametrize(
    "memory, threads, io", [(64, 2, "auto"), (64, 16, "auto"), (192, 4, "direct"), (64, 2, "mmap"), (512, 2, "pread")]
)
def test_law_4_a_run_stays_within_its_budget(large, tmp_path, memory, threads, io):
    try:
        open("/proc/self/clear_refs", "w").close()
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    package = str(Path(pgs.__file__).parents[1])
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {package!r})\n" + RUN,
            str(large),
            str(tmp_path / "out.gguf"),
            f"{memory}MiB",
            str(threads),
            io,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown, stated = map(int, done.stdout.split())
    assert grown <= stated <= (memory + 64) * MIB
    assert (tmp_path / "out.gguf").stat().st_size > 100 * MIB
