"""Base class of a recipe's sections: frozen, unknown keys are errors, some fields are operational."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def operational(*, default: Any, **kwargs: Any) -> Any:
    """Declare a field that a resume may change: it does not change the output (ports, time-outs, concurrency)."""
    return Field(default=default, json_schema_extra={"operational": True}, **kwargs)


class Section(BaseModel):
    """One section of a recipe, or a part of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def settings(self) -> dict[str, Any]:
        """Return the fields that change the output, as plain values; operational fields are left out at any depth."""
        return self.model_dump(mode="json", exclude=self._operational())

    def _operational(self) -> dict[Any, Any]:
        """Return pydantic's `exclude` of the operational fields."""
        excluded: dict[Any, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("operational"):
                excluded[name] = True
            elif inner := _operational_in(getattr(self, name)):
                excluded[name] = inner
        return excluded


def _operational_in(value: Any) -> dict[Any, Any]:
    if isinstance(value, Section):
        return value._operational()
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: inner for key, part in parts if (inner := _operational_in(part))}
