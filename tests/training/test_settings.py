import pytest
from tiny_runs import train_settings

from ping_llm.errors import ConfigError
from ping_llm.models.config import PRESETS, RopeScaling
from ping_llm.settings import refuse_changes, to_json
from ping_llm.tokenizer import FIELDS
from ping_llm.training.settings import TrainSettings


def test_later_sources_win(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text("steps = 7\nbatch_size = 4\nseed = 1\n[model]\nn_layers = 3\nd_ff = 64\n")
    overrides = ["batch_size=16", "seed=2", "model.n_layers=2"]
    cfg = train_settings(*overrides, config_file=toml, preset="small", seed=3)
    assert (cfg.steps, cfg.batch_size, cfg.seed) == (7, 16, 3)
    assert (cfg.model.n_layers, cfg.model.d_ff) == (2, 64)
    assert cfg.model.d_model == PRESETS["small"].d_model
    assert cfg.learning_rate == TrainSettings.presets["small"]["learning_rate"]


def test_a_file_may_name_the_preset(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text('preset = "base"')
    assert train_settings(config_file=toml).model == PRESETS["base"]
    assert train_settings().preset == "tiny"


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("learning_rate=1e-3", "learning_rate", 1e-3),
        ("learning_rate=.5", "learning_rate", 0.5),
        ("weight_decay=0", "weight_decay", 0.0),
        ("mesh=data=2,fsdp=2", "mesh", "data=2,fsdp=2"),
        (" steps = 3 ", "steps", 3),
    ],
)
def test_a_setting_takes_the_text_of_its_value(override, field, value):
    assert getattr(train_settings(override), field) == value


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("model.remat=true", "remat", True),
        ("model.dtype=bfloat16", "dtype", "bfloat16"),
        ("model.logit_softcap=30", "logit_softcap", 30.0),
        ("model.logit_softcap=none", "logit_softcap", None),
        ("model.sliding_window=8", "sliding_window", 8),
    ],
)
def test_so_does_one_of_the_model(override, field, value):
    assert getattr(train_settings(override).model, field) == value


def test_tables_and_lists_come_from_toml(tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(
        "[model]\nsliding_window = 8\nsliding_layers = [true, false, true, false]\n"
        "[model.rope_scaling]\nfactor = 4\noriginal_max_positions = 1024\n"
    )
    model = train_settings(config_file=toml).model
    assert model.rope_scaling == RopeScaling(factor=4.0, original_max_positions=1024)
    assert model.windows == (8, None, 8, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stesp=3", "'stesp' is not a setting of train; did you mean steps"),
        ("zzz=3", "'zzz' is not a setting of train"),
        ("model.n_layer=3", "did you mean model.n_layers"),
        ("steps", "--set 'steps': expected key=value"),
        ("=3", "expected key=value"),
        ("steps=many", "steps='many' is not a whole number"),
        ("steps=1.5", "steps='1.5' is not a whole number"),
        ("steps=0", "steps=0 must be above 0"),
        ("steps=", "steps='' is not a whole number"),
        ("learning_rate=fast", "learning_rate='fast' is not a finite number"),
        ("learning_rate=nan", "learning_rate='nan' is not a finite number"),
        ("learning_rate=-1", "learning_rate=-1.0 must be above 0"),
        ("batch_size=-8", "batch_size=-8 must be above 0"),
        ("accumulate_steps=3", "accumulate_steps=3 must divide batch_size=8"),
        ("beta2=1.5", "beta2=1.5 must be at least 0 and at most 1"),
        ("seed=-1", "seed=-1 must be at least 0"),
        ("mesh=rows=2", "mesh axis 'rows'"),
        ("model=tiny", "model is a table: set its fields"),
        ("steps.n=3", "steps={'n': '3'} is not a whole number"),
        ("model.remat=maybe", "model.remat='maybe' is not true or false"),
        ("model.dtype=int4", "dtype='int4' is not one of"),
        ("model.n_kv_heads=3", "n_kv_heads=3 must divide n_heads=4"),
        ("model.rope_scaling=4", "model.rope_scaling is a table: set its fields"),
        ("model.rope_scaling.factor=4", "rope_scaling needs original_max_positions"),
        ("preset=huge", "preset='huge' is not one of tiny, small, base, large"),
        ("preset=smal", "did you mean small"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        train_settings(override)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"steps = ", "is not valid TOML"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"steps = true", "steps=True is not a whole number"),
        (b"learning_rate = inf", "learning_rate=inf is not a finite number"),
        (b"[model]\nlayers = 3", r"'model.layers' is not a setting of table \[model\]"),
        (b"[modle]\nn_layers = 3", "did you mean model"),
        (b"preset = 3", "preset=3 is not one of tiny, small, base, large"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    toml = tmp_path / "run.toml"
    toml.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        train_settings(config_file=toml)
    assert str(toml) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        train_settings(config_file=tmp_path / "absent.toml")


def test_every_changed_setting_is_named_and_only_those_that_may_not_change(tmp_path):
    stored = to_json(train_settings())
    refuse_changes(stored, train_settings("steps=2000", "mesh=fsdp=2", output="b"), tmp_path)
    changed = train_settings("seed=5", "model.n_layers=2", "log_every=1")
    with pytest.raises(ConfigError, match=r"seed=5, was 0, model.n_layers=2, was 4") as error:
        refuse_changes(stored, changed, tmp_path)
    assert "log_every" not in str(error.value)


def test_each_field_of_the_token_language_has_a_loss_weight():
    assert len(train_settings().loss_weights) == len(FIELDS)


def test_each_preset_has_its_model():
    for name, model in PRESETS.items():
        assert train_settings(preset=name).model == model
