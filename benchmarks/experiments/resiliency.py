"""What nvidia-resiliency-ext does for a run of ours, on gloo: time to see a fault, time until a step beyond it, equal bits.

    python benchmarks/experiments/resiliency.py inprocess [KIND...]     inprocess.Wrapper around run_training: 2 ranks and a spare
    python benchmarks/experiments/resiliency.py launcher [KIND...]      ft_launcher with heartbeats of each step: 2 ranks

Needs `pip install --no-deps nvidia-resiliency-ext==0.4.1` in an environment of its own. A fault comes on rank 1 at step 12 of 30;
checkpoints every 5. KIND: raise, kill, hang, stop, gil, collective. SHIPPED_ABORT=1 takes the package's own way to end collectives.
"""

from __future__ import annotations

import argparse
import datetime
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

KINDS = ("raise", "kill", "hang", "stop", "gil", "collective")
FAULT_STEP, STEPS, EVERY, LIMIT_S = 12, 30, 5, 15.0
TIME_LIMIT_S = 170


LAUNCHER = f"""--nproc-per-node 2 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{{port}} --monitor-interval 0.25
    --ft-param-initial_rank_heartbeat_timeout 120 --ft-param-rank_heartbeat_timeout {LIMIT_S}
    --ft-param-workload_check_interval 0.25"""


def note(folder: Path, event: str, **more: Any) -> None:
    """A line of what happened when."""
    line = (
        json.dumps({"time": time.time(), "rank": int(os.environ.get("FIRST_RANK", 0)), "event": event, **more}) + "\n"
    )
    descriptor = os.open(folder / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def train(folder: Path, ping: Any, iteration: int) -> None:
    """The run, in the world that RANK and WORLD_SIZE say."""
    import torch.distributed as dist

    from hope_megatron.config.resilience import ResilienceConfig
    from hope_megatron.runtime.heartbeat import HEART
    from hope_megatron.testing.faults import install_faults
    from hope_megatron.testing.tiny import RepeatingSource, tiny_run_config
    from hope_megatron.training.run import run_training

    note(folder, "enter", iteration=iteration)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = tiny_run_config(output_dir=folder, training={"steps": STEPS}, checkpoint={"every": EVERY}).model_copy(
        update={"resilience": ResilienceConfig(allow_faults=True)}
    )
    HEART.listeners.clear()
    if os.environ.get("HOPE_FAULTS"):
        install_faults(config)

    def beat(phase: str, step: int) -> None:
        if phase == "after step":
            ping()
            note(folder, "step", step=step, iteration=iteration)
        if phase == "forward" and step == FAULT_STEP and iteration == 0 and rank == 1 and os.environ.get("HOPE_FAULTS"):
            note(folder, "fault")

    HEART.listeners.insert(0, beat)
    timeout = datetime.timedelta(seconds=60)
    store = dist.FileStore(str(folder / f"store-{iteration}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    run_training(config, RepeatingSource())
    dist.destroy_process_group()


def inprocess_rank(folder: Path) -> None:
    """A process of the wrapper."""
    from megatron.core import parallel_state
    from nvidia_resiliency_ext import inprocess

    import hope_megatron.engine.preload
    import hope_megatron.training.run  # noqa: F401

    os.environ["FIRST_RANK"] = os.environ["RANK"]
    second = datetime.timedelta(seconds=1)

    class Forget(inprocess.finalize.Finalize):
        def __call__(self, state: Any) -> Any:
            note(folder, "finalize", iteration=state.iteration)
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
            return state

    class Seen(inprocess.abort.Abort):
        def __call__(self, state: Any) -> Any:
            note(folder, "abort", iteration=state.iteration)
            return state

    class Gloo(inprocess.abort.Abort):
        """The shipped abort asks every group for its CUDA backend; gloo's has none."""

        def __call__(self, state: Any) -> Any:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
            return state

    abort = inprocess.abort.AbortTorchDistributed() if os.environ.get("SHIPPED_ABORT") else Gloo()
    wrapper = inprocess.Wrapper(
        store_kwargs={"host_name": "127.0.0.1", "port": int(os.environ["MASTER_PORT"]), "timeout": 60 * second},
        initialize=inprocess.initialize.RetryController(max_iterations=4, min_active_world_size=2),
        abort=inprocess.Compose(abort, Seen()),
        finalize=Forget(),
        rank_assignment=inprocess.Compose(
            inprocess.rank_assignment.MaxActiveWorldSize(2), inprocess.rank_assignment.ShiftRanks()
        ),
        monitor_thread_interval=0.25 * second,
        monitor_process_interval=0.25 * second,
        heartbeat_interval=0.5 * second,
        progress_watchdog_interval=0.5 * second,
        soft_timeout=LIMIT_S * second,
        hard_timeout=1.33 * LIMIT_S * second,
        heartbeat_timeout=LIMIT_S * second,
        barrier_timeout=60 * second,
        completion_timeout=60 * second,
        last_call_wait=0.25 * second,
        termination_grace_time=1 * second,
    )

    def run(call=None):  # type: ignore[no-untyped-def]
        train(folder, call.ping, call.iteration)

    run.__annotations__["call"] = inprocess.CallWrapper  # it takes no annotations that are strings
    wrapper(run)()


def launcher_rank(folder: Path) -> None:
    """A rank under ft_launcher."""
    from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

    os.environ["FIRST_RANK"] = os.environ["RANK"]
    client = RankMonitorClient()
    client.init_workload_monitoring()
    train(folder, client.send_heartbeat, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
    client.shutdown_workload_monitoring()


def one(part: str, kind: str) -> dict[str, Any]:
    """A run that meets a fault of a kind (empty: none)."""
    from hope_megatron.testing.drill import final_state

    folder = Path(tempfile.mkdtemp(prefix="resiliency-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FOLDER": str(folder)}
    environment |= {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"TORCHDYNAMO_DISABLE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if kind:
        environment["HOPE_FAULTS"] = f"{kind}@1:{FAULT_STEP}"
    if part == "inprocess":
        command = [sys.executable, "-W", "ignore", __file__, "inprocess-rank"]
        ranks = [(command, {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(rank)}) for rank in range(3)]
    else:
        launcher = [str(Path(sys.executable).parent / "ft_launcher"), *LAUNCHER.format(port=port).split()]
        ranks = [([*launcher, __file__, "launcher-rank"], {})]
    with open(folder / "log", "w") as log:
        processes = [
            subprocess.Popen(argv, env={**environment, **more}, stdout=log, stderr=log, start_new_session=True)
            for argv, more in ranks
        ]
        deadline = time.monotonic() + TIME_LIMIT_S
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.1)
        ended = all(process.poll() is not None for process in processes)
        codes = [process.poll() for process in processes]
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    whole = any((folder / "tiny" / "checkpoints").glob("step-*/manifest.json"))
    state = final_state(folder / "tiny") if whole else {}
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {"kind": kind, "ended": ended, "codes": codes, "state": state, "folder": str(folder), **times(events)}


def times(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds from the fault to its discovery, to a new start of the function, and to the first step beyond it."""
    fault = next((e["time"] for e in events if e["event"] == "fault"), None)
    if fault is None:
        return {}
    later = [event for event in events if event["time"] > fault]
    again = [event for event in later if event.get("iteration", 0) > 0]
    chosen = {
        "detected": [event for event in later if event["event"] in ("abort", "finalize", "enter")],
        "entered": [event for event in again if event["event"] == "enter"],
        "beyond": [event for event in again if event["event"] == "step" and event["step"] >= FAULT_STEP],
    }
    return {name: round(found[0]["time"] - fault, 2) if found else None for name, found in chosen.items()}


def main() -> None:
    """`resiliency.py PART [KIND...]`"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("inprocess", "launcher", "inprocess-rank", "launcher-rank"))
    parser.add_argument("kinds", nargs="*", default=[])
    args = parser.parse_args()
    if args.part.endswith("-rank"):
        folder = Path(os.environ["FOLDER"])
        (inprocess_rank if args.part == "inprocess-rank" else launcher_rank)(folder)
        return
    undisturbed = one(args.part, "")
    print(
        "undisturbed: ended" if undisturbed["ended"] else f"undisturbed: did not end, see {undisturbed['folder']}",
        flush=True,
    )
    for kind in args.kinds or KINDS:
        found = one(args.part, kind)
        equal = bool(found["state"]) and found["state"] == undisturbed["state"]
        shown = {name: value for name, value in found.items() if name != "state"}
        print(shown, "equal bits" if equal else "other bits", flush=True)


if __name__ == "__main__":
    main()
