"""The files that a plan reads beside its model: opened once, scanned once, closed, and still those that were
checked."""

import os
from collections import Counter

import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery import BadFile, Plan, SourceChanged
from pygguf_surgery.base.limits import Limits
from pygguf_surgery.files import companions as room
from pygguf_surgery.files import imatrix as imatrix_file
from pygguf_surgery.files.companions import Companion, Companions
from pygguf_surgery.gate.check import check
from pygguf_surgery.plan_data.edits import UseImatrix
from pygguf_surgery.run.writing import write
from support import quant_models


@pytest.fixture
def paths(tmp_path):
    model = quant_models.model("qwen3moe", blocks=2, heads=4, key_heads=2, experts=6)
    for i in range(2):
        model.add(i, attn_norm=(256,), attn_q=(8, 256), attn_k=(8, 256), attn_v=(8, 256), attn_output=(8, 256))
        model.add(i, ffn_norm=(256,), ffn_gate_inp=(6, 256), ffn_gate_exps=(6, 8, 256), ffn_up_exps=(6, 8, 256))
        model.add(i, ffn_down_exps=(6, 256, 256))
    return str(model.write(tmp_path / "model.gguf")), str(model.write_imatrix(tmp_path / "imatrix.gguf"))


@pytest.fixture
def scans(monkeypatch):
    """How often each entry was scanned."""
    seen = Counter()
    scan = imatrix_file._Scan.__init__

    def counted(self, imatrix, entry, row_elements):
        seen[entry.name] += 1
        scan(self, imatrix, entry, row_elements)

    monkeypatch.setattr(imatrix_file._Scan, "__init__", counted)
    return seen


def test_fit_and_write_scan_the_importance_once(paths, scans, tmp_path):
    with pgs.open(paths[0]) as model:
        plan = Plan(model).quantize("Q4_K_M", imatrix=paths[1])
        largest = plan.check().file_bytes
        plan.fit(size=largest).write(tmp_path / "out.gguf")
    assert len(scans) > 8 and set(scans.values()) == {1}


def test_another_file_at_the_same_path_is_scanned_anew(paths, scans, tmp_path):
    with pgs.open(paths[0]) as model:
        Plan(model).quantize("Q4_K_M", imatrix=paths[1]).check()
        os.rename(paths[1], tmp_path / "old")
        (tmp_path / "imatrix.gguf").write_bytes((tmp_path / "old").read_bytes())
        Plan(model).quantize("Q4_K_M", imatrix=paths[1]).check()
    assert set(scans.values()) == {2}


def test_each_file_is_opened_once_and_closed(paths, monkeypatch, tmp_path):
    opened = []

    def remembered(path):
        opened.append(imatrix_file.open_imatrix(path))
        return opened[-1]

    monkeypatch.setattr(room, "open_imatrix", remembered)
    with pgs.open(paths[0]) as model:
        plan = Plan(model).quantize("Q4_K_M", imatrix=paths[1])
        plan.fit(size=plan.check().file_bytes)
        assert len(opened) == 2  # one for check, one for all checks of fit
        plan.write(tmp_path / "out.gguf")
        assert len(opened) == 3
    for imatrix in opened:
        with pytest.raises(ValueError):
            imatrix.source.read(0, 1)


def test_a_checked_plan_is_written_with_what_was_checked(paths, tmp_path):
    with pgs.open(paths[0]) as model:
        plan = Plan(model).quantize("Q4_K_M", imatrix=paths[1])
        checked = plan.check(memory="64MiB", threads=1)
        assert checked.limits == Limits(64 << 20, 1, "auto")
        assert [c.path for c in checked.companions] == [paths[1]]
        receipt = write(model, checked, tmp_path / "later.gguf")
        assert receipt.threads == 1
        plan.write(tmp_path / "now.gguf")
        assert (tmp_path / "later.gguf").read_bytes() == (tmp_path / "now.gguf").read_bytes()
        with open(paths[1], "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x3f")
        os.utime(paths[1], ns=(1, 1))
        with pytest.raises(SourceChanged) as e:
            write(model, checked, tmp_path / "never.gguf")
    assert e.value.path == paths[1] and not (tmp_path / "never.gguf").exists()


def test_a_source_that_is_open_still_is_not_opened_again(paths):
    with pgs.open(paths[0]) as model, Companions() as companions:
        plan = Plan(model).quantize("Q4_K_M", imatrix=paths[1])
        checked = check(model, plan.data, Limits.parse(), companions)
        use = plan.data.edits[0].imatrix
        assert companions.source(checked.companions[0]) is companions.imatrix(use).source


def test_what_cannot_be_opened(tmp_path):
    with Companions() as companions:
        for path in ("", "\0", str(tmp_path / "none")):
            with pytest.raises(BadFile, match="the importance matrix cannot be read"):
                companions.imatrix(UseImatrix(path, ""))
        with pytest.raises(FileNotFoundError):
            companions.source(Companion(str(tmp_path / "none"), (0, 0, 0, 0)))


def test_a_bad_value_is_an_error_of_each_who_opens_the_file(tmp_path):
    """What was scanned is kept for all, the errors that were raised are not."""
    name = "blk.0.ffn_up.weight"
    entries = {name: ((2, lambda: [np.array([1, -2], np.float32)]), np.array([1.0]))}
    imatrix_file.write(tmp_path / "a.gguf", entries, datasets=["text"], chunk_count=1, chunk_size=1)
    os.link(tmp_path / "a.gguf", tmp_path / "b.gguf")
    errors = []
    for path in (tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "a.gguf"):
        with imatrix_file.open_imatrix(path) as imatrix, pytest.raises(BadFile) as e:
            raise imatrix.problem(name)
        errors.append(e.value)
    assert [os.path.basename(error.path) for error in errors] == ["a.gguf", "b.gguf", "a.gguf"]
    assert {error.object for error in errors} == {name} and len(set(map(id, errors))) == 3
    with imatrix_file.open_imatrix(tmp_path / "a.gguf") as imatrix:
        assert imatrix.problem(name).__traceback__ is None
