"""What a run measures: the loss in one and in pieces, the validation loss, and the lines of its log.

Dimension legend: B batch · T tokens · V vocabulary.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_trainer_utils import Rows, V, one_process, shared_parser, tiny
from torch import nn

from dataset.lm_dataset import SFTDataset
from model.model_minimind import IGNORE
from trainer import run_log, train_full_sft, train_pretrain
from trainer import trainer_utils as utils
from trainer.checkpoint import Progress
from trainer.chunked_nll import chunked_nll, nll_and_gradient

# ---------------------------------------------------------------------------------------------------------------- loss


def test_loss_of_a_hand_computed_example():
    # One row of three tokens over two words; the head is the identity, so hidden states are logits, which favour word 1
    # by 0, ln 3 and (unused) 5 nats.
    hidden, head = torch.tensor([[[0.0, 0.0], [0.0, math.log(3)], [0.0, 5.0]]]), torch.eye(2)
    # Position 0 predicts label 0 of two equal words: ln 2. Position 1 predicts label 1 with probability 3/4.
    nats = train_pretrain.summed_nll(hidden, head, {"labels": torch.tensor([[1, 0, 1]])})
    assert nats.item() == pytest.approx(math.log(2) + math.log(4 / 3))
    # The trainer of conversations picks the positions before each trained token; -100 fills up and counts nothing.
    picked = {"head_positions": torch.tensor([1, 0]), "targets": torch.tensor([1, IGNORE])}
    assert train_full_sft.summed_nll(hidden, head, picked).item() == pytest.approx(math.log(4 / 3))


def test_loss_over_picked_positions_equals_the_loss_over_all():
    model = tiny(initializer_range=0.2)
    rows = packed_rows(6)
    rows[2]["labels"].fill_(IGNORE)
    batch = SFTDataset.collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    everywhere = train_pretrain.summed_nll(model(**inputs).hidden_states, model.lm_head.weight, batch)
    everywhere.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    picked = train_full_sft.summed_nll(model(**inputs).hidden_states, model.lm_head.weight, batch)
    picked.backward()
    assert picked.item() == pytest.approx(everywhere.item(), rel=1e-6)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def float64_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Σ −log p of the targets, written as a loop in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for h, target in zip(hidden.double(), targets.tolist(), strict=True):
        if target != IGNORE:
            total = total - (weight.double() @ h).log_softmax(0)[target]
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_loss_and_gradients_in_pieces_against_float64(dtype, tolerance, size):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 16, generator=generator, requires_grad=True)
    weight = torch.randn(V, 16, generator=generator, requires_grad=True)
    targets = torch.randint(V, (23,), generator=generator)
    targets[torch.rand(23, generator=generator) < 0.4] = IGNORE
    assert 0 < (targets == IGNORE).sum() < 23
    (expected := float64_nll(hidden, weight, targets) * 0.3).backward()
    wanted = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        nats = chunked_nll(hidden, weight, targets, size)
    assert nats.dtype is torch.float32  # a half-precision sum over thousands of tokens would be worth nothing
    (nats * 0.3).backward()
    assert nats.item() * 0.3 == pytest.approx(expected.item(), rel=tolerance)
    for found, grad in zip((hidden.grad, weight.grad), wanted, strict=True):
        assert found.dtype is torch.float32
        assert (found - grad).norm() < tolerance * grad.norm()
    assert not hidden.grad[targets == IGNORE].any()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        assert chunked_nll(hidden, weight, targets, size).item() == pytest.approx(nats.item(), rel=1e-4)


def test_gradient_of_a_sure_token_keeps_its_digits():
    """p = 0.9989: in bfloat16 p rounds to 1 and p − 1 to nothing; taken before rounding it keeps two digits."""
    hidden, weight = torch.tensor([[6.8]]), torch.tensor([[0.5], [-0.5]])
    logits = (hidden @ weight.T).bfloat16()
    sure = torch.softmax(logits.double(), -1)[0]
    _, gradient = nll_and_gradient(logits, torch.tensor([0]))
    assert gradient.dtype is torch.bfloat16
    assert gradient[0].tolist() == pytest.approx([float(sure[0] - 1), float(sure[1])], rel=1e-2)


def test_a_frozen_head_gets_no_gradient_and_changes_nothing_else():
    weight, targets = torch.randn(V, 8), torch.arange(20)
    grads = []
    for head in (weight.clone().requires_grad_(), weight.clone()):
        hidden = torch.linspace(-1, 1, 160).view(20, 8).requires_grad_()
        chunked_nll(hidden, head, targets, 6).backward()
        grads.append(hidden.grad)
        assert (head.grad is not None) == head.requires_grad
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_loss_never_holds_all_logits():
    seen = []

    def piece(logits, targets):
        seen.append(tuple(logits.shape))
        return nll_and_gradient(logits, targets)

    hidden = torch.randn(70, 8, requires_grad=True)
    chunked_nll(hidden, torch.randn(V, 8), torch.zeros(70, dtype=torch.long), 32, piece).backward()
    assert seen == [(32, V), (32, V), (6, V)] and hidden.grad.abs().sum() > 0


def test_loss_of_ignored_labels_is_zero_and_so_is_its_gradient():
    hidden, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)
    nats = train_pretrain.summed_nll(hidden, weight, {"labels": torch.full((2, 5), IGNORE)})
    nats.backward()
    assert nats.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()


# ---------------------------------------------------------------------------------------------------------- validation


def packed_rows(n: int, width: int = 12) -> Rows:
    """Rows of two documents and some padding; about half of the labels are ignored."""
    generator = torch.Generator().manual_seed(5)
    rows = Rows()
    for _ in range(n):
        first = int(torch.randint(2, 6, (), generator=generator))
        second = int(torch.randint(2, 6, (), generator=generator))
        rest = width - first - second
        ids = torch.randint(3, V, (width,), generator=generator)
        labels = ids.masked_fill(torch.rand(width, generator=generator) < 0.4, IGNORE)
        labels[[0, first]] = IGNORE
        labels[first + second :] = IGNORE
        parts = [first, second, rest]
        rows.append({
            "input_ids": ids,
            "labels": labels,
            "position_ids": torch.cat([torch.arange(part) for part in parts]),
            "documents": torch.cat([torch.full((part,), d) for part, d in zip(parts, (0, 1, -1), strict=True)]),
        })  # fmt: skip
    return rows


def test_validation_against_a_naive_loop():
    model = tiny(dropout=0.5, initializer_range=0.2).train()
    rows = packed_rows(7)
    bytes_of = torch.arange(V) % 5
    nats = tokens = text_bytes = 0
    model.eval()
    for row in rows[:5]:
        for document in (0, 1):  # each document alone, in its own forward pass
            here = row["documents"] == document
            with torch.no_grad():
                log_probs = model(row["input_ids"][here][None]).logits[0].double().log_softmax(-1)
            for t, label in enumerate(row["labels"][here][1:].tolist()):
                if label != IGNORE:
                    nats -= float(log_probs[t, label])
                    tokens += 1
                    text_bytes += label % 5
    model.train()
    picking = Rows(rows)
    picking.collate = SFTDataset.collate
    for dataset, script in ((rows, train_pretrain), (picking, train_full_sft)):
        result = utils.validate(model, dataset, script.summed_nll, one_process(), 2, 5, bytes_of)
        assert result["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert result["val_bpb"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert model.training and all(p.grad is None for p in model.parameters())


class RowsAndPadding(Rows):
    """Row -1 is padding, as in a packed data set."""

    def __getitem__(self, row: int) -> dict:
        found = super().__getitem__(row)
        if row >= 0:
            return found
        return {name: torch.full_like(tensor, IGNORE if name == "labels" else 0) for name, tensor in found.items()} | {
            "documents": torch.full_like(found["documents"], -1)
        }


def test_validation_shares_the_rows_among_ranks():
    model, rows, bytes_of = tiny(), RowsAndPadding(packed_rows(5)), torch.ones(V, dtype=torch.long)
    parts = []
    for rank in range(3):
        run = one_process(rank, 3)
        run.sum_ranks = lambda value: parts.append(value) or value
        utils.validate(model, rows, train_pretrain.summed_nll, run, 2, 100, bytes_of)
    alone = one_process()
    alone.sum_ranks = lambda value: parts.append(value) or value
    utils.validate(model, rows, train_pretrain.summed_nll, alone, 2, 100, bytes_of)
    assert torch.allclose(sum(parts[:3]), parts[3], rtol=1e-5)


def test_validation_without_rows_and_without_labels():
    model, bytes_of = tiny(), torch.ones(V)
    assert utils.validate(model, Rows(), train_pretrain.summed_nll, one_process(), 2, 5, bytes_of) is None
    rows = Rows({**row, "labels": torch.full_like(row["labels"], IGNORE)} for row in packed_rows(2))
    result = utils.validate(model, rows, train_pretrain.summed_nll, one_process(), 2, 5, bytes_of)
    assert result == {"val_loss": 0.0, "val_bpb": 0.0}


# ------------------------------------------------------------------------------------------------------------- run log


@pytest.mark.parametrize("moe", [{}, {"use_moe": True, "n_routed_experts": 5, "num_experts_per_tok": 2}])
def test_flops_against_the_sizes_of_the_layers(moe):
    model = tiny(**moe)
    products = model.lm_head.weight.numel()
    for layer in model.model.layers:
        used = [m for name, m in layer.named_modules() if isinstance(m, nn.Linear) and ".experts." not in name]
        products += sum(linear.weight.numel() for linear in used)
        if moe:
            one_expert = sum(m.weight.numel() for m in layer.mlp.experts[0].modules() if isinstance(m, nn.Linear))
            products += 2 * one_expert + layer.mlp.gate.weight.numel()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)  # the PaLM count takes them along
    # Scores and weighted sum of T/2 tokens on average: 2 products of D · T/2, forward and twice backward.
    T, D, layers = 100, 32, 2
    attention = layers * 2 * (2 * D * T / 2) * 3
    assert run_log.flops_per_token(model, T) == 6 * (products + norms) + attention


@pytest.mark.parametrize(
    "name, tera",
    [
        ("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125), ("NVIDIA A40", 150),
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA RTX A6000", 155),
        ("NVIDIA GeForce GTX 1080", None), ("NVIDIA RTX A4000", None), ("NVIDIA T400 4GB", None), ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3080 Ti", None), ("NVIDIA GB200", None),
    ],
)  # fmt: skip
def test_peak_of_known_cards_only(name, tera, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert run_log.peak_flops(torch.device("cuda", 0)) == (tera and tera * 1e12)
    assert run_log.peak_flops(torch.device("cpu")) is None


def test_a_log_line_adds_up_what_happened_since_the_last_one(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=lambda: now[0], time=lambda: 1e9))
    monkeypatch.setattr(run_log, "peak_flops", lambda device: 1e6)
    model, args = tiny(), shared_parser().parse_args([])
    vars(args).update(total_steps=20, accumulation_steps=2, warmup_iters=1, data_path="d.jsonl", compile=False)
    run = one_process(world_size=2)
    run.is_main, run.dtype = True, torch.float32
    run.sum_ranks = lambda value: value * 2  # the other rank has the same
    data = packed_rows(3)
    progress = Progress(step=4, epoch=1, tokens=900)
    keeper = SimpleNamespace(folder=tmp_path, progress=Progress(), wandb_id=None)
    log = run_log.RunLog(run, "pretrain", keeper, args, model, data)
    assert "4 rows × 2 micro-batches × 2 ranks = 16 rows, 1,024 tokens per update" in capsys.readouterr().out

    log.count(torch.tensor(6.0), 12, 100, waited_seconds=1.0)
    with log.pause():  # saving and validating take nothing from tokens/s
        now[0] += 50
    log.count(torch.tensor(10.0), 4, 300, waited_seconds=1.0)
    now[0] += 8
    log.line(progress, 1e-3, torch.tensor(0.5))
    first = run_log.read_metrics(tmp_path / "metrics.jsonl")[0]
    assert first["loss"] == 2 * (6 + 10) / (12 + 4)  # over tokens, not a mean of means
    assert (first["tokens_per_second"], first["data_wait"], first["tokens"], first["epoch"]) == (50.0, 0.25, 900, 2)
    assert first["eta_seconds"] == 4.0 * (20 - 4)
    assert first["mfu"] == pytest.approx(50 * run_log.flops_per_token(model, 64) / 2 / 1e6)
    assert "aux_loss" not in first
    expected = "pretrain | epoch 2/1 | step 4/20 | loss 2.0000 | lr 1.00e-03 | gnorm 0.50 | 0.1k tok/s | mfu "
    line = capsys.readouterr().out
    assert line.startswith(expected) and line.endswith("| data 25.0% | eta 0:01:04\n")

    now[0] += 2
    log.count(torch.tensor(0.0), 0, 10, waited_seconds=0.0)  # an update that was skipped, or had no label
    log.count_experts(torch.tensor([[6, 2], [0, 0]]))
    log.count_experts(torch.tensor([[6, 2], [4, 4]]))
    log.line(progress, 1e-3, torch.tensor(math.nan), aux_loss=0.25)
    second = run_log.read_metrics(tmp_path / "metrics.jsonl")[1]
    assert second["loss"] is None and second["grad_norm"] is None and second["aux_loss"] == 0.25
    assert second["expert_load"] == [[0.75, 0.25], [0.5, 0.5]] and "| experts 25%–75% |" in capsys.readouterr().out
    assert second["tokens_per_second"] == 5.0


def write_metrics(folder, *lines: str) -> None:
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_metrics_with_a_torn_last_line(tmp_path):
    write_metrics(tmp_path, '{"step": 1, "loss": 3.0}', '{"step": 2, "loss": 2.5}', '{"step": 3, "lo')
    assert run_log.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]


def test_loss_curve_is_a_picture(tmp_path):
    assert run_log.plot_loss(tmp_path, "nothing yet") is None
    write_metrics(tmp_path, '{"step": 1, "val_loss": 3.0}')
    assert run_log.plot_loss(tmp_path, "no training loss yet") is None
    lines = [json.dumps({"step": step, "loss": 5.0 - step}) for step in range(1, 4)]
    write_metrics(tmp_path, *lines, '{"step": 4, "loss": null}')
    first = run_log.plot_loss(tmp_path, "demo")
    pictures = [first.read_bytes()]
    write_metrics(tmp_path, *lines, '{"step": 3, "val_loss": 2.5, "val_bpb": 1.0}')
    pictures.append(run_log.plot_loss(tmp_path, "demo").read_bytes())
    for picture in pictures:
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
    assert pictures[0] != pictures[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_clock_and_finite():
    assert [run_log.clock(s) for s in (0, 59.9, 3600, 7384)] == ["0:00:00", "0:00:59", "1:00:00", "2:03:04"]
    values = [1, 2.5, float("nan"), float("inf"), -float("inf"), "x", None]
    assert [run_log.finite(v) for v in values] == [1, 2.5, None, None, None, "x", None]
