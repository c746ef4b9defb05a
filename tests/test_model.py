"""The model against loops in float64, against transformers' Llama, and against its own promises."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lm.base.errors import InputError
from lm.base.params import load_params
from lm.base.sections import read_section
from lm.model.kernels import cross_entropy, rotate
from lm.model.transformer import (
    ModelConfig,
    RMSNorm,
    RotaryEmbedding,
    TransformerLM,
)
from lm.train.optim import AdamW
from tests import reference
from tests.project import ROOT

VARIANTS = [
    {},
    {"num_heads": 4, "num_kv_heads": 2},
    {"num_heads": 4, "num_kv_heads": 1, "qk_norm": True},
    {"tie_embeddings": True},
    {"norm": "none"},
    {"norm_position": "post"},
    {"position_embedding": "none"},
    {"ffn": "silu"},
]


def variant_model(config: ModelConfig, changes: dict) -> TransformerLM:
    torch.manual_seed(1)
    model = TransformerLM(replace(config, **changes)).eval()
    for name, parameter in model.named_parameters():
        if "ln" in name or "norm" in name:  # ones would hide a forgotten weight
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_model_equals_loops_in_float64(model_config, changes):
    model = variant_model(model_config, changes)
    ids = torch.randint(96, (2, 16))
    expected = np.stack([reference.transformer(row, model) for row in ids.tolist()])
    np.testing.assert_allclose(model(ids).detach().numpy(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masking", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_what_a_compiler_is_given_computes_the_same(model_config, changes, masking, monkeypatch):
    """The formulas for a compiler, run without one."""
    model = variant_model(model_config, {**changes, "intra_document_masking": masking}).train()
    results = []
    for compiling in (False, True):
        monkeypatch.setattr("torch.compiler.is_compiling", lambda compiling=compiling: compiling)
        loss = model.loss(PACKED, PACKED, model.documents(PACKED, END))
        results.append([loss, *torch.autograd.grad(loss, tuple(model.parameters()))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    assert any(not torch.equal(got, wanted) for got, wanted in zip(*results, strict=True))


def as_llama(ours):
    """The model of transformers with the same weights."""
    config = ours.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    ).eval()

    def halves_apart(weight):  # transformers pairs feature i with i + D/2, we pair 2i with 2i + 1
        heads = weight.view(-1, config.head_dim // 2, 2, config.d_model)
        return heads.transpose(1, 2).reshape(weight.shape)

    names = {"token_embeddings": "model.embed_tokens", "ln_final": "model.norm",
             "lm_head": "lm_head"}  # fmt: skip
    for i in range(config.num_layers):
        theirs = f"model.layers.{i}"
        names |= {
            f"layers.{i}.ln1": f"{theirs}.input_layernorm",
            f"layers.{i}.ln2": f"{theirs}.post_attention_layernorm",
            f"layers.{i}.attn.output_proj": f"{theirs}.self_attn.o_proj",
            f"layers.{i}.ffn.w1": f"{theirs}.mlp.gate_proj",
            f"layers.{i}.ffn.w2": f"{theirs}.mlp.down_proj",
            f"layers.{i}.ffn.w3": f"{theirs}.mlp.up_proj",
        } | {f"layers.{i}.attn.{p}_proj": f"{theirs}.self_attn.{p}_proj" for p in "qkv"}
    state = {
        f"{names[key.removesuffix('.weight')]}.weight": halves_apart(weight)
        if "q_proj" in key or "k_proj" in key
        else weight
        for key, weight in ours.state_dict().items()
    }
    llama.load_state_dict(state)
    return llama


def test_model_equals_llama_of_transformers(model_config):
    config = replace(model_config, num_heads=4, num_kv_heads=2, rope_theta=500.0)
    ours = variant_model(config, {})
    ids = torch.randint(96, (3, 16))
    torch.testing.assert_close(ours(ids), as_llama(ours)(ids).logits, atol=1e-5, rtol=1e-4)


END = 95
PACKED = torch.tensor(
    [
        [1, 2, 3, END, 4, 5, 6, 7, 8, END, 9, 10, 11, 12, 13, 14],
        [END, END, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, END],
        [5, 5, 5, 5, 5, 5, 5, 5, 1, 5, 5, 5, 5, 5, 5, 5],
    ]
)
LENGTHS = [[4, 6, 6], [1, 1, 14], [16]]  # of the documents in each row, ends included


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_documents_of_a_masked_window_are_as_each_alone(model_config, changes):
    plain = variant_model(model_config, changes)
    masked = variant_model(model_config, {**changes, "intra_document_masking": True})
    logits = masked(PACKED, documents=masked.documents(PACKED, END))
    for row, ids, lengths in zip(logits, PACKED, LENGTHS, strict=True):
        alone = [plain(document[None])[0] for document in ids.split(lengths)]
        torch.testing.assert_close(row, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert (logits[0, 4:] - plain(PACKED)[0, 4:]).abs().max() > 0.01


def test_masked_windows_equal_llama_with_a_block_diagonal_mask(model_config):
    config = replace(model_config, num_heads=4, num_kv_heads=2, intra_document_masking=True)
    ours = variant_model(config, {})
    blocks = [torch.block_diag(*(torch.ones(n, n).tril() for n in row)) for row in LENGTHS]
    mask = torch.stack(blocks)[:, None]  # (B, 1, T, T)
    theirs = as_llama(ours)(PACKED, attention_mask=(1 - mask) * torch.finfo(torch.float32).min)
    logits = ours(PACKED, documents=ours.documents(PACKED, END))
    torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=1e-4)


def test_checkpointed_gradients_of_masked_windows_are_the_same(model_config):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        masked = replace(model_config, intra_document_masking=True)
        model = TransformerLM(masked, checkpointing).train()
        logits = model(PACKED, documents=model.documents(PACKED, END))
        cross_entropy(logits, PACKED).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_masked_model_is_never_run_without_its_mask_nor_another_with_one(model_config, model):
    masked = TransformerLM(replace(model_config, intra_document_masking=True))
    with pytest.raises(ValueError, match="pass documents if and only if"):
        masked(PACKED)
    with pytest.raises(ValueError, match="pass documents if and only if"):
        model(PACKED, documents=PACKED)
    with pytest.raises(InputError, match="no id is known to end a document"):
        masked.documents(PACKED, None)
    assert model.documents(PACKED, None) is None


def with_third_choice(config, key):
    """The settings with a value that is none of the choices, as one that was added elsewhere."""
    changed = copy.copy(config)
    object.__setattr__(changed, key, "third")
    return changed


@pytest.mark.parametrize("key", ["norm", "norm_position", "position_embedding", "ffn"])
def test_a_third_choice_is_never_computed_as_another(model_config, key):
    with pytest.raises((AssertionError, KeyError), match="third"):
        TransformerLM(with_third_choice(model_config, key))


def test_parameter_count_of_the_requirement(model_config):
    config = replace(model_config, vocab_size=256, d_model=128, num_heads=4, d_ff=256)
    assert TransformerLM(config).num_parameters() == 393_856


def test_initial_loss_of_the_default_is_within_a_tenth_of_uniform():
    params = load_params(ROOT / "params.yaml")
    params["model"]["vocab_size"] = params["tokenizer"]["vocab_size"]
    config = read_section(ModelConfig, params, "model")
    torch.manual_seed(0)
    model = TransformerLM(config)
    ids = torch.randint(config.vocab_size, (8, 129))
    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    assert abs(loss.item() - math.log(config.vocab_size)) < 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_are_truncated_normal(model_config, tied):
    config = replace(model_config, vocab_size=4096, d_model=128, d_ff=512, tie_embeddings=tied)
    model = TransformerLM(config)
    expected = {"layers.0.ffn.w1.weight": (2 / 640) ** 0.5,
                "token_embeddings.weight": (2 / 4224) ** 0.5 if tied else 1.0}  # fmt: skip
    weights = dict(model.named_parameters())
    for name, std in expected.items():
        assert weights[name].abs().max() <= 3 * std * (1 + 1e-6)
        assert weights[name].std().item() == pytest.approx(std * 0.9866, rel=0.02)  # cut at 3
    assert (weights["ln_final.weight"] == 1).all()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_future_tokens_do_not_change_past_logits(model_config, changes):
    model = variant_model(model_config, changes)
    ids = torch.randint(96, (1, 16))
    changed = ids.clone()
    changed[:, 9:] = (ids[:, 9:] + 1) % 96
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


def test_too_many_positions_are_refused(model):
    with pytest.raises(ValueError, match="17 positions exceed"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_one_batch_is_overfitted(model_config):
    torch.manual_seed(0)
    model = TransformerLM(model_config)
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    ids = torch.randint(96, (4, 17))
    for _ in range(150):
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_computes_in_float32_and_keeps_the_dtype(dtype):
    norm = RMSNorm(64, eps=1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = (torch.randn(5, 64) * 300).to(dtype)  # squares overflow float16
    got = norm(x)
    rows = x.double().numpy()
    weight = norm.weight.detach().double().numpy()
    expected = torch.tensor(np.array([reference.rms_norm(row, weight, 1e-5) for row in rows]))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), atol=0, rtol=torch.finfo(dtype).eps * 2)


def test_rope_turns_interleaved_pairs_as_complex_numbers():
    rope = RotaryEmbedding(head_dim=8, context_length=32, theta=10000.0)
    x = torch.randn(1, 1, 24, 8)
    expected = [reference.rotate(row, t, 10000.0) for t, row in enumerate(x[0, 0].double().numpy())]
    got = rotate(x, *rope(24))[0, 0].double()
    halves = [*range(0, 8, 2), *range(1, 8, 2)]
    as_compiled = rotate(x[..., halves], *rope(24), halves=True)[0, 0].double()
    torch.testing.assert_close(got, torch.tensor(np.array(expected)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(as_compiled, got[:, halves], atol=1e-6, rtol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(model_config):
    config = replace(model_config, dropout=0.1)
    ids = torch.randint(96, (2, 17))
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = TransformerLM(config, checkpointing)
        cross_entropy(model(ids[:, :-1]), ids[:, 1:]).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_gradient_checkpointing_keeps_fewer_activations(model_config):
    ids, kept = torch.randint(96, (2, 16)), {}
    for checkpointing in (False, True):
        model, sizes = TransformerLM(model_config, checkpointing), []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(ids)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_dropout_acts_in_training_alone_and_in_every_place(model_config, monkeypatch):
    model = TransformerLM(replace(model_config, dropout=0.5))
    ids = torch.randint(96, (1, 16))
    assert not torch.equal(model(ids), model(ids))
    drops = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert [module.p for module in drops] == [0.5] * (1 + model_config.num_layers)
    rates = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *a, **k: rates.append(k["dropout_p"]) or attention(*a, **k),
    )
    model(ids)
    model.eval()
    assert torch.equal(model(ids), model(ids))
    assert rates == [0.5, 0.5, 0, 0, 0, 0]


def test_residual_branches_start_at_zero_on_request(model_config):
    model = TransformerLM(replace(model_config, zero_init=True))
    ids = torch.randint(96, (2, 16))
    embedded = model.lm_head(model.ln_final(model.token_embeddings(ids)))
    assert torch.equal(model(ids), embedded)


def test_flops_per_token_counts_the_matrix_products(model_config):
    from torch.utils.flop_counter import FlopCounterMode

    model = TransformerLM(model_config)
    ids = torch.randint(96, (1, 16))
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        cross_entropy(model(ids), ids).backward()
    # the counter sees no norms; a norm weight counts 6 here as in the usual formula
    norms = 6 * (2 * model_config.num_layers + 1) * model_config.d_model
    assert counter.get_total_flops() / 16 == pytest.approx(
        model.flops_per_token() - norms, rel=0.02
    )
