"""An agent that follows program.md to the letter, without a model: it does what `lab status` and `lab record` say.

    python scripted_agent.py PLAN.json [--die-after N]      in a working tree on a night's branch

It keeps nothing in memory but what it just read, so it may die at any moment and be started again. PLAN.json is a
list of [description, code put into train.py, options of record]; an idea is done when `lab status` knows its
description. With --die-after it ends like a killed process after N records.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

GUARD = 'if __name__ == "__main__":'
RUN = re.compile(r"((?:AUTORESEARCH_SEED=\d+ )?uv run \S+(?: \S+)* > run\.log 2>&1)")


class Refused(Exception):
    """A command of lab that did not end with 0: its exit status and what it said."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


class Agent:
    def __init__(self, tree=".", env=None):
        self.tree, self.env = Path(tree), env or dict(os.environ)
        self.context = 0  # characters that the loop put into the agent's context since the last idea
        self.records = 0

    # --- what an agent's shell tool does ---

    def shell(self, command, check=True):
        """The combined output of a command, all of which an agent reads."""
        done = subprocess.run(
            ["sh", "-c", command], cwd=self.tree, env=self.env, text=True, errors="replace", stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.context += len(done.stdout)
        if check and done.returncode:
            raise Refused(done.returncode, done.stdout.strip())
        return done.stdout

    def git(self, command):
        return self.shell(f"git -c user.name=agent -c user.email=agent@example.org {command}")

    def train(self, command):
        """A run, and the one line of it that is looked at."""
        self.shell(command, check=False)
        self.shell('grep "^val_bpb:" run.log', check=False)

    def record(self, description="", options=""):
        said = self.shell(f"uv run -m lab record {options} " + (f'"{description}"' if description else ""))
        self.records += 1
        return said

    # --- the loop of program.md ---

    def next(self):
        """What `lab status` says is next."""
        return self.shell("uv run -m lab status").rpartition("next: ")[2].strip()

    def head_subject(self):
        return self.shell("git log -1 --format=%s").strip()

    def obey(self, said):
        """Does what record's last lines say while that is a repeat; the last that record said."""
        while said.startswith("confirm"):
            self.train(RUN.search(said.rpartition("next: ")[2])[1])
            said = self.record()
        return said

    def edit(self, code):
        """Puts the code at the end of train.py, before it starts; or removes what begins with a minus."""
        path = self.tree / "train.py"
        text = path.read_text()
        if code.startswith("-"):
            text = text.replace(code[1:], "", 1)
        else:
            text = text.replace(GUARD, f"{code.rstrip()}\n\n\n{GUARD}", 1)
        path.write_text(text)

    def try_out(self, description, code, options=""):
        """One idea from edit to verdict; what record said last."""
        self.context = 0
        self.edit(code)
        self.git(f'commit -q -m "{description}" -- train.py')
        self.train("uv run train.py > run.log 2>&1")
        return self.obey(self.record(description, options))

    def baseline(self):
        self.train("uv run train.py > run.log 2>&1")
        return self.obey(self.record("baseline"))

    def step(self, plan):
        """One thing, found out from `lab status` alone; False when every idea was tried."""
        sentence = self.next()
        run = RUN.search(sentence)
        if "uv run -m lab record" in sentence:
            told = re.search(r'record "(.*)"', sentence)
            self.record(self.head_subject() if told and told[1] == "what this tried" else told[1] if told else "")
        elif "git reset --keep" in sentence:
            self.git(re.search(r"git (reset --keep \S+)", sentence)[1])
        elif "wait" in sentence and not run:
            time.sleep(0.5)
        elif "not committed" in sentence:
            self.git("checkout -- train.py")
        elif "is recorded" in sentence:
            known = {row["description"] for row in json.loads(self.shell("uv run -m lab status --json"))["rows"]}
            left = [idea for idea in plan if idea[0] not in known]
            if not left:
                return False
            self.edit(left[0][1])
            self.git(f'commit -q -m "{left[0][0]}" -- train.py')
        else:
            self.train(run[1])
        return True


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    lives = int(sys.argv[3]) if sys.argv[2:3] == ["--die-after"] else None
    agent = Agent()
    while agent.step(plan):
        if lives and agent.records >= lives:
            os._exit(1)
    print("every idea was tried", flush=True)
    time.sleep(3600)  # never stop: wait for the morning


if __name__ == "__main__":
    main()
