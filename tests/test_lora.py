"""LoRA: the adapter against its formula and the peft library; merging, switching, files, and what does not fit."""

import copy
import json

import pytest
import torch

from model.model_lora import (
    TARGETS,
    LoraConfig,
    LoraLinear,
    add_lora,
    load_lora,
    lora_layers,
    lora_state_dict,
    merge_lora,
    save_lora,
    save_peft,
    set_adapter,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import WeightsError, load_model

V = 61
RANK_3 = LoraConfig(rank=3)


def tiny(**fields) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=V)
    return MiniMindForCausalLM(MiniMindConfig(**{**sizes, "initializer_range": 0.2, **fields})).eval()


def with_adapter(model, config=RANK_3, name="default", seed=1):
    """An adapter that does something: B starts at zero."""
    add_lora(model, config, name)
    generator = torch.Generator().manual_seed(seed)
    for tensor in lora_state_dict(model, name).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def ids():
    return torch.arange(24).view(2, 12) * 7 % V


def test_a_new_adapter_changes_nothing_and_trains_nothing_else():
    model = tiny()
    before, names = model(ids()).logits, set(model.state_dict())
    weights = {name: p for name, p in model.named_parameters()}
    add_lora(model, LoraConfig())
    assert torch.equal(model(ids()).logits, before)
    assert names < set(model.state_dict())  # the names of the base stay
    for name, p in model.named_parameters():
        assert p.requires_grad == (".adapters." in name), name
        if name in weights:
            assert p is weights[name]  # shared, not copied
    assert {path.rpartition(".")[2] for path in lora_layers(model)} == set(TARGETS)
    model(ids(), labels=ids()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_forward_is_the_formula_in_float64():
    model = tiny()
    layer = with_adapter(model, LoraConfig(rank=3, alpha=6.0)).model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32)
    A, B = (lora_state_dict(model)[f"model.layers.0.self_attn.q_proj.lora.{part}.weight"].double() for part in "AB")
    expected = x.double() @ (layer.weight.double() + 6 / 3 * B @ A).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moe", [False, True])
def test_merged_equals_unmerged(moe):
    model = with_adapter(tiny(use_moe=moe))
    plain, adapted = tiny(use_moe=moe)(ids()).logits, model(ids()).logits
    assert (adapted - plain).abs().max() > 0.1
    merged = merge_lora(copy.deepcopy(model))
    torch.testing.assert_close(merged(ids()).logits, adapted, rtol=1e-4, atol=1e-4)
    assert not lora_layers(merged) and set(merged.state_dict()) == set(tiny(use_moe=moe).state_dict())
    torch.testing.assert_close(model(ids()).logits, adapted, rtol=0, atol=0)  # the original stays as it was


def test_grouped_experts_take_the_adapter_along():
    layer = with_adapter(tiny(use_moe=True)).model.layers[0].mlp
    x, chosen, weights = torch.randn(6, 32), torch.tensor([[0, 1], [2, 3]] * 3), torch.full((6, 2), 0.5)
    expected = layer.routed_plain(x, chosen, weights)
    merged = merge_lora(copy.deepcopy(layer))
    torch.testing.assert_close(merged.routed_plain(x, chosen, weights), expected, rtol=1e-4, atol=1e-4)
    try:
        found = layer.routed_grouped(x, chosen, weights)
    except RuntimeError as error:
        pytest.skip(f"no grouped products here: {error}")
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_several_adapters_are_switched():
    model = with_adapter(with_adapter(tiny(), name="tea"), LoraConfig(rank=2, target_modules=("o_proj",)), "cat", 2)
    cat = model(ids()).logits
    set_adapter(model, "tea")
    tea = model(ids()).logits
    set_adapter(model, None)
    torch.testing.assert_close(model(ids()).logits, tiny()(ids()).logits, rtol=0, atol=0)
    set_adapter(model, "cat")
    assert torch.equal(model(ids()).logits, cat) and not torch.allclose(cat, tea)
    with pytest.raises(ValueError, match="no LoRA 'dog'; it has cat, tea"):
        set_adapter(model, "dog")


def test_dropout_only_in_training():
    model = with_adapter(tiny(), LoraConfig(rank=3, dropout=0.5))
    assert torch.equal(model(ids()).logits, model(ids()).logits)
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


def test_the_file_brings_back_the_adapter(tmp_path):
    config = LoraConfig(rank=3, alpha=5.0, target_modules=("q_proj", "down_proj"))
    model = with_adapter(tiny(), config)
    path = tmp_path / "lora" / "tea_32.pth"
    save_lora(model, path, config, extra={"stage": "lora"})
    state = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert state["model.layers.1.mlp.down_proj.lora.B.weight"].shape == (32, 3)
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["stage"] == "lora"
    fresh = tiny()
    assert load_lora(fresh, path) == config
    torch.testing.assert_close(fresh(ids()).logits, model(ids()).logits, rtol=5e-2, atol=2e-2)  # float16 in between
    path.with_suffix(".json").unlink()  # as published ones come: alpha is the rank
    bare = load_lora(tiny(), path)
    assert (bare.rank, bare.alpha, bare.target_modules) == (3, 3.0, ("down_proj", "q_proj"))


def test_peft_computes_the_same_from_our_folder_and_we_from_its(tmp_path):
    import peft  # heavy: only where it is the oracle
    config = LoraConfig(rank=3, alpha=5.0)
    model = with_adapter(tiny(), config)
    save_peft(model, tmp_path / "ours", config)
    theirs = peft.PeftModel.from_pretrained(tiny(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)
    back = tiny()
    assert load_lora(back, tmp_path / "ours") == LoraConfig(3, 5.0, 0.0, tuple(sorted(TARGETS)))
    torch.testing.assert_close(back(ids()).logits, model(ids()).logits, rtol=0, atol=0)

    made = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, lora_alpha=7, target_modules=["k_proj", "up_proj"])).eval()
    for name, p in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    made.save_pretrained(tmp_path / "theirs")
    read = tiny()
    assert load_lora(read, tmp_path / "theirs").rank == 2
    torch.testing.assert_close(read(ids()).logits, made(ids()).logits, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(tmp_path):
    config = LoraConfig(rank=3)
    path = tmp_path / "tea_32.pth"
    save_lora(with_adapter(tiny(), config), path, config)
    for other, reason in ((tiny(hidden_size=64), "does not fit"), (tiny(num_hidden_layers=1), "does not have"),
                          (tiny(num_hidden_layers=3), "lacks"), (tiny(use_moe=True), "does not have")):  # fmt: skip
        with pytest.raises(WeightsError, match=reason):
            load_lora(other, path)
        assert not lora_layers(other)
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    for lora, reason in (({**about["lora"], "rank": 4}, "rank 4"), ({"rank": 3}, "damaged"),
                         ({**about["lora"], "target_modules": ["lm_head"]}, "damaged")):  # fmt: skip
        path.with_suffix(".json").write_text(json.dumps({**about, "lora": lora}), encoding="utf-8")
        with pytest.raises(WeightsError, match=reason):
            load_lora(tiny(), path)
    about["lora"]["target_modules"] = ["q_proj"]
    path.with_suffix(".json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(WeightsError, match="also holds"):
        load_lora(tiny(), path)
    with pytest.raises(WeightsError, match="no whole peft adapter"):
        load_lora(tiny(), tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        load_lora(tiny(), tmp_path / "no.pth")
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"target_modules": ()}, {"target_modules": ("x",)}):
        with pytest.raises(ValueError, match="LoRA"):
            LoraConfig(**bad)
    with pytest.raises(ValueError, match="letters"):
        add_lora(tiny(), config, "a.b")
    assert isinstance(with_adapter(tiny()).model.layers[0].mlp.up_proj, LoraLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_takes_the_type_of_its_model(dtype, tmp_path):
    path = tmp_path / "tea_32.pth"
    save_lora(with_adapter(tiny()), path, RANK_3)
    model = tiny().to(dtype)
    for _ in range(2):  # the second takes the place of the first
        load_lora(model, path)
    logits = model(ids()).logits
    assert logits.dtype is dtype
    torch.testing.assert_close(logits.float(), with_adapter(tiny())(ids()).logits, rtol=0.1, atol=0.3)
    with pytest.raises(WeightsError, match="is a LoRA adapter"):
        load_model(path)
