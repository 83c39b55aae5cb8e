import base64
import hashlib
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from hf_checkpoints import add_tokenizer, make_checkpoint
from tiny_runs import decoder, write_run

from ping_llm.cli import cli
from ping_llm.errors import CheckpointError, ConfigError
from ping_llm.extraction.run import extract_activations
from ping_llm.ingest.prepare import prepare_data
from ping_llm.sae.autoencoder import SparseAutoencoder
from ping_llm.sae.inspection import inspect_sae
from ping_llm.sae.loop import train_sae
from ping_llm.simulation.simulate import simulate


def identity(width, **metadata):
    """Returns the autoencoder that rebuilds everything: the dimensions and their opposites."""
    eye = jnp.eye(width)
    params = {"W_enc": jnp.concatenate([eye, -eye], axis=1), "W_dec": jnp.concatenate([eye, -eye])}
    params |= {"b_enc": jnp.zeros(2 * width), "b_dec": jnp.zeros(width)}
    config = {"architecture": "standard", "d_in": width, "d_sae": 2 * width}
    return SparseAutoencoder(config | {"metadata": metadata}, params)


def described(store, layer=1, site="residual", **more):
    return {"store": {"url": str(store)}, "site": site, "layer": layer, **more}


@pytest.fixture(scope="module")
def latency(tmp_path_factory):
    """A run, a store of its activations, and an autoencoder trained on that for some steps."""
    place = tmp_path_factory.mktemp("latency")
    simulate(place / "pings.parquet", probes=12, days=1.0, measurements=500, seed=0)
    prepare_data(place / "pings.parquet", output=place / "rows")
    write_run(place / "run", place / "rows")
    given = {"format": "measurements", "sites": "attn,mlp,residual", "layers": "0,1", "limit": 30}
    extract_activations(place / "run", place / "rows", place / "acts", max_length=128, **given)
    small = {"layer": (1,), "features": 64, "k": 4, "batch_size": 128, "steps": 20}
    train_sae(place / "acts", place / "sae", **small, overrides=["held_out_tokens=300"])
    return place


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A Qwen2 checkpoint, and a store of its activations over 20 short texts."""
    place = tmp_path_factory.mktemp("language")
    add_tokenizer(make_checkpoint(place / "qwen2"))
    texts = [f"the cat and dog number {i} of <b>them</b>" for i in range(20)]
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    given = {"sites": "residual", "layers": "1", "max_length": 64}
    extract_activations(place / "qwen2", place / "texts.jsonl", place / "acts", **given)
    return place


@pytest.mark.parametrize(
    ("site", "layer"),
    [
        *(("embed", None), ("heads", 1), ("attn", 0), ("mlp_inner", 0), ("mlp", 1)),
        *(("residual", 0), ("final_norm", None)),
    ],
)
def test_a_site_can_be_replaced_by_what_it_held_and_by_something_else(site, layer):
    graphdef, params = decoder()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 267, (2, 12)))
    args = tokens, jnp.ones_like(tokens), jnp.tile(jnp.arange(12), (2, 1))

    @jax.jit
    def run(factor):
        model, held = nnx.merge(graphdef, params), []

        def replace(x):
            held.append(x)
            return x.at[:, 5].multiply(factor)

        logits = model.logits_with(*args, site=site, layer=layer, replace=replace)
        meant = model.activations(*args, sites=(site,), of_layers=(layer or 0,))[site][0]
        return logits, model(*args), held[0], meant

    same, plain, held, meant = run(1.0)
    np.testing.assert_allclose(same, plain, atol=1e-5)
    np.testing.assert_allclose(held, meant, atol=1e-5)
    changed = jnp.abs(run(0.0)[0] - same).max(axis=(0, 2)) > 1e-4
    assert not changed[:5].any()  # nothing flows back
    assert changed[5]


@pytest.mark.parametrize(("site", "layer"), [("residual", 1), ("mlp", 0), ("attn", 1)])
def test_what_rebuilds_everything_loses_nothing(latency, tmp_path, site, layer):
    identity(32, **described(latency / "acts", layer, site)).save(tmp_path)
    result = inspect_sae(tmp_path, model=str(latency / "run"), features=2)
    assert result.explained_variance == pytest.approx(1.0, abs=1e-6)
    assert not result.held_out
    assert {"all", "rtt", "destination"} <= result.losses.keys()
    for loss in result.losses.values():
        assert loss.autoencoder == pytest.approx(loss.model, abs=1e-5)
    assert result.losses["all"].zero != pytest.approx(result.losses["all"].model, abs=1e-4)
    parts = [loss for name, loss in result.losses.items() if name != "all"]
    assert sum(part.targets for part in parts) == result.losses["all"].targets
    mean = sum(p.model * p.targets for p in parts) / result.losses["all"].targets
    assert mean == pytest.approx(result.losses["all"].model, rel=1e-5)


def test_a_trained_autoencoder_is_described(latency, tmp_path):
    page = tmp_path / "features.html"
    result = inspect_sae(latency / "sae" / "residual.00001", report=page, features=5, contexts=2)
    assert result.held_out
    assert result.architecture == "batchtopk"
    assert 0 < result.explained_variance < 1
    assert result.losses["rtt"].targets > 0
    for report in result.features:
        assert 0 < report.density < 1
        assert report.associations[0].property == "place"
        assert len(report.associations) == 7
        assert len(report.neighbours) == 3
        for context in report.contexts:
            strongest = context.strengths[context.strongest]
            assert strongest == max(context.strengths[context.strongest], 0)
            assert strongest <= report.maximum * (1 + 1e-5)
            assert context.caption.startswith("MEASUREMENT_START")
        assert report.contexts[0].strengths[report.contexts[0].strongest] == pytest.approx(
            report.maximum, rel=1e-5
        )
    text = page.read_text()
    assert f'id="f{result.features[0].feature}"' in text
    (known,) = re.findall(r"script-src 'sha256-([^']+)'", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert known == base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "://" not in re.sub(r'src="data:[^"]*"', "", text)


def test_text_is_shown_as_text(language, tmp_path):
    identity(32, **described(language / "acts")).save(tmp_path / "sae")
    result = inspect_sae(tmp_path / "sae", features=3, report=tmp_path / "page.html")
    assert result.losses["all"].autoencoder == pytest.approx(result.losses["all"].model, abs=1e-5)
    assert list(result.losses) == ["all"]
    shown = "".join(text for report in result.features for text in report.contexts[0].tokens)
    assert "cat" in shown
    assert "<b>" in shown
    assert "<b>" not in (tmp_path / "page.html").read_text()
    assert result.features[0].associations == []


def test_without_its_model_the_rest_is_told(language, tmp_path, capsys):
    away = shutil.copytree(language, tmp_path / "away")
    manifest = (away / "acts" / "manifest.json").read_text()
    assert str(language) in manifest
    identity(32, **described(away / "acts")).save(tmp_path / "sae")
    (language / "qwen2").rename(language / "hidden")
    try:
        result = inspect_sae(tmp_path / "sae", features=1)
    finally:
        (language / "hidden").rename(language / "qwen2")
    assert result.losses is None
    assert result.explained_variance == pytest.approx(1.0, abs=1e-6)
    assert "its loss is not measured" in capsys.readouterr().err


def test_what_does_not_go_together_is_refused(latency, language, tmp_path):
    sae = latency / "sae" / "residual.00001"
    with pytest.raises(ConfigError, match="is not the model whose activations the store holds"):
        inspect_sae(sae, model=str(language / "qwen2"))
    with pytest.raises(CheckpointError, match="give the directory of one layer"):
        inspect_sae(latency / "sae")
    with pytest.raises(ConfigError, match="layer=7; it has"):
        inspect_sae(sae, layer=7)
    identity(8, **described(latency / "acts")).save(tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"width 8, those in .* have 32"):
        inspect_sae(tmp_path / "narrow")
    identity(32).save(tmp_path / "nameless")
    with pytest.raises(ConfigError, match="give --activations, --site and --layer"):
        inspect_sae(tmp_path / "nameless")


def test_damaged_and_foreign_files_are_told(latency, tmp_path):
    copy = shutil.copytree(latency / "sae" / "residual.00001", tmp_path / "copy")
    weights = bytearray((copy / "sae_weights.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "sae_weights.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="is not a sound safetensors file"):
        SparseAutoencoder.load(copy)
    (copy / "sae_weights.safetensors").write_bytes(weights[:40])
    with pytest.raises(CheckpointError, match="is not a sound safetensors file"):
        SparseAutoencoder.load(copy)
    config = json.loads((copy / "cfg.json").read_text())
    for change, message in [
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' is not read"),
        ({"architecture": "transcoder"}, "architecture='transcoder' is not read"),
        ({"d_in": "32"}, "is damaged"),
        ({"metadata": 3}, "is damaged"),
        ({"d_sae": 65}, "has shape"),
    ]:
        (copy / "cfg.json").write_text(json.dumps(config | change))
        if change == {"d_sae": 65}:
            shutil.copy(latency / "sae" / "residual.00001" / "sae_weights.safetensors", copy)
        with pytest.raises(CheckpointError, match=message):
            SparseAutoencoder.load(copy)


def test_on_the_command_line(latency):
    sae = str(latency / "sae" / "residual.00001")
    done = CliRunner().invoke(cli, ["inspect-sae", sae, "--features", "2", "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert len(result["features"]) == 2
    assert result["losses"]["rtt"]["targets"] > 0
    done = CliRunner().invoke(cli, ["inspect-sae", sae, "--features", "2"])
    assert "of the variance" in done.stdout
    assert "recovered" in done.stdout
    done = CliRunner().invoke(cli, ["inspect-sae", sae, "--features", "0"])
    assert done.exit_code == 2
    assert "must be at least" in done.output or "must be above 0" in done.output


def test_where_it_cannot_be_measured_the_loss_is_left_out_and_said(latency, tmp_path, capsys):
    given = {"format": "measurements", "sites": "q,residual", "layers": "1", "limit": 30}
    acts = tmp_path / "acts"
    extract_activations(
        latency / "run", latency / "rows", acts, max_length=128, positions="every-2", **given
    )
    identity(32, **described(acts)).save(tmp_path / "sae")
    result = inspect_sae(tmp_path / "sae", model=str(latency / "run"), features=1)
    assert result.losses is None
    assert (
        "the store lacks some tokens: the model's loss is not measured" in capsys.readouterr().err
    )
    assert result.features[0].associations == []
    assert result.explained_variance == pytest.approx(1.0, abs=1e-6)
