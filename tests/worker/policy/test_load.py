"""Loading: the tiny preset, folders, hub ids; what cannot be loaded is named."""

import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, normalizers
from tokenizers.processors import TemplateProcessing

from service.errors import JobFailed
from service.spec.model import Full, Lora, ModelSpec, TinyConfig
from service.spec.tiny import TINY_CHARACTERS
from service.telemetry import PlainFormatter, Scrubber
from workers.policy.errors import PolicyFailed

FULL = {"dtype": "float32", "adapter": Full()}


def failure(load, spec) -> PolicyFailed:
    with pytest.raises(PolicyFailed) as failed:
        load(spec)
    assert failed.value.hint and failed.value.subject
    return failed.value


def test_the_tiny_preset_is_the_same_model_for_the_same_config(load, weights):
    first = weights(load(ModelSpec(source="tiny", tiny=TinyConfig(seed=5))))
    torch.manual_seed(1)
    again = weights(load(ModelSpec(source="tiny", tiny=TinyConfig(seed=5)), seed=9))
    other = weights(load(ModelSpec(source="tiny", tiny=TinyConfig(seed=6))))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_a_new_adapter_derives_from_the_jobs_seed_alone(load, weights, tiny_lora_spec):
    first = weights(load(tiny_lora_spec, seed=3))
    torch.manual_seed(1)
    again, other = weights(load(tiny_lora_spec, seed=3)), weights(load(tiny_lora_spec, seed=4))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_making_a_model_leaves_the_global_generator_alone(load, tiny_lora_spec):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    load(tiny_lora_spec)
    assert torch.equal(torch.rand(3), expected)


def test_the_tiny_preset_has_the_size_that_its_recipe_names(load):
    facts = load(ModelSpec(source="tiny")).facts
    assert 240_000 < facts["parameters"] < 250_000
    assert facts["trainable_parameters"] == facts["parameters"]
    assert (facts["adapter"], facts["dtype"], facts["context"], facts["device"]) == ("full", "float32", 128, "cpu")


def test_every_tiny_character_is_one_token_and_comes_back(load):
    policy = load()
    assert len(TINY_CHARACTERS) == len(set(TINY_CHARACTERS)) > 50
    ids = policy.text.encode(TINY_CHARACTERS)
    assert ids == list(range(3, 3 + len(TINY_CHARACTERS)))
    assert policy.text.decode(ids) == TINY_CHARACTERS


def test_characters_outside_are_unknown_tokens(load):
    policy = load()
    unknown = policy.text.tokenizer.unk_token_id
    assert policy.text.encode("aA\té") == [policy.text.encode("a")[0], unknown, unknown, unknown]


def test_an_answer_is_closed_by_eos_and_a_prompt_is_not(load):
    policy = load()
    assert policy.text.encode_answer("12") == [*policy.text.encode("12"), policy.text.tokenizer.eos_token_id]
    assert policy.text.decode(policy.text.encode_answer("12")) == "12"
    assert policy.text.encode("") == []


def test_a_tokenizer_that_closes_every_text_does_not_close_a_prompt(load):
    policy = load()
    opened = policy.text.encode("rev 1>")
    eos = policy.text.tokenizer.eos_token_id
    policy.text.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", eos)]
    )
    assert policy.text.tokenizer("rev 1>")["input_ids"] == [*opened, eos]
    assert policy.text.encode("rev 1>") == opened and policy.text.encode("") == []
    assert policy.text.encode_answer("1") == [*policy.text.encode("1"), eos]


def test_a_folder_that_is_not_there_is_named(load, tmp_path):
    error = failure(load, ModelSpec(source=str(tmp_path / "nothing"), **FULL))
    assert error.code == "model_not_found" and "no such folder" in error.detail


def test_a_folder_without_a_model_is_named(load, tmp_path):
    error = failure(load, ModelSpec(source=str(tmp_path), **FULL))
    assert error.code == "model_not_found" and str(tmp_path) in error.detail


class Evil:
    """What a pickle may do to who reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def no_pickles(monkeypatch):
    """Reading any pickle fails the test, also one that nobody would notice."""

    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was read")

    for place in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.serialization.load"):
        monkeypatch.setattr(place, refuse)
    monkeypatch.setattr("transformers.modeling_utils.torch.load", refuse)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt", "model.pkl"])
def test_pickled_weights_are_refused_by_name_and_not_read(load, tmp_path, family_folder, no_pickles, name):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    torch.save(Evil(tmp_path / "it ran"), folder / name)
    error = failure(load, ModelSpec(source=str(folder), **FULL))
    assert error.code == "model_pickled" and name in error.detail and "convert the weights to safetensors" in error.detail
    assert not (tmp_path / "it ran").exists()


def test_a_pickle_beside_safetensors_is_left_alone(load, tmp_path, family_folder, no_pickles):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Evil(tmp_path / "it ran"), folder / name)
    assert load(ModelSpec(source=str(folder), **FULL)).kind == "full"
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "../elsewhere/model.safetensors", "/etc/model.safetensors", 7])
@pytest.mark.parametrize("by", ["index", "config"])
def test_what_the_index_or_the_config_names_is_refused_and_not_read(load, tmp_path, family_folder, no_pickles, file, by):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    torch.save(Evil(tmp_path / "it ran"), folder / "pytorch_model.bin")
    shutil.copytree(family_folder("llama"), tmp_path / "elsewhere")
    names = load_file(folder / "model.safetensors").keys()
    if by == "index":
        (folder / "model.safetensors").rename(folder / "other.safetensors")  # safetensors beside it change nothing
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": file}))
    error = failure(load, ModelSpec(source=str(folder), **FULL))
    assert error.code == "model_pickled" and str(file) in error.detail and by in error.detail
    assert not (tmp_path / "it ran").exists()


def test_an_index_that_an_index_names_is_refused_and_not_read(load, tmp_path, family_folder, no_pickles):
    """The loader would read it as a pickle, for its name does not end in .safetensors."""
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").unlink()
    torch.save(Evil(tmp_path / "it ran"), folder / "part.safetensors.index.json")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "part.safetensors.index.json")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    error = failure(load, ModelSpec(source=str(folder), **FULL))
    assert error.code == "model_pickled" and "part.safetensors.index.json" in error.detail
    assert not (tmp_path / "it ran").exists()


def test_an_index_of_safetensors_in_the_folder_is_loaded(load, weights, tmp_path, family_folder):
    """The negative control of the test above; the parts may lie in folders of the folder."""
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "parts").mkdir()
    halves = {"one.safetensors": list(state)[::2], "parts/two.safetensors": list(state)[1::2]}
    for file, names in halves.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, names in halves.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded, whole = (weights(load(ModelSpec(source=str(path), **FULL))) for path in (folder, family_folder("llama")))
    assert all(torch.equal(value, whole[name]) for name, value in loaded.items())


def test_a_folder_with_an_adapter_is_not_followed_to_another_model(load, tmp_path, family_folder):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/elsewhere"}))
    error = failure(load, ModelSpec(source=str(folder), **FULL))
    assert error.code == "model_unsupported" and "name its base model" in error.detail


DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (DEEP, "model_not_found", "nested too deeply"),
        ("[1, 2]", "model_not_found", "an array of 2 items, where an object should stand"),
        ("{", "model_not_found", "config.json cannot be read"),
        ({"hidden_size": "wide"}, "model_unsupported", "hidden_size"),
        ({"hidden_size": -32}, "model_unsupported", "cannot be trained here"),
        ({"num_attention_heads": 0}, "model_unsupported", "by zero"),
        ({"num_attention_heads": None}, "model_unsupported", "num_attention_heads"),
        ({"num_key_value_heads": 0}, "model_unsupported", "by zero"),
        ({"num_hidden_layers": 0}, "model_unsupported", "cannot be trained here"),
        ({"vocab_size": []}, "model_unsupported", "vocab_size"),
        ({"max_position_embeddings": "long"}, "model_unsupported", "max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "model_unsupported", "spiral"),
        ({"hidden_act": "none_like_it"}, "model_unsupported", "none_like_it"),
        ({"layer_types": ["none_like_it"] * 2}, "model_unsupported", "none_like_it"),
    ],
)
def test_a_config_that_makes_no_model_is_its_owner_s_mistake(load, tmp_path, family_folder, change, code, reason):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    config = folder / "config.json"
    config.write_text(change if isinstance(change, str) else json.dumps({**json.loads(config.read_text()), **change}))
    error = failure(load, ModelSpec(source=str(folder), **FULL))
    assert error.code == code and reason in error.detail, error.detail


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [DEEP, "[]", '"text"', "{", "7"])
def test_a_tokenizer_that_cannot_be_read_is_its_owner_s_mistake(load, tmp_path, family_folder, file, text):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    (folder / file).write_text(text)
    assert failure(load, ModelSpec(source=str(folder), **FULL)).code in ("model_not_found", "model_unsupported")


@pytest.mark.parametrize("change", [{"model_max_length": "long"}, {"model_input_names": 7}, {"padding_side": "top"}])
def test_a_tokenizer_that_cannot_be_used_is_its_owner_s_mistake(load, tmp_path, family_folder, change):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    assert failure(load, ModelSpec(source=str(folder), **FULL)).code == "model_unsupported"


def test_a_checkpoint_with_a_pickled_adapter_is_no_checkpoint(load, tmp_path, family_folder, no_pickles):
    folder = family_folder("llama")
    trained = load(ModelSpec(source=str(folder), adapter=Lora(rank=2)))
    trained.save(tmp_path / "saved")
    weights = tmp_path / "saved" / "model" / "adapter_model.safetensors"
    weights.unlink()
    torch.save(Evil(tmp_path / "it ran"), weights.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError):
        load(ModelSpec(source=str(folder), adapter=Lora(rank=2)), weights_from=tmp_path / "saved")
    assert not (tmp_path / "it ran").exists()


def test_the_pickles_of_these_tests_would_run(tmp_path):
    """The negative control."""
    torch.save(Evil(tmp_path / "it ran"), tmp_path / "evil.bin")
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert (tmp_path / "it ran").exists()


def test_code_that_comes_with_a_model_is_not_run(load, tmp_path, family_folder):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\nclass OwnConfig: pass\nclass OwnModel: pass\n")
    assert failure(load, ModelSpec(source=str(folder), **FULL)).code == "model_unsupported"
    assert not (tmp_path / "it ran").exists()


def test_missing_weights_are_not_made_up(load, tmp_path, family_folder):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    error = failure(load, ModelSpec(source=str(folder), **FULL))
    assert error.code == "model_unsupported" and "model.layers.1.mlp.up_proj.weight" in error.detail


def test_what_the_library_says_of_foreign_weights_is_a_record_of_our_log(load, tmp_path, family_folder, caplog):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    state = load_file(folder / "model.safetensors") | {"x\n00:00:00 ERROR   service: forged": torch.zeros(1)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    load(ModelSpec(source=str(folder), **FULL))
    told = [PlainFormatter(Scrubber()).format(record) for record in caplog.records]
    assert any("service: forged" in line for line in told) and not any("\n" in line for line in told)
    assert logging.getLogger("transformers").handlers == []  # one of its own would write them raw


def test_a_torn_weights_file_is_named(load, tmp_path, family_folder):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert failure(load, ModelSpec(source=str(folder), **FULL)).code == "model_unsupported"


def test_a_model_without_a_causal_head_is_named(load, tmp_path, family_folder):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "vit")
    (folder / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    assert failure(load, ModelSpec(source=str(folder), **FULL)).code == "model_unsupported"


def test_a_tokenizer_of_another_model_is_noticed(load, tmp_path, family_folder):
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    policy = load(ModelSpec(source=str(folder), **FULL))
    size = len(policy.text.tokenizer)
    policy.text.tokenizer.add_tokens(["supercalifragilistic"])
    with pytest.raises(JobFailed, match=f"token {size}, and the model knows {size}"):
        policy.text.encode("a supercalifragilistic b")


def test_lora_layers_that_are_not_there_are_answered_with_those_that_are(load, tiny_spec):
    spec = ModelSpec(source="tiny", tiny=tiny_spec.tiny, adapter=Lora(target_modules=["query"]))
    error = failure(load, spec)
    assert error.code == "lora_target_modules" and "q_proj" in str(error.hint)


def test_every_layer_that_is_named_must_be_there(load, tiny_spec):
    """Peft is content with one that fits, and trains that alone."""
    spec = ModelSpec(source="tiny", tiny=tiny_spec.tiny, adapter=Lora(target_modules=["q_proj", "v_porj"]))
    error = failure(load, spec)
    assert error.code == "lora_target_modules" and error.subject == "target_modules"
    assert "'v_porj'" in error.detail and "did you mean 'v_proj'?" in error.detail and "v_proj" in str(error.hint)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mlp", "'mlp', a LlamaMLP: it is no linear layer; those in it are: down_proj, gate_proj, up_proj"),
        ("layers.0", "a LlamaDecoderLayer: it is no linear layer"),
        (".*q_proj", "did you mean 'q_proj'?; names are no patterns"),
        ("layers.[01].self_attn.v_proj", "names are no patterns"),
        ("self_attn.q_proj.weight", "did you mean 'q_proj'?"),
        ("all-linear", "write target_modules: all-linear, which is no list"),
    ],
)
def test_what_is_no_name_of_a_linear_layer_is_refused_in_a_line(load, tiny_spec, name, said):
    error = failure(load, ModelSpec(source="tiny", tiny=tiny_spec.tiny, adapter=Lora(target_modules=["k_proj", name])))
    assert said in error.detail and "\n" not in error.detail and error.subject == "target_modules"


@pytest.mark.parametrize(
    ("name", "layers"), [("q_proj", 2), ("layers.1.mlp.up_proj", 1), ("model.layers.0.self_attn.o_proj", 1)]
)
def test_layers_may_be_named_by_the_ends_of_their_paths(load, tiny_spec, name, layers):
    facts = load(ModelSpec(source="tiny", tiny=tiny_spec.tiny, adapter=Lora(rank=2, target_modules=["v_proj", name]))).facts
    assert facts["warnings"] == [] and facts["adapted_modules"].pop("model.layers.*.self_attn.v_proj") == 2
    [(path, count)] = facts["adapted_modules"].items()
    assert path.endswith(name.rsplit(".", 1)[-1]) and count == layers


def test_an_adapter_on_a_tied_head_says_that_it_cannot_be_merged(load, tiny_spec):
    adapter = Lora(rank=2, target_modules=["q_proj", "lm_head"])
    [warning] = load(ModelSpec(source="tiny", tiny=tiny_spec.tiny, adapter=adapter)).facts["warnings"]
    assert "lm_head cannot be merged" in warning and "share their weights" in warning


def test_what_all_linear_leaves_out_is_named(load, family_folder):
    [warning] = load(ModelSpec(source=str(family_folder("gpt_oss")), adapter=Lora(rank=2))).facts["warnings"]
    assert all(
        f"model.layers.*.mlp.{name}" in warning for name in ("experts.gate_up_proj", "experts.down_proj", "router.weight")
    )
    assert re.search(r"\(\d\d% of the weights\)", warning)
    assert load(ModelSpec(source=str(family_folder("gpt2")), adapter=Lora(rank=2))).facts["warnings"] == []


def test_defaults_are_lora_for_a_folder_and_full_for_tiny(load, family_folder):
    assert load(ModelSpec(source=str(family_folder("llama")))).kind == "lora"
    assert load(ModelSpec(source="tiny")).kind == "full"


def test_a_chat_goes_through_the_models_template(load):
    policy = load()
    with pytest.raises(JobFailed) as failed:
        policy.text.encode([{"role": "user", "content": "hi"}])
    assert failed.value.code == "no_chat_template"
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    policy.text.tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    assert policy.text.decode(policy.text.encode([{"role": "user", "content": "hi"}])) == "user: hi\nassistant:"
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    assert policy.text.decode(policy.text.encode(begun)) == "user: hi\nassistant: so"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ messages[0].content.nothing.like.it }}", "has no attribute 'nothing'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),  # what the sandbox refuses
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ 'a' + 1 }}", "concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(1000000)|list }}", "Range too big"),
    ],
)
def test_what_a_chat_template_refuses_is_told_in_its_own_words(load, template, words):
    policy = load()
    policy.text.tokenizer.chat_template = template
    turns = [{"role": "system", "content": "hi"}, {"role": "user", "content": "so"}]
    with pytest.raises(PolicyFailed) as failed:
        policy.text.encode(turns)
    assert (failed.value.code, failed.value.subject) == ("chat_refused", "chat")
    assert words in failed.value.detail and "(system, user" in failed.value.detail


def test_a_chat_template_that_shows_nothing_of_what_was_said_is_refused(load):
    policy = load()
    policy.text.tokenizer.chat_template = "nothing of what was said"
    with pytest.raises(PolicyFailed, match=r"leaves out the key 'content' of the role 'system' \(message 0\)"):
        policy.text.encode([{"role": "system", "content": "hi"}, {"role": "user", "content": "so"}])


HUB = """
import os, huggingface_hub.constants
huggingface_hub.constants.HF_HUB_CACHE = os.environ["HF_HUB_CACHE"]  # else it is read when the process starts
from service.errors import JobFailed
from service.spec.model import Full, ModelSpec
from service.spec.training import OptimizerSpec
from workers.policy.base import Base
from workers.policy.learner import Learner

def load(source, revision):
    base = Base.load(ModelSpec(source=source, revision=revision, adapter={"kind": "full"}), device="cpu", threads=1)
    return Learner(base, Full(), name="mine", optimizer=OptimizerSpec(), steps=1, seed=0)

print(load("someone/tiny", None).facts["revision"], load("someone/tiny", "stable").facts["revision"])
for source in ("someone/else", "not a hub id", "a/b/c"):
    try:
        load(source, None)
    except JobFailed as error:
        print(error.code)
"""


def test_a_hub_id_is_resolved_to_a_commit(family_folder, tmp_path, zygote):
    """From a local cache of the hub: the branch main moved on after `stable` was tagged."""
    commits = {"main": "a" * 40, "stable": "b" * 40}
    repository = tmp_path / "hub" / "models--someone--tiny"
    for name, commit in commits.items():
        shutil.copytree(family_folder("llama"), repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    said = zygote.run("-c", HUB, HF_HUB_CACHE=str(tmp_path / "hub"))
    assert said.split()[-5:] == [commits["main"], commits["stable"], *["model_not_found"] * 3], said


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace(" ", "")), "reads"),
        (lambda tokenizer: setattr(tokenizer, "decoder", decoders.Strip(" ", 20, 0)), "writes"),
    ],
)
def test_a_tokenizer_that_is_not_its_own_file_is_loaded_from_it_or_refused(load, family_folder, monkeypatch, broken, said):
    """As transformers makes some tokenizers anew."""
    from workers.policy import load as loading

    spec = ModelSpec(source=str(family_folder("llama")), adapter=Full())
    text = "rev 12  + x>"
    own = load(spec).text.encode(text)

    def breaks(name):
        kind = getattr(loading, name)
        from_pretrained = kind.from_pretrained

        def other(*args, **kwargs):
            tokenizer = from_pretrained(*args, **kwargs)
            broken(tokenizer.backend_tokenizer)
            return tokenizer

        monkeypatch.setattr(kind, "from_pretrained", other)

    breaks("AutoTokenizer")
    repaired = load(spec).text
    assert repaired.encode(text) == own and repaired.decode(own) == text
    breaks("PreTrainedTokenizerFast")
    error = failure(load, spec)
    assert error.code == "model_unsupported" and f"its tokenizer {said}" in error.detail


def test_a_tokenizer_that_transformers_makes_anew_from_its_family_s_class_keeps_its_spaces(load, family_folder):
    """Of qwen2: the class is one of byte-level BPE, whatever the file says."""
    text = load(ModelSpec(source=str(family_folder("qwen2")), adapter=Full())).text
    assert text.decode(text.encode("rev 12 + x>")) == "rev 12 + x>"
