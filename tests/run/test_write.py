"""Writing. Law 1: an untouched plan changes nothing; law 3: threads, memory, I/O change no byte; progress, Receipt."""

import io
import json
import os
import time

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import BadPlan, Plan, Value
from pygguf_surgery.base import units
from pygguf_surgery.base.progress import ProgressBar
from support import moe_models
from support.gguf_bytes import gguf as hand_made
from support.gguf_bytes import info, kv
from support.gguf_files import make_gguf, read_gguf
from support.strategies import contents_of_files

T = gguf.GGUFValueType
Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder):
    return pgs.open(moe_models.qwen3next(folder / "qwen3next.gguf"))


# --- law 1 ----------------------------------------------------------------------------------------------------------


@given(contents_of_files())
def test_law_1_an_untouched_plan_changes_nothing(folder, parts):
    metadata, tensors, alignment = parts
    path, out = folder / "law1.gguf", folder / "law1-out.gguf"
    make_gguf(path, "test", metadata, tensors, alignment)
    with pgs.open(path) as m:
        assert Plan(m).check().blockers == []
        Plan(m).write(out, overwrite=True)
    assert out.read_bytes() == path.read_bytes()
    assert read_gguf(out)[0] == read_gguf(path)[0]


def odd_file(path, alignment=None):
    """Not canonical: version 2, tensors out of order with a gap, bytes after the end."""
    items = [kv("general.architecture", "str", "test")]
    if alignment:
        items.append(kv("general.alignment", "u32", alignment))
    a, b = np.arange(32, dtype=np.float32), -np.arange(64, dtype=np.float32)
    step = alignment or 32
    gap = step + -256 % step
    data = bytes(step) + b.tobytes() + bytes(gap) + a.tobytes() + b"tail"
    path.write_bytes(
        hand_made(
            items, [info("a", (32,), 0, step + 256 + gap), info("b", (64,), 0, step)], data, version=2, alignment=step
        )
    )
    return {"a": a, "b": b}


def test_writing_is_idempotent_and_canonical(tmp_path):
    expected = odd_file(tmp_path / "odd.gguf")
    Plan(pgs.open(tmp_path / "odd.gguf")).write(tmp_path / "once.gguf")
    Plan(pgs.open(tmp_path / "once.gguf")).write(tmp_path / "twice.gguf")
    assert (tmp_path / "once.gguf").read_bytes() == (tmp_path / "twice.gguf").read_bytes()
    assert pgs.open(tmp_path / "once.gguf", strict=True).warnings == []
    _, tensors = read_gguf(tmp_path / "once.gguf")
    assert list(tensors) == ["a", "b"]
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name][1], array)


@pytest.mark.parametrize("before, after", [(4, 32), (1, 32), (16, 32), (32, 32), (64, 64), (4096, 4096)])
def test_alignment(tmp_path, before, after):
    odd_file(tmp_path / "in.gguf", before)
    plan = Plan(pgs.open(tmp_path / "in.gguf"))
    assert any("alignment" in w for w in plan.check().warnings) == (before < 32)
    plan.write(tmp_path / "out.gguf")
    with pgs.open(tmp_path / "out.gguf") as out:
        assert out.alignment == after and out.metadata.value("general.alignment") == Value(after, "u32")
        assert all(t.offset % after == 0 for t in out.tensors.values())


def test_shards_become_one_file(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "test", split_max_tensors=2)
    arrays = {f"blk.{i}.x.weight": np.full((3, 32), i, np.float32) for i in range(5)}
    writer.add_name("Split")
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = make_gguf(tmp_path / "whole.gguf", "test", {"general.name": ("Split", T.STRING)}, arrays)
    Plan(pgs.open(tmp_path / "m-00002-of-00003.gguf")).write(tmp_path / "joined.gguf")
    assert (tmp_path / "joined.gguf").read_bytes() == whole.read_bytes()


def test_a_file_without_tensors(tmp_path):
    make_gguf(tmp_path / "vocab.gguf", "test", {"general.name": ("V", T.STRING)}, {})
    Plan(pgs.open(tmp_path / "vocab.gguf")).set_metadata({"general.name": "W"}).write(tmp_path / "out.gguf")
    assert read_gguf(tmp_path / "out.gguf")[0]["general.name"] == "W"


# --- law 3 ----------------------------------------------------------------------------------------------------------


def plans(model):
    keep = {i: tuple(range(i % 2, 32, 2)) for i in range(4)}
    return {
        "copy": Plan(model),
        "cut": Plan(model).keep_experts(keep),
        "cut and quantize": Plan(model).keep_experts(keep).quantize("MXFP4_MOE"),
        "quantize": Plan(model).quantize("Q4_0", pure=True),
    }


@pytest.fixture(scope="module")
def expected(model, folder):
    result = {}
    for name, plan in plans(model).items():
        plan.write(folder / "expected.gguf", overwrite=True, threads=1, memory="64MiB", io="pread")
        result[name] = (folder / "expected.gguf").read_bytes()
    return result


@given(
    st.sampled_from(["copy", "cut", "cut and quantize", "quantize"]),
    st.integers(1, 5),
    st.sampled_from(["64MiB", "100MB", "512MiB", "4GiB"]),
    st.sampled_from(["auto", "mmap", "pread", "direct"]),
)
def test_law_3_threads_memory_and_io_change_no_byte(model, folder, expected, name, threads, memory, io):
    receipt = plans(model)[name].write(folder / "law3.gguf", overwrite=True, threads=threads, memory=memory, io=io)
    assert (folder / "law3.gguf").read_bytes() == expected[name]
    assert receipt.buffer_bytes <= units.parse_size(memory)


def test_the_number_of_threads(model, tmp_path, monkeypatch):
    def threads(**options):
        return Plan(model).write(tmp_path / "out.gguf", overwrite=True, **options).threads

    monkeypatch.setenv("PGS_THREADS", "3")
    assert threads() == 3 and threads(threads=2) == 2
    monkeypatch.setenv("PGS_THREADS", "")
    assert threads() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("PGS_THREADS", "many")
    with pytest.raises(BadPlan) as e:
        threads()
    assert e.value.object == "PGS_THREADS" and e.value.found == "many"


@pytest.mark.parametrize("io, memory", [("fast", "512MiB"), ("auto", "1MiB")])
def test_options_that_are_refused(model, tmp_path, io, memory):
    with pytest.raises(BadPlan):
        Plan(model).write(tmp_path / "out.gguf", io=io, memory=memory)
    assert not list(tmp_path.iterdir())


# --- the output file ------------------------------------------------------------------------------------------------


def test_an_existing_file_needs_overwrite(model, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("old")
    with pytest.raises(FileExistsError):
        Plan(model).write(out)
    assert out.read_text() == "old"
    Plan(model).write(out, overwrite=True)
    assert out.read_bytes()[:4] == b"GGUF" and list(tmp_path.iterdir()) == [out]


def test_the_output_is_not_the_input(tmp_path):
    path = moe_models.qwen3moe(tmp_path / "in.gguf")
    before = path.read_bytes()
    os.link(path, tmp_path / "link.gguf")
    for name in ("in.gguf", "link.gguf"):
        with pytest.raises(BadPlan):
            Plan(pgs.open(path)).write(tmp_path / name, overwrite=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_source_that_changed_since_it_was_opened(tmp_path):
    path = moe_models.qwen3moe(tmp_path / "in.gguf")
    plan = Plan(pgs.open(path))
    moe_models.qwen3moe(tmp_path / "new.gguf", experts=8)
    os.replace(tmp_path / "new.gguf", path)
    with pytest.raises(pgs.SourceChanged):
        plan.write(tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == [path]


def test_the_receipt(model, tmp_path):
    plan = plans(model)["cut and quantize"]
    receipt = plan.write(tmp_path / "out.gguf", threads=2)
    assert receipt.path == str(tmp_path / "out.gguf") and receipt.file_bytes == os.path.getsize(tmp_path / "out.gguf")
    assert receipt.actions == plan.check().actions() and sum(receipt.actions.values()) == len(model.tensors)
    assert receipt.warnings == plan.check().warnings
    encoded = [t for t in plan.check().tensors if t.type != t.source_type]
    assert receipt.elements_encoded == sum(int(np.prod(t.shape)) for t in encoded)
    assert 0 < receipt.bytes_read < model.file_bytes and receipt.seconds > 0 and 1 <= receipt.threads <= 2
    assert json.loads(json.dumps(receipt.to_json()))["file_bytes"] == receipt.file_bytes


def test_an_output_in_bytes_and_one_that_is_no_utf_8(model, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"o\xff.gguf")
    receipt = Plan(model).write(name)
    assert os.path.exists(name) and receipt.path == os.fsdecode(name) and json.dumps(receipt.to_json())
    with pytest.raises(FileExistsError):
        Plan(model).write(os.fsdecode(name))
    with pytest.raises(ValueError, match="null"):
        Plan(model).write(tmp_path / "o\0.gguf")
    assert len(list(tmp_path.iterdir())) == 1


# --- progress -------------------------------------------------------------------------------------------------------


def test_a_callable_gets_done_and_total(model, tmp_path):
    calls = []
    receipt = Plan(model).write(tmp_path / "out.gguf", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (receipt.file_bytes, receipt.file_bytes)
    assert calls == sorted(calls) and {total for _, total in calls} == {receipt.file_bytes}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_from_progress_cancels_and_leaves_nothing(model, tmp_path, error):
    def stop(done, total):
        raise error("stop")

    with pytest.raises(error):
        Plan(model).write(tmp_path / "out.gguf", progress=stop)
    assert not list(tmp_path.iterdir())


def test_nothing_is_printed_unless_asked(model, tmp_path, capfd):
    Plan(model).write(tmp_path / "out.gguf")
    assert capfd.readouterr() == ("", "")
    Plan(model).write(tmp_path / "out.gguf", overwrite=True, progress=True)
    assert capfd.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_on_a_terminal(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ProgressBar, "_columns", lambda self: 100)
    stream = Terminal()
    bar = ProgressBar("out.gguf", stream)
    now[0] += 10
    bar(2**30, 4 * 2**30)
    text = stream.getvalue()
    assert text.startswith("\rout.gguf [######..................] 1.00 GiB of 4.00 GiB, 102.40 MiB/s, 0:30 left")
    bar(2**30 + 1, 4 * 2**30)
    assert stream.getvalue() == text  # not ten times a millisecond
    bar(4 * 2**30, 4 * 2**30)
    bar.close()
    bar.close()
    assert stream.getvalue().endswith("0:00 left\n") and stream.getvalue().count("\n") == 1


def test_the_bar_counts_what_it_is_told(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    bar = ProgressBar("measuring", stream, "tensors")
    now[0] += 10
    bar(20, 60)
    assert stream.getvalue() == "measuring: 20 of 60 tensors, 0:20 left\n"


@pytest.mark.parametrize("columns", [20, 50, 60, 80, 200])
@pytest.mark.parametrize("label", ["o.gguf", "a-rather-long-name-of-a-model-MXFP4_MOE.gguf"])
def test_the_bar_never_wraps(monkeypatch, columns, label):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ProgressBar, "_columns", lambda self: columns)
    stream = Terminal()
    bar = ProgressBar(label, stream)
    for part in range(1, 5):
        now[0] += 100
        bar(part * 2**30, 4 * 2**30)
    lines = stream.getvalue().split("\r")[1:]
    assert len(lines) == 4 and all(len(line) < columns for line in lines)
    assert all("GiB of 4.00 GiB"[: columns - 6] in line for line in lines)


def test_a_line_per_ten_seconds_elsewhere(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    bar = ProgressBar("out.gguf", stream)
    for second in range(35):
        now[0] = float(second)
        bar(second, 100)
    bar.close()
    assert len(stream.getvalue().splitlines()) == 3 and "\r" not in stream.getvalue()


def test_duration():
    assert [units.duration(s) for s in (0, 59.9, 75, 3600, 36_061)] == ["0:00", "0:59", "1:15", "1:00:00", "10:01:01"]
