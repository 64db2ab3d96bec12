"""What changed in a config since a run was started."""

from small import small_config

from mmd2v.config.load import dump_config
from mmd2v.train.run_dir import CONFIG_FILE, config_changes


def test_changed_values_are_named(tmp_path):
    assert config_changes(tmp_path, small_config()) == []
    (tmp_path / CONFIG_FILE).write_text(dump_config(small_config()))
    assert config_changes(tmp_path, small_config()) == []
    changed = small_config(optimizer__lr=3e-4, steps=5)
    assert config_changes(tmp_path, changed) == ["steps: 2 → 5", "optimizer.lr: 0.0005 → 0.0003"]
