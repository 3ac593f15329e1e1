"""fit: types for a size. Its laws are the bound, the least error within it, the same choice everywhere, and overrides
that reproduce the choice."""

import itertools
import re

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import BadPlan, Plan, _core
from pygguf_surgery.base.limits import Limits
from pygguf_surgery.recipes.overrides import patterns
from pygguf_surgery.studies import fitting as module
from pygguf_surgery.studies.fitting import LADDERS, fit, ladder
from support import quant_models as qm
from support.places import SHARED
from support.strategies import ERRORS, ladders

Q = gguf.GGMLQuantizationType
FAMILIES = [("Q4_K_M", "K"), ("IQ3_M", "IQ"), ("Q4_0", "legacy"), ("MXFP4_MOE", "MXFP4"), ("NVFP4_MOE", "NVFP4")]


class Uneven(qm.Model):
    """Some tensors are harder to quantize than others: the tails of their values differ."""

    def values(self, name, shape):
        x = super().values(name, shape)
        return (np.sign(x) * np.abs(x) ** (1 + len(name) % 4)).astype(np.float32)


def small(cls=Uneven, experts=6, rows=8):
    """Two blocks with experts, shared experts, tensors that only Q8_0 of the K types can hold (rows of 96)."""
    m = qm.model("qwen3moe", blocks=2, heads=4, key_heads=2, experts=experts)
    m.__class__ = cls
    for i in range(2):
        m.add(i, attn_norm=(256,), attn_q=(rows, 256), attn_k=(rows, 256), attn_v=(rows, 256), attn_output=(rows, 256))
        m.add(
            i,
            ffn_norm=(256,),
            ffn_gate_inp=(experts, 256),
            ffn_gate_exps=(experts, rows, 256),
            ffn_up_exps=(experts, rows, 256),
            ffn_down_exps=(experts, rows, 96),
        )
    return m


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fit")


@pytest.fixture(scope="module")
def model(folder):
    return pgs.open(small().write(folder / "small.gguf"))


@pytest.fixture(scope="module")
def imatrix(folder):
    return str(small().write_imatrix(folder / "small.imatrix"))


def fitted(plan, *, memory="512MiB", threads=0, io="auto", **target):
    return fit(plan.model, plan.data, Limits.parse(memory, threads, io), **target)


def limits(plan):
    """(smallest, largest) file of the family."""
    with pytest.raises(BadPlan) as error:
        fitted(plan, size=1)
    return int(error.value.found.split()[0]), fitted(plan, size=1 << 40).file_bytes


def types_of(plan):
    return {t.name: t.type for t in plan.check().tensors}


# --- the laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type, family", FAMILIES)
def test_the_size_holds_and_more_room_never_means_more_error(model, imatrix, type, family):
    plan = Plan(model).quantize(type, imatrix=imatrix)
    smallest, largest = limits(plan)
    assert smallest < largest
    before = np.inf
    for size in np.linspace(smallest, largest - 1, 5).astype(int).tolist():
        result = fitted(plan, size=size)
        assert smallest <= result.file_bytes <= size
        assert result.error <= before * (1 + 1e-12)
        before = result.error
    assert fitted(plan, size=smallest).file_bytes == smallest
    allowed = {*LADDERS[family], "IQ4_NL", "Q5_0", "Q5_1", "Q4_0", "F32"}  # rows of 96 fall back
    assert {c.type for c in result.choices} <= allowed


@pytest.mark.parametrize("type, family", FAMILIES)
def test_the_overrides_reproduce_the_choice(folder, model, imatrix, type, family):
    plan = Plan(model).quantize(type, imatrix=imatrix)
    size = sum(limits(plan)) // 2
    result = fitted(plan, size=size)
    again = Plan(model).quantize(type, imatrix=imatrix, overrides=result.overrides)
    assert types_of(again) == {c.name: c.type for c in result.choices}
    assert again == plan.fit(size=size)
    path = folder / f"{type}.gguf"
    again.write(path)
    assert path.stat().st_size == result.file_bytes
    checked = again.check()
    assert not checked.blockers
    assert result.bits_per_weight == pytest.approx(8 * sum(checked.nbytes) / checked.elements)


def test_bits_per_weight_hold(model, imatrix):
    plan = Plan(model).quantize("Q4_K_M", imatrix=imatrix)
    for bpw in (7, 8.4, 9.25):
        checked = plan.fit(bpw=bpw).check()
        assert 8 * sum(checked.nbytes) / checked.elements <= bpw
        assert fitted(plan, bpw=bpw).bits_per_weight > bpw - 1.2


def test_the_same_choice_with_any_threads_and_memory(model, imatrix):
    plan = Plan(model).quantize("IQ3_M", imatrix=imatrix)
    size = sum(limits(plan)) // 2
    first = fitted(plan, size=size, threads=1, memory="64MiB")
    assert first.error > 0
    assert first == fitted(plan, size=size, threads=2, memory="1GiB") == fitted(plan, size=size, threads=5)


def test_shards_count_whole(model):
    plan = Plan(model).quantize("Q4_K_M").split(max_tensors=5)
    smallest, largest = limits(plan)
    for size in np.linspace(smallest, largest, 5).astype(int).tolist():
        checked = plan.fit(size=size).check()
        assert sum(file.file_bytes for file in checked.files) == checked.file_bytes <= size


@given(st.lists(ladders(), min_size=1, max_size=4), st.integers(0, 60), st.integers(0, 20))
def test_climb_is_monotone_and_one_step_from_the_best(tensors, room, more):
    costs, errors = [c for c, _ in tensors], [e for _, e in tensors]

    def outcome(chosen):
        return (
            sum(c[i] - c[0] for c, i in zip(costs, chosen, strict=True)),
            sum(e[i] for e, i in zip(errors, chosen, strict=True)),
        )

    used, error = outcome(module.climb(costs, errors, room))
    assert used <= room
    assert outcome(module.climb(costs, errors, room + more))[1] <= error
    best = min(e for used, e in map(outcome, itertools.product(*(range(len(c)) for c in costs))) if used <= room)
    largest = max(e[i - 1] - e[i] for e in errors for i in range(1, len(e)))
    assert best <= error < best + largest or error == best


@given(st.lists(st.tuples(st.integers(1, 50), ERRORS), min_size=1, max_size=8))
def test_hull(points):
    hull = [points[i] for i in module._hull(points)]
    assert hull[0][0] == min(nbytes for nbytes, _ in points)
    assert hull[-1][1] == min(error for _, error in points)
    slopes = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    assert all(s > 0 for s in slopes) and all(a > b for a, b in itertools.pairwise(slopes))
    for nbytes, error in points:  # none is below
        assert error >= np.interp(nbytes, [p[0] for p in hull], [p[1] for p in hull]) - 1e-9


@given(st.integers(1, 1 << 24), st.sampled_from([32, 96, 256, 512, 2048, 7168, 40000, 300000]))
def test_sampled_rows(rows, elements):
    sample = module.sample_rows(rows, elements)
    assert sample == sorted(set(sample)) and sample[0] >= 0 and sample[-1] < rows
    assert len(sample) == rows or len(sample) == 1 or len(sample) * elements > module.SAMPLE // 2
    assert len(sample) * elements <= max(module.SAMPLE_MOST, elements)
    number = len(sample)  # one in each of as many equal parts: 32 or more experts of 128 are seen
    assert all(i * rows // number <= row < (i + 1) * rows // number for i, row in enumerate(sample))


def test_the_sample_has_no_period():
    """512 experts of 512 rows: not the same row of each."""
    sample = module.sample_rows(512 * 512, 2048)
    assert len(sample) == 64 and len({row % 512 for row in sample}) > 50


# --- what is measured ------------------------------------------------------------------------------------------------


def test_errors_are_relative_and_weighted(folder, model, imatrix):
    """Against gguf-py: quantize, dequantize, sum."""
    plan = Plan(model).quantize("Q4_0", imatrix=imatrix, overrides=[("ffn|output|token", "copy")])
    _, largest = limits(plan)
    choices = {c.name: c for c in fitted(plan, size=largest - 1).choices}
    source, weights = small(), small().importance()
    eights = [name for name, c in choices.items() if c.type == "Q8_0"]
    assert eights
    for name in eights:
        x = source.values(name, source.tensors[name])
        kind = Q[model.tensors[name].type]  # the values as the file has them
        x = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind).astype(np.float64)
        y = gguf.quants.dequantize(gguf.quants.quantize(x.astype(np.float32), Q.Q8_0), Q.Q8_0)
        w = weights[name]
        assert choices[name].error == pytest.approx(((x - y) ** 2 * w).sum() / (x**2 * w).sum(), rel=1e-9)


def test_experts_are_measured_after_the_cut(folder):
    """NaN in an expert that is dropped does not matter; in one that stays it is an error of the tensor."""
    source = small(qm.Model)
    name = "blk.1.ffn_up_exps.weight"

    class OneBad(qm.Model):
        def values(self, what, shape):
            x = super().values(what, shape)
            if what == name:
                x[2] = np.nan
            return x

    source.__class__ = OneBad
    path, imatrix = source.write(folder / "nan.gguf"), str(source.write_imatrix(folder / "nan.imatrix"))
    with pgs.open(path) as model:
        for use in (None, imatrix):
            plan = Plan(model).keep_experts({0: [1, 3], 1: [0, 5]}).quantize("Q4_K_M", imatrix=use)
            assert fitted(plan, size=sum(limits(plan)) // 2).error > 0
        plan = Plan(model).keep_experts({0: [1, 3], 1: [0, 2]}).quantize("Q4_K_M")
        with pytest.raises(BadPlan) as error:
            fitted(plan, size=sum(limits(plan)) // 2)
        assert str(error.value) == f"{name}: a value that is not finite"


def test_importance_decides(folder, model, imatrix):
    plain, weighted = (Plan(model).quantize("Q4_K_M", imatrix=use) for use in (None, imatrix))
    size = sum(limits(plain)) // 2 + 2000  # the importance matrix has its keys in the header
    errors = [{c.name: c.error for c in fitted(plan, size=size).choices} for plan in (plain, weighted)]
    assert errors[0] != errors[1]


def test_types_that_need_importance_only_where_there_is_some(model, imatrix):
    needs = {"IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
    without = fitted(Plan(model).quantize("IQ3_M"), size=limits(Plan(model).quantize("IQ3_M"))[0])
    exempt = {"token_embd.weight", "output.weight"}  # as for llama-quantize, if ggml can
    assert {c.name for c in without.choices if c.type in needs} <= exempt
    assert not {c.type for c in without.choices} & {t.name for t in _core.types() if t.needs_importance}
    plan = Plan(model).quantize("IQ3_M", imatrix=imatrix)
    smallest = {c.name: c.type for c in fitted(plan, size=limits(plan)[0]).choices}
    assert smallest["blk.0.ffn_up_exps.weight"] == "IQ1_M"
    assert smallest["blk.0.ffn_down_exps.weight"] == "IQ4_NL"  # rows of 96


# --- which tensors ---------------------------------------------------------------------------------------------------


def test_what_the_caller_decides_stays_decided(model):
    given = [("attn_k", "Q5_1"), (r"blk\.1\.ffn_up", "copy")]
    plan = Plan(model).quantize("Q4_K_M", overrides=given, output_type="Q6_K", token_embedding_type="Q5_0")
    result = fitted(plan, size=sum(limits(plan)) // 2)
    types = {c.name: c.type for c in result.choices}
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q5_0"
    assert types["blk.0.attn_k.weight"] == "Q5_1"
    assert types["blk.1.ffn_up_exps.weight"] == model.tensors["blk.1.ffn_up_exps.weight"].type
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    taken = [name for name in types for pattern, _ in result.overrides if re.search(pattern, name)]
    assert len(taken) == len(set(taken)) and not {"output.weight", "token_embd.weight"} & set(taken)
    assert not any("attn_k" in name or name.startswith("blk.1.ffn_up") for name in taken)

    left = fitted(Plan(model).quantize("Q4_K_M", leave_output=True), size=1 << 40)
    assert {c.name: c.type for c in left.choices}["output.weight"] == model.tensors["output.weight"].type


def test_a_tied_embedding_follows_the_output_type(folder):
    m = qm.model("gemma", blocks=1, tied=True)
    qm.attention(m, 0)
    qm.ffn(m, 0)
    with pgs.open(m.write(folder / "tied.gguf")) as model:
        plan = Plan(model).quantize("Q4_K_M", output_type="Q5_0")
        result = fitted(plan, size=1 << 40)
        assert not any(re.search(pattern, "token_embd.weight") for pattern, _ in result.overrides)


def test_quantized_tensors_stay_unless_allowed(folder, model):
    path = folder / "mixed.gguf"
    Plan(model).quantize("COPY", overrides=[("attn_q", "Q6_K")]).write(path)
    with pgs.open(path) as mixed:
        plan = Plan(mixed).quantize("Q4_K_M")
        assert plan.check().blockers  # by itself
        result = fitted(plan, size=1 << 40)
        assert {c.name: c.type for c in result.choices}["blk.0.attn_q.weight"] == "Q6_K"
        assert (r"^blk\.[0-9]+\.attn_q\.weight$", "Q6_K") in result.overrides
        again = Plan(mixed).quantize("Q4_K_M", allow_requantize=True)
        types = {c.name: c.type for c in fitted(again, size=1 << 40).choices}
        assert types["blk.0.attn_q.weight"] == "Q8_0"
        _, largest = limits(again)
        choices = {c.name: c for c in fitted(again, size=largest - 1).choices}
        if choices["blk.0.attn_q.weight"].type == "Q6_K":
            assert choices["blk.0.attn_q.weight"].error == 0  # its own bytes


def test_rows_that_no_type_of_the_family_holds(folder):
    """40 elements: the file type's own choice, F16, stays."""
    m = small()
    m.add(0, attn_gate=(4, 40))
    with pgs.open(m.write(folder / "odd.gguf")) as model:
        plan = Plan(model).quantize("Q4_K_M")
        result = fitted(plan, size=limits(plan)[0] + 500)
        assert {c.name: c.type for c in result.choices}["blk.0.attn_gate.weight"] == "F16"
        assert not any(re.search(pattern, "blk.0.attn_gate.weight") for pattern, _ in result.overrides)


def test_the_largest_types(model):
    result = fitted(Plan(model).quantize("Q4_K_M"), size="1TB")
    assert result.notes == ["the largest types of the family fit"] and result.error == 0
    assert {c.type for c in result.choices} == {"Q8_0", "F32"}


# --- the overrides ---------------------------------------------------------------------------------------------------

# The part of a pattern that both Python's re and C++'s std::regex read alike.
PATTERN = re.compile(
    r"\^(blk\\\.([0-9]+|\([0-9]+(\|[0-9]+)+\)|\[0-9\]\+)\\\.)?"
    r"([^\\^$.*+?()\[\]{}|]|\\[\\^$.*+?()\[\]{}|])+\$"
)
LOCALS = ["attn_q.weight", "ffn_up_exps.weight", "ffn_up.weight", "a+b|c.weight", "output.weight"]
names = st.lists(
    st.builds(
        lambda layer, local: local if layer is None else f"blk.{layer}.{local}",
        st.none() | st.integers(0, 12),
        st.sampled_from(LOCALS),
    ),
    unique=True,
    min_size=1,
)


@given(names, st.data())
def test_patterns_match_their_tensors_and_no_others(names, data):
    types = {name: data.draw(st.sampled_from(["Q4_K", "Q8_0", "F16"])) for name in names if data.draw(st.booleans())}
    overrides = list(patterns(types, names))
    for pattern, _ in overrides:
        assert PATTERN.fullmatch(pattern)
    for name in names:
        assert [type for pattern, type in overrides if re.search(pattern, name)] == (
            [types[name]] if name in types else []
        )


def test_layers_share_a_pattern():
    names = [f"blk.{i}.{local}.weight" for i in range(12) for local in ("ffn_up", "ffn_down")] + ["output.weight"]
    types = {name: "Q4_K" for name in names}
    types["blk.11.ffn_down.weight"] = types["blk.2.ffn_down.weight"] = types["blk.10.ffn_down.weight"] = "Q6_K"
    types["output.weight"] = "Q8_0"
    assert list(patterns(types, names)) == [
        (r"^output\.weight$", "Q8_0"),
        (r"^blk\.[0-9]+\.ffn_up\.weight$", "Q4_K"),
        (r"^blk\.(0|1|3|4|5|6|7|8|9)\.ffn_down\.weight$", "Q4_K"),
        (r"^blk\.(2|10|11)\.ffn_down\.weight$", "Q6_K"),
    ]
    del types["blk.5.ffn_up.weight"]  # somebody else's
    assert (r"^blk\.(0|1|2|3|4|6|7|8|9|10|11)\.ffn_up\.weight$", "Q4_K") in list(patterns(types, names))


@pytest.mark.parity
@pytest.mark.parametrize("type, number", [("Q4_K_M", 15), ("IQ3_M", 27), ("MXFP4_MOE", 38)])
def test_llama_quantize_takes_the_overrides(folder, model, imatrix, type, number):
    from support import llama_oracle

    llama = llama_oracle.load()
    plan = Plan(model).quantize(type, imatrix=imatrix)
    result = fitted(plan, size=sum(limits(plan)) // 2)
    pairs = [llama.llama_model_tensor_override(pattern.encode(), int(Q[type])) for pattern, type in result.overrides]
    pairs.append(llama.llama_model_tensor_override(None, 42))
    array = (llama.llama_model_tensor_override * len(pairs))(*pairs)
    theirs, ours = folder / f"llama-{type}.gguf", folder / f"ours-{type}.gguf"
    llama_oracle.quantize(llama, model.path, theirs, number, imatrix=small().importance(), tt_overrides=array)
    plan.fit(size=sum(limits(plan)) // 2).write(ours)
    llama_oracle.assert_same_tensors(ours, theirs)


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_families():
    for type, family in [
        *FAMILIES,
        ("Q2_K_S", "K"),
        ("Q6_K", "K"),
        ("iq1_s", "IQ"),
        ("IQ4_NL", "IQ"),
        ("Q5_1", "legacy"),
        ("Q8_0", "Q8_0"),
        ("MXFP4", "MXFP4"),
    ]:
        assert ladder(type) == LADDERS[family]
    for type in ("F16", "BF16", "F32", "COPY", "TQ1_0", "Q1_0", "Q2_0"):
        with pytest.raises(BadPlan) as error:
            ladder(type)
        assert str(error.value) == (
            f"{type}: no family of types to choose from (expected a file type such as Q4_K_M, "
            "IQ3_M, Q4_0, MXFP4_MOE or Q8_0)"
        )


@pytest.mark.parametrize(
    "target, message",
    [
        ({}, 'fit: give a size or bits per weight (found neither); size="22GB" or bpw=4.2'),
        ({"size": 1, "bpw": 1}, 'fit: give a size or bits per weight (found both); size="22GB" or bpw=4.2'),
        ({"size": "22 gallons"}, "22 gallons: not a size (expected bytes, or text such as 512MiB or 2GB)"),
        ({"size": 0}, "size: not a size (found 0, expected above 0)"),
        ({"bpw": 0}, "bpw: not a number of bits (found 0, expected such as 4.2)"),
        ({"bpw": "4.2"}, "bpw: not a number of bits (found '4.2', expected such as 4.2)"),
        ({"bpw": float("nan")}, "bpw: not a number of bits (found nan, expected such as 4.2)"),
    ],
)
def test_what_is_no_target(model, target, message):
    with pytest.raises(BadPlan) as error:
        Plan(model).quantize("Q4_K_M").fit(**target)
    assert str(error.value) == message


def test_a_second_fit_finds_nothing_to_choose(model):
    with pytest.raises(BadPlan, match="nothing to choose: overrides and options decide every tensor"):
        Plan(model).quantize("Q4_0").fit(size="1GB").fit(bpw=0.5)


def test_a_size_in_text_needs_its_unit(model):
    plan = Plan(model).quantize("Q4_0")
    with pytest.raises(BadPlan, match="give a unit, such as 14GB"):
        plan.fit(size="14")
    with pytest.raises(BadPlan, match="even the smallest"):  # a number is meant as it is
        plan.fit(size=14)


def test_too_small_names_the_smallest_size(model):
    plan = Plan(model).quantize("Q4_0")
    smallest, _ = limits(plan)
    with pytest.raises(BadPlan) as error:
        plan.fit(size=smallest - 1)
    assert error.value.problem == "even the smallest types are too large"
    assert error.value.found.startswith(f"{smallest} bytes (")
    assert error.value.hint == "the family is Q4_0, Q4_1, Q5_0, Q5_1, Q8_0"
    with pytest.raises(BadPlan) as error:
        plan.fit(bpw=0.5)
    bits = float(error.value.found.removesuffix(" bits per weight"))
    assert plan.fit(bpw=bits).check().file_bytes == smallest


def test_too_small_names_the_types_that_need_an_importance_matrix(model, imatrix):
    for use, more in ((None, "; IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS need an importance matrix"), (imatrix, "")):
        with pytest.raises(BadPlan) as error:
            Plan(model).quantize("IQ2_M", imatrix=use).fit(bpw=0.5)
        assert error.value.hint == (
            f"the family is IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ4_XS, Q5_K, Q6_K, Q8_0{more}"
        )


def test_a_plan_that_does_not_quantize(model):
    with pytest.raises(BadPlan, match="the plan does not quantize"):
        Plan(model).fit(size="1GB")


def test_a_plan_with_blockers_raises_the_first(model):
    with pytest.raises(BadPlan, match="an override that matches no tensor"):
        Plan(model).quantize("Q4_K_M", overrides=[("nothing_like_it", "Q8_0")]).fit(size="1GB")
    with pytest.raises(BadPlan, match="needs an importance matrix"):
        Plan(model).quantize("Q4_K_M", overrides=[("attn_q", "IQ2_XS")]).fit(size="1GB")


def test_progress_counts_and_cancels(model):
    plan = Plan(model).quantize("Q4_0")
    size = sum(limits(plan)) // 2
    seen = []
    plan.fit(size=size, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(seen[-1][1] + 1)) and seen[-1][1] == 16

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.fit(size=size, progress=stop)


# --- on a trained model ----------------------------------------------------------------------------------------------


def test_a_trained_model_gets_less_error_than_from_the_mixture(monkeypatch):
    """At the size of Q2_K, the sum that fit() minimises, for both. A smaller sample, to be quick."""
    monkeypatch.setattr(module, "SAMPLE", 1 << 14)
    path, weights = SHARED / "models" / "tiny-qwen3next-bf16.gguf", SHARED / "models" / "imatrix.gguf"
    if not path.exists() or not weights.exists():
        pytest.skip("the trained model is not here")
    with pgs.open(path) as model, pgs.imatrix.open(weights) as opened:
        plan = Plan(model).quantize("Q2_K", imatrix=str(weights))
        mixture = plan.check()
        result = fitted(plan, size=mixture.file_bytes)
        assert 0.97 * mixture.file_bytes < result.file_bytes <= mixture.file_bytes
        errors = 0.0
        for t in mixture.tensors:
            if t.type != t.source_type:
                one = module._Tensor(t, t.importance, [], [])
                errors += module._error(one, *module._sample(model, one, opened, 0), t.type, 0)
        assert result.error < 0.8 * errors
