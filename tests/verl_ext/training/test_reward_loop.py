"""Rewards that fail are counted and name their function; rewards in numpy's or torch's types are numbers.

No Ray: verl's reward worker and its "naive" manager, on one response at a time.
"""

import asyncio
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from omegaconf import OmegaConf
from verl.experimental.reward_loop import reward_loop
from verl.protocol import DataProto
from verl.trainer.ppo.reward import load_reward_manager

from verl_ext.training import reward_loop as module
from verl_ext.training.reward_loop import (
    CountingRewardManager,
    CountingRewardWorker,
    RewardError,
    Tally,
    reward_timeout,
)

FUNCTION = """
import asyncio, re, sys, time
from decimal import Decimal
from fractions import Fraction
import numpy as np
import torch

def grade(x):
    raise ArithmeticError("no answer\\nin " + x)

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return ANSWERS[ground_truth]()

async def compute_score_async(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    answer = ANSWERS[ground_truth]()
    return await answer if asyncio.iscoroutine(answer) else answer

"""


class Tokenizer:
    eos_token = "<end>"

    def decode(self, ids, skip_special_tokens=True):
        return "text"


@pytest.fixture
def worker(tmp_path, monkeypatch):
    def make(*answers, name="compute_score", manager="naive", timeout=20):
        """A worker whose reward function answers the first response so, the second so, and so on."""
        answers = ", ".join(f"lambda: {answer}" for answer in answers)
        (tmp_path / "reward.py").write_text(f"{FUNCTION}ANSWERS = [{answers}]\n")
        config = OmegaConf.create(
            {
                "reward": {
                    "custom_reward_function": {"path": f"{tmp_path}/reward.py", "name": name},
                    "reward_manager": {"source": "register", "name": manager},
                    "reward_model": {"enable": False},
                    "timeout": 1.0,
                },
                "verl_ext": {"reward_timeout": timeout},
            }
        )

        def init(self):
            self.reward_manager = load_reward_manager(config, Tokenizer())

        monkeypatch.setattr(reward_loop.RewardLoopWorker, "_init_reward_fn", init)
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        made = CountingRewardWorker(config)
        made.run = loop.run_until_complete
        return made

    yield make
    asyncio.set_event_loop(None)


def row(number):
    return rows(number + 1)[number:]


def rows(count):
    """As many responses, as verl hands them to its reward workers."""
    shape = {"responses": 2, "attention_mask": 4}
    tensors = {name: torch.ones(count, width, dtype=torch.long) for name, width in shape.items()}
    others = {
        "data_source": ["toy"] * count,
        "reward_model": [{"ground_truth": i} for i in range(count)],
        "extra_info": [{} for _ in range(count)],
    }
    return DataProto.from_dict(tensors, {name: np.array(x, dtype=object) for name, x in others.items()})


@pytest.mark.parametrize(
    "expression, reward",
    [
        ("1", 1.0),
        ("True", 1.0),
        ("np.float32(0.5)", 0.5),
        ("np.bool_(True)", 1.0),
        ("np.int64(3)", 3.0),
        ("np.array(0.5)", 0.5),
        ("np.array([1.0])", 1.0),
        ("np.array([[True]])", 1.0),
        ("torch.tensor(0.25)", 0.25),
        ("torch.tensor([1.0], dtype=torch.bfloat16, requires_grad=True)", 1.0),
        ("Fraction(1, 2)", 0.5),
    ],
)
@pytest.mark.parametrize("form", ["{}", "{{'score': {}, 'acc': {}, 'why': 'x'}}"])
def test_numbers_of_numpy_and_torch_are_rewards(worker, expression, reward, form):
    made = worker(form.format(expression, expression))
    result = made.run(made.compute_score(row(0)))
    assert (type(result["reward_score"]), result["reward_score"]) == (float, reward)
    acc = result["reward_extra_info"]["acc"]
    assert acc == reward and type(acc) in (float, int, bool, Fraction)
    assert made.run(made.take_tally()) == Tally(asked=1)


@pytest.mark.parametrize(
    "expression, error",
    [
        ("None", "TypeError: it returned None (NoneType), which is not a number"),
        ("np.array([1.0, 0.0])", "TypeError: it returned array([1., 0.]) (ndarray), which is not a number"),
        ("np.array([])", "which is not a number"),
        ("[1.0]", "(list), which is not a number"),
        ("'1.0'", "TypeError: it returned '1.0' (str), which is not a number"),
        ("1j", "(complex), which is not a number"),
        ("np.array([None])", "it returned None (NoneType), which is not a number"),
        ("'x' * 10**6", "(str), which is not a number"),
        ("(1.0, {})", "(tuple), which is not a number"),
        ("{'score': None, 'acc': 1}", "it returned None (NoneType), which is not a number"),
        ("float('nan')", "ValueError: it returned nan, which is not a finite number"),
        ("np.float32('-inf')", "ValueError: it returned -inf, which is not a finite number"),
        (
            "{'score': torch.tensor(float('nan')), 'acc': 1}",
            "ValueError: it returned nan, which is not a finite number",
        ),
        ("{'reward': 1.0}", "KeyError: 'score'"),
        ("10**400", "OverflowError: int too large to convert to float"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("grade('x')", "ArithmeticError: no answer in x (reward.py:9)"),
        ("next(iter([]))", "RuntimeError: the reward function raised StopIteration"),
        ("sys.exit(3)", "SystemExit: 3"),
        (r"grade('\x1b[2J\ud800\x00')", "ArithmeticError: no answer in ?[2J?? (reward.py:9)"),
        ("Decimal('x')", "InvalidOperation"),
    ],
)
def test_a_reward_that_fails_is_counted_and_names_its_function(worker, tmp_path, expression, error):
    made = worker(expression)
    with pytest.raises(RewardError) as raised:
        made.run(asyncio.wait_for(made.compute_score(row(0)), 20))
    text = str(raised.value)
    assert f"reward.custom_reward_function={tmp_path}/reward.py:compute_score: " in text and error in text
    assert "\n" not in text and len(text) < 800
    assert made.run(made.take_tally()) == Tally(1, 1, text)
    assert made.run(made.take_tally()) == Tally()


def test_asynchronous_reward_functions_are_counted_alike(worker):
    made = worker("np.bool_(True)", "1 / 0", name="compute_score_async")
    assert made.run(made.compute_score(row(0)))["reward_score"] == 1.0
    with pytest.raises(RewardError, match="compute_score_async: ZeroDivisionError"):
        made.run(made.compute_score(row(1)))


def test_a_batch_has_an_answer_per_response(worker):
    made = worker("1", "1 / 0", "grade('y')")
    first, second, third = made.run(made.compute_scores(rows(3)))
    assert first["reward_score"] == 1.0 and isinstance(second, RewardError) and isinstance(third, RewardError)
    tally = made.run(made.take_tally())
    # Whichever came first.
    assert (tally.asked, tally.failed) == (3, 2) and tally.first in (str(second), str(third))
    assert "ZeroDivisionError" in str(second) and "no answer in y" in str(third)
    whole = Tally(1, 0) + tally + Tally(5, 1, "later")
    assert (whole.asked, whole.failed, whole.first) == (9, 3, tally.first)


def test_failures_that_verls_rate_limited_manager_grades_0_are_counted(worker):
    answers = ("grade('x')", "time.sleep(2)", "{'score': 1, 'error': 'of the user', 'acc': 1}")
    made = worker(*answers, manager="rate_limited")
    assert [made.run(made.compute_score(row(i)))["reward_score"] for i in range(3)] == [0.0, 0.0, 1.0]
    tally = made.run(made.take_tally())
    assert (tally.asked, tally.failed) == (3, 2) and "no answer in x" in tally.first


def test_a_call_that_verls_rate_limited_manager_gives_up_does_not_go_on(worker):
    made = worker("asyncio.sleep(60)", name="compute_score_async", manager="rate_limited")
    assert made.run(made.compute_score(row(0)))["reward_score"] == 0.0
    made.run(asyncio.sleep(0))
    assert asyncio.all_tasks(made.loop) == {made._beating}


@pytest.mark.parametrize(
    "name, hang", [("compute_score", "time.sleep(60)"), ("compute_score_async", "asyncio.sleep(60)")]
)
def test_a_reward_that_hangs_fails_and_the_others_are_graded(worker, name, hang):
    """More of them than there are threads, each of which would wait for ever."""
    made, started = worker(*[hang] * 40, "1", name=name, timeout=0.5), time.monotonic()
    *hung, last = made.run(made.compute_scores(rows(41)))
    assert last["reward_score"] == 1.0 and all(isinstance(error, RewardError) for error in hung)
    assert "TimeoutError: no answer in 0.5 s (verl_ext.reward_timeout)" in str(hung[0])
    tally = made.run(made.take_tally())
    assert (tally.asked, tally.failed) == (41, 40) and time.monotonic() - started < 30


@pytest.fixture
def reward_model(worker):
    def serve(answer):
        """A worker that asks the reward model at an address where ``answer`` serves."""
        made = worker("1", timeout=1)
        server = made.run(asyncio.start_server(answer, "127.0.0.1", 0))
        made.reward_router_address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        made._asks_model = made.config.reward.reward_model.enable = True
        made.config.reward.custom_reward_function.path = None

        async def disrm(data):
            return {"reward_score": (await made._post_request({}, "classify"))["score"]}

        made.compute_score_disrm = disrm
        return made

    return serve


def test_a_reward_model_that_answers_nothing_fails(reward_model):
    async def silent(reader, writer):
        await asyncio.sleep(60)

    made, started = reward_model(silent), time.monotonic()
    found = made.run(made.compute_scores(rows(3)))
    assert all("the reward model answered nothing for 1 s (verl_ext.reward_timeout)" in str(e) for e in found)
    assert time.monotonic() - started < 20 and made.run(made.take_tally()).failed == 3


def test_a_reward_model_with_a_long_queue_does_not(reward_model):
    turn = asyncio.Semaphore(1)

    async def slow(reader, writer):
        async with turn:
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.3)
            body = b'{"score": 0.5}'
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            writer.close()

    made = reward_model(slow)
    assert [found["reward_score"] for found in made.run(made.compute_scores(rows(8)))] == [0.5] * 8


def test_time_in_the_queue_is_not_the_rewards(worker):
    made = worker(*["time.sleep(0.1) or 1"] * 30, timeout=2)
    # In turn, so that the last waits for longer than a reward may take.
    made.loop.set_default_executor(ThreadPoolExecutor(1))
    assert all(result["reward_score"] == 1.0 for result in made.run(made.compute_scores(rows(30))))


KEEPS_THE_LOCK = """
import asyncio, re
from types import SimpleNamespace
from verl_ext.training import reward_loop

async def main():
    worker = object.__new__(reward_loop.CountingRewardWorker)
    worker._running = 1
    beating = asyncio.ensure_future(worker._beat(3.0))
    await asyncio.sleep(5)
    print("alive", flush=True)
    re.fullmatch("(a+)+b", "a" * 60)

reward_loop.BEAT = 0.2
asyncio.run(main())
"""


def test_a_process_whose_reward_keeps_pythons_lock_ends_and_says_where():
    done = subprocess.run([sys.executable, "-c", KEEPS_THE_LOCK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "alive" in done.stdout
    assert "Timeout (0:00:03)!" in done.stderr and "in fullmatch" in done.stderr


def test_one_sign_of_life_serves_all_rewards(worker, monkeypatch):
    """A task and a thread of each would stay behind for a while."""
    monkeypatch.setattr(module, "BEAT", 1000.0)
    made = worker(*["1"] * 50)
    for i in range(50):
        made.run(made.compute_score(row(i)))
    assert len(asyncio.all_tasks(made.loop)) == 1


def test_signs_of_life_end_with_the_rewards_and_begin_again(worker, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    made, beating = worker("1"), []
    for _ in range(2):
        made.run(made.compute_score(row(0)))
        beating.append(made._beating)
        made.run(made._beating)
    assert beating[0] is not beating[1]


@pytest.mark.parametrize("seconds", [0, -1, "long", None, True, float("inf"), float("nan"), 10**10])
def test_a_time_limit_is_a_number_of_seconds(seconds):
    with pytest.raises(ValueError, match="verl_ext.reward_timeout=.* must be a number of seconds above 0"):
        reward_timeout(OmegaConf.create({"verl_ext": {"reward_timeout": seconds}}))
    assert reward_timeout(OmegaConf.create({"trainer": {}})) is None


def test_a_worker_that_has_ended_is_told_with_the_reward_function(monkeypatch):
    def get(calls):
        raise ray.exceptions.ActorDiedError()

    manager = object.__new__(CountingRewardManager)
    manager.config = OmegaConf.create(
        {"verl_ext": {}, "reward": {"custom_reward_function": {"path": "mine.py", "name": "score"}}}
    )
    manager.reward_loop_workers = [SimpleNamespace(take_tally=SimpleNamespace(remote=lambda: "call"))]
    monkeypatch.setattr(ray, "wait", lambda calls, **options: (calls, []))
    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(
        RuntimeError, match="rewards by .*=mine.py:score has ended: it crashed, was killed, or .*=300 s"
    ):
        manager.take_tally()
