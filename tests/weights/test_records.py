"""Records of a ``torch_dist`` file: torch.load reads them, tensors are written from their own memory, and a short write
goes on where it stopped."""

import io
import os

import pytest
import torch

from dcpo_megatron.weights import torch_dist_writing
from dcpo_megatron.weights.torch_dist_writing import render, serialized, write_records

TENSORS = {
    "plain": torch.arange(1000.0).reshape(20, 50),
    "bf16": torch.randn(7, 3).bfloat16(),
    "a view": torch.arange(1000)[100:200],
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "a number": torch.tensor(3),
    "empty": torch.empty(0, 5),
    "with gradient": torch.randn(5, requires_grad=True),
}


def offsets(tensor: torch.Tensor) -> tuple[int, ...]:
    return (0,) * tensor.dim()


def read(path, record):
    content = path.read_bytes()[record.start : record.start + record.length]
    return torch.load(io.BytesIO(content), weights_only=True)


def test_torch_load_reads_every_record(tmp_path):
    pieces = [(name, offsets(tensor), tensor) for name, tensor in TENSORS.items()]
    told: list[int] = []
    records = write_records(tmp_path / "file", [*pieces, ("object", None, serialized({"step": 3}))], told.append)
    for (name, _, tensor), record in zip(pieces, records):
        found = read(tmp_path / "file", record)
        assert (record.key, record.sizes) == (name, tuple(tensor.shape))
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)
        assert found.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    assert records[-1].sizes is None and read(tmp_path / "file", records[-1]) == [{"step": 3}]
    assert told == [tensor.numel() * tensor.itemsize for tensor in TENSORS.values()]
    assert records[-1].start + records[-1].length == (tmp_path / "file").stat().st_size


@pytest.mark.parametrize("name", ["plain", "bf16", "with gradient"])
def test_a_tensor_is_rendered_without_a_copy_of_its_numbers(name):
    tensor = TENSORS[name].detach().clone()
    rendered = render(name, offsets(tensor), tensor)
    tensor.fill_(5)
    content = b"".join(bytes(buffer) for buffer in rendered.buffers)
    assert torch.equal(torch.load(io.BytesIO(content), weights_only=True), tensor)


@pytest.mark.parametrize("most", [1, 100, 4096])
def test_a_system_that_writes_less_than_it_was_given_is_asked_again(tmp_path, monkeypatch, most):
    whole = os.writev

    def short(file, buffers):
        return whole(file, [memoryview(buffers[0])[:most]])

    monkeypatch.setattr(torch_dist_writing.os, "writev", short)
    tensor = torch.arange(300)
    (record,) = write_records(tmp_path / "file", [("key", (0,), tensor)])
    assert torch.equal(read(tmp_path / "file", record), tensor)


def test_an_interrupt_while_a_tensor_is_rendered_stays_an_interrupt(monkeypatch):
    write, calls = torch_dist_writing._Collector.write, []

    def interrupted(self, data):
        calls.append(len(data))
        if len(calls) == 2:  # then torch goes on to close its archive
            raise KeyboardInterrupt
        return write(self, data)

    monkeypatch.setattr(torch_dist_writing._Collector, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        torch_dist_writing.render("weight", None, torch.ones(3))
