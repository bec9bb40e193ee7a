"""What torchft does for two replicas that average their gradients on gloo, when one is killed and started again.

    python benchmarks/experiments/torchft_replicas.py

Needs `pip install --no-deps torchft==0.2.0` in an environment of its own. Prints how long the survivor was held up, after how long
there were two again, how many steps it took alone, and whether the weights end in the bits of the undisturbed run.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, KILL_STEP = 400, 100
TIME_LIMIT_S = 200


def replica(number: int, lighthouse: str, kill_step: int, log: Path) -> None:
    """One replica, of one rank."""
    import torch
    import torch.distributed as dist
    from torchft import Manager, Optimizer, ProcessGroupGloo

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def load(state: Any) -> None:
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    second = datetime.timedelta(seconds=1)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=5 * second), min_replica_size=1, use_async_quorum=False, load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "adam": adam.state_dict()}, replica_id=str(number),
        lighthouse_addr=lighthouse, hostname="127.0.0.1", store_addr="127.0.0.1", store_port=port, rank=0, world_size=1,
        timeout=8 * second, quorum_timeout=20 * second,
    )  # fmt: skip
    optimizer = Optimizer(manager, adam)
    with open(log, "a", buffering=1) as file:
        while (step := manager.current_step()) < STEPS:
            optimizer.zero_grad()
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(2 * step + number))
            (model(x) - x).square().mean().backward()
            for parameter in model.parameters():
                manager.allreduce(parameter.grad).wait()
            if step == kill_step and number == 1:
                file.write(json.dumps({"time": time.time(), "killed": True}) + "\n")
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
            entry = {"time": time.time(), "step": step, "replicas": manager.num_participants(), "digest": digest}
            file.write(json.dumps(entry) + "\n")
            time.sleep(0.1)
    del store
    os._exit(0)


def run(kill_step: int) -> list[list[dict[str, Any]]]:
    """What both replicas have logged."""
    from torchft._torchft import LighthouseServer

    folder = Path(tempfile.mkdtemp(prefix="torchft-"))
    lighthouse = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=200, quorum_tick_ms=50, heartbeat_timeout_ms=2000
    )
    address = "http://127.0.0.1:" + lighthouse.address().rsplit(":", 1)[1]

    def start(number: int, kill_step: int) -> subprocess.Popen[bytes]:
        arguments = [str(number), address, str(kill_step), str(folder / f"{number}.jsonl")]
        with open(folder / f"{number}.log", "a") as log:
            return subprocess.Popen([sys.executable, "-W", "ignore", __file__, *arguments], stdout=log, stderr=log)

    processes = [start(0, -1), start(1, kill_step)]
    deadline = time.monotonic() + TIME_LIMIT_S
    while any(process.poll() is None for process in processes):
        if processes[1].poll() == -signal.SIGKILL:
            processes[1] = start(1, -1)
        if time.monotonic() > deadline:
            raise RuntimeError(f"the replicas did not end; see {folder}")
        time.sleep(0.1)
    return [[json.loads(line) for line in (folder / f"{n}.jsonl").read_text().splitlines()] for n in (0, 1)]


def main() -> None:
    """Without arguments the measurement, with them a replica."""
    if len(sys.argv) > 1:
        replica(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    calm, (survivor, other) = run(-1)[0], run(KILL_STEP)
    killed = next(entry["time"] for entry in other if entry.get("killed"))
    alone = [entry for entry in survivor if entry["time"] > killed and entry["replicas"] == 1]
    again = next(entry for entry in survivor if entry["time"] > alone[0]["time"] and entry["replicas"] == 2)
    same = "equal bits" if calm[-1]["digest"] == survivor[-1]["digest"] else "other bits"
    print(
        f"first step alone {alone[0]['time'] - killed:.1f} s after the kill, two again after {again['time'] - killed:.1f} s, "
        f"{len(alone)} steps of one replica; {same}"
    )


if __name__ == "__main__":
    main()
