"""What a tokenizer is worth: what its entries are spent on, and how many bytes of text go into one token.

中文：分词器报告：词表由哪些词条构成，留出文本上每个 token 平均多少字节。
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from scripts.tokenizing.byte_pairs import token_bytes
from scripts.tokenizing.corpus import HAN, Record, TokenizerError

ODD_TEXTS = (
    "", " ", "\n\n\n", "\r\n\t ", "\x00\x07", "3.14 ½ ① 〇", "naïve Ünïcödé", "𠮷野家 龘", "👩‍👩‍👧‍👦🏳️‍🌈",
    "e\u0301\u200b\ufeff", "\U0010ffff", "<|im_start|>user\n<think>?</think><|im_end|>", "العربية हिन्दी ไทย",
)


def vocabulary_report(tokenizer: Tokenizer) -> str:
    """What the entries are spent on."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    kinds: Counter[str] = Counter()
    for token in tokenizer.get_vocab():
        if token in added:
            kinds["control tokens and tags"] += 1
            continue
        data = token_bytes(token)
        text = data.decode("utf-8", "replace")
        if len(data) == 1:
            kinds["bytes"] += 1
        elif "\ufffd" in text:
            kinds["parts of a character"] += 1
        elif HAN.search(text):
            kinds["Han, one character" if len(text) == 1 else "Han, several characters"] += 1
        elif any(map(str.isalpha, text)):
            kinds["Latin words and parts" if text.isascii() else "other scripts"] += 1
        else:
            kinds["punctuation, blanks, symbols"] += 1
    lines = [f"  {count:6,d}  {kind}" for kind, count in kinds.most_common()]
    return "\n".join([f"vocabulary: {tokenizer.get_vocab_size():,d} entries", *lines])


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
    """Number of tokens of the texts, which must decode back to themselves.

    Raises:
        TokenizerError: a text that does not come back.
    """
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    for text, decoded in zip(texts, tokenizer.decode_batch(ids, skip_special_tokens=False), strict=True):
        if decoded != text:
            raise TokenizerError(f"The tokenizer does not give this text back: {text[:80]!r}.")
    return sum(map(len, ids))


def compression_report(tokenizer: Tokenizer, records: Iterable[Record]) -> str:
    """UTF-8 bytes per token of the records' texts, by language and kind, and by file: more is better.

    Raises:
        TokenizerError: a text that does not decode back to itself.
    """
    n_records = 0
    n_bytes: Counter[str] = Counter()
    n_tokens: Counter[str] = Counter()
    for record in records:
        n_records += 1
        size, tokens = record.n_bytes, count_tokens(tokenizer, record.parts)
        lang, kind = record.group.split("_")
        for key in (f"{lang} {kind}", f"{lang} all", record.file):
            n_bytes[key] += size
            n_tokens[key] += tokens
    count_tokens(tokenizer, ODD_TEXTS)
    if not n_records:
        return "compression: no record is held out to measure it on"
    rows = [f"{lang} {kind}" for lang in ("zh", "en") for kind in ("text", "chat", "all")]
    rows = [key for key in (*rows, *sorted(n_bytes.keys() - rows)) if n_tokens[key]]
    width = max(map(len, rows))
    return "\n".join([
        f"compression on {n_records:,d} held-out records, all of which decode back to themselves",
        f"  {'':{width}} {'bytes':>12} {'tokens':>12} {'bytes/token':>12}",
        *(f"  {key:{width}} {n_bytes[key]:12,d} {n_tokens[key]:12,d} {n_bytes[key] / n_tokens[key]:12.3f}"
          for key in rows),
    ])
