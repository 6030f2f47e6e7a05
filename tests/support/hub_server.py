"""A Hugging Face Hub in memory, on 127.0.0.1, for the real clients: repositories, LFS, tokens, faults on demand."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from http.client import HTTPException, responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_repo import Repo, answer, refuse

ROLES, OWN = {"hf_write": "write", "hf_read": "read"}, ("user", "team")  # the tokens; namespaces of both of them
CALM = SimpleNamespace(answer=None, cut=False, cut_after=0, delay=0.0, after=False, times=float("inf"))


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
