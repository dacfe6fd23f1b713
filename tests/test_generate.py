"""Generation, held to loops by hand and to transformers' own models with the same weights."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import Tokenizer, decoders
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from bigtrain import cli, generate, models
from bigtrain.checkpoint.integrity import seal
from bigtrain.checkpoint.weights import write_weights
from bigtrain.config import Config, DecoderConfig, InstructionConfig, dump
from bigtrain.data.tokenizer import find_tokenizer, train_tokenizer, vocabulary_size
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.models.generation import DecoderForGeneration

# A large init_std makes an untrained model's choices clear-cut, as a trained one's are. Tied embeddings would make it
# write its last word again and again; the run directory's model below has them.
GPT2 = DecoderConfig(
    dim=32, n_layers=2, n_heads=4, vocab_size=128, max_seq_len=48, init_std=0.3, tie_embeddings=False
)  # fmt: skip
LLAMA = DecoderConfig(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64, vocab_size=128, max_seq_len=48, positions="rotary",
    norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False, init_std=0.3,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
PROMPTS = [[0, 5, 17, 99], [0, 64], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
NO_EOS = 127  # the last id of the models, which is not in the tokenizer's vocabulary of 127: never written


def build(config: DecoderConfig, seed: int = 0) -> models.Decoder:
    torch.manual_seed(seed)
    return models.build(config).eval()


def greedy_by_hand(decoder: models.Decoder, prompt: list[int], steps: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1, :NO_EOS].argmax()))
    return tokens[len(prompt) :]


def generate_with(decoder: models.Decoder, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return generate.write_on(decoder, prompts, NO_EOS, NO_EOS, 24, {"do_sample": False, "num_beams": 1, **options})


@BOTH
def test_greedy_with_cache_without_and_by_hand_agree(config: DecoderConfig) -> None:
    decoder = build(config)
    for prompt in PROMPTS:
        by_hand = greedy_by_hand(decoder, prompt, 24)
        assert len(set(by_hand)) > 5
        assert generate_with(decoder, [prompt]) == [by_hand]
        assert generate_with(decoder, [prompt], use_cache=False) == [by_hand]


@BOTH
def test_the_cache_is_used(config: DecoderConfig) -> None:
    decoder, lengths = build(config), []
    decoder.embedding.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].size(1)))
    generate_with(decoder, [PROMPTS[0]])
    assert lengths == [4] + [1] * 23


@BOTH
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_left_padded_batch_equals_one_by_one(config: DecoderConfig, num_beams: int) -> None:
    decoder = build(config)
    alone = [generate_with(decoder, [prompt], num_beams=num_beams)[0] for prompt in PROMPTS]
    assert generate_with(decoder, PROMPTS, num_beams=num_beams) == alone


def as_gpt2(decoder: models.Decoder) -> GPT2LMHeadModel:
    config = decoder.config
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_seq_len, n_embd=config.dim, n_layer=config.n_layers,
            n_head=config.n_heads, tie_word_embeddings=False, bos_token_id=None, eos_token_id=NO_EOS,
            pad_token_id=NO_EOS,
        )
    )  # fmt: skip
    ours = decoder.state_dict()
    theirs = {
        "transformer.wte.weight": ours["embedding.weight"],
        "transformer.wpe.weight": ours["positions.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    names = {
        "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
        "feed_forward_norm": "ln_2", "feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj",
    }  # fmt: skip
    for layer in range(config.n_layers):
        for our_name, name in names.items():
            for kind in ("weight", "bias"):
                tensor = ours[f"blocks.{layer}.{our_name}.{kind}"]
                theirs[f"transformer.h.{layer}.{name}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor  # Conv1D
    for kind in ("weight", "bias"):
        theirs[f"transformer.ln_f.{kind}"] = ours[f"norm.{kind}"]
    model.load_state_dict(theirs)
    return model.eval()


def as_llama(decoder: models.Decoder) -> LlamaForCausalLM:
    config = decoder.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.ffn_dim,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads, max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps, bos_token_id=None, eos_token_id=NO_EOS, pad_token_id=NO_EOS,
        )
    )  # fmt: skip
    ours = decoder.state_dict()
    theirs = {
        "model.embed_tokens.weight": ours["embedding.weight"],
        "model.norm.weight": ours["norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    head_dim = config.dim // config.n_heads
    sizes = [config.n_heads * head_dim] + 2 * [(config.n_kv_heads or 0) * head_dim]
    for layer in range(config.n_layers):
        block, prefix = f"blocks.{layer}.", f"model.layers.{layer}."
        q, k, v = ours[block + "attention.qkv.weight"].split(sizes)
        gate, up = ours[block + "feed_forward.up.weight"].chunk(2)
        theirs |= {
            prefix + "input_layernorm.weight": ours[block + "attention_norm.weight"],
            prefix + "post_attention_layernorm.weight": ours[block + "feed_forward_norm.weight"],
            prefix + "self_attn.q_proj.weight": q,
            prefix + "self_attn.k_proj.weight": k,
            prefix + "self_attn.v_proj.weight": v,
            prefix + "self_attn.o_proj.weight": ours[block + "attention.out.weight"],
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": ours[block + "feed_forward.down.weight"],
        }
    model.load_state_dict(theirs)
    return model.eval()


@pytest.mark.parametrize(("config", "convert"), [(GPT2, as_gpt2), (LLAMA, as_llama)], ids=["gpt2", "llama"])
def test_beam_search_equals_transformers_own_model(config: DecoderConfig, convert: Any) -> None:
    decoder = build(config)
    peer = convert(decoder)
    tokens, mask = generate.pad_left(PROMPTS, NO_EOS, torch.device("cpu"))
    options: dict[str, Any] = {"num_beams": 4, "do_sample": False, "max_new_tokens": 24}
    theirs = peer.generate(tokens, attention_mask=mask, **options)
    ours = DecoderForGeneration(decoder).generate(
        tokens, attention_mask=mask, eos_token_id=NO_EOS, pad_token_id=NO_EOS, **options
    )
    assert torch.equal(ours, theirs)
    greedy = peer.generate(tokens, attention_mask=mask, **(options | {"num_beams": 1}))
    assert not torch.equal(greedy, theirs)  # the search found something else


def test_sampling_follows_the_model_s_probabilities() -> None:
    """Frequencies of the first token of 4,000 samples, full and cut to the 3 likeliest."""
    decoder = build(GPT2)
    with torch.no_grad():
        logits = decoder(torch.tensor([PROMPTS[0]]))[0, -1] / 2.0
    torch.manual_seed(0)
    for top_k in (0, 3):
        kept = logits if not top_k else logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
        options = {"do_sample": True, "temperature": 2.0, "top_k": top_k, "top_p": 1.0, "num_return_sequences": 4000}
        output: Tensor = DecoderForGeneration(decoder).generate(
            torch.tensor([PROMPTS[0]]), max_new_tokens=1, pad_token_id=NO_EOS, **options
        )
        frequencies = output[:, -1].bincount(minlength=128) / 4000
        assert (frequencies - kept.softmax(-1)).abs().max() < 0.03
        assert not top_k or int((frequencies > 0).sum()) == top_k


# ------------------------------------------------------------------------------------------- on a run directory


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a real tokenizer and checkpoint; the model is a random one."""
    model = DecoderConfig(dim=32, n_layers=2, n_heads=4, vocab_size=320, max_seq_len=64, init_std=0.3)
    return random_run(tmp_path_factory.mktemp("run"), Config(model=model))


def random_run(run: Path, config: Config) -> Path:
    tokenizer = train_tokenizer(["def main():\n    return 0\n" * 20], 280)
    assert vocabulary_size(tokenizer) < 320  # rows that no token has
    (run / "tokenizer").mkdir()
    tokenizer.save(str(run / "tokenizer" / "tokenizer.json"))
    config.run_dir = str(run)
    (run / "config.yaml").write_text(dump(config))
    assert isinstance(config.model, DecoderConfig)
    for step, seed in ((10, 1), (20, 2)):
        save_checkpoint(run, step, build(config.model, seed))
    return run


def save_checkpoint(run: Path, step: int, decoder: models.Decoder) -> None:
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    write_weights(checkpoint, ((name, weight.detach()) for name, weight in decoder.named_parameters()))
    seal(checkpoint, {"step": step})


def test_the_newest_checkpoint_writes_on(run_dir: Path) -> None:
    (text,) = generate.run(run_dir, ["def main"], max_new_tokens=20)
    tokenizer, eos_id = generate.load_tokenizer(str(run_dir))
    config = generate.configuration.load(run_dir / "config.yaml").model
    prompt = [eos_id, *tokenizer.encode("def main").ids]
    decoder = build(config, seed=2)
    size = vocabulary_size(tokenizer)
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + 20 and tokens[len(prompt) :][-1:] != [eos_id]:
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1, :size].argmax()))
    assert text == "def main" + tokenizer.decode(tokens[len(prompt) :])
    assert len(text) > len("def main")


def test_several_prompts_come_back_in_their_order(run_dir: Path) -> None:
    prompts = ["def main", "", "return 0\n" * 8, "d"]
    alone = [generate.run(run_dir, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert generate.run(run_dir, prompts, max_new_tokens=20) == alone


SHORT = ["--max-new-tokens", "3", "--temperature", "0", "--device", "cpu"]


def give(monkeypatch: pytest.MonkeyPatch, data: bytes, encoding: str = "utf-8") -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))


def test_lines_of_stdin_come_back_in_their_order(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch mode: a prompt a line, between prompts of the command line where it says `-`; a line each comes out."""
    lines = ["one two", "three", "one", "pa\u2028rt", "fo\frm", "na\x85me", "\x0bv", "\x1cs"]
    alone = []
    for line in ["first", *lines]:
        assert cli._run(["generate", str(run_dir), "--prompt", line, *SHORT]) == 0
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    assert len(set(alone)) == len(alone)
    expected = "".join(text.replace("\r", "\\r").replace("\n", "\\n") + "\n" for text in alone)
    text = "".join(f"{line}\n" for line in lines)
    for data in (text.encode(), text.encode("utf-8-sig"), text.replace("\n", "\r\n").encode(), text.encode()[:-1]):
        give(monkeypatch, data, "latin-1")  # whatever the locale is
        assert cli._run(["generate", str(run_dir), "--prompt", "first", "--prompt", "-", *SHORT]) == 0
        assert capsys.readouterr().out == expected


def test_blank_lines_stay_blank_and_line_breaks_are_written_out(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "following", lambda *_: "a\nb\r\n")
    give(monkeypatch, b"\none\n \t\ntwo\n\n")
    assert cli._run(["generate", str(run_dir), *SHORT]) == 0
    assert capsys.readouterr().out == "\n" + r"onea\nb\r\n" + "\n\n" + r"twoa\nb\r\n" + "\n\n"
    give(monkeypatch, b"one\n\n")
    assert cli._run(["generate", str(run_dir), "--jsonl", *SHORT]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"prompt": "one", "text": "a\nb\r\n", "tokens": 3, "finish_reason": "length"}
    assert second == {"prompt": "", "text": "", "tokens": 0, "finish_reason": "blank"}
    monkeypatch.undo()
    (text,) = generate.run(run_dir, [""], max_new_tokens=3)
    assert text, "an empty prompt that is asked for is a beginning"


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"good\ncaf\xe9\n", "line 2, byte 4"),
        (b"\xf0\x9f\x99", "line 1, byte 1"),
        ("good\n".encode("utf-16"), "line 1, byte 1"),
        (b"a\xed\xa0\x80", "line 1, byte 2"),  # half of a surrogate pair
    ],
)
def test_what_is_no_text_is_one_line(
    data: bytes, where: str, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, data)
    assert cli._run(["generate", str(run_dir), *SHORT]) == 2
    assert (
        capsys.readouterr().err == f"bigtrain: error: stdin='{where}': is not UTF-8 text; convert it: iconv -t utf-8\n"
    )
    with pytest.raises(ConfigError, match=r"prompt='caf\\udce9': is not UTF-8 text"):
        generate.run(run_dir, ["caf\udce9"])


def test_new_tokens_are_read_after_their_prompt() -> None:
    """SentencePiece drops the blank before the first word; WordPiece marks what goes on in a word; a character may be
    several byte-level tokens."""
    words = {"<s>": 0, "\u2581alpha": 1, "\u2581beta": 2, "\u2581": 3, "ha": 4}
    pieces = Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    pieces.add_special_tokens(["<s>"])
    pieces.decoder = decoders.Metaspace()
    assert generate.following(pieces, [0, 1], [2, 1]) == " beta alpha"
    assert generate.following(pieces, [0, 1], [4]) == "ha"
    assert generate.following(pieces, [0], [2, 1]) == "beta alpha"
    words = {"[CLS]": 0, "play": 1, "##ing": 2, ".": 3}
    pieces = Tokenizer(tokenizers.models.WordPiece(words, unk_token="[CLS]"))
    pieces.decoder = decoders.WordPiece()
    assert generate.following(pieces, [1], [2, 3]) == "ing."
    bytewise = train_tokenizer(["nothing"], 280)
    whole = bytewise.encode("\u00e9\U0001f642").ids
    assert generate.following(bytewise, whole[:2], whole[2:]) == "\U0001f642"


class Reciting(DecoderForGeneration):
    """Says `text` again and again, whatever it is asked."""

    def __init__(self, text: list[int], config: DecoderConfig) -> None:
        super().__init__(models.build(config))
        self.text, self.said = text, 0

    def forward(self, input_ids: Tensor, **unused: Any) -> CausalLMOutputWithPast:
        logits = torch.zeros(input_ids.size(0), 1, self.vocab_size)
        logits[:, 0, self.text[self.said % len(self.text)]] = 9.0
        self.said += 1
        return CausalLMOutputWithPast(logits=logits)


@pytest.mark.parametrize("special", [False, True], ids=["spelled", "one token"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_an_answer_ends_before_the_mark_of_its_template(
    special: bool, num_beams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """<|im_end|> is learned text where the tokenizer has no such token."""
    model = DecoderConfig(dim=32, n_layers=2, n_heads=4, vocab_size=320, max_seq_len=256)
    run = random_run(tmp_path, Config(model=model, task=InstructionConfig(template="chatml")))
    tokenizer = find_tokenizer(str(run))
    if special:
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer.save(str(run / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = False
    text = tokenizer.encode("four.<|im_end|>", add_special_tokens=False).ids
    assert (len(text) < 8) == special
    reciting = Reciting(text, model)
    spoken = SimpleNamespace(model=reciting, config=model)  # as a model of transformers comes
    monkeypatch.setattr(generate.inference, "load", lambda *_: (spoken, torch.device("cpu")))
    assert generate.run(run, ["d"], max_new_tokens=50, num_beams=num_beams) == ["four."]
    if num_beams == 1:
        assert reciting.said == len(text), "and there it stops"


def test_sampling_is_reproducible_by_seed(run_dir: Path) -> None:
    def sample(seed: int, **options: Any) -> list[str]:
        return generate.run(run_dir, ["def", "return"], max_new_tokens=20, temperature=1.0, seed=seed, **options)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, top_k=1) == generate.run(run_dir, ["def", "return"], max_new_tokens=20)
    assert sample(1, top_p=1e-6) == generate.run(run_dir, ["def", "return"], max_new_tokens=20)
    assert sample(3, num_beams=2) == sample(3, num_beams=2)


def test_nothing_beyond_the_end_of_the_document_or_the_vocabulary(run_dir: Path) -> None:
    tokenizer, eos_id = generate.load_tokenizer(str(run_dir))
    size = vocabulary_size(tokenizer)
    config = generate.configuration.load(run_dir / "config.yaml").model
    decoder = build(config, seed=2)
    options = {"do_sample": True, "temperature": 50.0, "top_k": 0, "top_p": 1.0, "num_beams": 1}
    torch.manual_seed(0)
    written = generate.write_on(decoder, [[eos_id, index] for index in range(1, 200)], eos_id, size, 40, options)
    assert all(eos_id not in tokens and all(token < size for token in tokens) for tokens in written)
    assert min(map(len, written)) < 40 == max(map(len, written))  # some ended, none is longer


@pytest.mark.parametrize(
    ("prompt", "max_new", "kept", "room"),
    [(10, 20, 10, 20), (44, 20, 44, 20), (50, 20, 44, 20), (500, 20, 44, 20), (500, 60, 32, 32), (20, 60, 20, 44)],
)
def test_what_does_not_fit_is_cut_with_a_word(
    prompt: int, max_new: int, kept: int, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = list(range(prompt))
    generate.logger.disabled = False  # Hydra, run in this process by another test, switches loggers off
    with caplog.at_level(logging.WARNING):
        assert generate.fit(tokens, max_new, 64) == (tokens[-kept:], room)
    assert ("the prompt's last" in caplog.text) == (kept < prompt)
    assert ("tokens are written" in caplog.text) == (room < max_new)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_writing_to_the_very_end_of_the_context(config: DecoderConfig) -> None:
    decoder = build(config)
    (tokens,) = generate.write_on(decoder, [list(range(20))], NO_EOS, NO_EOS, 100, {"do_sample": False})
    assert len(tokens) == 48 - 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: must be at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5: must be above 0 and at most 1"),
        ({"top_k": 5}, "temperature=0.0: takes the likeliest token"),
        ({"num_beams": 0}, "num_beams=0: must be at least 1"),
    ],
)
def test_wrong_options(run_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        generate.run(run_dir, ["a"], **options)


def test_what_is_no_run(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        generate.run(tmp_path, ["a"])
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        generate.run(tmp_path, ["a"])
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device here"):
            generate.run(run_dir, ["a"], device="cuda")


def test_weights_of_another_model(run_dir: Path, tmp_path: Path) -> None:
    config = Config()
    config.model = DecoderConfig(dim=64, n_layers=2, n_heads=4, vocab_size=320, max_seq_len=64)
    (tmp_path / "config.yaml").write_text(dump(config))
    for name in ("tokenizer", "checkpoints"):
        (tmp_path / name).symlink_to(run_dir / name)
    with pytest.raises(BigtrainError, match=r"parameter blocks\.0\.\S+ is \(32,\) there, \(64,\) in this model"):
        generate.run(tmp_path, ["a"])
