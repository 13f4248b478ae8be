"""Values with a structure of their own, in one form: tools and calls as objects, whether given so or as JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.readers.json_text import DuplicateKeyError, decode
from stages.schemas.text import EmptyError, holds, is_blank

_CALL = ("id", "type", "function")
_FUNCTION = ("name", "arguments", "parameters")


def parsed(value: Any, name: str, wanted: str = "a list") -> Any:
    """The value itself, or what its JSON says: a CSV cell holds a conversation as JSON.

    Raises:
        ValueError: it is text, but no JSON.
        EmptyError: it is blank text.
    """
    if not isinstance(value, str):
        return value
    if is_blank(value):
        raise EmptyError(f"{name!r} is empty; it must be {wanted}", name)
    try:
        return decode(value)
    except DuplicateKeyError as error:
        raise ValueError(f"{name!r}: {error}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{name!r} is text, but not JSON; it must be {wanted}") from None


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """A row's `tools` (OpenAI's old `functions`), each as {"type": "function", "function": …}; None if it has none.

    Raises:
        ValueError: not a list of objects, or parameters that are no object.
    """
    name = next((name for name in ("tools", "functions") if holds(row.get(name))), None)
    if name is None:
        return None
    tools = parsed(row[name], name)
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{name!r} must be a list of objects")
    return [_tool(tool, f"tool {number}") for number, tool in enumerate(tools, start=1)] or None


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": _with_object(tool["function"], "parameters", where)}
    if isinstance(tool.get("name"), str) and tool.get("type") in (None, "function"):
        function = {key: value for key, value in tool.items() if key != "type"}
        return {"type": "function", "function": _with_object(function, "parameters", where)}
    return dict(tool)


def calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """One call or a list of them, or their JSON text, in OpenAI's form.

    Raises:
        ValueError: not calls of functions with a name and an object of arguments.
        EmptyError: blank text.
    """
    calls = parsed(value, where, 'a call such as {"name": "…", "arguments": {…}}, or a list of them')
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"{where} must be a list of calls; each has a name and arguments")
    return [_call(call, f"{where}, call {number}") for number, call in enumerate(calls, start=1)]


def unread_of_calls(value: Any) -> set[str]:
    """The fields of calls, in any form that `calls_of` reads, that hold something which nobody reads."""
    calls = parsed(value, "calls")
    unread = set()
    for call in [calls] if isinstance(calls, Mapping) else calls:
        function = call.get("function", call)
        unread |= {key for key in call if key not in _CALL and (function is not call) and holds(call[key])}
        names = {*_FUNCTION, *_CALL} if function is call else set(_FUNCTION)
        if "arguments" in function:
            names.discard("parameters")  # another name of them
        unread |= {key for key in function if key not in names and holds(function[key])}
    return unread


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} must be an object")
    function = call.get("function", call)
    if call.get("type") not in (None, "function") or not isinstance(function, Mapping):
        raise ValueError(f"{where} calls no function (its type is {call.get('type')!a}); only functions are known")
    name = function.get("name")
    if not isinstance(name, str) or is_blank(name):
        raise ValueError(f"{where} has no 'name'; name the function")
    key = "arguments" if "arguments" in function else "parameters"
    arguments = _with_object(function, key, where).get(key)
    made = {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    return made if call.get("id") is None else {"id": str(call["id"]), **made}


def _with_object(function: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The function, the value at a key of it an object: as it is, or as its JSON text says."""
    try:
        value = parsed(function.get(key), key, "an object, such as {}")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if value is None:
        return dict(function)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {key!r} must be an object, not {type(value).__name__}; correct the call")
    return {**function, key: value}
