"""What files say of the model that they are, or are of: the keys, and chains of real files."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import BadFile, Value
from pygguf_surgery.files.subjects import read_subject, subject_of, wanted_by, write_subject
from pygguf_surgery.plan_data.expressions import Group
from pygguf_surgery.plan_data.subject import DROPPED, Descent, Subject
from pygguf_surgery.reports.comparison import compare
from pygguf_surgery.reports.verification import verify
from support import moe_models

PREFIX = "pgs.stats.model."
SUBJECT = Subject(2, "aa", "a", Descent("bb", 4, (0, 2), {0: (1, 3), 1: (0, 2)}, {1: (0, DROPPED, 1, 1)}))


@pytest.mark.parametrize("subject", [SUBJECT, Subject(4, "aa"), Subject(2, origin=Descent("", None, None, {3: (1,)}))])
def test_keys_there_and_back(subject):
    keys = write_subject(subject, PREFIX)
    assert read_subject(keys, PREFIX) == subject and read_subject(keys, "pgs.repair.model.") is None
    assert all(key.startswith(PREFIX) for key in keys) and write_subject(None, PREFIX) == {}


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *(PREFIX + key for key in ("experts", "header_sha256", "name", "origin.header_sha256")),
                *(PREFIX + key for key in ("origin.experts", "origin.layers", "origin.0.kept", "origin.1.merged")),
                *(PREFIX + key for key in ("origin.7.merged", "origin.x.kept", "origin." + "9" * 400 + ".kept")),
            ]
        ),
        st.sampled_from(
            [
                Value("abc", "str"),
                Value("XYZ", "str"),
                Value(0, "u32"),
                Value(-1, "i32"),
                Value(1 << 40, "u64"),
                Value([0.5], "f32[]"),
                Value([True], "bool[]"),
                Value([], "u32[]"),
                Value([2, 1], "u32[]"),
                Value([-1], "i32[]"),
                Value([DROPPED], "u32[]"),
                Value(True, "bool"),
            ]
        ),
    )
)
def test_keys_that_somebody_changed_are_refused_or_make_sense(changed):
    try:
        found = read_subject(write_subject(SUBJECT, PREFIX) | changed, PREFIX)
    except BadFile as error:
        assert error.object.startswith(PREFIX)
    else:
        found.check()
        assert found.fault(found) is None


# --- chains of files --------------------------------------------------------------------------------------------------

FIRST = {0: (0, 2, 4, 6, 8, 10, 12, 14), 1: (1, 3, 5, 7, 9, 11, 13, 15)}
THEN = {0: (0, 1, 3, 4, 7), 1: (1, 2, 5, 6, 7)}
BOTH = {layer: tuple(FIRST[layer][i] for i in ids) for layer, ids in THEN.items()}


def groups(experts, n):
    """Pairs of neighbours until n are left."""
    members = [(2 * i, 2 * i + 1) for i in range(experts - n)] + [(i,) for i in range(2 * (experts - n), experts)]
    return {
        layer: tuple(Group(m, (1 / len(m),) * len(m), (b"", *[order()] * (len(m) - 1))) for m in members)
        for layer in (0, 1)
    }


def order():
    return np.arange(moe_models.FF, dtype="<u2").tobytes()


EDITS = {
    "cut": lambda plan: plan.keep_experts(FIRST),
    "cut again": lambda plan: plan.keep_experts(THEN),
    "merge": lambda plan: plan.merge_experts(groups(16, 8)),
    "merge again": lambda plan: plan.merge_experts(groups(8, 6)),
    "quantize": lambda plan: plan.quantize("Q8_0"),
    "layers": lambda plan: plan.prune_layers([0]),
    "cut the last": lambda plan: plan.keep_experts({0: FIRST[1]}),
}
CHAINS = [
    ["cut", "cut again"],
    ["cut", "quantize", "cut again"],
    ["cut", "merge again"],
    ["merge", "cut again"],
    ["layers", "cut the last"],
    ["cut", "layers"],
]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return moe_models.qwen3moe(tmp_path_factory.mktemp("models") / "first.gguf", type="F32")


@pytest.mark.parametrize("chain", CHAINS, ids=", ".join)
def test_files_of_a_chain_know_the_first_and_verify_against_the_one_before(first, tmp_path, chain):
    source = first
    for number, word in enumerate(chain):
        out = tmp_path / f"{number}.gguf"
        with pgs.open(source) as model:
            EDITS[word](pgs.Plan(model)).write(out)
            with pgs.open(out) as result:
                assert compare(model, result).tensors
        assert verify(out, source).good
        source = out
    with pgs.open(first) as model:
        plan = pgs.Plan(model)
        for word in chain:
            plan = EDITS[word](plan)
        plan.write(tmp_path / "once.gguf")
        digest, experts = model.header_sha256, model.get("expert_count")
    with pgs.open(source) as twice, pgs.open(tmp_path / "once.gguf") as once:
        found, direct = subject_of(twice), subject_of(once)
        assert found.origin == direct.origin and found.fault(direct) is None
        assert (found.origin.header_sha256, found.origin.experts) == (digest, experts)
        assert found.experts == once.get("expert_count")
    if chain[0] == "cut" and chain[-1] == "cut again":
        assert found.origin == Descent(digest, experts, None, BOTH)
    if chain[-1] == "layers":
        assert found.origin == Descent(digest, experts, (1,), {0: FIRST[1]})
    if chain[-1] == "cut the last":
        assert found.origin == Descent(digest, experts, (1,), {0: FIRST[1]})
    if chain[-1] == "merge again":
        assert found.origin.contents(0)[:2] == [(0, 2), (4, 6)] and found.origin.kept[0] == (0, 4, 8, 10, 12, 14)
    if chain[0] == "merge":
        assert found.origin.contents(0)[:2] == [(0, 1), (2, 3)] and found.origin.kept[0] == (0, 2, 6, 8, 14)


def test_a_file_of_an_older_version_is_cut_again(first, tmp_path):
    """It says of which ids it is, and not how many there were."""
    with pgs.open(first) as model:
        pgs.Plan(model).keep_experts(FIRST).write(tmp_path / "a.gguf")
    with pgs.open(tmp_path / "a.gguf") as model:
        pgs.Plan(model).remove_metadata("pgs.source.experts").write(tmp_path / "old.gguf")
    with pgs.open(tmp_path / "old.gguf") as model:
        assert subject_of(model).origin.experts is None and wanted_by(model).cut.kept == FIRST
        pgs.Plan(model).keep_experts(THEN).write(tmp_path / "b.gguf")
    assert verify(tmp_path / "b.gguf", tmp_path / "old.gguf").good
    with pgs.open(tmp_path / "b.gguf") as model:
        found = subject_of(model).origin
        assert found.kept == BOTH and found.experts is None and wanted_by(model).cut.experts == 8
