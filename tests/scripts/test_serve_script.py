"""The real serving script, from its first line to its summary."""

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from script_runs import run_script

pytest.importorskip("hydra", reason="hydra is not installed")

from flowpolicy import FlowPolicy
from flowpolicy.acceleration.choosing.plan import DeploymentPlan, MeasuredSampler, hardware
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy.fingerprint import fingerprint
from flowpolicy.serving.client import PolicyClient
from flowpolicy.serving.run import ServeConfig

CHECKPOINT = "benchmarks/checkpoints/hopper-shortcut-seed0"
TOKEN = "a-secret-token"


def command(repo_root, *options):
    script = str(repo_root / "scripts" / "serve.py")
    return [script, f"checkpoint={repo_root / CHECKPOINT}", "backend=eager", "device=cpu", *options]


def test_a_plan_decides_how_its_policy_is_sampled(repo_root, tmp_path):
    policy = FlowPolicy.load(repo_root / CHECKPOINT)
    sampling = SamplerSpec(num_steps=2, solver="euler", backend="eager")
    chosen = MeasuredSampler(sampling, 1.0, 2, {"bound": 1.0}, 0.0)
    plan = DeploymentPlan(
        fingerprint(policy), hardware(1), 8.0, 0.99, 0.1, chosen, None, "cpu", 1, policy.spec.execute_horizon
    )
    file = str(plan.save(tmp_path / "plan.json"))
    checkpoint = str(repo_root / CHECKPOINT)
    assert ServeConfig(checkpoint=checkpoint, plan=file).sampler().sampling.num_steps == 2
    with pytest.raises(ConfigError, match="plan= decides num_steps too"):
        ServeConfig(checkpoint=checkpoint, plan=file, num_steps=4)
    other = str(repo_root / CHECKPOINT.replace("seed0", "seed1"))
    with pytest.raises(CheckpointError, match="another checkpoint"):
        ServeConfig(checkpoint=other, plan=file).sampler()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_script_serves_until_it_is_told_to_end(repo_root, tmp_path, forking_python, number):
    program = subprocess.Popen(
        [forking_python, *command(repo_root, "num_steps=1", "port=0", f"token={TOKEN}", "run_dir=run")],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "FLOWPOLICY_TOKEN": ""},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = []
        for line in program.stderr:
            said.append(line)
            if found := re.search(r"ws://127\.0\.0\.1:(\d+)", line):
                break
        assert found, said
        with PolicyClient("127.0.0.1", int(found.group(1)), TOKEN) as client:
            assert client.metadata["sampling"]["num_steps"] == 1
            for _ in range(5):
                assert client.infer(np.zeros(11))["actions"].shape == (4, 3)
            program.send_signal(number)
            output, errors = program.communicate(timeout=30)
    finally:
        program.kill()
        program.communicate()
    assert program.returncode == 0, errors
    assert output.splitlines()[-1] == str(tmp_path / "run" / "summary.json")
    text = (tmp_path / "run" / "summary.json").read_text()
    summary = json.loads(text)
    assert summary["steps"] == summary["metrics"]["answered"] == 5
    assert 0 < summary["metrics"]["milliseconds"]["p50"] <= summary["metrics"]["milliseconds"]["max"]
    assert summary["task"] == "hopper"
    assert TOKEN not in text + output + errors + "".join(said)
    assert "token_file" in "".join(said)  # the warning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["port=TAKEN"], ["TAKEN", "another program has it"]),
        (["host=0.0.0.0", "port=0"], ["host=0.0.0.0", "allow_anonymous"]),
        (["port=70000"], ["port is 70000"]),
        (["token=short"], ["unusable"]),
        (["prot=8000"], ["'prot'", "'port'"]),
        (["port=0", "num_steps=3"], ["num_steps is 3", "powers of two"]),
    ],
)
def test_a_mistake_is_one_sentence(repo_root, tmp_path, monkeypatch, options, words):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = [option.replace("TAKEN", port) for option in options]
        monkeypatch.setenv("FLOWPOLICY_TOKEN", "")
        script, *settings = command(repo_root)
        done = run_script(
            tmp_path, repo_root, Path(script).name, *settings, *options, "run_dir=run", fails=None
        )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word.replace("TAKEN", port) in last
    assert not (tmp_path / "run").exists()
