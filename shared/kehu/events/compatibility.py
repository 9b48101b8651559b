"""What may change in an event's schema without a new version: optional fields may come, nothing else.

Old data must be readable by new code (replay) and new data by old subscribers (roll-back, slow consumers): both ways, for
every version ever published.
"""

from __future__ import annotations

from typing import Any

# Words about a field, not its meaning.
_PROSE = frozenset({"title", "description", "examples"})


def breaks(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Why data of one schema could not be read by the other; empty when they are fully compatible.

    Args:
        old: JSON Schema that was published.
        new: JSON Schema of today's class.
    """
    return list(dict.fromkeys(_compare(old, new, old, new, "data", ())))


def _resolve(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    target: dict[str, Any] = root["$defs"][reference.rsplit("/", 1)[-1]]
    return target


def _compare(
    old: Any, new: Any, old_root: dict[str, Any], new_root: dict[str, Any], path: str, seen: tuple[str, ...]
) -> list[str]:
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return [f"{path}: {len(old)} choices became {len(new)}"]
        return [b for o, n in zip(old, new, strict=True) for b in _compare(o, n, old_root, new_root, path, seen)]
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{path}: {old!r} became {new!r}"]
    reference = old.get("$ref")
    if reference is not None:
        if reference in seen:
            return []
        seen = (*seen, reference)
    old, new = _resolve(old, old_root), _resolve(new, new_root)
    found: list[str] = []
    for word in sorted((old.keys() | new.keys()) - _PROSE - {"$defs", "properties", "required"}):
        if word not in old:
            found.append(f"{path}: {word} is new")
        elif word not in new:
            found.append(f"{path}: {word} is gone")
        else:
            found += _compare(old[word], new[word], old_root, new_root, f"{path}.{word}", seen)
    old_fields, new_fields = old.get("properties", {}), new.get("properties", {})
    for name in old_fields.keys() - new_fields.keys():
        found.append(f"{path}.{name}: the field is gone")
    for name in old_fields.keys() & new_fields.keys():
        found += _compare(old_fields[name], new_fields[name], old_root, new_root, f"{path}.{name}", seen)
    required, was_required = set(new.get("required", ())), set(old.get("required", ()))
    found += [f"{path}.{name}: is required now" for name in sorted(required - was_required)]
    found += [
        f"{path}.{name}: is no longer required, so old readers would miss it"
        for name in sorted(was_required - required)
    ]
    return found
