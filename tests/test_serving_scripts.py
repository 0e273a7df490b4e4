"""The scripts as a user runs them: the server as a process, the terminal client, the load test, their error lines."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from openai import OpenAI

from model.model_lora import LoraConfig, add_lora, lora_state_dict, save_lora
from model.weights import load_tokenizer, save_weights
from scripts import bench_serving, chat_openai_api, serve_openai_api
from scripts.serving.http_server import listen
from scripts.serving.models import cache_bytes
from tests.serving_server import EOS, running_server, serve_tiny, tiny_model
from trainer.command_line import run_script

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 200  # seconds, for a machine that does other things as well


@pytest.fixture
def out_dir(tmp_path) -> Path:
    """Weights, and an adapter on them."""
    model, config = tiny_model(), LoraConfig(rank=2)
    save_weights(model, tmp_path / "full_sft_32.pth", {"stage": "full_sft"})
    add_lora(model, config)
    for tensor in lora_state_dict(model).values():
        tensor.copy_(torch.randn_like(tensor))
    save_lora(model, tmp_path / "lora" / "lora_red_32.pth", config)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def test_the_client_starts_without_torch():
    code = "import sys, scripts.chat_openai_api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=LIMIT).returncode == 0


@pytest.mark.slow
def test_server_and_client_as_processes(out_dir):
    """From another folder: flags, the line that says where, both model names, a key, the client, and a clean end."""
    command = [sys.executable, str(ROOT / "scripts" / "serve_openai_api.py"), "--out_dir", str(out_dir), "--port", "0",
               "--lora", "lora_red", "--slots", "2", "--max_seq_len", "128", "--device", "cpu"]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=out_dir,
        env=environment(MINIMIND_API_KEY="sesame"),
    )  # fmt: skip
    try:
        facts, where = server.stdout.readline(), server.stdout.readline()
        assert "full_sft_32, lora_red" in facts and "2 slots × 128 tokens" in facts, server.stderr.read()
        url = where.split()[2]
        assert url.startswith("http://127.0.0.1:")
        client = OpenAI(base_url=url, api_key="sesame", timeout=LIMIT, max_retries=0)
        assert [model.id for model in client.models.list()] == ["full_sft_32", "lora_red"]
        texts = {}
        for name in ("full_sft_32", "lora_red"):
            messages = [{"role": "user", "content": "Hello"}]
            reply = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=10)
            texts[name] = reply.choices[0].message.content
        assert texts["full_sft_32"] != texts["lora_red"]
        chat = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "chat_openai_api.py"), "--base_url", url, "--model", "lora_red",
             "--temperature", "0", "--max_tokens", "10", "--prompt", "Hello"],
            capture_output=True, text=True, timeout=LIMIT, env=environment(MINIMIND_API_KEY="sesame"),
        )  # fmt: skip
        assert chat.returncode == 0 and chat.stdout.rstrip("\n") == texts["lora_red"].rstrip("\n"), chat.stderr
        assert " tokens" in chat.stderr
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
        assert "Traceback" not in errors and server.returncode in (0, -signal.SIGTERM)
    finally:
        server.kill()
        server.communicate()


def error_line(capsys, main, *args: object) -> str:
    """The one line on standard error with which a script ends."""
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: main([str(arg) for arg in args]))
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_errors_of_the_server_script(capsys, out_dir, tmp_path_factory):
    main = serve_openai_api.main
    places = ("--out_dir", out_dir, "--port", "0", "--device", "cpu")
    empty = tmp_path_factory.mktemp("empty")
    assert "There are no weights" in error_line(capsys, main, "--out_dir", empty, "--port", "0")
    assert "lora_blue_32.pth does not exist" in error_line(capsys, main, *places, "--lora", "lora_blue")
    assert "names must differ" in error_line(capsys, main, *places, "--lora", "lora_red", "--lora", "lora_red")
    assert "2 to 1024" in error_line(capsys, main, *places, "--max_seq_len", "4000")
    assert "--api_key is empty" in error_line(capsys, main, *places, "--api_key", "")
    assert "got '3', expected a number from 0, at most 2" in error_line(capsys, main, "--temperature", "3")
    with contextlib.closing(listen("127.0.0.1", 0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert "choose another --port" in error_line(capsys, main, "--out_dir", out_dir, "--port", port)
        taken.close()
        line = error_line(capsys, chat_openai_api.main, "--base_url", f"http://127.0.0.1:{port}/v1")
        assert "is the server running?" in line


def test_flags_arrive():
    args = serve_openai_api.parse_args(["--cors", "http://a", "--cors", "http://b", "--api_key", "x", "--compile", "0"])
    assert args.cors == ["http://a", "http://b"] and args.api_key == ["x"] and args.compile is False
    assert (args.host, args.port, args.slots) == ("127.0.0.1", 8998, 16)


def test_memory_of_the_cache_is_what_is_allocated():
    served = serve_tiny(slots=3, max_seq_len=50)
    step = served.decoders["tiny"].model
    allocated = sum(cache.numel() * cache.element_size() for cache in (*step.keys, *step.values))
    assert cache_bytes(served.model, 3, 50) == allocated


def test_the_load_test_measures_what_it_says():
    with running_server(serve_tiny(slots=4)) as running:
        process = SimpleNamespace(pid=os.getpid())
        server = bench_serving.Server(process, running.port, "tiny")
        prompts = bench_serving.make_prompts(8, 20)
        tokenizer = load_tokenizer()
        assert len(set(prompts)) == 8 and all(15 <= len(tokenizer.encode(p)) <= 30 for p in prompts)
        row = bench_serving.measure_streams(server, prompts, 4, 12, [EOS])
        assert (row["requests"], row["tokens"]) == (8, 8 * 12)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 < row["first_token_p50_seconds"] <= row["first_token_p95_seconds"] <= row["seconds"]
        memory = bench_serving.measure_memory(server, 20, prompts, [EOS])
        assert len(memory["resident_mib"]) == 11 and memory["requests_per_second"] > 0
        shown = bench_serving.table([row | {"streams": 1}, row], memory)
        assert "| 4 | 8 |" in shown and "| 1.00 |" in shown
        figures = running.get("/metrics").text
        assert f'minimind_generated_tokens_total{{model="tiny"}} {96 + sum(1 + i % 16 for i in range(20))}' in figures
