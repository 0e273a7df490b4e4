"""Distillation: loss and gradient by formula, teachers of every kind on packed rows, whole runs and what they refuse.

Sizes are tiny: a teacher of width 64, students of width 32, rows of 64 tokens, one thread.

Dimension legend: B batch · T tokens · V vocabulary · N trained positions · D hidden size.
"""

import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_model import llama_twin
from test_trainers import (  # noqa: F401 (fixtures)
    PowerCut,
    assert_same_run,
    cpu_is_the_best_device,
    curve,
    cut,
    files,
    final_state,
    metrics,
    one_error,
    tiny_flags,
    torchrun,
    train,
    tree,
)
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from dataset.lm_dataset import IGNORE, SFTDataset
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_model, load_tokenizer, save_weights
from trainer import run_log, train_distillation, train_full_sft
from trainer import trainer_utils as utils
from trainer.chunked_nll import summed_through_head
from trainer.train_distillation import Distillation, Teacher

# ruff: noqa: F811 (fixtures as arguments)

STAGE = "full_dist"
ALPHA = 0.3


def tiny_model(seed: int = 0, **config) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "initializer_range": 0.2} | config
    return MiniMindForCausalLM(MiniMindConfig(**sizes))


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing the loss curve takes as long as a run of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "plot_loss", lambda *about: None)
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def teachers(files, tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A teacher that has learnt the data, the same weights as a folder of transformers, and one with experts."""
    folder = tmp_path_factory.mktemp("teachers")
    flags = dict(
        from_weight="none", hidden_size=64, num_hidden_layers=2, max_steps=20, val_interval=0, learning_rate=2e-2
    )
    result = train(train_full_sft, tiny_flags(files, folder, "full_sft", **flags))
    assert result.status == 0, result.err
    ours = folder / "full_sft_64.pth"
    llama_twin(load_model(ours), {"rope_type": "default"}).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    experts = folder / "full_sft_64_moe.pth"
    save_weights(tiny_model(hidden_size=64, use_moe=True), experts, {"stage": "full_sft"})
    return SimpleNamespace(ours=ours, llama=folder / "llama", experts=experts, folder=folder)


@pytest.fixture
def flags(files, teachers, tmp_path):
    """The flags of a tiny run; no test may change a teacher."""
    before = tree(teachers.folder)
    yield lambda out_dir=tmp_path, **changes: dist_flags(files, teachers, out_dir, **changes)
    assert tree(teachers.folder) == before


def dist_flags(files, teachers, out_dir, **changes) -> list[str]:
    base = dict(teacher=teachers.ours, alpha=ALPHA, max_steps=12, warmup_iters=2, val_interval=4, learning_rate=1e-2)
    return tiny_flags(files, out_dir, "full_sft", **(base | changes))


def data_of(files, tokenizer, split: str = "train") -> SFTDataset:
    return SFTDataset(files.full_sft, tokenizer, 64, split, val_ratio=0.05, cache_dir=files.cache)


def plain_run_settings() -> SimpleNamespace:
    """What a teacher needs of a run: one process in float32."""
    return SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, autocast=contextlib.nullcontext)


def at_update(monkeypatch, step: int, action) -> None:
    """Calls `action` right after an update, before it is logged or saved."""
    count, done = run_log.RunLog.count, []

    def counted(log, *args, **sums):
        count(log, *args, **sums)
        done.append(1)
        if len(done) == step:
            action()

    monkeypatch.setattr(run_log.RunLog, "count", counted)


# ------------------------------------------------------------------------------------------------------------- the loss


def parts_by_formula(z, teacher_logits, target: int, tau: float, reverse: bool):
    """CE and KL of one position as the equations have them, in float64.  Shape: (V,), (V,)."""
    z, teacher_logits = z.double(), teacher_logits.double()
    q, p = ((x / tau).exp() / (x / tau).exp().sum() for x in (z, teacher_logits))
    kl = (q * torch.log(q / p)).sum() if reverse else (p * torch.log(p / q)).sum()
    return -torch.log(z.exp()[target] / z.exp().sum()), kl


def loss_by_formula(logits, teacher_logits, targets, alpha: float, tau: float, reverse: bool):
    """(loss, CE, τ²·KL), summed over the positions that are trained on."""
    ce, kl = 0, 0
    for z, t, target in zip(logits, teacher_logits, targets.tolist(), strict=True):
        if target != IGNORE:
            one = parts_by_formula(z, t, target, tau, reverse)
            ce, kl = ce + one[0], kl + tau**2 * one[1]
    return alpha * ce + (1 - alpha) * kl, ce, kl


def fake_teacher(head: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(head=head, run=plain_run_settings())


CASES = pytest.mark.parametrize(
    "reverse, tau, alpha", [(r, t, a) for r in (False, True) for t in (1.0, 2.0) for a in (0.0, 0.3, 1.0)]
)


@CASES
def test_loss_and_gradient_by_formula(reverse, tau, alpha):
    torch.manual_seed(1)
    logits, hidden, head = torch.randn(9, 17) * 3, torch.randn(9, 5), torch.randn(17, 5) * 2
    targets = torch.tensor([3, IGNORE, 0, 16, IGNORE, 5, 5, 8, IGNORE])
    distillation = Distillation(fake_teacher(head), alpha, tau, reverse)
    loss, gradient = distillation.piece(logits, targets, hidden)
    z = logits.double().requires_grad_()
    expected, ce, kl = loss_by_formula(z, hidden.double() @ head.double().T, targets, alpha, tau, reverse)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), z.grad, rtol=1e-4, atol=1e-5)
    assert gradient[targets == IGNORE].abs().max() == 0
    assert kl > 1 and ce > 1 and gradient.abs().max() > 0.1

    distillation.piece(logits, targets, hidden)  # what is logged: sums since the log line before, of whole pieces
    sums = distillation.take_sums()
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(
        {"ce": 2 * ce.item(), "kl": 2 * kl.item()}, rel=1e-5
    )
    assert all(value == 0 for value in distillation.take_sums().values()) and sums["ce"] > 0


@CASES
def test_gradients_of_hidden_states_and_head_in_pieces(reverse, tau, alpha):
    torch.manual_seed(2)
    hidden, head = torch.randn(150, 6), torch.randn(23, 6)
    teacher_hidden, teacher_head = torch.randn(150, 4), torch.randn(23, 4)
    targets = torch.randint(0, 23, (150,))
    targets[::7] = IGNORE
    naive = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    teacher_logits = teacher_hidden.double() @ teacher_head.double().T
    expected, ce, kl = loss_by_formula(naive[0] @ naive[1].T, teacher_logits, targets, alpha, tau, reverse)
    (expected * 3).backward()  # a factor, as the division by N is one
    for size in (64, 150, 1000):
        ours = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        distillation = Distillation(fake_teacher(teacher_head), alpha, tau, reverse)
        loss = summed_through_head(*ours, (targets, teacher_hidden), distillation.piece, size)
        (loss * 3).backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for mine, his in zip(ours, naive, strict=True):
            torch.testing.assert_close(mine.grad.double(), his.grad, rtol=1e-4, atol=1e-4)
        assert distillation.sums.tolist() == pytest.approx([ce.item(), kl.item()], rel=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(reverse):
    torch.manual_seed(3)
    hidden, head = torch.randn(70, 8) * 3, torch.randn(40, 8)
    distillation = Distillation(fake_teacher(head), 0.0, 2.0, reverse)
    loss, gradient = distillation.piece(hidden @ head.T, torch.arange(70) % 40, hidden)
    assert abs(loss.item()) < 1e-4 and gradient.abs().max() < 1e-6
    assert distillation.take_sums()["ce"] > 10


@pytest.mark.parametrize("reverse", [False, True])
def test_logits_far_apart_overflow_nothing(reverse):
    head = torch.eye(3)
    z, teacher = torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[-200.0, 0.0, 200.0]])
    loss, gradient = Distillation(fake_teacher(head), 0.0, 1.0, reverse).piece(z, torch.tensor([0]), teacher)
    assert loss.item() == pytest.approx(400) and torch.isfinite(gradient).all()


# ------------------------------------------------------------------------------------------- teachers on packed rows


def documents_of(rows: list[dict]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each conversation in these rows."""
    return [
        (row["input_ids"][row["documents"] == n], row["labels"][row["documents"] == n])
        for row in rows
        for n in range(int(row["documents"].max()) + 1)
    ]


@pytest.mark.parametrize("kind", ["ours", "llama", "experts"])
def test_a_teacher_sees_each_packed_conversation_alone(kind, files, teachers, tokenizer):
    data = data_of(files, tokenizer)
    rows = [data[row] for row in (*range(8), -1, *range(8, 20))]
    batch = data.collate(rows)
    teacher = Teacher(getattr(teachers, kind), tokenizer, plain_run_settings())
    hidden = teacher(batch)
    assert hidden.shape == (len(batch["targets"]), 64) and not hidden.requires_grad and not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    if kind == "llama":
        alone = AutoModelForCausalLM.from_pretrained(teachers.llama)
        assert type(alone).__name__ == "LlamaForCausalLM"
    else:
        alone = load_model(getattr(teachers, kind))
    expected = []
    documents = documents_of(rows)
    assert len(documents) > len(rows)  # some share a row
    with torch.no_grad():
        for ids, labels in documents:
            expected.append(alone(ids[None]).logits[0, :-1][labels[1:] != IGNORE])
    expected = torch.cat(expected)
    real = batch["targets"] != IGNORE
    assert len(expected) == int(real.sum()) > 50
    torch.testing.assert_close((hidden @ teacher.head.T)[real], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_rows_move_the_weights_as_each_conversation_alone(reverse, files, teachers, tokenizer):
    data, student = data_of(files, tokenizer), tiny_model()
    rows = [data[row] for row in range(len(data)) if data[row]["documents"].max() > 0][:3]  # several share a row
    batch = data.collate(rows)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "documents")}
    teacher = Teacher(teachers.llama, tokenizer, plain_run_settings())
    distillation = Distillation(teacher, ALPHA, 2.0, reverse)
    loss = distillation(student(**inputs, need_logits=False).hidden_states, student.lm_head.weight, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    total, knows = 0, load_model(teachers.ours)
    assert len(documents_of(rows)) >= 6
    for ids, labels in documents_of(rows):
        with torch.no_grad():
            teacher_logits = knows(ids[None]).logits[0, :-1]
        logits = student(ids[None]).logits[0, :-1]
        total = total + loss_by_formula(logits, teacher_logits, labels[1:], ALPHA, 2.0, reverse)[0]
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for name, p in student.named_parameters():
        assert float(p.grad.abs().max()) > 0, name
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()))


def scaled(sizes: dict):
    """Its logits are the head's, times a factor."""
    return CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.5))


def recurrent(sizes: dict):
    """Its state goes on from one packed conversation into the next."""
    return MambaForCausalLM(MambaConfig(**{name: sizes[name] for name in ("vocab_size", "hidden_size")}))


def learnt_positions(sizes: dict):
    return GPT2LMHeadModel(GPT2Config(vocab_size=6400, n_embd=32, n_layer=1, n_head=4, initializer_range=0.2))


@pytest.mark.parametrize("make", [scaled, recurrent, learnt_positions])
def test_a_teacher_that_would_be_misread_is_refused(make, tokenizer, tmp_path):
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    make(dict(vocab_size=6400, hidden_size=32, intermediate_size=64, num_hidden_layers=1, **heads)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    if make is learnt_positions:
        Teacher(tmp_path, tokenizer, plain_run_settings())
    else:
        with pytest.raises(WeightsError, match="cannot be asked about packed rows"):
            Teacher(tmp_path, tokenizer, plain_run_settings())


# ----------------------------------------------------------------------------------------------------------------- runs


def test_the_optimizer_step_is_that_of_the_other_trainers():
    text = [Path(script.__file__).read_text(encoding="utf-8") for script in (train_distillation, train_full_sft)]
    steps = [t[t.index("# [shared: optimizer-step]") : t.index("# [end: optimizer-step]")] for t in text]
    assert steps[0] == steps[1] and "step_if(finite, optimizer)" in steps[0]


@pytest.fixture(scope="module")
def plain_run(files, teachers, tmp_path_factory) -> SimpleNamespace:
    """An uninterrupted run. Tests copy its folder, none writes into it."""
    out_dir, before = tmp_path_factory.mktemp("plain"), tree(teachers.folder)
    result = train(train_distillation, dist_flags(files, teachers, out_dir))
    assert result.status == 0, result.err
    assert tree(teachers.folder) == before
    return SimpleNamespace(out_dir=out_dir, result=result)


def test_a_run_learns_from_its_teacher(plain_run, teachers):
    records = metrics(plain_run.out_dir, STAGE)
    lines = [record for record in records if "loss" in record]
    assert curve(lines, "step") == list(range(1, 13))
    for line in lines:
        assert line["loss"] == pytest.approx(ALPHA * line["ce"] + (1 - ALPHA) * line["kl"], rel=1e-5)
    assert lines[0]["ce"] == pytest.approx(math.log(6400), abs=0.4)
    for name in ("loss", "ce", "kl"):
        assert lines[-1][name] < lines[0][name] - 2, name
    held_out = curve(records, "val_loss")
    assert len(held_out) == 3 and held_out[2] < held_out[1] < held_out[0] < lines[0]["ce"] - 1
    assert all(value > 0 for value in curve(records, "val_bpb"))
    assert "full_dist | epoch 1/1 | step 1/12 | loss " in plain_run.result.out
    assert " | ce 8." in plain_run.result.out and " | kl " in plain_run.result.out

    student = load_model(plain_run.out_dir / "full_dist_32.pth")
    assert (student.config.hidden_size, student.config.num_hidden_layers) == (32, 1)  # the teacher has 64 × 2
    about = json.loads((plain_run.out_dir / "full_dist_32.json").read_text(encoding="utf-8"))
    assert about["stage"] == STAGE and about["step"] == 12
    state, facts = final_state(plain_run.out_dir, STAGE)
    assert facts["progress"]["finished"] and Path(facts["args"]["teacher"]) == teachers.ours
    for name, p in student.named_parameters():
        assert torch.equal(p, state["model"][name].half().float()), name


def test_the_teacher_alone_teaches(flags, tmp_path):
    """Without hard labels the held-out loss falls too; reverse KL at another temperature does it as well."""
    for name, changes in {"forward": {}, "reverse": {"kl": "reverse", "temperature": 2}}.items():
        result = train(train_distillation, flags(tmp_path / name, alpha=0, max_steps=16, val_interval=8, **changes))
        assert result.status == 0, result.err
        records = metrics(tmp_path / name, STAGE)
        assert curve(records) == pytest.approx(curve(records, "kl"), rel=1e-5)
        assert curve(records)[-1] < curve(records)[0] - 0.5
        held_out = curve(records, "val_loss")
        assert held_out[1] < held_out[0] < 8


def test_hard_labels_alone_are_sft(flags, files, tmp_path):
    student = tmp_path / "student" / "pretrain_32.pth"
    save_weights(tiny_model(initializer_range=0.02), student)
    common = dict(from_weight=student, max_steps=6)
    assert train(train_distillation, flags(tmp_path / "dist", alpha=1, **common)).status == 0
    sft = tiny_flags(files, tmp_path / "sft", "full_sft", warmup_iters=2, **(common | dict(learning_rate=1e-2)))
    assert train(train_full_sft, sft).status == 0
    records, plain = metrics(tmp_path / "dist", STAGE), metrics(tmp_path / "sft", "full_sft")
    assert curve(records) == pytest.approx(curve(plain), rel=1e-4)
    assert curve(records) == pytest.approx(curve(records, "ce"), rel=1e-6)
    assert curve(records, "grad_norm") == pytest.approx(curve(plain, "grad_norm"), rel=1e-3)


def test_first_update_against_a_naive_one(flags, files, teachers, tokenizer, tmp_path):
    """Micro-batches of unequal numbers of trained tokens: what divides the loss is the tokens of all of them."""
    student = tmp_path / "student" / "pretrain_32.pth"
    save_weights(tiny_model(), student)
    changes = dict(from_weight=student, batch_size=1, accumulation_steps=3, max_steps=1, temperature=2, kl="reverse")
    assert train(train_distillation, flags(**changes)).status == 0
    data = data_of(files, tokenizer)
    args = SimpleNamespace(batch_size=1, accumulation_steps=3)
    _, micros = next(utils.RowOrder(len(data), args, SimpleNamespace(rank=0, world_size=1, seed=42), 0).updates())
    model, teacher = load_model(student), load_model(teachers.ours)
    total, counts = 0, []
    for micro in micros:
        counts.append(0)
        for ids, labels in documents_of([data[row] for row in micro]):
            with torch.no_grad():
                teacher_logits = teacher(ids[None]).logits[0, :-1]
            logits = model(ids[None]).logits[0, :-1]
            total = total + loss_by_formula(logits, teacher_logits, labels[1:], ALPHA, 2.0, True)[0]
            counts[-1] += int((labels[1:] != IGNORE).sum())
    assert len(set(counts)) > 1
    loss = total / sum(counts)
    loss.backward()
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    line = metrics(tmp_path, STAGE)[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_a_transformers_folder_teaches_as_the_same_weights_of_ours(plain_run, flags, teachers, tmp_path):
    result = train(train_distillation, flags(teacher=teachers.llama))
    assert result.status == 0, result.err
    theirs, ours = metrics(tmp_path, STAGE), metrics(plain_run.out_dir, STAGE)
    for name in ("loss", "ce", "kl", "val_loss"):
        assert curve(theirs, name) == pytest.approx(curve(ours, name), rel=1e-3), name
    about = json.loads((tmp_path / "full_dist_32.json").read_text(encoding="utf-8"))
    assert Path(about["tokenizer"]) == teachers.llama  # what reads the student has to read it by


def test_experts_teach_experts(flags, teachers, tmp_path):
    result = train(train_distillation, flags(teacher=teachers.experts, use_moe=True, max_steps=8, val_interval=0))
    assert result.status == 0, result.err
    records = metrics(tmp_path, STAGE, "32_moe")
    assert curve(records)[-1] < curve(records)[0]
    assert all(0.05 < value < 0.4 for value in curve(records, "aux_loss")) and "| experts " in result.out
    model = load_model(tmp_path / "full_dist_32_moe.pth")
    assert model.config.use_moe and model.config.num_hidden_layers == 1


@pytest.mark.parametrize("kind", ["ours", "llama", "experts"])
def test_bfloat16_is_the_same_run_rounded(kind, plain_run, flags, teachers, tmp_path):
    teacher = getattr(teachers, kind)
    result = train(train_distillation, flags(teacher=teacher, dtype="bfloat16", max_steps=2, val_interval=0))
    assert result.status == 0 and "machine cpu, bfloat16" in result.out, result.err
    losses = curve(metrics(tmp_path, STAGE))
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    if kind != "experts":
        first = metrics(plain_run.out_dir, STAGE)[0]
        for name in ("ce", "kl"):
            assert curve(metrics(tmp_path, STAGE), name)[0] == pytest.approx(first[name], rel=0.02), name


def test_an_update_left_out_leaves_the_figures_alone(flags, tmp_path, monkeypatch):
    """A loss scale of float16 that overflows first: CE and KL are means over the updates that were taken, too."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**22, enabled=enabled))
    changes = dict(dtype="float16", max_steps=7, log_interval=7, val_interval=0)
    assert train(train_distillation, flags(**changes)).status == 0
    line = metrics(tmp_path, STAGE)[0]
    assert 0 < line["skipped_steps"] < 6
    assert line["loss"] == pytest.approx(ALPHA * line["ce"] + (1 - ALPHA) * line["kl"], rel=1e-3)


# -------------------------------------------------------------------------------------- layouts of the batch, resuming


def same_updates(one: Path, other: Path) -> None:
    """Two runs of one batch in two layouts."""
    a, b = metrics(one, STAGE), metrics(other, STAGE)
    assert curve(a, "step") == curve(b, "step") and curve(a, "tokens") == curve(b, "tokens")
    for name in ("loss", "ce", "kl", "grad_norm", "val_loss"):
        assert curve(b, name) == pytest.approx(curve(a, name), rel=1e-5), name
    a, b = (final_state(folder, STAGE)[0]["model"] for folder in (one, other))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 2e-5


LAYOUT = dict(optimizer="adamw", epochs=2, max_steps=6, learning_rate=1e-3, temperature=2)


@pytest.fixture(scope="module")
def one_process(files, teachers, tokenizer, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("layout")
    assert train(train_distillation, dist_flags(files, teachers, out_dir, batch_size=40, **LAYOUT)).status == 0
    rows, lines = len(data_of(files, tokenizer)), metrics(out_dir, STAGE)
    assert 0 < rows % 40 <= 20 and {line["epoch"] for line in lines if "loss" in line} == {
        1,
        2,
    }  # one rank gets padding
    return out_dir


def test_accumulation_is_the_same_update(one_process, flags, tmp_path):
    assert train(train_distillation, flags(batch_size=8, accumulation_steps=5, **LAYOUT)).status == 0
    same_updates(one_process, tmp_path)


@pytest.mark.slow
def test_two_ranks_are_one_process(one_process, flags, tmp_path):
    result = torchrun(train_distillation, flags(batch_size=20, **LAYOUT))
    assert result.status == 0, result.err
    same_updates(one_process, tmp_path)


def test_a_cut_run_goes_on_bit_for_bit(plain_run, flags, teachers, tmp_path, monkeypatch):
    """The teacher is named by its stage: by the time the run goes on, newer weights of that stage are there."""
    for suffix in (".pth", ".json"):
        shutil.copy(teachers.ours.with_suffix(suffix), tmp_path)
    with monkeypatch.context() as patch:
        at_update(patch, 8, cut)
        with pytest.raises(PowerCut):
            train(train_distillation, flags(teacher="full_sft"))
    newer = tmp_path / "full_sft_96.pth"
    save_weights(tiny_model(hidden_size=96), newer, {"stage": "full_sft"})
    os.utime(newer, (4e9, 4e9))
    result = train(train_distillation, ["--resume", "--out_dir", str(tmp_path)])
    assert result.status == 0 and "resumed at update 5" in result.out, result.err
    assert_same_run(tmp_path, plain_run.out_dir, STAGE)
    for name in ("ce", "kl"):
        assert curve(metrics(tmp_path, STAGE), name) == curve(metrics(plain_run.out_dir, STAGE), name)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_would_be_another_run_is_refused(flags, teachers, tmp_path):
    out_dir, teacher = tmp_path / "out", tmp_path / "teacher" / "full_sft_64.pth"
    teacher.parent.mkdir()
    for suffix in (".pth", ".json"):
        shutil.copy(teachers.ours.with_suffix(suffix), teacher.parent)
    assert train(train_distillation, flags(out_dir, teacher=teacher, max_steps=5)).status == 0
    before, again = tree(out_dir), ["--resume", "--out_dir", str(out_dir)]
    for more, what in [
        (["--alpha", "0.5"], "alpha was 0.3, now it is 0.5"),
        (["--temperature", "2"], "temperature was 1.0, now it is 2.0"),
        (["--kl", "reverse"], "kl was forward, now it is reverse"),
    ]:
        assert what in one_error(train(train_distillation, [*again, *more]))
    state = torch.load(teacher, weights_only=True)
    state["model.norm.weight"] += 1
    torch.save(state, teacher)
    assert "teacher weights was" in one_error(train(train_distillation, again))
    teacher.unlink()
    assert "full_sft_64.pth does not exist" in one_error(train(train_distillation, again))
    assert tree(out_dir) == before


@pytest.fixture(scope="module")
def small_tokenizer(tokenizer, tmp_path_factory) -> Path:
    """Another vocabulary of the same size: two tokens changed places."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name, number in about["model"]["vocab"].items() if number in (300, 301)]
    vocab = about["model"]["vocab"]
    vocab[names[0]], vocab[names[1]] = vocab[names[1]], vocab[names[0]]
    path.write_text(json.dumps(about), encoding="utf-8")
    return folder


def test_an_unfit_teacher_is_one_line_and_destroys_nothing(plain_run, small_tokenizer, flags, teachers, tmp_path):
    out_dir = tmp_path / "out"
    shutil.copytree(plain_run.out_dir, out_dir)
    other, bare, capped = tmp_path / "other", tmp_path / "bare", tmp_path / "capped"
    for folder in (other, bare, capped):
        shutil.copytree(teachers.llama, folder)
    shutil.copy(small_tokenizer / "tokenizer.json", other)
    (bare / "tokenizer.json").unlink()
    config = json.loads((capped / "config.json").read_text(encoding="utf-8"))
    (capped / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}), encoding="utf-8")
    larger = tmp_path / "larger.pth"
    save_weights(tiny_model(vocab_size=6464), larger)
    before = tree(out_dir)
    shipped = str(Path(utils.ROOT) / "model")
    for changes, what in [
        (dict(teacher=other, tokenizer=shipped), "another vocabulary"),
        (dict(teacher=larger), "has another vocabulary (6464 tokens) than the student (6400)"),
        (dict(teacher=teachers.ours, tokenizer=small_tokenizer), "another vocabulary"),
        (dict(teacher=bare), "bare holds no tokenizer.json"),
        (dict(teacher=capped), "cannot be asked about packed rows"),
        (dict(teacher="nowhere/teacher.pth"), "nowhere/teacher.pth does not exist"),
        (dict(teacher="full_sft"), "no full_sft weights"),
        (dict(teacher=tmp_path), "holds no tokenizer.json"),
        (dict(alpha=1.5), "alpha"),
        (dict(temperature=0), "temperature"),
    ]:
        result = train(train_distillation, flags(out_dir, **changes))
        assert result.status == 2 and what in result.err, result.err
        if "alpha" not in changes and "temperature" not in changes:
            assert "Traceback" not in one_error(result)
    assert tree(out_dir) == before
