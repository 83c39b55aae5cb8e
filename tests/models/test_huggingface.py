"""Hugging Face checkpoints: the numbers of transformers, and what is refused."""

import json
import shutil
from typing import get_args

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from hf_checkpoints import make_checkpoint
from safetensors.numpy import save_file
from tiny_runs import decoder

from ping_llm.errors import CheckpointError, ConfigError, PingLLMError
from ping_llm.extraction import parity
from ping_llm.models import families, huggingface
from ping_llm.models.config import RopeScaling, Site

SITES = get_args(Site)
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
ALL_YARN = YARN | {
    "beta_fast": 8.0,
    "beta_slow": 2.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.4,
    "truncate": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What differs from a plain Qwen2 with grouped queries, an untied head and one file.
VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one_kv_head_each": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 20},
    "rope_theta": {"config": {"rope_parameters": None, "rope_theta": 1e6}},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "rope_absent": {"config": {"rope_parameters": None}},
    "yarn_type": {
        "config": {
            "rope_parameters": None,
            "rope_theta": 1e4,
            "rope_scaling": {"type": "yarn", **YARN},
        }
    },
    "yarn_rope_type": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5, **ALL_YARN}},
    "yarn_attention_factor": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "attention_factor": 1.3,
            "factor": 8.0,
        }
    },
    "window_from_a_layer": {
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "window_by_layer_types": {
        "use_sliding_window": True,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "window_not_used": {"config": {"sliding_window": 5, "use_sliding_window": False}},
    "backbone": {"backbone": True},
    "index": {"shard_size": "20KB"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "qwen3": {"model_type": "qwen3"},
    "qwen3_tied_head_dim": {
        "model_type": "qwen3",
        "tie_word_embeddings": True,
        "head_dim": 12,
        "rms_norm_eps": 1e-5,
    },
    "llama": {"model_type": "llama"},
    "llama_rope_llama3": {
        "model_type": "llama",
        "head_dim": 20,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 5e5, **LLAMA3},
    },
    "llama_rope_linear": {
        "model_type": "llama",
        "config": {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 3.0}},
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral_sliding": {"model_type": "mistral", "sliding_window": 6},
}


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 160, length) for length in (1, 40, 7, 129)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_are_those_of_transformers(variant, tmp_path, prompts):
    directory = make_checkpoint(tmp_path, **VARIANTS[variant])
    model = huggingface.load(directory, head=False, dtype="float32")
    theirs = parity.reference_activations(directory, prompts)
    for packed in (True, False):
        ours = parity.own_activations(model, prompts, sites=SITES, layers=(0, 1, 2), packed=packed)
        worst = parity.largest_differences(ours, theirs)
        assert len(worst) == 26
        assert max(worst.values()) < 1e-5, worst


def test_the_last_chosen_layer_needs_nothing_after_it(tmp_path, prompts):
    directory = make_checkpoint(tmp_path)
    theirs = parity.reference_activations(directory, prompts)
    model = huggingface.load(directory, n_layers=2, head=False)
    ours = parity.own_activations(model, prompts, sites=("mlp",), layers=(1,), packed=True)
    assert parity.largest_differences(ours, theirs)["mlp", 1] < 1e-5


def test_in_bfloat16_we_are_as_exact_as_transformers(tmp_path, prompts):
    directory = make_checkpoint(tmp_path, dtype="bfloat16", head_dim=20)
    exact = parity.reference_activations(directory, prompts, dtype="float32")
    theirs = parity.reference_activations(directory, prompts, dtype="bfloat16")
    model = huggingface.load(directory, head=False)
    ours = parity.own_activations(model, prompts, sites=SITES, layers=(0, 1, 2), packed=True)
    our_error = parity.largest_differences(ours, exact)
    their_error = parity.largest_differences(theirs, exact)
    for key in our_error:
        assert our_error[key] <= 1.5 * their_error[key], key


def test_logits_are_those_of_transformers(tmp_path, prompts):
    directory = make_checkpoint(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(prompts[1])[None]).logits.numpy()
    ours = np.asarray(huggingface.load(directory)(prompts[1][None].astype(np.int32)))
    assert parity.relative_l2(ours, expected) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_keep_their_dtype_unless_asked(dtype, tmp_path):
    directory = make_checkpoint(tmp_path, dtype=dtype)
    kept = jax.tree.leaves(nnx.state(huggingface.load(directory)))
    assert {str(leaf.dtype) for leaf in kept} == {dtype}
    asked = jax.tree.leaves(nnx.state(huggingface.load(directory, param_dtype="float32")))
    assert {str(leaf.dtype) for leaf in asked} == {"float32"}
    for ours, theirs in zip(asked, kept, strict=True):
        np.testing.assert_array_equal(ours, np.asarray(theirs, np.float32))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"rope_scaling": LLAMA3 | {"factor": None}, "rope_parameters": None}, "needs factor"),
        ({"rope_scaling": LLAMA3 | {"foo": 1}, "rope_parameters": None}, "foo=1"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 9.0}, "rope_parameters": None}, "below"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "llama", "sliding_window": 8}, "sliding_window=8"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "foo": 1}}, "foo=1"),
        ({"rope_scaling": {"mrope_section": [1, 2]}, "rope_parameters": None}, "mrope_section"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "n_kv_heads=3"),
        ({"hidden_size": None}, "hidden_size"),
        ({"dtype": "float64"}, "float64"),
        # What is false or 0 may mean something.
        ({"is_causal": False}, "is_causal=False"),
        ({"new_option": False}, "new_option=False"),
        ({"new_option": 0}, "new_option=0"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"auto_map": {"AutoModel": "own.Model"}}, "auto_map"),
        ({"hidden_size": 10**30}, "hidden_size is 10+; expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; expected a number"),
        ({"rope_scaling": [1]}, "rope_scaling is .1.; expected a dict"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "factor is '2'; expected a number"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; expected a list"),
        ({"sliding_window": "4096"}, "sliding_window is '4096'"),
    ],
)
def test_an_option_that_is_not_supported_is_refused_by_its_name(change, name, tmp_path):
    directory = make_checkpoint(tmp_path, config=change)
    with pytest.raises(ConfigError, match=name):
        huggingface.load(directory)


def test_options_that_are_off_or_only_describe_are_taken(tmp_path):
    off = {
        "use_mrope": False,
        "quantization_config": None,
        "_name_or_path": "x",
        "rope_scaling": {},
        "is_causal": True,
        "unsloth_fixed": True,
        "unsloth_version": "2025.1",
        "pretraining_tp": 1,
        "tokenizer_class": "Qwen2Tokenizer",
        "num_labels": 2,
        "max_length": 20,
        "temperature": 0.7,
        "top_k": 50,
        "do_sample": False,
        "pruned_heads": {},
    }
    assert huggingface.read_config(make_checkpoint(tmp_path, config=off)).n_layers == 3


def test_all_weights_that_do_not_fit_are_listed_at_once(tmp_path):
    directory = make_checkpoint(tmp_path, config={"num_hidden_layers": 4, "intermediate_size": 50})
    other = make_checkpoint(tmp_path / "other", model_type="qwen3")
    shutil.copy(other / "model.safetensors", directory)
    with pytest.raises(CheckpointError) as error:
        huggingface.load(directory)
    message = str(error.value)
    assert "\n" not in message
    for name in ("layers.3.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias"):
        assert name in message.split("unknown")[0]
    assert "layers.2.self_attn.k_norm.weight" in message.split("unknown")[1]
    assert "layers.0.mlp.up_proj.weight (48, 32) (expected (50, 32))" in message


def test_a_head_that_is_not_needed_may_be_missing(tmp_path):
    directory = make_checkpoint(tmp_path, backbone=True)
    huggingface.load(directory, head=False)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        huggingface.load(directory)


@pytest.mark.parametrize("cut", [0, 4, 100, 3000, -1])
def test_a_truncated_file_is_named(cut, tmp_path):
    directory = make_checkpoint(tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        huggingface.load(directory)


def test_a_damaged_header_is_an_error_whatever_byte_it_is(tmp_path):
    directory = make_checkpoint(tmp_path)
    path = directory / "model.safetensors"
    content = path.read_bytes()
    for at in range(0, 600, 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :])
        with pytest.raises(CheckpointError):
            huggingface.load(directory)


def test_a_file_that_the_index_names_but_is_not_there_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, shard_size="20KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    gone = sorted(set(index["weight_map"].values()))[1]
    (directory / gone).unlink()
    with pytest.raises(CheckpointError, match=gone):
        huggingface.load(directory)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_lora_adapter_beside_the_weights_is_refused(sharded, tmp_path):
    directory = make_checkpoint(tmp_path, **({"shard_size": "20KB"} if sharded else {}))
    adapter = {"base_model_name_or_path": "Qwen/Qwen2.5-0.5B", "peft_type": "LORA"}
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(CheckpointError, match=r"LoRA adapter of Qwen/Qwen2\.5-0\.5B; merge it"):
        huggingface.load(directory)


def test_files_that_transformers_would_not_read_are_not_read(tmp_path):
    directory = make_checkpoint(tmp_path, shard_size="20KB")
    named = huggingface.weight_files(directory)
    shutil.copy(named[0].location.path, directory / "consolidated.safetensors")
    assert huggingface.weight_files(directory) == named
    whole = make_checkpoint(tmp_path / "whole") / "model.safetensors"
    shutil.copy(whole, directory)
    files = [file.location.name for file in huggingface.weight_files(directory)]
    assert files == ["model.safetensors"]


@pytest.mark.parametrize("weight_map", [None, [], {"x": "../model.safetensors"}, {"x": "/a"}])
def test_an_index_that_cannot_be_is_refused(weight_map, tmp_path):
    directory = make_checkpoint(tmp_path, shard_size="20KB")
    index = {} if weight_map is None else {"weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(PingLLMError, match=r"no weight_map|not the name of a file"):
        huggingface.weight_files(directory)


def test_a_hub_id_that_cannot_be_had_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be fetched from the hub"):
        huggingface.resolve("Qwen/no-such-model")
    with pytest.raises(CheckpointError, match="neither a directory nor a hub id"):
        huggingface.resolve(tmp_path / "absent")


def test_layers_of_different_dtypes_lose_nothing(tmp_path):
    from safetensors.numpy import load_file

    directory = make_checkpoint(tmp_path, dtype="float16")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32) + np.float32(1e-6)
    save_file(tensors, directory / "model.safetensors")
    model = huggingface.load(directory)
    kernel = np.asarray(model.blocks.mlp.up.kernel[...])
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[1], tensors[name].T)


WAYS_BACK = {
    "llama": {"rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_max_positions=16)},
    "mistral": {"sliding_window": 5, "tie_embeddings": False},
    "qwen2": {"qkv_bias": True, "rope_scaling": RopeScaling(factor=4.0, original_max_positions=9)},
    "qwen3": {"qk_norm": True, "sliding_window": 7, "sliding_layers": (True, False)},
}


@pytest.mark.parametrize("member", WAYS_BACK)
def test_transformers_reads_our_decoders(member, tmp_path):
    graphdef, params = decoder(**WAYS_BACK[member])
    cfg = nnx.merge(graphdef, params).cfg
    content = families.llama.write_config(cfg)
    assert content["model_type"] == member
    (tmp_path / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 64}))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape), params)
    save_file(huggingface.to_tensors(cfg, params), tmp_path / "model.safetensors")
    assert huggingface.read_config(tmp_path) == cfg
    tokens = rng.integers(0, 267, (2, 60)).astype(np.int32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        logits = theirs(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(nnx.merge(graphdef, params)(tokens), logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"logit_softcap": 30.0}, "logit_softcap=30.0"),
        ({"qk_norm": True, "qkv_bias": True}, "qk_norm=true with qkv_bias=true"),
        ({"sliding_window": 5, "sliding_layers": (True, False)}, "sliding_layers"),
    ],
)
def test_a_decoder_that_transformers_has_not_is_refused_by_name(change, name):
    cfg = nnx.merge(*decoder(**change)).cfg
    with pytest.raises(ConfigError, match=name):
        families.llama.write_config(cfg)
