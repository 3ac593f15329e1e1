"""The JSON Schemas in docs/schema: valid, and right about what is printed."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
from jsonschema import Draft202012Validator

import pygguf_surgery as pgs
from pygguf_surgery.architecture.names import ROLES
from pygguf_surgery.cli import main
from support.schemas import SCHEMAS, faults


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_schemas_are_schemas_and_refuse_unknown_keys(name):
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["additionalProperties"] is False and faults(name, {"more": 1})


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a small model, demo-bf16.gguf, a cut of it, and what `demo` printed."""
    folder = tmp_path_factory.mktemp("demo")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["demo", "--folder", str(folder), "--keep", "16", "--type", "Q8_0", "--json"]) == 0
    return folder, json.loads(printed.getvalue())


def test_a_receipt_and_a_comparison(demo):
    _, data = demo
    assert not faults("receipt", data["receipt"])
    comparison = {key: data[key] for key in ("rows", "tensors", "roles", "unmatched")}
    assert not faults("compare", comparison) and len(data["tensors"]) > 50
    assert SCHEMAS["compare"]["$defs"]["role"]["enum"] == list(ROLES)


@pytest.mark.parametrize("form", [[], ["--full"]])
@pytest.mark.parametrize("name", ["demo-bf16.gguf", "demo-cut.gguf"])
def test_info(demo, capsys, name, form):
    assert main(["info", str(demo[0] / name), "--json", *form]) == 0
    data = json.loads(capsys.readouterr().out)
    assert not faults("info", data)
    abbreviated = [value for value in data["metadata"].values() if isinstance(value, dict)]
    assert bool(abbreviated) != bool(form)


def test_rankings(demo, tmp_path):
    with pgs.open(demo[0] / "demo-bf16.gguf") as model:
        ranking = pgs.experts.rank(model)
        named = pgs.experts.rank(model, by={"kept": {layer: [3, 1] for layer in range(4)}})
        plan = pgs.Plan(model).keep_experts(ranking.keep(16)).quantize("Q8_0").split(max_size="1MB")
        texts = [ranking.to_json(), ranking.keep(16).to_json(), named.to_json(), named.keep().to_json()]
        for text in texts:
            assert not faults("ranking", json.loads(text))
            path = tmp_path / "ranking.json"
            path.write_text(text)
            assert pgs.experts.rank(model, by=path).keep(None if "kept" in text else 16)
        assert not faults("plan", json.loads(plan.to_json()))


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        {"metric": "a"},
        {"kept": {}},
        {"kept": {"0": [1]}, "more": 1},
        {"kept": {"0": [1, 1]}},
        {"kept": {"0": [-1]}},
        {"kept": {"01": [1]}},
        {"kept": {"0": ["1"]}},
        {"kept": {"0": 1}},
        {"scores": {"0": [None]}},
        {"scores": []},
        {"kept": {"0": [1]}, "metric": ""},
    ],
)
def test_what_neither_the_schema_nor_rank_takes_for_a_ranking(demo, tmp_path, data):
    assert faults("ranking", data)
    (tmp_path / "ranking.json").write_text(json.dumps(data))
    with pgs.open(demo[0] / "demo-bf16.gguf") as model, pytest.raises(pgs.BadPlan):
        pgs.experts.rank(model, by=tmp_path / "ranking.json")
