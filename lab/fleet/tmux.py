"""Windows that outlive the terminal, by tmux: one server of its own for each fleet, so that nobody's other sessions
and no configuration come into it. The server ends with its last window, a window with its command."""

import hashlib
import os
import re
import shutil
import subprocess

from lab.base.errors import Unfinished

SESSION = "fleet"


def is_there():
    return shutil.which("tmux") is not None


def server(top, tag):
    """The name of the fleet's server, the same each time."""
    where = hashlib.sha256(f"{os.path.realpath(top)} {tag}".encode()).hexdigest()[:8]
    return f"autoresearch-{re.sub(r'[^A-Za-z0-9_-]', '-', tag)[:40]}-{where}"


def tmux(name, *args):
    return subprocess.run(["tmux", "-L", name, "-f", "/dev/null", *args], capture_output=True, text=True)


def windows(name):
    """The names of the server's windows; [] where it does not run."""
    return tmux(name, "list-windows", "-a", "-F", "#{window_name}").stdout.split()


def start(name, window, command):
    """Runs the shell command in a new window."""
    new = ["new-session", "-d", "-s", SESSION, "-x", "200", "-y", "50"]
    if windows(name):
        new = ["new-window", "-d", "-t", f"{SESSION}:"]
    done = tmux(name, *new, "-n", window, command)
    if done.returncode:
        raise Unfinished(f"tmux: {' '.join(done.stderr.split())}; the same command goes on")


def attach(name):
    """The command that shows the windows to a person."""
    return f"tmux -L {name} attach"
