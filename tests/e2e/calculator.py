"""A calculator for verl's tool agent, and an agent whose every turn is a trajectory of its own.

verl loads it into each agent worker by ``actor_rollout_ref.rollout.multi_turn.function_tool_path``.
"""

import json

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
from verl.tools.function_tool import function_tool


@function_tool
def calculate(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: the first number.
        b: the second number.
    """
    return str(a + b)


@ToolParser.register("any_two")
class AnyTwo(ToolParser):
    """An untrained model's way to call the tool: the first two tokens of a turn are added, and every fourth ends it."""

    @property
    def stop_token_ids(self) -> list[int]:
        return list(range(0, len(self.tokenizer), 4))

    async def extract_tool_calls(self, responses_ids, tools=None):
        calls = [FunctionCall(name="calculate", arguments=json.dumps(dict(zip("ab", responses_ids, strict=False))))]
        return self.tokenizer.decode(responses_ids), calls if len(responses_ids) > 1 else []


@register("turn_by_turn")
class TurnByTurn(ToolAgentLoop):
    """verl's tool agent, whose turns are rows: what a turn sees of those before is its prompt."""

    async def run(self, sampling_params, **kwargs) -> list[AgentLoopOutput]:
        whole = await super().run(sampling_params, **kwargs)
        mask, turns, start = whole.response_mask, [], 0
        while start < len(mask):
            if not mask[start]:
                start += 1
                continue
            end = start
            while end < len(mask) and mask[end]:
                end += 1
            prompt = (whole.prompt_ids + whole.response_ids[:start])[-self.prompt_length :]
            logprobs = whole.response_logprobs and whole.response_logprobs[start:end]
            parts = {"prompt_ids": prompt, "response_ids": whole.response_ids[start:end], "response_logprobs": logprobs}
            turns.append(whole.model_copy(update=parts | {"response_mask": [1] * (end - start)}, deep=True))
            start = end
        return turns or [whole]
