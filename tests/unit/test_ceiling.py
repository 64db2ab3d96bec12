"""Recall from a score matrix against a plain sort, and the ceiling of a generated world."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmd2v.data.generate import generate
from mmd2v.data.shards import ShardSet
from mmd2v.errors import UserError
from mmd2v.evaluation.ceiling import facts_ceiling, score_recall


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_equals_a_stable_sort(data):
    images = data.draw(st.integers(1, 8))
    owners = np.array(data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=12)))
    cells = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(owners) * images, max_size=len(owners) * images)
    scores = np.array(data.draw(cells)).reshape(len(owners), images)
    found = score_recall(scores, owners)
    text_orders = np.argsort(-scores, axis=1, kind="stable")
    image_orders = np.argsort(-scores.T, axis=1, kind="stable")
    for k in (1, 5, 10):
        text = np.mean([owner in order[:k] for owner, order in zip(owners, text_orders, strict=True)])
        queries = [m for m in range(images) if m in owners]
        image = np.mean([bool(set(image_orders[m][:k]) & set(np.flatnonzero(owners == m))) for m in queries])
        assert found[f"t2i_R@{k}"] == pytest.approx(text)
        assert found[f"i2t_R@{k}"] == pytest.approx(image)


def test_a_generated_world_has_a_high_ceiling_and_other_shards_none(tmp_path):
    generate(tmp_path / "w", split="test", count=60, size=16, seed=0, workers=1)
    ceiling = facts_ceiling(ShardSet(str(tmp_path / "w")))
    assert ceiling["i2t_R@1"] > 0.9 and ceiling["t2i_R@1"] > 0.9
    import json
    import tarfile

    path = tmp_path / "plain.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (("a.jpg", b"x"), ("a.json", json.dumps({"captions": ["one"]}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            import io

            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match="carries no facts"):
        facts_ceiling(ShardSet(str(path)))
