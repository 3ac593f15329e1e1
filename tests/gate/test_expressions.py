"""What every expression promises: the engine gives what its definition in numpy gives; a cut of a cut is one cut."""

import math
from types import SimpleNamespace
from typing import get_args

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import _core
from pygguf_surgery.gate.jobs import LOWERINGS, build_jobs
from pygguf_surgery.plan_data.edits import KeepExperts, UseRepair
from pygguf_surgery.plan_data.expressions import Expression, OutputTensor
from support.definitions import DEFINITIONS, evaluate
from support.gguf_files import make_gguf
from support.strategies import EXPRESSION, NEURONS, SLICES, ids_of_slices

EVERY = get_args(Expression)
every = pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.word)


def arrays(seed):
    rng = np.random.default_rng(seed)
    found = {name: rng.standard_normal((SLICES, NEURONS, 2 * NEURONS), np.float32) for name in "abc"}
    found["vector"] = rng.standard_normal(SLICES, np.float32)
    found["ids"] = np.stack([rng.permutation(SLICES)[:2] for _ in range(5)]).astype(np.int32)
    return found


MODEL, REPAIR = arrays(1), arrays(2)  # the repair has tensors of the same names and shapes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model and the repair; of the second only what jobs ask of one."""
    folder = tmp_path_factory.mktemp("expressions")
    integers = gguf.GGMLQuantizationType.I32
    for name, tensors in (("model", MODEL), ("repair", REPAIR)):
        make_gguf(folder / name, tensors=tensors | {"ids": (tensors["ids"], integers)})
    with pgs.open(folder / "model") as model, pgs.open(folder / "repair") as repair:
        yield model, SimpleNamespace(tensors=repair.tensors, source=repair.sources[0])


def written(files, path, expression, like, **how):
    """The bytes that the engine writes for the expression; like: an array of its shape and type."""
    model, repair = files
    type = "I32" if like.dtype == np.int32 else "F32"
    edit = KeepExperts({}, "given", repair=UseRepair("", ""))
    checked = SimpleNamespace(
        tensors=[OutputTensor("out", like.shape, type, type, expression)],
        offsets=[0],
        files=[SimpleNamespace(tensors=[0])],
        data=SimpleNamespace(edits=[edit]),
    )
    jobs, beside = build_jobs(model, checked, SimpleNamespace(repair=lambda use: repair))
    limits = {"io": "auto", "overwrite": True, "progress": None} | how
    _core.run([*model.sources, *beside], [(str(path), b"", like.nbytes)], jobs, **limits)
    return path.read_bytes()


def test_every_expression_is_drawn_defined_and_lowered():
    assert set(EVERY) == EXPRESSION.keys() == DEFINITIONS.keys() == LOWERINGS.keys()
    assert len({kind.word for kind in EVERY}) == len(EVERY)


@every
@given(data=st.data())
def test_the_engine_gives_what_is_defined(files, tmp_path, kind, data):
    expression = data.draw(EXPRESSION[kind])
    expected = evaluate(expression, MODEL, REPAIR)
    how = {"threads": data.draw(st.integers(1, 3)), "memory": data.draw(st.sampled_from([20, 64])) << 20}
    assert written(files, tmp_path / "out", expression, expected, **how) == expected.tobytes()


@every
@given(data=st.data())
def test_a_cut_is_a_cut_of_what_it_means_and_a_cut_of_a_cut_is_one(kind, data):
    expression = data.draw(EXPRESSION[kind])
    whole = evaluate(expression, MODEL, REPAIR)
    first = data.draw(ids_of_slices(len(whole)))
    cut = expression.take(first)
    if cut is None:  # pads, or what has no slices of experts
        assert None in first or kind.word == "remap"
        return
    pad = getattr(expression, "fill", 0.0)
    expected = [np.full_like(whole[0], pad) if i is None else whole[i] for i in first]
    assert np.array_equal(evaluate(cut, MODEL, REPAIR), np.stack(expected))
    second = data.draw(ids_of_slices(len(first)))
    again, direct = cut.take(second), expression.take(tuple(None if i is None else first[i] for i in second))
    assert again == direct


@every
@given(data=st.data())
def test_what_an_expression_says_of_itself(kind, data):
    expression = data.draw(EXPRESSION[kind])
    assert expression.refs and set(expression.refs) <= MODEL.keys()
    whole = evaluate(expression, MODEL, REPAIR)
    if expression.slices is not None:
        assert len(expression.slices) == len(whole)
    if not expression.computes:  # each number is one of a source, a pad, or an id
        source = np.concatenate([x.ravel() for x in (*MODEL.values(), *REPAIR.values())])
        allowed = {*source.tolist(), getattr(expression, "fill", 0.0), *range(SLICES)}
        assert {float(np.float32(x)) for x in whole.ravel()} <= {float(np.float32(x)) for x in allowed}
    assert math.prod(whole.shape)
