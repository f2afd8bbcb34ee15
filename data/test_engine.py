"""Oracle: the plain loop, in one process."""
from settings import UserError

import os
import socket

import pytest

from data.engine import Engine, check_address


def square(item: int, plus: int) -> int:
    if item == 13:
        raise UserError("13 is unlucky")
    if item == 66:
        os._exit(9)
    return item**2 + plus


def test_one_and_several_processes_give_the_same():
    """Also the same error, in one line."""
    for workers in (1, 2):
        found = []
        with pytest.raises(UserError, match="^13 is unlucky$"):
            for pair in Engine(workers=workers).map(square, [1, 13, 5, 2], "test", [2, 1, 9, 5],
                                                    plus=1):
                found.append(pair)
        expected = [(5, 26), (2, 5), (1, 2)]  # the largest first
        assert found == expected or workers == 2 and set(found) <= set(expected)
    assert list(Engine().map(square, [], "test", [], plus=1)) == []


def test_a_worker_that_dies_ends_the_work_in_one_line():
    with pytest.raises(UserError, match="a worker was killed .*fewer workers"):
        list(Engine(workers=2).map(square, [66, 1], "test", [2, 1], plus=1))


def test_a_cluster_that_does_not_answer_is_said_at_once():
    """Ray is not asked: it would try for ten minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in ("", "auto", "local", f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            check_address(address)
    for address in (f"127.0.0.1:{port}", "127.0.0.1:99999", "my..host:1"):
        with pytest.raises(UserError, match=f"no Ray cluster answers at RAY_ADDRESS={address}: "):
            check_address(address)
