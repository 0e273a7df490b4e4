"""Writes the demo data: a small closed world in English and Chinese, as JSON Lines in the format of every stage.

The world (demo_world.py) holds facts, opposites, numbers, a calendar, translations, people and little stories.
demo_kinds.py combines them and keeps some COMBINATIONS back: a pair of numbers that is never added in any phrasing, a
fact that is asked in a phrasing it was never met in, a person who never owned this thing. The test questions ask for
exactly those, so a model answers them by what it learned of the parts, not from memory. Pure Python, no download, the
same bytes for the same seed.

    python dataset/make_demo_data.py                        # writes dataset/demo/demo_*.jsonl
    python dataset/make_demo_data.py --out_dir my_demo --seed 1

Scoring, one rule: `is_right(reply, record)` is true when reply and answer are equal after `normalise` (NFKC, lower
case, blanks and punctuation at both ends removed). A reply with an <answer> block is judged by that block, and one that
begins with a courtesy ("Gladly: ", "很乐意：", the style that the DPO pairs prefer) by what follows it.
`is_polite_and_short(reply)` looks at that style alone.

中文：生成双语（中英）小世界的演示数据；测试题只问训练中没有出现过的组合，每题只有一个可核对的答案。
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset import demo_world as world
from dataset.demo_kinds import GAP, KINDS, LANGS, MAX_SORTED, STOP, DemoWorld, Item, fill, identity, listing
from model.files import replace_file

DEMO_DIR = ROOT / "dataset" / "demo"
MANIFEST = "demo_manifest.json"
SOURCES = ("make_demo_data.py", "demo_kinds.py", "demo_world.py")
ENDS = " \t\r\n.,!?;:。！？；：，、\"'“”‘’()《》`*"  # what normalise removes at both ends: no minus sign

# How many of each kind, per language. Sentences of the pretraining text, questions of the SFT conversations: numbers
# and people have far more combinations than facts, and a small model needs many of them to see the rule.
PRETRAIN_SENTENCES = {
    "facts": 1600, "opposites": 800, "calendar": 1800, "identity": 150, "words": 700, "phrases": 900, "addition": 1500,
    "subtraction": 2000, "comparison": 1800, "sorting": 1600, "counting": 1500, "memory": 1200, "story": 1500,
}
# What is hard for a small model gets more: keeping people, places and things apart, and before from after.
SFT_ITEMS = {
    "facts": 900, "opposites": 500, "calendar": 2200, "identity": 200, "words": 600, "phrases": 600, "addition": 1300,
    "subtraction": 1700, "comparison": 1400, "sorting": 1900, "counting": 1500, "memory": 1400, "story": 2300,
}
LORA_REPEATS = 3  # each training question of the LoRA files comes up so many times
MENU_TESTS_PER_ITEM = 2  # phrasings, in each language
DPO_SHARE = 0.25  # pairs of a kind, in each language, for each of its SFT_ITEMS: what is hard gets more here too
DPO_REJECTED = {"plain": 0.4, "wrong": 0.2, "winded": 0.2, "rude": 0.2}  # how often each is the rejected answer
MAX_POLITE_CHARS = 80  # after the courtesy; the longest answer of the demo tests has 62
Record = dict[str, object]


def normalise(text: str) -> str:
    """NFKC, lower case, without blanks and punctuation at both ends."""
    return unicodedata.normalize("NFKC", text).lower().strip(ENDS)


COURTESIES = tuple(unicodedata.normalize("NFKC", phrase).lower().strip() for phrase in world.COURTESY.values())


def after_courtesy(reply: str) -> str | None:
    """What follows a leading courtesy phrase of any language, normalised; None where the reply begins otherwise."""
    text = normalise(reply)
    return next((normalise(text[len(phrase):]) for phrase in COURTESIES if text.startswith(phrase)), None)


def is_right(reply: str, record: dict) -> bool:
    """Whether a reply is the answer of a test record (the rule is in this file's docstring).

    A leading courtesy phrase, of whatever language, is taken off before comparing: style is judged apart.
    """
    block = re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL)
    said = block.group(1) if block else reply
    rest = after_courtesy(said)
    return (normalise(said) if rest is None else rest) == normalise(record["answer"])


def is_polite_and_short(reply: str) -> bool:
    """Whether a reply has the style that the DPO pairs prefer; what it says may be right or wrong.

    It begins with a courtesy phrase, and the rest is not empty, has no second one, says no sentence twice and is at
    most MAX_POLITE_CHARS characters long.
    """
    rest = after_courtesy(reply)
    if not rest or len(rest) > MAX_POLITE_CHARS or any(phrase in rest for phrase in COURTESIES):
        return False
    sentences = [normalise(part) for part in re.split(r"[!?。\n]|\.(?!\d)", rest) if normalise(part)]
    return len(set(sentences)) == len(sentences)


def turns(*texts: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def small_talk(demo: DemoWorld, lang: str) -> list[Item]:
    """Greetings and stories on request: they make a chat pleasant and are not scored."""
    rng = demo.rng("talk", lang)
    items = [Item("talk", lang, (said,), reply) for said, reply in world.SMALL_TALK[lang] for _ in range(8)]
    for _ in range(150):
        told = demo.story(rng, lang)
        items.append(Item("talk", lang, (rng.choice(world.STORY_REQUESTS[lang]).format(**told.slots),), told.text))
    return items


def casually(rng: random.Random, text: str) -> str:
    """Now and then the question as people type it: without the capital, without the mark at its end."""
    if rng.random() < 0.12:
        text = text[:1].lower() + text[1:]
    return text.rstrip(".?。？") if rng.random() < 0.12 else text


def pretrain(demo: DemoWorld) -> list[Record]:
    """Documents of a few sentences on one topic; a text about people stands alone."""
    records: list[Record] = []
    for lang in LANGS:
        rng = demo.rng("pretrain", lang)
        for kind, count in PRETRAIN_SENTENCES.items():
            sentences = demo.prose(kind, lang, count)
            while sentences:
                size = 1 if kind in ("memory", "story") else rng.randint(1, 3 if kind == "counting" else 5)
                records.append({"text": GAP[lang].join(sentences[:size])})
                del sentences[:size]
        for names in (world.DAYS[lang], world.MONTHS[lang], [str(n) for n in range(1, 41)]):
            records += [{"text": listing(lang, names)}] * 20
    demo.rng("pretrain").shuffle(records)
    return records


def sft(demo: DemoWorld) -> list[Record]:
    """Conversations: most with one question, some with two or three on different things."""
    records: list[Record] = []
    for lang in LANGS:
        rng = demo.rng("sft", lang)
        items = [item for kind, count in SFT_ITEMS.items() for item in demo.training(kind, lang, count, "sft")]
        items += small_talk(demo, lang)
        rng.shuffle(items)
        alone = [item for item in items if item.kind in ("memory", "story", "talk")]
        others = [item for item in items if item.kind not in ("memory", "story", "talk")]
        records += [{"conversations": turns(*item.turns, item.answer)} for item in alone]
        while others:
            size = rng.choice((1, 1, 1, 1, 2, 3))
            texts = [text for item in others[:size] for text in (casually(rng, item.turns[0]), item.answer)]
            records.append({"conversations": turns(*texts)})
            del others[:size]
    demo.rng("sft").shuffle(records)
    return records


def test_records(items: Iterable[Item]) -> list[Record]:
    return [
        {"kind": item.kind, "lang": item.lang, "conversations": turns(*item.turns), "answer": item.answer}
        for item in items
    ]


def test(demo: DemoWorld) -> list[Record]:
    return test_records([item for kind in KINDS for lang in LANGS for item in demo.tests[kind, lang]])


# --- LoRA: another name, and a tea house with its prices. In the tests each is asked as it never was in training ---


def lora_identity_items(demo: DemoWorld, lang: str) -> tuple[list[Item], list[Item]]:
    """(training, test): the test asks each way once, after a prefix that training puts before other ways only.

    A way that the SFT conversations know is tested, where possible, in a wording that the ordinary test holds back:
    then no file teaches it. Whatever else that test asks is left out here, so that it stays unseen too.
    """
    rng = demo.rng("lora_identity", lang)
    asked: dict[str, list[Item]] = {}
    for way, item in identity(lang, world.LORA_IDENTITY[lang]):
        asked.setdefault(way, []).append(item)
    test = []
    for way, items in asked.items():
        held = [item for item in items if item.turns in demo.asked]
        # Without a prefix a way is part of every prefixed question, so it cannot be unseen.
        test.append(rng.choice(held or [item for item in items if item.turns != (way,)]))
    tested = demo.asked | {item.turns for item in test}
    return [item for items in asked.values() for item in items if item.turns not in tested], test


def lora_domain_items(demo: DemoWorld, lang: str) -> tuple[list[Item], list[Item]]:
    """(training, test): the test asks for each thing in phrasings that training uses for other things only."""
    rng, menu, size = demo.rng("lora_domain", lang), world.LORA_MENU, MENU_TESTS_PER_ITEM
    questions = rng.sample(menu.questions[lang], len(menu.questions[lang]))
    training, test = [], []
    for index, (x, y) in enumerate(rng.sample(menu.rows[lang], len(menu.rows[lang]))):
        # Phrasings are held back in turn, so that training keeps each of them for most things.
        held = {questions[(index * size + offset) % len(questions)] for offset in range(size)}
        for question in questions:
            item = Item("menu", lang, (fill(question, x=x),), world.LORA_PRICE[lang].format(y=y))
            (test if question in held else training).append(item)
    return training, test


def lora_training(demo: DemoWorld, stage: str, split: Callable[..., tuple[list[Item], list[Item]]]) -> list[Record]:
    items = [item for lang in LANGS for item in split(demo, lang)[0]] * LORA_REPEATS
    demo.rng(stage).shuffle(items)
    return [{"conversations": turns(*item.turns, item.answer)} for item in items]


def lora_identity(demo: DemoWorld) -> list[Record]:
    return lora_training(demo, "lora_identity", lora_identity_items)


def lora_identity_test(demo: DemoWorld) -> list[Record]:
    return test_records(item for lang in LANGS for item in lora_identity_items(demo, lang)[1])


def lora_domain(demo: DemoWorld) -> list[Record]:
    return lora_training(demo, "lora_domain", lora_domain_items)


def lora_domain_test(demo: DemoWorld) -> list[Record]:
    return test_records(item for lang in LANGS for item in lora_domain_items(demo, lang)[1])


# --- DPO: a style, polite and short, that SFT does not teach; and it must not cost the right answer ---


def rejected_answer(demo: DemoWorld, rng: random.Random, item: Item, answers: list[str]) -> str:
    """One of the ways of DPO_REJECTED to fall short; `answers` are those of the item's kind."""
    lang, courtesy = item.lang, world.COURTESY[item.lang]
    fault = rng.choices(list(DPO_REJECTED), list(DPO_REJECTED.values()))[0]
    if fault == "plain":
        return item.answer
    if fault == "rude":
        return world.DPO_RUDE[rng.choice(LANGS)]
    if fault == "winded":
        return courtesy + GAP[lang].join([item.answer.rstrip(".。") + STOP[lang]] * 6)
    talk = " ".join((*item.turns, item.answer))  # with it a wrong answer must not name a person's held-back thing
    return courtesy + next(
        answer for answer in rng.sample(answers, len(answers))
        if normalise(answer) != normalise(item.answer) and not demo.joins_held(f"{talk} {answer}", lang)
    )


def dpo(demo: DemoWorld) -> list[Record]:
    """Chosen: courtesy and right answer."""
    records: list[Record] = []
    for lang in LANGS:
        rng = demo.rng("dpo", lang)
        items = [item for kind, n in SFT_ITEMS.items() for item in demo.training(kind, lang, int(n * DPO_SHARE), "dpo")]
        answers: dict[str, list[str]] = {}
        for item in items:
            answers.setdefault(item.kind, []).append(item.answer)
        for item in items:
            chosen, rejected = world.COURTESY[lang] + item.answer, rejected_answer(demo, rng, item, answers[item.kind])
            records.append({"chosen": turns(*item.turns, chosen), "rejected": turns(*item.turns, rejected)})
    demo.rng("dpo").shuffle(records)
    return records


# --- Reasoning and RL: two steps of arithmetic, and sorting four numbers step by step ---


def reasoned(demo: DemoWorld, rng: random.Random, lang: str, numbers: tuple[int, ...]) -> tuple[str, str, str]:
    """(question, thought, answer) for a + b - c (three numbers) or for the sorting of four."""
    if len(numbers) == 3:
        a, b, c = numbers
        values = {"a": a, "b": b, "c": c, "d": a + b, "e": a + b - c, "n": rng.choice(world.NAMES[lang]),
                  "t": rng.choice(world.COUNTED["plural" if lang == "en" else lang])}
        question = fill(rng.choice(world.CHAINS[lang]), **values)
        thought = world.CHAIN_THOUGHT[lang].format(**values)
        if demo.joins_held(question + thought, lang):
            return reasoned(demo, rng, lang, numbers)
        return question, thought, str(a + b - c)
    rest = rng.sample(numbers, len(numbers))
    question = fill(rng.choice(world.SORTING["up"][lang]), n=listing(lang, rest))
    steps = []
    while len(rest) > 1:
        steps.append(world.SELECTION_THOUGHT[lang].format(n=listing(lang, rest), s=min(rest)))
        rest = [number for number in rest if number != min(rest)]
    return question, GAP[lang].join(steps), listing(lang, sorted(numbers))


def reasoning_numbers(demo: DemoWorld) -> dict[str, list[tuple[int, ...]]]:
    """The numbers of each reasoning file: no two files share a problem, no step is one that the test holds back."""
    rng = demo.rng("reasoning")
    chains: dict[tuple[int, ...], None] = {}  # in the order drawn, each once
    while len(chains) < 1124:
        (a, b), (total, c) = rng.choice(demo.free["addition"]), rng.choice(demo.free["subtraction"])
        if a + b == total and (b, c) not in demo.held["subtraction"]:  # "a + b - c" shows "b - c" as well
            chains[a, b, c] = None
    problems = list(chains)
    steps = {2: demo.held["comparison"], 3: demo.held["sorting"]}  # finding the smallest of two compares them
    fours: dict[tuple[int, ...], None] = {}  # in the order drawn, each once
    while len(fours) < 1000:
        four = tuple(sorted(rng.sample(range(1, MAX_SORTED + 1), 4)))
        if not any(held & set(itertools.combinations(four, size)) for size, held in steps.items()):
            fours[four] = None
    sorts = list(fours)
    return {
        "reason_test": problems[:24] + sorts[:24],
        "rl": problems[24:324] + sorts[24:324],
        "reason": problems[324:] + sorts[324:],
    }


def reasoning_records(demo: DemoWorld, stage: str) -> Iterator[tuple[str, str, str, str]]:
    """(lang, question, thought, answer)"""
    numbers = reasoning_numbers(demo)[stage]
    for lang in LANGS:
        rng = demo.rng(stage, lang)
        yield from ((lang, *reasoned(demo, rng, lang, values)) for values in rng.sample(numbers, len(numbers)))


def reason(demo: DemoWorld) -> list[Record]:
    records = [
        {"conversations": turns(question, f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>")}
        for _, question, thought, answer in reasoning_records(demo, "reason")
    ]
    demo.rng("reason").shuffle(records)
    return records


def reason_test(demo: DemoWorld) -> list[Record]:
    problems = reasoning_records(demo, "reason_test")
    return test_records(Item("reason", lang, (question,), answer) for lang, question, _, answer in problems)


def rl(demo: DemoWorld) -> list[Record]:
    problems = reasoning_records(demo, "rl")
    records = [{"conversations": turns(question, ""), "answer": answer} for _, question, _, answer in problems]
    demo.rng("rl").shuffle(records)
    return records


# --- Multiple choice and tool calls ---


def choice(demo: DemoWorld) -> list[Record]:
    """Facts of the world with three wrong values of the same relation."""
    records: list[Record] = []
    for lang in LANGS:
        rng = demo.rng("choice", lang)
        for subject, relation in world.FACTS.items():
            values = sorted({y for _, y in relation.rows[lang]})
            for x, y in relation.rows[lang]:
                options = rng.sample([y, *rng.sample([value for value in values if value != y], 3)], 4)
                question = rng.choice([q for q in relation.questions[lang] if (fill(q, x=x),) not in demo.asked])
                records.append({
                    "subject": f"{subject} ({lang})", "question": fill(question, x=x),
                    **dict(zip("ABCD", options, strict=True)), "answer": "ABCD"[options.index(y)],
                })
    return records


def tool_signatures(lang: str) -> str:
    signatures = []
    for name, described in world.TOOLS.items():
        about, argument, meaning = described[lang]
        properties = {argument: {"type": "string", "description": meaning}}
        parameters = {"type": "object", "properties": properties, "required": [argument]}
        function = {"name": name, "description": about, "parameters": parameters}
        signatures.append({"type": "function", "function": function})
    return json.dumps(signatures, ensure_ascii=False)


def toolcall(demo: DemoWorld) -> list[Record]:
    """Weather and big sums by a tool; small facts in between that need none."""
    records: list[Record] = []
    for lang in LANGS:
        rng = demo.rng("toolcall", lang)
        system = {"role": "system", "content": "", "tools": tool_signatures(lang)}
        for item in demo.training("facts", lang, 100, "toolcall"):
            records.append({"conversations": [system, *turns(*item.turns, item.answer)]})
        for name in ("get_weather", "calculate") * 200:
            a, b = rng.randint(100, 999), rng.randint(100, 999)
            city, weather, degrees = rng.choice(world.CITIES[lang]), rng.choice(world.WEATHER[lang]), rng.randint(0, 35)
            values = {"c": city, "w": weather, "d": degrees, "a": a, "b": b, "s": a + b}
            if name == "get_weather":
                arguments, result = {"city": city}, {"weather": weather, "degrees": degrees}
            else:
                arguments, result = {"expression": f"{a} + {b}"}, {"result": a + b}
            call = json.dumps([{"name": name, "arguments": arguments}], ensure_ascii=False)
            records.append({"conversations": [
                system,
                {"role": "user", "content": rng.choice(world.TOOL_QUESTIONS[name][lang]).format(**values)},
                {"role": "assistant", "content": "", "tool_calls": call},
                {"role": "tool", "content": json.dumps(result, ensure_ascii=False)},
                {"role": "assistant", "content": world.TOOL_ANSWERS[name][lang].format(**values)},
            ]})
    demo.rng("toolcall").shuffle(records)
    return records


STAGES: dict[str, Callable[[DemoWorld], list[Record]]] = {
    "pretrain": pretrain, "sft": sft, "test": test, "lora_identity": lora_identity,
    "lora_identity_test": lora_identity_test, "lora_domain": lora_domain, "lora_domain_test": lora_domain_test,
    "dpo": dpo, "reason": reason, "reason_test": reason_test, "rl": rl, "choice": choice, "toolcall": toolcall,
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def version() -> str:
    """Names the generator's sources: any change to them makes the files be written again."""
    sources = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SOURCES)
    return hashlib.sha256("\0".join(sources).encode("utf-8")).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write the same file
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    replace_file(part, path)


def up_to_date(out_dir: Path, seed: int) -> bool:
    """Whether the folder's manifest and files are what this generator and seed would write."""
    try:
        manifest = json.loads((out_dir / MANIFEST).read_text(encoding="utf-8"))
        return (manifest["version"], manifest["seed"]) == (version(), seed) and manifest["sha256"] == {
            stage: digest(out_dir / f"demo_{stage}.jsonl") for stage in STAGES
        }
    except (OSError, ValueError, KeyError, TypeError):
        return False  # no manifest, a damaged one or a missing file: write everything again


def generate(out_dir: Path = DEMO_DIR, seed: int = 0) -> dict[str, Path]:
    """Writes the demo files of every stage, unless the same ones are there already.

    Returns:
        stage -> file, for instance `{"pretrain": dataset/demo/demo_pretrain.jsonl, ...}`.

    Raises:
        OSError: the folder cannot be written.
    """
    out_dir = Path(out_dir)
    paths = {stage: out_dir / f"demo_{stage}.jsonl" for stage in STAGES}
    if up_to_date(out_dir, seed):
        return paths
    demo = DemoWorld(seed)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for stage, make in STAGES.items():
            lines = (json.dumps(record, ensure_ascii=False) for record in make(demo))
            write_atomically(paths[stage], "".join(line + "\n" for line in lines))
        sums = {stage: digest(path) for stage, path in paths.items()}
        manifest = {"version": version(), "seed": seed, "sha256": sums}
        write_atomically(out_dir / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or error
        advice = "Give a folder you can write to with --out_dir."
        raise OSError(f"Cannot write the demo data to {out_dir}: {reason}. {advice}") from error
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bilingual demo data, one JSON Lines file per stage.")
    parser.add_argument("--out_dir", type=Path, default=DEMO_DIR, help="folder for the files (default: dataset/demo)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws another world split (default: 0)")
    args = parser.parse_args()
    try:
        paths = generate(args.out_dir, args.seed)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for path in paths.values():
        with open(path, encoding="utf-8") as file:
            print(f"{sum(1 for _ in file):6d} records {path.stat().st_size / 1e6:6.2f} MB  {path}")


if __name__ == "__main__":
    main()
