"""examples/corpus_dask.py: shards of a folder, by workers of which one is killed, and again after edits."""


import numpy as np
import pytest
from places import ROOT

import edgeattn

GOLDEN = ROOT / "tests/models/golden/sentence-transformer"


def test_a_killed_worker_costs_no_shard_and_what_is_there_is_not_computed_again(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="pip install 'edgeattn[dask]'")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'examples'}")  # workers import what this process does
    import corpus_dask

    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    (texts / "a.txt").write_text("\n\n".join(f"the cat sat on mat {i}" for i in range(70)))
    (texts / "b.md").write_text("a dog ran\n\nthe dog\nsat")
    with (distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
          distributed.Client(cluster) as client):
        made = corpus_dask.run(texts, out, GOLDEN, client, lambda: corpus_dask.end_a_worker(client))
        assert sorted(made.values()) == [8, 32, 32]
        model = edgeattn.load(out / "model.safetensors")
        np.testing.assert_array_equal(corpus_dask.read_shards(out), model.encode(corpus_dask.paragraphs(texts)))
        assert corpus_dask.run(texts, out, GOLDEN, client) == {}
        (texts / "b.md").write_text("a dog ran\n\nthe dog sits")
        assert list(corpus_dask.run(texts, out, GOLDEN, client).values()) == [8]
        next(out.glob("00001-*")).unlink()  # a run that ended before it
        assert list(corpus_dask.run(texts, out, GOLDEN, client).values()) == [32]
    np.testing.assert_array_equal(corpus_dask.read_shards(out), model.encode(corpus_dask.paragraphs(texts)))
