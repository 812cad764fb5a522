"""How addresses are written and read."""

import pytest

from service.addresses import fault_of, host_port, split


@pytest.mark.parametrize(("host", "written"), [("::1", "[::1]:50051"), ("127.0.0.1", "127.0.0.1:50051"), ("h", "h:50051")])
def test_an_address_that_is_written_reads_the_same(host: str, written: str) -> None:
    assert host_port(host, 50051) == written
    assert fault_of(written) == ""
    assert split(written) == (host, 50051)
