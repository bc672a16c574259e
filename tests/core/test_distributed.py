import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qandc_core
from qandc_core.diffusion.noise import ImageNoise, image_seed
from qandc_core.distributed import (
    Distributed,
    all_gather_tensors,
    distributed,
    shard_range,
)

TOTAL, BATCH, SEED = 37, 4, 11


def noise_for(indices, shape, seed):
    return ImageNoise(seed, indices, shape).draw()


# A batch goes through a matmul and a softmax, so unequal batches would show in the last bits.
WORKER = """
import sys
import torch
from qandc_core.evaluation.metrics import FeatureStatistics
from qandc_core.distributed import all_gather_tensors, distributed
from qandc_core.diffusion.noise import ImageNoise

def evaluate(run, total, batch, seed):
    weight = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
    shard, rows = run.shard(total, batch), [torch.empty(0, 6)]
    for start in range(shard.start, shard.stop, batch):
        noise = ImageNoise(seed, range(start, min(start + batch, shard.stop)), (3, 4, 4)).draw()
        rows.append((noise.flatten(1) @ weight).softmax(1))
    local = torch.cat(rows)
    features = all_gather_tensors(local)
    counts = all_gather_tensors(torch.tensor([[run.rank, len(local)]]))
    return {"features": features, "mean": FeatureStatistics.of(features).mean,
            "covariance": FeatureStatistics.of(features).covariance, "counts": counts}

if __name__ == "__main__":
    with distributed() as run:
        results = [evaluate(run, total, 4, 11) for total in (37, 3)]
        torch.save(results, f"{sys.argv[1]}.{run.rank}")
"""


@given(total=st.integers(0, 200), world=st.integers(1, 9), batch=st.integers(1, 12))
def test_shards_cover_every_image_once_in_order_and_in_whole_batches(total: int, world: int, batch: int):
    shards = [shard_range(total, rank, world, batch) for rank in range(world)]
    assert [i for shard in shards for i in shard] == list(range(total))
    assert all(shard.start % batch == 0 or shard.start == total for shard in shards)
    batches = [-(-len(shard) // batch) for shard in shards]
    assert max(batches) - min(batches) <= 1


def test_two_gloo_processes_give_the_numbers_of_one(tmp_path: Path):
    script, out = tmp_path / "worker.py", tmp_path / "out"
    script.write_text(WORKER)
    root = str(Path(qandc_core.__file__).parents[1])
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env = clean | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, str(script), str(out)], env=env, check=True, timeout=300)
    subprocess.run([sys.executable, str(script), str(tmp_path / "single")], env=env, check=True, timeout=300)
    single = torch.load(tmp_path / "single.0", weights_only=True)
    for rank in range(2):
        for together, alone in zip(torch.load(f"{out}.{rank}", weights_only=True), single):
            for name in ("features", "mean", "covariance"):
                assert torch.equal(together[name], alone[name]), (rank, name)
    pair = torch.load(f"{out}.0", weights_only=True)
    assert pair[0]["counts"].tolist() == [[0, 20], [1, 17]]
    # Three images make one batch, which leaves the first rank with none.
    assert pair[1]["counts"].tolist() == [[0, 0], [1, 3]]


def test_without_torchrun_everything_is_rank_0(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed() as run:
        assert (run.rank, run.world) == (0, 1) and not torch.distributed.is_initialized()
        assert run.shard(10) == range(10)
        rows = torch.randn(4, 2)
        assert all_gather_tensors(rows) is rows


def test_shard_of_a_rank():
    assert Distributed(1, 2, torch.device("cpu")).shard(10, batch=4) == range(4, 10)


def test_noise_of_an_image_depends_on_its_index_and_the_seed_alone():
    whole = noise_for(range(8), (3, 4, 4), SEED)
    assert whole.shape == (8, 3, 4, 4) and whole.dtype == torch.float32
    assert torch.equal(noise_for([5, 2], (3, 4, 4), SEED), whole[[5, 2]])
    torch.randn(100)
    assert torch.equal(noise_for(shard_range(8, 1, 3), (3, 4, 4), SEED), whole[2:5])
    assert not torch.equal(noise_for(range(8), (3, 4, 4), SEED + 1), whole)
    assert noise_for([], (3, 4, 4), SEED).shape == (0, 3, 4, 4)


def test_noise_is_standard_normal_and_uncorrelated_between_images():
    noise = noise_for(range(200), (2048,), SEED).double()
    assert float(noise.mean()) == pytest.approx(0, abs=0.01) and float(noise.std()) == pytest.approx(1, abs=0.01)
    correlation = torch.corrcoef(noise).fill_diagonal_(0) * 2048**0.5
    assert float(correlation.std()) == pytest.approx(1, abs=0.05) and float(correlation.abs().max()) < 6


def test_image_seeds_do_not_collide():
    assert 2**32 - 1 >= max(image_seed(i, s) for i in (0, 10**6) for s in (0, 1, 2**31))
    starts = sorted(image_seed(0, seed) for seed in range(1000))
    gaps = [b - a for a, b in zip(starts, [*starts[1:], starts[0] + 2**32])]
    assert min(gaps) > 10**6
