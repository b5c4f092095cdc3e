"""tmux windows, which outlive the terminal. Each fleet has its own tmux server, separate from the user's sessions and
configuration. A window closes when its command ends; the server ends with its last window."""

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
    """The name of the fleet's server: the same for every call with this checkout and tag."""
    where = hashlib.sha256(f"{os.path.realpath(top)} {tag}".encode()).hexdigest()[:8]
    return f"autoresearch-{re.sub(r'[^A-Za-z0-9_-]', '-', tag)[:40]}-{where}"


def tmux(name, *args):
    return subprocess.run(["tmux", "-L", name, "-f", "/dev/null", *args], capture_output=True, text=True)


def windows(name):
    """The names of the server's windows; [] if it is not running."""
    return tmux(name, "list-windows", "-a", "-F", "#{window_name}").stdout.split()


def start(name, window, command):
    """Runs the shell command in a new window."""
    new = ["new-session", "-d", "-s", SESSION, "-x", "200", "-y", "50"]
    if windows(name):
        new = ["new-window", "-d", "-t", f"{SESSION}:"]
    done = tmux(name, *new, "-n", window, command)
    if done.returncode:
        raise Unfinished(f"tmux: {' '.join(done.stderr.split())}; the same command resumes")


def attach(name):
    """The command that attaches a terminal to the windows."""
    return f"tmux -L {name} attach"
