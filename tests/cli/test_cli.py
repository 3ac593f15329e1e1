"""The shell: exit codes, what goes to stdout and what to stderr, the JSON, and that each command does what it says."""

import json
import os
import re
import shlex
import subprocess
import sys

import gguf
import numpy as np
import pytest

from pygguf_surgery import Value
from pygguf_surgery import open as open_model
from pygguf_surgery.base.errors import BadFile, BadPlan, OutOfSpace, SourceChanged, SurgeryError, Unsupported
from pygguf_surgery.cli import commands, parser, values
from pygguf_surgery.cli.command import Family
from pygguf_surgery.cli.commands.demo_model import DemoShape, write_demo_model
from pygguf_surgery.cli.shell import exit_code
from pygguf_surgery.files.gguf import write_gguf
from support.gguf_files import read_gguf
from support.places import ROOT
from support.small_model import BEST, everything_seen


def command(folder, *arguments):
    """A process of its own, started in `folder`: in the checkout it would import the source tree, which has no core."""
    return subprocess.run(
        [sys.executable, "-m", "pygguf_surgery", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
    )


def strongest(path, layer, n):
    """Ids of the n router rows with the largest norm, by gguf-py and numpy."""
    rows = read_gguf(path)[1][f"blk.{layer}.ffn_gate_inp.weight"][1].astype(np.float64)
    return sorted(np.argsort(-np.linalg.norm(rows, axis=1), kind="stable")[:n].tolist())


# --- usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["info"],
        ["info", "x", "--nonsense"],
        ["prune", "x"],
        ["prune", "x", "y"],
        ["prune", "x", "y", "--by", "aimer"],
        ["prune", "x", "y", "--keep", "many"],
        ["prune", "x", "y", "--keep", "1", "--io", "tape"],
        ["prune", "x", "y", "--kee", "1"],
        ["prune", "x", "y", "--keep", "1", "--memory", "lots"],
        ["prune", "x", "y", "--keep", "1", "--override", "no-type"],
        ["quantize", "x", "y.gguf"],
        ["quantize", "x"],
        ["quantize", "x", "y", "Q8_0", "many"],
        ["quantize", "x", "y", "Q8_0", "2", "3"],
        ["quantize", "x", "y", "Q8_0", "--override-kv", "a=7"],
        ["quantize", "x", "y", "Q8_0", "--prune-layers", "a"],
        ["quantize", "x", "y", "Q8_0", "--no-tensor-first-split"],
        ["imatrix"],
        ["imatrix", "merge", "x"],
        ["split", "x"],
        ["verify"],
        ["edit", "x", "y", "--set", "no-equals-sign"],
        ["quantize", "x", "y", "Q8_0", "9" * 5000],
        ["edit", "x", "y", "--prune-layers", "9" * 5000],
        ["quantize", "x", "y", "Q8_0", "--token-embedding-type", ""],
        ["quantize", "x", "y", "--recipe", ""],
        ["quantize", "x", "y", "Q8_0", "--imatrix", "z", "--include-weights", ""],
        ["info", ""],
        ["edit", "x", ""],
        ["prune", "x", "y", "--keep", "1", "--ratio", "0.5"],
    ],
)
def test_wrong_usage_is_2_and_says_why_on_stderr(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "error: " in err and "Traceback" not in err


def test_version_and_help_are_results(run):
    code, out, err = run("--version")
    assert code == 0 and out.startswith("gguf-surgery ") and "ggml" in out and err == ""
    words = [[], *([c.name] for c in parser.COMMANDS)]
    words += [[f.name, c.name] for f in parser.COMMANDS if isinstance(f, Family) for c in f.commands]
    assert ["info"] in words and ["stats", "show"] in words
    for command in words:
        code, out, err = run(*command, "--help")
        assert code == 0 and " ".join(["usage: gguf-surgery", *command]) in out and err == ""


def test_the_help_of_prune_has_titles(run):
    out = run("prune", "--help")[1]
    titles = re.findall(r"^(\w[\w ]*):$", out, re.MULTILINE)
    assert titles == [
        "positional arguments",
        "options",
        "choice of experts",
        "layers",
        "types",
        "importance matrix",
        "quality and size",
        "metadata",
        "shards",
        "run",
        "output",
    ]


def test_a_parser_of_one_command_has_the_arguments_of_that_one():
    whole, one = parser.make_parser("x"), parser.make_parser("x", ["info", "plan"])
    assert "--full" in help_of(whole, "info") and help_of(whole, "info") == help_of(one, "info")
    assert "--keep" in help_of(whole, "plan") and "--keep" not in help_of(one, "plan")


def help_of(parser, command):
    (commands,) = parser._subparsers._group_actions
    return commands.choices[command].format_help()


@pytest.mark.parametrize(
    "error, code",
    [
        (BadFile("x"), 3),
        (SourceChanged("x"), 3),
        (BadPlan("x"), 4),
        (Unsupported("x"), 4),
        (OutOfSpace("x"), 4),
        (SurgeryError("x"), 1),
        (FileExistsError(17, "x", "out.gguf"), 4),
        (FileNotFoundError(2, "x", "in.gguf"), 3),
        (PermissionError(13, "x", "in.gguf"), 3),
        (OSError(5, "x", "in.gguf"), 1),
        (FileNotFoundError(2, "x", "folder/out.gguf"), 4),
        (PermissionError(13, "x", os.path.abspath("folder")), 4),
    ],
)
def test_exit_code_of_an_error(error, code):
    assert exit_code(error, "folder/out.gguf") == code


# --- info ----------------------------------------------------------------------------------------------------------


def test_info_json_agrees_with_gguf_py(run, model):
    code, out, err = run("info", model, "--json")
    assert (code, err) == (0, "")
    info = json.loads(out)
    metadata, tensors = read_gguf(model)
    reader = gguf.GGUFReader(model)
    assert info["architecture"] == "qwen3next"
    assert info["parameters"] == sum(int(t.n_elements) for t in reader.tensors)
    assert info["experts"] == {"count": 8, "used": 2, "layers": [0, 1, 2, 3]}
    assert info["file_bytes"] == os.path.getsize(model)
    assert {name: t["tensors"] for name, t in info["types"].items()} == {
        name: sum(kind == name for kind, _ in tensors.values()) for name in ("BF16", "F32")
    }
    assert list(info["metadata"]) == list(metadata)
    tokens = info["metadata"].pop("tokenizer.ggml.tokens")
    assert tokens == {"type": "str[]", "length": 300, "head": metadata["tokenizer.ggml.tokens"][:32]}
    assert info["metadata"]["qwen3next.expert_count"] == metadata["qwen3next.expert_count"]


def test_info_full_prints_whole_arrays(run, model):
    _, out, _ = run("info", model, "--json", "--full")
    assert json.loads(out)["metadata"]["tokenizer.ggml.tokens"] == read_gguf(model)[0]["tokenizer.ggml.tokens"]


def test_info_abbreviates_every_long_array(run, tmp_path):
    shape = DemoShape(
        layers=40,
        embedding=32,
        experts=2,
        used=1,
        feed_forward=32,
        heads=1,
        heads_kv=1,
        head=32,
        state=32,
        key_heads=1,
        value_heads=1,
        vocabulary=300,
    )
    write_demo_model(tmp_path / "deep.gguf", shape=shape)
    layers = json.loads(run("info", tmp_path / "deep.gguf", "--json")[1])["experts"]["layers"]
    assert layers == {"type": "int", "length": 40, "head": list(range(32))}
    layers = json.loads(run("info", tmp_path / "deep.gguf", "--json", "--full")[1])["experts"]["layers"]
    assert layers == list(range(40))


def test_info_for_people_names_what_matters(run, model):
    code, out, err = run("info", model)
    assert (code, err) == (0, "")
    for text in ("qwen3next", "2 of 8 used, in 4 layers", "BF16", "general.name", "bits per weight"):
        assert text in out


def test_info_shows_text_that_the_terminal_cannot(tmp_path):
    from support.gguf_bytes import gguf as build
    from support.gguf_bytes import kv

    path = tmp_path / "odd.gguf"
    path.write_bytes(build([kv("general.architecture", "str", "x"), kv("general.name", "str", b"\xff\xfe")]))
    for encoding in ("utf-8", "ascii"):
        for form in ([], ["--json"]):
            done = subprocess.run(
                [sys.executable, "-m", "pygguf_surgery", "info", path, *form],
                capture_output=True,
                cwd=tmp_path,
                env={**os.environ, "PYTHONIOENCODING": encoding},
                timeout=120,
            )
            assert done.returncode == 0 and b"Traceback" not in done.stderr and b"general.name" in done.stdout


def test_no_name_in_a_file_commands_the_terminal(run, tmp_path):
    path = tmp_path / "evil.gguf"
    evil = "a\x1b[2J\x07\nb"
    write_gguf(
        path,
        {"general.architecture": Value(evil, "str"), "general.name": Value(evil, "str"), f"k{evil}": Value(1, "u8")},
        {f"t{evil}": np.full((2, 32), np.nan, np.float32)},
    )
    for arguments in (
        ["info", path],
        ["plan", path],
        ["plan", path, "--keep", 1],
        ["verify", path],
        ["edit", path, tmp_path / "out.gguf"],
    ):
        _, out, err = run(*arguments)
        assert out + err and not re.search(r"[\x00-\x09\x0b-\x1f]", out + err)
    assert r"name          a\x1b[2J\x07\nb" in run("info", path)[1]


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["--version"], ["info", "--help"]])
def test_what_only_reads_headers_does_not_load_numpy(model, arguments):
    script = (
        "import sys; from pygguf_surgery.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'numpy', 'gguf', 'pygguf_surgery.plan', 'pygguf_surgery.studies'} & set(sys.modules);"
        "sys.exit(f'{code}: {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, *[model] * (arguments[0] == "info")],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(model),
    )
    assert done.returncode == 0 and done.stdout, done.stderr


def test_info_closes_its_file(run, model, monkeypatch):
    opened = []

    def remember(path):
        opened.append(open_model(path))
        return opened[-1]

    monkeypatch.setattr(commands.info, "open_model", remember)
    assert run("info", model)[0] == 0
    with pytest.raises(ValueError, match="closed"):
        opened[0].sources[0].read(0, 4)


# --- plan ----------------------------------------------------------------------------------------------------------


def test_plan_json_is_the_documented_form(run, model):
    code, out, err = run("plan", model, "--keep", BEST, "--type", "MXFP4_MOE", "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert {"tensors", "metadata", "file_bytes", "peak_memory_bytes", "blockers", "warnings", "plan"} <= plan.keys()
    by_name = {t["name"]: t for t in plan["tensors"]}
    up = by_name["blk.1.ffn_up_exps.weight"]
    assert {"name", "role", "type", "shape", "nbytes", "action"} <= up.keys()
    assert (up["role"], up["type"], up["shape"], up["action"]) == ("expert", "MXFP4", [BEST, 32, 64], "encode")
    assert by_name["blk.1.ffn_gate_inp.weight"]["action"] == "take"
    assert by_name["output_norm.weight"]["action"] == "copy"
    assert plan["blockers"] == [] and plan["metadata"]["qwen3next.expert_count"] == BEST


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_the_program_is_imported_ends_it_as_later(number, code):
    program = f"""
import os, signal, sys
sys.path[:] = {sys.path!r}
class Interrupt:
    def find_spec(self, name, *_):
        if name == "pygguf_surgery.cli.parser":
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Interrupt())
from pygguf_surgery.cli import program
program()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


# --- prune, quantize, edit -----------------------------------------------------------------------------------------


def test_prune_keeps_the_strongest_experts_and_edits_in_one_pass(run, model, tmp_path):
    out_path = tmp_path / "out.gguf"
    code, out, _ = run(
        "prune",
        model,
        out_path,
        "--keep",
        BEST,
        "--by",
        "router-norm",
        "--set",
        "general.name=half",
        "--set",
        "my.number:u16=7",
        "--set",
        "qwen3next.context_length=128",
        "--remove",
        "general.type",
    )
    assert code == 0 and str(out_path) in out
    _, source = read_gguf(model)
    after, result = read_gguf(out_path)
    assert after["general.name"] == "half" and after["my.number"] == 7 and "general.type" not in after
    assert after["qwen3next.context_length"] == 128 and after["qwen3next.expert_count"] == BEST
    assert gguf.GGUFReader(str(out_path)).get_field("my.number").types == [gguf.GGUFValueType.UINT16]
    assert list(result) == list(source)
    for name, (kind, data) in result.items():
        original = source[name][1]
        if "_exps" in name or name.endswith("ffn_gate_inp.weight"):
            original = original[strongest(model, int(name.split(".")[1]), BEST)]
        assert kind == source[name][0] and np.array_equal(data, original), name


def test_prune_by_file(run, model, tmp_path):
    kept = {str(layer): [0, 3, 5] for layer in range(4)}
    (tmp_path / "kept.json").write_text(json.dumps({"kept": kept}))
    code, _, _ = run("prune", model, tmp_path / "out.gguf", "--by", tmp_path / "kept.json", "--quiet")
    assert code == 0
    assert read_gguf(tmp_path / "out.gguf")[0]["pgs.experts.2.kept"] == [0, 3, 5]


def test_prune_by_ratio(run, model, tmp_path):
    assert run("prune", model, tmp_path / "out.gguf", "--ratio", 0.5, "--quiet")[0] == 0
    assert read_gguf(tmp_path / "out.gguf")[0]["qwen3next.expert_count"] == 4


def test_prune_prints_a_receipt_as_json(run, model, tmp_path):
    code, out, err = run("prune", model, tmp_path / "out.gguf", "--keep", BEST, "--type", "Q8_0", "--json")
    receipt = json.loads(out)
    assert code == 0 and err == ""
    assert receipt["file_bytes"] == os.path.getsize(tmp_path / "out.gguf")
    assert sum(receipt["actions"].values()) == len(read_gguf(model)[1])


def test_quantize_with_overrides(run, model, tmp_path):
    out_path = tmp_path / "out.gguf"
    code, _, _ = run("quantize", model, out_path, "Q8_0", "--override", "attn_k=F16", "--override", "shexp=copy")
    assert code == 0
    kinds = {name: kind for name, (kind, _) in read_gguf(out_path)[1].items()}
    assert kinds["blk.3.attn_k.weight"] == "F16" and kinds["blk.0.ffn_up_shexp.weight"] == "BF16"
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0" and kinds["blk.0.ffn_gate_inp.weight"] == "F32"


def test_an_equals_sign_in_a_pattern_belongs_to_the_pattern():
    assert values.override("a(?=b)c=Q8_0") == ("a(?=b)c", "Q8_0")


def test_encoding_again_must_be_allowed(run, model, tmp_path):
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    assert run("quantize", model, once, "Q8_0")[0] == 0
    code, _, _ = run("quantize", once, twice, "MXFP4_MOE")
    assert code == 4 and not twice.exists()
    assert run("quantize", once, twice, "MXFP4_MOE", "--allow-requantize")[0] == 0


def test_edit_changes_only_metadata(run, model, tmp_path):
    out_path = tmp_path / "out.gguf"
    assert run("edit", model, out_path, "--set", "my.words:str[]=a,b", "--remove", "general.name")[0] == 0
    before, source = read_gguf(model)
    after, result = read_gguf(out_path)
    assert after == {**{k: v for k, v in before.items() if k != "general.name"}, "my.words": ["a", "b"]}
    for name, (kind, data) in result.items():
        assert kind == source[name][0] and np.array_equal(data, source[name][1])


def test_edit_of_nothing_gives_the_same_bytes(run, model, tmp_path):
    assert run("edit", model, tmp_path / "out.gguf")[0] == 0
    with open(model, "rb") as a, open(tmp_path / "out.gguf", "rb") as b:
        assert a.read() == b.read()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "qwen3next.expert_count=4"],
        ["--set", "general.alignment=64"],
        ["--set", "qwen3next.context_length=lots"],
        ["--set", "my.key:u99=1"],
        ["--remove", "no.such.key"],
    ],
)
def test_an_edit_that_makes_no_sense_is_4(run, model, tmp_path, arguments):
    code, out, err = run("edit", model, tmp_path / "out.gguf", *arguments)
    assert code == 4 and out == "" and err.startswith("gguf-surgery: error: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


# --- manners -------------------------------------------------------------------------------------------------------


def test_quiet_is_silent(run, model, tmp_path):
    assert run("prune", model, tmp_path / "out.gguf", "--keep", BEST, "--type", "MXFP4_MOE", "--quiet") == (0, "", "")


def test_ctrl_c_is_130(run, model, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.info, "open_model", interrupted)
    code, out, err = run("info", model)
    assert code == 130 and out == "" and "interrupted" in err


def test_as_a_process(model, tmp_path):
    done = command(tmp_path, "prune", model, tmp_path / "out.gguf", "--keep", BEST)
    assert done.returncode == 0 and "out.gguf" in done.stdout and done.stderr.startswith("experts kept by router-norm")
    done = command(tmp_path, "prune", model, tmp_path / "out.gguf", "--keep", BEST)
    assert (done.returncode, done.stdout) == (4, "") and done.stderr.startswith("gguf-surgery: error: ")
    done = command(tmp_path, "info", tmp_path / "none")
    assert (done.returncode, done.stdout) == (3, "") and "Traceback" not in done.stderr
    assert command(tmp_path, "frobnicate").returncode == 2


def test_a_reader_that_closes_early_gets_no_traceback(model):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "pygguf_surgery", "info", model, "--json", "--full"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        cwd=os.path.dirname(model),
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_closed_streams_get_no_traceback(model, tmp_path):
    """What a daemon has for stdout and stderr."""
    shell = f"{shlex.quote(sys.executable)} -m pygguf_surgery"
    model, out = shlex.quote(model), shlex.quote(str(tmp_path / "out.gguf"))
    for arguments in (f"info {model} >&-", f"info {model} --json >&-", f"prune {model} {out} --keep {BEST} 2>&-"):
        done = subprocess.run(
            f"{shell} {arguments}", shell=True, capture_output=True, text=True, timeout=120, cwd=tmp_path
        )
        assert done.returncode == 0 and done.stderr == ""
    done = subprocess.run(f"{shell} info none 2>&-", shell=True, capture_output=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, b"")


# --- the README ----------------------------------------------------------------------------------------------------

README = ROOT / "README.md"


def test_the_readme_s_table_has_every_command():
    table = README.read_text().split("| command | does |")[1].split("\n\n")[0]
    for command in parser.COMMANDS:
        members = "|".join(c.name for c in command.commands) if isinstance(command, Family) else ""
        shown = re.findall(rf"`{command.name}\b ?(.*?)`", table)
        assert members.replace("|", r"\|") in shown if members else shown, command.name


def test_the_readme_s_python_example_runs(model, tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    for written, here in (
        ("Qwen3-Coder-Next-BF16-00001-of-00004.gguf", model),
        ("keep(256)", "keep(4)"),
        ("progress=True", "progress=False"),
        ("[40, 41, 42, 43]", "[3]"),
    ):
        assert written in code
        code = code.replace(written, here)
    names = {"array_f32": np.ones((2, 256), np.float32), "array_u8": np.zeros((2, 144), np.uint8)}
    monkeypatch.chdir(tmp_path)
    everything_seen(model, "imatrix.gguf")
    exec(compile(code, "README.md", "exec"), names)
    assert names["receipt"].path == "out.gguf"
    metadata, tensors = read_gguf("out.gguf")
    assert metadata["general.name"] == "Qwen3-Coder-Next half" and tensors["blk.0.ffn_up_exps.weight"][0] == "MXFP4"


def test_the_readme_s_shell_examples_run(run, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    everything_seen(model, "imatrix.gguf")
    os.mkdir("shards")
    lines = re.findall(r"^    gguf-surgery (.*)$", README.read_text().replace("\\\n", " "), re.MULTILINE)
    lines = [line for line in lines if not re.search("stats|repair", line)]  # those need llama.cpp: test_calibrate.py
    assert len(lines) == 10
    for line in lines:
        for written, here in (
            ("model.gguf", model),
            ("--keep 256", "--keep 4"),
            ("general.url", "general.type"),
            ("--split-max-size 45G", "--split-max-size 45K"),
        ):
            line = line.replace(written, here)
        writes = "out.gguf" in line and not line.startswith(("verify", "compare"))
        code, _, err = run(*shlex.split(line), *(["--force"] if writes else []))
        assert code == 0, (line, err)
