"""get_data against a server on this machine that speaks what Hugging Face and ModelScope speak."""

import hashlib
import http.server
import json
import re
import socket
import threading
import urllib.parse
from pathlib import Path

import pytest

from scripts import get_data
from scripts.fetching import catalogue, hubs, transfer
from trainer.command_line import UserError, run_script

DATA = b"".join(b'{"text": "line %d"}\n' % i for i in range(40_000))  # some 800 KB
FILES = {
    "pretrain_hq.jsonl": DATA,
    "dpo.jsonl": b'{"chosen": [], "rejected": []}\n',
    "README.md": b"card\n",
}
FOLDER = {"config.json": b"{}", "model.safetensors": b"weights" * 9, "model_minimind.py": b"raise SystemExit('run')"}


class Hub(http.server.ThreadingHTTPServer):
    """Both hubs at one address. `cut` bytes are sent of a file before the connection breaks, `cuts` times."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {
            "datasets/{}/minimind_dataset": dict(FILES),
            "models/{}/MiniMind2-Small": dict(FOLDER),
            "datasets/someone/data": {"sub/train.jsonl": b"{}\n", "run.py": b"1"},
        }
        self.asked, self.cut, self.cuts, self.ranges = [], 0, 0, True
        self.sizes, self.sums, self.page_size = {}, {}, None
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the tests."""

    def files(self, kind_and_repo):
        for owner in catalogue.OWNERS.values():
            kind_and_repo = kind_and_repo.replace(f"/{owner}/", "/{}/")
        return self.repos.get(kind_and_repo)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):  # noqa: N802
        self.send_error(405)

    def do_GET(self):  # noqa: N802
        hub, address = self.server, urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        hub.asked.append((address.path, {k.title(): v for k, v in self.headers.items()}))
        if found := re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)/tree/main", address.path):
            return self.tree(hub.files("/".join(found.groups())), modelscope=False)
        if found := re.fullmatch(r"/api/v1/(datasets|models)/([^/]+/[^/]+)/repo/(tree|files)", address.path):
            assert (found[3] == "tree") == (found[1] == "datasets") and query["Revision"] == "master"
            return self.tree(hub.files(f"{found[1]}/{found[2]}"), modelscope=True, page=int(query.get("PageNumber", 1)))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/main/(.+)", address.path):  # to another place
            self.send_response(302)
            self.send_header("Location", f"/cdn/{(found[1] or 'models/')}{found[2]}//{found[3]}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if found := re.fullmatch(r"/cdn/([^/]+/[^/]+/[^/]+)//(.+)", address.path):
            return self.send_file(hub.files(found[1])[urllib.parse.unquote(found[2])])
        if found := re.fullmatch(r"/api/v1/((?:datasets|models)/[^/]+/[^/]+)/repo", address.path):
            return self.send_file(hub.files(found[1])[query["FilePath"]])
        self.send_error(404)

    def tree(self, files, modelscope, page=1):
        if files is None:
            return self.send_error(404)
        out = []
        for path, content in files.items():
            size = self.server.sizes.get(path, len(content))
            sha = self.server.sums.get(path, hashlib.sha256(content).hexdigest())
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if modelscope:
                out.append({"Path": path, "Size": size, "Type": "blob", "Sha256": sha})
            elif path.endswith((".jsonl", ".safetensors")):
                lfs = {"oid": sha, "size": size, "pointerSize": 130}
                out.append({"type": "file", "path": path, "size": size, "oid": "0" * 40, "lfs": lfs})
            else:
                out.append({"type": "file", "path": path, "size": size, "oid": self.server.sums.get(path, git)})
        if modelscope:
            out.append({"Path": "folder", "Size": 0, "Type": "tree", "Sha256": ""})
            per_page = self.server.page_size or len(out)
            out = {"Code": 200, "Data": {"Files": out[per_page * (page - 1) : per_page * page]}}
        else:
            out.append({"type": "directory", "path": "folder", "oid": "0" * 40, "size": 0})
        body = json.dumps(out).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, content):
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.server.cuts > 0:
            self.server.cuts -= 1
            self.wfile.write(content[start : start + self.server.cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(content[start:])


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["huggingface", "modelscope"])
def source(request):
    return request.param


def run(capsys, *flags):
    """(status, stdout, stderr) of the script."""
    try:
        run_script(lambda: get_data.main(list(map(str, flags))))
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def files_asked(hub):
    """The Range of every request for a file's content."""
    return [h.get("Range") for path, h in hub.asked if path.startswith("/cdn/") or path.endswith("/repo")]


def test_files_arrive_whole_from_both_hubs(hub, source, tmp_path, capsys):
    flags = ("pretrain_hq.jsonl", "dpo.jsonl", "--source", source, "--mirror", hub.address, "--to", tmp_path)
    status, out, err = run(capsys, *flags)
    assert (status, err) == (0, "")
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == DATA
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dpo.jsonl", "pretrain_hq.jsonl"]
    assert out.count("its checksum is right") == 2 and "Licence" in out
    before = len(files_asked(hub))
    status, out, err = run(capsys, *flags)
    assert status == 0 and out.count("is there already, its checksum is right") == 2
    assert len(files_asked(hub)) == before  # nothing is downloaded twice


def test_an_interrupted_transfer_goes_on_within_a_run(hub, source, tmp_path, capsys):
    hub.cut, hub.cuts = 100_000, 3
    status, _, _ = run(
        capsys, "pretrain_hq.jsonl", "--source", source, "--mirror", hub.address, "--to", tmp_path
    )  # fmt: skip
    assert status == 0 and (tmp_path / "pretrain_hq.jsonl").read_bytes() == DATA
    assert files_asked(hub) == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]


def test_an_interrupted_transfer_goes_on_in_the_next_run(hub, source, tmp_path, capsys):
    flags = ("pretrain_hq.jsonl", "--source", source, "--mirror", hub.address, "--to", tmp_path)
    part = tmp_path / "pretrain_hq.jsonl.part"
    part.write_bytes(DATA[:300_000])
    hub.cut, hub.cuts = 0, 99  # nothing more comes
    status, _, err = run(capsys, *flags)
    assert status == 2 and "300,000 of 908,890 bytes" in err and err.count("\n") == 1
    assert len(files_asked(hub)) == transfer.TRIES
    assert part.read_bytes() == DATA[:300_000] and not (tmp_path / "pretrain_hq.jsonl").exists()
    hub.cuts, hub.asked = 0, []
    assert run(capsys, *flags)[0] == 0
    assert files_asked(hub) == ["bytes=300000-"]
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == DATA and not part.exists()


def test_a_server_that_ignores_ranges_sends_all_of_it(hub, source, tmp_path, capsys):
    (tmp_path / "pretrain_hq.jsonl.part").write_bytes(DATA[:300_000])
    hub.ranges = False
    assert run(capsys, "pretrain_hq.jsonl", "--source", source, "--mirror", hub.address, "--to", tmp_path)[0] == 0
    assert (tmp_path / "pretrain_hq.jsonl").read_bytes() == DATA


def test_a_wrong_checksum_is_refused_and_the_part_removed(hub, source, tmp_path, capsys):
    hub.sums["pretrain_hq.jsonl"] = "0" * 64
    flags = ("--source", source, "--mirror", hub.address, "--to", tmp_path)
    status, _, err = run(capsys, "pretrain_hq.jsonl", *flags)
    assert status == 2 and hashlib.sha256(DATA).hexdigest() in err and "0" * 64 in err and err.count("\n") == 1
    assert not list(tmp_path.glob("pretrain_hq.jsonl*.part")) and not (tmp_path / "pretrain_hq.jsonl").exists()
    # the user's own word counts
    assert run(capsys, "pretrain_hq.jsonl", *flags, "--sha256", hashlib.sha256(DATA).hexdigest())[0] == 0
    assert run(capsys, "dpo.jsonl", *flags, "--sha256", "1" * 64)[0] == 2


def test_more_than_was_announced_is_refused(hub, source, tmp_path, capsys):
    hub.sizes["pretrain_hq.jsonl"] = 1000
    flags = ("pretrain_hq.jsonl", "--source", source, "--mirror", hub.address, "--to", tmp_path)
    assert run(capsys, *flags)[0] == 2 and not list(tmp_path.iterdir())


def test_small_files_are_checked_by_their_git_hash(hub, tmp_path, capsys):
    hub.sums["config.json"] = "1" * 40
    flags = ("MiniMind2-Small", "--source", "huggingface", "--mirror", hub.address, "--to", tmp_path)
    status, _, err = run(capsys, *flags)
    assert status == 2 and "git:" + "1" * 40 in err
    del hub.sums["config.json"]
    assert run(capsys, *flags)[0] == 0


def test_a_folder_comes_without_its_code(hub, source, tmp_path, capsys):
    status, out, _ = run(capsys, "MiniMind2-Small", "--source", source, "--mirror", hub.address, "--to", tmp_path)
    assert status == 0 and "left out of" in out and "model_minimind.py" in out
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        name: FOLDER[name] for name in ("config.json", "model.safetensors")
    }


def test_another_repository(hub, source, tmp_path, capsys):
    flags = ("--repo", "someone/data", "--source", source, "--mirror", hub.address, "--to", tmp_path)
    assert run(capsys, *flags, "sub/train.jsonl")[0] == 0
    assert (tmp_path / "sub" / "train.jsonl").read_bytes() == b"{}\n" and not (tmp_path / "run.py").exists()
    status, _, err = run(capsys, *flags, "missing.jsonl")
    assert status == 2 and "holds no missing.jsonl; it holds sub/train.jsonl. Older" in err


def test_what_is_not_there_is_said_with_what_is(hub, source, tmp_path, capsys):
    flags = ("--source", source, "--mirror", hub.address, "--to", tmp_path)
    status, _, err = run(capsys, "sft_512.jsonl", *flags)
    assert status == 2 and "holds no sft_512.jsonl; it holds README.md, dpo.jsonl, pretrain_hq.jsonl. Older" in err
    status, _, err = run(capsys, "MiniMind2", *flags)
    assert status == 2 and "no such repository" in err and err.count("\n") == 1
    status, _, err = run(capsys, "nonsense.jsonl", *flags)
    assert status == 2 and "pretrain_t2t_mini.jsonl" in err and not list(tmp_path.iterdir())


def test_a_listing_in_pages_is_read_to_its_end(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hubs, "PAGE_FILES", 2)
    hub.page_size = 2
    flags = ("README.md", "--repo", "gongjy/minimind_dataset", "--source", "modelscope", "--mirror", hub.address)
    assert run(capsys, *flags, "--to", tmp_path)[0] == 0
    assert (tmp_path / "README.md").read_bytes() == b"card\n"


def test_a_full_disk_is_seen_before_anything_is_downloaded(hub, source, tmp_path, capsys):
    hub.sizes["pretrain_hq.jsonl"] = 10**16
    flags = ("pretrain_hq.jsonl", "--source", source, "--mirror", hub.address, "--to", tmp_path)
    status, _, err = run(capsys, *flags)
    assert status == 2 and "10,000,000.0 GB are to come" in err and "--to" in err and err.count("\n") == 1
    assert not files_asked(hub)


def test_what_is_there_already_of_a_part_needs_no_room(tmp_path):
    target, file = tmp_path / "a", hubs.RemoteFile("a", 10**16, "")
    with open(transfer.part_of(target), "wb") as f:
        f.write(b"x" * 1000)
    with pytest.raises(UserError, match="to come"):
        transfer.check_room(tmp_path, [(file, target)])
    transfer.check_room(tmp_path, [(hubs.RemoteFile("a", 2000, ""), target)])


@pytest.mark.parametrize("setting", ["flag", "variable"])
def test_no_network_is_one_line(source, setting, tmp_path, capsys, monkeypatch):
    address, flags = closed_port(), ["dpo.jsonl", "--source", source, "--to", tmp_path]
    if setting == "flag":
        flags += ["--mirror", address]
    else:
        monkeypatch.setenv(hubs.HUBS[source].setting, address)
    status, out, err = run(capsys, *flags)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith(f"error: {address} gives no answer") and "--mirror" in err
    assert f"--source {'modelscope' if source == 'huggingface' else 'huggingface'}" in err
    assert not list(tmp_path.iterdir())


def test_the_mirror_may_stand_in_the_environment(hub, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(hubs.HUBS[source].setting, hub.address + "/")
    assert run(capsys, "dpo.jsonl", "--source", source, "--to", tmp_path)[0] == 0
    assert (tmp_path / "dpo.jsonl").read_bytes() == FILES["dpo.jsonl"]
    status, _, err = run(capsys, "dpo.jsonl", "--source", source, "--mirror", "hf-mirror.com", "--to", tmp_path)
    assert status == 2 and "expected an address such as https://" in err


def test_auto_goes_to_the_hub_that_answers(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hubs.HuggingFace, "home", closed_port())
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.address)
    status, out, err = run(capsys, "dpo.jsonl", "--to", tmp_path)
    assert (status, err) == (0, "") and "trying https://www.modelscope.cn" in out and hub.address in out
    assert all("/api/v1/" in path for path, _ in hub.asked)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", closed_port())
    status, _, err = run(capsys, "pretrain_hq.jsonl", "--to", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "hf-mirror.com" in err


def test_a_login_is_not_sent_to_a_mirror(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run(capsys, "dpo.jsonl", "--source", "huggingface", "--mirror", hub.address, "--to", tmp_path)[0] == 0
    assert hub.asked and not any("secret" in str(headers) for _, headers in hub.asked)


def test_another_file_of_that_name_is_left_alone(hub, source, tmp_path, capsys):
    mine = tmp_path / "dpo.jsonl"
    mine.write_text("mine")
    flags = ("dpo.jsonl", "--source", source, "--mirror", hub.address, "--to", tmp_path)
    status, _, err = run(capsys, *flags)
    assert status == 2 and "--overwrite" in err and mine.read_text() == "mine"
    assert run(capsys, *flags, "--overwrite")[0] == 0 and mine.read_bytes() == FILES["dpo.jsonl"]


@pytest.mark.parametrize(
    "path", ["../evil.jsonl", "/etc/evil.jsonl", "C:/evil.jsonl", "a\\..\\..\\evil.jsonl", "a/../../b"]
)
def test_a_server_cannot_write_outside_the_folder(hub, source, tmp_path, capsys, path):
    hub.repos["models/{}/MiniMind2-Small"] = {"config.json": b"{}", path + ".json": b"evil"}
    inside = tmp_path / "inside"
    status, _, err = run(capsys, "MiniMind2-Small", "--source", source, "--mirror", hub.address, "--to", inside)
    assert status == 2 and "no plain path" in err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.parametrize("path", ["", "nul", "aux.json", "a/CON.txt", "a.", "a ", "a:b", "a\nb", ".."])
def test_names_that_windows_takes_for_something_else(tmp_path, path):
    with pytest.raises(UserError, match="no plain path"):
        transfer.place(tmp_path, path)
    assert transfer.place(tmp_path, "a/.b/con-c.json") == tmp_path / "a" / ".b" / "con-c.json"


def test_two_at_once_do_not_write_one_file(hub, tmp_path, capsys):
    from filelock import FileLock

    with FileLock(str(tmp_path / "dpo.jsonl.part.lock")):
        status, _, err = run(
            capsys, "dpo.jsonl", "--source", "modelscope", "--mirror", hub.address, "--to", tmp_path
        )  # fmt: skip
    assert status == 2 and "another process" in err


def test_without_a_name_everything_is_listed(capsys):
    status, out, _ = run(capsys)
    assert status == 0 and all(name in out for name in [*catalogue.DATA, *catalogue.FOLDERS])


def test_names_go_where_the_trainers_and_the_chat_look(source):
    args = get_data.parse_args(["pretrain_hq.jsonl", "full_sft_512.pth", "MiniMind2"])
    root = Path(get_data.__file__).resolve().parents[1]
    found = get_data.wishes(args, source)
    assert [w.folder for w in found] == [root / "dataset", root / "out", root / "MiniMind2"]
    assert {w.repo.split("/")[0] for w in found} == {catalogue.OWNERS[source]}
    assert set(catalogue.DATA) >= {"pretrain_hq.jsonl", "sft_mini_512.jsonl", "rlaif-mini.jsonl", "sft_t2t_mini.jsonl"}
