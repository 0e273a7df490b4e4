"""The two hubs, asked alike: which files a repository holds, with sizes and checksums, and where each one lies.

Hugging Face through huggingface_hub; ModelScope through its HTTP API. Both take another endpoint, a mirror.

中文：用同一种方式询问两个平台：仓库里有哪些文件、多大、校验和是什么、下载地址在哪里。
"""

import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

from trainer.command_line import UserError

if TYPE_CHECKING:
    import httpx2

PAGE_FILES = 200  # of ModelScope's listing of a data repository
TIMEOUT_SECONDS = 20


class NoAnswer(UserError):
    """The hub could not be reached."""


@functools.cache
def client() -> "httpx2.Client":
    """Made once: a new one reads the machine's certificates."""
    import httpx2

    return httpx2.Client(timeout=TIMEOUT_SECONDS, follow_redirects=True)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `checksum` is "sha256:…", "git:…" (the SHA-1 of a git blob) or "" where none is given."""

    path: str
    size: int  # bytes
    checksum: str


class HuggingFace:
    """https://huggingface.co or a mirror of it: `--mirror`, else HF_ENDPOINT."""

    name, home, setting = "huggingface", "https://huggingface.co", "HF_ENDPOINT"

    def __init__(self, mirror: str | None, revision: str | None):
        self.endpoint = endpoint_of(self, mirror)
        self.revision = revision or "main"
        self.token = None if self.endpoint == self.home else False  # a login is nothing for somebody else's server

    def files(self, repo: str, kind: str) -> list[RemoteFile]:
        """Raises: NoAnswer; UserError when there is no such repository."""
        import httpx2
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(endpoint=self.endpoint, token=self.token)
        try:
            # Fails at once, where the library would try for half a minute.
            httpx2.head(self.endpoint, timeout=TIMEOUT_SECONDS)
            tree = list(api.list_repo_tree(repo, recursive=True, revision=self.revision, repo_type=kind))
        except HfHubHTTPError as error:
            raise refused(self, repo, error.response.status_code) from error
        except HFValidationError as error:
            raise UserError(f"--repo {repo}: {' '.join(str(error).split())}") from error
        except (httpx2.HTTPError, OSError, ValueError) as error:
            raise no_answer(self, error) from error
        return [
            RemoteFile(f.path, f.size, f"sha256:{f.lfs.sha256}" if f.lfs else f"git:{f.blob_id}")
            for f in tree
            if isinstance(f, RepoFile)
        ]

    def url(self, repo: str, kind: str, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(repo, path, repo_type=kind, revision=self.revision, endpoint=self.endpoint)

    def headers(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers

        return build_hf_headers(token=self.token)


class ModelScope:
    """https://www.modelscope.cn or a mirror of it: `--mirror`, else MODELSCOPE_ENDPOINT."""

    name, home, setting = "modelscope", "https://www.modelscope.cn", "MODELSCOPE_ENDPOINT"

    def __init__(self, mirror: str | None, revision: str | None):
        self.endpoint = endpoint_of(self, mirror)
        self.revision = revision or "master"

    def files(self, repo: str, kind: str) -> list[RemoteFile]:
        """Raises: NoAnswer; UserError when there is no such repository."""
        base = f"{self.endpoint}/api/v1/{kind}s/{repo}/repo/"
        query = {"Revision": self.revision, "Recursive": "True"}
        if kind == "model":
            found = self._ask(repo, f"{base}files?{urlencode(query)}")
        else:  # comes in pages
            found, page = [], 1
            while len(found) == PAGE_FILES * (page - 1):
                query |= {"PageNumber": page, "PageSize": PAGE_FILES}
                found += self._ask(repo, f"{base}tree?{urlencode(query)}")
                page += 1
        sums = [(f, str(f.get("Sha256") or "").lower()) for f in found if f.get("Type") != "tree"]
        return [RemoteFile(str(f["Path"]), int(f["Size"]), f"sha256:{s}" if s else "") for f, s in sums]

    def _ask(self, repo: str, url: str) -> list[dict]:
        import httpx2

        try:
            answer = client().get(url)
            if answer.status_code != 200:
                raise refused(self, repo, answer.status_code)
            return list(answer.json()["Data"]["Files"] or [])
        except UserError:
            raise
        except (httpx2.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
            raise no_answer(self, error) from error

    def url(self, repo: str, kind: str, path: str) -> str:
        return f"{self.endpoint}/api/v1/{kind}s/{repo}/repo?{urlencode({'Revision': self.revision, 'FilePath': path})}"

    def headers(self) -> dict[str, str]:
        return {}


Hub = HuggingFace | ModelScope
HUBS = {hub.name: hub for hub in (HuggingFace, ModelScope)}


def endpoint_of(hub: Hub | type, mirror: str | None) -> str:
    """The address to ask, without a slash at its end.  Raises: UserError when it is none."""
    address = (mirror or os.environ.get(hub.setting) or hub.home).rstrip("/")
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).netloc:
        named = "--mirror" if mirror else hub.setting
        raise UserError(f"{named} is {address!r}; expected an address such as https://hf-mirror.com")
    return address


def refused(hub: Hub, repo: str, status: int) -> UserError:
    reasons = {401: "it is private or not there", 403: "it is not open to you", 404: "there is no such repository"}
    reason = reasons.get(status, f"the server answered {status}; try again later or name another --source")
    where = f"revision {hub.revision} of {repo}" if status == 404 else repo
    return UserError(f"{hub.endpoint} does not give out {where}: {reason}.")


def no_answer(hub: Hub, error: Exception) -> NoAnswer:
    """The one line for whoever has no way to the hub."""
    cause = " ".join(str(error).split())[:160] or type(error).__name__
    others = {
        "huggingface": "--source modelscope, or a mirror: --mirror https://hf-mirror.com",
        "modelscope": "--source huggingface, or another address with --mirror",
    }
    advice = f"Is there a network? If so, try {others[hub.name]} (or the variable {hub.setting})."
    return NoAnswer(f"{hub.endpoint} gives no answer ({cause}). {advice}")
