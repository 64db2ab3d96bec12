"""Commands that train one after another in one process, as a notebook does."""

from training_runs import make_data, write_config

from mmd2v.cli import main as cli


def test_second_run_begins_in_the_process_of_the_first(tmp_path):
    data = make_data(tmp_path / "data")
    for name in ("first", "second"):
        config = write_config(tmp_path / f"{name}.yaml", data, steps=1, engine__zero_stage=1)
        assert cli.main(["train", str(config)]) == 0
