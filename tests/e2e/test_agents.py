"""verl's tool agent, end to end: what a tool says is not trained on, and a session is one response."""

from pathlib import Path

import pytest

CALCULATOR = Path(__file__).parent / "calculator.py"
TURNS = 3


def agent(name: str) -> list[str]:
    rollout = "actor_rollout_ref.rollout"
    return [
        # The experiment's own generates a batch at once, without turns.
        f"{rollout}.agent.agent_loop_manager_class=null",
        f"{rollout}.agent.default_agent_loop={name}",
        f"{rollout}.multi_turn.enable=true",
        f"{rollout}.multi_turn.format=any_two",
        f"{rollout}.multi_turn.function_tool_path={CALCULATOR}",
        f"{rollout}.multi_turn.max_assistant_turns={TURNS}",
        "data.return_raw_chat=true",
        "data.max_prompt_length=96",
        "data.max_response_length=48",
    ]


@pytest.mark.parametrize(
    "name, algorithms",
    [
        ("turn_by_turn", ["disco"]),
        pytest.param("turn_by_turn", ["grpo"], marks=pytest.mark.slow),
        pytest.param("tool_agent", ["disco", "grpo"], marks=pytest.mark.slow),
    ],
)
def test_two_steps_with_a_calculator(main_ppo, tmp_path, name, algorithms):
    run = main_ppo(
        "-m",
        f"algorithm={','.join(algorithms)}",
        "trainer.default_local_dir=" + str(tmp_path / "jobs") + "/${oc.select:verl_ext.algorithm,ppo}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        *agent(name),
        folder=tmp_path / "jobs",
        ranks=2,
    )
    assert run.returncode == 0, run.output[-5000:]
    for algorithm in algorithms:
        steps = run.metrics(algorithm)
        assert len(steps) == 2
        for step in steps:
            # Turns of the model, of the tool, and the question: more than one turn of the model.
            assert 3 < step["num_turns/mean"] <= 2 * TURNS
            assert step["actor/grad_norm"] > 0
            if algorithm == "disco":
                assert step["disco/questions"] == 3
                # Sessions have one to three turns, each a row of its own; or all turns in one row.
                rows = step["disco/rows_per_response"]
                assert 1 < rows < TURNS if name == "turn_by_turn" else rows == 1
