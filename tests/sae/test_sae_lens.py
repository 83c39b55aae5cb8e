"""What SAELens makes of our files. Runs where it is installed: `nox -s sae_lens`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_autoencoders import KINDS, autoencoder

from ping_llm.sae.autoencoder import SparseAutoencoder

sae_lens = pytest.importorskip("sae_lens")


@pytest.mark.parametrize("kind", KINDS)
def test_sae_lens_rebuilds_what_we_rebuild(kind, tmp_path):
    import torch

    ours = autoencoder(kind)
    ours.save(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    tokens = 3 * jax.random.normal(jax.random.key(1), (256, ours.config["d_in"])) + 1
    given = torch.from_numpy(np.array(tokens))
    features = theirs.encode(given).detach().numpy()
    np.testing.assert_allclose(features, ours.encode(tokens), atol=1e-5)
    assert 0 < np.count_nonzero(features) < features.size
    np.testing.assert_allclose(theirs(given).detach().numpy(), ours(tokens), atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated", "standard"])
def test_what_sae_lens_saves_is_read(kind, tmp_path):
    import torch

    sizes = {"d_in": 8, "d_sae": 24} | ({"k": 4} if kind == "topk" else {})
    theirs = sae_lens.SAE.from_dict({"architecture": kind, **sizes})
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if name == "r_mag" else 0.5))
    theirs.save_model(tmp_path)
    tokens = torch.randn(64, 8)
    rebuilt = SparseAutoencoder.load(tmp_path)(jnp.asarray(tokens.numpy()))
    np.testing.assert_allclose(rebuilt, theirs(tokens).detach().numpy(), atol=1e-5)
