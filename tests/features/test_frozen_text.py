"""Words read by a frozen encoder: computed once for each text, without code or pickles of the model's."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kinds import T_O, A, T, check_kind, policy_of

from flowpolicy.data.store import Demonstrations
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.features import FrozenText
from flowpolicy.features.frozen_text import _loaded, vector_of

KNOWN = ("push left", "push right")


@pytest.fixture(autouse=True)
def fresh():
    for cached in (_loaded, vector_of):
        cached.cache_clear()


@pytest.fixture
def transformers(monkeypatch):
    """A package of that name, which counts."""
    table = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))
    package = SimpleNamespace(texts=[], loaded=[])

    def tokenizer(text, return_tensors, truncation, max_length):
        package.texts.append(text)
        ids = torch.tensor([list(text.encode())[:max_length] or [0]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    class Network(torch.nn.Module):
        config = SimpleNamespace()

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=table[input_ids])

    def load(made):
        def from_pretrained(name, **settings):
            package.loaded.append(settings)
            if name != "folder":
                raise OSError(f"no {name}")
            return made

        return SimpleNamespace(from_pretrained=from_pretrained)

    tokenizer.model_max_length = 8
    package.AutoModel, package.AutoTokenizer = load(Network()), load(tokenizer)
    monkeypatch.setitem(sys.modules, "transformers", package)
    return package


def demonstrations(**kind):
    arrays = {"action": np.zeros((6, A), np.float32), "task_index": np.repeat([0, 1], 3)}
    attributes = {"tasks": list(KNOWN), "kinds": {"task": {"kind": "frozen_text", **kind}}}
    return Demonstrations(arrays, np.array([3, 6]), attributes, "a.zarr")


def test_it_is_a_whole_observation(transformers, tmp_path):
    feature = demonstrations(model="folder").feature("task")
    assert feature == FrozenText((6,), model="folder")
    assert feature.known == KNOWN
    policy = check_kind(feature, feature.array([KNOWN[number % 2] for number in range(9)]), tmp_path)
    left, right = (policy.act({"thing": words}, noise=torch.zeros(1, T, A)) for words in KNOWN)
    assert not torch.allclose(left, right)
    np.testing.assert_allclose(np.linalg.norm(feature.array(KNOWN[0])), 1, atol=1e-6)


def test_a_text_is_read_once_and_the_model_loaded_once(transformers):
    feature = FrozenText((6,), model="folder")
    for _ in range(3):
        assert feature.array([[KNOWN[0]] * T_O, [KNOWN[1]] * T_O]).shape == (2, T_O, 6)
    assert transformers.texts == list(KNOWN)
    assert [settings["trust_remote_code"] for settings in transformers.loaded] == [False, False]
    assert transformers.loaded[1]["use_safetensors"]


def test_what_cannot_be_had_is_one_sentence(transformers, monkeypatch):
    with pytest.raises(DataError, match=r"^a\.zarr: .* 'nowhere' cannot be loaded \(no nowhere\)"):
        demonstrations(model="nowhere").feature("task")
    with pytest.raises(DataError, match=r"model is ''.*a folder"):
        demonstrations().feature("task")
    monkeypatch.setitem(sys.modules, "transformers", None)
    _loaded.cache_clear()
    with pytest.raises(ConfigError, match=r"needs .*flowpolicy\[text\]"):
        FrozenText((6,), model="folder").array("other words")


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_models_of_transformers(kind, tmp_path):
    package = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "push", "left", "right"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    package.BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=16).save_pretrained(tmp_path)
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "bert":
        model = package.BertModel(package.BertConfig(**sizes, intermediate_size=16))
    elif kind == "t5":
        model = package.T5Model(
            package.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
    else:
        text = {**sizes, "intermediate_size": 16, "eos_token_id": 3}
        image = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
        model = package.CLIPModel(package.CLIPConfig(text_config=text, vision_config=image))
    model.save_pretrained(tmp_path)
    feature = FrozenText.for_texts({"model": str(tmp_path)}, KNOWN, "kinds.task")
    assert feature.shape == (16,)
    left, right = feature.array(list(KNOWN))
    assert np.isfinite([left, right]).all()
    assert not np.allclose(left, right)
    policy_of({"task": feature}).act({"task": ["push left " * 50]})
