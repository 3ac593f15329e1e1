"""progress=True works wherever progress is taken: a bar whose line ends with the operation, whatever the reason."""

from typing import ClassVar

import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery.base import progress as progress_module
from pygguf_surgery.base.progress import as_progress
from support import moe_models


class Bar:
    """In place of ProgressBar."""

    made: ClassVar[list["Bar"]] = []
    error: BaseException | None = None

    def __init__(self, label, stream=None, unit=None):
        self.label, self.unit, self.calls, self.closed = label, unit, [], 0
        Bar.made.append(self)

    def __call__(self, done, total):
        assert not self.closed
        self.calls.append((done, total))
        if Bar.error is not None:
            raise Bar.error

    def close(self):
        self.closed += 1


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(progress_module, "ProgressBar", Bar)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


def rank(path, folder, progress):
    with pgs.open(path) as model:
        pgs.experts.rank(model, "aimer", progress=progress)


def group(path, folder, progress):
    with pgs.open(path) as model:
        pgs.experts.group(model, 12, weights_only=True, progress=progress)


def fit(path, folder, progress):
    with pgs.open(path) as model:
        plan = pgs.Plan(model).quantize("Q4_0")
        sizes = [plan.check().file_bytes, pgs.Plan(model).quantize("Q8_0").check().file_bytes]
        plan.fit(size=sum(sizes) // 2, progress=progress)


def write(path, folder, progress):
    with pgs.open(path) as model:
        pgs.Plan(model).write(folder / "out.gguf", progress=progress)


def calibrate(path, folder, progress):
    pytest.importorskip("llama_cpp")
    tokens = np.random.default_rng(7).integers(0, moe_models.VOCAB, 80)
    pgs.experts.calibrate(path, [tokens], n_ctx=40, threads=1, progress=progress)


def repair(path, folder, progress):
    pytest.importorskip("llama_cpp")
    tokens = np.random.default_rng(7).integers(0, moe_models.VOCAB, 480)
    with pgs.open(path) as model:
        keep = pgs.experts.rank(model).keep(8)
        pgs.experts.repair(model, keep, [tokens], folder / "repair.gguf", n_ctx=40, threads=1, progress=progress)


OPERATIONS = [
    pytest.param(rank, "ranking", None, id="rank"),
    pytest.param(group, "matching", "experts", id="group"),
    pytest.param(fit, "measuring", "tensors", id="fit"),
    pytest.param(write, "out.gguf", None, id="write"),
    pytest.param(calibrate, "calibrating", "windows", id="calibrate", marks=pytest.mark.parity),
    pytest.param(repair, "repairing", "windows", id="repair", marks=pytest.mark.parity),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return moe_models.qwen3moe(tmp_path_factory.mktemp("progress") / "in.gguf", type="F32")


@pytest.mark.parametrize("operation, label, unit", OPERATIONS)
def test_true_is_one_bar_that_ends(bars, model, tmp_path, operation, label, unit):
    operation(model, tmp_path, True)
    (bar,) = bars
    done, total = bar.calls[-1]
    assert (bar.label, bar.unit, bar.closed) == (label, unit, 1) and done == total > 1


@pytest.mark.parametrize("operation, label, unit", OPERATIONS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, pgs.BadFile("broken")])
def test_an_error_ends_the_bar_too(bars, model, tmp_path, monkeypatch, operation, label, unit, error):
    monkeypatch.setattr(Bar, "error", error)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        operation(model, tmp_path, True)
    assert [bar.closed for bar in bars] == [1] and len(bars[0].calls) == 1


@pytest.mark.parametrize("operation, label, unit", OPERATIONS)
def test_a_callable_is_called_and_nothing_is_drawn(bars, model, tmp_path, operation, label, unit):
    calls = []
    operation(model, tmp_path, lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 1 and not bars


@pytest.mark.parametrize("nobody", [False, None])
def test_nobody_wants_to_know(bars, nobody):
    with as_progress(nobody, "anything") as report:
        assert report is None
    assert not bars


def test_something_else_is_refused_before_anything_is_done(model, tmp_path):
    with pytest.raises(pgs.BadPlan, match="progress"):
        write(model, tmp_path, "yes")
    assert not list(tmp_path.iterdir())
