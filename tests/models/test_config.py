import json

import pytest

from ping_llm.errors import ConfigError
from ping_llm.models.config import PRESETS, DecoderConfig, RopeScaling
from ping_llm.settings import from_json, to_json

SHAPE = dict(vocab_size=267, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("tiny", 838_144), ("small", 6_495_232), ("base", 111_608_320), ("large", 679_962_624)],
)
def test_a_preset_has_the_parameters_it_states(preset, parameters):
    assert PRESETS[preset].parameter_count() == parameters


def test_a_config_survives_json():
    cfg = DecoderConfig(
        **SHAPE,
        rope_scaling=RopeScaling(factor=4.0, original_max_positions=32_768),
        sliding_window=16,
        sliding_layers=(False, True),
    )
    assert from_json(DecoderConfig, json.loads(json.dumps(to_json(cfg)))) == cfg


def test_only_flagged_layers_slide():
    assert DecoderConfig(**SHAPE).windows is None
    assert DecoderConfig(**SHAPE, sliding_window=16).windows == (16, 16)
    flagged = DecoderConfig(**SHAPE, sliding_window=16, sliding_layers=(False, True))
    assert flagged.windows == (None, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"n_layers": 0}, "n_layers=0 must be above 0"),
        ({"d_model": -1}, "d_model=-1 must be above 0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not a finite number"),
        ({"logit_softcap": 0.0}, "logit_softcap=0.0 must be above 0"),
        ({"sliding_layers": (True,)}, "1 flags for n_layers=2"),
        ({"dtype": "int8"}, "dtype='int8' is not one of float32, bfloat16, float16"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        DecoderConfig(**{**SHAPE, **change})
