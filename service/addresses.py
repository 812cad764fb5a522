"""Addresses that people write: host:port, checked before any client is given them, and listened on.

Client libraries take what is none in their own ways: a port beyond 65535 becomes another port, or ends in a traceback.
"""

import errno
import socket

from service.errors import SetupError

MAX_PORT = 65_535


def fault_of(address: str, *, least_port: int = 1) -> str:
    """Why `address` is no host:port, in words that follow its name; "" when it is one. IPv6 stands in brackets."""
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit()) or (":" in host and not (host[0] == "[" and host[-1] == "]")):
        return f"{address!r}: write it as host:port"
    if not least_port <= int(port) <= MAX_PORT:
        return f"{address!r}: a port lies between {least_port} and {MAX_PORT}"
    return ""


def host_port(host: str, port: int) -> str:
    """How an address is written, for a person or a client: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(address: str) -> tuple[str, int]:
    """The host, without brackets, and the port of what `fault_of` finds no fault with."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `OSError`."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, "no name of a host") from error


def cannot_listen(section: str, host: str, port: int, error: OSError) -> SetupError:
    """What a person is told when a section's `listener` cannot be had: why, and which setting to change."""
    remedy = f"set {section}.host to an address of this machine"
    if error.errno == errno.EADDRINUSE:
        remedy = f"set another {section}.port (0 takes any free one), or stop what uses it"
    elif error.errno == errno.EACCES:
        remedy = f"set another {section}.port"
    # Python adds the address that is named already.
    reason = (error.strerror or str(error)).partition(" (while ")[0]
    return SetupError(f"cannot listen on {section}.host:{section}.port {host_port(host, port)} ({reason}); {remedy}")
