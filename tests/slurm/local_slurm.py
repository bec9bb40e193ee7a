"""A real Slurm cluster of several nodes on this machine, for tests. Needs root and Debian's Slurm (tools/install_slurm.sh).

Each node is a slurmd in its own process, mount and host name namespace, so that killing a node kills everything on it.
Everything, configuration and state included, lies in one directory. By hand: `python tests/slurm/local_slurm.py 4`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")

_CONFIGURATION = """\
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job may start again only after its credential has expired: 121 s by default, 5 s is the minimum.
AuthInfo=socket={directory}/munge.sock,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/spool/%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# Everything quick.
SlurmdTimeout=6
MessageTimeout=10
KillWait=20
EpilogMsgTime=0
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""

_NODE_START = """\
hostname "$NODE"
mount --bind "$DIRECTORY/hosts" /etc/hosts
eval "$PREPARE"
slurmd -D -N "$NODE" &
wait
"""


class LocalSlurm:
    """Nodes `node1` to `nodeN` behind a controller; `environment` makes sbatch and its kin talk to it."""

    def __init__(self, directory: Path, num_nodes: int, cpus_per_node: int = 4) -> None:
        self.directory = directory
        self.nodes = [f"node{i + 1}" for i in range(num_nodes)]
        self.environment = {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        ports = _free_ports(num_nodes + 1)
        hosts = Path("/etc/hosts").read_text()
        lines = []
        for i, (node, port) in enumerate(zip(self.nodes, ports[1:], strict=True)):
            address = f"127.0.77.{i + 1}"
            hosts += f"{address} {node}\n"
            lines.append(
                f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={port} CPUs={cpus_per_node} RealMemory=100000"
            )
        for name in ("log", "state", "spool"):
            (directory / name).mkdir(parents=True)
        (directory / "hosts").write_text(hosts)
        (directory / "slurm.conf").write_text(
            _CONFIGURATION.format(directory=directory, control_port=ports[0], nodes="\n".join(lines))
        )

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        key = self.directory / "munge.key"
        with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(os.urandom(128))
        munge = self.directory / "munge.sock"
        options = {
            "key-file": key,
            "socket": munge,
            "pid-file": "munged.pid",
            "log-file": "log/munge.log",
            "seed-file": "munge.seed",
        }
        self._spawn("munged", "munged", "--foreground", *(f"--{k}={self.directory / v}" for k, v in options.items()))
        self._wait_for(munge.is_socket, "munged")
        self._spawn("slurmctld", "slurmctld", "-D", "-i", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_idle()

    def wait_idle(self) -> None:
        """Wait until every node is idle."""

        def idle() -> bool:
            return self.run("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D", check=False).strip() == str(
                len(self.nodes)
            )

        self._wait_for(idle, "slurmctld")

    def start_node(self, node: str, prepare: str = "") -> None:
        """Start a node. `prepare` is shell that runs first in its mount namespace: a full or read-only disk, for example."""
        variables = {"NODE": node, "DIRECTORY": str(self.directory), "PREPARE": prepare}
        namespaces = ["--mount", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        self._spawn(node, "unshare", *namespaces, "bash", "-c", _NODE_START, environment=variables)

    def kill_node(self, node: str) -> None:
        """End every process of a node at once, as a power failure does."""
        process = self._processes.pop(node)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """End all daemons and everything that runs on the nodes, and remove the directory."""
        for name in reversed(list(self._processes)):
            self.kill_node(name)
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a Slurm command."""
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{' '.join(command)} did not answer{self.logs()}") from None
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}{self.logs()}")
        return done.stdout

    def logs(self) -> str:
        """Last lines of every daemon's log."""
        files = sorted((self.directory / "log").iterdir())
        return "".join(f"\n==> {file.name}\n" + "\n".join(file.read_text().splitlines()[-20:]) for file in files)

    def _spawn(self, name: str, *command: str, environment: dict[str, str] | None = None) -> None:
        with open(self.directory / "log" / f"{name}.out", "ab") as log:
            # setpriv: the daemons end with this process, however it ends.
            self._processes[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.environment | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for(self, condition, daemon: str, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline or self._processes[daemon].poll() is not None:
                raise RuntimeError(f"{daemon} did not come up{self.logs()}")
            time.sleep(0.1)


def why_not() -> str | None:
    """Why this machine cannot run the cluster, or None if it can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"needs {', '.join(missing)}: run tools/install_slurm.sh"
    if os.geteuid() != 0:
        return "needs root, to start Slurm's daemons"
    namespaces = subprocess.run(
        ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    )
    return f"needs namespaces: {namespaces.stderr.decode().strip()}" if namespaces.returncode else None


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for probe in sockets:
        probe.bind(("", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


def main() -> None:
    """Run a cluster until Ctrl-C."""
    if (reason := why_not()) is not None:
        raise SystemExit(f"error: {reason}")
    directory = Path("/tmp/local-slurm")
    shutil.rmtree(directory, ignore_errors=True)
    cluster = LocalSlurm(directory, int(sys.argv[1]) if len(sys.argv) > 1 else 2)
    cluster.start()
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # the daemons must not inherit this
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    cluster.stop()


if __name__ == "__main__":
    main()
