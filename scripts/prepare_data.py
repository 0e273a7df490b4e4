"""Data of your own for the trainers: converted, cleaned, mixed. Each command writes JSON Lines and a report beside it.

    python scripts/prepare_data.py convert alpaca.json --to sft.jsonl            # the format is found out
    python scripts/prepare_data.py convert train.parquet --columns text=content --to text.jsonl
    python scripts/prepare_data.py convert notes/ pages/ --split paragraph --to text.jsonl     # .txt, .md, .html
    python scripts/prepare_data.py clean text.jsonl --languages zh en --to clean.jsonl
    python scripts/prepare_data.py clean sft.jsonl --against test.jsonl --to train.jsonl       # nothing of the test
    python scripts/prepare_data.py mix clean.jsonl books.jsonl --weights 3 1 --to mixed.jsonl

Files are read piece by piece and written whole or not at all. A bad record stops the command with file, line and
reason; --skip_bad_records counts it and goes on. Exit status: 0, or 2 when nothing was written.

中文：准备自己的数据：转换格式、清洗去重、按比例混合；输出 JSON Lines，并在旁边写出报告。
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from dataset import json_lines, record_formats
from dataset.check_data import guess_stage
from dataset.json_lines import DataError
from model.files import atomic_open
from scripts.preparing import cleaning, formats, mixing, reading
from scripts.preparing.known import Known
from scripts.preparing.report import Report
from trainer.command_line import BoolFlag, UserError, check_writable, number, run_script

PARSERS = {
    "pretrain": record_formats.parse_text,
    "sft": record_formats.parse_sft,
    "reason": record_formats.parse_reason,
    "dpo": record_formats.parse_dpo,
    "rl": record_formats.parse_rl,
}
FORMATS = ("text", "alpaca", "sharegpt", "openai", "preference")
MIN_CHARS = {"pretrain": 20}  # other stages: 1


def watch(desc: str, **options) -> tqdm:
    return tqdm(desc=desc, leave=False, disable=not sys.stderr.isatty(), **options)


def check_output(args: argparse.Namespace, sources: list[Path]) -> None:
    """Raises: UserError when the output is a source, stands there already or cannot be written."""
    if args.to.resolve() in [source.resolve() for source in sources]:
        raise UserError(f"--to {args.to} is a source; name another file.")
    if args.to.is_dir():
        raise UserError(f"--to {args.to} is a folder; expected a file, for example {args.to / 'data.jsonl'}.")
    if args.to.exists() and not args.overwrite:
        raise UserError(f"{args.to} exists already; name another --to, or replace it with --overwrite.")
    check_writable(args.to.absolute().parent, "--to")


def bad_record(report: Report, skip: bool) -> Callable[[str, str], None]:
    """What is done with a bad record, given its place and the reason.  Raises: DataError unless it is to be skipped."""

    def told(where: str, reason: str) -> None:
        if not skip:
            raise DataError(f"{where}: {reason}. --skip_bad_records goes on without such records.")
        kind = re.sub(r"\d+", "N", re.split(r"[;(]", reason)[0])[:80].strip()
        report.leave_out(f"bad: {kind}", where, reason)

    return told


def finish(report: Report, to: Path) -> None:
    print(report.table())
    print(f"{to} is ready, the report is {report.write(to)}")


def write_record(out: IO[bytes], record: dict) -> None:
    out.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")


# --- convert ----------------------------------------------------------------------------------------------------------


def convert(args: argparse.Namespace) -> None:
    """Raises: DataError, UserError, OSError."""
    files = reading.find_files(args.inputs)
    check_output(args, files)
    report, kind = Report(args), None
    bad = bad_record(report, args.skip_bad_records)
    options = reading.Options(args.columns, args.split, args.encoding)
    with atomic_open(args.to) as out, watch("converting", unit=" records") as bar:
        for path in files:
            before, report.bytes = report.written, report.bytes + path.stat().st_size
            for where, record in converted(path, options, args.format, report, bad):
                keys = sorted(record.keys() - {"answer"})
                if keys != (kind := kind or keys):
                    raise DataError(
                        f"{where} becomes a record with {' and '.join(keys)}, earlier ones have {' and '.join(kind)}; "
                        "a file holds one kind: convert them one by one."
                    )
                write_record(out, record)
                report.keep(record)
                bar.update()
            report.sources[str(path)] = {"written": report.written - before}
        if not report.written:
            raise DataError(f"nothing to write: {report.read:,} records were read and none was good.")
    if len(report.sources) > 20:  # a folder of texts
        report.sources = {}
    finish(report, args.to)


def converted(path: Path, options: reading.Options, name: str, report: Report, bad: Callable) -> Iterator:
    """(place, record in our format) of the good records of one file."""
    found = None if name == "auto" else name
    for raw in reading.read_any(path, options):
        report.read += 1
        if raw.record is None:
            bad(raw.where, raw.reason)
            continue
        found = found or formats.find_format(raw.record)
        if found is None:
            keys = ", ".join(map(str, list(raw.record)[:12]))
            raise UserError(
                f"{raw.where}: no format has these keys: {keys}. Name it with --format {{{','.join(FORMATS)}}}, or say "
                "which column is which: --columns text=body, --columns instruction=title output=reply"
            )
        try:
            yield raw.where, formats.convert(raw.record, found)
        except ValueError as error:
            bad(raw.where, str(error))


# --- clean ------------------------------------------------------------------------------------------------------------


def clean(args: argparse.Namespace) -> None:
    """Raises: DataError, UserError, OSError."""
    check_output(args, [*args.inputs, *args.against])
    stage = args.stage or guess_stage(json_lines.check_file(args.inputs[0]))
    if stage not in PARSERS:
        raise UserError(f"{args.inputs[0]} looks like {stage}; clean takes {', '.join(PARSERS)} (--stage).")
    args.stage = stage
    if args.min_chars is None:
        args.min_chars = MIN_CHARS.get(stage, 1)
    report = Report(args, args.examples)
    with atomic_open(args.to) as out, Known(args, out) as known:
        for path in args.against:
            known.add_all(path)
        for path in args.inputs:
            clean_file(path, PARSERS[stage], args, report, known, out)
        if not report.written:
            raise DataError(f"nothing is left of {report.read:,} records: {dict(report.left_out.most_common(4))}.")
    finish(report, args.to)


def clean_file(path: Path, parse: Callable, args, report: Report, known: Known, out: IO[bytes]) -> None:
    bad, before = bad_record(report, args.skip_bad_records), (report.read, report.written)
    with watch("cleaning", total=path.stat().st_size, unit="B", unit_scale=True) as bar:
        for line, raw in json_lines.read_lines(json_lines.check_file(path)):
            where = f"{path} line {line}"
            report.read += 1
            report.bytes += len(raw) + 1
            bar.update(len(raw) + 1)
            try:
                record = json_lines.parse_line(raw)
                parse(record)
            except ValueError as error:
                bad(where, str(error))
                continue
            cleaned = cleaning.map_texts(record, lambda text: cleaning.clean_text(text, args.unicode))
            parts = list(cleaning.texts(cleaned))
            reason, more = cleaning.unwanted(parts, args), {}
            if reason is None and cleaned != record:
                try:
                    parse(cleaned)
                except ValueError:  # a turn that was blank, two answers that differed in blanks
                    reason = "nothing left"
            if reason is None:
                reason, more = known.find_or_add(cleaned)
            if reason:
                report.leave_out(reason, where, "\n".join(parts), **more)
                continue
            report.changed += cleaned != record
            write_record(out, cleaned)
            report.keep(cleaned)
    report.sources[str(path)] = {"read": report.read - before[0], "written": report.written - before[1]}


# --- mix --------------------------------------------------------------------------------------------------------------


def mix(args: argparse.Namespace) -> None:
    """Raises: DataError, UserError, OSError."""
    check_output(args, args.inputs)
    weights = args.weights or [1.0] * len(args.inputs)
    if len(weights) != len(args.inputs):
        raise UserError(f"{len(weights)} --weights for {len(args.inputs)} files; give one for each, in their order.")
    report = Report(args)
    bad, sources, stage = bad_record(report, args.skip_bad_records), [], args.stage
    for path in args.inputs:
        own = args.stage or guess_stage(json_lines.check_file(path))
        if own != (stage := stage or own):
            raise DataError(
                f"{path} looks like {own}, {args.inputs[0]} like {stage}; mix what is of one kind (--stage)."
            )
        with watch("reading", unit=" records") as bar:
            sources.append(mixing.find_places(path, PARSERS[own], bad, bar.update))
        report.read += len(sources[-1].starts)
        report.bytes += path.stat().st_size
    report.read += sum(report.left_out.values())
    counts = mixing.share_out(sources, weights, args.records, args.by)
    owners, records = mixing.draw_order([len(s.starts) for s in sources], counts, args.seed)
    sizes = [0] * len(sources)
    files = [open(path, "rb") for path in args.inputs]  # noqa: SIM115
    try:
        with atomic_open(args.to) as out, watch("writing", total=len(owners), unit=" records") as bar:
            for owner, record in zip(owners.tolist(), records.tolist(), strict=True):
                files[owner].seek(sources[owner].starts[record])
                line = files[owner].read(sources[owner].sizes[record])
                out.write(line + b"\n")
                sizes[owner] += len(line)
                report.keep(json.loads(line))
                bar.update()
    finally:
        for file in files:
            file.close()
    for source, count, size in zip(sources, counts, sizes, strict=True):
        report.sources[str(source.path)] = {
            "records": count,
            "of": len(source.starts),
            "percent of records": round(100 * count / len(owners), 2),
            "percent of bytes": round(100 * size / max(sum(sizes), 1), 2),
        }
    finish(report, args.to)


# --- Command line -----------------------------------------------------------------------------------------------------


def column(text: str) -> tuple[str, str]:
    ours, _, theirs = text.partition("=")
    if not ours or not theirs:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected OURS=THEIRS, for example text=content")
    return ours, theirs


def encoding(text: str) -> str:
    try:
        b"".decode(text)
    except LookupError:
        raise argparse.ArgumentTypeError(f"{text!r} is no encoding; expected for example utf-8, gb18030") from None
    return text


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prepare data. Defaults stand in brackets.", allow_abbrev=False)
    commands = parser.add_subparsers(title="what to do", dest="command", metavar="COMMAND")

    def command(name: str, run: Callable, text: str, inputs: str) -> Callable:
        about = f"{text}. Defaults stand in brackets."
        sub = commands.add_parser(name, help=text, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        add = sub.add_argument
        add("inputs", nargs="+", type=Path, metavar="FILE", help=inputs)
        add("--to", type=Path, required=True, metavar="FILE", help="the JSON Lines file to write")
        add("--skip_bad_records", action=BoolFlag, default=False, help="count bad records and go on (off)")
        add("--overwrite", action=BoolFlag, default=False, help="replace what is there (off)")
        return add

    what = "JSON Lines, a JSON array, Parquet, .txt, .md, .html, or folders of them"
    add = command("convert", convert, "Other formats to ours", what)
    add("--format", choices=["auto", *FORMATS], default="auto", help="what the records are (auto: by their keys)")
    like = "for example text=content, or instruction=question output=reply"
    add("--columns", nargs="+", type=column, default=[], metavar="OURS=THEIRS", help=f"other names of keys, {like}")
    add(
        "--split",
        choices=["file", "paragraph"],
        default="file",
        help="one record per text file, or per paragraph (file)",
    )
    add("--encoding", type=encoding, default="utf-8", help="of text files, for example gb18030 (utf-8)")

    add = command("clean", clean, "Clean texts, leave out what is no use, and duplicates", "JSON Lines in our format")
    add("--stage", choices=list(PARSERS), help="what the records are for (by their keys)")
    add("--unicode", choices=["NFC", "NFKC", "none"], default="NFC",
        help="normal form; NFKC also makes ，of full width a comma (NFC)")  # fmt: skip
    add("--min_chars", type=number(int, 0), help="shorter records are left out (20 for pretraining texts, else 1)")
    add("--max_chars", type=number(int, 0), default=0, help="longer ones too, 0: any length (0)")
    add(
        "--max_symbols", type=number(float, 0, most=1), default=0.5, help="largest share of punctuation and signs (0.5)"
    )
    add("--max_repeated", type=number(float, 0, most=1), default=0.3,
        help="largest share of characters in lines that stood there before (0.3)")  # fmt: skip
    add("--languages", nargs="+", choices=list(cleaning.LANGUAGES), help="which to keep; en is Latin script (all)")
    add("--exact", action=BoolFlag, default=True, help="leave out records that equal an earlier one (on)")
    add("--near_threshold", type=number(float, 0, most=1), default=0.8,
        help="Jaccard similarity from which a record is a near duplicate of an earlier one, 0: off (0.8)")  # fmt: skip
    add("--shingle", type=number(int, 1), default=5, help="characters per piece that is compared (5)")
    add("--against", nargs="+", type=Path, default=[], metavar="FILE",
        help="files of test data: what nearly equals a record of theirs is left out")  # fmt: skip
    add("--examples", type=number(int, 0), default=3, help="left-out records shown in the report, per reason (3)")

    add = command("mix", mix, "Several files in given shares, shuffled", "JSON Lines in our format")
    add("--stage", choices=list(PARSERS), help="what the records are for (by their keys)")
    add("--weights", nargs="+", type=number(float, 0, excluded=True), help="one per file, any scale (equal)")
    add("--by", choices=["records", "bytes"], default="records", help="what the weights are shares of (records)")
    add("--records", type=number(int, 1), help="length of the mixture (as long as no record is needed twice)")
    add("--seed", type=number(int, 0), default=0, help="of choice and order (0)")
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        parser.exit()
    if args.command == "clean" and args.against and not args.near_threshold:
        parser.error("--against compares by --near_threshold, which is 0 (off)")
    if args.command == "convert":
        args.columns = dict(args.columns)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_script(main)
