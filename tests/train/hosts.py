"""Two hosts on this machine, for tests: network namespaces with names and addresses of their own, joined by a cable.

As on many machines, a host's own name resolves to a loopback address, and no name server knows it.

with two_hosts() as (one, other):
    process = one.start([sys.executable, "-m", ...], log=path)
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.train.runs import environment


@dataclass(frozen=True)
class Host:
    """namespace, name, address, interface: of the host."""

    namespace: str
    name: str
    address: str
    interface: str

    def start(self, command: Sequence[str], cwd: Path, log: Path, **extra: str) -> subprocess.Popen[bytes]:
        """Runs a command there, in a session of its own; what it says goes to `log`."""
        names = cwd / f"{self.name}.hosts"
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n")
        shell = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", shell]
        inside += [self.name, str(names), *command]
        with log.open("ab") as file:
            return subprocess.Popen(
                inside, cwd=cwd, env=environment() | extra, stdout=file, stderr=file, start_new_session=True
            )


def why_not_here() -> str | None:
    """Why no hosts can be made on this machine, None when they can."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} (of iproute2 and util-linux)"
    trial = f"braid-{os.getpid()}-trial"
    made = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", trial], capture_output=True)
    return f"no right to make network namespaces: {made.stderr.strip()}" if made.returncode else None


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Makes two hosts; at the end whatever still runs on them is killed and they are removed."""
    hosts = [
        Host(f"braid-{os.getpid()}-{number}", f"host-{name}", f"10.77.0.{number + 1}", f"cable{number}")
        for number, name in enumerate("ab")
    ]
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        one, other = hosts
        cable = ("type", "veth", "peer", "name", other.interface, "netns", other.namespace)
        _ip("link", "add", one.interface, "netns", one.namespace, *cable)
        for host in hosts:
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield one, other
    finally:
        for host in hosts:
            _remove(host)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}"
    return done.stdout


def _remove(host: Host) -> None:
    found = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True)
    for pid in map(int, found.stdout.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)
