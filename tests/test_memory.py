"""The advice on memory: what autograd keeps is counted anew here, peaks are read off torch's profiler."""

import argparse

import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer import memory
from trainer import trainer_utils as utils
from trainer.command_line import UserError, is_out_of_memory, run_script
from trainer.optimizer import make_optimizer
from trainer.train_pretrain import summed_nll


def small(layers: int, **sizes) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, vocab_size=640, **sizes)
    return MiniMindForCausalLM(config).train()


def forward(model, rows: int, seq_len: int):
    ids = torch.randint(3, 640, (rows, seq_len))
    positions = torch.arange(seq_len).expand(rows, seq_len)
    out = model(ids, position_ids=positions, documents=torch.zeros_like(ids), need_logits=False)
    return summed_nll(out.hidden_states, model.lm_head.weight, {"labels": ids}) / ids.numel() + out.aux_loss


def saved_bytes(model, rows: int, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes of the distinct tensors, weights and their half-precision copies left out, kept for the way back."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {shape for p in model.parameters() if p.ndim == 2 for shape in (p.shape, p.T.shape)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        is_copy = dtype != torch.float32 and tensor.dtype == dtype and tensor.shape in shapes
        if tensor.untyped_storage().data_ptr() not in weights and not is_copy:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # the tensor too: a freed address would be taken again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            forward(model, rows, seq_len)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "seq_len, sizes",
    [(1040, {}), (320, {}), (192, {"use_moe": True}), (192, {"flash_attn": False})],
    ids=["fused", "blocks", "moe", "plain"],
)
def test_what_a_block_keeps_is_what_autograd_saves(seq_len, sizes, dtype):
    rows = 3
    blocks = [saved_bytes(small(layers, **sizes), rows, seq_len, dtype) for layers in (2, 3)]
    width = torch.finfo(dtype).bits // 8
    counted = memory.kept_per_token(small(1, **sizes).config, seq_len, width, compiled=False, fused=seq_len > 1024)
    assert counted == pytest.approx((blocks[1] - blocks[0]) / (rows * seq_len), rel=0.02)


@pytest.mark.parametrize("text, limit", [("2147483648\n", 2**31), ("max\n", None), (None, None)])
def test_the_limit_of_a_container_counts(text, limit, tmp_path, monkeypatch):
    path, cpu = tmp_path / "memory.max", torch.device("cpu")
    if text:
        path.write_text(text, encoding="ascii")
    monkeypatch.setattr(memory, "CONTAINER", (str(tmp_path / "none"), str(path)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: argparse.Namespace(available=2**33))
    found = memory.available(cpu)
    assert found == limit if limit else 2**33 < found < 2**33 + psutil.virtual_memory().available


def settings(rows: int, seq_len: int, **more) -> argparse.Namespace:
    given = {"compile": False, "deepspeed": None, "checkpoint_activations": False, "max_memory": None}
    return argparse.Namespace(**given | {"batch_size": rows, "accumulation_steps": 1, "max_seq_len": seq_len} | more)


def peak_bytes(model, optimizer, rows: int, seq_len: int, micros: int) -> int:
    """Largest sum of living tensors in an update that is not the first, weights and optimiser state included."""

    def update():
        for _ in range(micros):
            forward(model, rows, seq_len).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()
    parts = getattr(optimizer, "parts", (optimizer,))
    state = [t for part in parts for kept in part.state.values() for t in kept.values() if torch.is_tensor(t)]
    living = sum(t.numel() * t.element_size() for t in [*state, *model.parameters()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        update()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return living + peak


@pytest.mark.parametrize(
    "rows, seq_len, micros, optimizer, checkpointed",
    [
        (8, 320, 1, "muon", False),
        (8, 320, 2, "adamw", False),
        (8, 320, 1, "muon", True),
        (1, 64, 1, "muon", False),
        (2, 1040, 1, "adamw", False),
    ],
    ids=["way-back", "accumulation", "checkpointed", "the-step", "fused"],
)
def test_the_need_is_the_measured_peak(rows, seq_len, micros, optimizer, checkpointed, monkeypatch):
    monkeypatch.setattr(memory, "HEAP", 1.0)  # living tensors are counted here, not the process
    monkeypatch.setattr(memory, "LOADED", 0.0)
    model, run = small(4), utils.Run("cpu", "float32", seed=0)
    chosen = make_optimizer(model, 0.1, run.device, optimizer)
    weights = 4 * sum(p.numel() for p in model.parameters())
    plan = memory.Plan(model, chosen, run, settings(rows, seq_len), held=weights)
    need = plan.need(rows, micros > 1, checkpointed)
    if checkpointed:
        utils.checkpoint_activations(model)
    assert need.total == pytest.approx(peak_bytes(model, chosen, rows, seq_len, micros), rel=0.15)
    assert (need.activations > 0) == (seq_len > 64)


def test_the_mask_of_long_rows_counts_once_for_all_layers(monkeypatch):
    """It alone grows with the square of the length where attention is fused and compiled: a byte and a float each."""
    monkeypatch.setattr(memory, "HEAP", 1.0)
    model, run = small(4), utils.Run("cpu", "float32", seed=0)
    chosen = make_optimizer(model, 0.1, run.device, "adamw")
    kept = {}
    for seq_len in (2048, 4096):
        plan = memory.Plan(model, chosen, run, settings(1, seq_len, compile=True), held=0)
        need = plan.need(1, False, False)
        assert need.held == memory.LOADED + 4 * memory.COMPILER  # of four layers
        kept[seq_len] = need.activations
    assert kept[4096] - 2 * kept[2048] == pytest.approx((4096**2 - 2 * 2048**2) * (1 + 4), rel=1e-6)


def test_attention_written_out_keeps_all_scores():
    config = small(1, flash_attn=False).config
    heads, T = config.num_attention_heads, 1024
    blocks, whole = (
        memory.kept_per_token(small(1, flash_attn=flash).config, T, 4, compiled=False, fused=False)
        for flash in (True, False)
    )
    assert whole - blocks == pytest.approx(0.375 * T * (4 * heads + 1))


def advised(monkeypatch, there: float = 2**40, **more) -> str:
    model, run = small(4), utils.Run("cpu", "float32", seed=0)
    monkeypatch.setattr(memory, "held_now", lambda device: 0.1 * memory.GIB)
    monkeypatch.setattr(memory, "available", lambda device: there)
    args = settings(64, 512, **more)
    return memory.advise(model, make_optimizer(model, 0.1, run.device), run, args)


def test_what_fits_is_a_note_and_what_does_not_names_flags_that_do(monkeypatch):
    note = advised(monkeypatch)
    assert note.startswith("about ") and "activations" in note and "of 1024.0 GiB" in note and "MORE" not in note
    tight = advised(monkeypatch, there=0.5 * memory.GIB)
    assert "MORE than the 0.5 GiB" in tight
    size, micros = (int(tight.split(flag)[1].split()[0]) for flag in ("--batch_size ", "--accumulation_steps "))
    assert size * micros == 64 and size < 64
    fits = advised(monkeypatch, there=0.5 * memory.GIB, batch_size=size, accumulation_steps=micros)
    assert "MORE" not in fits
    larger = advised(monkeypatch, there=0.5 * memory.GIB, batch_size=2 * size, accumulation_steps=micros // 2)
    assert "MORE" in larger, "the advice is the largest batch that fits"


def test_the_advice_keeps_the_rows_of_an_update(monkeypatch):
    advice = advised(monkeypatch, there=0.3 * memory.GIB, batch_size=15, accumulation_steps=2)
    size, micros = (int(advice.split(flag)[1].split()[0]) for flag in ("--batch_size ", "--accumulation_steps "))
    assert size * micros == 30 and size < 15


def test_max_memory_stops_the_run_before_it_starts(monkeypatch):
    with pytest.raises(UserError, match=r"--max_memory 0.5: the run needs about .* --batch_size \d+ --accumulation"):
        advised(monkeypatch, max_memory=0.5)
    with pytest.raises(UserError, match="no batch fits"):
        advised(monkeypatch, max_memory=0.15)
    assert "of 4.0 GiB" in advised(monkeypatch, max_memory=4)


def test_rollouts_are_told_about_their_own_rows(monkeypatch):
    with pytest.raises(UserError, match=r"--micro_rows \d+ needs"):
        advised(monkeypatch, max_memory=0.5, micro_rows=64, batch_size=8)


def test_zero_cuts_what_steps_on_the_weights(monkeypatch, tmp_path):
    model, run = small(4), utils.Run("cpu", "float32", seed=0)
    trained = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(run, "world_size", 4)
    fixed = {}
    for stage in range(4):
        config = tmp_path / f"zero{stage}.json"
        config.write_text(f'{{"zero_optimization": {{"stage": {stage}, "offload_optimizer": null}}}}')
        optimizer = make_optimizer(model, 0.1, run.device, "adamw")
        fixed[stage] = memory.Plan(model, optimizer, run, settings(1, 8, deepspeed=str(config)), held=0).fixed()
    assert fixed[0] == (0, 8 * trained, 4 * trained)
    assert fixed[1] == (0, 3 * trained, 4 * trained)
    assert fixed[2] == (0, 3 * trained, 1 * trained)
    assert fixed[3] == (-3 * trained, 3 * trained, 1 * trained)


def test_a_missing_compiler_is_one_line(capsys):
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    def missing():
        raise InductorError(InvalidCxxCompiler(), None)  # as torch wraps it

    with pytest.raises(SystemExit) as left:
        run_script(missing)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "error: compiling cannot work here (No working C++ compiler found" in error and error.count("\n") == 1

    def other():
        raise InductorError(RuntimeError("see torch.compiler.reset"), None)

    with pytest.raises(InductorError):
        run_script(other)


def test_out_of_memory_says_which_flags_help(capsys):
    def main():
        torch.empty(2**52)

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: the device is out of memory")
    assert all(flag in said for flag in ("--batch_size", "--accumulation_steps", "--checkpoint_activations"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and is_out_of_memory(torch.OutOfMemoryError("x"))
