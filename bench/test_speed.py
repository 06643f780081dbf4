"""Speed of one update and of acting, beside the official implementation where a checkout of it is given.

    pytest bench/
    OMP_NUM_THREADS=1 pytest bench/ --official CHECKOUT

HalfCheetah's shapes, batch 256, N = 5, the settings of halfcheetah-medium-v2. Each group times the same work.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dql

STATE_DIM, ACTION_DIM, ROWS = 17, 6, 100_000
UPDATES = 5  # in one timed call


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((ROWS, STATE_DIM)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (ROWS, ACTION_DIM)).astype(np.float32),
        "next_observations": rng.standard_normal((ROWS, STATE_DIM)).astype(np.float32),
        "rewards": rng.standard_normal(ROWS).astype(np.float32),
        "terminals": np.zeros(ROWS, bool),
    }


def agent() -> dql.DiffusionQL:
    torch.manual_seed(0)
    return dql.DiffusionQL(STATE_DIM, ACTION_DIM, dql.Args(env_id="halfcheetah-medium-v2"))


@pytest.fixture
def official(request: pytest.FixtureRequest):
    path = request.config.getoption("--official")
    if path is None:
        pytest.skip("no --official CHECKOUT")
    sys.path.insert(0, str(path))
    from agents.ql_diffusion import Diffusion_QL

    device = str(dql.choose_device("auto"))
    settings = {"beta_schedule": "vp", "n_timesteps": 5, "grad_norm": 9.0}
    return Diffusion_QL(STATE_DIM, ACTION_DIM, 1.0, device, 0.99, 0.005, **settings)


@pytest.mark.benchmark(group=f"{UPDATES} updates")
def test_update_ours(benchmark) -> None:
    ours = agent()
    data = dql.make_batch(arrays(), "none", ours.device)
    generator, bar = torch.Generator(ours.device).manual_seed(0), SimpleNamespace(update=lambda: None)
    row = benchmark(lambda: dql.update_until(UPDATES, 0, ours, data, generator, bar))
    assert np.isfinite([row[name] for name in dql.LOSS_NAMES]).all()


@pytest.mark.benchmark(group=f"{UPDATES} updates")
def test_update_official(benchmark, official) -> None:
    from utils.data_sampler import Data_Sampler

    data = Data_Sampler(arrays(), official.device)
    metric = benchmark(lambda: official.train(data, UPDATES, 256))
    assert np.isfinite(metric["actor_loss"]).all()


@pytest.mark.benchmark(group="act: 10 states, 50 candidates each")
def test_act_ours(benchmark) -> None:
    ours = agent()
    generator, states = torch.Generator(ours.device).manual_seed(0), torch.randn(10, STATE_DIM, device=ours.device)
    actions = benchmark(lambda: ours.act(states, ours.draw_act(10, generator)).cpu())
    assert actions.shape == (10, ACTION_DIM)


@pytest.mark.benchmark(group="act: 10 states, 50 candidates each")
def test_act_official(benchmark, official) -> None:
    """It takes one state a call."""
    states = np.random.default_rng(0).standard_normal((10, STATE_DIM))
    actions = benchmark(lambda: [official.sample_action(state) for state in states])
    assert np.shape(actions) == (10, ACTION_DIM)
