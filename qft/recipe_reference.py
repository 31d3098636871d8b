"""The reference page and the JSON schema of a recipe, both made from `qft.recipe`."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qft.recipe import Recipe
from qft.registry import BUILT_IN, strategy_class


def reference() -> str:
    """Every knob, a line each: name, default, choices, sentence."""
    lines = _group(Recipe, "")
    for name in BUILT_IN:
        lines += ["", f"strategy: {{name: {name}}}"]
        lines += _group(strategy_class(name), "strategy.")
    return "\n".join(lines)


def json_schema() -> dict[str, Any]:
    """For editors; the strategy's own settings come as one alternative a strategy."""
    properties: dict[str, Any] = {}
    definitions: dict[str, Any] = {}
    required = []
    for name, field in Recipe.model_fields.items():
        if name == "strategy":
            properties[name] = {"anyOf": [_strategy_schema(n, definitions) for n in BUILT_IN]}
            definitions["Strategy"] = properties[name]  # a stack's parts
            required.append(name)
            continue
        schema = _Wrapper.of(name, field).model_json_schema()
        definitions.update(schema.get("$defs", {}))
        properties[name] = schema["properties"][name]
        if field.is_required():
            required.append(name)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qft recipe",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        "$defs": definitions,
    }


class _Wrapper:
    """One field in a model of its own, since a recipe's strategy has no fixed schema."""

    @staticmethod
    def of(name: str, field: FieldInfo) -> type[BaseModel]:
        from pydantic import create_model

        definition: Any = (field.annotation, field)
        return create_model("Field", **{name: definition})


def _strategy_schema(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """Groups of knobs within it join the ``definitions``."""
    schema = strategy_class(name).model_json_schema()
    schema["properties"] = {"name": {"const": name}, **schema.get("properties", {})}
    schema["required"] = ["name", *schema.get("required", [])]
    definitions |= {n: d for n, d in schema.pop("$defs", {}).items() if n != "Strategy"}
    return schema


def _group(cls: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in cls.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if prefix or name != "strategy":
                lines += [f"{prefix}{name}: {field.description}"]
                lines += _group(annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"default {field.default!r}"
        choices = _choices(annotation)
        lines.append(f"{prefix}{name} ({default}{choices}): {field.description}")
    return lines


def _choices(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "; " + " | ".join(str(choice) for choice in get_args(annotation))
    return ""
