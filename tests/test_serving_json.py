"""The guide that keeps an answer to one JSON object, against Python's parser."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.generation import Decoder, Sampling
from model.weights import load_tokenizer
from scripts.serving.json_guide import DEEPEST, DONE, MASKS_KEPT, MOST_SPACES, START, JsonGuide, JsonTables, State, step
from scripts.serving.text_stream import token_bytes
from tests.serving_server import EOS, tiny_model

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


def run(text: bytes) -> State | None:
    state = START
    for byte in text:
        state = state and step(state, byte)
    return state


@pytest.fixture(scope="module")
def tables() -> JsonTables:
    tokenizer = load_tokenizer()
    pieces = [b"" if i in tokenizer.added_tokens_decoder else p for i, p in enumerate(token_bytes(tokenizer))]
    return JsonTables(pieces, 6400, {EOS})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.booleans(), st.sampled_from([None, 1, 2]))
def test_every_object_is_let_through_and_no_prefix_is_done(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    states = [START]
    for byte in text:
        states.append(step(states[-1], byte))
    assert states[-1] == DONE and None not in states and DONE not in states[:-1]


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), st.integers(0, 60), st.binary(min_size=1, max_size=2))
def test_what_is_done_is_json(value, at, junk):
    """A valid text with a few bytes put in: either refused, or Python parses it too."""
    text = json.dumps(value).encode()
    text = text[: at % (len(text) + 1)] + junk + text[at % (len(text) + 1) :]
    if run(text) == DONE:
        assert isinstance(json.loads(text.decode("utf-8", "replace")), dict)


def test_it_has_to_be_an_object():
    assert all(run(text) is None for text in (b" ", b"[", b"1", b'"', b"n"))


@pytest.mark.parametrize(
    "text",
    [b'{"a" 1', b"{,", b'{"a":1,}', b'{"a":01', b'{"a":+', b'{"a":.', b'{"a":1.e', b'{"a":1e}',
     b'{"a":-}', b'{"a":tru}', b'{"a":[1 2', b'{"a":[1}', b'{"a":"\\x', b'{"a":"\\u12g', b'{"a":"\n', b"{} ", b"{}{",
     b'{"a":' + b"[" * DEEPEST, b"{" + b" " * (MOST_SPACES + 1)],
)  # fmt: skip
def test_what_cannot_become_an_object_is_refused(text):
    assert run(text) is None and run(text[:-1]) is not None


def test_masks_are_those_of_a_search_over_all_tokens(tables):
    for text in (b"", b"{", b'{"a', b'{"a"', b'{"a":', b'{"a":[', b'{"a":[1', b'{"a":-', b'{"a":tr', b'{"a":"\\', b"{}",
                 b'{"a":{"b":"x', b'{"a":[{"b":[]'):  # fmt: skip
        expected = torch.zeros(6400, dtype=torch.bool)
        for token, piece in enumerate(tables.pieces):
            expected[token] = bool(piece) and run(text + piece) is not None
        if run(text) == DONE:
            expected[EOS] = True
        assert torch.equal(tables.mask(run(text)), expected) and expected.any()


def test_masks_kept_are_limited(tables):
    for n in range(MASKS_KEPT + 50):
        tables.mask(State("value", bytes(b"{["[n >> bit & 1] for bit in range(12))))
    assert len(tables.masks) == MASKS_KEPT


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answers_of_an_untrained_model_are_objects(tables, temperature):
    """Beside unguided ones, whose tokens do not change for it."""
    model = tiny_model()
    decoder = Decoder(model, 6, 512)
    prompt = [1, 40, 41, 7]
    plain = Sampling(temperature=temperature, top_p=0.9, seed=5, max_new_tokens=40)
    alone = decoder.generate([prompt], plain)[0].tokens
    guided = [
        Sampling(temperature=temperature, top_p=0.95, seed=seed, max_new_tokens=250, stop_ids={EOS},
                 guide=JsonGuide(tables), logit_bias={tables.pieces.index(b"}"): 3, tables.pieces.index(b'"'): 3})
        for seed in range(5)
    ]  # fmt: skip
    requests = decoder.generate([prompt] * 6, [*guided, plain])
    assert requests[5].tokens == alone
    for request in requests[:5]:
        text = b"".join(tables.pieces[token] for token in request.answer)
        if request.finish_reason == "stop":
            assert isinstance(json.loads(text.decode("utf-8", "replace")), dict)
        assert run(text) == (DONE if request.finish_reason == "stop" else run(text)) and run(text) is not None
    assert temperature == 0 or any(request.finish_reason == "stop" for request in requests[:5])


def test_behind_a_thought(tables):
    close = load_tokenizer().convert_tokens_to_ids("</think>")
    guide = JsonGuide(tables, behind=close)
    for token in (500, close):
        assert guide.allowed().sum() == 6399 and not guide.allowed()[EOS]  # a thought does not end the answer
        guide.advance(token)
    assert torch.equal(guide.allowed(), tables.mask(START))
