"""A read-only web page of the night (chart, table, the run in progress), and the same as an API.

    uv run -m lab dashboard                              this tree and its worktrees, http://127.0.0.1:8000
    uv run -m lab dashboard --tree ../a --tree ../b      these trees
    AUTORESEARCH_TOKEN=... uv run -m lab dashboard --host 0.0.0.0

It writes nothing and downloads nothing. docs/dashboard.md has the rest.
"""

import importlib.util
import ipaddress
import os
import signal
import socket
from pathlib import Path

from lab.base.errors import Refused, os_reason

HELP = "a read-only web page and API of the night"
PORT = 8000
TOKEN = "AUTORESEARCH_TOKEN"
SHORTEST_TOKEN = 16  # characters: 64 bits even if they are hexadecimal, too many to guess over a network


def add_arguments(parser):
    parser.description = (
        "Serves a page with the night's chart and table, a page for each experiment, and the run in progress, for this "
        "working tree and its worktrees. Changes nothing. Listens on 127.0.0.1 unless --host says otherwise."
    )
    parser.add_argument("--tree", action="append", default=[], metavar="PATH", help="a working tree; may be repeated")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1); one that others can reach needs a token")
    parser.add_argument("--port", type=int, default=PORT, help=f"port to listen on ({PORT}); 0 picks a free one")
    parser.add_argument("--token", help=f"secret that visitors must present, {SHORTEST_TOKEN} characters or more (${TOKEN})")


def is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token(token, host):
    """The token, or None if none is needed. Raises Refused for a missing or weak one."""
    if token is None or token == "":
        if not is_loopback(host):
            raise Refused(f"--host {host} is open to others: give a --token, or set {TOKEN}")
        return None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise Refused(f"the token must have {SHORTEST_TOKEN} or more ASCII characters and no space")
    return token


def listen(host, port):
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)  # the address printed next accepts connections at once
        return listening
    except (OSError, OverflowError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else "no such port"
        raise Refused(f"cannot listen on {host}:{port}: {reason}; choose another --port, or 0 for a free one") from None


def ended(*_):
    raise KeyboardInterrupt


def run(args):
    token = check_token(os.environ.get(TOKEN) if args.token is None else args.token, args.host)
    signal.signal(signal.SIGTERM, ended)  # uvicorn installs its own handler and, when it ends, raises the signal again
    try:
        serve(args, token)
    except KeyboardInterrupt:
        pass
    return 0


def serve(args, token):
    """Serves until a signal ends it."""
    try:
        import uvicorn

        from lab.web import app, working_trees

        if importlib.util.find_spec("plotly") is None:
            raise ModuleNotFoundError(name="plotly")
    except ModuleNotFoundError as error:
        raise Refused(f"{error.name} is not installed: uv run --group dashboard -m lab dashboard") from None
    found = working_trees.find([Path(path) for path in args.tree] or [Path.cwd()], alone=bool(args.tree))
    made = app.create(found, token=token, local_only=is_loopback(args.host))
    listening = listen(args.host, args.port)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}/  {', '.join(found)}  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(
        uvicorn.Config(made, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2)
    ).run(sockets=[listening])
