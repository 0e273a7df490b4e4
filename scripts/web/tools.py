"""Tools that a model may call from the web page: a calculator, the clock, the days between two dates.

Nothing is executed that a model writes: an expression is read by the parser below, which knows numbers, operators and
a few functions, and gives up on what would take long.

中文：网页中模型可调用的安全内置工具：计算器（自写的表达式解析器，不用 eval）、时钟、日期差。
"""

import datetime
import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

LONGEST = 200  # characters of an expression
DEEPEST = 40  # brackets and signs inside one another
LARGEST_BITS = 4096  # of an exact number


class ToolError(ValueError):
    """A call that cannot be carried out; the message goes back to the model."""


# --- Calculator -------------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"\s*(?:(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?|[A-Za-z]+|//|\*\*|[-+*/%^(),])")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
             "%": operator.mod}  # fmt: skip
LEVELS = (("+", "-"), ("*", "/", "//", "%"))
FUNCTIONS: dict[str, Callable[[float], float]] = {
    "abs": abs, "round": round, "floor": math.floor, "ceil": math.ceil, "sqrt": math.sqrt, "sin": math.sin,
    "cos": math.cos, "tan": math.tan, "exp": math.exp, "ln": math.log, "log": math.log10,
}  # fmt: skip
CONSTANTS = {"pi": math.pi, "e": math.e}
AS_ASCII = str.maketrans("×·÷−（），＋－＊／＝", "**/-(),+-*/=")


class Calculator:
    """Recursive descent over  sum → product → sign → power → number | name | name(sum) | (sum).

    Whole numbers and decimals are calculated exactly, functions in floating point.
    Raises: ToolError on anything that is no such expression, and on results too large.
    """

    def __init__(self, text: str):
        if len(text) > LONGEST:
            raise ToolError(f"the expression has {len(text)} characters, at most {LONGEST} are calculated")
        text = text.translate(AS_ASCII).rstrip().removesuffix("=").rstrip()
        self.tokens: list[str] = []
        at = 0
        while at < len(text):
            match = TOKEN.match(text, at)
            if not match:
                raise ToolError(f"{text[at:].strip()[:1]!r} is not understood; expected numbers, + - * / // % ^ ( )")
            self.tokens.append(match[0].strip())
            at = match.end()
        self.at = self.depth = 0

    def value(self) -> Fraction | float:
        try:
            result = self.level(0)
        except ZeroDivisionError:
            raise ToolError("a division by zero") from None
        except (OverflowError, ValueError, TypeError) as error:
            if isinstance(error, ToolError):
                raise
            raise ToolError(f"this cannot be calculated ({error})") from None
        if self.at < len(self.tokens):
            raise ToolError(f"{self.tokens[self.at]!r} was not expected here")
        return result

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise ToolError(f"{token!r} is missing")

    def level(self, level: int) -> Fraction | float:
        if level == len(LEVELS):
            return self.signed()
        left = self.level(level + 1)
        while self.peek() in LEVELS[level]:
            left = bounded(OPERATORS[self.take()](left, self.level(level + 1)))
        return left

    def signed(self) -> Fraction | float:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ToolError(f"more than {DEEPEST} brackets and signs inside one another")
        if self.peek() in ("+", "-"):
            value = -self.signed() if self.take() == "-" else self.signed()
        else:
            value = self.power()
        self.depth -= 1
        return value

    def power(self) -> Fraction | float:
        base = self.atom()
        if self.peek() not in ("^", "**"):
            return base
        self.take()
        exponent = self.signed()  # 2^-1, and 2^3^2 = 2^(3^2)
        if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(exponent) > LARGEST_BITS:
                raise ToolError("the result is too large")
            return bounded(base ** int(exponent))
        value = float(base) ** float(exponent)
        if isinstance(value, complex):
            raise ToolError("the result is no real number")
        return value

    def atom(self) -> Fraction | float:
        token = self.take()
        if token == "(":
            value = self.level(0)
            self.expect(")")
            return value
        if token and token[0] in "0123456789.":
            return bounded(Fraction(token))
        name = token.lower()
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name in FUNCTIONS:
            self.expect("(")
            value = FUNCTIONS[name](self.level(0))
            self.expect(")")
            return Fraction(value) if isinstance(value, int) else value
        raise ToolError(f"{token!r} is not understood" if token else "the expression ends too early")


def bounded(value: Fraction | float) -> Fraction | float:
    """Raises: ToolError when an exact number grows beyond what is calculated in no time."""
    if isinstance(value, int):  # of a floor division
        value = Fraction(value)
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > LARGEST_BITS:
        raise ToolError("the result is too large")
    return value


def calculate(expression: str) -> str:
    """The value as people write it: whole numbers whole, others with up to 12 digits."""
    value = Calculator(expression).value()
    if isinstance(value, Fraction) and value.denominator == 1:
        return str(value.numerator)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ToolError("the result is too large")
    return f"{number:.12g}"


# --- Dates ------------------------------------------------------------------------------------------------------------


def current_time(utc_offset_hours: float = 0) -> str:
    if not -14 <= utc_offset_hours <= 14:
        raise ToolError(f"utc_offset_hours is {utc_offset_hours}; expected -14 to 14")
    zone = datetime.timezone(datetime.timedelta(hours=utc_offset_hours))
    return datetime.datetime.now(zone).strftime("%Y-%m-%d %H:%M, %A")


def days_between(start: str, end: str) -> str:
    try:
        first, last = datetime.date.fromisoformat(start), datetime.date.fromisoformat(end)
    except ValueError:
        raise ToolError(f"{start!r} and {end!r}: expected dates as in 2024-02-29") from None
    return str((last - first).days)


# --- What the model is told, and how a call is carried out ------------------------------------------------------------


@dataclass(frozen=True)
class Tool:
    """A function, what it is for, and its parameters: name → (JSON type, meaning). required: how many come first."""

    run: Callable[..., str]
    about: str
    parameters: dict[str, tuple[str, str]]
    required: int

    def signature(self, name: str) -> dict:
        """As the OpenAI API and the chat template list it."""
        properties = {key: {"type": kind, "description": text} for key, (kind, text) in self.parameters.items()}
        schema = {"type": "object", "properties": properties, "required": list(self.parameters)[: self.required]}
        return {"type": "function", "function": {"name": name, "description": self.about, "parameters": schema}}


TOOLS = {
    "calculate": Tool(
        calculate, "Calculate an expression", {"expression": ("string", "The expression, for example 123 + 456")}, 1
    ),
    "current_time": Tool(
        current_time,
        "Date, time and day of the week",
        {"utc_offset_hours": ("number", "Hours before Greenwich, for example 8 in Beijing")},
        0,
    ),
    "days_between": Tool(
        days_between,
        "Number of days from one date to another",
        {"start": ("string", "The first date, for example 2024-02-29"), "end": ("string", "The last date")},
        2,
    ),
}


def signatures() -> list[dict]:
    return [tool.signature(name) for name, tool in TOOLS.items()]


@dataclass
class ToolCall:
    """A call as the model wrote it. arguments: the JSON text; result: what it gave, None until it ran."""

    name: str
    arguments: str
    result: str | None = None
    failed: bool = field(default=False)

    def run(self) -> None:
        """Carries out the call; what goes wrong becomes the result, for the model and the reader."""
        try:
            self.result = run_tool(self.name, self.arguments)
        except ToolError as error:
            self.result, self.failed = f"error: {error}", True


def run_tool(name: str, arguments: str) -> str:
    """Raises: ToolError when there is no such tool, or the arguments are not what it takes."""
    if name not in TOOLS:
        raise ToolError(f"there is no tool {name[:50]!r}; expected one of {', '.join(TOOLS)}")
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        raise ToolError('the call is no valid JSON; expected {"name": …, "arguments": {…}}') from None
    tool = TOOLS[name]
    if not isinstance(given, dict) or not set(list(tool.parameters)[: tool.required]) <= set(given) <= set(
        tool.parameters
    ):
        raise ToolError(f"{name} takes the arguments {', '.join(tool.parameters)}")
    for key, value in given.items():
        wanted = str if tool.parameters[key][0] == "string" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ToolError(f"{key} should be a {tool.parameters[key][0]}")
    return tool.run(**given)


CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def split_calls(text: str) -> tuple[str, list[ToolCall]]:
    """(what is said, the calls) of an answer. A call that is no JSON keeps its text as arguments and fails when run."""
    calls = []
    for match in CALL.finditer(text):
        try:
            said = json.loads(match[1])
            arguments = said.get("arguments", {})
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(str(said["name"]), arguments))
        except (ValueError, KeyError, AttributeError, RecursionError):
            name = re.search(r'"name"\s*:\s*"(\w+)"', match[1])
            calls.append(ToolCall(name[1] if name else "?", match[1].strip()))
    return CALL.sub("", text).strip(), calls
