"""Files and folders of a conversion: read what is there, write what is new whole or not at all.

中文：转换所用的文件与文件夹：读取已有权重，原子地写出新文件夹。
"""

import contextlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from model.files import replace_file
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.weights import ROOT, WeightsError, load_model, load_tokenizer, read_about, read_state_dict
from scripts.converting.stock_architectures import from_stock, read_stock_config
from scripts.converting.verify import BadExport
from trainer.command_line import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
REMOTE_CODE = ROOT / "model" / "model_minimind.py"
# What a conversion writes, beside *.safetensors and *.gguf. A folder that holds anything else is never replaced.
WRITTEN = {
    "config.json", "generation_config.json", "adapter_config.json", "README.md", "Modelfile", REMOTE_CODE.name,
    *TOKENIZER_FILES,
}  # fmt: skip
AUTO_MAP = {"AutoConfig": "model_minimind.MiniMindConfig", "AutoModelForCausalLM": "model_minimind.MiniMindForCausalLM"}


@dataclass
class Source:
    """A model as it came: in float32 and evaluation mode, its tokenizer, and the type its numbers were stored in."""

    model: MiniMindForCausalLM
    tokenizer: PreTrainedTokenizerFast
    dtype: torch.dtype
    name: str
    stage: str | None

    @property
    def config(self) -> MiniMindConfig:
        return self.model.config

    def about(self) -> dict[str, str]:
        """What the JSON beside a weight file keeps of it: stage, and the tokenizer where it is not the shipped one."""
        about = {"stage": self.stage} if self.stage else {}
        shipped, mine = load_tokenizer(), self.tokenizer
        if (mine.chat_template, mine.get_vocab()) != (shipped.chat_template, shipped.get_vocab()):
            about["tokenizer"] = str(Path(mine.name_or_path).resolve())
        return about


@contextlib.contextmanager
def new_place(target: Path, overwrite: bool, keep: tuple[Path, ...] = ()) -> Iterator[Path]:
    """An empty temporary folder beside `target`. When the block ends without an error, it takes the target's name.

    For a target with a suffix (`x.pth`) its files are moved beside each other instead. An error leaves what was there
    before as it was.

    Args: keep, what must not be replaced: the sources.
    Raises: UserError when the target is taken, OSError when it cannot be written, BadExport as the block does.
    """
    target = Path(os.path.abspath(target))  # without "..", which is no name to put something beside
    single = target.suffix == ".pth"
    taken = target.exists() and (single or not target.is_dir() or any(target.iterdir()))
    if taken and not overwrite:
        raise UserError(f"{target} exists already; name another --to, or replace it with --overwrite.")
    for source in keep:
        if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
            raise UserError(f"--to {target} is or holds the source {source}; name another place.")
    if taken and not single and (foreign := what_no_conversion_wrote(target)):
        raise UserError(f"--overwrite leaves {target} alone: no conversion wrote {foreign}. Name another --to.")
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        for path in part.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:  # on disk before it has its name
                    os.fsync(file.fileno())
        if single:
            for path in sorted(part.iterdir()):  # the JSON before the weights
                replace_file(path, target.with_name(path.name))
        else:
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            if target.exists():
                replace_file(target, old)
            try:
                replace_file(part, target)
            except OSError:
                if old.exists():
                    replace_file(old, target)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except BadExport as error:
        raise BadExport(f"{error} Nothing was written.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def what_no_conversion_wrote(target: Path) -> str | None:
    """The name of something that a conversion did not put there; None for a folder that may be replaced."""
    if not target.is_dir():
        return target.name
    names = sorted(p.name for p in target.iterdir() if p.is_dir() or p.suffix not in (".safetensors", ".gguf"))
    return next((name for name in names if name not in WRITTEN), None)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a transformers folder, whole or in shards. Nothing in it is executed.  Raises: WeightsError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    try:
        for file in files:
            state |= load_file(file)
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{file} is damaged or cut off ({error}). Copy it again.") from error
    for file in sorted(folder.glob("pytorch_model*.bin")) if not files else ():
        state |= read_state_dict(file)
    if not state:
        raise WeightsError(f"{folder} holds no *.safetensors and no pytorch_model*.bin.")
    return state


def usual_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """The type of most tensors."""
    return Counter(tensor.dtype for tensor in state.values()).most_common(1)[0][0]


def read_config_from(path: Path) -> MiniMindConfig:
    """A configuration from a config.json, the JSON beside a weight file, a weight file with one, or a folder.

    Raises: WeightsError, UserError.
    """
    if path.is_dir():
        path = path / "config.json"
    elif path.suffix != ".json":
        path = path.with_suffix(".json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields = fields.get("config", fields)
        if "hidden_size" not in fields:
            raise ValueError("hidden_size is missing")
        return MiniMindConfig(**fields)
    except OSError as error:
        raise UserError(f"--config_from: {path} cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"--config_from: {path} holds no configuration of ours ({error}).") from error


def build_model(config: MiniMindConfig, state: dict[str, Tensor], where: Path) -> MiniMindForCausalLM:
    """A float32 model in evaluation mode. Every name must match.  Raises: WeightsError."""
    state = dict(state)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        head = state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        if not torch.equal(head, state["model.embed_tokens.weight"]):  # loaded, one would silently replace the other
            raise WeightsError(f"{where}: lm_head and embedding differ, but the configuration ties them.")
    model = MiniMindForCausalLM(config)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{where} does not fit its configuration: {reason}.") from error
    return model.float().eval()


def open_source(path: Path, tokenizer: Path | None = None, config_from: Path | None = None) -> Source:
    """Reads a `.pth` file, a MiniMind folder, or a folder of one of the stock architectures.

    Raises: WeightsError, UserError when it is missing, damaged or cannot be ours.
    """
    about = {} if path.is_dir() else read_about(path)
    if path.is_dir():
        kind, state = model_type(path), read_tensors(path)
        if kind == MiniMindConfig.model_type:
            config = read_config_from(config_from or path)
        elif config_from:
            raise UserError(f"--config_from: {path} tells its own sizes; leave the flag out.")
        else:
            config, state = from_stock(read_stock_config(path), state)
        model = build_model(config, state, path)
    else:
        state = read_state_dict(path)
        model = build_model(read_config_from(config_from), state, path) if config_from else load_model(path)
    if hasattr(model, "score"):
        raise UserError(f"{path} is a reward model; what is exported here writes text.")
    own = path if (path / "tokenizer.json").is_file() else None
    loaded = load_tokenizer(tokenizer or about.get("tokenizer") or own)
    if len(loaded) > model.config.vocab_size:
        raise UserError(
            f"The tokenizer has {len(loaded)} entries, but {path} was trained with {model.config.vocab_size}: "
            "name the tokenizer it was trained with, --tokenizer FOLDER."
        )
    name = re.sub(r"[^\w.-]", "_", path.resolve().name if path.is_dir() else path.stem)
    stage = about.get("stage")
    stage = stage if isinstance(stage, str) and re.fullmatch(r"[\w-]+", stage) else None
    return Source(model, loaded, usual_dtype(state), name, stage)


def model_type(folder: Path) -> str | None:
    """What its config.json says.  Raises: WeightsError when there is none, or it is damaged."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except OSError as error:
        raise WeightsError(
            f"{folder} holds no config.json; expected a transformers model folder or a .pth file."
        ) from error
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{folder}/config.json is damaged ({error}).") from error


def rounded(model: MiniMindForCausalLM, dtype: torch.dtype) -> MiniMindForCausalLM:
    """The model with its weights as `dtype` stores them, in float32.  Raises: UserError when one is too large."""
    config = MiniMindConfig(**model.config.to_diff_dict())
    copy = build_model(config, {name: t.to(dtype).float() for name, t in model.state_dict().items()}, Path("the model"))
    if not all(p.isfinite().all() for p in copy.parameters()):
        raise UserError(
            f"some weights do not fit {str(dtype).removeprefix('torch.')}: try --dtype bfloat16 or float32."
        )
    return copy


def write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def write_folder(
    folder: Path, fields: dict, state: dict[str, Tensor], dtype: torch.dtype, source: Source, remote_code: bool
) -> None:
    """A transformers folder: weights, configuration, tokenizer, generation settings, and our module as remote code.

    Args: fields, of config.json; state by the names of the file.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in state.items()}
    # Not save_file: it makes a file that only its owner can read.
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    fields = {**fields, "dtype": str(dtype).removeprefix("torch.")}
    if remote_code:
        fields |= {"architectures": ["MiniMindForCausalLM"], "auto_map": AUTO_MAP}
        shutil.copyfile(REMOTE_CODE, folder / REMOTE_CODE.name)
    write_json(folder / "config.json", fields)
    write_tokenizer(folder, source.tokenizer)
    generation_config(source.config).save_pretrained(folder)


def generation_config(config: PretrainedConfig) -> GenerationConfig:
    """What `generate` does unless told otherwise: the sampling of eval_model.py."""
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**ids, do_sample=True, temperature=0.85, top_p=0.85, top_k=0)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokenizer's files as they are, under the class name that every version of transformers knows."""
    origin = Path(tokenizer.name_or_path)
    for name in TOKENIZER_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if fields.get("tokenizer_class") != "PreTrainedTokenizerFast":
        write_json(file, {**fields, "tokenizer_class": "PreTrainedTokenizerFast"})
