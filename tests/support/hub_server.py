"""A Hugging Face Hub in memory, on 127.0.0.1, for the real clients: repositories, LFS, tokens, faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from http.client import HTTPException, responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

ROLES, OWN = {"hf_write": "write", "hf_read": "read"}, ("user", "team")  # the tokens; namespaces of both of them
LFS, LIMIT = (".safetensors", ".png"), 10_000_000  # the files in LFS: these, and what is larger
CALM = SimpleNamespace(answer=None, cut=False, cut_after=0, delay=0.0, after=False, times=float("inf"))


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


class Handler(BaseHTTPRequestHandler):
    """Reads a request, applies the fault that is due, and sends what the hub answers."""

    protocol_version, wbufsize, disable_nagle_algorithm, log_message = "HTTP/1.1", -1, True, lambda *_: None

    def serve(self):
        fault, length = self.server.due(self.command, self.path), int(self.headers.get("Content-Length", 0))
        time.sleep(fault.delay)
        lost = fault.cut and length and not fault.after  # the request does not arrive
        self.body = self.rfile.read(min(length, fault.cut_after or length) if lost else length)
        own = None if lost or (fault.answer and not fault.after) else self.server.reply(self)
        self.close_connection |= fault.cut
        if lost and fault.cut_after:  # a reset: after a mere close, chance decides what the client sees
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, (1).to_bytes(8, "little"))
            socket.close(self.connection.detach())
        elif not fault.cut or (own and fault.cut_after):
            status, headers, body = fault.answer or own
            self.send_response(status)
            for name, value in (headers | {"Content-Length": len(body)}).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body[: fault.cut_after or None])

    do_GET = do_HEAD = do_POST = do_PUT = serve


class HubServer(ThreadingHTTPServer):
    """The hub of a test, `with HubServer() as hub`. In `requests` are methods and paths with queries, as they came."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url, self.requests = f"http://127.0.0.1:{self.server_port}", []
        self._repos, self._faults, self._lock = {}, [], threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def environment(self, tmp_home: Path, token: str | None = "hf_write") -> dict[str, str]:
        none = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
        return none | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(tmp_home),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def create(self, repo_id: str, kind: str = "model", private: bool = False, gated: bool = False):
        self._repos[kind, repo_id] = Repo(self.url, kind, repo_id, private, gated)  # gated: nobody gets its files

    def put(self, repo_id: str, files: dict[str, bytes], kind: str = "model", revision: str = "main") -> str:
        """One more commit, on a repository and a branch that are made where missing; its hash."""
        with self._lock:
            repo = self._repos.setdefault((kind, repo_id), Repo(self.url, kind, repo_id))
            history = repo.branches.setdefault(revision, repo.history("main"))
            return repo.commit(revision, "put", history[-1].files | files)

    def files(self, repo_id: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        return dict(self._repos[kind, repo_id].history(revision)[-1].files)

    def commits(self, repo_id: str, kind: str = "model", revision: str = "main") -> list[str]:
        return [commit.message for commit in self._repos[kind, repo_id].history(revision)]

    def pull_requests(self, repo_id: str, kind: str = "model") -> list[str]:
        return [name for name in self._repos[kind, repo_id].branches if "refs/pr/" in name]

    def corrupt(self, repo_id: str, path: str, kind: str = "model"):
        self._repos[kind, repo_id].corrupted.add(path)  # a bit of it is served flipped; size and ETag stay

    def fail(
        self,
        pattern: str,
        *,
        method: str | None = None,
        status: int | None = None,
        times: int | None = 1,
        headers: dict | None = None,
        body: bytes | dict = b"",
        cut=False,
        cut_after=0,
        delay=0.0,
        after=False,
    ):
        """The next `times` requests (None: all) like this get a status, a cut or a delay; `after`, with their effect.
        `cut_after`: the bytes before a cut, of the request's body or (without one, or `after`) of the answer's."""
        made = answer(body or {"error": responses[status]}, status, headers) if status else None
        self._faults.append(
            SimpleNamespace(
                pattern=pattern,
                method=method,
                answer=made,
                times=times or float("inf"),
                cut=cut,
                cut_after=cut and cut_after,
                delay=delay,
                after=after,
            )
        )

    def faults_left(self) -> int:
        return sum(fault.times for fault in self._faults if fault.times < float("inf"))

    def reset_faults(self):
        self._faults.clear()

    def due(self, method: str, path: str) -> SimpleNamespace:
        with self._lock:
            self.requests.append((method, path))
            due = (fault for fault in self._faults if fault.times and re.search(fault.pattern, path))
            fault = next((fault for fault in due if fault.method in (None, method)), CALM)
            fault.times -= 1
            return fault

    def reply(self, call: Handler) -> tuple[int, dict, bytes]:
        url, token = urlsplit(call.path), call.headers.get("Authorization", "").removeprefix("Bearer ")
        call.query, call.role = parse_qs(url.query), ROLES.get(token)
        try:
            refuse(token and not call.role, 401, "Invalid credentials in Authorization header")
            with self._lock:
                found = self._serve(call, [unquote(part) for part in url.path.split("/")[1:]])
            refuse(found is None, 404, "Sorry, we can't find the page you are looking for.")
            return found if isinstance(found, tuple) else answer(found)
        except HTTPException as refused:
            return refused.args[0]
        except Exception as error:  # a request that was not understood
            return answer({"error": repr(error)}, 400)

    def _serve(self, call: Handler, parts: list[str]) -> tuple | dict | list | None:
        kind = "dataset" if "datasets" in parts[:2] else "model"
        match [call.command, *(part for part in parts[:2] if part not in ("models", "datasets")), *parts[2:]]:
            case ["GET", "api", "whoami-v2"]:
                refuse(not call.role, 401, "Invalid username or password.")
                return {
                    "type": "user",
                    "name": OWN[0],
                    "orgs": [{"type": "org", "name": OWN[1]}],
                    "auth": {"accessToken": {"role": call.role}},
                }
            case ["POST", "api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            case ["POST", "api", "repos", "create"]:
                return self._create(call.role, **json.loads(call.body))
            case ["GET", "api"]:
                infos = [repo.info() for repo in self._repos.values() if repo.kind == kind and not repo.private]
                return [
                    info
                    for info in infos
                    if set(call.query.get("filter", ())) <= set(info["tags"])
                    and info["author"] in call.query.get("author", [info["author"]])
                ]
            case [_, "api", owner, name, *rest] | [_, owner, name, *rest]:
                return self._open(call, kind, f"{owner}/{name.removesuffix('.git')}", rest).serve(call, rest)

    def _create(self, role, name, organization=None, type="model", private=False, visibility="", **_) -> dict:
        message = f'You don\'t have the rights to create a {type} under the namespace "{organization}"'
        refuse(role != "write" or organization not in (None, *OWN), 403 if role else 401, message)
        repo = Repo(self.url, type, f"{organization or OWN[0]}/{name}", private or visibility == "private")
        known = self._repos.setdefault((type, repo.id), repo) is not repo
        refuse(known, 409, f"You already created this {type} repo: {repo.id}", url=repo.url)
        return {"url": repo.url}

    def _open(self, call: Handler, kind: str, repo_id: str, rest: list[str]) -> Repo:
        repo, own = self._repos.get((kind, repo_id)), repo_id.split("/")[0] in OWN
        writes, proposes = call.command == "POST" and rest[:1] != ["paths-info"], "create_pr" in call.query
        hidden = not repo or (repo.private and not (call.role and own) and call.command != "PUT")  # PUT: signed
        refuse(hidden, 404, "Repository not found", "RepoNotFound")
        refuse(writes and not call.role, 401, "Invalid username or password.", "RepoNotFound")
        refuse(writes and call.role == "read", 403, "you must use a write token to upload to a repository.")
        refuse(writes and not own and not proposes and rest[0] != "info", 403, "Authorization error.")  # info: LFS
        return repo
