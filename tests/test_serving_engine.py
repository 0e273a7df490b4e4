"""The engine's thread: the same answers as alone, a slot freed within one step, limits, failures, several models."""

import asyncio
import time

import pytest
import torch

from model.generation import Decoder, Sampling
from model.model_lora import LoraConfig, add_lora, load_lora, lora_state_dict, save_lora
from model.weights import load_tokenizer
from scripts.serving.engine import Engine, EngineDown, Job, QueueFull, Update
from scripts.serving.models import ForeignDecoder, parse_lora, serve_models
from scripts.serving.text_stream import AnswerText, TextRules
from tests.serving_server import EOS, HARD_LIMIT, ScriptedDecoder, greedy, serve_tiny, tiny_model
from trainer.command_line import UserError

PROMPTS = [[1, 40, 41, 7], [1, 9], [1, 300, 12, 250, 99, 31, 7], [5], [1, 77, 78, 79, 80], [1, 40, 41, 8]]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def make_job(tokenizer, prompt, inbox, index=0, name="m", seconds=HARD_LIMIT, rules=None, **sampling) -> Job:
    settings = {"temperature": 0, "max_new_tokens": 12, "stop_ids": {EOS}} | sampling
    text = AnswerText(tokenizer, rules or TextRules(plain=True))
    return Job(name, index, prompt, Sampling(**settings), text, time.monotonic() + seconds, inbox)


async def finals(inbox, count: int) -> list[tuple[str, Update]]:
    """(text, last update) of each job, in the order of their indices."""
    texts, last = [""] * count, [None] * count
    while None in last:
        update = await asyncio.wait_for(inbox.get(), HARD_LIMIT)
        texts[update.index] += "".join(delta.text for delta in update.deltas)
        last[update.index] = update if update.finish else None
    return list(zip(texts, last, strict=True))


def with_engine(decoders, work, **options):
    """Runs `await work(engine)` beside an engine, which is ended in any case."""

    async def main():
        engine = Engine(decoders, asyncio.get_running_loop(), **options)
        engine.start()
        try:
            return await asyncio.wait_for(work(engine), 2 * HARD_LIMIT)
        finally:
            await asyncio.to_thread(engine.stop)
            assert not engine.thread.is_alive()

    return asyncio.run(main())


def test_a_crowd_gets_what_each_gets_alone(model, tokenizer):
    """Greedy and drawn, with and without penalties, two slots for six; against `generate` and against one at a time."""
    settings = [{}, {"temperature": 1.3, "seed": 3}, {"repetition_penalty": 1.2}, {"temperature": 0.9, "top_p": 0.8},
                {"logit_bias": {300: 5.0}}, {"temperature": 2.0, "top_k": 9, "frequency_penalty": 1.0}]  # fmt: skip
    settings = [{"seed": 7} | s for s in settings]

    async def together(engine):
        inbox = asyncio.Queue()
        engine.submit([make_job(tokenizer, p, inbox, i, **settings[i]) for i, p in enumerate(PROMPTS)])
        return await finals(inbox, len(PROMPTS))

    async def one_by_one(engine):
        out = []
        for i, prompt in enumerate(PROMPTS):
            inbox = asyncio.Queue()
            engine.submit([make_job(tokenizer, prompt, inbox, **settings[i])])
            out += await finals(inbox, 1)
        return out

    crowd = with_engine({"m": Decoder(model, 2, 64, prefill_tokens=4)}, together)
    alone = with_engine({"m": Decoder(model, 1, 64)}, one_by_one)
    assert [text for text, _ in crowd] == [text for text, _ in alone]
    assert [u.tokens for _, u in crowd] == [u.tokens for _, u in alone]
    expected = greedy(model, PROMPTS[0], 12)
    assert crowd[0][0] == tokenizer.decode([t for t in expected if t != EOS])
    assert crowd[0][1].finish == ("stop" if expected[-1] == EOS else "length") and crowd[0][1].tokens == len(expected)


def test_a_cancelled_job_frees_its_slot_within_one_step(tokenizer):
    decoder = ScriptedDecoder(lambda prompt: [100] * 2000, slots=1, pause=0.02)

    async def work(engine):
        first, second = asyncio.Queue(), asyncio.Queue()
        job = make_job(tokenizer, [5], first, max_new_tokens=2000)
        engine.submit([job])
        engine.submit([make_job(tokenizer, [6], second, max_new_tokens=3)])
        await asyncio.wait_for(first.get(), HARD_LIMIT)
        before = decoder.steps
        engine.cancel([job])
        ((_, last),) = await finals(first, 1)
        assert last.finish == "cancelled" and decoder.steps <= before + 2  # the one under way, and no other
        ((text, last),) = await finals(second, 1)
        assert last.finish == "length" and last.tokens == 3 and text == tokenizer.decode([100] * 3)
        assert decoder.steps <= before + 5
        engine.cancel([job])  # is over: nothing happens
        waiting = make_job(tokenizer, [7], first)
        engine.submit([make_job(tokenizer, [6], second, max_new_tokens=5), waiting])
        engine.cancel([waiting])  # has not begun
        assert (await finals(first, 1))[0][1].finish == "cancelled"
        assert (await finals(second, 1))[0][1].tokens == 5
        assert engine.counts() == (0, 0)

    with_engine({"m": decoder}, work)


def test_a_stop_string_ends_the_job_and_frees_the_slot(tokenizer):
    ids = tokenizer.encode("one two three four five six seven", add_special_tokens=False)
    decoder = ScriptedDecoder(lambda prompt: ids, slots=1)

    async def work(engine):
        inbox = asyncio.Queue()
        engine.submit([make_job(tokenizer, [5], inbox, rules=TextRules(("three f",)), max_new_tokens=100)])
        ((text, last),) = await finals(inbox, 1)
        assert text == "one two " and last.finish == "stop"
        needed = next(n for n in range(len(ids)) if "three f" in tokenizer.decode(ids[:n]))
        assert last.tokens == needed == decoder.steps and not decoder.busy

    with_engine({"m": decoder}, work)


def test_limits_and_deadlines(tokenizer):
    decoder = ScriptedDecoder(lambda prompt: [100] * 2000, slots=2, pause=0.01)

    async def work(engine):
        inbox = asyncio.Queue()
        jobs = [make_job(tokenizer, [5], inbox, i, seconds=0.3, max_new_tokens=2000) for i in range(5)]
        engine.submit(jobs[:3])
        with pytest.raises(QueueFull) as full:
            engine.submit(jobs[3:])  # one of them would find a place: all or none
        assert 1 <= full.value.retry_after <= 60 and engine.capacity("m") == 4
        assert engine.counts() == (2, 1)
        start = time.monotonic()
        for text, last in await finals(inbox, 3):
            assert last.finish == "timeout" and text == tokenizer.decode([100] * last.tokens)
        assert time.monotonic() - start < 5 and engine.counts() == (0, 0) and not decoder.busy
        engine.submit([make_job(tokenizer, [5], inbox, max_new_tokens=2)])
        assert (await finals(inbox, 1))[0][1].finish == "length"

    with_engine({"m": decoder}, work, max_queue=2)


def test_a_failing_step_fails_its_requests_and_no_others(tokenizer, caplog):
    good, bad = (ScriptedDecoder(lambda prompt: [100] * 50, pause=0.002) for _ in range(2))
    step, calls = bad.step, []

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("not enough memory")
        return step()

    bad.step = failing

    async def work(engine):
        one, two = asyncio.Queue(), asyncio.Queue()
        engine.submit([make_job(tokenizer, [5], one, name="good", max_new_tokens=50)])
        engine.submit([make_job(tokenizer, [5], two, i, name="bad", max_new_tokens=50) for i in range(2)])
        for _, last in await finals(two, 2):
            assert last.finish == "error" and "not enough memory" in last.error
        assert (await finals(one, 1))[0][1].tokens == 50
        engine.submit([make_job(tokenizer, [5], two, name="bad")])  # later ones may work
        assert (await finals(two, 1))[0][1].finish == "length"

    with_engine({"good": good, "bad": bad}, work)
    assert "a step of bad failed" in caplog.text


def test_an_engine_that_broke_down_says_so(tokenizer, caplog):
    decoder = ScriptedDecoder(lambda prompt: [100] * 50)

    def broken(*args):
        raise RuntimeError("device lost")

    decoder.step = decoder.cancel = broken

    async def work(engine):
        inbox = asyncio.Queue()
        engine.submit([make_job(tokenizer, [5], inbox)])
        assert "device lost" in (await finals(inbox, 1))[0][1].error
        engine.thread.join(HARD_LIMIT)
        with pytest.raises(EngineDown, match="device lost"):
            engine.submit([make_job(tokenizer, [5], inbox)])

    with_engine({"m": decoder}, work)


def test_stopping_ends_open_jobs(tokenizer):
    decoder = ScriptedDecoder(lambda prompt: [100] * 2000, slots=1, pause=0.01)

    async def work(engine):
        inbox = asyncio.Queue()
        engine.submit([make_job(tokenizer, [5], inbox, i, max_new_tokens=2000) for i in range(2)])
        await asyncio.wait_for(inbox.get(), HARD_LIMIT)
        await asyncio.to_thread(engine.stop)
        assert all("shutting down" in last.error for _, last in await finals(inbox, 2))
        with pytest.raises(EngineDown):
            engine.submit([make_job(tokenizer, [5], inbox)])

    with_engine({"m": decoder}, work)


def test_output_that_is_no_number_is_an_error(tokenizer):
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)

    async def work(engine):
        inbox = asyncio.Queue()
        engine.submit([make_job(tokenizer, [5], inbox)])
        ((text, last),) = await finals(inbox, 1)
        assert last.finish == "error" and "not a number" in last.error and text == ""

    with_engine({"m": Decoder(broken, 1, 32)}, work)


def test_an_answer_that_cannot_be_read_harms_nobody_else(tokenizer, caplog):
    decoder = ScriptedDecoder(lambda prompt: [100] * 5)

    async def work(engine):
        inbox = asyncio.Queue()
        jobs = [make_job(tokenizer, [5], inbox, i) for i in range(2)]
        jobs[0].text.push = None  # calling it fails
        engine.submit(jobs)
        (_, bad), (text, good) = await finals(inbox, 2)
        assert bad.finish == "error" and good.finish == "stop" and text == tokenizer.decode([100] * 5)

    with_engine({"m": decoder}, work)


def test_models_take_turns_step_by_step(tokenizer):
    order = []
    decoders = {name: ScriptedDecoder(lambda prompt: [100] * 30, pause=0.001) for name in "abc"}
    for name, decoder in decoders.items():
        decoder.step = lambda name=name, step=decoder.step: (order.append(name), step())[1]

    async def work(engine):
        inbox = asyncio.Queue()
        for i, name in enumerate("abc"):
            engine.submit([make_job(tokenizer, [5], inbox, i, name=name, max_new_tokens=30)])
        await finals(inbox, 3)

    with_engine(decoders, work)
    busy = order[order.index("c") :]
    for n in range(0, 60, 3):
        assert sorted(busy[n : n + 3]) == ["a", "b", "c"]


# --- The decoder's part -----------------------------------------------------------------------------------------------


def test_prompts_are_taken_in_in_the_order_they_came(model):
    """A stream of short prompts with one-token answers does not keep a long one waiting for ever."""
    decoder = Decoder(model, 4, 128, prefill_tokens=16)
    one = Sampling(temperature=0, max_new_tokens=1)
    decoder.add(list(range(3, 17)), one)
    long = decoder.add(list(range(3, 67)), one)
    steps = 0
    while long.finish_reason is None:
        while len(decoder.waiting) < 4:
            decoder.add(list(range(3, 17)), one)
        decoder.step()
        steps += 1
        assert steps < 20
    assert steps <= 1 + 64 // 16 + 1
    assert long.tokens == greedy(model, long.prompt, 1)


def test_a_long_prompt_does_not_stop_the_others(model, tokenizer):
    decoder = Decoder(model, 4, 512, prefill_tokens=16)
    took = []

    async def work(engine):
        one, two = asyncio.Queue(), asyncio.Queue()
        engine.submit([make_job(tokenizer, [1, 9], one, max_new_tokens=100, stop_ids=())])
        await asyncio.wait_for(one.get(), HARD_LIMIT)
        step = decoder.step
        decoder.step = lambda: (took.append([e.request.prompt[:2] for e in step()]), decoder.last)[1]
        engine.submit([make_job(tokenizer, list(range(3, 403)), two, max_new_tokens=2)])
        await finals(two, 1)

    def remembering(original):
        def step():
            decoder.last = original()
            return decoder.last

        return step

    decoder.step = remembering(decoder.step)
    with_engine({"m": decoder}, work)
    during = [prompts for prompts in took if [3, 4] not in prompts]
    assert len(during) >= 400 // 16 - 1 and all([1, 9] in prompts for prompts in during)


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path) -> dict:
    """Two adapters of different ranks that change what the tiny model says."""
    paths = {}
    for seed, name in enumerate(("red", "blue")):
        model, config = tiny_model(), LoraConfig(rank=2 + seed)
        add_lora(model, config)
        torch.manual_seed(seed)
        for tensor in lora_state_dict(model).values():
            tensor.copy_(torch.randn_like(tensor))
        paths[name] = tmp_path / f"{name}_32.pth"
        save_lora(model, paths[name], config)
    return paths


def test_adapters_are_models_of_their_own_side_by_side(adapters, tokenizer):
    served = serve_tiny(slots=2, max_seq_len=64, **adapters)
    assert list(served.decoders) == ["tiny", "red", "blue"]

    async def work(engine):
        inbox = asyncio.Queue()
        for i, name in enumerate(served.decoders):
            engine.submit([make_job(tokenizer, PROMPTS[0], inbox, i, name=name, max_new_tokens=20)])
        return await finals(inbox, 3)

    texts = [text for text, _ in with_engine(served.decoders, work)]
    assert len(set(texts)) == 3
    for name, text in zip(served.decoders, texts, strict=True):
        alone = tiny_model()
        if name in adapters:
            load_lora(alone, adapters[name])
        assert text == tokenizer.decode([t for t in greedy(alone, PROMPTS[0], 20) if t != EOS])


def test_embeddings_of_base_and_adapter(adapters):
    served = serve_tiny(slots=1, max_seq_len=64, prefill_tokens=3, **adapters)
    for name in ("red", "tiny", "blue"):
        alone = tiny_model()
        if name in adapters:
            load_lora(alone, adapters[name])
        with torch.no_grad():
            states = alone.model(torch.tensor([PROMPTS[2]])).last_hidden_state[0]  # (T, D)
        shares = list(served.embed(name, PROMPTS[2]))
        assert shares[:-1] == [None, None]  # 7 tokens, 3 at a time
        expected = torch.nn.functional.normalize(states.mean(0), dim=0)
        torch.testing.assert_close(torch.tensor(shares[-1]), expected, atol=1e-5, rtol=1e-4)


def test_names_and_paths_of_adapters(adapters, tmp_path):
    model = tiny_model()
    assert parse_lora(f"me={adapters['red']}", tmp_path, model) == ("me", adapters["red"])
    (tmp_path / "lora").mkdir()
    adapters["red"].rename(tmp_path / "lora" / "red_32.pth")
    assert parse_lora("red", tmp_path, model) == ("red", tmp_path / "lora" / "red_32.pth")
    for text, message in (("blu e=x", "letters"), ("gone", "does not exist"), ("x=nowhere.pth", "does not exist")):
        with pytest.raises(UserError, match=message):
            parse_lora(text, tmp_path, model)
    with pytest.raises(UserError, match="name of the base"):
        serve_tiny(tiny=adapters["blue"])
    with pytest.raises(UserError, match="2 to 1024"):
        serve_tiny(max_seq_len=2000)


def foreign_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=6400, **sizes, pad_token_id=0, eos_token_id=EOS)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20 if weight.ndim == 2 else 1)
    return model


def test_a_model_of_another_family(tokenizer):
    model = foreign_model()
    served = serve_models(model, tokenizer, "llama", {}, slots=2, max_seq_len=32, prefill_tokens=8)
    assert not served.ours and isinstance(served.decoders["llama"], ForeignDecoder)

    async def work(engine):
        inbox = asyncio.Queue()
        jobs = [make_job(tokenizer, p, inbox, i, name="llama", max_new_tokens=40) for i, p in enumerate(PROMPTS)]
        engine.submit(jobs)
        engine.cancel([jobs[5]])
        return await finals(inbox, 6)

    results = with_engine(served.decoders, work)
    for prompt, (text, last) in list(zip(PROMPTS, results, strict=True))[:5]:
        expected = greedy(model, prompt, 32 - len(prompt))
        assert text == tokenizer.decode([t for t in expected if t != EOS])
        assert last.finish == ("stop" if expected[-1] == EOS else "length")
    assert results[5][1].finish == "cancelled" and not served.decoders["llama"].busy
    with pytest.raises(UserError, match="MiniMind weights only"):
        serve_models(model, tokenizer, "llama", {"x": "y"}, slots=1, max_seq_len=32, prefill_tokens=8)
