"""A hub on this machine, which answers over HTTP what huggingface_hub asks: repositories, commits, large files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from unittest.mock import patch

LARGE = ".safetensors"
"""How the names of files end that go by LFS."""

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Commits of repositories, as people have pushed them.

    ``commits``: (repository, branch) -> commits, the last one last, each its number and its files. ``asked``: what was
    asked for, in order. ``refuses``: large files.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: dict[str, bool] = {}
        self.commits: dict[tuple[str, str], list[tuple[str, Files]]] = {}
        self.large: Files = {}
        self.asked: list[str] = []
        self.refuses = False
        self.address = f"http://127.0.0.1:{self.server_port}"

    def found(self, name: str, revision: str) -> tuple[str, Files] | None:
        """The commit that a branch or the number of a commit means."""
        branch = self.commits.get((name, revision))
        every = (one for (owner, _), ones in self.commits.items() if owner == name for one in ones)
        return branch[-1] if branch else next((one for one in every if one[0] == revision), None)


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match.groups()
            commit = self.server.found(name, revision.replace("%2F", "/"))
            if commit is None or file not in commit[1]:
                known = name in self.server.repositories
                what = "Entry" if commit else ("Revision" if known else "Repo")
                return self.answer(404 if known else 401, X_Error_Code=f"{what}NotFound", X_Error_Message="no")
            content = commit[1][file]
            tag = hashlib.sha256(content).hexdigest()
            return self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=commit[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+).*", path):
            name, what, revision = match.groups()
            commit = self.server.found(name, revision.replace("%2F", "/"))
            if commit is None:
                code = "RevisionNotFound" if name in self.server.repositories else "RepoNotFound"
                return self.answer(404, X_Error_Code=code, X_Error_Message="no")
            entries = [{"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                       for file, content in commit[1].items()]  # fmt: skip
            if what == "tree":
                return self.answer(200, entries)
            siblings = [{"rfilename": one["path"]} for one in entries]
            return self.answer(200, {"id": name, "sha": commit[0], "siblings": siblings})
        return self.answer(404)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self.body()
        number = self.path.rpartition("/")[2]
        right = not self.server.refuses and hashlib.sha256(content).hexdigest() == number
        if right:
            self.server.large[number] = content
        self.answer(200 if right else 400)

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.body()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            if name in self.server.repositories:
                return self.answer(409, {"url": f"{self.server.address}/{name}"}, X_Error_Message="it exists")
            self.server.repositories[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.server.commits[name, "main"] = [(hashlib.sha1(name.encode()).hexdigest(), {})]
            return self.answer(200, {"url": f"{self.server.address}/{name}", "id": name, "name": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.path):
            name, branch = match.groups()
            self.server.commits[name, branch] = self.server.commits[name, "main"][-1:]
            return self.answer(200)
        if self.path == "/api/validate-yaml":  # the head of a card
            head = json.loads(body)["content"].split("---\n")[1]
            wrong = [] if "library_name: dcafy" in head else [{"message": "no library"}]
            return self.answer(400 if wrong else 200, {"errors": wrong, "warnings": []})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/[^/]+", self.path):
            rows = [{"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                     "shouldIgnore": False} for one in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": rows})
        if self.path.endswith("/info/lfs/objects/batch"):
            rows = [{**one, "actions": {"upload": {"href": f"{self.server.address}/put/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]]  # fmt: skip
            return self.answer(200, {"transfer": "basic", "objects": rows}, Content_Type="application/vnd.git-lfs+json")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self.path):
            return self.commit(*match.groups(), [json.loads(line) for line in body.splitlines()])
        return self.answer(404)

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> None:
        branch = self.server.commits.get((name, revision.replace("%2F", "/")))
        if branch is None:
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="no")
        files = dict(branch[-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        number = hashlib.sha1(repr((len(branch), sorted(files.items()))).encode()).hexdigest()
        branch.append((number, files))
        url = f"{self.server.address}/{name}/commit/{number}"
        return self.answer(200, {"success": True, "commitOid": number, "commitUrl": url, "hookOutput": ""})


@contextmanager
def hub_here(cache: str) -> Iterator[Hub]:
    """A hub that huggingface_hub asks in the place of the real one, with a cache of its own."""
    from huggingface_hub import constants

    served = Hub()
    thread = Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    own = {
        "ENDPOINT": served.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": served.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    try:
        with patch.multiple(constants, **own), patch.dict("os.environ", HF_TOKEN="hf_of_nobody"):
            yield served
    finally:
        served.shutdown()
        served.server_close()
        thread.join()
