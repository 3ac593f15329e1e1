"""The engine by itself: hostile numbers, budgets, and results that depend on neither threads nor the host."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery
from pygguf_surgery import BadPlan, SourceChanged, _core

ID = {t.name: t.id for t in _core.types()}
HOW = {"memory": 64 << 20, "threads": 2, "io": "auto"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


def source_of(path, data):
    path.write_bytes(data)
    return _core.Source(str(path))


def job(source="F32", target="F32", *, row, rows, runs=(), at=0, name="t", **more):
    return _core.Job(
        name,
        source_type=ID[source],
        target_type=ID[target],
        row_elements=row,
        rows=rows,
        target_offset=at,
        runs=[_core.Run(*run) for run in runs],
        **more,
    )


def held(rows, divisor=1):
    return [_core.ImportanceRow.held(row, divisor=divisor) for row in rows]


def run(sources, path, jobs, nbytes, *, header=b"", progress=None, **how):
    return _core.run(sources, [(path, header, nbytes)], jobs, overwrite=True, progress=progress, **(HOW | how))


# --- hostile numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [2**56 + 32, 2**62, 2**63])
def test_a_row_whose_bytes_would_wrap(elements):
    with pytest.raises(BadPlan):
        _core.plan_budget([job("F16", "F32", row=elements, rows=1)], **HOW)


def test_rows_of_no_elements_are_no_work(folder):
    empty = job("F16", "Q4_0", row=0, rows=2**62, at=5)
    run([], str(folder / "out"), [empty], 5, header=b"12345")
    assert (folder / "out").read_bytes() == b"12345"
    with pytest.raises((BadPlan, ValueError, MemoryError)):
        _core.reduce_rows([], job(row=0, rows=2**63), 1, **HOW)


@pytest.mark.parametrize("at, nbytes", [(2**64 - 128, 2**64 - 1), (0, 2**63)])
def test_a_file_longer_than_files_can_be(folder, at, nbytes):
    source = source_of(folder / "in", bytes(128))
    with pytest.raises(BadPlan):
        run([source], str(folder / "none"), [job(row=32, rows=1, runs=[[0, 0, 128]], at=at)], nbytes)
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    "runs", [[[0, 0, 127]], [[0, 1, 128]], [[1, 0, 128]], [[0, 2**64 - 64, 128]], [[0, 0, 2**64 - 1]]]
)
def test_runs_that_do_not_fit(folder, runs):
    source = source_of(folder / "in", bytes(128))
    with pytest.raises(BadPlan):
        run([source], str(folder / "none"), [job(row=32, rows=1, runs=runs)], 128)
    assert not (folder / "none").exists()


def test_none_among_jobs_or_sources(folder):
    with pytest.raises(TypeError):
        run([], str(folder / "none"), [None], 0)
    with pytest.raises(TypeError):
        run([None], str(folder / "none"), [], 0)


def test_a_path_that_is_no_utf8(folder):
    path = os.fsencode(folder) + b"/out-\xff"
    run([], os.fsdecode(path), [], 3, header=b"abc")
    with open(path, "rb") as f:
        assert f.read() == b"abc"
    with pytest.raises(ValueError):
        run([], str(folder / "cut") + "\0off", [], 3, header=b"abc")


def test_the_list_of_jobs_may_be_emptied_meanwhile(folder):
    x = np.arange(1 << 20, dtype=np.float32)
    source = source_of(folder / "in", x.tobytes())
    jobs = [job(row=1024, rows=1024, runs=[[0, 0, x.nbytes]])]
    run([source], str(folder / "out"), jobs, x.nbytes, progress=lambda done, total: jobs.clear())
    assert (folder / "out").read_bytes() == x.tobytes()


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_reduce_refuses_a_row_that_does_not_fit(folder, kind):
    elements = 8 << 20
    with open(folder / "wide", "wb") as f:
        f.truncate(elements * 4)
    source = _core.Source(str(folder / "wide"))
    wide = job(kind, row=elements, rows=1, runs=[[0, 0, elements * (4 if kind == "F32" else 2)]])
    with pytest.raises(BadPlan, match="does not fit"):
        _core.reduce_rows([source], wide, 1, memory=32 << 20, threads=1, io="auto")
    assert _core.reduce_rows([source], wide, 1, memory=80 << 20, threads=1, io="auto").tolist() == [[0, 0]]


def status(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(field))


def test_padding_between_many_tensors_stays_within_memory(folder):
    n, nbytes, step = 20_000, 4104, 8192
    x = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    source = source_of(folder / "in", x.tobytes())
    jobs = [job("I8", "I8", row=nbytes, rows=1, runs=[[0, 0, nbytes]], at=i * step) for i in range(n)]
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts again
    before = status("VmRSS")
    run([source], str(folder / "padded"), jobs, n * step, memory=16 << 20)
    assert status("VmHWM") - before < (16 << 20) + (32 << 20)
    found = np.fromfile(folder / "padded", np.uint8).reshape(n, step)
    os.unlink(folder / "padded")
    assert (found[:, :nbytes] == x).all() and not found[:, nbytes:].any()


# --- the same result in every run -----------------------------------------------------------------------------------


@given(
    st.sampled_from(["F32", "BF16", "Q8_0"]),
    st.sampled_from([1, 3, 35, 105]),
    st.integers(1, 5),
    st.sampled_from([5 << 20, 20 << 20, 512 << 20]),
    st.sampled_from([(105, 64), (105, 1024), (105, 20_000 // 32 * 32)]),
)
def test_sums_depend_on_neither_threads_nor_memory(folder, kind, rows_per_group, threads, memory, shape):
    rows, row = shape
    x = np.random.default_rng(row).standard_normal(shape, np.float32)
    data = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
    source = source_of(folder / "sums", data.tobytes())
    tensor = job(kind, row=row, rows=rows, runs=[[0, 0, data.nbytes]])
    one = _core.reduce_rows([source], tensor, rows_per_group, memory=1 << 30, threads=1, io="auto")
    many = _core.reduce_rows([source], tensor, rows_per_group, memory=memory, threads=threads, io="auto")
    assert one.tobytes() == many.tobytes()
    y = (
        gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        .astype(np.float64)
        .reshape(-1, rows_per_group * row)
    )
    np.testing.assert_allclose(many, np.stack([abs(y).sum(1), (y * y).sum(1)], 1), rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 3, 15])
def test_each_group_of_rows_has_its_own_importance(folder, groups):
    x = np.random.default_rng(0).standard_normal((15, 11 * 256), np.float32)
    weights = np.random.default_rng(1).random((groups, x.shape[1]), np.float32) + np.float32(0.01)
    source = source_of(folder / "in", x.tobytes())
    encoded = job("F32", "Q4_K", row=x.shape[1], rows=15, runs=[[0, 0, x.nbytes]], importance_rows=held(weights))
    run([source], str(folder / "out"), [encoded], encoded.target_bytes, threads=3)
    assert (folder / "out").read_bytes() == _core.quantize(x, ID["Q4_K"], weights, 1).tobytes()


# --- importance rows from a file --------------------------------------------------------------------------------------


@given(st.data())
def test_importance_rows_of_a_file_are_divided_and_used(folder, data):
    """Sums at any byte, divided by counts in float32, beside rows in memory: for any threads, budget and way of
    reading."""
    groups, per_group = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    row = 256 * data.draw(st.sampled_from([1, 3, 33]))
    kind = data.draw(st.sampled_from(["Q4_K", "IQ4_NL", "Q4_0"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = rng.standard_normal((groups * per_group, row), np.float32)
    sums = rng.random((data.draw(st.integers(1, 4)), row), np.float32) * np.float32(1000) + np.float32(0.01)
    inline = rng.random((data.draw(st.integers(0, 2)), row), np.float32) + np.float32(0.01)
    start = data.draw(st.integers(0, 5000))  # of the sums in their file
    rows, expected = [], []
    divisors = data.draw(st.lists(st.sampled_from([1, 3, 7, 512, 1e-3, 16777216]), min_size=groups, max_size=groups))
    for divisor in np.array(divisors, np.float32):
        in_memory = len(inline) and data.draw(st.booleans())
        n = data.draw(st.integers(0, len(inline if in_memory else sums) - 1))
        if in_memory:
            rows.append(_core.ImportanceRow.held(inline[n], divisor=divisor))
        else:
            rows.append(_core.ImportanceRow(1, start + n * row * 4, divisor=divisor))
        expected.append((inline if in_memory else sums)[n] / divisor)
    encoded = job("F32", kind, row=row, rows=len(x), runs=[[0, 0, x.nbytes]], importance_rows=rows)
    sources = [
        source_of(folder / "in", x.tobytes()),
        source_of(folder / "imatrix", bytes(start) + sums.tobytes() + b"more"),
    ]
    run(
        sources,
        str(folder / "out"),
        [encoded],
        encoded.target_bytes,
        threads=data.draw(st.integers(1, 3)),
        memory=data.draw(st.sampled_from([20, 64])) << 20,
        io=data.draw(st.sampled_from(["auto", "pread", "direct", "mmap"])),
    )
    want = _core.quantize(x, ID[kind], np.array(expected, np.float32), 1)
    assert (folder / "out").read_bytes() == want.tobytes()


@pytest.mark.parametrize("kernels, experts", [("ggml", 5), ("scalar", 5), ("scalar", 1)])
def test_importance_rows_of_experts_in_many_tiles(folder, monkeypatch, kernels, experts):
    """Each expert has its row, an expert has several tiles, and another tensor follows; every set of kernels."""
    monkeypatch.setenv("PGS_KERNELS", kernels)
    rows, row = 300, 1024
    rng = np.random.default_rng(0)
    x = rng.standard_normal((experts * rows, row), np.float32)
    sums = rng.random((2, experts, row), np.float32) + np.float32(0.01)
    counts = rng.integers(1, 1000, (2, experts)).astype(np.float32)
    sources = [source_of(folder / "in", x.tobytes()), source_of(folder / "imatrix", sums.tobytes())]
    jobs, at = [], 0
    for i in (0, 1):
        where = [_core.ImportanceRow(1, (i * experts + e) * row * 4, divisor=counts[i, e]) for e in range(experts)]
        jobs.append(
            job("F32", "Q4_K", row=row, rows=len(x), runs=[[0, 0, x.nbytes]], at=at, name=str(i), importance_rows=where)
        )
        at += jobs[-1].target_bytes
    want = b"".join(_core.quantize(x, ID["Q4_K"], sums[i] / counts[i][:, None], 2).tobytes() for i in (0, 1))
    for threads in (1, 3):
        run(sources, str(folder / "out"), jobs, at, threads=threads, memory=16 << 20)
        assert (folder / "out").read_bytes() == want


@pytest.fixture(scope="module")
def two_sources(folder):
    x = np.ones((4, 256), np.float32)
    return [
        source_of(folder / "four", x.tobytes()),
        source_of(folder / "sums", np.ones((2, 256), np.float32).tobytes()),
    ]


ROW, ONES = _core.ImportanceRow, np.ones(256, np.float32)


def weighted(rows, *, name="blk.0", target="Q4_K", **more):
    more = {"runs": [[0, 0, 4096]]} | more
    return job("F32", target, row=256, rows=4, name=name, importance_rows=rows, **more)


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([ROW(1, 1025)], "beyond its source"),
        ([ROW(1, 2**64 - 4)], "beyond its source"),
        ([ROW(2, 0)], "no such source"),
        ([ROW(2**32 - 1, 0)], "no such source"),
        ([ROW(1, 0)] * 3, "does not fit the rows"),
        ([ROW(1, 0)] * 8, "does not fit the rows"),
        ([ROW(1, 0), ROW(1, 0, divisor=0)], "divisor"),
        ([ROW(1, 0, divisor=-1), ROW(1, 0)], "divisor"),
        ([ROW(1, 0, divisor=np.nan)], "divisor"),
        ([ROW(1, 0, divisor=np.inf)], "divisor"),
        ([ROW.held(ONES, divisor=-0.0)], "divisor"),
        ([ROW.sum(1, [])], "no parts"),
        ([ROW.sum(1, [(0, None), (1025, None)])], "beyond its source"),
        ([ROW.sum(1, [(0, 0)])], "no such order"),
        ([ROW.sum(1, [(0, None), (4, None)])], "without a merge"),
    ],
)
def test_importance_rows_that_do_not_fit(folder, two_sources, rows, problem):
    encoded = weighted(rows)
    with pytest.raises(BadPlan, match=f"blk.0: .*{problem}"):
        run(two_sources, str(folder / "none"), [encoded], encoded.target_bytes)
    assert not (folder / "none").exists()


@pytest.mark.parametrize("row", [ROW(1, 0), ROW.held(ONES)])
def test_importance_of_what_is_only_copied(folder, two_sources, row):
    with pytest.raises(BadPlan, match="not encoded"):
        run(two_sources, str(folder / "none"), [weighted([row], target="F32")], 4096)


def test_misuse_of_importance_rows():
    for wrong in ((-1, 0), (2**32, 0), (0, -1), (0, 2**64), (0, 0.5), (None, 0)):
        with pytest.raises(TypeError):
            ROW(*wrong)
    for rows in ([1], [(1, 0)], [None], np.zeros((1, 2), np.uint64)):
        with pytest.raises(TypeError):
            weighted(rows)
    for length in (0, 255, 512):
        with pytest.raises(BadPlan, match=r"^blk\.0: importance does not fit the rows"):
            weighted(held(np.ones((1, length), np.float32)))
    with pytest.raises(BadPlan, match=r"^blk\.7: importance is negative in row 1, column 3"):
        values = np.ones((2, 256), np.float32)
        values[1, 3] = -1
        weighted(held(values), name="blk.7")


def test_runs_of_a_value(folder):
    """A run that repeats a value, beside one from a file, at any place in the pattern; None stands for no source."""
    source = source_of(folder / "in", bytes(range(1, 11)))
    fill = _core.Run.fill(-1e30, 7)
    assert (fill.source, fill.nbytes, fill.value) == (None, 7, np.float32(-1e30))
    assert (_core.Run(3, 5, 9).source, _core.Run(3, 5, 9).offset, _core.Run(3, 5, 9).nbytes) == (3, 5, 9)
    copied = _core.Job(
        "t",
        source_type=ID["I8"],
        target_type=ID["I8"],
        row_elements=17,
        rows=1,
        target_offset=0,
        runs=[_core.Run(0, 0, 10), fill],
    )
    run([source], str(folder / "out"), [copied], 17)
    assert (folder / "out").read_bytes() == bytes(range(1, 11)) + np.full(2, -1e30, "<f4").tobytes()[:7]


@pytest.mark.parametrize(
    "value, divisor, problem",
    [
        (np.nan, 1, "importance is not a finite number in row 2, column 7"),
        (-1, 2, "importance is negative in row 2, column 7"),
        (3e38, 1e-3, "importance is not a finite number in row 2, column 7"),
        (0, 5, "importance is all zero in row 2"),
    ],
)
def test_importance_values_that_no_encoder_takes(folder, two_sources, value, divisor, problem):
    """The row is that of the tensor: the expert's number."""
    sums = np.ones((4, 256), np.float32)
    sums[3, 7] = value
    if value == 0:
        sums[3] = 0
    sources = [two_sources[0], source_of(folder / "bad", sums.tobytes())]
    encoded = weighted([ROW(1, at, divisor=divisor) for at in (0, 1024, 3072, 0)])
    for threads in (1, 3):
        with pytest.raises(BadPlan, match=f"^blk.0: {problem}"):
            run(sources, str(folder / "none"), [encoded], encoded.target_bytes, threads=threads)
    assert not (folder / "none").exists()


def test_an_importance_file_that_changes_during_the_run(folder, two_sources):
    path = folder / "changing"
    sources = [two_sources[0], source_of(path, np.ones((1, 256), np.float32).tobytes())]
    encoded = weighted([ROW(1, 0)])
    with pytest.raises(SourceChanged) as error:
        run(
            sources,
            str(folder / "none"),
            [encoded],
            encoded.target_bytes,
            progress=lambda *_: path.write_bytes(b"other"),
        )
    assert error.value.path == str(path) and not (folder / "none").exists()


def test_the_budget_counts_importance():
    row, how = 1 << 20, {"memory": 1 << 30, "threads": 1, "io": "auto"}
    plain = job("F32", "Q4_K", row=row, rows=4)
    values = np.ones((2, row), np.float32)
    read = job("F32", "Q4_K", row=row, rows=4, importance_rows=[ROW(0, 0)])
    in_memory = job("F32", "Q4_K", row=row, rows=4, importance_rows=held(values))
    shared = job("F32", "Q4_K", row=row, rows=4, importance_rows=held(values[:1]) * 4)
    divided = job("F32", "Q4_K", row=row, rows=4, importance_rows=held(values, 2))
    before, *after = (_core.plan_budget([j], **how)["buffer_bytes"] for j in (plain, read, in_memory, shared, divided))
    assert [n - before for n in after] == [row * 4, values.nbytes, row * 4, values.nbytes + row * 4]
    with pytest.raises(BadPlan, match="does not fit"):
        _core.plan_budget([in_memory], memory=values.nbytes, threads=1, io="auto")


def test_the_error_is_the_first_in_the_data_not_in_time():
    x = np.zeros((4, 1 << 20), np.float32)
    x[0, -1] = np.nan  # found late in a long row
    x[1:, 0] = np.nan
    for _ in range(10):
        with pytest.raises(BadPlan, match=f"row 0, column {x.shape[1] - 1}"):
            _core.quantize(x, ID["Q8_0"], None, 4)


UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}.get(platform.machine())


@pytest.mark.skipif(UPWARD is None, reason="FE_UPWARD of this machine is not known here")
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "F16"])
def test_the_rounding_mode_of_the_host_changes_nothing(name):
    x = np.random.default_rng(0).standard_normal((8, 256), np.float32)
    expected = _core.quantize(x, ID[name], None, 1)
    libm = ctypes.CDLL("libm.so.6")
    assert libm.fesetround(UPWARD) == 0
    try:
        found = _core.quantize(x, ID[name], None, 1)
    finally:
        libm.fesetround(0)
    assert np.array_equal(found, expected)


def test_a_cancel_while_ggml_makes_a_grid():
    """In a process of its own, since the grid is made once; IQ1_M's is the largest. Afterwards the type still works. A
    signal of a busy machine may come too late, but not time after time."""
    code = """if True:
        import os, signal, sys, threading, time
        import numpy as np
        from pygguf_surgery import _core
        x, w = np.ones((64, 256), np.float32), np.ones((1, 256), np.float32)
        x[:, ::3] = -2
        iq1_m = next(t.id for t in _core.types() if t.name == "IQ1_M")
        cancel, made = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)), False
        try:
            cancel.start()
            _core.quantize(x, iq1_m, w, 3)
            made = True
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            print("too late" if made else "cancelled", flush=True)
        sys.stdout.buffer.write(_core.quantize(x, iq1_m, w, 2).tobytes())
    """
    folder = str(Path(pygguf_surgery.__file__).parents[1])
    x = np.ones((64, 256), np.float32)
    x[:, ::3] = -2
    expected = _core.quantize(x, ID["IQ1_M"], np.ones((1, 256), np.float32), 1).tobytes()
    for _ in range(5):
        out = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n" + code],
            check=True,
            capture_output=True,
            timeout=120,
        ).stdout
        said, data = out.split(b"\n", 1)
        assert data == expected
        if said == b"cancelled":
            return
    raise AssertionError("never cancelled")
