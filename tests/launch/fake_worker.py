"""Stands in for uft.launch.worker: writes what the launcher looks at, and does as the configuration says.

`generate.system` is the script: ok, fail (exit 1), refuse (exit 2 before step 0), late_refusal (exit 2 with a result),
die (SIGKILL), wait (until a signal, then stop with a checkpoint), wait_child (likewise, and it dies with its parent as
the real worker does), wait_raw (until killed).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def result(run: Path, status: str, **more: object) -> None:
    (run / "result.json").write_text(json.dumps({"status": status, "steps": 2, "final": {"eval/nll": 1.5}, **more}))


def wait(run: Path) -> None:
    def stop(number: int, frame: object) -> None:
        (run / "checkpoints" / "step-000001").mkdir(parents=True)
        result(run, "stopped")
        sys.exit(130 if number == signal.SIGINT else 75)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    (run / "waiting").write_text(str(os.getpid()))
    time.sleep(60)


def main() -> None:
    job = sys.argv[2] if sys.argv[1] == "--job" else "train"
    target = Path(sys.argv[-1])
    config = yaml.safe_load((target if job != "train" else target / "config.yaml").read_text())
    script = config["generate"]["system"] or "ok"
    print(f"worker {job} {script} cwd={os.getcwd()}", flush=True)
    if job != "train":
        print(config["model"]["path"], config["generate"]["out"])
        sys.exit(0)
    agent = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
    (target / "wandb.json").write_text(json.dumps(agent))
    with open(target / "sittings", "a") as log:
        log.write(f"{script}\n")
    if script == "fail":
        result(target, "failed", error="ValueError: it broke\nlong story")
        sys.exit(1)
    if script == "refuse":
        said = "  data.x  no rows that this objective can use\n      did you mean  data=mix ?"
        print(f"uft: 1 problem in this request\n\n{said}\n", file=sys.stderr)
        sys.exit(2)
    if script == "late_refusal":
        result(
            target,
            "failed",
            error="uft: 2 problems in this request\n\n  data.x  no rows left\n\n  data.y  none either\n",
        )
        sys.exit(2)
    if script == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if script == "wait_child":
        from uft.launch.process import die_with_parent

        die_with_parent()
    if script in ("wait", "wait_child"):
        wait(target)
    if script == "wait_raw":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        (target / "waiting").write_text(str(os.getpid()))
        time.sleep(60)
    result(target, "finished")


main()
