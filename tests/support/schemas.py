"""The JSON Schemas in docs/schema, and what they have against some data."""

from __future__ import annotations

import json

from jsonschema import Draft202012Validator

from .json_schema import FOLDER

SCHEMAS = {path.name.removesuffix(".schema.json"): json.loads(path.read_text()) for path in FOLDER.glob("*.json")}


def faults(name, data):
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(SCHEMAS[name]).iter_errors(data)]
