"""A repository of the tests' Hub: its commits, and the answers below its address."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from http.client import HTTPException
from types import SimpleNamespace
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from tests.support.hub_server import Handler

LFS, LIMIT = (".safetensors", ".png"), 10_000_000  # the files in LFS: these, and what is larger


def answer(value, status: int = 200, headers: dict | None = None) -> tuple[int, dict, bytes]:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return status, {"Content-Type": "application/json"} | (headers or {}), body


def refuse(when, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
    """Ends a request with an error; clients choose their exception by the code."""
    if when:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        raise HTTPException(answer({"error": message} | body, status, headers))


def describe(path: str, data: bytes) -> dict:
    """A file as the API gives it; `oid` is git's, which for LFS is the one of the pointer."""
    entry = {"type": "file", "path": path, "rfilename": path, "size": len(data)}
    if path.endswith(LFS) or len(data) > LIMIT:
        sha256 = hashlib.sha256(data).hexdigest()
        data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": entry["size"], "pointerSize": len(data)}
    return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


class Repo:
    """One model or dataset: the commits of each branch and each pull request, oldest first."""

    def __init__(self, url: str, kind: str, repo_id: str, private: bool = False, gated: bool = False):
        self.kind, self.id, self.private, self.gated = kind, repo_id, private, gated
        self.url = f"{url}/{'datasets/' * (kind == 'dataset')}{repo_id}"
        self.branches, self.objects, self.corrupted = {"main": []}, {}, set()  # `objects`: contents by sha256
        self.commit("main", "initial commit", {".gitattributes": b"*.png filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(str(time.time_ns()).encode()).hexdigest()
        self.branches[branch].append(SimpleNamespace(sha=sha, message=message, files=files))
        self.objects |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        return sha

    def history(self, revision: str) -> list[SimpleNamespace]:  # a branch, a pull request or a full hash
        for name, commits in self.branches.items():
            ends = {commit.sha: number for number, commit in enumerate(commits, 1)} | {name: len(commits)}
            if revision in ends:
                return commits[: ends[revision]]
        refuse(True, 404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def tree(self, revision: str) -> dict[str, dict]:
        commit, entries = self.history(revision)[-1], {}
        for path, data in sorted(commit.files.items()):
            for folder in (path[: slash.start()] for slash in re.finditer("/", path)):
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": commit.sha}
            entries[path] = describe(path, data)
        return entries

    def info(self, revision: str = "main") -> dict:
        commit = self.history(revision)[-1]
        card = commit.files.get("README.md", b"").decode(errors="replace").partition("\n---")[0]
        return {
            "id": self.id,
            "author": self.id.split("/")[0],
            "sha": commit.sha,
            "private": self.private,
            "tags": re.findall(r"^(?: *- |library_name: |pipeline_tag: )([\w.:/-]+)$", card, re.M),
            "gated": self.gated,
            "siblings": [describe(*file) for file in commit.files.items()],
        }

    def serve(self, call: Handler, rest: list[str]) -> tuple | dict | list | None:
        """What lies below the repository's address, in the API and elsewhere."""
        match [call.command, *rest]:
            case ["GET"] | ["GET", "revision", _]:
                return self.info(*rest[1:])
            case ["GET", "refs"]:
                refs = [
                    {
                        "name": name,
                        "ref": name if "refs/" in name else f"refs/heads/{name}",
                        "targetCommit": commits[-1].sha,
                    }
                    for name, commits in self.branches.items()
                ]
                groups = {"branches": "heads", "pullRequests": "pr", "converts": "convert", "tags": "tags"}
                return {group: [ref for ref in refs if part in ref["ref"].split("/")] for group, part in groups.items()}
            case ["GET", "tree", revision, *path]:
                start, deep = "".join(f"{part}/" for part in path), call.query.get("recursive") == ["true"]
                found = [
                    entry
                    for name, entry in self.tree(revision).items()
                    if name.startswith(start) and (deep or "/" not in name[len(start) :])
                ]
                refuse(path and not found, 404, f"{start} does not exist", "EntryNotFound")
                return found
            case ["GET" | "HEAD", "resolve", revision, *path]:
                return self.resolve(call, revision, "/".join(path))
            case ["POST", "paths-info", revision]:
                asked = [path.strip("/") for path in parse_qs(call.body.decode()).get("paths", [])]
                return [entry for path, entry in self.tree(revision).items() if path in asked]
            case ["POST", "branch", name]:
                refuse(name in self.branches, 409, f"Reference already exists: {name}")
                self.branches[name] = self.history(json.loads(call.body).get("startingPoint", "main"))
                return {}
            case ["POST", "preupload", revision]:
                known = {path: entry.get("lfs", entry)["oid"] for path, entry in self.tree(revision).items()}
                files = [(file["path"], file["size"]) for file in json.loads(call.body)["files"]]
                return {
                    "files": [
                        {
                            "path": path,
                            "uploadMode": "lfs" if path.endswith(LFS) or size > LIMIT else "regular",
                            "oid": known.get(path),
                            "shouldIgnore": False,
                        }
                        for path, size in files
                    ]
                }
            case ["POST", "info", "lfs", "objects", "batch"]:
                objects = json.loads(call.body)["objects"]
                for entry in objects:
                    if entry["oid"] not in self.objects:  # otherwise the client need not send it
                        entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
                return {"transfer": "basic", "objects": objects}
            case ["PUT", "lfs", oid]:
                refuse(hashlib.sha256(call.body).hexdigest() != oid, 400, "The content has another SHA-256")
                self.objects[oid] = call.body
                return {}
            case ["POST", "commit", revision]:
                return self.receive(revision, [json.loads(line) for line in call.body.splitlines()], call.query)

    def receive(self, revision: str, lines: list[dict], query: dict) -> dict:
        """A client's commit: all of its lines or, where one is refused, none."""
        header, parent = lines[0]["value"], self.history(revision)[-1]
        refuse(not parent.sha.startswith(header.get("parentCommit", "")), 412, "A commit has happened since.")
        files = dict(parent.files)
        for key, value, path in ((line["key"], line["value"], line["value"]["path"]) for line in lines[1:]):
            gone = [name for name in files if f"{name}/".startswith(f"{path.rstrip('/')}/")]
            if key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":  # an oid that was not uploaded is a KeyError, a bad request
                files[path] = self.objects[value["oid"]]
            else:
                refuse(not gone, 404, f"{key} {path}: A file with this name doesn't exist", "EntryNotFound")
                files = {name: data for name, data in files.items() if name not in gone}
        if "create_pr" in query:
            revision = f"refs/pr/{sum('refs/pr/' in name for name in self.branches) + 1}"
            self.branches[revision] = self.history(parent.sha)
        sha = self.commit(revision, header["summary"], files)
        return {
            "commitOid": sha,
            "commitUrl": f"{self.url}/commit/{sha}",
            "pullRequestUrl": revision.replace("refs/pr/", f"{self.url}/discussions/"),
        }

    def resolve(self, call: Handler, revision: str, path: str) -> tuple[int, dict, bytes]:
        """A file, or the range of its bytes that is asked for."""
        refuse(self.gated, 403 if call.role else 401, f"Access to {self.kind} {self.id} is restricted.", "GatedRepo")
        commit = self.history(revision)[-1]
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        refuse(path not in commit.files, 404, "Entry not found", "EntryNotFound", headers)
        data, entry = commit.files[path], describe(path, commit.files[path])
        headers["ETag"] = f'"{entry.get("lfs", entry)["oid"]}"'
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": len(data)} if "lfs" in entry else {}
        data = data[:-1] + bytes(last ^ (path in self.corrupted) for last in data[-1:])
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))):
            return answer(data, 200, headers)
        first, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        return answer(data[first:end], 206, headers | {"Content-Range": f"bytes {first}-{end - 1}/{len(data)}"})
