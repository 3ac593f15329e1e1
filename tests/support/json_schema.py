"""JSON Schemas (draft 2020-12) of dataclasses, as base.codec reads and writes them. As a script it writes those in
docs/schema that are derived: PYTHONPATH=.:tests python tests/support/json_schema.py"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from pathlib import Path

from pygguf_surgery import Value
from pygguf_surgery.base.codec import encode
from pygguf_surgery.plan_data.codec import EDITS, FORMAT
from pygguf_surgery.plan_data.edits import Edit, PlanData
from pygguf_surgery.run.writing import Receipt

FOLDER = Path(__file__).parents[2] / "docs" / "schema"
DRAFT = "https://json-schema.org/draft/2020-12/schema"
SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}
VALUE_TYPES = "^([ui](8|16|32|64)|f32|f64|bool|str)(\\[\\])?$"
# fmt: off
SPECIAL = {
    bytes: {"type": "string", "contentEncoding": "base64", "pattern": "^[A-Za-z0-9+/]*={0,2}$"},
    Value: {
        "description": "A metadata value: as JSON, or its encoding in the file where JSON cannot say it.",
        "type": "object",
        "properties": {"type": {"type": "string", "pattern": VALUE_TYPES}},
        "required": ["type"],
        "oneOf": [
            {"properties": {"value": {"type": ["number", "string", "boolean", "array"]}}, "required": ["value"]},
            {"properties": {"hex": {"type": "string", "pattern": "^([0-9a-f]{2})*$"}}, "required": ["hex"]},
        ],
        "unevaluatedProperties": False,
    },
}
# fmt: on


class Schema:
    """The schema of one root type; those of the classes in it are its $defs."""

    def __init__(self, title, description, root, first=None):
        self.definitions = {}
        properties = {"type": "object", **self.object(root)}
        properties["properties"] = {**(first or {}), **properties["properties"]}
        properties["required"] = [*(first or {}), *properties["required"]]
        self.schema = {"$schema": DRAFT, "title": title, "description": description, **properties}
        if self.definitions:
            self.schema["$defs"] = self.definitions

    def of(self, kind):
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if kind is typing.Any:
            return {}
        if kind in SCALARS:
            return {"type": SCALARS[kind]}
        if kind in SPECIAL or dataclasses.is_dataclass(kind):
            self.definitions.setdefault(kind.__name__, None)
            if self.definitions[kind.__name__] is None:
                self.definitions[kind.__name__] = SPECIAL.get(kind) or {"type": "object", **self.object(kind)}
            return {"$ref": f"#/$defs/{kind.__name__}"}
        if kind == Edit:
            return {"oneOf": [self.of(part) for part in args]}
        if origin in (typing.Union, types.UnionType):
            kind, null = args
            assert null is types.NoneType, kind
            return (
                {"type": [SCALARS[kind], "null"]} if kind in SCALARS else {"anyOf": [self.of(kind), {"type": "null"}]}
            )
        if origin is list or (origin is tuple and args[-1] is ...):
            return {"type": "array", "items": self.of(args[0])}
        if origin is tuple:
            parts = [self.of(part) for part in args]
            return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
        assert origin is dict, kind
        numbers = {"propertyNames": {"pattern": "^(0|-?[1-9][0-9]*)$"}} if args[0] is int else {}
        return {"type": "object", **numbers, "additionalProperties": self.of(args[1])}

    def object(self, kind):
        words = {edit: word for word, edit in EDITS.items()}
        tag = {"edit": {"const": words[kind]}} if kind in words else {}
        hints = typing.get_type_hints(kind)
        properties = {}
        required = list(tag)
        for field in dataclasses.fields(kind):
            properties[field.name] = self.of(hints[field.name])
            if field.default is not dataclasses.MISSING:
                properties[field.name]["default"] = encode(field.default, {})
            elif field.default_factory is not dataclasses.MISSING:
                properties[field.name]["default"] = encode(field.default_factory(), {})
            else:
                required.append(field.name)
        return {"properties": {**tag, **properties}, "required": required, "additionalProperties": False}


def derived():
    """name -> schema."""
    plan = Schema(
        "Plan", "A plan of pygguf_surgery: Plan.to_json(), Plan.from_json().", PlanData, {"format": {"const": FORMAT}}
    )
    receipt = Schema(
        "Receipt", "What a run did: Receipt.to_json(), and --json of the commands that write a model.", Receipt
    )
    return {"plan": plan.schema, "receipt": receipt.schema}


def text_of(x, indent=0):
    """JSON with what is short on one line."""
    if len(line := json.dumps(x)) + indent <= 110 or not isinstance(x, (dict, list)):
        return line
    pad = " " * (indent + 2)
    opening, closing = "{}" if isinstance(x, dict) else "[]"
    parts = (
        [text_of(e, indent + 2) for e in x]
        if isinstance(x, list)
        else [f"{json.dumps(key)}: {text_of(e, indent + 2)}" for key, e in x.items()]
    )
    return f"{opening}\n" + ",\n".join(pad + part for part in parts) + f"\n{' ' * indent}{closing}"


if __name__ == "__main__":
    for name, schema in derived().items():
        (FOLDER / f"{name}.schema.json").write_text(text_of(schema) + "\n")
