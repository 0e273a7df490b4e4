"""A trained reward model in use: conversations → scores.

`out/reward_512.pth` of train_reward.py, or any sequence classifier of transformers in a folder. No chat template, no
code of the folder is run beyond what transformers itself ships.

中文：加载奖励模型，为一批对话打分。
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dataset.lm_dataset import encode_conversations
from model.weights import WeightsError, load_model, load_tokenizer, read_about

Conversation = list[dict]
BATCH = 32  # conversations scored at a time


def load_reward_model(path: str | Path, device: torch.device) -> Callable[[list[Conversation]], list[float]]:
    """The function that scores conversations, each ending with an assistant turn.

    Raises: WeightsError when there is no reward model at `path`.
    """
    path = Path(path)
    return load_classifier(path, device) if path.is_dir() else load_ours(path, device)


def load_ours(path: Path, device: torch.device) -> Callable[[list[Conversation]], list[float]]:
    """A file of train_reward.py."""
    model = load_model(path, device)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise WeightsError(f"{path} has no score head: it is no reward model; train one with trainer/train_reward.py.")
    tokenizer = load_tokenizer(read_about(path).get("tokenizer"))

    @torch.inference_mode()
    def score(conversations: list[Conversation]) -> list[float]:
        all_ids, trained = encode_conversations(conversations, tokenizer)
        ends = [int(mask.nonzero()[0][-1]) for mask in trained]  # <|im_end|> of the last answer; a newline follows
        scores = torch.zeros(len(all_ids))
        order = sorted(range(len(all_ids)), key=ends.__getitem__)  # like lengths share a batch
        for start in range(0, len(order), BATCH):
            picked = order[start : start + BATCH]
            width = 1 + max(ends[i] for i in picked)
            ids = torch.zeros(len(picked), width, dtype=torch.long)  # padding on the right: causal, so nobody sees it
            for row, i in enumerate(picked):
                ids[row, : ends[i] + 1] = torch.from_numpy(all_ids[i][: ends[i] + 1])
            hidden = model(ids.to(device), need_logits=False).hidden_states
            last = hidden[torch.arange(len(picked)), torch.tensor([ends[i] for i in picked])]
            scores[picked] = model.score(last)[:, 0].float().cpu()
        return scores.tolist()

    return score


def load_classifier(path: Path, device: torch.device) -> Callable[[list[Conversation]], list[float]]:
    """A transformers folder with a sequence classifier of one label and a chat template."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # the file formats of transformers each bring their own types
        raise WeightsError(f"{path} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    if report["missing_keys"] or model.config.num_labels != 1 or tokenizer.chat_template is None:
        raise WeightsError(
            f"{path} is no reward model: expected a sequence classifier with one label, all its weights and a chat "
            f"template (labels: {model.config.num_labels}, missing: {', '.join(report['missing_keys']) or 'nothing'})."
        )
    model = model.to(device).eval()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id  # it scores the last token that is no padding

    @torch.inference_mode()
    def score(conversations: list[Conversation]) -> list[float]:
        texts = tokenizer.apply_chat_template(conversations, tokenize=False)
        scores = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt", add_special_tokens=False)
            logits = model(**{k: batch[k].to(device) for k in ("input_ids", "attention_mask")}).logits
            scores += logits[:, 0].float().tolist()
        return scores

    return score
