"""Unknown names: the nearest one, and no flood of names."""

import pytest

from mmd2v.errors import nearest, unknown_name


def test_few_names_are_all_listed():
    assert (
        str(unknown_name("x", "tim", ["timm", "hf"])) == "x: unknown name 'tim'. Did you mean 'timm'? Valid: hf, timm."
    )


def test_of_many_names_only_the_close_ones():
    message = str(unknown_name("x", "model07x", [f"model{i:02d}" for i in range(90)]))
    assert "Did you mean 'model07'?" in message and "90 names are valid, close to it: model07" in message
    assert len(message) < 200


@pytest.mark.parametrize(("name", "valid"), [("MY_SHARDS", ["OMP_NUM_THREADS"])])
def test_no_silly_suggestion(name, valid):
    assert nearest(name, valid) == ""
