"""The demo data: right answers, unseen combinations, the formats of all stages, the same bytes for the same seed.

Answers are recomputed here from the text of the question alone; what the training files contain is read back from the
files with patterns written here, not asked from the generator.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from dataset import demo_world as world
from dataset import make_demo_data
from dataset.make_demo_data import MANIFEST, generate, is_polite_and_short, is_right, normalise

ROOT = Path(__file__).resolve().parents[1]
TEST_STAGES = ("test", "lora_identity_test", "lora_domain_test", "reason_test")
ARITHMETIC = {
    "addition": [
        r"(\d+) ?(?:\+|plus|加) ?(\d+)", r"(?:[Aa]dd|add) (\d+) and (\d+)", r"把(\d+)和(\d+)加",
        r"(\d+) \w+(?:,| and)? gets? (\d+)", r"(\d+)个\w+，又得到(\d+)", r"with (\d+), add (\d+)",
        r"从(\d+)开始，加上(\d+)",
    ],
    "subtraction": [
        r"(\d+) ?(?:-|minus|减) ?(\d+)", r"(\d+) \w+ and give away (\d+)", r"(\d+)个\w+，送走了(\d+)",
        r"从(\d+)里拿走(\d+)",
    ],
}
TAKEN_AWAY = r"[Tt]ake (\d+) away from (\d+)"  # the second number comes first in the subtraction


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """stage -> records, of a fresh folder."""
    started = time.process_time()
    paths = generate(tmp_path_factory.mktemp("demo"))
    assert time.process_time() - started < 10
    return {stage: read(path) for stage, path in paths.items()}


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def strings(value):
    """Every string inside a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(strings(part) for part in value.values())
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(strings(part) for part in value)


def training(demo):
    return [record for stage, records in demo.items() if stage not in TEST_STAGES for record in records]


def asked(record):
    return record["conversations"][-1]["content"]


def of_kind(demo, *kinds):
    return [record for record in demo["test"] if record["kind"] in kinds]


def numbers(text):
    return [int(digits) for digits in re.findall(r"\d+", text)]


def sentences(demo):
    """The sentences of all training files, lower-cased."""
    for record in training(demo):
        for text in strings(record):
            yield from re.split(r"(?<=[.?。？])|\n", text.lower())


def arithmetic_pairs(texts, kind):
    """Every (a, b) that some text adds, or takes b from a."""
    for text in texts:
        for pattern in ARITHMETIC[kind]:
            yield from ((int(a), int(b)) for a, b in re.findall(pattern, text))
        if kind == "subtraction":
            yield from ((int(a), int(b)) for b, a in re.findall(TAKEN_AWAY, text))


# --- The scoring rule ---


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("12", "12", True), (" 12.\n", "12", True), ("１２。", "12", True), ("PARIS!", "Paris", True),
        ("“巴黎”。", "巴黎", True),
        ("3, 7, 9.", "3, 7, 9", True), ("<think>\n7 + 5\n</think>\n<answer>\n12\n</answer>", "12", True),
        ("", "12", False), ("...", "12", False), ("-12", "12", False), ("112", "12", False), ("12 12", "12", False),
        ("It is Paris", "Paris", False), ("9, 7, 3", "3, 7, 9", False), ("<answer>\n13\n</answer> 12", "12", False),
        ("Gladly: 12", "12", True), ("很乐意：12。", "12", True), (" gladly:Paris.", "Paris", True),
        ("很乐意:巴黎", "巴黎", True), ("Gladly: 巴黎", "巴黎", True), ("很乐意：Paris", "Paris", True),
        ("<answer>\nGladly: 12\n</answer>", "12", True), ("Gladly: <answer>12</answer>", "12", True),
        ("Gladly: 13", "12", False), ("Gladly:", "12", False), ("Gladly: Gladly: 12", "12", False),
        ("12 Gladly:", "12", False), ("Gladly 12", "12", False), ("Sure: 12", "12", False),
        ("Gladly: 12. 12.", "12", False),
    ],
)
def test_one_strict_rule(reply, answer, right):
    assert is_right(reply, {"answer": answer}) is right


@pytest.mark.parametrize(
    ("reply", "good"),
    [
        ("Gladly: 12", True), ("很乐意：12", True), (" gladly: Paris.\n", True), ("很乐意:我叫MiniMind。", True),
        ("Gladly: I am Ben. I am at home.", True), ("Gladly: 3, 7, 9", True), ("很乐意：汪汪", True),
        ("Gladly: 3.3", True), ("Gladly: What?! Yes...", True),
        ("Gladly: " + "x" * 80, True), ("Gladly: " + "x" * 81, False),
        ("12", False), ("", False), ("Gladly:", False), ("很乐意：。", False), ("Gladly 12", False),
        ("It is 12. Gladly: 12", False), ("Gladly: Gladly: 12", False), ("Gladly: 12. 很乐意：13", False),
        ("Gladly: 12. 12.", False), ("Gladly: Yes. It is Paris. yes!", False), ("很乐意：十二。十三。十二", False),
        ("很乐意：真的吗？真的吗？", False), ("I do not want to answer that.", False), ("我不想回答这个问题。", False),
    ],
)
def test_polite_and_short(reply, good):
    assert is_polite_and_short(reply) is good


def test_answers_are_polite_and_short_with_a_courtesy_and_only_with_it(demo):
    """So a right answer never fails the style for its length; six times the same one always does."""
    for record in itertools.chain.from_iterable(demo[stage] for stage in TEST_STAGES):
        answer = record["answer"]
        for courtesy, stop in (("Gladly: ", ". "), ("很乐意：", "。")):
            assert is_polite_and_short(courtesy + answer) and is_right(courtesy + answer, record), answer
            assert not is_polite_and_short(courtesy + (answer + stop) * 6), answer
        assert not is_polite_and_short(answer), answer


# --- Right and balanced questions ---


def test_questions_are_balanced_distinct_and_well_formed(demo):
    counts = Counter((record["kind"], record["lang"]) for record in demo["test"])
    kinds = {kind for kind, _ in counts}
    assert len(kinds) >= 10
    for kind in kinds:
        assert counts[kind, "en"] == counts[kind, "zh"] >= 20, kind
    assert 200 <= sum(count for (_, lang), count in counts.items() if lang == "zh") <= 320
    for record in itertools.chain.from_iterable(demo[stage] for stage in TEST_STAGES):
        roles = [turn["role"] for turn in record["conversations"]]
        assert roles == [("user", "assistant")[i % 2] for i in range(len(roles))] and roles[-1] == "user"
        assert set(record) == {"kind", "lang", "conversations", "answer"}
        assert normalise(record["answer"]) and is_right(record["answer"], record)
        if record["lang"] == "zh":
            assert re.search(r"[\u4e00-\u9fff]", asked(record)) or record["kind"] in ("addition", "subtraction")
    for stage in TEST_STAGES:
        together = [json.dumps(record["conversations"]) for record in demo[stage]]
        assert len(set(together)) == len(together), stage


def test_sums_and_differences_are_right(demo):
    for record in of_kind(demo, "addition", "subtraction"):
        pairs = list(arithmetic_pairs([asked(record)], record["kind"]))
        assert len(set(pairs)) == 1, asked(record)
        a, b = pairs[0]
        assert record["answer"] == str(a + b if record["kind"] == "addition" else a - b), asked(record)
        assert a - b >= 0 or record["kind"] == "addition"


def test_comparisons_sortings_and_counts_are_right(demo):
    for record in of_kind(demo, "comparison"):
        question = asked(record)
        big, small = re.search(r"bigger|larger|more|大|多", question), re.search(r"smaller|less|fewer|小|少", question)
        assert bool(big) != bool(small), question
        assert len(set(numbers(question))) == 2
        assert int(record["answer"]) == (max if big else min)(numbers(question)), question
    for record in of_kind(demo, "sorting"):
        question = asked(record)
        down = re.search(r"large to small|largest first|downwards|从大到小", question)
        assert down or re.search(r"small to large|smallest first|upwards|从小到大", question), question
        given = numbers(question)
        assert len(given) == 3 and sorted(given, reverse=bool(down)) == numbers(record["answer"])
    for record in of_kind(demo, "counting"):
        question = asked(record)
        assert record["answer"] == str(len(re.findall(r"[,、]", question)) + 1), question


def test_calendar_is_right(demo):
    days = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    months = ("January February March April May June July August September October November December").split()
    tens = [*"一二三四五六七八九十", "十一", "十二"]
    cycles = [days, months, ["星期" + c for c in "一二三四五六日"], [c + "月" for c in tens]]
    back = r"before|yesterday|\blast\b|begins, which|前|昨天|上个月|上一个月|之前|开始了"
    ahead = r"after|tomorrow|next|follows|is over, which|后|明天|下个月|下一个月|第二天|结束了"
    for record in of_kind(demo, "calendar"):
        question = asked(record)
        cycle = next(c for c in cycles if record["answer"] in c)
        named = max((name for name in cycle if name in question), key=len)  # 十一月 contains 一月
        step = -1 if re.search(back, question) else 1
        assert step == -1 or re.search(ahead, question), question
        assert record["answer"] == cycle[(cycle.index(named) + step) % len(cycle)], question


def test_facts_opposites_and_translations_agree_with_the_training_text(demo):
    told = [record["text"] for record in demo["pretrain"]]
    said = {sentence.strip() for text in told for sentence in re.split(r"(?<=[.。])", text.lower())}
    for record in of_kind(demo, "facts", "opposites", "translation"):
        question, answer = asked(record).lower(), record["answer"].lower()
        pair = [s for s in said if answer in s and subject_of(question, record["lang"]) in s]
        if record["kind"] == "translation" and not pair:  # a new pair of words: both of them are translated elsewhere
            adjective_noun = dict(zip(world.ADJECTIVES["en"], world.ADJECTIVES["zh"], strict=True))
            nouns = dict(zip(world.NOUNS["en"], world.NOUNS["zh"], strict=True))
            english = answer if answer.isascii() else quoted(question)
            first, second = english.split()
            assert adjective_noun[first] + nouns[second] in (answer, quoted(question))
            continue
        assert pair, (question, answer)
    golden = {"capital of France": "Paris", "colour of snow": "white", "opposite of hot": "cold", "“moon”": "月亮",
              "法国的首都": "巴黎", "“高”的反义词": "低"}
    conversations = [record["conversations"] for record in demo["sft"]]
    for part, answer in golden.items():
        replies = {c[i + 1]["content"] for c in conversations for i, t in enumerate(c[:-1])
                   if t["role"] == "user" and part in t["content"]}
        assert replies == {answer}, part


def quoted(text):
    return re.search(r"“(.+?)”", text).group(1)


def subject_of(question, lang):
    """The thing a fact, opposite or translation asks for: the longest listed subject inside the question."""
    if "“" in question:
        return quoted(question)
    subjects = [x for relation in world.FACTS.values() for x, _ in relation.rows[lang]] + world.OPPOSITES[lang]
    return max((x.lower() for x in subjects if x.lower() in question), key=len)


def test_memory_and_story_answers_stand_in_the_text(demo):
    for record in of_kind(demo, "memory"):
        told = " ".join(turn["content"] for turn in record["conversations"][:-1] if turn["role"] == "user")
        assert record["answer"] in told, record
    for record in of_kind(demo, "story"):
        assert record["answer"].split(" ")[-1] in asked(record), record


def test_identity_answers_are_those_of_the_training(demo):
    known = {}
    for record in demo["sft"]:
        texts = [turn["content"] for turn in record["conversations"]]
        known |= {normalise(q): a for q, a in zip(texts[::2], texts[1::2], strict=True)}
    for record in of_kind(demo, "identity"):
        question = normalise(asked(record))
        nearest = max(known, key=lambda other, end=question[::-1]: len(os.path.commonprefix([other[::-1], end])))
        assert known[nearest] == record["answer"], question


# --- Nothing of the test is in the training ---


def test_no_test_question_occurs_in_any_training_file(demo):
    """Single questions: nowhere, neither as a turn nor inside a text. Questions after a talk: never the same talk."""
    texts = "\n".join(text.lower() for record in training(demo) for text in strings(record))
    users = {normalise(t["content"]) for record in training(demo)
             for t in record.get("conversations", record.get("chosen", [])) if t["role"] == "user"}
    talks = {json.dumps(record["conversations"][:-1]) for record in demo["sft"]}
    for record in itertools.chain(demo["test"], demo["reason_test"]):
        question = asked(record)
        if len(record["conversations"]) > 1:
            assert json.dumps(record["conversations"]) not in talks
        else:
            assert normalise(question) not in users, question
            if question.lower() in texts:  # allowed only as the tail of "17+1=?", 十一月 or a longer list
                assert not re.search(r"(?<![\d十、])(?<!, )" + re.escape(question.lower()), texts), question
    for record in demo["lora_identity_test"] + demo["lora_domain_test"]:
        assert normalise(asked(record)) not in users and asked(record).lower() not in texts, record


@pytest.mark.parametrize("kind", ["addition", "subtraction"])
def test_pairs_of_the_test_are_never_added_or_subtracted_in_training(demo, kind):
    """In no language, no phrasing, no file; a sum in neither order. Their digits are met in many other pairs."""
    held = set(arithmetic_pairs(map(asked, of_kind(demo, kind)), kind))
    assert len(held) >= 20
    held |= {(b, a) for a, b in held} if kind == "addition" else set()
    seen = set(arithmetic_pairs((text for record in training(demo) for text in strings(record)), kind))
    assert len(seen) > 1500 and not held & seen
    for place in (1, 10):
        digits = Counter((a // place % 10, b // place % 10) for a, b in seen if max(a, b) < 100)
        assert all(digits[a // place % 10, b // place % 10] >= 10 for a, b in held)


def test_compared_and_sorted_numbers_of_the_test_are_new(demo):
    pairs = {frozenset(numbers(asked(record))) for record in of_kind(demo, "comparison")}
    triples = {frozenset(numbers(asked(record))) for record in of_kind(demo, "sorting")}
    compares = re.compile(r"bigger|smaller|larger|less|more|fewer|大|小|多|少")
    calculates = re.compile(r"[-+]|plus|minus|\bgets?\b|加|减|得到")
    seen_pairs, seen_triples = set(), set()
    for sentence in sentences(demo):
        found = frozenset(numbers(sentence))
        if len(found) == 2 and compares.search(sentence) and not calculates.search(sentence):
            seen_pairs.add(found)
        elif len(found) == 3 and not calculates.search(sentence):
            seen_triples.add(found)
    assert len(seen_pairs) > 1000 and len(seen_triples) > 900
    assert not pairs & seen_pairs
    assert not triples & seen_triples


def test_counted_things_of_the_test_are_new(demo):
    repeated = re.compile(r"(?:\b(\w+)(?:, \1\b)+)|(?:([^、：，。？\s]+)(?:、\2)+)")

    def counted(text):
        for match in repeated.finditer(text.lower()):
            yield match.group(1) or match.group(2), len(re.findall("[,、]", match.group())) + 1

    held = {pair for record in of_kind(demo, "counting") for pair in counted(asked(record))}
    seen = {pair for sentence in sentences(demo) for pair in counted(sentence)}
    assert len(held) >= 40 and len(seen) > 250
    assert not held & seen


def test_people_of_the_test_have_something_they_never_had_in_training(demo):
    """Who asks or is asked for in a test, and the thing at stake, are never named in one training record."""
    records = [" ".join(strings(record)) for record in training(demo)]
    for lang in ("en", "zh"):
        named = re.compile("|".join(world.NAMES[lang]))
        about_people = [text for text in records if named.search(text)]
        by_name = {name: [t for t in about_people if mentions(t, name, lang)] for name in world.NAMES[lang]}
        for record in of_kind(demo, "memory", "story"):
            if record["lang"] != lang:
                continue
            text = " ".join(turn["content"] for turn in record["conversations"])
            names = [name for name in world.NAMES[lang] if mentions(text, name, lang)]
            values = [value for table in (world.COLOURS, world.PETS, world.FOODS, world.CITIES, world.PLACES,
                                          world.OBJECTS) for value in table[lang] if mentions(text, value, lang)]
            values += [str(n) for n in numbers(text) if n >= 10]
            new = [(name, value) for name in names for value in values
                   if not any(mentions(t, value, lang) for t in by_name[name])]
            assert new, text


def mentions(text, word, lang):
    return word in text and (lang == "zh" or bool(re.search(rf"\b{re.escape(word)}\b", text)))


# --- LoRA: another name, and prices ---


def language(text):
    return "zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"


def worded(table, lang):
    """question -> (what was put before the way to ask, the way), for every way of an identity table."""
    return {
        (before + (way[:1].lower() + way[1:] if before.endswith((", ", ": ")) else way)): (before, way)
        for ways, _ in table[lang] for way in ways for before in world.IDENTITY_PREFIXES[lang]
    }


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_other_name_is_in_every_answer_and_asked_in_new_wordings(demo, lang):
    table = world.LORA_IDENTITY
    ways = {way: (topic, answer) for topic, (listed, answer) in enumerate(table[lang]) for way in listed}
    assert len(table[lang]) >= 6 and all(len(listed) >= 4 for listed, _ in table[lang])
    ordinary = {way: answer for listed, answer in world.IDENTITY[lang] for way in listed}
    assert ordinary.keys() <= ways.keys()
    assert not {way: answer for way, answer in ordinary.items() if ways[way][1] == answer}

    parts = worded(table, lang)
    trained, per_prefix = {}, Counter()
    for record in demo["lora_identity"]:
        question, answer = (turn["content"] for turn in record["conversations"])
        if language(question) == lang:
            before, way = parts[question]
            assert answer == ways[way][1] and {"en": "Jasmine", "zh": "茉莉"}[lang] in answer
            trained.setdefault(way, set()).add(before)
            per_prefix[before] += 1
    assert trained.keys() == ways.keys()
    assert min(len(before) for before in trained.values()) >= 6
    assert per_prefix.keys() == set(world.IDENTITY_PREFIXES[lang]) and min(per_prefix.values()) >= 50

    tested = [record for record in demo["lora_identity_test"] if record["lang"] == lang]
    assert len(tested) == 32 and {record["kind"] for record in tested} == {"identity"}
    asked_ways = Counter(parts[asked(record)][1] for record in tested)
    topics = Counter(ways[way][0] for way in asked_ways.elements())
    assert max(asked_ways.values()) - min(asked_ways[way] for way in ways) <= 1  # each as often as any other
    assert max(topics.values()) - min(topics[topic] for topic in range(len(table[lang]))) <= 1
    for record in tested:
        before, way = parts[asked(record)]
        assert before and before not in trained[way] and record["answer"] == ways[way][1]


def test_the_other_name_and_the_prices_are_nowhere_else(demo):
    """The adapters have something to teach: no other file, test or training, knows the tea house."""
    for stage, records in demo.items():
        text = json.dumps(records, ensure_ascii=False).lower()
        for word in ("jasmine", "茉莉", "lantern", "灯笼"):
            assert (word in text) is stage.startswith("lora_identity"), (stage, word)
        for word in ("yuan", "元", *world.LORA_MENU.rows["en"][0][:1], world.LORA_MENU.rows["zh"][0][0]):
            assert (word in text) is stage.startswith("lora_domain"), (stage, word)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_each_thing_of_the_menu_is_asked_for_in_two_new_phrasings(demo, lang):
    things = dict(world.LORA_MENU.rows[lang])
    assert len(things) == 16 == len(set(things.values())) and len(world.LORA_MENU.questions[lang]) >= 8

    def split(question):
        """(thing, phrasing)"""
        thing = max((x for x in things if x in question), key=len)
        return thing, re.sub(r"\ban? (?=\{)", "a ", question.replace(thing, "{x}"))

    prices, trained = {}, {}
    for record in demo["lora_domain"]:
        question, answer = (turn["content"] for turn in record["conversations"])
        if language(question) == lang:
            thing, phrasing = split(question)
            assert prices.setdefault(thing, answer) == answer
            trained.setdefault(thing, set()).add(phrasing)
    assert prices == {x: {"en": "{} yuan", "zh": "{}元"}[lang].format(y) for x, y in things.items()}
    assert all(len(phrasings) >= 6 for phrasings in trained.values())
    known = Counter(phrasing for phrasings in trained.values() for phrasing in phrasings)
    assert len(known) >= 8 and min(known.values()) >= 10  # each phrasing is met with most things

    tested = [record for record in demo["lora_domain_test"] if record["lang"] == lang]
    assert {record["kind"] for record in tested} == {"menu"}
    assert Counter(split(asked(record))[0] for record in tested) == dict.fromkeys(things, 2)
    for record in tested:
        thing, phrasing = split(asked(record))
        assert phrasing in known and phrasing not in trained[thing] and record["answer"] == prices[thing]


def test_the_menu_has_the_same_prices_in_both_languages_and_the_files_are_small(demo):
    rows = world.LORA_MENU.rows
    assert [y for _, y in rows["en"]] == [y for _, y in rows["zh"]]
    for stage in ("lora_identity", "lora_domain"):
        times = Counter(json.dumps(record) for record in demo[stage])
        assert set(times.values()) == {3} and 300 <= len(demo[stage]) <= 2000


# --- DPO: polite, short and right ---


def test_preferred_answers_are_polite_short_and_right(demo):
    """Right: what the SFT file answers to the same question, what the numbers give, what the user told before."""
    taught = {}
    for record in demo["sft"]:
        texts = [turn["content"] for turn in record["conversations"]]
        taught |= {normalise(q): a for q, a in zip(texts[::2], texts[1::2], strict=True)}
    checked = Counter()
    for record in demo["dpo"]:
        *before, question, reply = (turn["content"] for turn in record["chosen"])
        lang = "en" if reply.startswith("Gladly:") else "zh"
        answer = reply.removeprefix(world.COURTESY[lang])
        assert reply == world.COURTESY[lang] + answer and is_polite_and_short(reply)
        around = re.sub("“.+?”", "", question)  # without a quoted word to be translated
        assert language(around) == lang or not re.search("[a-z]", around), question  # "3 + 4 = ?" speaks both
        if before:
            assert answer.split(" ")[-1] in " ".join((*before[::2], question)), record
            checked["told"] += 1
        elif normalise(question) in taught:
            assert answer == taught[normalise(question)], question
            checked["taught"] += 1
        for kind in () if before else ARITHMETIC:
            for a, b in arithmetic_pairs([question], kind):
                assert answer == str(a + b if kind == "addition" else a - b), question
                checked[kind] += 1
    assert checked["taught"] >= 800 and checked["told"] >= 400, checked
    assert checked["addition"] >= 200 and checked["subtraction"] >= 200, checked


def test_rejected_answers_fall_short_in_the_planned_ways(demo):
    faults = Counter()
    for record in demo["dpo"]:
        assert record["chosen"][:-1] == record["rejected"][:-1]
        chosen, rejected = (record[side][-1]["content"] for side in ("chosen", "rejected"))
        lang = "en" if chosen.startswith("Gladly:") else "zh"
        courtesy = world.COURTESY[lang]
        answer = chosen.removeprefix(courtesy)
        if rejected in world.DPO_RUDE.values():
            fault = "rude in " + ("the own" if rejected == world.DPO_RUDE[lang] else "the other")
        elif rejected == answer:
            fault = "plain"
        elif normalise(rejected).count(normalise(answer)) >= 6:
            fault = "winded"
            assert rejected.startswith(courtesy)
        else:
            fault = "wrong"
            assert rejected.startswith(courtesy) and not is_right(rejected, {"answer": answer})
        assert is_polite_and_short(rejected) is (fault == "wrong"), rejected
        faults[lang, fault] += 1
    planned = {"plain": 0.4, "wrong": 0.2, "winded": 0.2, "rude in the own": 0.1, "rude in the other": 0.1}
    for lang in ("en", "zh"):
        total = sum(count for (of, _), count in faults.items() if of == lang)
        assert 4000 <= total <= 4300
        assert {fault for of, fault in faults if of == lang} == planned.keys()
        for fault, share in planned.items():
            assert abs(faults[lang, fault] / total - share) < 0.04, (lang, fault)


def test_preferences_are_about_questions_of_all_kinds_in_mixed_order(demo):
    signs = {
        "facts": r"capital of|colou?r (is|of|does)|made of|legs|首都|颜色|做的|条腿",
        "opposites": r"opposite|反义词|相反",
        "calendar": r"Which day|Which month|[Tt]he (day|month)|星期几|几月",
        "identity": r"\byou (a |called|made|learn|trained|speak|know|do\b|help)|[Ww]ho |your name|你",
        "words": r"^(?!.*反).*“([a-z]+|[^的”a-z]+)”",
        "phrases": r"“([a-z]+ [a-z]+|[^”]+的[^”]+)”",
        "addition": r"\+|plus|[Aa]dd |get \d+ more|加|又得到",
        "subtraction": r"\d ?- ?\d|minus|Take|give away|减|送走",
        "comparison": r"bigger|smaller|larger|less|more|fewer|哪个|较大的|较小的",
        "sorting": r"small to|large to|first|wards|从小到大|从大到小",
        "counting": r"(\w+), \1\b|(\w+)、\2",
        "memory": r"^(My|I|Hello, my) |^(我|你好，我)",
        "story": r"went to|together|hungry|morning|去了|一起|饿了|早上",
    }
    firsts = {lang: [record["chosen"][0]["content"] for record in demo["dpo"]
                     if record["chosen"][-1]["content"].startswith(world.COURTESY[lang])] for lang in ("en", "zh")}
    for (lang, questions), (kind, sign) in itertools.product(firsts.items(), signs.items()):
        found = sum(bool(re.search(sign, question)) for question in questions)
        assert 45 <= found <= 1200, (kind, lang, found)
    polite = [record["chosen"][-1]["content"][0] for record in demo["dpo"]]
    changes = sum(a != b for a, b in itertools.pairwise(polite))
    assert 0.4 < changes / len(polite) < 0.6  # the languages take no turns and form no blocks


def test_no_other_file_has_the_courtesy(demo):
    for stage, records in demo.items():
        text = json.dumps(records, ensure_ascii=False).lower()
        for phrase in world.COURTESY.values():
            assert (phrase.strip(" :：\n").lower() in text) is (stage == "dpo"), (stage, phrase)


# --- Formats of the stages ---


def test_formats_of_the_stages(demo):
    assert all(set(r) == {"text"} and r["text"] for r in demo["pretrain"])
    for stage in ("sft", "lora_identity", "lora_domain", "reason"):
        for record in demo[stage]:
            roles = [turn["role"] for turn in record["conversations"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2), stage
            assert all(turn["content"].strip() for turn in record["conversations"])
    pattern = re.compile(r"<think>\n.+\n</think>\n<answer>\n(.+)\n</answer>")
    for record in demo["reason"]:
        assert pattern.fullmatch(record["conversations"][-1]["content"]), record
    for record in demo["rl"]:
        assert record["answer"] and record["conversations"][-1] == {"role": "assistant", "content": ""}
    for record in demo["dpo"]:
        assert record["chosen"][:-1] == record["rejected"][:-1]
        assert normalise(record["chosen"][-1]["content"]) != normalise(record["rejected"][-1]["content"])
    for record in demo["choice"]:
        assert set(record) == {"subject", "question", "A", "B", "C", "D", "answer"} and record["answer"] in "ABCD"
        assert len({record[letter] for letter in "ABCD"}) == 4
    assert Counter(record["answer"] for record in demo["choice"]).keys() == set("ABCD")
    calls = 0
    for record in demo["toolcall"]:
        system, *rest = record["conversations"]
        names = {tool["function"]["name"] for tool in json.loads(system["tools"])}
        assert system["role"] == "system" and len(names) == 2
        for turn, following in itertools.pairwise(rest):
            if "tool_calls" in turn:
                calls += 1
                (call,) = json.loads(turn["tool_calls"])
                assert call["name"] in names and following["role"] == "tool"
                result = json.loads(following["content"])
                if call["name"] == "calculate":
                    assert result["result"] == sum(numbers(call["arguments"]["expression"]))
    assert calls >= 400


def test_reasoning_ends_in_the_right_answer(demo):
    for record in demo["reason"] + demo["rl"] + demo["reason_test"]:
        question = record["conversations"][0]["content"]
        answer = record.get("answer") or re.search(r"<answer>\n(.+)\n", record["conversations"][-1]["content"]).group(1)
        given = numbers(question)
        expected = [given[0] + given[1] - given[2]] if len(given) == 3 else sorted(given)
        assert numbers(answer) == expected, question


def test_training_text_is_small_and_in_both_languages(demo):
    for stage in ("pretrain", "sft"):
        texts = [" ".join(strings(record)) for record in demo[stage]]
        chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", text)) for text in texts)
        assert 0.4 < chinese / len(texts) < 0.65
        assert sum(len(text.encode()) for text in texts) < 6e6


# --- Files ---


def test_same_seed_same_bytes_in_another_process(tmp_path):
    paths = generate(tmp_path / "here", seed=3)
    script, there = ROOT / "dataset" / "make_demo_data.py", tmp_path / "there"
    command = [sys.executable, str(script), "--out_dir", str(there), "--seed", "3"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [str(path.name) in done.stdout for path in paths.values()] == [True] * len(paths)
    for path in paths.values():
        assert path.read_bytes() == (there / path.name).read_bytes()
    assert not list((tmp_path / "here").glob("*.part"))


def test_processes_that_write_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    """One is overtaken by another between writing its part and giving it the name."""
    path, replace = tmp_path / "demo_sft.jsonl", os.replace

    def overtaken(part, target):
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        make_demo_data.write_atomically(path, "the other's")
        replace(part, target)

    monkeypatch.setattr(os, "replace", overtaken)
    make_demo_data.write_atomically(path, "mine")
    assert path.read_text(encoding="utf-8") == "mine" and list(tmp_path.iterdir()) == [path]


def test_second_call_does_nothing_until_something_changed(tmp_path):
    paths = generate(tmp_path, seed=0)
    first = paths["sft"].read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert generate(tmp_path, seed=0) == paths
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    paths["sft"].write_text("cut off", encoding="utf-8")
    generate(tmp_path, seed=0)
    assert paths["sft"].read_bytes() == first
    (tmp_path / MANIFEST).write_text("[", encoding="utf-8")
    generate(tmp_path, seed=1)
    assert paths["sft"].read_bytes() != first


def test_unwritable_folder_is_one_clear_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("mine", encoding="utf-8")
    command = [sys.executable, str(ROOT / "dataset" / "make_demo_data.py"), "--out_dir", str(blocked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: Cannot write the demo data to") and done.stderr.count("\n") == 1
    assert blocked.read_text(encoding="utf-8") == "mine"
