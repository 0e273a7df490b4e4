"""The kinds of question of the demo data: how each is asked, answered and told, and what only the test uses.

`DemoWorld(seed)` draws what is held back first; whatever it hands out afterwards for training keeps clear of it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dataset import demo_world as world

LANGS = world.LANGS
KINDS = (
    "facts", "opposites", "calendar", "identity", "translation", "addition", "subtraction", "comparison", "sorting",
    "counting", "memory", "story",
)
TESTS_PER_KIND = 24  # in each language
MAX_COMPARED, MAX_SORTED, MAX_COUNT = 50, 20, 7
GAP = {"en": " ", "zh": ""}  # between two sentences
STOP = {"en": ".", "zh": "。"}  # at the end of a sentence
COMMA = {"en": ", ", "zh": "、"}  # between the parts of a list
PEOPLE_SLOTS = {  # what is held back for each person: one value of each of these
    "colour": world.COLOURS, "pet": world.PETS, "food": world.FOODS, "city": world.CITIES, "place": world.PLACES,
    "object": world.OBJECTS, "number": {lang: [str(n) for n in range(10, 100)] for lang in LANGS},
}
STORY_SLOTS = {"p": "place", "r": "place", "o": "object", "u": "object", "f": "food", "g": "food"}


@dataclass(frozen=True)
class Item:
    """One question with its answer, ready to become a conversation."""

    kind: str
    lang: str
    turns: tuple[str, ...]  # user, assistant, user ...: ends with the user turn to be answered
    answer: str


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill(template: str, **values: object) -> str:
    """The template with its values, starting with a capital, and with `an` where English wants it."""
    return capitalised(re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format(**values)))


def listing(lang: str, parts: Iterable[object]) -> str:
    return COMMA[lang].join(map(str, parts))


# --- Kinds with a short list of facts and phrasings: (subject, item) for every combination ---


def facts(lang: str) -> Iterator[tuple[str, Item]]:
    for name, relation in world.FACTS.items():
        for x, y in relation.rows[lang]:
            for question in relation.questions[lang]:
                yield f"{name} {x}", Item("facts", lang, (fill(question, x=x),), y)


def opposite_pairs(lang: str) -> list[tuple[str, str]]:
    listed = world.OPPOSITES[lang]
    return [(x, listed[index ^ 1]) for index, x in enumerate(listed)]


def opposites(lang: str) -> Iterator[tuple[str, Item]]:
    for x, y in opposite_pairs(lang):
        for question in world.OPPOSITE_QUESTIONS[lang]:
            yield x, Item("opposites", lang, (fill(question, x=x),), y)


def calendar_rows(unit: str, step: int, lang: str) -> list[tuple[str, str]]:
    names = (world.DAYS if unit == "day" else world.MONTHS)[lang]
    return [(x, names[(index + step) % len(names)]) for index, x in enumerate(names)]


def calendar(lang: str) -> Iterator[tuple[str, Item]]:
    for (unit, step), relation in world.CALENDAR.items():
        for x, y in calendar_rows(unit, step, lang):
            for question in relation.questions[lang]:
                yield f"{step} {x}", Item("calendar", lang, (fill(question, x=x),), y)


def identity(lang: str, sayings: list | None = None) -> Iterator[tuple[str, Item]]:
    for ways, answer in sayings or world.IDENTITY[lang]:
        for way, prefix in itertools.product(ways, world.IDENTITY_PREFIXES[lang]):
            lowered = way[:1].lower() + way[1:] if prefix.endswith((", ", ": ")) else way
            yield way, Item("identity", lang, (prefix + lowered,), answer)


def words(lang: str) -> Iterator[tuple[str, Item]]:
    for e, z in zip(world.TRANSLATED["en"], world.TRANSLATED["zh"], strict=True):
        for question in world.TO_CHINESE[lang]:
            yield f"zh {e}", Item("translation", lang, (question.format(e=e),), z)
        for question in world.TO_ENGLISH[lang]:
            yield f"en {e}", Item("translation", lang, (question.format(z=z),), e)


LISTED: dict[str, Callable[[str], Iterator[tuple[str, Item]]]] = {
    "facts": facts, "opposites": opposites, "calendar": calendar, "identity": identity, "words": words,
}


# --- Kinds with a combination of numbers or words: one item from one combination, the phrasing drawn ---


def sum_item(rng: random.Random, lang: str, pair: tuple[int, int], kind: str = "addition") -> Item:
    a, b = pair
    things = rng.choice(world.COUNTED["plural" if lang == "en" else lang])
    asks = (world.ADDITION if kind == "addition" else world.SUBTRACTION)["ask"][lang]
    if min(a, b) < 2:  # "I have 1 apples"
        asks = [ask for ask in asks if "{t}" not in ask]
    question = fill(rng.choice(asks), a=a, b=b, t=things)
    return Item(kind, lang, (question,), str(a + b if kind == "addition" else a - b))


def difference_item(rng: random.Random, lang: str, pair: tuple[int, int]) -> Item:
    return sum_item(rng, lang, pair, "subtraction")


def comparison_item(rng: random.Random, lang: str, pair: tuple[int, int]) -> Item:
    want = rng.choice(("big", "small"))
    a, b = rng.sample(pair, 2)
    question = fill(rng.choice(world.COMPARISON[want][lang]), a=a, b=b)
    return Item("comparison", lang, (question,), str(max(pair) if want == "big" else min(pair)))


def sorting_item(rng: random.Random, lang: str, numbers: tuple[int, ...]) -> Item:
    want = rng.choice(("up", "down"))
    question = fill(rng.choice(world.SORTING[want][lang]), n=listing(lang, rng.sample(numbers, len(numbers))))
    return Item("sorting", lang, (question,), listing(lang, sorted(numbers, reverse=want == "down")))


def counted(lang: str, combination: tuple[int, int]) -> dict[str, str]:
    thing, count = combination
    things = world.COUNTED["plural" if lang == "en" else lang][thing]
    return {"l": listing(lang, [world.COUNTED[lang][thing]] * count), "t": things, "c": str(count)}


def counting_item(rng: random.Random, lang: str, combination: tuple[int, int]) -> Item:
    values = counted(lang, combination)
    return Item("counting", lang, (fill(rng.choice(world.COUNTING["ask"][lang]), **values),), values["c"])


def described(combination: tuple[int, int]) -> dict[str, str]:
    """An adjective with a noun, in English (e) and Chinese (z)."""
    adjective, noun = combination
    return {
        "e": f"{world.ADJECTIVES['en'][adjective]} {world.NOUNS['en'][noun]}",
        "z": f"{world.ADJECTIVES['zh'][adjective]}{world.NOUNS['zh'][noun]}",
    }


def phrase_item(rng: random.Random, lang: str, combination: tuple[int, int]) -> Item:
    values = described(combination)
    into, answer = rng.choice(((world.TO_CHINESE, values["z"]), (world.TO_ENGLISH, values["e"])))
    return Item("translation", lang, (rng.choice(into[lang]).format(**values),), answer)


def without_carry(kind: str) -> list[tuple[int, int]]:
    """The pairs that are added (subtracted) digit by digit: of two digits each, and the pairs of single digits.

    A pair is a new combination of known digit facts; a carry would ask for more than this little text can teach.
    """
    digits = [(x, y) for x in range(10) for y in range(10) if (x + y <= 9 if kind == "addition" else x >= y)]
    tens = [(x, y) for x, y in digits if y > 0 and (x > 0 if kind == "addition" else x > y)]
    return digits + [(10 * x + u, 10 * y + v) for x, y in tens for u, v in digits]


COMBINED: dict[str, tuple[list[tuple[int, ...]], Callable[..., Item]]] = {  # every combination, and its item
    "addition": (without_carry("addition"), sum_item),
    "subtraction": (without_carry("subtraction"), difference_item),
    "comparison": (list(itertools.combinations(range(MAX_COMPARED + 1), 2)), comparison_item),
    "sorting": (list(itertools.combinations(range(1, MAX_SORTED + 1), 3)), sorting_item),
    "counting": ([(t, n) for t in range(len(world.COUNTED["en"])) for n in range(2, MAX_COUNT + 1)], counting_item),
    "phrases": ([(a, n) for a in range(len(world.ADJECTIVES["en"])) for n in range(len(world.NOUNS["en"]))],
                phrase_item),
}


# --- Kinds about people ---


def memory_item(
    rng: random.Random, lang: str, name: str, things: dict[str, str], between: list[Item], recalls: int = 1
) -> Item:
    """The user tells the name and `things` (slot -> value), asks `between`, then `recalls` times what was told."""
    greetings, name_questions = world.MEMORY_NAME[lang]
    nice, noted = world.MEMORY_REPLY["name"][lang].format(n=name), world.MEMORY_REPLY["value"][lang]
    told = [(world.MEMORY[slot][lang][0].format(v=value), noted) for slot, value in things.items()]
    told.insert(rng.randrange(len(told) + 1), (rng.choice(greetings).format(n=name), nice))
    if rng.random() < 0.4:  # all in one turn
        told = [(GAP[lang].join(said for said, _ in told), nice)]
    questions = [(rng.choice(name_questions), name)]
    questions += [(rng.choice(world.MEMORY[slot][lang][1:]), value) for slot, value in things.items()]
    told += [(item.turns[0], item.answer) for item in between]
    told += rng.sample(questions, min(recalls, len(questions)))
    *turns, answer = itertools.chain.from_iterable(told)
    return Item("memory", lang, tuple(turns), answer)


@dataclass(frozen=True)
class Told:
    """A story with its slots filled."""

    lang: str
    text: str
    recap: str
    slots: dict[str, str]
    asks: list[tuple[str, str, str]]

    def item(self, asks: list[tuple[str, str, str]]) -> Item:
        """The story with its first question in one turn, then the other questions one by one."""
        turns: list[str] = []
        for question, template, _ in asks:
            answer = fill(template, **self.slots)
            if template not in ("{n}", "{m}"):
                answer = answer[:1].lower() + answer[1:]
            turns += [fill(question, **self.slots), answer]
        turns[0] = self.text + GAP[self.lang] + turns[0]
        return Item("story", self.lang, tuple(turns[:-1]), turns[-1])


def tell(rng: random.Random, lang: str, story: world.Story, **fixed: str) -> Told:
    """Fills the slots of a story at random, those in `fixed` as given; no word fills two slots."""
    slots: dict[str, str] = {}
    for keys, values in (
        ("nm", world.NAMES), ("pr", world.PLACES), ("ou", world.OBJECTS), ("cd", world.COLOURS), ("fg", world.FOODS),
    ):
        free = iter(rng.sample([value for value in values[lang] if value not in fixed.values()], len(keys)))
        slots |= {key: fixed[key] if key in fixed else next(free) for key in keys}
    return Told(lang, fill(story.text, **slots), fill(story.recap, **slots), slots, story.asks)


class DemoWorld:
    """The combinations of one seed: `tests[kind, lang]` holds the questions; `training` and `prose` avoid them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tests: dict[tuple[str, str], list[Item]] = {}
        self.listed: dict[tuple[str, str], list[Item]] = {}  # the listed kinds without their tests
        self.held: dict[str, set[tuple[int, ...]]] = {}  # combinations of the COMBINED kinds
        self.free: dict[str, list[tuple[int, ...]]] = {}  # the others
        self.people = {lang: self._held_people(lang) for lang in LANGS}
        for lang in LANGS:
            for kind in LISTED:
                self._split(kind, lang, TESTS_PER_KIND // 2 if kind == "words" else TESTS_PER_KIND)
        for kind in COMBINED:
            self._hold(kind, TESTS_PER_KIND // 2 if kind == "phrases" else TESTS_PER_KIND)
        for lang in LANGS:
            self.tests["translation", lang] = self.tests.pop(("words", lang)) + self.tests.pop(("phrases", lang))
            self.tests["memory", lang] = self._memory_tests(lang)
            self.tests["story", lang] = self._story_tests(lang)
        self.asked = {item.turns for items in self.tests.values() for item in items}

    def rng(self, *name: object) -> random.Random:
        """A random stream for each part, so that a change in one part does not move the others."""
        return random.Random("/".join(map(str, (self.seed, *name))))

    def _split(self, kind: str, lang: str, count: int) -> None:
        """Holds back `count` phrasings of as many subjects as there are; each keeps most of its phrasings."""
        combinations = list(LISTED[kind](lang))
        plain = {way for ways, _ in world.IDENTITY[lang] for way in ways}  # these are part of the prefixed questions
        limit = -(-count // len({subject for subject, _ in combinations}))
        taken: dict[str, int] = {}
        test: set[int] = set()
        for index in self.rng("split", kind, lang).sample(range(len(combinations)), len(combinations)):
            subject = combinations[index][0]
            question = combinations[index][1].turns[-1]
            if len(test) < count and taken.get(subject, 0) < limit and question not in plain:
                taken[subject] = taken.get(subject, 0) + 1
                test.add(index)
        self.tests[kind, lang] = [combinations[index][1] for index in sorted(test)]
        self.listed[kind, lang] = [item for index, (_, item) in enumerate(combinations) if index not in test]

    def _hold(self, kind: str, count: int) -> None:
        """Holds back `count` combinations, the same in both languages; those of a sum in both orders."""
        combinations, make = COMBINED[kind]
        rng = self.rng("hold", kind)
        wanted = combinations
        if kind in ("addition", "subtraction"):  # two-digit pairs: their digits are met in many other pairs
            wanted = [(a, b) for a, b in combinations if b > 9 and (a < b or kind == "subtraction")]
        chosen = rng.sample(wanted, count)
        self.held[kind] = set(chosen) | ({(b, a) for a, b in chosen} if kind == "addition" else set())
        self.free[kind] = [c for c in combinations if c not in self.held[kind]]
        for lang in LANGS:
            orders = [c if kind != "addition" else tuple(rng.sample(c, 2)) for c in chosen]
            self.tests[kind, lang] = [make(rng, lang, combination) for combination in orders]

    def _held_people(self, lang: str) -> dict[str, dict[str, str]]:
        rng = self.rng("people", lang)
        return {name: {s: rng.choice(v[lang]) for s, v in PEOPLE_SLOTS.items()} for name in world.NAMES[lang]}

    def joins_held(self, text: str, lang: str) -> bool:
        """Whether the text names a person together with one of the things that are held back for this person."""
        parts = set(re.findall(r"\w+", text)) if lang == "en" else text
        named = [slots for name, slots in self.people[lang].items() if name in parts]
        return any(value in parts for slots in named for value in slots.values())

    def _memory_tests(self, lang: str) -> list[Item]:
        rng, people = self.rng("test", "memory", lang), self.people[lang]
        tests = []
        for index, name in enumerate(rng.sample(world.NAMES[lang], TESTS_PER_KIND)):
            slot = list(world.MEMORY)[index % len(world.MEMORY)]
            between = rng.sample(self.listed["facts", lang] + self.listed["calendar", lang], 1)
            tests.append(memory_item(rng, lang, name, {slot: people[name][slot]}, between))
        return tests

    def _story_tests(self, lang: str) -> list[Item]:
        rng = self.rng("test", "story", lang)
        asks = [(story, ask) for story in world.STORIES[lang] for ask in story.asks]
        tests = []
        for index, name in enumerate(rng.sample(world.NAMES[lang], TESTS_PER_KIND)):
            story, ask = asks[index % len(asks)]
            person, slot = ask[2].split()
            told = tell(rng, lang, story, **{person: name, slot: self.people[lang][name][STORY_SLOTS[slot]]})
            tests.append(told.item([ask]))
        return tests

    # --- What training may use ---

    def story(self, rng: random.Random, lang: str) -> Told:
        while True:
            told = tell(rng, lang, rng.choice(world.STORIES[lang]))
            if not self.joins_held(told.text, lang):
                return told

    def person(self, rng: random.Random, lang: str) -> tuple[str, str, str]:
        """(name, slot, value) that may go together."""
        while True:
            name, slot = rng.choice(world.NAMES[lang]), rng.choice(list(world.MEMORY))
            value = rng.choice(PEOPLE_SLOTS[slot][lang])
            if not self.joins_held(f"{name} {value}", lang):
                return name, slot, value

    def small_questions(self, lang: str) -> list[Item]:
        """Training questions that fit between the turns of another talk."""
        return self.listed["facts", lang] + self.listed["opposites", lang] + self.listed["calendar", lang]

    def _memory(self, rng: random.Random, lang: str) -> Item:
        while True:
            name, *thing = self.person(rng, lang)
            _, *other = self.person(rng, lang)
            between = rng.sample(self.small_questions(lang), rng.choice((0, 1)))
            item = memory_item(rng, lang, name, dict((thing, other)[: rng.choice((1, 2))]), between, recalls=3)
            if not self.joins_held(" ".join((*item.turns, item.answer)), lang):
                return item

    def training(self, kind: str, lang: str, count: int, *stream: object) -> list[Item]:
        """`count` training items of a kind; every combination comes up once before any comes up again."""
        rng = self.rng("training", kind, lang, *stream)
        if kind == "memory":
            return [self._memory(rng, lang) for _ in range(count)]
        if kind == "story":
            stories = (self.story(rng, lang) for _ in range(count))
            return [told.item(rng.sample(told.asks, rng.choice((2, 3, 4)))) for told in stories]
        if kind in LISTED:
            return list(itertools.islice(rounds(rng, self.listed[kind, lang]), count))
        make = COMBINED[kind][1]
        return [make(rng, lang, c) for c in itertools.islice(rounds(rng, self.free[kind]), count)]

    def prose(self, kind: str, lang: str, count: int) -> list[str]:
        """`count` sentences (for people: little texts) that tell the same world without questions put to anybody."""
        rng = self.rng("prose", kind, lang)
        if kind == "memory":
            return [self._memory_prose(rng, lang) for _ in range(count)]
        if kind == "story":
            stories = (self.story(rng, lang) for _ in range(count))
            return [told.text + GAP[lang] + told.recap for told in stories]
        if kind in COMBINED:
            combinations = itertools.islice(rounds(rng, self.free[kind]), count)
            return [combined_prose(rng, kind, lang, c) for c in combinations]
        return list(itertools.islice(rounds(rng, listed_prose(kind, lang)), count))

    def _memory_prose(self, rng: random.Random, lang: str) -> str:
        name, slot, value = self.person(rng, lang)
        said, *asked = world.MEMORY[slot][lang]
        return world.MEMORY_SAY[lang].format(n=name, s=said.format(v=value), q=rng.choice(asked), v=value)


def rounds(rng: random.Random, things: list) -> Iterator:
    """All things in random order, again and again."""
    while True:
        yield from rng.sample(things, len(things))


def listed_prose(kind: str, lang: str) -> list[str]:
    """Every statement of a listed kind."""
    if kind == "identity":
        return [text.format(name=name) for text in world.IDENTITY_PROSE[lang] for name in ("MiniMind",)]
    if kind == "words":
        pairs = list(zip(world.TRANSLATED["en"], world.TRANSLATED["zh"], strict=True))
        return [text.format(e=e, z=z) for e, z in pairs for text in world.TRANSLATION_STATEMENTS[lang]]
    if kind == "opposites":
        return [fill(text, x=x, y=y) for x, y in opposite_pairs(lang) for text in world.OPPOSITE_STATEMENTS[lang]]
    if kind == "calendar":
        rows = [(text, row) for (unit, step), relation in world.CALENDAR.items()
                for row in calendar_rows(unit, step, lang) for text in relation.statements[lang]]
    else:
        rows = [(text, row) for relation in world.FACTS.values()
                for row in relation.rows[lang] for text in relation.statements[lang]]
    return [fill(text, x=x, y=y) for text, (x, y) in rows]


def combined_prose(rng: random.Random, kind: str, lang: str, combination: tuple[int, ...]) -> str:
    if kind == "sorting":
        want = rng.choice(("up", "down"))
        given = listing(lang, rng.sample(combination, len(combination)))
        ordered = listing(lang, sorted(combination, reverse=want == "down"))
        return fill(rng.choice(world.SORTING[f"say_{want}"][lang]), n=given, s=ordered)
    if kind == "counting":
        return fill(rng.choice(world.COUNTING["say"][lang]), **counted(lang, combination))
    if kind == "phrases":
        return rng.choice(world.TRANSLATION_STATEMENTS[lang]).format(**described(combination))
    a, b = combination
    if kind == "comparison":
        a, b = rng.sample(combination, 2)
        return fill(rng.choice(world.COMPARISON["say"][lang]), a=a, b=b, big=max(a, b), small=min(a, b))
    texts, result = (world.ADDITION, a + b) if kind == "addition" else (world.SUBTRACTION, a - b)
    return fill(rng.choice(texts["say"][lang]), a=a, b=b, c=result)
