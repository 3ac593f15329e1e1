"""Recipes as TOML files: what is read, what is refused and how, and what the shipped ones do to which tensors."""

import re

import gguf
import pytest

import pygguf_surgery as pgs
from pygguf_surgery import BadPlan, Plan
from pygguf_surgery.architecture.names import role_of
from pygguf_surgery.recipes.recipe import Override, Recipe, load, shipped
from support import moe_models
from support import quant_models as qm

FULL = r"""
description = "all keys"
type = "q4_k_m"
pure = false
output_type = "q6_k"
token_embedding_type = "Q8_0"
leave_output = true
allow_requantize = true
max_size = "110GB"
[[override]]
pattern = 'attn_\w'
type = "COPY"
reason = "few"
optional = true
[[override]]
pattern = "ffn"
type = "mxfp4"
"""


def write(folder, text, name="my.toml"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- what is read ----------------------------------------------------------------------------------------------------


def test_all_keys(tmp_path):
    path = str(write(tmp_path, FULL))
    assert load(path) == Recipe(
        name=path,
        description="all keys",
        type="Q4_K_M",
        pure=False,
        overrides=(Override(r"attn_\w", "copy", "few", True), Override("ffn", "MXFP4", "", False)),
        output_type="Q6_K",
        token_embedding_type="Q8_0",
        leave_output=True,
        allow_requantize=True,
        max_bytes=110_000_000_000,
    )


def test_no_keys(tmp_path):
    path = str(write(tmp_path, ""))
    assert load(path) == Recipe(name=path)


def test_a_path_is_what_looks_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "type = 'Q8_0'", "mxfp4-moe")
    assert load("mxfp4-moe").type == "MXFP4_MOE"  # a shipped one
    assert load("./mxfp4-moe").type == load(path).type == "Q8_0"
    write(tmp_path, "type = 'Q8_0'", "here.toml")
    assert load("here.toml").type == "Q8_0"
    for missing in ("no/such", "nothing.toml"):
        with pytest.raises(FileNotFoundError):
            load(missing)


def test_a_plain_type(tmp_path):
    assert load(write(tmp_path, "type = 'NVFP4'\npure = true")).type == "NVFP4"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("typ = 'Q8_0'", "typ: unknown key (expected description, type, pure, output_type, token_embedding_type, "),
        (
            "[[override]]\npattern = 'a'\ntype = 'Q8_0'\nwhy = ''",
            "override 1: why: unknown key (expected pattern, type, reason, optional)",
        ),
        ("pure = 1", "pure: not true or false (found a whole number)"),
        ("type = 4", "type: not text (found a whole number)"),
        ("description = ['a']", "description: not text (found a list)"),
        ("override = 'attn=copy'", "override: not a list (found text); [[override]]"),
        ("override = ['attn=copy']", "override 1: not a table (found text); [[override]]"),
        ("[override]\npattern = 'a'", "override: not a list (found a table); [[override]]"),
        ("[[override]]\npattern = 'a'", "override 1: type: missing key"),
        ("[[override]]\npattern = 'a'\ntype = 'copy'\n[[override]]\ntype = 'copy'", "override 2: pattern: missing key"),
        (
            "[[override]]\npattern = 'a('\ntype = 'copy'",
            "override 1: pattern: not a regular expression: missing ), unterminated subpattern at position 1 "
            "(found a()",
        ),
        (
            "[[override]]\npattern = 'a'\ntype = 'Q4_K_M'",
            "override 1: type: unknown type (found Q4_K_M); nearest: Q4_K, Q6_K, Q5_K",
        ),
        (
            "[[override]]\npattern = 'a'\ntype = 'Q8_K'",
            "override 1: type: ggml does not quantize to this type (found Q8_K); nearest: Q8_0, Q6_K, Q5_K",
        ),
        ("output_type = 'copy'", "output_type: unknown type (found copy); nearest: "),
        ("output_type = ''", "output_type: unknown type (found ); nearest: "),
        ("token_embedding_type = 'Q9_0'", "token_embedding_type: unknown type (found Q9_0); nearest: "),
        ("type = 'Q4_K_X'", "type: unknown file type (found Q4_K_X); nearest: "),
        ("type = 'MXFP4'", "type: a ggml type, not a file type (found MXFP4); pure=True (--pure) gives it, "),
        (
            "max_size = '9 gallons'",
            "max_size: not a size (found 9 gallons, expected bytes, or text such as 512MiB or 2GB)",
        ),
        ("max_size = 110", "max_size: not text (found a whole number)"),
        ("max_size = '0GB'", "max_size: no file is that small (found 0GB)"),
        ("type = 'Q8_0'\npure = \n", "line 2: not TOML: Invalid value (at line 2, "),
        ("type = 'Q8_0'\ntype = 'Q8_0'\n", "line 2: not TOML: Cannot overwrite a value (at line 2, "),
        ("type = 'Q8_0", "not TOML: "),  # at the end of the document
        (b"type = '\xff'", "not UTF-8 (at byte 8)"),
    ],
)
def test_exact_messages(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(BadPlan) as error:
        load(path)
    start = f"{path}: {message}"
    assert str(error.value)[: len(start)] == start and (str(error.value) == start or message.endswith((": ", ", ")))
    assert error.value.path == str(path)


def test_nested_too_deep(tmp_path):
    path = write(tmp_path, "x = " + "[" * 100_000)
    with pytest.raises(BadPlan, match="not TOML"):
        load(path)


def test_an_unknown_name():
    with pytest.raises(BadPlan) as error:
        load("mxfp4_moe")
    assert str(error.value) == (
        "mxfp4_moe: no such recipe (expected attention-bf16, mxfp4-moe, spark-128g); a file is "
        "named by a path with a / in it or that ends in .toml"
    )


# --- in a plan -------------------------------------------------------------------------------------------------------


def test_a_plan_from_a_recipe(tmp_path):
    with pgs.open(moe_models.qwen3moe(tmp_path / "m.gguf")) as model:
        path = write(
            tmp_path,
            "type = 'Q8_0'\n[[override]]\npattern = 'attn_q'\ntype = 'copy'\n"
            "[[override]]\npattern = 'nothing'\ntype = 'copy'\noptional = true",
        )
        plan = Plan(model).recipe(path, overrides=[("attn_k", "F32")])
        assert plan == Plan(model).quantize("Q8_0", overrides=[("attn_k", "F32"), ("attn_q", "copy")])
        assert Plan(model).recipe(path, type="MXFP4_MOE").data.edits[0].type == "MXFP4_MOE"
        path = write(tmp_path, "type = 'Q8_0'\n[[override]]\npattern = 'nothing'\ntype = 'copy'")
        assert [e.problem for e in Plan(model).recipe(path).check().blockers] == ["an override that matches no tensor"]


def test_max_size_is_a_blocker(tmp_path):
    with pgs.open(moe_models.qwen3moe(tmp_path / "m.gguf")) as model:
        path = write(tmp_path, "type = 'Q8_0'\nmax_size = '10kB'")
        (blocker,) = Plan(model).recipe(path).check().blockers
        assert blocker.object == "max_size" and blocker.expected == "at most 9.77 KiB"
        assert not Plan(model).recipe(write(tmp_path, "type = 'Q8_0'\nmax_size = '1GB'")).check().blockers


# --- the shipped ones ------------------------------------------------------------------------------------------------


def test_shipped():
    assert shipped() == ["attention-bf16", "mxfp4-moe", "spark-128g"]
    for name in shipped():
        recipe = load(name)
        assert recipe.name == name and recipe.description and recipe.type == "MXFP4_MOE"
        assert all(override.reason for override in recipe.overrides)


def known_names():
    """All names of tensors that gguf-py knows, in block 3 where they have one."""
    for name in gguf.TENSOR_NAMES.values():
        yield name.format(bid=3, xid=0) + ".weight"


def first(recipe, name):
    return next((o.type for o in recipe.overrides if re.search(o.pattern, name)), None)


def test_attention_bf16_knows_all_attention_ssm_and_shared_experts():
    recipe = load("attention-bf16")
    names = list(known_names())
    assert len(names) > 300
    for name in names:
        # Heads for audio and images are other models' files; their blocks are not called blk.
        role = role_of(name)
        if "blk.3." in name and role in ("attention", "ssm", "shared_expert"):
            assert first(recipe, name) == "copy", name
        elif role in ("expert", "ffn", "embedding", "output", "router"):
            assert first(recipe, name) is None, name
    assert first(recipe, "blk.46.nextn.eh_proj.weight") == "copy"
    assert first(recipe, "blk.46.attn_q.weight") == "copy"
    assert first(recipe, "blk.46.ffn_up_exps.weight") is None


@pytest.mark.parametrize("architecture", [name for name in moe_models.ALL if name != "nvfp4_scales"])
@pytest.mark.parametrize("name", ["attention-bf16", "mxfp4-moe", "spark-128g"])
def test_shipped_recipes_on_all_architectures(tmp_path, name, architecture):
    with pgs.open(moe_models.ALL[architecture](tmp_path / "m.gguf")) as model:
        checked = Plan(model).recipe(name).check()
        assert not checked.blockers
        for t in checked.tensors:
            source = model.tensors[t.name]
            quantized = t.type != source.type
            if t.role in ("norm", "router") or len(t.shape) < 2:
                assert not quantized
            elif t.role == "expert" and t.name.endswith("exps.weight"):
                assert t.type == ("F16" if t.shape[-1] % 32 else "MXFP4")
            elif name == "attention-bf16" and t.role in ("attention", "ssm", "shared_expert"):
                assert not quantized
            elif quantized and t.shape[-1] % 32 == 0:
                assert t.type == "Q8_0", t.name


def test_attention_bf16_with_another_base(tmp_path):
    with pgs.open(qm.qwen3next().write(tmp_path / "m.gguf")) as model:
        mixture = {t.name: t.type for t in Plan(model).quantize("Q5_K_M").check().tensors}
        for t in Plan(model).recipe("attention-bf16", type="Q5_K_M").check().tensors:
            copied = t.role in ("attention", "ssm", "shared_expert", "norm", "router") or "nextn" in t.name
            assert (t.type == t.source_type) if copied else t.type.startswith("Q"), t.name
            if t.name == "output.weight":
                assert t.type == mixture[t.name]


def test_mxfp4_moe_is_llama_quantizes_but_for_mla(tmp_path):
    for build in (qm.qwen3next, qm.deepseek2):
        with pgs.open(build().write(tmp_path / f"{build.__name__}.gguf")) as model:
            plain = {t.name: t.type for t in Plan(model).quantize("MXFP4_MOE").check().tensors}
            recipe = {t.name: t.type for t in Plan(model).recipe("mxfp4-moe").check().tensors}
            different = {name for name in plain if plain[name] != recipe[name]}
            assert {recipe[name] for name in different} <= {"Q8_0"}
            assert all(re.search(r"attn_[kv]_b\.weight$", name) for name in different)
            assert bool(different) == (build is qm.deepseek2)


@pytest.mark.parametrize(
    "text",
    [
        "type = " + "9" * 5000,
        "[[override]]\ntype = 'copy'\npattern = '" + "(" * 3000 + "'",
        "[[override]]\ntype = 'copy'\npattern = 'a{99999999999}'",
    ],
)
def test_numbers_and_patterns_too_large_for_python(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(BadPlan) as caught:
        load(path)
    assert caught.value.path == str(path)
