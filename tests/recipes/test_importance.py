"""Which importance rows a tensor is encoded with: llama-quantize's by default, and what the policies change."""

import math
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import BadFile, BadPlan, imatrix
from pygguf_surgery.imatrix import POLICIES
from pygguf_surgery.plan_data.edits import UseImatrix
from pygguf_surgery.plan_data.expressions import MEAN, ONES, Copy, Importance, OutputTensor, Stack, Take
from pygguf_surgery.recipes import importance
from support.gguf_files import make_gguf
from support.imatrices import LEGACY, REAL, legacy, real, same

UP, GATE, GATE_UP, DOWN = (f"blk.0.ffn_{part}_exps.weight" for part in ("up", "gate", "gate_up", "down"))
Q, KV_B, V_B = "blk.0.attn_q.weight", "blk.0.attn_kv_b.weight", "blk.0.attn_v_b.weight"
U32 = gguf.GGUFValueType.UINT32
HINT = "imatrix_missing= (--imatrix-missing) ones or layer-mean"


@dataclass
class FakeTensor:
    name: str
    shape: tuple


class FakeModel:
    """All that resolve asks of a model: the shapes of the source's tensors."""

    def __init__(self, **shapes):
        self.tensors = {name: FakeTensor(name, shape) for name, shape in shapes.items()}


def encoded(name, shape, expression=None, type="Q4_K", source_type="BF16"):
    return OutputTensor(name, shape, type, source_type, expression or Copy(name))


@pytest.fixture
def ask(tmp_path):
    """Resolves tensors against an importance matrix with these entries: name -> (sums, counts)."""
    opened = []

    def resolve(entries, tensors, sources=None, missing="default", **use):
        path = tmp_path / f"{len(opened)}.gguf"
        imatrix.write(path, entries)
        opened.append(imatrix.open(path))
        model = FakeModel(**(sources or {t.name: t.shape for t in tensors}))
        return importance.resolve(opened[-1], UseImatrix(str(path), "", missing, **use), model, tensors)

    yield resolve
    for m in opened:
        m.close()


def messages(errors):
    """Without the path of the importance matrix, which every message begins with."""
    assert all(error.path is not None for error in errors)
    return [str(error).removeprefix(f"{error.path}: ") for error in errors]


EXPERTS = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
SEEN = EXPERTS, [1, 2, 3, 4]
HOLES = EXPERTS, [1, 0, 3, 0]


# --- as llama-quantize does -----------------------------------------------------------------------------------------


def test_each_tensor_gets_the_rows_of_its_entry(ask):
    heads = encoded(V_B, (3, 5, 2))
    out = ask({UP: SEEN, Q: ([1, 2], 7), V_B: (np.ones(6), 7)}, [encoded(UP, (4, 3, 2)), encoded(Q, (3, 2)), heads])
    assert out.importance == {UP: Importance(UP, (0, 1, 2, 3)), Q: Importance(Q, (0,)), V_B: Importance(V_B, (0, 1, 2))}
    assert (out.blockers, out.missing, out.tensor_notes, out.warnings) == ([], [], {}, [])
    assert out.notes == ["importance: 3 tensors"]


def test_only_types_that_use_importance_ask_for_it(ask):
    tensors = [
        encoded(f"blk.{i}.attn_q.weight", (3, 2), type=type)
        for i, type in enumerate(("Q8_0", "F16", "BF16", "F32", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"))
    ]
    tensors.append(encoded(Q, (3, 2), type="Q4_K", source_type="Q4_K"))
    out = ask({"x": ([1], 1)}, tensors, missing="fail")
    assert out == importance.ImportanceOutcome()


def test_a_missing_entry_means_no_importance(ask):
    names = [f"blk.{i}.attn_q.weight" for i in range(5)]
    out = ask({"x": ([1], 1)}, [encoded(n, (3, 2)) for n in names])
    assert (out.importance, out.blockers, out.missing) == ({}, [], names)
    assert out.tensor_notes == {n: ["no entry in the importance matrix"] for n in names}
    assert out.warnings == [f"importance: 5 tensors, 5 without an entry ({', '.join(names[:3])}, ...)"]


def test_an_expert_never_seen_gets_ones(ask):
    out = ask(
        {UP: HOLES, DOWN: (EXPERTS, [1, 1, 1, 0]), Q: ([3, 4], 0)},
        [encoded(UP, (4, 3, 2)), encoded(DOWN, (4, 3, 2)), encoded(Q, (5, 2))],
    )
    assert out.importance == {
        UP: Importance(UP, (0, ONES, 2, ONES)),
        DOWN: Importance(DOWN, (0, 1, 2, ONES)),
        Q: Importance(Q, (ONES,)),
    }
    assert out.tensor_notes == {
        UP: ["2 experts never seen: importance of ones"],
        DOWN: ["1 expert never seen: importance of ones"],
        Q: ["1 row never seen: importance of ones"],
    }
    assert out.blockers == []
    assert out.warnings == ["importance: 3 tensors, 3 experts never seen in 2 tensors, 1 row never seen in 1 tensor"]


def rows_of(m, chosen, row):
    """The importance that an outcome stands for, shape [rows, row]."""
    entry = m.entries.get(chosen.ref)
    special = {ONES: lambda: np.ones(row, np.float32), MEAN: lambda: m.mean_row(chosen.ref, row)}
    return np.stack(
        [
            special[r]() if r in special else m.sums(chosen.ref).reshape(-1, row)[r] / np.float32(entry.divisor(r, row))
            for r in chosen.rows
        ]
    )


@given(data=st.data())
def test_the_rows_are_those_of_llama_quantize_and_follow_the_cut(tmp_path, data):
    """Law: by default, cutting and weighing commute, bit for bit, for both formats."""
    experts, row = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    values = data.draw(st.lists(st.floats(0.125, 1e6, width=32), min_size=experts * row, max_size=experts * row))
    counts = data.draw(st.lists(st.integers(0, 100), min_size=experts, max_size=experts))
    if data.draw(st.booleans()):
        counts = [max(1, counts[0])]
    kept = sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1)))
    path = tmp_path / "x"
    if data.draw(st.booleans()):
        path.write_bytes(legacy([(UP, counts[0], values)]))
    else:
        imatrix.write(path, {UP: (np.array(values, np.float32), counts)}, overwrite=True)
    tensor = encoded(UP, (len(kept), 3, row), Take(UP, tuple(kept)))
    with imatrix.open(path) as m:
        out = importance.resolve(m, UseImatrix(str(path), ""), FakeModel(**{UP: (experts, 3, row)}), [tensor])
        assert out.blockers == []
        assert same(rows_of(m, out.importance[UP], row), m.importance(UP).reshape(experts, row)[kept])


@real
@pytest.mark.parametrize("path", [REAL, LEGACY])
def test_the_real_importance_matrix_fits_its_model(path):
    with imatrix.open(path) as m, pgs.open(REAL.parent / "tiny-qwen3next-bf16.gguf") as model:
        tensors = [encoded(t.name, t.shape, source_type=t.type) for t in model.tensors.values() if len(t.shape) > 1]
        out = importance.resolve(m, UseImatrix(str(path), ""), model, tensors)
        assert out.blockers == [] and out.importance.keys() == m.entries.keys()
        assert set(out.missing) == {
            "token_embd.weight",
            "output.weight",
            *(f"blk.{i}.ssm_conv1d.weight" for i in range(3)),
        }
        assert all(
            same(rows_of(m, chosen, 256), m.importance(name).reshape(-1, 256))
            for name, chosen in out.importance.items()
        )


# --- cuts and sizes -------------------------------------------------------------------------------------------------


def test_an_entry_is_cut_as_its_tensor_is(ask):
    tensor = encoded(UP, (2, 3, 2), Take(UP, (1, 2)))
    assert ask({UP: SEEN}, [tensor], {UP: (4, 3, 2)}).importance == {UP: Importance(UP, (1, 2))}
    # Experts that are dropped need no importance.
    out = ask({UP: (EXPERTS, [0, 2, 3, 0])}, [tensor], {UP: (4, 3, 2)}, "fail")
    assert out.importance == {UP: Importance(UP, (1, 2))} and out.tensor_notes == {}


def test_a_renumbered_block_keeps_the_name_of_the_source(ask):
    out = ask(
        {UP: SEEN, UP.replace("0", "5"): (EXPERTS[:2], [1, 1])},
        [encoded(UP, (1, 3, 2), Take(UP.replace("0", "5"), (1,)))],
        {UP.replace("0", "5"): (2, 3, 2)},
    )
    assert out.importance == {UP: Importance(UP.replace("0", "5"), (1,))}


def test_an_importance_matrix_of_the_cut_model_is_used_as_it_is(ask):
    out = ask({UP: (EXPERTS[:2], [1, 0])}, [encoded(UP, (2, 3, 2), Take(UP, (1, 3)))], {UP: (4, 3, 2)})
    assert out.importance == {UP: Importance(UP, (0, ONES))}
    assert out.tensor_notes == {
        UP: [
            f"{UP} in the importance matrix fits the cut model: used as it is",
            "1 expert never seen: importance of ones",
        ]
    }
    assert "1 with an entry of the cut model" in out.warnings[0]


def test_four_dimensions_and_no_source(ask):
    tensor = encoded(UP, (2, 2, 3, 2), Take(UP, (0, 2)))
    out = ask({UP: (np.ones(12), 1)}, [tensor], {UP: (3, 2, 3, 2)})
    assert out.importance == {UP: Importance(UP, (0, 1, 4, 5))}
    stacked = encoded(UP, (2, 3, 2), Stack(("a", "b")))
    assert ask({UP: (np.ones(4), [1, 2])}, [stacked], {"a": (3, 2)}).importance == {UP: Importance(UP, (0, 1))}


@pytest.mark.parametrize(
    "name, shape, sums, counts, found, expected",
    [
        (Q, (3, 2), np.ones(3), 1, 3, 2),
        (UP, (4, 3, 2), np.ones(6), [1, 1, 1], 6, 8),
        (UP, (4, 3, 2), np.ones(12), [1] * 6, 12, 8),
        ("token_embd.weight", (9, 2), np.ones(18), 1, 18, 2),
        (Q, (3, 2), np.ones(4), [1, 1], 4, 2),
    ],
)
@pytest.mark.parametrize("missing", POLICIES)
def test_an_unfit_importance_matrix_is_refused(ask, name, shape, sums, counts, found, expected, missing):
    out = ask({name: (sums, counts)}, [encoded(name, shape)], missing=missing)
    assert out.importance == {}
    assert messages(out.blockers) == [
        f"{name}: importance of another size (found {found}, expected {expected}); "
        f"exclude_weights= (--exclude-weights) {name} leaves it out"
    ]
    assert isinstance(out.blockers[0], BadPlan) and out.blockers[0].object == name


def test_counts_that_divide_a_row_are_refused(ask):
    out = ask({Q: (np.ones(4), [1, 1])}, [encoded(Q, (3, 4))])
    assert messages(out.blockers) == [f"{Q}: importance of another size (found 4 values, 2 counts, expected rows of 4)"]


# --- policies -------------------------------------------------------------------------------------------------------


def test_fail_names_the_experts_never_seen(ask):
    out = ask({UP: HOLES, Q: ([1, 2], 0)}, [encoded(UP, (4, 3, 2)), encoded(Q, (3, 2))], missing="fail")
    assert messages(out.blockers) == [
        f"{UP}: experts never seen (found experts 1, 3); {HINT}",
        f"{Q}: never seen; {HINT}",
    ]
    assert out.importance == {}
    many = ask({UP: (np.ones((40, 2)), np.zeros(40))}, [encoded(UP, (40, 3, 2))], missing="fail")
    assert "found experts 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... (40))" in str(many.blockers[0])


def test_fail_names_a_tensor_without_an_entry(ask):
    out = ask({UP: SEEN}, [encoded(Q, (3, 2)), encoded(GATE, (4, 3, 2))], missing="fail")
    assert messages(out.blockers) == [
        f"{Q}: no entry in the importance matrix; {HINT}",
        f"{GATE}: no entry in the importance matrix; {HINT} takes {UP}, which has the same inputs",
    ]


def test_ones(ask):
    out = ask({UP: HOLES}, [encoded(UP, (4, 3, 2)), encoded(Q, (3, 2)), encoded(DOWN, (4, 3, 2))], missing="ones")
    assert out.importance == {
        UP: Importance(UP, (0, ONES, 2, ONES)),
        Q: Importance(Q, (ONES,)),
        DOWN: Importance(DOWN, (ONES,) * 4),
    }
    assert (out.blockers, out.missing) == ([], [])
    assert out.tensor_notes[Q] == ["no entry in the importance matrix: importance of ones"]
    assert out.warnings == ["importance: 3 tensors, 2 with ones for want of an entry, 2 experts never seen in 1 tensor"]


def test_layer_mean(ask):
    out = ask(
        {UP: HOLES, DOWN: (EXPERTS, [0] * 4)},
        [encoded(UP, (4, 3, 2)), encoded(DOWN, (4, 3, 2)), encoded(Q, (3, 2))],
        missing="layer-mean",
    )
    assert out.importance == {
        UP: Importance(UP, (0, MEAN, 2, MEAN)),
        DOWN: Importance(DOWN, (ONES,) * 4),
        Q: Importance(Q, (ONES,)),
    }  # where nothing was seen there is no mean
    assert out.tensor_notes == {
        UP: ["2 experts never seen: importance of the entry's mean"],
        DOWN: ["4 experts never seen: importance of ones"],
        Q: ["no entry in the importance matrix: importance of ones"],
    }


def test_layer_mean_of_a_legacy_file(tmp_path):
    path = tmp_path / "x.dat"
    path.write_bytes(legacy([(UP, 2, [2, 4, 2, 2, 6, 8])]))
    tensor = encoded(UP, (3, 3, 2))
    with imatrix.open(path) as m:
        for missing, rows in (("default", (0, ONES, 2)), ("ones", (0, ONES, 2)), ("layer-mean", (0, MEAN, 2))):
            out = importance.resolve(m, UseImatrix(str(path), "", missing), FakeModel(**{UP: tensor.shape}), [tensor])
            assert out.importance == {UP: Importance(UP, rows)}
        assert rows_of(m, out.importance[UP], 2).tolist() == [[1, 2], [2, 3], [3, 4]]
        out = importance.resolve(m, UseImatrix(str(path), "", "fail"), FakeModel(**{UP: tensor.shape}), [tensor])
        assert messages(out.blockers) == [f"{UP}: experts never seen (found experts 1); {HINT}"]


@pytest.mark.parametrize("missing, fill", [("ones", ONES), ("layer-mean", MEAN)])
def test_rows_of_zeros(ask, missing, fill):
    sums = EXPERTS.copy()
    sums[2] = 0
    tensors = [encoded(UP, (4, 3, 2)), encoded(Q, (3, 2))]
    entries = {UP: (sums, [1, 1, 1, 1]), Q: (np.zeros(2), 5)}
    for strict in ("default", "fail"):
        out = ask(entries, tensors, missing=strict)
        assert messages(out.blockers) == [
            f"{UP}: importance is all zero (found experts 2); {HINT}",
            f"{Q}: importance is all zero; {HINT}",
        ]
    out = ask(entries, tensors, missing=missing)
    assert out.importance == {UP: Importance(UP, (0, 1, fill, 3)), Q: Importance(Q, (ONES,))}
    assert out.blockers == [] and out.tensor_notes[UP] == [
        f"1 expert of zeros: importance of {'ones' if fill == ONES else 'the entry' + chr(39) + 's mean'}"
    ]
    # A row of zeros that is cut away matters to nobody.
    assert ask(entries, [encoded(UP, (1, 3, 2), Take(UP, (3,)))], {UP: (4, 3, 2)}).blockers == []


@pytest.mark.parametrize("missing", POLICIES)
def test_bad_values_are_refused_by_name(ask, missing):
    sums = EXPERTS.copy()
    sums[1, 1] = np.nan
    out = ask({UP: (sums, [1] * 4), Q: ([-1, 1], 1)}, [encoded(UP, (4, 3, 2)), encoded(Q, (3, 2))], missing=missing)
    assert all(isinstance(error, BadFile) for error in out.blockers)
    texts = messages(out.blockers)
    assert texts[0].startswith(f"{UP}: importance that is not finite (found nan in element 3, at byte ")
    assert texts[1].startswith(f"{Q}: importance that is negative (found -1.0 in element 0, at byte ")


@pytest.mark.parametrize(
    "name, shape", [("token_embd.weight", (9, 2)), ("per_layer_token_embd.weight", (9, 2)), ("output.weight", (9, 2))]
)
@pytest.mark.parametrize("missing", POLICIES)
def test_embedding_and_output_normally_have_no_entry(ask, name, shape, missing):
    out = ask({Q: ([1, 1], 1)}, [encoded(name, shape)], missing=missing)
    assert (out.importance, out.blockers, out.missing) == ({}, [], [name])
    out = ask({name: ([1, 1], 1)}, [encoded(name, shape)], missing=missing)
    assert out.importance == {name: Importance(name, (0,))}
    out = ask({Q: ([1, 1], 1)}, [encoded(name, shape, type="IQ2_XXS")], missing=missing)  # ggml cannot without
    if missing in ("ones", "layer-mean"):
        assert out.importance == {name: Importance(name, (ONES,))}
    else:
        assert out.importance == {} and len(out.blockers) == (missing == "fail")


# --- twins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "have, want",
    [
        ((GATE, UP), (GATE_UP, GATE)),
        ((UP,), (GATE_UP, UP)),
        ((GATE_UP, GATE), (UP, GATE_UP)),
        ((GATE_UP,), (GATE, GATE_UP)),
        ((UP,), (GATE, UP)),
        ((GATE,), (UP, GATE)),
    ],
)
@pytest.mark.parametrize("missing", ["ones", "layer-mean"])
def test_fused_and_separate_gate_and_up_have_the_same_inputs(ask, have, want, missing):
    name, twin = want
    tensor = encoded(name, (2, 3, 2), Take(name, (1, 2)))
    out = ask(dict.fromkeys(have, HOLES), [tensor], {name: (4, 3, 2)}, missing)
    assert out.importance == {name: Importance(twin, (ONES if missing == "ones" else MEAN, 2))}
    assert out.tensor_notes[name][0] == f"no entry in the importance matrix: {twin}"
    assert "1 with the entry of a twin" in out.warnings[0]
    out = ask(dict.fromkeys(have, HOLES), [tensor], {name: (4, 3, 2)})
    assert out.missing == [name] and out.tensor_notes[name] == [
        f"no entry in the importance matrix ({twin} has the same inputs)"
    ]


def test_twins_of_mla(ask):
    heads, whole = encoded(V_B, (3, 5, 2)), encoded(KV_B, (9, 2))
    for missing in ("ones", "layer-mean"):
        assert ask({KV_B: ([1, 2], 3)}, [heads], missing=missing).importance == {V_B: Importance(KV_B, (0, 0, 0))}
        assert ask({V_B: (np.ones(6), 3)}, [whole], missing=missing).importance == {KV_B: Importance(V_B, (MEAN,))}
        assert ask({V_B: (np.ones(6), 0)}, [whole], missing=missing).importance == {KV_B: Importance(V_B, (ONES,))}
        # k_b has other inputs, and so has a v_b with rows of another length.
        other = encoded("blk.0.attn_k_b.weight", (3, 5, 2))
        assert ask({KV_B: ([1, 2], 3)}, [other], missing=missing).importance[other.name].rows == (ONES,) * 3
        assert ask({KV_B: (np.ones(3), 3)}, [heads], missing=missing).importance == {V_B: Importance(V_B, (ONES,) * 3)}


def test_a_twin_with_another_number_of_experts_is_none(ask):
    out = ask({UP: (EXPERTS[:3], [1, 1, 1])}, [encoded(GATE, (4, 3, 2))], missing="ones")
    assert out.importance == {GATE: Importance(GATE, (ONES,) * 4)}


def test_a_bad_twin_is_refused(ask):
    sums = EXPERTS.copy()
    sums[0] = np.inf
    out = ask(
        {UP: (sums, [1] * 4), V_B: (np.full(6, np.nan), 1)},
        [encoded(UP, (4, 3, 2)), encoded(GATE, (4, 3, 2)), encoded(KV_B, (9, 2))],
        missing="ones",
    )
    assert [e.object for e in out.blockers] == [UP, UP, V_B] and out.importance == {}


# --- filters --------------------------------------------------------------------------------------------------------


def test_include_and_exclude_are_parts_of_names(ask, tmp_path):
    entries = {UP: SEEN, GATE: SEEN, Q: ([1, 1], 1)}
    tensors = [encoded(UP, (4, 3, 2)), encoded(GATE, (4, 3, 2)), encoded(Q, (3, 2))]
    for use, left in (
        ({}, {UP, GATE, Q}),
        (dict(include=("ffn_up",)), {UP}),
        (dict(include=("ffn_", "attn_q.")), {UP, GATE, Q}),
        (dict(exclude=("ffn_up",)), {GATE, Q}),
        (dict(exclude=("up_exps", "attn")), {GATE}),
    ):
        out = ask(entries, tensors, **use)
        assert out.importance.keys() == left and set(out.missing) == {UP, GATE, Q} - left
        imatrix.write(tmp_path / "x", entries, overwrite=True)
        with imatrix.open(tmp_path / "x") as m:
            assert importance.used_entries(m, UseImatrix("", "", **use)) == len(left)
    # An entry that is left out is no twin either.
    out = ask(entries, tensors[:1], exclude=("ffn_",), missing="layer-mean")
    assert out.importance == {UP: Importance(UP, (ONES,) * 4)}


def test_filters_that_do_nothing_are_named(ask):
    out = ask({Q: ([1, 1], 1)}, [encoded(Q, (3, 2))], exclude=("ffn_up",))
    assert out.warnings[0] == "exclude_weights ffn_up: no entry of the importance matrix has it in its name"


def test_what_makes_no_sense_is_refused(ask):
    out = ask({Q: ([1, 1], 1)}, [encoded(Q, (3, 2))], include=("a",), exclude=("b",))
    assert [str(e) for e in out.blockers] == ["imatrix: include_weights and exclude_weights exclude each other"]
    out = ask({Q: ([1, 1], 1)}, [encoded(Q, (3, 2))], missing="guess")
    assert [str(e) for e in out.blockers] == [
        "imatrix_missing: unknown policy (found guess, expected default, fail, ones, layer-mean)"
    ]


@given(data=st.data(), missing=st.sampled_from(POLICIES))
def test_every_tensor_is_settled(tmp_path, data, missing):
    """Law: each tensor ends with importance of the right number of rows, or is named as without, or is refused."""
    path = tmp_path / "x.gguf"
    names = [UP, GATE, GATE_UP, DOWN, Q, KV_B, V_B, "token_embd.weight"]
    shapes = {n: data.draw(st.sampled_from([(2, 2), (2, 2, 2), (4, 2, 2)])) for n in names}
    entries = {}
    for n in data.draw(st.sets(st.sampled_from(names), min_size=1)):
        rows = data.draw(st.sampled_from([1, 2, 4]))
        sums = data.draw(st.lists(st.sampled_from([0, 1, 2, -1, np.nan]), min_size=rows * 2, max_size=rows * 2))
        entries[n] = np.array(sums), data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    imatrix.write(path, entries, overwrite=True)
    tensors = []
    for n, shape in shapes.items():
        ids = tuple(sorted(data.draw(st.sets(st.integers(0, shape[0] - 1), min_size=1))))
        cut = len(shape) > 2 and data.draw(st.booleans())
        tensors.append(encoded(n, (len(ids), *shape[1:]) if cut else shape, Take(n, ids) if cut else Copy(n)))
    with imatrix.open(path) as m:
        out = importance.resolve(m, UseImatrix(str(path), "", missing), FakeModel(**shapes), tensors)
        assert len(out.importance) + len(out.missing) + len(out.blockers) == len(tensors)
        for tensor in tensors:
            if tensor.name in out.importance:
                chosen = out.importance[tensor.name]
                assert len(chosen.rows) == math.prod(tensor.shape[:-2])
                rows = rows_of(m, chosen, 2)
                assert np.isfinite(rows).all() and (rows >= 0).all() and (rows.max(axis=1) > 0).all()


# --- through the engine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("missing", ["default", "ones", "layer-mean"])
def test_a_plan_encodes_with_these_rows(tmp_path, missing, old):
    """Bytes of a written file, experts cut, against numpy and quantize() of arrays."""
    rng = np.random.default_rng(5)
    experts, row = 4, 256
    arrays = {name: rng.standard_normal((experts, 3, row), dtype=np.float32) for name in (UP, GATE, DOWN)}
    arrays[Q] = rng.standard_normal((3, row), dtype=np.float32)
    router = rng.standard_normal((experts, row), dtype=np.float32)
    model = make_gguf(
        tmp_path / "m.gguf",
        "qwen3moe",
        {
            "qwen3moe.block_count": (1, U32),
            "qwen3moe.expert_count": (experts, U32),
            "qwen3moe.expert_used_count": (2, U32),
        },
        {**arrays, "blk.0.ffn_gate_inp.weight": router},
    )
    counts = np.array([3, 0, 5, 6], np.float32)
    sums = rng.random((experts, row), dtype=np.float32) + 1
    path = tmp_path / "i"
    if old:
        values = np.where(counts[:, None] > 0, sums, np.float32(7))
        path.write_bytes(legacy([(UP, 7, values.ravel())]))
        rows, seen = values / np.float32(7), (values[counts > 0].astype(np.float64).sum(axis=0) / 21)
    else:
        imatrix.write(path, {UP: (sums, counts)})
        rows = np.divide(sums, counts[:, None], out=np.ones_like(sums), where=counts[:, None] > 0)
        seen = sums[counts > 0].astype(np.float64).sum(axis=0) / counts.sum()
    if missing == "layer-mean":
        rows[1] = seen.astype(np.float32)
    kept = [1, 2, 3]
    ones = np.ones(row, np.float32)
    expected = {UP: rows[kept], GATE: rows[kept], DOWN: np.ones((3, row), np.float32), Q: ones}
    if missing == "default":
        expected |= {GATE: None, DOWN: None, Q: None}
    with pgs.open(model) as m:
        plan = pgs.Plan(m).keep_experts({0: kept}).quantize("Q4_K", pure=True, imatrix=path, imatrix_missing=missing)
        plan.write(tmp_path / "out.gguf")
    with pgs.open(tmp_path / "out.gguf") as m:
        for name, importance_rows in expected.items():
            array = arrays[name] if name == Q else arrays[name][kept]
            assert m.tensors[name].type == "Q4_K"
            assert np.array_equal(m.tensors[name].bytes(), pgs.quantize(array, "Q4_K", importance_rows).ravel()), name


def test_an_importance_matrix_of_another_model_is_one_blocker(ask):
    names = [f"blk.{i}.attn_q.weight" for i in range(20)]
    out = ask({n: ([1] * 6, 1) for n in names}, [encoded(n, (3, 4)) for n in names])
    assert [str(e).partition(": ")[2] for e in out.blockers] == [
        f"{names[0]}: importance of another size (and 19 more tensors) (found 6, expected 4); "
        f"exclude_weights= (--exclude-weights) {names[0]} leaves it out"
    ]
    assert out.refused == set(names)
