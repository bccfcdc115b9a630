"""Record files from Python and from the command line."""

import pytest
from conftest import as_json, offline_environment

import moerun
from moerun.errors import InvalidArgumentError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOERUN_CACHE", str(tmp_path / "packs"))
    return tmp_path / "packs"


def text_of(**options):
    with moerun.Model.load(**options) as model:
        return list(model.generate([1, 2, 3], max_new_tokens=12, temperature=0)), model.stats()[
            "logits_hash"
        ]


def test_a_pack_changes_no_bit_and_is_removed_by_one_call(folder):
    assert moerun.pack_folder() == folder
    assert text_of(expert_budget="30%", split=0.4, pack=True) == text_of()
    (file,) = folder.iterdir()
    size = file.stat().st_size
    assert moerun.remove_pack() == size
    assert not list(folder.iterdir())
    assert moerun.remove_pack() == 0


def test_a_pack_may_lie_in_another_folder(folder, tmp_path):
    other = tmp_path / "other"
    assert text_of(expert_budget="30%", pack=other) == text_of()
    assert not folder.exists()
    assert moerun.remove_pack(folder=other) > 0


def test_no_pack_is_written_where_every_expert_fits(folder):
    text_of(pack=True)
    assert not folder.exists()


@pytest.mark.parametrize("wrong", [1, 0.5, "", [True]])
def test_other_values_are_refused(wrong):
    with pytest.raises(InvalidArgumentError, match="pack must be"):
        moerun.Model.load(expert_budget="30%", pack=wrong)


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MOERUN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert moerun.pack_folder() == tmp_path / "moerun"


def test_the_command_line_packs_and_removes(folder, run_cli):
    env = offline_environment(MOERUN_CACHE=str(folder))
    options = ["--expert-budget", "30%", "-n", "8", "--json", "import os"]
    plain = as_json(run_cli(*options, env=env))
    packed = as_json(run_cli("--pack", *options, env=env))
    assert packed["stats"]["logits_hash"] == plain["stats"]["logits_hash"]
    assert len(list(folder.iterdir())) == 1
    assert "removed" in run_cli("--remove-pack", env=env).stdout
    assert not list(folder.iterdir())
    assert "no record file" in run_cli("--remove-pack", env=env).stdout


def test_quiet_packing_has_no_progress_bar_to_ask(folder, run_cli):
    env = offline_environment(MOERUN_CACHE=str(folder))
    options = ("-q", "--pack", "--expert-budget", "30%", "--device", "cpu", "-n", "2")
    for more, stdin in ((("import os",), ""), (("--batch", "-"), '"import os"\n')):
        done = run_cli(*options, *more, env=env, stdin=stdin)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        (file,) = folder.iterdir()
        removed = run_cli("--remove-pack", env=env).stdout
        assert removed.startswith(f"removed {file} (")
        assert not list(folder.iterdir())
