"""The shell in the place of llama-quantize: its arguments, options and messages, and the plan that comes of them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shlex

import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery import Plan, _core, imatrix
from pygguf_surgery.base.errors import BadFile, BadPlan, SourceChanged, SurgeryError
from pygguf_surgery.cli import main
from support import quant_models as qm

EXPERTS = 8


def small():
    m = qm.model("llama", blocks=3, heads=8, key_heads=4, experts=EXPERTS)
    for i in range(3):
        qm.attention(m, i)
        qm.moe(m, i, EXPERTS)
    m.metadata["general.size_label"] = ("8x1M", qm.T.STRING)
    return m


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama_quantize")
    small().write(folder / "in.gguf")
    small().write_imatrix(folder / "imatrix.gguf")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """run("in.gguf out.gguf Q4_0 --pure") in a folder of its own -> (exit code, stdout, stderr)"""
    monkeypatch.chdir(tmp_path)
    for name in ("in.gguf", "imatrix.gguf"):
        os.link(folder / name, name)

    def call(arguments, command="quantize"):
        code = main([command, *shlex.split(arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def good(result):
    code, out, err = result
    assert code == 0, err
    return out


def types(path):
    with pgs.open(path) as model:
        return {name: t.type for name, t in model.tensors.items()}


def metadata(path):
    with pgs.open(path) as model:
        return model.metadata.exact()


def expected(path, type, **options):
    with pgs.open("in.gguf") as model:
        Plan(model).quantize(type, **options).write(path)
    with open(path, "rb") as file:
        return file.read()


def contents(path):
    with open(path, "rb") as file:
        return file.read()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, output",
    [
        ("in.gguf out.gguf Q4_K_M", "out.gguf"),
        ("in.gguf out.gguf q4_k_m 2", "out.gguf"),
        ("in.gguf out.gguf 15", "out.gguf"),
        ("in.gguf out.gguf Q4_K 0", "out.gguf"),
        ("in.gguf Q4_K_M", "ggml-model-Q4_K_M.gguf"),
        ("in.gguf q4_k_m 1", "ggml-model-Q4_K_M.gguf"),
        ("--imatrix imatrix.gguf in.gguf out.gguf Q4_K_M", "out.gguf"),
        ("in.gguf out.gguf Q4_K_M 1 --imatrix imatrix.gguf", "out.gguf"),
        ("in.gguf --imatrix imatrix.gguf out.gguf --max-buffer-size 100 Q4_K_M", "out.gguf"),
        ("--imatrix=imatrix.gguf --max-buffer-size 1 in.gguf out.gguf Q4_K_M", "out.gguf"),
    ],
)
def test_arguments_as_llama_quantize_takes_them(run, arguments, output):
    good(run(arguments))
    use = "imatrix.gguf" if "imatrix" in arguments else None
    assert contents(output) == expected("expected.gguf", "Q4_K_M", imatrix=use)


def test_the_output_is_named_as_llama_quantize_names_it(run):
    """By the first of its names with the number: 15 is Q4_K, an alias that comes before Q4_K_M."""
    os.mkdir("sub")
    os.link("in.gguf", "sub/in.gguf")
    for arguments, name in (
        ("sub/in.gguf 15", "sub/ggml-model-Q4_K.gguf"),
        ("in.gguf COPY", "ggml-model-COPY.gguf"),
        ("in.gguf 2", "ggml-model-Q4_0.gguf"),
        ("in.gguf iq4_nl", "ggml-model-IQ4_NL.gguf"),
    ):
        good(run(arguments))
        assert os.path.exists(name)


@pytest.mark.parametrize(
    "arguments", ["in.gguf Q4_K_M --dry-run", "in.gguf out.gguf Q4_K_M --dry-run", "--dry-run --json in.gguf 15"]
)
def test_a_dry_run_writes_nothing(run, arguments):
    before = sorted(os.listdir())
    out = good(run(arguments))
    assert sorted(os.listdir()) == before
    if "--json" in arguments:
        plan = json.loads(out)
        expected("expected.gguf", "Q4_K_M")
        assert {t["name"]: t["type"] for t in plan["tensors"]} == types("expected.gguf")
        assert plan["file_bytes"] == os.path.getsize("expected.gguf") and plan["blockers"] == []


def test_help_says_what_differs(run):
    for option in ("-h", "--help", "in.gguf -h"):
        text = re.sub(r"\s+", " ", re.sub(r"-\n\s+", "-", good(run(option))))
        for words in (
            "an existing output needs --force",
            "one that matches nothing is an error",
            "for token_embd too",
            "unlike in llama-quantize everything that counts layers follows",
            "an existing key keeps its type",
            "where llama-quantize takes IQ2_XS",
        ):
            assert words in text, words
    code, _, err = run("in.gguf out.gguf Q4_0 -x")
    assert code == 2 and "unrecognized arguments: -x" in err


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ("in.gguf out.gguf Q4_K_X", 4, "Q4_K_X: unknown file type; nearest: Q4_K_S, Q4_K_M, Q4_K"),
        ("in.gguf Q4_KM", 4, "Q4_KM: unknown file type; nearest: Q4_K_M, Q4_K, Q5_K_M"),
        ("in.gguf out.gguf Q4_0 many", 2, "quantize takes IN [OUT] TYPE [THREADS]"),
        ("in.gguf out.gguf Q4_0 2 --threads 2", 2, "quantize takes IN [OUT] TYPE [THREADS]"),
        ("in.gguf out.gguf", 2, "quantize needs a TYPE, such as Q4_K_M, or --recipe"),
        ("in.gguf out.gguf Q4_0 --max-buffer-size 0", 2, "--max-buffer-size takes a number of MiB"),
        ("in.gguf in.gguf Q4_0 --force", 4, "in.gguf: the output is one of the inputs; write to another file"),
        ("in.gguf imatrix.gguf Q4_0", 4, "imatrix.gguf: exists already; --force replaces it"),
        # unmatched override
        (
            "in.gguf out.gguf Q4_0 --tensor-type attn_z=Q8_0",
            4,
            "attn_z: an override that matches no tensor; patterns are Python's re.search and case-sensitive",
        ),
        (
            "in.gguf out.gguf Q4_0 --tensor-type ATTN_Q=Q8_0",
            4,
            "ATTN_Q: an override that matches no tensor; patterns are Python's re.search and case-sensitive",
        ),
        ("in.gguf out.gguf Q4_0 --tensor-type attn_q=Q4_K_M", 4, "Q4_K_M: unknown type; nearest: Q4_K, Q6_K, Q5_K"),
        ("in.gguf out.gguf Q4_0 --output-tensor-type Q9_0", 4, "Q9_0: unknown type; nearest: Q8_0, Q5_0, Q4_0"),
        # no importance matrix where one is needed
        (
            "in.gguf out.gguf IQ2_XS",
            4,
            "blk.0.attn_q.weight: IQ2_XS needs an importance matrix (and 11 more tensors); "
            "imatrix= (--imatrix) gives one",
        ),
        (
            "in.gguf out.gguf Q4_0 --tensor-type attn_v=IQ1_M --imatrix imatrix.gguf --exclude-weights attn_v",
            4,
            "blk.0.attn_v.weight: IQ1_M needs an importance matrix (and 2 more tensors); the one given has no "
            "entry for it; imatrix_missing= (--imatrix-missing) says what to do then",
        ),
        # missing expert data
        (
            "in.gguf out.gguf Q4_0 --imatrix imatrix.gguf --include-weights blk.0.ffn_up_exps --imatrix-missing fail",
            4,
            "{imatrix}: blk.0.ffn_up_exps.weight: experts never seen (found experts 1); "
            "imatrix_missing= (--imatrix-missing) ones or layer-mean",
        ),
    ],
)
def test_exact_messages(run, arguments, code, message):
    found, out, err = run(arguments)
    message = message.format(imatrix=os.path.abspath("imatrix.gguf"))
    assert found == code and out == ""
    assert f"gguf-surgery: error: {message}" in err.splitlines(), err
    assert not os.path.exists("out.gguf")


def test_encoding_again_exactly(run):
    good(run("in.gguf q.gguf Q4_0"))
    code, _, err = run("q.gguf out.gguf Q5_0")
    assert code == 4 and err == (
        "gguf-surgery: error: token_embd.weight: already quantized (and 15 more tensors) (found Q4_0); "
        "allow_requantize=True (--allow-requantize) decodes and encodes it again, at a loss; or override it with "
        '"copy"\n'
    )
    good(run("--allow-requantize q.gguf out.gguf Q5_0"))


def test_an_unfit_importance_matrix_exactly(run):
    with pgs.open("in.gguf") as model:
        Plan(model).keep_experts({i: [0, 1, 2, 3] for i in range(3)}).write("cut.gguf")
    code, _, err = run("cut.gguf out.gguf Q4_0 --imatrix imatrix.gguf --include-weights blk.1.ffn_up")
    assert code == 4 and err == (
        f"gguf-surgery: error: {os.path.abspath('imatrix.gguf')}: blk.1.ffn_up_exps.weight: importance of another size "
        f"(found {EXPERTS * qm.D}, expected {4 * qm.D}); exclude_weights= (--exclude-weights) blk.1.ffn_up_exps.weight "
        "leaves it out\n"
    )


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, type, options",
    [
        (
            "--output-tensor-type q5_k --token-embedding-type f16 {} Q4_0",
            "Q4_0",
            dict(output_type="Q5_K", token_embedding_type="F16"),
        ),
        ("{} Q4_0 --leave-output-tensor", "Q4_0", dict(leave_output=True)),
        ("{} --pure Q6_K", "Q6_K", dict(pure=True)),
        (
            "{} Q3_K_M --tensor-type attn_q=q8_0 --tensor-type 'ffn_(up|gate)_exps=Q5_K'",
            "Q3_K_M",
            dict(overrides=[("attn_q", "Q8_0"), ("ffn_(up|gate)_exps", "Q5_K")]),
        ),
        ("{} F16 --tensor-type attn_v=q8_0", "F16", dict(overrides=[("attn_v", "Q8_0")])),
        (
            "{} IQ4_XS --imatrix imatrix.gguf --include-weights ffn_up --include-weights attn_v",
            "IQ4_XS",
            dict(imatrix="imatrix.gguf", include_weights=["ffn_up", "attn_v"]),
        ),
        (
            "{} IQ4_XS --imatrix imatrix.gguf --exclude-weights ffn_up --exclude-weights attn_v",
            "IQ4_XS",
            dict(imatrix="imatrix.gguf", exclude_weights=["ffn_up", "attn_v"]),
        ),
        (
            "{} IQ2_S --imatrix imatrix.gguf --imatrix-missing layer-mean",
            "IQ2_S",
            dict(imatrix="imatrix.gguf", imatrix_missing="layer-mean"),
        ),
    ],
)
def test_options_are_the_arguments_of_a_plan(run, arguments, type, options):
    good(run(arguments.format("in.gguf out.gguf")))
    assert contents("out.gguf") == expected("expected.gguf", type, **options)


def test_a_file_of_overrides(run):
    with open("types.txt", "w") as file:
        file.write("attn_q=q8_0\n  ffn_down_exps=Q6_K blk\\.1\\.attn_v=F16\n\n")
    good(run("in.gguf out.gguf Q4_0 --tensor-type-file types.txt --tensor-type 'blk.0.attn_q=q5_0'"))
    found = types("out.gguf")
    assert [found[f"blk.{i}.attn_q.weight"] for i in range(3)] == ["Q5_0", "Q8_0", "Q8_0"]
    assert found["blk.1.attn_v.weight"] == "F16" and found["blk.2.ffn_down_exps.weight"] == "Q6_K"
    with open("types.txt", "w") as file:
        file.write("attn_q")
    code, _, err = run("in.gguf out.gguf Q4_0 --tensor-type-file types.txt --force")
    assert code == 2 and err == "gguf-surgery: error: types.txt: 'attn_q' is not REGEX=TYPE\n"


def test_override_kv(run):
    text = "x" * 300
    good(
        run(
            f"in.gguf out.gguf Q8_0 --override-kv a.n=int:-7 --override-kv a.s=str:{text} --override-kv a.b=bool:true "
            "--override-kv a.f=float:-1.5 --override-kv a.u=int:7 --override-kv a.w=int:5000000000 "
            "--override-kv general.size_label=str:a=b:c --override-kv llama.context_length=int:512"
        )
    )
    found = metadata("out.gguf")
    for key, value, kind in (
        ("a.n", -7, "i32"),
        ("a.s", text, "str"),
        ("a.b", True, "bool"),
        ("a.f", -1.5, "f32"),
        ("a.u", 7, "u32"),
        ("a.w", 5000000000, "u64"),
        ("general.size_label", "a=b:c", "str"),
        ("llama.context_length", 512, "u32"),
    ):
        assert found[key] == pgs.Value(value, kind), key
    for wrong in ("int:-5", "float:4096", "str:4096", "bool:true"):  # the key is a u32
        code, _, err = run(f"in.gguf no.gguf Q8_0 --override-kv llama.context_length={wrong}")
        assert code == 4 and "the value does not fit the key's type" in err


def test_metadata_of_an_importance_matrix(run):
    good(run("in.gguf out.gguf Q4_K_M --imatrix ./imatrix.gguf --exclude-weights blk.0.attn"))
    found = {
        key: value.value
        for key, value in metadata("out.gguf").items()
        if key.startswith("quantize.") or key in ("general.file_type", "general.quantization_version")
    }
    assert found == {
        "general.file_type": 15,
        "general.quantization_version": 2,
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "a.txt",
        "quantize.imatrix.entries_count": 3 * 8 - 4,
        "quantize.imatrix.chunks_count": 7,
    }


def test_keep_split_and_back(run):
    good(run("in.gguf in --split-max-tensors 9", "split"))
    shards = sorted(name for name in os.listdir() if "-of-" in name)
    assert len(shards) > 2 and shards[0] == f"in-00001-of-0000{len(shards)}.gguf"
    good(run(f"--keep-split {shards[1]} out.gguf Q4_K_M"))  # any shard names them all
    good(run(f"{shards[0]} --keep-split Q4_K_M"))
    for one, two in zip(shards, [name.replace("in-", "ggml-model-Q4_K_M-") for name in shards], strict=True):
        assert contents(one.replace("in-", "out-")) == contents(two)
        assert names_in(one) == names_in(two)
    good(run(f"{shards[0]} one.gguf Q4_K_M"))  # without it, one file
    good(run(f"out-00001-of-0000{len(shards)}.gguf joined.gguf", "join"))
    assert types("joined.gguf") == types("one.gguf")


def names_in(shard):
    return [t.name for t in _core.read_header(_core.Source(shard)).tensors]


@pytest.mark.parametrize("command", ["quantize", "prune"])
def test_the_printed_options_give_the_types_of_a_target_again(run, command):
    keep = "" if command == "quantize" else "--keep 4"
    options = f"{keep} --imatrix imatrix.gguf --override attn_k=copy"
    type = "Q4_K_M" if command == "quantize" else "--type Q4_K_M"
    code, _, err = run(f"in.gguf out.gguf {type} {options} --target-bpw 9", command)
    assert code == 0
    printed = " ".join(re.findall(r"^  (--tensor-type .*)$", err, re.MULTILINE))
    assert printed.count("--tensor-type") > 3 and "attn_k" not in printed
    good(run(f"in.gguf again.gguf {type} {options} {printed}", command))
    assert contents("again.gguf") == contents("out.gguf")
    with pgs.open("out.gguf") as model:
        assert 8 * sum(t.nbytes for t in model.tensors.values()) <= 9 * sum(t.elements for t in model.tensors.values())


def test_layers_with_an_importance_matrix(run):
    good(run("in.gguf out.gguf IQ2_S --imatrix imatrix.gguf --prune-layers 1"))
    with pgs.open("in.gguf") as model:
        Plan(model).prune_layers([1]).write("cut.gguf")
    with imatrix.open("imatrix.gguf") as m:
        entries = {
            name.replace("blk.2.", "blk.1."): (m.sums(name), m.entries[name].counts)
            for name in m.entries
            if not name.startswith("blk.1.")
        }
        imatrix.write(
            "cut.imatrix.gguf", entries, datasets=m.datasets, chunk_count=m.chunk_count, chunk_size=m.chunk_size
        )
    good(run("cut.gguf expected.gguf IQ2_S --imatrix cut.imatrix.gguf"))
    with pgs.open("out.gguf") as one, pgs.open("expected.gguf") as two:
        assert list(one.tensors) == list(two.tensors)
        for name, t in one.tensors.items():
            assert t.type == two.tensors[name].type and np.array_equal(t.bytes(), two.tensors[name].bytes()), name


def test_an_architecture_that_llama_cpp_does_not_know(run):
    m = small()
    m.metadata = {key.replace("llama.", "unheard."): value for key, value in m.metadata.items()}
    m.architecture = "unheard"
    m.write("unheard.gguf")
    good(run("unheard.gguf out.gguf Q8_0"))
    assert types("out.gguf")["blk.2.ffn_up_exps.weight"] == "Q8_0"


# --- overrides of what a plan drops -----------------------------------------------------------------------------------


def test_an_override_of_a_dropped_layer_is_said_and_no_error(run):
    with pgs.open("in.gguf") as model:
        plan = Plan(model).prune_layers([0]).quantize("Q4_0", overrides=[(r"blk\.2\.attn_q", "Q8_0")])
        assert [b.problem for b in plan.check().blockers] == ["an override that matches no tensor"]  # it is blk.1 now
        plan = Plan(model).prune_layers([2]).quantize("Q4_0", overrides=[(r"blk\.2\.attn_(q|k)", "Q8_0")])
        checked = plan.check()
        assert checked.blockers == []
        assert r"override blk\.2\.attn_(q|k)=Q8_0: no tensor, the plan drops the 2 that it matches" in checked.warnings


# --- plans as data ----------------------------------------------------------------------------------------------------


def everything(model):
    return (
        Plan(model)
        .keep_experts({i: [0, 2, 3, 7] for i in range(3)})
        .prune_layers([1])
        .quantize(
            "IQ3_M",
            imatrix="imatrix.gguf",
            imatrix_missing="layer-mean",
            exclude_weights=["attn_k"],
            overrides=[("attn_q", "Q8_0"), ("attn_v", "copy")],
            output_type="Q5_K",
            token_embedding_type="Q4_0",
            allow_requantize=True,
        )
        .split(max_size="20kB", first_empty=True)
    )


def test_json_and_pickle_keep_all_edits(run):
    with pgs.open("in.gguf") as model:
        plan = everything(model)
        twins = [Plan.from_json(plan.to_json()), pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)]
        one = plan.write("one.gguf")
        assert len(one.paths) > 2
        for i, twin in enumerate(twins):
            assert twin == plan and twin.to_json() == plan.to_json()
            paths = twin.write(f"twin{i}.gguf").paths
            assert [contents(path) for path in paths] == [contents(path) for path in one.paths]
        for plan in (
            Plan(model).recipe("spark-128g"),
            Plan(model).quantize("Q4_K_M").fit(bpw=9),
            Plan(model).split(max_tensors=5),
            Plan(model).split(keep=True),
            Plan(model).quantize("Q8_0", pure=True, leave_output=True),
        ):
            assert Plan.from_json(plan.to_json(), model) == pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize("change", ["replaced", "removed", "another"])
def test_an_importance_matrix_that_changes_after_the_plan(run, change):
    with pgs.open("in.gguf") as model:
        plan = everything(model)
        os.remove("imatrix.gguf")
        if change == "replaced":  # the same names, sizes and counts
            other = small()
            other.values = lambda name, shape: qm.Model.values(other, "other " + name, shape)
            other.write_imatrix("imatrix.gguf")
        elif change == "another":
            os.link("in.gguf", "imatrix.gguf")
        changed = "the importance matrix is not the one that the plan was made with"
        kind, problem = {
            "replaced": (SourceChanged, changed),
            "removed": (BadFile, "the importance matrix cannot be read"),
            "another": (BadFile, "missing metadata of an importance matrix"),
        }[change]
        for twin in (plan, Plan.from_json(plan.to_json())):
            assert [(type(b), b.problem) for b in twin.check().blockers] == [(kind, problem)]
            with pytest.raises(kind, match=problem):
                twin.write("out.gguf")
        assert not [name for name in os.listdir() if name.startswith("out")]


def test_what_a_plan_refuses_at_once(run):
    with pgs.open("in.gguf") as model:
        for wrong, message in (
            (lambda p: p.quantize("Q4_0").quantize("Q8_0"), "quantize: a plan quantizes at most once"),
            (
                lambda p: p.quantize("Q4_0", include_weights=["a"]),
                "imatrix: an option of the importance matrix without one",
            ),
            (
                lambda p: p.quantize("Q4_0", imatrix="imatrix.gguf", include_weights=["a"], exclude_weights=["b"]),
                "imatrix: include_weights and exclude_weights exclude each other",
            ),
            (lambda p: p.quantize("Q4_0", output_type="copy"), "output_type: a ggml type is needed (found copy)"),
            (lambda p: p.prune_layers([]), "layers: not the layers to drop (found [], expected [0, 1, ...])"),
            (lambda p: p.split(), "split: a split is by one of max_size, max_tensors, keep (found none)"),
            (lambda p: p.split(max_tensors=0), "max_tensors: less than one (found 0)"),
        ):
            with pytest.raises(SurgeryError) as error:
                wrong(Plan(model))
            assert isinstance(error.value, BadPlan) and str(error.value) == message
