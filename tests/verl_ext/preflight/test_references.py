"""Files, models, modules and functions that settings name: what is not there or does not fit is found."""

import re
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_ext.preflight import composition
from verl_ext.preflight.checks import Needs, refuse
from verl_ext.preflight.composition import Run
from verl_ext.preflight.references import check_code, check_imports, check_paths
from verl_ext.preflight.rows import check_data_files

MODEL, ROLLOUT, REWARD = "actor_rollout_ref.model", "actor_rollout_ref.rollout", "reward.custom_reward_function"
RESUME = "trainer.resume_from_path"
TAKES = "data_source, solution_str, ground_truth, extra_info=None"


@pytest.fixture(scope="module")
def config() -> DictConfig:
    return composition.compose(["algorithm=disco", "+experiment=deepseek_qwen_1_5b"]).config


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With reward functions and what else settings may name."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "plain.py": f"def score({TAKES}, *, weight: float = 1.0): return weight\n",
        "catches.py": f"def score({TAKES}, timeout=3, **kwargs): return 1.0\n",
        "needed.py": "def score(data_source, solution_str, ground_truth, extra_info, bonus): return bonus\n",
        "reads.py": f"def score({TAKES}, **kwargs): return kwargs.get('bonus', 1.0)\n",
        "short.py": "def score(solution, truth): return 1.0\n",
        "broken.py": "def score(:\n",
        "exits.py": "import sys; sys.exit(3)\n",
        "needs.py": f"import no_such_package_here\ndef score({TAKES}): return 1.0\n",
        "number.py": "score = 1.0\n",
        "tools.yaml": "tools: []\n",
    }.items():
        (tmp_path / name).write_text(text)
    for name in ("empty", "steps/global_step_5"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def run_of(config: DictConfig) -> Run:
    run = Run(config, config)
    # Resolved already.
    run.config = config
    return run


def findings(config: DictConfig, *overrides: str) -> list:
    edited = config.copy()
    OmegaConf.set_struct(edited, False)
    edited.merge_with(OmegaConf.from_dotlist(list(overrides)))
    run = run_of(edited)
    return [*check_code(run), *check_paths(run), *check_imports(run)]


@pytest.mark.parametrize(
    "overrides, problem, fix",
    [
        ([f"{MODEL}.path=/nope"], "model.path=/nope: there is no such folder", "give an existing folder"),
        ([f"{MODEL}.path=~/nope"], "model.path=~/nope: there is no such folder", ""),
        ([f"{MODEL}.path=./nope"], "model.path=./nope: there is no such folder", ""),
        ([f"{MODEL}.path=a/b/c"], "model.path=a/b/c: there is no such folder", ""),
        ([f"{MODEL}.path=empty"], "model.path=empty: the folder has no config.json", ""),
        ([f"{MODEL}.path=plain.py"], "model.path=plain.py: there is no such folder", ""),
        ([f"{MODEL}.tokenizer_path=/nope"], "tokenizer_path=/nope: there is no such folder", ""),
        ([f"{MODEL}.external_lib=nope_lib"], "external_lib=nope_lib: there is no such module", ""),
        (
            ["actor_rollout_ref.actor.optim.optimizer_impl=torch.optimm"],
            "optimizer_impl=torch.optimm: there is no",
            "fix",
        ),
        ([f"{MODEL}.custom_chat_template=/x.jinja"], "is not a Jinja template", "give the template's text"),
        ([f"{ROLLOUT}.multi_turn.tool_config_path=/nope.yaml"], "/nope.yaml: there is no such file", ""),
        ([f"{ROLLOUT}.agent.agent_loop_config_path=nope.yaml"], "nope.yaml: there is no such file", ""),
        (["trainer.checkpoint_callback_class=nope.Callback"], "nope.Callback: there is no such module", ""),
        (
            ["verl_ext.validator=recipe.disco.validate.valdate"],
            "verl_ext.validator=valdate is not in pkg://recipe.disco.validate",
            "nearest: validate",
        ),
        (["trainer.resume_mode=resume_path"], "resume_from_path=null does not name a checkpoint", "give a checkpoint"),
        (
            ["trainer.resume_mode=resume_path", f"{RESUME}=/nope/global_step_5"],
            "global_step_5: there is no such folder",
            "",
        ),
        ([f"{RESUME}=steps/global_step_5"], "is read only with trainer.resume_mode=resume_path", ""),
        (["data.custom_cls.path=/nope.py", "data.custom_cls.name=Mine"], "path=/nope.py: there is no such file", ""),
        ([f"{REWARD}.path=/nope.py"], f"{REWARD}.path=/nope.py: there is no such file", "give an existing one"),
        ([f"{REWARD}.path=pkg://verl_ext.tasks.maths"], "tasks.maths: there is no such module", ""),
        ([f"{REWARD}.name=compute_scores"], f"{REWARD}.name=compute_scores is not in pkg", "nearest: compute_score"),
        ([f"{REWARD}.path=broken.py", f"{REWARD}.name=score"], "broken.py cannot be imported: SyntaxError", ""),
        ([f"{REWARD}.path=exits.py", f"{REWARD}.name=exit"], "exits.py cannot be imported: SystemExit", ""),
        ([f"{REWARD}.path=number.py", f"{REWARD}.name=score"], "score of number.py cannot be called", ""),
        ([f"{REWARD}.path=needed.py", f"{REWARD}.name=score"], "missing a required argument: 'bonus'", ""),
        (
            ["reward.reward_manager.source=importlib", "reward.reward_manager.module.path=/nope.py"],
            "reward.reward_manager.module.path=/nope.py: there is no such file",
            "",
        ),
        ([f"{REWARD}.path=short.py", f"{REWARD}.name=score"], "does not fit verl's call", ""),
        ([f"{REWARD}.reward_kwargs.timeout=0"], "reward_kwargs.timeout must be positive", ""),
        ([f"{REWARD}.reward_kwargs.timeout=abc"], "reward_kwargs.timeout=abc is wrong", "use a number"),
        ([f"{REWARD}.reward_kwargs.require_think=nope"], "require_think=nope is wrong", "use true or false"),
        ([f"{REWARD}.reward_kwargs.tiemout=5"], "reward_kwargs.tiemout is read by nothing", "nearest: timeout"),
        ([f"{REWARD}.reward_kwargs.ground_truth=5"], "ground_truth would replace what verl passes", "leave it out"),
        (
            [f"{REWARD}.path=plain.py", f"{REWARD}.name=score", f"{REWARD}.reward_kwargs.wieght=2"],
            "reward_kwargs.wieght is read by nothing",
            "nearest: weight",
        ),
        (
            [f"{REWARD}.path=catches.py", f"{REWARD}.name=score", f"{REWARD}.reward_kwargs.bonus=2"],
            "reward_kwargs.bonus is read by nothing",
            "it has timeout",
        ),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_named(config, folder, overrides, problem, fix):
    (finding,) = findings(config, *overrides)
    assert problem in finding.problem and not finding.warning
    assert finding.fix.startswith(fix) and finding.fix


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [f"{MODEL}.path=Qwen/Qwen3-4B"],
        [f"{MODEL}.path=gpt2"],
        [f"{MODEL}.path=hdfs://host/a/b/c"],
        [f"{MODEL}.custom_chat_template='{{{{ messages[0].content }}}}'"],
        [f"{ROLLOUT}.multi_turn.tool_config_path=tools.yaml"],
        ["trainer.resume_mode=resume_path", f"{RESUME}=steps/global_step_5"],
        [f"{REWARD}.path=null"],
        [f"{REWARD}.path=plain.py", f"{REWARD}.name=score", f"{REWARD}.reward_kwargs.weight=2"],
        [f"{REWARD}.path=reads.py", f"{REWARD}.name=score", f"{REWARD}.reward_kwargs.bonus=2"],
        [f"{REWARD}.path=needed.py", f"{REWARD}.name=score", f"{REWARD}.reward_kwargs.bonus=2"],
        [f"{REWARD}.reward_kwargs.timeout=2.5", f"{REWARD}.reward_kwargs.require_think=false"],
    ],
)
def test_what_is_there_and_fits_is_no_finding(config, folder, overrides):
    assert findings(config, *overrides) == []


def test_what_a_reward_imports_may_be_on_the_nodes_that_train(config, folder):
    (finding,) = findings(config, f"{REWARD}.path=needs.py", f"{REWARD}.name=score")
    assert finding.warning and "No module named 'no_such_package_here'" in finding.problem


@pytest.mark.parametrize(
    "setting, value",
    [
        (f"{REWARD}.path", "/nope.py"),
        (f"{REWARD}.path", "pkg://verl_ext.tasks.maths"),
        (f"{REWARD}.name", "compute_scores"),
        ("verl_ext.prepare", "verl_ext.tasks.arithmetic.assets.ensure"),
        (f"{MODEL}.external_lib", "nope_lib"),
        (f"{MODEL}.path", "/nope"),
        (f"{ROLLOUT}.multi_turn.tool_config_path", "/nope.yaml"),
        ("data.train_files", "/nope.parquet"),
    ],
)
def test_a_start_refuses_what_is_not_there_with_the_doctors_words(config, folder, setting, value):
    edited = config.copy()
    OmegaConf.update(edited, setting, value, force_add=True)
    run = run_of(edited)
    (finding,) = [f for f in [*check_code(run), *check_paths(run), *check_data_files(run)] if setting in f.problem]
    with pytest.raises(ValueError, match=re.escape(f"{finding.problem}; {finding.fix}")):
        refuse(run, Needs.CODE, Needs.FILES)


def test_a_start_does_not_import_what_settings_name(config, folder):
    edited = config.copy()
    for path, name in (("exits.py", "exit"), ("pkg://verl_ext.tasks.math.reward", "compute_score"), (None, None)):
        OmegaConf.update(edited, f"{REWARD}.path", path)
        OmegaConf.update(edited, f"{REWARD}.name", name)
        refuse(run_of(edited), Needs.CODE)


@pytest.mark.parametrize(
    "ray", [{"address": "ray://10.0.0.1:10001"}, {"runtime_env": {"working_dir": "/elsewhere"}}, {"address": None}]
)
def test_what_is_the_clusters_is_not_looked_for_here(config, folder, ray):
    edited = config.copy()
    OmegaConf.update(edited, "ray_kwargs.ray_init", ray, force_add=True)
    OmegaConf.update(edited, f"{REWARD}.path", "nope.py")
    OmegaConf.update(edited, "data.train_files", "nope.parquet")
    run = run_of(edited)
    found = [f.problem for f in [*check_code(run), *check_data_files(run)] if "nope" in f.problem]
    assert len(found) == (0 if any(ray.values()) else 2)
