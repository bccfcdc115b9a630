import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import offline_environment
from huggingface_hub import errors as hub_errors

from moerun import errors
from moerun.hub import default_model, resolve_model


@pytest.fixture
def downloads(monkeypatch):
    """Replaces the download; holds its arguments, and what it raises or returns."""

    downloads = SimpleNamespace(result=None, arguments={})

    def snapshot_download(repo_id, **arguments):
        downloads.arguments = {"repo_id": repo_id, **arguments}
        if isinstance(downloads.result, Exception):
            raise downloads.result
        return downloads.result

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return downloads


def hub_error(kind, text="first line\nsecond line"):
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


def test_no_name_means_the_shipped_model():
    assert resolve_model(None) == default_model()
    assert (default_model() / "config.json").is_file()


def test_a_directory_is_itself(tmp_path, monkeypatch):
    assert resolve_model(tmp_path) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "name", ["missing", "./org/name", "/no/such/model", "~/no-such-model", "a/b/c", "a/b c"]
)
def test_a_missing_directory_is_not_looked_for_on_the_hub(downloads, name):
    with pytest.raises(errors.MissingFileError, match="there is no directory") as caught:
        resolve_model(name)
    assert name in str(caught.value)
    assert downloads.arguments == {}


def test_a_path_object_is_never_a_repository(downloads):
    with pytest.raises(errors.MissingFileError):
        resolve_model(Path("org/name"))
    assert downloads.arguments == {}


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(errors.FileError, match="directory that holds"):
        resolve_model(file)


def test_an_empty_name_is_refused():
    with pytest.raises(errors.InvalidArgumentError):
        resolve_model("")


def test_a_repository_is_downloaded_without_its_other_formats(downloads, tmp_path):
    downloads.result = str(tmp_path)
    assert resolve_model("org/name-1.0_x") == tmp_path
    files = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "consolidated.safetensors",
        "original/model.safetensors",
        "pytorch_model.bin",
        "README.md",
    ]
    wanted = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=downloads.arguments["allow_patterns"],
        ignore_patterns=downloads.arguments["ignore_patterns"],
    )
    assert list(wanted) == files[:6]


@pytest.mark.parametrize(
    ("kind", "expected_kind", "expected_text"),
    [
        (hub_errors.GatedRepoError, errors.FileError, "accept it"),
        (hub_errors.RepositoryNotFoundError, errors.MissingFileError, "no public model org/name"),
        (hub_errors.LocalEntryNotFoundError, errors.MissingFileError, "hf download org/name"),
        (hub_errors.HfHubHTTPError, errors.FileError, "first line"),
        (OSError, errors.FileError, "first line"),
    ],
)
def test_a_failed_download_says_what_was_tried_and_what_to_do(
    downloads, kind, expected_kind, expected_text
):
    downloads.result = hub_error(kind)
    with pytest.raises(expected_kind) as caught:
        resolve_model("org/name")
    assert expected_text in str(caught.value)
    assert "org/name" in str(caught.value)
    assert "second line" not in str(caught.value)


def test_offline_the_command_names_the_variable_that_forbids_downloads(run_cli, tmp_path):
    done = run_cli("-m", "org/name", "x", env=offline_environment(HF_HOME=str(tmp_path)))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("moe-run: error: there is no directory org/name")
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "hf download org/name" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_connection_the_command_names_the_place_that_does_not_answer(run_cli, tmp_path):
    env = offline_environment(
        HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0"
    )
    done = run_cli("-m", "org/name", "x", env=env)
    assert done.returncode == 1
    assert "http://127.0.0.1:9 does not answer" in done.stderr
    assert "hf download org/name" in done.stderr
    assert done.stderr.count("\n") == 1


def test_offline_a_repository_that_was_downloaded_before_runs(run_cli, tmp_path, default_path):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for file in default_path.iterdir():
        os.symlink(file, snapshot / file.name)
    env = offline_environment(HF_HOME=str(tmp_path))
    done = run_cli("-m", "org/name", "-n", "2", "-q", "import os", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("import os")
