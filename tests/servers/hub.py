"""A hub small enough for tests: models, commits (uploads by LFS, copies, also from other models), ranges.

``signed`` lets it answer for large files as the real one does: with a redirect to another host, whose address carries
a signature. With ``cas`` large files go through Xet: the genuine client stores their chunks in that directory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tests.servers.http import Reply, Request, Server

SIGNATURE = "X-Amz-Signature=5ecre7"


@dataclass(frozen=True)
class File:
    """A file of a commit: in LFS if ``lfs``. Large ones are a path, read when they are asked for."""

    content: bytes | Path
    lfs: bool
    sha: str

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    @property
    def blob(self) -> str:
        """The id in git. Of a large file: that of the pointer to it, here of its hash."""
        if self.lfs:
            return hashlib.sha1(self.sha.encode()).hexdigest()
        assert isinstance(self.content, bytes)
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha if self.lfs else self.blob

    def read(self, start: int, end: int) -> bytes:
        if isinstance(self.content, bytes):
            return self.content[start:end]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(end - start)


def make_file(content: bytes | Path, lfs: bool) -> File:
    """With its hash; of a path only its name is hashed, as it may be gigabytes."""
    raw = content if isinstance(content, bytes) else str(content).encode()
    return File(content, lfs, hashlib.sha256(raw).hexdigest())


class Cas:
    """A directory in which the client of Xet keeps chunks, in place of its server. A client names files by a hash of
    its own; the commit says their SHA-256 only, so somebody has to tell what else a file is called: :meth:`know`."""

    def __init__(self, folder: Path) -> None:
        self.url = f"local://{folder}"
        self._folder = folder
        self._names: dict[str, tuple[str, int]] = {}

    @property
    def size(self) -> int:
        """Bytes of all chunks that were sent."""
        return sum(p.stat().st_size for p in self._folder.glob("xet/xorbs/xorbs/*") if p.suffix != ".tagset")

    def know(self, path: Path) -> None:
        """The names of a file, from its bytes. They are not stored."""
        import hf_xet

        (found,) = hf_xet.hash_files([str(path)])
        self._names[_sha256(path)] = (found.hash, path.stat().st_size)

    def name(self, sha: str) -> str:
        return self._names[sha][0]

    def file(self, sha: str) -> File:
        """A file, put together from the chunks that were sent."""
        import hf_xet

        target = self._folder / sha
        with hf_xet.XetSession().new_file_download_group(endpoint=self.url) as group:
            group.start_download_file(hf_xet.XetFileInfo(*self._names[sha]), str(target))
        assert _sha256(target) == sha
        return File(target, True, sha)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(8 << 20):
            digest.update(data)
    return digest.hexdigest()


@dataclass
class Commit:
    """All files of a model at one moment, and the branch that it stands on."""

    id: str
    files: dict[str, File]
    branch: str = "main"


@dataclass
class HubStub(Server):
    """The state of the hub. ``gated`` are models that need the token ``token``."""

    signed: bool = False
    copies: bool = True  # whether it copies files from one model to another
    cdn: Server | None = None
    cas: Cas | None = None
    token: str = "hf_secret"
    gated: set[str] = field(default_factory=set)
    models: dict[str, list[Commit]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Server.__init__(self)

    def add(self, name: str, directory: Path, large: int = 1 << 30) -> str:
        """A model with the files of ``directory``; those beyond ``large`` bytes stay on disk. The id of its commit."""
        files = {}
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            content = path if path.stat().st_size > large else path.read_bytes()
            files[str(path.relative_to(directory))] = make_file(content, path.suffix == ".safetensors")
        return self.commit(name, files)

    def commit(self, name: str, files: dict[str, File], branch: str = "main") -> str:
        """A new commit with these files and no others; its id."""
        commits = self.models.setdefault(name, [])
        listed = json.dumps([name, branch, len(commits), {path: file.sha for path, file in files.items()}])
        commits.append(Commit(hashlib.sha1(listed.encode()).hexdigest(), files, branch))
        return commits[-1].id

    def at(self, name: str, revision: str) -> Commit | None:
        found = (c for c in reversed(self.models.get(name, [])) if revision in (c.id, c.branch))
        return next(found, None)

    def tree(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """Every file with its bytes."""
        commit = self.at(name, revision)
        return {} if commit is None else {p: f.read(0, f.size) for p, f in sorted(commit.files.items())}

    # --- answers

    def answer(self, request: Request) -> Reply:
        routes: Mapping[str, Callable[..., Reply]] = {
            r"/api/repos/create": self._create,
            r"/api/whoami-v2": lambda _: _json({"name": "me", "type": "user", "orgs": [], "auth": {}}),
            r"/api/validate-yaml": lambda _: _json({"errors": [], "warnings": []}),
            r"/blob/(\w+)": self._upload,
            r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch": self._batch,
            r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)": self._resolve,
            r"/api/models/([\w.-]+/[\w.-]+)/lfs-files/duplicate": self._duplicate,
            r"/api/models/([\w.-]+/[\w.-]+)/xet-(?:read|write)-token/.+": self._xet_token,
            r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit|paths-info|tree)/([^/]+).*": self._change,
            r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([^/]+))?": self._info,
        }
        for pattern, action in routes.items():
            if found := re.fullmatch(pattern, request.path):
                name = found.group(1) if found.groups() else ""
                if name in self.gated and request.headers.get("authorization") != f"Bearer {self.token}":
                    return Reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
                return action(request, *found.groups())
        return Reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _info(self, request: Request, name: str, revision: str | None) -> Reply:
        if name not in self.models:
            return Reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.at(name, revision or "main")
        if commit is None:
            return Reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [
            {"rfilename": path, "size": file.size, "blobId": file.blob, **_lfs(file)}
            for path, file in commit.files.items()
        ]
        return _json({"id": name, "modelId": name, "sha": commit.id, "siblings": siblings, "tags": []})

    def _resolve(self, request: Request, name: str, revision: str, path: str) -> Reply:
        commit = self.at(name, revision)
        if commit is None or path not in commit.files:
            return Reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        file = commit.files[path]
        etag = f'"{file.etag}"'
        headers = {"X-Repo-Commit": commit.id, "X-Linked-Etag": etag, "X-Linked-Size": str(file.size), "ETag": etag}
        if self.cas is not None and file.lfs:
            headers["X-Xet-Hash"] = self.cas.name(file.sha)
            headers["X-Xet-Refresh-Route"] = f"{self.url}/api/models/{name}/xet-read-token/{commit.id}"
        if self.signed and file.lfs and self.cdn is not None:
            location = f"{self.cdn.url}/{name}/{commit.id}/{path}?{SIGNATURE}"
            return Reply(302, b"", {**headers, "Location": location})
        return ranged(file, request, headers)

    def _create(self, request: Request) -> Reply:
        value = json.loads(request.body)
        name = f"{value.get('organization') or 'me'}/{value['name']}"
        if name in self.models:
            return Reply(409, json.dumps({"error": "exists", "url": f"{self.url}/{name}"}).encode())
        self.commit(name, {".gitattributes": make_file(b"*.safetensors filter=lfs\n", False)})
        return _json({"url": f"{self.url}/{name}", "id": name})

    def _upload(self, request: Request, sha: str) -> Reply:
        if hashlib.sha256(request.body).hexdigest() != sha:
            return Reply(400)
        self.blobs[sha] = request.body
        return Reply()

    def _batch(self, request: Request, name: str) -> Reply:
        objects = []
        for each in json.loads(request.body)["objects"]:
            href = {"actions": {"upload": {"href": f"{self.url}/blob/{each['oid']}"}}}
            objects.append({**each, **({} if each["oid"] in self.blobs else href)})
        return _json({"transfer": "basic" if self.cas is None else "xet", "objects": objects})

    def _xet_token(self, request: Request, name: str) -> Reply:
        assert self.cas is not None
        names = {"X-Xet-Cas-Url": self.cas.url, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": "4000000000"}
        body = {"casUrl": self.cas.url, "accessToken": "x", "exp": 4000000000}
        return Reply(200, json.dumps(body).encode(), {"Content-Type": "application/json", **names})

    def _duplicate(self, request: Request, name: str) -> Reply:
        if not self.copies:
            return Reply(400, b'{"error": "another region"}')
        wanted = json.loads(request.body)["files"]
        mine = {file.sha: file for commit in self.models[name] for file in commit.files.values()}
        for each in wanted:
            self.blobs[each["sha256"]] = mine[each["sha256"]].read(0, mine[each["sha256"]].size)
        return _json({"success": wanted, "failed": []})

    def _change(self, request: Request, name: str, what: str, revision: str) -> Reply:
        commit = self.at(name, revision)
        if commit is None:
            return Reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if what == "tree":
            return _json([_entry(path, file) for path, file in commit.files.items()])
        if what == "paths-info":
            raw = request.body
            wanted = json.loads(raw)["paths"] if raw[:1] == b"{" else parse_qs(raw.decode())["paths"]
            return _json([_entry(path, commit.files[path]) for path in wanted if path in commit.files])
        if what == "preupload":
            files = [_preupload(each["path"], commit) for each in json.loads(request.body)["files"]]
            return _json({"files": files})
        return self._commit(request, name, commit)

    def _commit(self, request: Request, name: str, base: Commit) -> Reply:
        files = dict(base.files)
        for line in map(json.loads, request.body.splitlines()):
            value: dict[str, Any] = line["value"]
            if line["key"] == "header" and value.get("parentCommit", base.id) != base.id:
                return Reply(412, b'{"error": "A commit has happened since."}')
            if line["key"] == "file":
                files[value["path"]] = make_file(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if self.cas is not None:
                    files[value["path"]] = self.cas.file(value["oid"])
                    continue
                if value["oid"] not in self.blobs:
                    return Reply(400, b'{"error": "not uploaded"}')
                files[value["path"]] = make_file(self.blobs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif line["key"] == "copyFile":
                source = self.at(value.get("srcRepo", name), value.get("srcRevision") or "main")
                assert source is not None
                files[value["path"]] = source.files[value["srcPath"]]
        pull = "create_pr=1" in request.query
        number = 1 + len({c.branch for c in self.models[name]} - {"main"})
        branch = f"refs/pr/{number}" if pull else base.branch
        id_ = self.commit(name, files, branch)
        url = f"{self.url}/{name}"
        extra = {"pullRequestUrl": f"{url}/discussions/{number}"} if pull else {}
        return _json({"commitOid": id_, "commitUrl": f"{url}/commit/{id_}", "hookOutput": "", **extra})


class Cdn(Server):
    """The host that the hub redirects to: it serves ranges to whoever has the signature."""

    def __init__(self, hub: HubStub) -> None:
        super().__init__()
        self._hub = hub

    def answer(self, request: Request) -> Reply:
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/(\w{40})/(.+)", request.path)
        if found is None or request.query != SIGNATURE:
            return Reply(403)
        commit = self._hub.at(found[1], found[2])
        return Reply(404) if commit is None else ranged(commit.files[found[3]], request, {})


def ranged(file: File, request: Request, headers: Mapping[str, str]) -> Reply:
    """The bytes that were asked for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if request.method == "HEAD":
        return Reply(200, b"", {**headers, "Content-Length": str(file.size)})
    if found is None:
        return Reply(200, file.read(0, file.size), dict(headers))
    start, end = int(found[1]), min(int(found[2] or file.size - 1) + 1, file.size)
    return Reply(206, file.read(start, end), {**headers, "Content-Range": f"bytes {start}-{end - 1}/{file.size}"})


def _json(value: Any) -> Reply:
    return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _lfs(file: File) -> dict[str, Any]:
    return {"lfs": {"sha256": file.sha, "size": file.size, "pointerSize": 130}} if file.lfs else {}


def _entry(path: str, file: File) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.sha, "size": file.size, "pointerSize": 130}, "xetHash": file.sha} if file.lfs else {}
    return {"type": "file", "path": path, "oid": file.blob, "size": file.size, **lfs}


def _preupload(path: str, commit: Commit) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    old = commit.files.get(path)
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": old.blob if old else None}
