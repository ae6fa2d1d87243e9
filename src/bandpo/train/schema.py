"""The JSON schema of the YAML files of `bandpo train`, for editors; made from the table of the options."""

import json
from typing import Any

from bandpo.toy.tasks import TASKS
from bandpo.train.config import CHOICES, METHODS

Schema = dict[str, Any]
Row = dict[str, Any]

_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"
"""A number that YAML reads as text, such as 1e-6."""
_IMPORTED = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"
"""package.module:NAME"""


def schema_text(table: dict[str, Any]) -> str:
    """The schema as JSON.

    Args:
        table: The table of the options.
    """
    return json.dumps(schema_of(table), indent=1, ensure_ascii=False) + "\n"


def schema_of(table: dict[str, Any]) -> Schema:
    """The schema, in draft 7, which editors know best. The key `method` decides about the other keys.

    Args:
        table: The table of the options.

    Returns:
        A schema that has each key of a file with its type, its choices and its description, and allows no other.
    """
    definitions: Schema = {}
    rules: list[Schema] = []
    for method, implied in METHODS.items():
        name = "preference" if implied else "grpo"
        definitions.setdefault(name, _definition(table[name], table["objectives"][name]))
        chosen: Schema = {"properties": {"method": {"const": method}}}
        if implied:  # a file without the key is one of grpo
            chosen["required"] = ["method"]
        refused = {"properties": dict.fromkeys(implied, False)} if implied else {}
        rules.append({"if": chosen, "then": {"allOf": [{"$ref": f"#/definitions/{name}"}, refused]}})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "a run of bandpo train",
        "type": "object",
        "properties": {"method": {"enum": list(METHODS)}},
        "allOf": rules,
        "definitions": definitions,
    }


def _definition(rows: list[Row], objectives: list[str]) -> Schema:
    """The keys of a group of methods."""
    properties: Schema = {}
    for row in rows:
        if row["name"] not in properties:  # a switch has a second row, for its negation
            properties[row["name"]] = _property(row, objectives)
    return {"properties": properties, "additionalProperties": False}


def _property(row: Row, objectives: list[str]) -> Schema:
    """One key: what it may hold, its description, and its default where that is a plain value."""
    found: Schema = {}
    if "help" in row:
        found["description"] = row["help"]
    if row.get("default") is not None:
        found["default"] = row["default"]
    name, kinds = row["name"], list(row.get("kinds", []))
    choices = row.get("choices") or CHOICES.get(name) or {"method": METHODS, "task": TASKS}.get(name)
    if choices is not None:
        return {**found, "enum": [*choices, *([None] if "null" in kinds else [])]}
    if name == "objective":
        return {**found, "anyOf": [{"enum": objectives}, {"type": "string", "pattern": _IMPORTED}]}
    if name == "reward":  # a single one needs no list
        names = {"type": "string", "minLength": 1}
        return {**found, "anyOf": [names, {"type": "array", "items": names, "minItems": 1}, {"type": "null"}]}
    if "number" in kinds:
        return {**found, "anyOf": [{"type": kinds}, {"type": "string", "pattern": _NUMBER}]}
    return {**found, "type": kinds} if kinds else found
