"""Which network interface the ranks of several hosts talk through.

gloo offers the address that the host's own name resolves to, which on many Linux machines is 127.0.1.1: other hosts
then wait for it in vain. So where a run spans hosts and nobody has chosen, the interface is the one that leads to the
host of rank 0. NCCL looks for InfiniBand and fast interfaces by itself and is told only what the recipe says.
"""

import os
import socket

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def choose_interface(named: str | None) -> None:
    """Sets the environment that gloo and NCCL read, before the first process group is made.

    named: the recipe's interface, for both; None for the one that leads to MASTER_ADDR, for gloo alone and only where
    the run spans hosts and GLOO_SOCKET_IFNAME is not set. Raises ValueError for a name that this host does not have.
    """
    if named is not None:
        known = [name for _, name in socket.if_nameindex()]
        if named not in known:
            raise ValueError(
                f"parallel.interface: got {named!r}, but {socket.gethostname()} has {', '.join(known)}; "
                "wants one that every host has, or none"
            )
        os.environ[GLOO] = os.environ[NCCL] = named
    elif GLOO not in os.environ and spans_hosts():
        found = interface_towards(os.environ.get("MASTER_ADDR", ""))
        if found is not None:
            os.environ[GLOO] = found


def spans_hosts() -> bool:
    """Whether ranks run on other hosts too; where the launcher does not say how many run here, they may."""
    size = os.environ.get("WORLD_SIZE", "1")
    return size != "1" and os.environ.get("LOCAL_WORLD_SIZE") != size


def interface_towards(host: str) -> str | None:
    """The interface whose address this host would use to reach `host`; None when there is none or it is loopback."""
    import psutil

    ours = address_towards(host)
    if ours is None or ours.startswith("127.") or ours == "::1":
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == ours for entry in addresses):
            return name
    return None


def address_towards(host: str) -> str | None:
    """The address of this host that `host` sees; None when it is not known or cannot be reached."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: it only asks the routing table
            return probe.getsockname()[0]
    except OSError:
        return None


def is_here(host: str) -> bool:
    """Whether `host`, a name or an address, is this host."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return address_towards(host) in found
