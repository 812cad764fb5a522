"""Addresses that people write: host:port, checked before any client is given them.

Client libraries take what is none in their own ways: a port beyond 65535 becomes another port, or ends in a traceback.
"""

MAX_PORT = 65_535


def fault_of(address: str, *, least_port: int = 1) -> str:
    """Why `address` is no host:port, in words that follow its name; "" when it is one. IPv6 stands in brackets."""
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit()) or (":" in host and not (host[0] == "[" and host[-1] == "]")):
        return f"{address!r}: write it as host:port"
    if not least_port <= int(port) <= MAX_PORT:
        return f"{address!r}: a port lies between {least_port} and {MAX_PORT}"
    return ""
