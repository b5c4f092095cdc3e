"""A made-up training for workers: a train.py that ends at once with the val_bpb that follows from its own constants.

    text = train(A=0.01, SECONDS=0.1)      the text of a train.py; what is not named is 0
"""

DEFAULTS = {"A": 0.0, "B": 0.0, "C": 0.0, "SECONDS": 0.0, "NOISE": 0.001, "END": "complete", "PAGES": 0}
# Constants are far apart, so that edits of two of them do not conflict.
GAP = "#\n" * 4
BODY = '''
import hashlib, json, os, random, signal, sys, time, uuid
from pathlib import Path

started = time.time()
signal.signal(signal.SIGTERM, lambda number, frame: (print("preempted", flush=True), os._exit(75)))
seed = int(os.environ.get("AUTORESEARCH_SEED", 42))
source = Path(__file__).read_bytes()
frozen = hashlib.sha256(Path("prepare.py").read_bytes()).hexdigest()
if END == "nothing":
    sys.exit(1)
header = {
    "run_id": uuid.uuid4().hex, "start": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    "train_sha256": hashlib.sha256(source).hexdigest(), "rules_sha256": "a" * 64, "data_sha256": "b" * 64,
    "dataset": "stdlib", "seed": seed, "device": os.environ.get("FAKE_DEVICE", "cpu (a fake)"), "clock": "monotonic",
    "versions": {}, "rules_files": {"constants.py": None, "prepare.py": frozen},
}
print("run: " + json.dumps(header), flush=True)
while (left := started + SECONDS - time.time()) > 0:
    time.sleep(min(left, 1.0))  # SIGTERM ends it at once
if PAGES:  # on a full disk the log ends with the page, in the middle of a line
    print("#" * (4094 - os.fstat(1).st_size % 4096), flush=True)
    print("step 00123 (41.0%)\\n" * 220 * PAGES, flush=True)
if END == "crash":
    raise ValueError("made up")
if END == "disk":
    raise OSError(28, "No space left on device")
if END == "overran":
    sys.exit("training overran its 300 s by 4.2 s, 3.0 s are allowed: call progress() once a step")
if END == "killed":
    print("step 00123 (41.0%) | loss 3.141593 | lrm 1.00 | 318 ms | 1,648,000 tok/s | mfu 39.8% | epoch 1 | 177 s left", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if END == "preempted" and not Path("preempted").exists():
    Path("preempted").touch()
    print("preempted")
    sys.exit(75)
noise = random.Random(f"{seed} {A} {B} {C}").uniform(-NOISE, NOISE)
print(f"""---
val_bpb:          {1.0 - A - B - C + noise:.6f}
training_seconds: 300.0
total_seconds:    325.9
peak_vram_mb:     45060.2
mfu_percent:      39.80
total_tokens_M:   499.6
num_steps:        953
num_params_M:     50.3
depth:            8""")
'''


def train(**constants):
    lines = "".join(f"{name} = {value!r}\n{GAP}" for name, value in (DEFAULTS | constants).items())
    return f"# A made-up training.\n{lines}{BODY}"
