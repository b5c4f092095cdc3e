"""The command line of lab: each command is a module with HELP, add_arguments(parser) and run(args) -> exit status.

Only the module of the command that is called gets imported, so that what is called often starts fast.
"""

import argparse
import contextlib
import importlib
import os
import sys

from lab.base.errors import Stop, Unfinished, os_reason

COMMANDS = {  # command -> room; the module in the room is named like the command
    "record": "loop",
    "status": "loop",
    "adopt": "loop",
    "propose": "queue",
    "wait": "queue",
    "work": "queue",
    "sample": "verify",
    "profile": "machine",
    "night": "keeper",
    "sandbox": "keeper",
    "audit": "verify",
    "prove": "verify",
    "dashboard": "web",
    "fleet": "fleet",
    "slurm": "fleet",
    "doctor": "machine",
}
EPILOG = """\
exit status: 0 done; 1 refused or failed, nothing was changed; 2 wrong usage; 3 stopped half-way (disk full and
the like): nothing is lost, the same command completes it; 75 this machine ended the run: run it again.
Some commands have others: see `uv run -m lab COMMAND --help`."""


def parser_of(called):
    """The parser with the arguments of the called command; with the help of all commands if none or another is called."""
    parser = argparse.ArgumentParser(
        prog="uv run -m lab",
        description="Helpers around the loop of autoresearch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in [called] if called in COMMANDS else COMMANDS:
        module = importlib.import_module(f"lab.{COMMANDS[name]}.{name}")
        sub = commands.add_parser(name, help=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.description = module.HELP[0].upper() + module.HELP[1:] + "."
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


class UntilClosed:
    """A stream whose reader may leave (`record | head -1`): the rest of the output is dropped, the work goes on."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        return self.dropping(self.stream.write, text) or len(text)

    def flush(self):
        self.dropping(self.stream.flush)

    def dropping(self, call, *args):
        try:
            return call(*args)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what is still buffered goes there too, also at the end of Python
            os.close(nowhere)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    argv = list(map(as_utf8, argv))
    for stream in (sys.stdout, sys.stderr):  # whatever the locale: help texts and descriptions hold any character
        stream.reconfigure(errors="replace")
    out, err = UntilClosed(sys.stdout), UntilClosed(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return called_with(argv)
        finally:
            out.flush()


def as_utf8(arg):
    """An argument that was UTF-8 although the locale is ASCII: Python has its bytes as lone surrogates."""
    try:
        return arg.encode("utf-8", "surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:
        return arg


def called_with(argv):
    called = argv[0] if argv else None
    args = parser_of(called).parse_args(argv)
    try:
        return args.run(args)
    except Stop as stop:
        print(f"lab {called}: {stop}", file=sys.stderr)
        return stop.code
    except OSError as error:
        print(f"lab {called}: {os_reason(error)}", file=sys.stderr)
        return Unfinished.code
    except KeyboardInterrupt:
        print(f"lab {called}: interrupted; the same command completes it", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
