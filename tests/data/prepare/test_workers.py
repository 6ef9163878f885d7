import os

import pytest

from meap_lit.data.prepare.workers import default_num_workers, map_in_order
from meap_lit.errors import UserError


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_order(num_workers):
    assert list(map_in_order(abs, range(-40, 0), num_workers)) == list(range(40, 0, -1))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_exception_of_the_function_is_raised_here(num_workers):
    results = map_in_order(int, ["1", "x", "3"], num_workers)
    assert next(results) == 1
    with pytest.raises(ValueError, match="invalid literal for int"):
        list(results)


def test_a_killed_worker_is_reported():
    with pytest.raises(UserError, match="a worker process was killed, usually because memory ran out"):
        list(map_in_order(os._exit, [1, 1], num_workers=2))


def test_the_items_own_error_passes_through():
    def items():
        yield -1
        raise UserError("bad line")

    with pytest.raises(UserError, match="bad line"):
        list(map_in_order(abs, items(), num_workers=2))


def test_in_process_work_leaves_the_environment_alone(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert list(map_in_order(os.environ.get, ["TOKENIZERS_PARALLELISM"], 1)) == ["false"]
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    list(map_in_order(abs, [1], 1))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_a_small_input_gets_one_worker():
    assert default_num_workers(0) == 1
    assert default_num_workers(10**6) == 1
    assert 1 <= default_num_workers(10**12) <= os.cpu_count()
