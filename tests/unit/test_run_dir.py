"""What changed in a config since a run was started."""

import pytest
import yaml
from small import small_config

from mmd2v.config.load import dump_config, load_config
from mmd2v.data.shards import ShardSet
from mmd2v.errors import UserError
from mmd2v.train.run_dir import CONFIG_FILE, config_changes


def test_changed_values_are_named(tmp_path):
    assert config_changes(tmp_path, small_config()) == []
    (tmp_path / CONFIG_FILE).write_text(dump_config(small_config()))
    assert config_changes(tmp_path, small_config()) == []
    changed = small_config(optimizer__lr=3e-4, steps=5)
    assert config_changes(tmp_path, changed) == ["steps: 2 → 5", "optimizer.lr: 0.0005 → 0.0003"]


SIGNED = "https://reader:word@host/set/{0..3}.tar?X-Signature=abc"


def with_secrets(secret="s3cr3t", address=SIGNED, **changes):
    options = {"anon": False, "key": secret, "client_kwargs": {"headers": {"token": f"{secret} 2"}, "ids": [1234567]}}
    sets = {"one": {"shards": [address, "/local"]}, "two": {"shards": address}}
    train = {"data__train": {"sets": sets}, "data__eval": {"shards": address}}
    return small_config(**train, data__source={"storage_options": options}, **changes)


def test_a_run_directory_holds_no_secret(tmp_path):
    file = tmp_path / CONFIG_FILE
    text = dump_config(with_secrets())
    for secret in ("s3cr3t", "1234567", "word", "reader", "abc"):
        assert secret not in text
    assert "anon: false" in text and "https://host/set/{0..3}.tar?…" in text
    # Read again, it is a config, and the same text: it may go from run to run.
    file.write_text(text)
    again = load_config(file)
    assert dump_config(again) == text
    with pytest.raises(UserError, match=r"data\.source\.storage_options\.key: found <hidden, .*; give it again"):
        ShardSet("memory://set/0.tar", source=again.data.source)
    with pytest.raises(UserError, match=r"shards: found https://host/set/.*\?…, a signed link"):
        ShardSet("https://host/set/0.tar?…")


def test_a_changed_secret_is_a_change_that_is_not_told(tmp_path):
    file = tmp_path / CONFIG_FILE
    file.write_text(dump_config(with_secrets()))
    # Links are signed anew for each start.
    assert config_changes(tmp_path, with_secrets(address=SIGNED.replace("abc", "def"))) == []
    changes = config_changes(tmp_path, with_secrets("another"))
    assert [line.partition(":")[0] for line in changes] == [
        "data.source.storage_options.key",
        "data.source.storage_options.client_kwargs.headers.token",
    ]
    assert "another" not in str(changes) and "s3cr3t" not in str(changes)
    # A file of an earlier version has the secrets themselves.
    file.write_text(yaml.safe_dump(with_secrets().model_dump(mode="json")))
    changes = config_changes(tmp_path, with_secrets("another"))
    assert len(changes) == 2 and "s3cr3t" not in str(changes)
