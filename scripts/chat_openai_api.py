"""Chat in the terminal with any server that speaks OpenAI's API, such as scripts/serve_openai_api.py.

    python scripts/chat_openai_api.py                                      # the server on this machine, its first model
    python scripts/chat_openai_api.py --model lora_medical --temperature 0.3 --enable_thinking
    python scripts/chat_openai_api.py --base_url http://192.168.0.7:8998/v1 --api_key secret
    python scripts/chat_openai_api.py --prompt "你是谁？"                  # one question, the answer on standard output

Answers are streamed; a thought (`reasoning_content`) is dimmed and not sent back as history. Ctrl-C stops an answer.

中文：OpenAI 兼容 API 的终端聊天客户端：流式输出、多轮历史，思考过程单独显示。
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.terminal import Painter, clean, dim, line_reader, shows_colour
from trainer.command_line import BoolFlag, UserError, number, run_script

COMMANDS = {
    "/help": "this list",
    "/clear": "forget the conversation",
    "/system": "TEXT  put a system turn in front (empty: none)",
    "/model": "NAME  ask another model; alone: list them",
    "/think": "on, off or auto  whether a thought comes first",
    "/exit": "leave (Ctrl-D too); Ctrl-C stops an answer",
}
SWITCHES = {"on": True, "off": False, "auto": None}


class ApiChat:
    """A conversation with a server.

    Args:
        client: an `openai.OpenAI`; settings: fields of every request; history_cnt: earlier turns that are sent.
        out: where answers go; notes: where remarks about them go.
    """

    def __init__(
        self, client, model: str, settings: dict, *, history_cnt: int = 6, system: str = "", stream: bool = True,
        thinking: bool | None = None, out: TextIO | None = None, notes: TextIO | None = None, colour: bool = False,
    ):  # fmt: skip
        self.client, self.model, self.settings, self.stream = client, model, settings, stream
        self.history_cnt, self.system, self.thinking = history_cnt, system, thinking
        self.out, self.notes, self.colour = out or sys.stdout, notes or sys.stdout, colour
        self.history: list[dict[str, str]] = []

    def note(self, text: str) -> None:
        text = Painter.CONTROL.sub("\ufffd", text)  # names and messages of a server
        print(dim(text) if self.colour else text, file=self.notes, flush=True)

    def messages(self, question: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        history = self.history[max(len(self.history) - self.history_cnt, 0) :]
        return [*system, *history, {"role": "user", "content": clean(question)}]

    def pieces(self, question: str) -> Iterator[tuple[str, str]]:
        """("reasoning" or "content", text) as they come; at the end ("end", what is to be said about the answer)."""
        extra = {} if self.thinking is None else {"enable_thinking": self.thinking}
        request = {"model": self.model, "messages": self.messages(question), "extra_body": extra, **self.settings}
        if not self.stream:
            reply = self.client.chat.completions.create(**request)
            message = reply.choices[0].message
            yield "reasoning", getattr(message, "reasoning_content", None) or ""
            yield "content", message.content or ""
            yield "end", remark(reply.usage, reply.choices[0].finish_reason)
            return
        usage = finish = None
        options = {"include_usage": True}
        with self.client.chat.completions.create(**request, stream=True, stream_options=options) as stream:
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    yield "reasoning", getattr(choice.delta, "reasoning_content", None) or ""
                    yield "content", choice.delta.content or ""
                    finish = choice.finish_reason or finish
        yield "end", remark(usage, finish)

    def ask(self, question: str) -> bool:
        """Shows one answer as it comes and remembers it. False: Ctrl-C stopped it; what was said is kept.

        Raises: openai.OpenAIError.
        """
        from openai import OpenAIError

        painter, start, thought, answer, about = Painter(self.out, self.colour, False), time.perf_counter(), "", "", ""
        finished = False
        try:
            for kind, text in self.pieces(question):
                if kind == "end":
                    about, finished = text, True
                elif text and kind == "reasoning":
                    painter.write(text if thought else f"<think>\n{text}")
                    thought += text
                elif text:
                    painter.write("\n</think>\n\n" + text if thought and not answer else text)
                    answer += text
        except KeyboardInterrupt:
            about = "stopped"
        except OpenAIError:
            if thought or answer:  # what is said about it stands on a line of its own
                painter.write("\n")
            raise
        painter.write("\n" if answer or not thought else "\n</think>\n")
        self.note(f"[{about}, {time.perf_counter() - start:.1f} s]")
        self.history += [{"role": "user", "content": clean(question)}, {"role": "assistant", "content": answer}]
        return finished

    def handle(self, line: str) -> bool:
        """One line from the user. Returns False when the chat is over; a problem is reported and the chat goes on."""
        from openai import OpenAIError

        try:
            if line.startswith("/"):
                name, _, rest = line.strip().partition(" ")
                return self.command(name, rest.strip())
            if line.strip():
                self.ask(line.strip())
        except UserError as error:
            self.note(f"error: {error}")
        except OpenAIError as error:
            self.note(f"error: {explain(error)}")
        return True

    def command(self, name: str, rest: str) -> bool:
        """Carries out one of COMMANDS. Returns False when the chat is over.  Raises: UserError."""
        if name == "/help":
            self.note("\n".join(f"{command:8}  {text}" for command, text in COMMANDS.items()))
        elif name == "/clear":
            self.history.clear()
            self.note("[the conversation is forgotten]")
        elif name == "/system":
            self.system = rest
            self.note(f"[system turn: {rest}]" if rest else "[no system turn]")
        elif name == "/model":
            if rest:
                self.model = rest
            self.note(f"[{self.model}; there is {', '.join(model.id for model in self.client.models.list())}]")
        elif name == "/think":
            if rest not in SWITCHES:
                raise UserError(f"/think {rest}: expected one of {', '.join(SWITCHES)}.")
            self.thinking = SWITCHES[rest]
            self.note(f"[thinking: {rest}]")
        elif name != "/exit":
            raise UserError(f"{name} is no command: /help lists them. To send it as text, put a blank in front.")
        return name != "/exit"


def remark(usage, finish: str | None) -> str:
    tokens = f"{usage.completion_tokens} tokens" if usage else "done"
    return tokens + (", cut at max_tokens" if finish == "length" else "")


def explain(error: Exception) -> str:
    """One line about an error of the openai package."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return Painter.CONTROL.sub("\ufffd", " ".join(str(message or error).split())[:300])


def run_manual(chat: ApiChat, read: Callable[[], str]) -> None:
    """Reads and answers until /exit or the end of the input."""
    going = True
    while going:
        try:
            line = read()
        except EOFError:
            print(file=chat.out)
            break
        except KeyboardInterrupt:
            chat.note("[Ctrl-D or /exit leaves]")
            continue
        going = chat.handle(line)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Chat with a server. Defaults stand in brackets.", allow_abbrev=False)
    add = parser.add_argument
    add("--base_url", default="http://127.0.0.1:8998/v1", help="the server (http://127.0.0.1:8998/v1)")
    add("--api_key", help="its key, if it asks for one (MINIMIND_API_KEY or OPENAI_API_KEY of the environment)")
    add("--model", help="a name it offers (the first one)")
    add("--prompt", metavar="TEXT", help="answer this and leave; remarks go to standard error")
    add("--system", default="", metavar="TEXT", help="system turn in front of the conversation (none)")
    add("--history_cnt", type=number(int, 0), default=6, help="earlier turns that are sent, 2 an exchange (6)")
    add("--stream", action=BoolFlag, default=True, help="show the answer as it is written (on)")
    add("--enable_thinking", action=BoolFlag, help="ask for a thought first, or for none (as the chat template has it)")
    add("--temperature", type=number(float, 0, most=2), help="0: always the likeliest token (as the server has it)")
    add(
        "--top_p", type=number(float, 0, most=1), help="draw from the likeliest up to this share (as the server has it)"
    )
    add("--max_tokens", type=number(int, 1), help="longest answer in tokens (as the server has it)")
    add("--seed", type=number(int, 0), help="same seed, same text (another one each time)")
    add("--timeout", type=number(float, 0, excluded=True), default=300.0, help="seconds without any sign of life (300)")
    args = parser.parse_args(argv)
    if args.history_cnt % 2:
        parser.error(f"--history_cnt {args.history_cnt} is impossible: expected an even number, 2 an exchange")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Connects and chats; exits with 0, 130 after Ctrl-C."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    args = parse_args(argv)
    try:
        from openai import APIConnectionError, OpenAI, OpenAIError
    except ImportError as error:
        raise UserError("This needs the package openai: pip install openai") from error
    key = args.api_key or os.environ.get("MINIMIND_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"
    client = OpenAI(base_url=args.base_url, api_key=key, timeout=args.timeout, max_retries=2)
    settings = {name: getattr(args, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
    try:
        names = [model.id for model in client.models.list()]
        if not names:
            raise UserError(f"{args.base_url} offers no model.")
        chat = ApiChat(
            client, args.model or names[0], {k: v for k, v in settings.items() if v is not None},
            history_cnt=args.history_cnt, system=args.system, stream=args.stream, thinking=args.enable_thinking,
            notes=sys.stdout if args.prompt is None else sys.stderr, colour=shows_colour(),
        )  # fmt: skip
        if args.prompt is not None:
            sys.exit(0 if chat.ask(args.prompt) else 130)
    except OpenAIError as error:
        advice = ""
        if isinstance(error, APIConnectionError):
            advice = " (is the server running? `python scripts/serve_openai_api.py` starts one)"
        raise UserError(f"{args.base_url}: {explain(error)}{advice}") from error
    chat.note(f"{args.base_url} · {chat.model} · /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
    run_manual(chat, line_reader(list(COMMANDS)))


if __name__ == "__main__":
    run_script(main)
