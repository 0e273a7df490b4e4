"""One field of a request at a time, with its type and limits, and the errors that a request can end in.

中文：逐个读取请求字段并检查类型与范围；OpenAI 格式的错误。
"""

import math
from collections.abc import Mapping

from scripts.serving.text_stream import strict_json
from scripts.terminal import clean

DEEPEST = 64  # levels of nesting in a request


class ApiError(Exception):
    """An answer that is an error: status and the fields of OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def body(self) -> dict:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad(param: str, value: object, expected: str) -> ApiError:
    """A 400 that shows what came, shortened, and what was expected."""
    shown = clean(repr(value))
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return ApiError(400, f"{param} {shown} is impossible: expected {expected}.", param=param, code="invalid_value")


def depth(value: object) -> int:
    """Levels of nesting, counted without recursion."""
    deepest, level = 0, [value]
    while level and deepest <= DEEPEST:
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
        deepest += bool(inner)
    return deepest


def parse_body(body: bytes) -> dict:
    """The JSON object of a request.  Raises: ApiError 400."""
    try:
        value = strict_json(body.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        raise ApiError(
            400, f"The request is no JSON in UTF-8: {clean(str(error))[:200]}.", code="invalid_json"
        ) from None
    if not isinstance(value, dict):
        raise ApiError(400, f"The request is a JSON {type(value).__name__}: expected an object.", code="invalid_json")
    if depth(value) > DEEPEST:
        raise ApiError(400, f"The request is nested more than {DEEPEST} levels deep.", code="invalid_json")
    return value


class Fields:
    """The fields of a request, read one by one with their types and limits."""

    def __init__(self, values: dict):
        self.values = values

    def get(self, name: str) -> object:
        return self.values.get(name)

    def number(self, name: str, default: float, low: float, high: float, expected: str = "") -> float:
        value = self.get(name)
        if value is None:
            return default
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:  # NaN fails too
            raise bad(name, value, expected or f"a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, name: str, default: int | None, low: int, high: int = 2**31 - 1) -> int | None:
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            limit = f" to {high}" if high < 2**31 - 1 else " on"
            raise bad(name, value, f"a whole number from {low}{limit}")
        return value

    def switch(self, name: str, default: bool | None) -> bool | None:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise bad(name, value, "true or false")
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, str):
            raise bad(name, value, "a string")
        return clean(value)

    def object(self, name: str) -> "Fields":
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise bad(name, value, "an object")
        return Fields(value or {})

    def refuse(self, name: str, reason: str, allowed: tuple = ()) -> None:
        if self.get(name) is not None and self.get(name) not in allowed:
            raise ApiError(400, f"{name} is not supported: {reason}.", param=name, code="unsupported_parameter")
