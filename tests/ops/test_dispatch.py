"""Which back end runs, and that the GPU back ends are called as their documentation says."""

import sys
import types

import pytest
import torch

import mixkv
from mixkv.ops import dispatch, flash, native, reference, report
from mixkv.ops.arguments import LogitOptions
from mixkv.selection.ranking import Selection
from mixkv.storage.ragged import RaggedStore

CPU = torch.device("cpu")


def make_store(dtype=torch.float32, backend="torch"):
    lengths = torch.tensor([[1, 40], [17, 3]])
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 2, 50, 32, generator=generator).to(dtype) for _ in range(2))
    flat = [torch.randperm(50, generator=generator)[:n].sort().values for row in lengths.tolist() for n in row]
    selection = Selection(torch.cat(flat).to(torch.int32), torch.zeros(1), lengths, torch.zeros(1), torch.zeros(1))
    return RaggedStore.from_selection(key, value, selection, backend)


def test_auto_takes_the_compiled_operations_where_they_are(monkeypatch):
    monkeypatch.delenv("MIXKV_BACKEND", raising=False)
    expected = "native" if native.status("cpu").available else "torch"
    assert dispatch.choose("auto", CPU, torch.float32, 64, 64) == expected
    assert dispatch.choose("auto", CPU, torch.float32, 20, 20) == "torch"
    assert dispatch.choose("auto", CPU, torch.float64, 64, 64) == "torch"
    assert dispatch.choose("torch", CPU, torch.float32, 64, 64) == "torch"
    monkeypatch.setenv("MIXKV_BACKEND", "torch")
    assert dispatch.choose("auto", CPU, torch.float32, 64, 64) == "torch"
    monkeypatch.setenv("MIXKV_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown MIXKV_BACKEND='nonsense'; choose from auto, native"):
        dispatch.choose("auto", CPU, torch.float32, 64, 64)


@pytest.mark.parametrize(
    "backend, message",
    [
        ("varlen", "needs a CUDA device, not cpu"),
        ("flash", "needs a CUDA device, not cpu"),
        ("native", "multiples of 16 up to 256, not 20 and 20"),
    ],
)
def test_a_back_end_that_cannot_be_had_is_an_error(backend, message):
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot be used: .*{message}"):
        dispatch.choose(backend, CPU, torch.float32, 20, 20)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose from auto, native, varlen, flash, torch"):
        mixkv.MixKVConfig(backend="cuda")


def test_reasons_on_a_gpu_without_flash_attention():
    cuda = torch.device("cuda")
    assert "half precision" in dispatch.why_not("varlen", cuda, torch.float32, 64, 64)
    assert "equal head sizes" in dispatch.why_not("flash", cuda, torch.float16, 64, 128)


def test_report_names_the_choice():
    assert any(line.startswith("cpu: back end ") for line in report.report())


def dense_varlen(query, key, value, starts, lengths, scale, softcap=0.0):
    """One sequence after the other: query [S, G, D], key [rows, 1, D]."""
    out = torch.zeros(query.shape[0], query.shape[1], value.shape[-1], dtype=query.dtype)
    for index, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist())):
        logits = query[index].float() @ key[start : start + length, 0].float().T * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        out[index] = (logits.softmax(-1) @ value[start : start + length, 0].float()).to(query.dtype)
    return out


def test_torch_varlen_reads_the_buffers_in_place(monkeypatch):
    store, query = make_store(), torch.randn(2, 6, 1, 32)

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, enable_gqa, seqused_k):
        assert k.data_ptr() == store.key.data_ptr() and max_q == 1 and enable_gqa
        assert cu_seq_q.tolist() == list(range(5)) and cu_seq_k[-1] == store.key.shape[0] and max_k >= seqused_k.max()
        assert cu_seq_q.dtype == cu_seq_k.dtype == seqused_k.dtype == torch.int32
        return dense_varlen(q, k, v, cu_seq_k[:-1], seqused_k, scale)

    module = types.SimpleNamespace(varlen_attn=varlen_attn)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    extent = dict(max_length=store.max_length, stride=None)
    arguments = (query, store.buffers, LogitOptions(0.2))
    assert torch.allclose(flash.torch_attend(*arguments, **extent), reference.attend(*arguments, **extent), atol=1e-5)
    arguments = (query, store.buffers, LogitOptions(0.2, sinks=torch.randn(6)))
    assert torch.equal(flash.torch_attend(*arguments, **extent), reference.attend(*arguments, **extent))


def test_flash_attention_gets_packed_sequences(monkeypatch):
    store, query = make_store(), torch.randn(2, 6, 1, 32)

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, softcap):
        assert cu_k.diff().tolist() == store.lengths.tolist() and cu_k.dtype == torch.int32 and max_q == 1
        return dense_varlen(q, k, v, cu_k[:-1], cu_k.diff(), softmax_scale, softcap)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    extent = dict(max_length=store.max_length, stride=None)
    for softcap in (None, 2.0):
        arguments = (query, store.buffers, LogitOptions(0.2, softcap))
        assert torch.allclose(flash.flash_attend(*arguments, **extent), reference.attend(*arguments, **extent), atol=1e-5)


@pytest.mark.skipif(not native.status("cpu").available, reason="no compiled operations")
def test_a_cache_runs_the_same_on_both_back_ends():
    stores = [make_store(backend=backend) for backend in ("native", "torch")]
    generator = torch.Generator().manual_seed(1)
    for step in range(40):
        query, key, value = (torch.randn(2, heads, 1, 32, generator=generator) for heads in (6, 2, 2))
        outs = [store.append_attend(query, key, value, 50 + step, LogitOptions(0.2)) for store in stores]
        assert torch.allclose(*outs, atol=1e-5)
    for store in stores:
        store.take_rows([1, 1, 0])
        store.crop(7)
    for ours, theirs in zip(*(store.positions() for store in stores)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    outs = [store.attend(torch.ones(3, 6, 1, 32), LogitOptions(0.2)) for store in stores]
    assert torch.allclose(*outs, atol=1e-5)
