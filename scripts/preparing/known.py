"""The records kept so far: which of the next ones are there already, equal or nearly so.

中文：已保留的记录：判断后面的记录是否与之相同或几乎相同。
"""

import argparse
import hashlib
import json
from array import array
from pathlib import Path
from typing import IO

from dataset import json_lines
from scripts.preparing import cleaning, mixing
from scripts.preparing.near_duplicates import NearDuplicates
from scripts.preparing.report import shorten
from trainer.command_line import UserError


class Known:
    """A hash of each record, and its place in its file, so that a candidate can be read again and compared exactly.

    A context manager: it reads in the file that is being written, and in those of `--against`.
    """

    def __init__(self, args: argparse.Namespace, out: IO[bytes]):
        """Args: args: unicode, exact, near_threshold (0: off), shingle; out: where kept records are written."""
        self.args, self.out, self.files = args, out, [open(out.name, "rb")]  # closed by __exit__
        self.hashes: set[int] = set()  # 64 bits each: among ten million records a false hit has a chance of 3e-6
        self.places, self.owners = array("Q"), array("H")
        self.foreign, self.foreign_hashes = 0, frozenset()  # of the records of `--against`, which come first
        self.near = NearDuplicates(args.near_threshold, args.shingle, self.read) if args.near_threshold else None

    def __enter__(self) -> "Known":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self.files:
            file.close()

    def clean(self, text: str) -> str:
        return cleaning.clean_text(text, self.args.unicode)

    def read(self, key: int) -> str:
        """The text of an earlier record."""
        self.out.flush()
        file = self.files[self.owners[key]]
        file.seek(self.places[key])
        return "\n".join(map(self.clean, cleaning.texts(json.loads(file.readline()))))

    def find_or_add(self, record: dict, owner: int = 0, place: int | None = None) -> tuple[str | None, dict]:
        """(why it is one too many, what to tell of it), or (None, {}) and it is known from now on.

        Args: owner: its file among `files`; place: of its line there, None for the end of the output.
        """
        line = json.dumps(record, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")
        mark = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big")
        if self.args.exact and mark in self.hashes:
            return "in --against" if mark in self.foreign_hashes else "exact duplicate", {}
        if self.near:
            if similar := self.near.find_or_add(len(self.places), "\n".join(cleaning.texts(record))):
                key, similarity = similar
                told = {"similarity": round(similarity, 3), "like": shorten(self.read(key))}
                if self.owners[key]:
                    return "in --against", told
                return "near duplicate", told | {"line_of_output": key - self.foreign + 1}
            self.places.append(self.out.tell() if place is None else place)
            self.owners.append(owner)
        self.hashes.add(mark)
        return None, {}

    def add_all(self, path: Path) -> None:
        """Makes the records of a file known that are to be kept out of the output; what is no record is passed over."""
        places = mixing.find_places(json_lines.check_file(path), lambda record: None, lambda where, reason: None)
        self.files.append(open(path, "rb"))
        for start, size in zip(places.starts, places.sizes, strict=True):
            self.files[-1].seek(start)
            record = cleaning.map_texts(json.loads(self.files[-1].read(size)), self.clean)
            if any(cleaning.texts(record)):
                self.find_or_add(record, len(self.files) - 1, start)
        if len(self.places) == self.foreign:
            raise UserError(f"--against {path} holds no record with a text or turns.")
        self.foreign, self.foreign_hashes = len(self.places), frozenset(self.hashes)
